"""Pairs for DPO: completions of the base, ranked by a reward."""

import json
import math
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel
from trl.data_utils import is_conversational

from .._trl.asking import preference_prompt_ids
from ..evaluation import ask_reward, plain_sampling, sample_rows

FILE = "pairs.jsonl"
SIDES = ("prompt", "chosen", "rejected")
LEFT_OUT = ("chosen_reward", "rejected_reward")  # for readers of the file


@torch.no_grad()
def sample_pairs(
    model: PreTrainedModel,
    tokenizer,
    prompts: list,
    reward,
    group_size: int = 8,
    pairs_per_group: int = 2,
    max_completion_length: int = 100,
    temperature: float = 1.0,
    batch_size: int = 200,
    seed: int = 0,
    columns: dict[str, list] | None = None,
) -> list[dict]:
    """`group_size` completions a prompt, the best beside the worst, the second best beside the second worst, ...

    Several processes make a share of the prompts each, and all return all pairs.

    Args:
        prompts (`list`): Plain or conversational, as TRL takes them.
        reward (callable): TRL-shaped, `reward(prompts=..., completions=..., **columns) -> list[float]`. A completion
            to which it does not apply, `None`, is in no pair.
        seed (`int`): Of the sampling; torch's random state is put back afterwards.
        columns (`dict[str, list]`, *optional*): Further columns of the data set, one value a prompt.

    Returns:
        `list[dict]`: `prompt`, `chosen`, `rejected` in TRL's preference format, the columns, and `chosen_reward`,
        `rejected_reward`. Two completions of one reward are no pair.
    """
    state = PartialState()
    config = plain_sampling(model, tokenizer, max_completion_length, temperature)
    columns = columns or {}
    prompt_rows = [
        {"prompt": prompt} | dict(zip(columns, values, strict=True))
        for prompt, *values in zip(prompts, *columns.values(), strict=True)
    ]
    pairs = []
    with state.split_between_processes(prompt_rows) as share, torch.random.fork_rng():
        torch.manual_seed(seed + state.process_index)
        at_once = max(1, batch_size // group_size)
        for start in range(0, len(share), at_once):
            rows = [row for row in share[start : start + at_once] for _ in range(group_size)]
            found = sample_rows(model, tokenizer, rows, config, partial(tokenize_rows, tokenizer))
            rewards = ask_reward(reward, rows, found.completions, found.completion_ids)
            for first in range(0, len(rows), group_size):
                group = [i for i in range(first, first + group_size) if not math.isnan(rewards[i])]
                pairs += ranked(rows[first], [(rewards[i], found.texts[i]) for i in group], pairs_per_group)
    return gather_object(pairs)


def tokenize_rows(tokenizer, rows: list[dict]) -> list[list[int]]:
    """The prompts' tokens as DPO will make them."""
    return [preference_prompt_ids(tokenizer, row) for row in rows]


def ranked(row, completions: list[tuple[float, str]], pairs_per_group: int) -> list[dict]:
    """The pairs of one prompt, or row of a data set, from its `(reward, completion)`s."""
    row = row if isinstance(row, dict) else {"prompt": row}
    ordered = sorted(completions, key=lambda each: each[0])
    rows = []
    for (low, rejected), (high, chosen) in list(zip(ordered, reversed(ordered), strict=True))[:pairs_per_group]:
        if high > low:
            sides = {"chosen": chosen, "rejected": rejected}
            if is_conversational({"prompt": row["prompt"]}):
                sides = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            rows.append(row | sides | {"chosen_reward": high, "rejected_reward": low})
    return rows


def write_pairs(pairs: list[dict], folder: str | Path) -> Path:
    """Write `pairs.jsonl` into a folder, in one piece: never half of it."""
    path = Path(folder, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(pair, default=str) + "\n" for pair in pairs), encoding="utf-8")
    unfinished.replace(path)
    return path


def read_pairs(path: str | Path) -> Dataset:
    """What [`write_pairs`] wrote, or any file of that format; `ValueError` where it is another.

    A line ends at a line feed and nowhere else; blank lines and a byte order mark are passed over.
    """
    rows, number = [], 0
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), start=1):  # noqa: B007
            if line.strip():
                row = json.loads(line)
                row = {name: row[name] for name in (*SIDES, *row) if name not in LEFT_OUT}
                if not row["prompt"] or not all(isinstance(row[side], (str, list)) for side in SIDES):
                    raise TypeError(f"{', '.join(SIDES)} must be text or messages")
                rows.append(row)
        if rows:
            return Dataset.from_list(rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = f"; line {number}" if number else ""
        cause = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"pairs_from: {path} is no file of pairs ({type(error).__name__}: {cause}{where})") from None
    raise ValueError(f"pairs_from: {path} has no pairs")


def longest(pairs: Dataset, tokenizer, max_completion_length: int) -> int:
    """`max_length` for DPO, in tokens: the longest prompt and a whole completion, beyond which TRL drops and cuts."""
    rows = {json.dumps(row, sort_keys=True, default=str): row for row in prompts_of(pairs)}
    return max(map(len, tokenize_rows(tokenizer, list(rows.values())))) + max_completion_length


def without_added_ends(tokenized: Dataset, max_completion_length: int, sampled: bool) -> Dataset:
    """A `DPOTrainer`'s own pairs, no completion of more tokens than were sampled.

    TRL ends every completion with an end of text, also one that was cut off at `max_completion_length`. And a text's
    tokens may be some more than those that it was `sampled` as, within a word or a character that was cut most of all.

    Raises:
        `ValueError`: for a completion that is longer, of a file of pairs, which may be of another length.
    """
    sides = ("chosen_ids", "rejected_ids")
    tokens = max(len(ids) for side in sides for ids in tokenized[side])
    if tokens > max_completion_length + 1 and not sampled:
        raise ValueError(
            f"max_completion_length {max_completion_length}: a completion of the pairs has {tokens} tokens, and would "
            "be cut; give the length that they were sampled with"
        )
    return tokenized.map(lambda row: {side: row[side][:max_completion_length] for side in sides})


def prompts_of(pairs: Dataset) -> list[dict]:
    """The rows without their completions: what a prompt's tokens are made of."""
    names = [name for name in ("prompt", "tools", "chat_template_kwargs") if name in pairs.column_names]
    return pairs.select_columns(names).to_list()
