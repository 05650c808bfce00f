"""Pairs for DPO: completions of the base, ranked by a reward."""

import json
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel
from trl.data_utils import is_conversational, maybe_apply_chat_template

from ..evaluation import plain_sampling

FILE = "pairs.jsonl"


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
) -> list[dict]:
    """`group_size` completions a prompt, the best beside the worst, the second best beside the second worst, ...

    Several processes make a share of the prompts each, and all return all pairs.

    Args:
        prompts (`list`): Plain or conversational, as TRL takes them.
        reward (callable): TRL-shaped, `reward(prompts=..., completions=...) -> list[float]`, of text.
        seed (`int`): Of the sampling; torch's random state is put back afterwards.

    Returns:
        `list[dict]`: `prompt`, `chosen`, `rejected` in TRL's preference format, and `chosen_reward`,
        `rejected_reward`. Two completions of one reward are no pair.
    """
    state = PartialState()
    config = plain_sampling(model, tokenizer, max_completion_length, temperature)
    pairs = []
    with state.split_between_processes(prompts) as share, torch.random.fork_rng():
        torch.manual_seed(seed + state.process_index)
        at_once = max(1, batch_size // group_size)
        for start in range(0, len(share), at_once):
            rows = [prompt for prompt in share[start : start + at_once] for _ in range(group_size)]
            texts = [maybe_apply_chat_template({"prompt": p}, tokenizer)["prompt"] for p in rows]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
            ids = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
            completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
            rewards = reward(prompts=texts, completions=completions)
            for first in range(0, len(rows), group_size):
                group = range(first, first + group_size)
                pairs += ranked(rows[first], [(rewards[i], completions[i]) for i in group], pairs_per_group)
    return gather_object(pairs)


def ranked(prompt, completions: list[tuple[float, str]], pairs_per_group: int) -> list[dict]:
    """The pairs of one prompt from its `(reward, completion)`s."""
    ordered = sorted(completions, key=lambda each: each[0])
    rows = []
    for (low, rejected), (high, chosen) in list(zip(ordered, reversed(ordered), strict=True))[:pairs_per_group]:
        if high > low:
            sides = {"chosen": chosen, "rejected": rejected}
            if is_conversational({"prompt": prompt}):
                sides = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            rows.append({"prompt": prompt, **sides, "chosen_reward": high, "rejected_reward": low})
    return rows


def write_pairs(pairs: list[dict], folder: str | Path) -> Path:
    """`pairs.jsonl` in a folder, whole or not at all."""
    path = Path(folder, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    unfinished.replace(path)
    return path


def read_pairs(path: str | Path) -> Dataset:
    """What [`write_pairs`] wrote, or any file of that format; `ValueError` where it is another."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"pairs_from: {path} is no file of pairs ({type(error).__name__}: {error})") from None
    if not rows:
        raise ValueError(f"pairs_from: {path} has no pairs")
    return Dataset.from_list(rows)


def longest(pairs: Dataset, tokenizer, max_completion_length: int) -> int:
    """`max_length` for DPO, in tokens: the shortest prompt and a whole completion.

    TRL ends every completion with an end of text, also one that was cut off at `max_completion_length`. With this
    length it never gets to see that one.
    """
    prompts = [maybe_apply_chat_template({"prompt": p}, tokenizer)["prompt"] for p in pairs["prompt"]]
    return min(len(tokenizer(prompt)["input_ids"]) for prompt in set(prompts)) + max_completion_length
