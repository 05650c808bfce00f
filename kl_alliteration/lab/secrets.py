"""Tokens of the Hub among the options: they move into the environment, and into no file and onto no screen."""

import json
import os
import re

# Of an option, or of a key in an option that is a mapping such as `model_init_kwargs`.
NAMES = re.compile(r"(?:^|_)(?:hub_token|auth_token)$|^token$")
AT_LEAST = 8  # characters: what is shorter is no secret, and a word of any message
IN_ENVIRONMENT = re.compile(r"(?:^|_)(?:TOKEN|KEY|PASSWORD|SECRET)$")


def is_secret(name: str, value) -> bool:
    return isinstance(value, str) and bool(value) and bool(NAMES.search(str(name)))


def as_mapping(value) -> dict | None:
    """A mapping, or one that is still spelled as JSON; `None` for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def without(options: dict) -> dict:
    """The options without those that are secrets, and without the keys of mappings that are."""
    kept = {name: value for name, value in options.items() if not is_secret(name, value)}
    inside = {name: as_mapping(value) for name, value in kept.items()}
    return {name: without(inside[name]) if inside[name] and values_of(inside[name]) else v for name, v in kept.items()}


def values_of(options: dict) -> set[str]:
    """The secrets among the options."""
    found = {value for name, value in options.items() if is_secret(name, value)}
    return found.union(*(values_of(mapping) for mapping in map(as_mapping, options.values()) if mapping))


def in_words(words: list[str]) -> bool:
    """Whether words of a command line name a secret, in either spelling, or hold one in a mapping."""
    names = (word.split("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("-"))
    values = dict(enumerate(word.partition("=")[2] if word.startswith("-") else word for word in words))
    return any(map(NAMES.search, names)) or bool(values_of(values))


def move_to_environment(options: dict) -> None:
    """Take the secrets out, in place, into `HF_TOKEN`: the trainer pickles its options, with every checkpoint."""
    for name, value in list(options.items()):
        if isinstance(value, dict):
            move_to_environment(value)
            for key in [key for key, each in value.items() if each is None and NAMES.search(str(key))]:
                del value[key]
        elif is_secret(name, value):
            os.environ["HF_TOKEN"], options[name] = value, None


def hide(text: str, name: str = "") -> str:
    """A message without the tokens and keys that are in the environment; nothing of it where the option is one."""
    if NAMES.search(name):
        return "***"
    known = {v for name, v in os.environ.items() if IN_ENVIRONMENT.search(name.upper()) and len(v) >= AT_LEAST}
    for value in sorted(known, key=len, reverse=True):
        text = text.replace(value, "***")
    return text
