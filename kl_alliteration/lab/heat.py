"""The KL along a story: its text cut where tokens and words end, each part with the exact KL of its token, in nats."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..text import alliterating_words
from .runs import read_stories

LEAST_SCALE = 0.1  # nats of the full colour, at the least: a run that has hardly moved looks so
HOTTEST = 5  # tokens of a story that are named in words


@dataclass(frozen=True)
class Token:
    """What is coloured as one: a token, or those that make one character together, with the sum of their KL, nats."""

    text: str
    kl: float
    count: int = 1

    @property
    def shown(self) -> str:
        """Its text in words of the page, where it may be white space or nothing."""
        return "the end" if not self.text else repr(self.text) if self.text.isspace() else f"“{self.text.strip()}”"

    def in_words(self) -> str:
        return f"{self.shown}: {self.kl:.2f} nats" + (f" of its {self.count} tokens" if self.count > 1 else "")


@dataclass(frozen=True)
class Story:
    """A story for the page, with or without the KL of its tokens.

    `words` are `(whether the word alliterates, [(text, place in tokens, or None)])`, and between them the white space.
    """

    text: str
    tokens: list[Token] = field(default_factory=list)

    @property
    def words(self) -> list[tuple[bool, list[tuple[str, int | None]]]]:
        ends, end = [], len(self.text) - sum(len(token.text) for token in self.tokens)
        owners = [None] * end + [place for place, token in enumerate(self.tokens) for _ in token.text]
        for found, (_, alliterates) in zip(re.finditer(r"\S+", self.text), alliterating_words(self.text), strict=True):
            ends += [(found.start(), False), (found.end(), alliterates)]
        words, start = [], 0
        for end, alliterates in [*ends, (len(self.text), False)]:
            parts = []
            while start < end:
                stop = start + 1
                while stop < end and owners[stop] == owners[start]:
                    stop += 1
                parts.append((self.text[start:stop], owners[start]))
                start = stop
            if parts:
                words.append((alliterates, parts))
        return words

    @property
    def hottest(self) -> list[Token]:
        """The tokens of the highest KL, highest first."""
        return sorted(self.tokens, key=lambda token: -token.kl)[:HOTTEST]


def tokens_of(row: dict) -> list[Token] | None:
    """The tokens of a line of `stories.jsonl`, in one with the token that completes their character.

    A last one without a text is what ended the story. `None` where the line has none, or they are not of its text.
    """
    texts, kls = row.get("tokens"), row.get("token_kls")
    if not isinstance(texts, list) or not isinstance(kls, list) or len(texts) != len(kls):
        return None
    if not all(isinstance(text, str) for text in texts) or "".join(texts) != row.get("completion"):
        return None
    if not all(isinstance(kl, (int, float)) and math.isfinite(kl) for kl in kls):
        return None
    found, kl, count = [], 0.0, 0
    for text, value in zip(texts, kls, strict=True):
        kl, count = kl + max(0.0, value), count + 1
        if text:
            found.append(Token(text, kl, count))
            kl, count = 0.0, 0
    return [*found, Token("", kl, count)] if count else found


def with_tokens(run: Path, texts: list[str]) -> list[Story]:
    """The first stories of a run, with the KL of their tokens as far as its `stories.jsonl` has them."""
    rows = read_stories(run, "after", len(texts))
    known = {f"{row.get('prompt')}{row.get('completion')}": tokens_of(row) for row in rows}
    return [Story(text, known.get(text) or []) for text in texts]


def scale(stories: list[Story]) -> float:
    """The KL of the full colour in nats, one for a page, so that runs compare: a hundredth of the tokens is above."""
    kls = sorted(token.kl for story in stories for token in story.tokens)
    return max(LEAST_SCALE, kls[(len(kls) * 99) // 100]) if kls else LEAST_SCALE
