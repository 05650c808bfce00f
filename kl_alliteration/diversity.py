"""How varied a set of texts is: pure functions on strings, each a number of the whole set.

The packages that measure this do not install beside transformers 5.
"""

import re
import zlib


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def different_share(texts: list[str]) -> float:
    """Different texts over texts: 1 where no two are the same."""
    return len(set(texts)) / len(texts) if texts else 0.0


def distinct_n(texts: list[str], n: int = 2) -> float:
    """Different runs of `n` words over all runs of `n` words in the set (Li et al. 2016, arXiv 1510.03055).

    Lower-cased, without punctuation. It falls as a set grows: compare sets of one size.
    """
    runs = [tuple(words[i : i + n]) for words in map(_words, texts) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def compression_ratio(texts: list[str]) -> float:
    """Bytes of the texts, one a line, over their bytes under zlib: about 2 for prose, more for repetition."""
    raw = "\n".join(texts).encode()
    return len(raw) / len(zlib.compress(raw, 9)) if raw else 0.0
