"""What a trainer asks its model and its rewards, for whoever asks the same beside the training: by TRL's own code."""

import json
from collections import defaultdict

import torch
from trl.data_utils import _tokenize
from trl.models import unwrap_model_for_generation

from .baseline import weighted


def reference_of(trainer):
    """The reference as a model of its own, TRL's or one that was loaded in its place; `None` where there is none."""
    seam = vars(trainer).get("_kl_alliteration_seam")
    return trainer.ref_model if seam is None or seam.scorer.own_reference is None else seam.scorer.own_reference


def whole_policy(trainer):
    """A context with the policy as a model that samples and scores outside of training: what ZeRO-3 shards, in one."""
    again = {"gradient_checkpointing_kwargs": trainer.args.gradient_checkpointing_kwargs}
    return unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **again)


def prompt_ids(trainer, rows: list[dict]) -> list[list[int]]:
    """The tokens of the prompts of B rows of a data set, as this trainer makes them."""
    if hasattr(trainer, "_tokenize_prompts"):  # RLOO, GRPO: `args.chat_template_kwargs` for all
        return trainer._tokenize_prompts([row["prompt"] for row in rows])[0]
    return [preference_prompt_ids(trainer.processing_class, row) for row in rows]


def preference_prompt_ids(tokenizer, row: dict) -> list[int]:
    """The same of one row, as DPO makes them: with the row's own `tools` and `chat_template_kwargs`."""
    if not isinstance(row["prompt"], list):
        return list(_tokenize(tokenizer, row["prompt"])["input_ids"])
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
    return list(_tokenize(tokenizer, row["prompt"], add_generation_prompt=True, **options)["input_ids"])


def rewards_of(trainer, rows: list[dict], completions: list, completion_ids: list[list[int]]) -> torch.Tensor:
    """(B, functions) rewards of an online trainer for completions of B rows, NaN where a function does not apply.

    Nothing of it gets into the trainer's logs. With several processes all have to call this, each with B rows.
    """
    before = trainer._pending_metrics, trainer._pending_extra_logs, trainer.args.report_to
    trainer._pending_metrics, trainer._pending_extra_logs = defaultdict(list), defaultdict(list)
    trainer.args.report_to = []  # TRL times each reward into trackio, which fails before training has begun
    try:
        prompts = [row["prompt"] for row in rows]
        found = type(trainer)._calculate_rewards(trainer, rows, prompts, completions, completion_ids)
    finally:
        trainer._pending_metrics, trainer._pending_extra_logs, trainer.args.report_to = before
    return found[trainer.accelerator.process_index * len(rows) :][: len(rows)]


def total_rewards(trainer, rows: list[dict], completions: list, completion_ids: list[list[int]]) -> list[float]:
    """(B,) of those, weighted, summed and clipped as the trainer does; NaN where none applies."""
    return weighted(trainer, rewards_of(trainer, rows, completions, completion_ids)).tolist()


def end_training(trainer) -> None:
    """What `train` does behind its last step, where there was none to make."""
    trainer.is_in_train = False
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
