"""Reward functions in TRL's shape: `(prompts, completions, **columns) -> list[float]`, usable by dotted path."""

from .alliteration import count_alliterations


def as_text(prompt_or_completion) -> str:
    """Plain text as it is; the contents of a conversation's messages joined by a space."""
    if isinstance(prompt_or_completion, str):
        return prompt_or_completion
    contents = [message.get("content") or "" for message in prompt_or_completion]
    parts = [[{"text": c}] if isinstance(c, str) else c for c in contents]
    return " ".join(part.get("text", "") for content in parts for part in content)


def full_text(prompt, completion) -> str:
    """Prompt and completion as one text; a conversation's turns are separate words."""
    separator = "" if isinstance(prompt, str) and isinstance(completion, str) else " "
    return as_text(prompt) + separator + as_text(completion)


def alliteration_reward(prompts, completions, **kwargs) -> list[float]:
    """The study's reward: adjacent words of `(prompt + completion).split()` with the same first letter, lower-cased.

    Args:
        prompts (`list[str]` or `list[list[dict]]`): B prompts, plain or conversational.
        completions (`list[str]` or `list[list[dict]]`): B completions of the same kind.

    Returns:
        `list[float]`: B counts of pairs, the pair across the prompt's end included. Never raises on any text.
    """
    return [float(count_alliterations(full_text(p, c))) for p, c in zip(prompts, completions, strict=True)]


class StartingLetterReward:
    """Counts the words of prompt and completion that start with a letter, lower-cased.

    Args:
        letter (`str`): One letter.
    """

    def __init__(self, letter: str):
        if len(letter) != 1 or not letter.isalpha():
            raise ValueError(f"letter must be one letter, got {letter!r}")
        self.letter = letter.lower()
        self.__name__ = f"words_starting_with_{self.letter}"

    def __call__(self, prompts, completions, **kwargs) -> list[float]:
        """B prompts and B completions, plain or conversational -> `list[float]`: B counts of words."""
        texts = (full_text(p, c) for p, c in zip(prompts, completions, strict=True))
        return [float(sum(word[0].lower() == self.letter for word in text.split())) for text in texts]


words_starting_with_a = StartingLetterReward("a")
