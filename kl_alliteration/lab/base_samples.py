"""What the base writes before a run trains, with its rewards: prices, plots and efficiency rest on it."""

import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from rich.progress import track

from .._trl import asking
from ..evaluation import plain_sampling, sample_rows
from .runs import as_json, made_of, note_what_of

FILE = "base_samples.jsonl"
AT_ONCE = 200  # completions of a process
EACH = 8  # of a prompt, at least: fewer say little of its mean


class BaseSamples(NamedTuple):
    """What the untrained policy writes for P prompts of the training, M each."""

    rewards: torch.Tensor  # (P, M); NaN does not apply
    texts: list[str]  # P * M completions


def base_samples(trainer, samples: int, facts: dict) -> BaseSamples:
    """At least so many `samples`. Every process makes a share and gets all.

    They are written to `base_samples.jsonl` in the trainer's output folder; a run that goes on reads them there, where
    they are of the same `facts`: what model, which rewards, which data. torch's random state is put back.
    """
    path, accelerator, args = Path(trainer.args.output_dir, FILE), trainer.accelerator, trainer.args
    facts = facts | {"samples": samples, "seed": args.seed, "weights": trainer.reward_weights.tolist()}
    facts |= {"temperature": args.temperature, "max_completion_length": args.max_completion_length}
    if args.resume_from_checkpoint and path.is_file() and made_of(path.parent, FILE, facts):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        rows = _sampled(trainer, samples)
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".unfinished").write_text("".join(as_json(row) + "\n" for row in rows), encoding="utf-8")
            path.with_suffix(".unfinished").replace(path)
            note_what_of(path.parent, FILE, facts)
        accelerator.wait_for_everyone()
    each = sum(row["place"] == rows[0]["place"] for row in rows)
    rewards = [math.nan if row["reward"] is None else row["reward"] for row in rows]
    return BaseSamples(torch.tensor(rewards).view(-1, each), [row["completion"] for row in rows])


def _sampled(trainer, samples: int) -> list[dict]:
    accelerator, dataset = trainer.accelerator, trainer.train_dataset
    places = first_of_each(dataset["prompt"], max(1, samples // EACH))
    world = accelerator.num_processes
    each = math.ceil(samples / len(places) / world) * world  # every process the same number: they ask together
    wanted = [place for place in places for _ in range(each)]
    mine = wanted[accelerator.process_index :: world]
    removed = trainer.args.remove_unused_columns
    limits, found = (trainer.args.max_completion_length, trainer.args.temperature), []
    device = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(device), asking.whole_policy(trainer) as model:
        config = plain_sampling(model, trainer.processing_class, *limits)
        was_training = model.training
        model.eval()
        torch.manual_seed(trainer.args.seed + accelerator.process_index)
        starts = range(0, len(mine), AT_ONCE)
        for start in track(starts, "samples of the base", disable=not accelerator.is_main_process, transient=True):
            some = mine[start : start + AT_ONCE]
            rows = [dataset[place] for place in some]
            rows = [{"prompt": row["prompt"]} for row in rows] if removed else rows
            tokenize = partial(asking.prompt_ids, trainer)
            sampled = sample_rows(model, trainer.processing_class, rows, config, tokenize)
            rewards = asking.total_rewards(trainer, rows, sampled.completions, sampled.completion_ids)
            for place, text, reward in zip(some, sampled.texts, rewards, strict=True):
                found.append({"place": place, "completion": text, "reward": None if math.isnan(reward) else reward})
        model.train(was_training)
    return sorted(gather_object(found), key=lambda row: row["place"])


def first_of_each(prompts, at_most: int) -> list[int]:
    """The places at which distinct prompts first stand, of the first `at_most` ones."""
    seen, places = set(), []
    for place, prompt in enumerate(prompts):
        key = json.dumps(prompt, sort_keys=True)
        if key not in seen:
            seen.add(key)
            places.append(place)
        if len(places) == at_most:
            break
    return places
