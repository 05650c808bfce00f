"""What users add to a trainer. In TRL's manner each takes `trainer=` and goes in with `trainer.add_callback(...)`."""

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import ProgressCallback, TrainerCallback

from . import kl
from ._trl import Rollout, last_completions, rollout_seam
from .rewards import as_text


class KLPenaltyCallback(TrainerCallback):
    """Choose the KL penalty that a stock [`~trl.RLOOTrainer`] subtracts from the reward.

    The trainer subtracts `beta * penalty`, with the penalty per completion made of `kl_estimator` per token and
    `kl_reduction` over its tokens. It takes effect when it is made. TRL's metric `kl` keeps its meaning, the mean
    log-ratio in nats per token, whatever the penalty is. At `trainer.beta == 0` there is no penalty to choose.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock.
        kl_estimator (`str`, *optional*, defaults to `"k1"`): `"k1"`, `"k2"` or `"k3"`, see [`kl`].
        kl_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"`: beta is a price per nat of the sequence, as in TRL. `"mean"`: per nat of a token, which with
            `"k1"` is the study's difference of mean cross-entropies.

    Example:

    ```python
    trainer = RLOOTrainer(...)
    trainer.add_callback(KLPenaltyCallback(trainer, kl_estimator="k1", kl_reduction="mean"))
    ```
    """

    def __init__(self, trainer, kl_estimator: str = "k1", kl_reduction: str = "sum"):
        kl.check_choice("kl_estimator", kl_estimator, kl.ESTIMATORS)
        kl.check_choice("kl_reduction", kl_reduction, kl.REDUCTIONS)
        self.kl_estimator, self.kl_reduction = kl_estimator, kl_reduction
        # k1 and sum is what TRL computes: leaving it to TRL keeps every number the same bit for bit.
        stock = (kl_estimator, kl_reduction) == ("k1", "sum")
        rollout_seam(trainer).penalty = None if stock else self.penalty

    def penalty(self, rollout: Rollout) -> torch.Tensor:
        per_token_kl = kl.ESTIMATORS[self.kl_estimator](rollout.ref_log_ratio)  # (B, T)
        return kl.reduce_per_sequence(per_token_kl, rollout.completion_mask, self.kl_reduction)  # (B,)


class MetricsFileCallback(TrainerCallback):
    """Every log as one JSON line, with `generations` (completions sampled so far) and `beta` beside TRL's metrics.

    The file is written from the trainer's history when training starts, so a resumed run has no doubled lines.
    """

    def __init__(self, trainer, path: str | Path):
        self.trainer, self.path = trainer, Path(path)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history), encoding="utf-8")

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        entry = state.log_history[-1]
        # The entry is the trainer's own, so a checkpoint carries the two columns too.
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        entry["generations"] = state.global_step * batch // self.trainer.num_iterations
        entry["beta"] = self.trainer.beta
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class StoryProgressCallback(ProgressCallback):
    """The progress bar of transformers, with reward and KL at its end in place of a dictionary a log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {"reward": "reward", "kl": "KL/token", "entropy": "entropy"}
            values = {label: f"{logs[name]:.2f}" for name, label in shown.items() if logs.get(name) is not None}
            if values:
                self.training_bar.set_postfix(values)


class StoryTableCallback(TrainerCallback):
    """Prints a few of the last stories with their rewards, every `every_steps` steps."""

    def __init__(self, trainer, every_steps: int, stories: int = 3, console: Console | None = None):
        if every_steps < 1:
            raise ValueError(f"every_steps must be >= 1, got {every_steps}; leave the callback out to print nothing")
        self.trainer, self.every_steps, self.stories = trainer, every_steps, stories
        self.console = console or Console()

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step % self.every_steps == 0:
            prompts, completions, rewards = last_completions(self.trainer)
            table = Table(title=f"Step {state.global_step}", show_lines=True)
            for name in rewards:
                table.add_column(name.removesuffix("_reward"), justify="right")
            table.add_column("story", overflow="fold")
            rows = list(zip(prompts, completions, *rewards.values(), strict=True))[: self.stories]
            for prompt, completion, *values in rows:
                # Text, not a string: a story may hold square brackets, and they are no markup.
                story = Text(as_text(prompt), style="dim") + Text(as_text(completion))
                table.add_row(*(f"{value:.1f}" for value in values), story)
            self.console.print(table)
