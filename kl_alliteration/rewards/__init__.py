"""Reward functions in TRL's shape: `(prompts, completions, **columns) -> list[float]`, usable by dotted path."""

import json
import re
from collections import Counter
from pathlib import Path

from ..text import (
    FUNCTION_WORDS,
    Pair,
    alliterating_pairs,
    answer_of,
    bare,
    count_alliterations,
    first_letter,
    full_text,
    identical_share,
    letter_counts,
    longest_run,
)
from .sounds import first_sound, sounds

LETTER_SHARES = Path(__file__).parent / "letters.json"  # of the embedded model's words
IN_WORDS = re.compile(r"(?P<content>content_)?alliteration_in_(?P<words>[1-9]\d*)_words(_on_(?P<letters>[a-z]+))?")
MOST = 10.0  # a pair on a letter that is hardly ever seen is not worth more


class AlliterationReward:
    """Alliterating pairs of words, each worth 1, less or more.

    A reward function of TRL's: `(prompts, completions, **columns) -> list[float]`, B of them, of prompt and completion
    as one text. Without options it is the study's count; the factors of several options are multiplied. Picklable.

    Args:
        name (`str`): What TRL calls it.
        distinct (`bool`): A pair of identical words is worth 0.
        content (`bool`): A pair with a function word of English, such as "to the", is worth 0.
        runs (`bool`): The n-th pair of an unbroken row is worth n: three words in a row 3, four 6.
        saturate (`str`, *optional*): `"letter"` or `"pair"`: the n-th use of a letter, or of the same two words in the
            same order, in a text is worth 1/n.
        letters (`str`, *optional*): Only pairs on these letters count.
        letter_weights (`dict[str, float]`, *optional*): What a pair on a letter is worth; letters without one, 0.
        phonetic (`bool`): Agreement of the first sound, not of the first letter; needs the extra `phonetic`.
        strip_punctuation (`bool`): Punctuation at a word's ends does not count, and is no word by itself.
        per_100_words (`bool`): The sum per 100 words.
        at_least_words (`int`): With `per_100_words`, a shorter text counts as one of so many words: a rate alone is
            won by an answer of three words.
        completion_only (`bool`): The prompt's words do not count: of a conversation, the answer's alone.

    Raises:
        `ValueError`: for an option that does not exist. `ImportError`: for `phonetic` without its extra.
    """

    scores_prefixes = True  # what a word adds is earned there (`credit.use_reward_to_go`)

    def __init__(
        self,
        name: str,
        *,
        distinct: bool = False,
        content: bool = False,
        runs: bool = False,
        saturate: str | None = None,
        letters: str | None = None,
        letter_weights: dict[str, float] | None = None,
        phonetic: bool = False,
        strip_punctuation: bool = False,
        per_100_words: bool = False,
        at_least_words: int = 1,
        completion_only: bool = False,
    ):
        if saturate not in (None, "letter", "pair"):
            raise ValueError(f"saturate must be 'letter' or 'pair', got {saturate!r}")
        for letter in letters or "":
            check_letter(letter)
        if letters == "":
            raise ValueError("letters must name at least one letter")
        if at_least_words < 1 or (at_least_words > 1 and not per_100_words):
            raise ValueError(f"at_least_words must be >= 1 and needs per_100_words, got {at_least_words}")
        self.__name__ = name
        self.distinct, self.content, self.runs, self.saturate = distinct, content, runs, saturate
        self.letters = None if letters is None else frozenset(map(str.lower, letters))  # of `İ` that is no `i`
        self.letter_weights, self.per_100_words = letter_weights, per_100_words
        if letter_weights is not None:  # letters are compared in lower case
            self.letter_weights = {letter.lower(): worth for letter, worth in letter_weights.items()}
        self.at_least_words, self.completion_only = at_least_words, completion_only
        self.phonetic, self.strip_punctuation = phonetic, strip_punctuation
        if phonetic:
            sounds()
        self.plain = not any(
            (distinct, content, runs, saturate, letters, letter_weights, phonetic, strip_punctuation, per_100_words)
        )

    def __repr__(self) -> str:
        return f"AlliterationReward({self.__name__!r})"

    def words(self, text: str) -> list[str]:
        words = text.split()
        return [word for word in map(bare, words) if word] if self.strip_punctuation else words

    def pairs(self, words: list[str]) -> list[Pair]:
        return alliterating_pairs(words, first_sound if self.phonetic else first_letter)

    def score(self, text: str) -> float:
        """One text's reward. Never raises on any text."""
        if self.plain:
            return float(count_alliterations(text))
        words = self.words(text)
        total, uses = 0.0, Counter()
        for pair in self.pairs(words):
            if self.distinct and pair.identical:
                continue
            if self.content and not FUNCTION_WORDS.isdisjoint((bare(pair.left).lower(), bare(pair.right).lower())):
                continue
            letter = first_letter(pair.right)
            if self.letters is not None and letter not in self.letters:
                continue
            worth = 1.0 if self.letter_weights is None else self.letter_weights.get(letter, 0.0)
            if self.runs:
                worth *= pair.place
            if self.saturate:
                use = pair.initial if self.saturate == "letter" else (pair.left.lower(), pair.right.lower())
                uses[use] += 1
                worth /= uses[use]
            total += worth
        return 100 * total / max(self.at_least_words, len(words)) if self.per_100_words else total

    def __call__(self, prompts, completions, log_metric=None, log_extra=None, **columns) -> list[float]:
        """B prompts and B completions, plain or conversational -> B rewards, of both unless `completion_only`.

        TRL's `log_metric` and `log_extra`, where they are given, get what the texts alliterate on.
        """
        if self.completion_only:
            texts = [answer_of(completion) for completion in completions]
        else:
            texts = [full_text(p, c) for p, c in zip(prompts, completions, strict=True)]
        if log_metric is not None:
            self.log(texts, log_metric, log_extra)
        return [self.score(text) for text in texts]

    def log(self, texts: list[str], log_metric, log_extra) -> None:
        """Pairs, identical pairs, longest run and the commonest letter's share; each text's letters as a column."""
        found = [self.pairs(self.words(text)) for text in texts]
        together = [pair for pairs in found for pair in pairs]
        letters = letter_counts(together)
        log_metric("alliteration/pairs", len(together) / max(1, len(texts)))
        log_metric("alliteration/identical_share", identical_share(together))
        log_metric("alliteration/longest_run", max(map(longest_run, found), default=0))
        log_metric("alliteration/letters_in_use", sum(n >= 0.05 * len(together) for n in letters.values()))
        if log_extra is not None:
            columns = [" ".join(f"{k}:{n}" for k, n in letter_counts(pairs).most_common()) for pairs in found]
            log_extra(f"{self.__name__} letters", columns)


