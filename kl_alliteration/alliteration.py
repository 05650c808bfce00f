"""Text to alliteration counts. The study's definition, with the standard library alone."""

from itertools import pairwise


def count_alliterations(text: str) -> int:
    """Number of adjacent pairs of whitespace-separated words whose first characters agree after lower-casing.

    `"goose goose duck duck"` has 2, `"duck goose duck"` 0. Punctuation is part of a word, as in the study: `"Tall` and
    `tall` do not agree.
    """
    initials = [word[0].lower() for word in text.split()]
    return sum(a == b for a, b in pairwise(initials))


def alliterating_words(text: str) -> list[tuple[str, bool]]:
    """The words of a text, and whether each is in an alliterating pair."""
    words = text.split()
    initials = [word[0].lower() for word in words]
    pairs = [False, *(a == b for a, b in pairwise(initials)), False]
    return [(word, any(sides)) for word, sides in zip(words, pairwise(pairs), strict=False)]
