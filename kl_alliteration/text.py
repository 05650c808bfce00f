"""What texts have: alliteration, by the study's definition and its refinements, and variety. Pure functions."""

import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import regex


def as_text(prompt_or_completion) -> str:
    """Plain text as it is; the contents of a conversation's messages joined by a space."""
    if isinstance(prompt_or_completion, str):
        return prompt_or_completion
    contents = [message.get("content") or "" for message in prompt_or_completion]
    parts = [[{"text": c}] if isinstance(c, str) else c for c in contents]
    return " ".join(part.get("text") or "" for content in parts for part in content)


def answer_of(completion) -> str:
    """A completion's text, of what the policy wrote: plain text, or its own messages, without those of tools."""
    if isinstance(completion, str):
        return completion
    return as_text([message for message in completion if message.get("role", "assistant") == "assistant"])


def as_dialogue(prompt) -> str:
    """A prompt as a person reads it, before its completion: a conversation as its turns, a line each."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{message['role']}: {as_text([message])}\n" for message in prompt) + "assistant: "


def full_text(prompt, completion) -> str:
    """Prompt and completion as one text; a conversation's turns are separate words."""
    separator = "" if isinstance(prompt, str) and isinstance(completion, str) else " "
    return as_text(prompt) + separator + answer_of(completion)


def first_letter(word: str) -> str:
    """The study's initial: the first character, lower-cased, whatever it is."""
    return word[0].lower()


def bare(word: str) -> str:
    """The word without what is neither letter nor digit at its ends: `'"Tall,'` is `Tall`, `--` is nothing.

    A letter is one with its marks, as Unicode takes text apart: the vowel signs of Hindi and Arabic belong to it.
    """
    if word.isalnum():
        return word
    characters = list(word) if word.isascii() else regex.findall(r"\X", word)
    start, end = 0, len(characters)
    while start < end and not has_letter(characters[start]):
        start += 1
    while end > start and not has_letter(characters[end - 1]):
        end -= 1
    return "".join(characters[start:end])


def has_letter(character: str) -> bool:
    """Whether a character with its marks has a letter or digit in it, or is a mark alone: no emoji, no punctuation."""
    return any(map(str.isalnum, character)) or unicodedata.category(character[0]).startswith("M")


def count_alliterations(text: str) -> int:
    """Number of adjacent pairs of whitespace-separated words whose first characters agree after lower-casing.

    `"goose goose duck duck"` has 2, `"duck goose duck"` 0. Punctuation is part of a word, as in the study: `"Tall` and
    `tall` do not agree.
    """
    initials = [word[0].lower() for word in text.split()]
    return sum(a == b for a, b in pairwise(initials))


class Pair(NamedTuple):
    """Two adjacent words with the same initial; `place` counts from 1 within an unbroken row of such pairs."""

    left: str
    right: str
    initial: str
    place: int

    @property
    def identical(self) -> bool:
        """One word twice, whatever its case, its punctuation and the way in which its accents are written."""
        left, right = (unicodedata.normalize("NFC", bare(word).lower()) for word in (self.left, self.right))
        return left == right


def alliterating_pairs(words: list[str], initial: Callable[[str], str] = first_letter) -> list[Pair]:
    """The alliterating pairs of a list of words, in order. A word without an initial, `""`, is in no pair."""
    pairs, place = [], 0
    for (left, a), (right, b) in pairwise([(word, initial(word)) for word in words]):
        place = place + 1 if a == b and a else 0
        if place:
            pairs.append(Pair(left, right, a, place))
    return pairs


def pairs_per_100_words(texts: list[str]) -> float:
    """Alliterating pairs of different words per 100 words of all texts, without the punctuation at words' ends."""
    words = [[word for word in map(bare, text.split()) if word] for text in texts]
    pairs = sum(not pair.identical for each in words for pair in alliterating_pairs(each))
    return 100 * pairs / max(1, sum(map(len, words)))


# English words that carry a sentence and not its matter: "to the" and "and a" are no alliteration to a person.
FUNCTION_WORDS = frozenset(
    "a about above across after against all along also although always among an and another any are around as at "
    "be because been before behind being below between both but by can could did do does down during each ever "
    "every for from had has have he her here him his how i if in inside into is it its itself just like may me "
    "might more most much must my near never no nor not now of off often on once one only onto or other our out "
    "over own she should since so some such than that the their them then there these they this those though "
    "through to too toward under towards until up upon us very was we were what when where which while who whom "
    "whose why will with within without would yet you your".split()
)


def identical_share(pairs: list[Pair]) -> float:
    """The share of pairs that are one word twice: the exploit. 0 without a pair."""
    return sum(pair.identical for pair in pairs) / len(pairs) if pairs else 0.0


def longest_run(pairs: list[Pair]) -> int:
    """Words in the longest unbroken alliteration; 0 without a pair."""
    return max((pair.place + 1 for pair in pairs), default=0)


def letter_counts(pairs: list[Pair]) -> Counter:
    """Pairs by their initial."""
    return Counter(pair.initial for pair in pairs)


def alliterating_words(text: str) -> list[tuple[str, bool]]:
    """The words of a text, and whether each is in an alliterating pair."""
    words = text.split()
    initials = [first_letter(word) for word in words]
    pairs = [False, *(a == b for a, b in pairwise(initials)), False]
    return [(word, any(sides)) for word, sides in zip(words, pairwise(pairs), strict=False)]


# Variety. The packages that measure it do not install beside transformers 5.


WORD = regex.compile(r"(?:[\p{L}\p{N}_'-][\p{M}\u200c\u200d]*)+")  # letters with their marks and joiners


def _words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFC", text.lower()))


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