def letter_shares(path: str | Path = LETTER_SHARES) -> dict[str, float]:
    """The share of words that start with each of the letters a to z, from `python -m kl_alliteration.lab.letters`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def rare_letter_weights(shares: dict[str, float]) -> dict[str, float]:
    """What a pair on each letter is worth: 1 / (26 * share), so that an even use of letters is worth 1; at most 10."""
    return {letter: min(MOST, 1 / (len(shares) * share)) if share else MOST for letter, share in shares.items()}


def check_letter(letter: str) -> None:
    if len(letter) != 1 or not letter.isalpha():
        raise ValueError(f"letter must be one letter, got {letter!r}")


class StartingLetterReward:
    """Counts the words of prompt and completion that start with a letter, lower-cased.

    Args:
        letter (`str`): One letter.
    """

    scores_prefixes = True

    def __init__(self, letter: str):
        check_letter(letter)
        self.letter = letter.lower()
        self.__name__ = f"words_starting_with_{self.letter}"

    def __call__(self, prompts, completions, **kwargs) -> list[float]:
        """B prompts and B completions, plain or conversational -> `list[float]`: B counts of words."""
        texts = (full_text(p, c) for p, c in zip(prompts, completions, strict=True))
        return [float(sum(word[0].lower() == self.letter for word in text.split())) for text in texts]


alliteration_reward = AlliterationReward("alliteration_reward")
alliteration_per_100_words = AlliterationReward("alliteration_per_100_words", per_100_words=True)
distinct_alliteration = AlliterationReward("distinct_alliteration", distinct=True)
run_alliteration = AlliterationReward("run_alliteration", runs=True)
letter_saturating_alliteration = AlliterationReward("letter_saturating_alliteration", saturate="letter")
pair_saturating_alliteration = AlliterationReward("pair_saturating_alliteration", saturate="pair")


def alliteration_in_words(name: str, words: int, letters: str | None, content: bool) -> AlliterationReward:
    """Alliteration in an answer of about so many words, as pairs per 100 words; of `content` words alone, or of all.

    A word twice is no pair, the n-th use of the same pair is worth 1/n, punctuation is none of a word, the prompt does
    not count, and neither a shorter answer is worth more nor a longer one.
    """
    return AlliterationReward(
        name,
        distinct=True,
        content=content,
        saturate="pair",
        letters=letters,
        strip_punctuation=True,
        per_100_words=True,
        at_least_words=words,
        completion_only=True,
    )


def __getattr__(name: str):
    """Makes a reward when its name is imported: for an answer's length, one letter, rare letters, first sounds."""
    if name == "rare_letter_alliteration":
        # Saturating too: a sum that only grows with a letter's pairs is best spent on one letter.
        return AlliterationReward(name, letter_weights=rare_letter_weights(letter_shares()), saturate="letter")
    if name == "phonetic_alliteration":
        return AlliterationReward(name, phonetic=True)
    if asked := IN_WORDS.fullmatch(name):
        return alliteration_in_words(name, int(asked["words"]), asked["letters"], bool(asked["content"]))
    for prefix, kind in (
        ("alliteration_on_", lambda letter: AlliterationReward(name, letters=letter)),
        ("words_starting_with_", StartingLetterReward),
    ):
        if name.startswith(prefix):
            try:
                return kind(name.removeprefix(prefix))
            except ValueError as error:
                raise AttributeError(f"{name!r}: {error}") from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
