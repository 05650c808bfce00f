"""What a run shows and writes as it goes: metrics, a progress bar, tables of stories."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import ProgressCallback, TrainerCallback

from .._trl import last_completions
from ..text import as_text

CONTROL = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"}


def shown(text: str, style: str = "") -> Text:
    """A model's text for a terminal: neither markup nor control characters do anything."""
    return Text(text.translate(CONTROL), style=style)


class MetricsFileCallback(TrainerCallback):
    """Every log as one JSON line, with `generations` (completions sampled so far) and `beta` beside TRL's metrics.

    Of a trainer that samples none, `pairs`, what it has seen of its dataset. The file is written from the trainer's
    history when training starts, so a resumed run has no doubled lines.
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
        iterations = getattr(self.trainer, "num_iterations", None)
        entry["generations" if iterations else "pairs"] = state.global_step * batch // (iterations or 1)
        entry["beta"] = self.trainer.beta
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class StoryProgressCallback(ProgressCallback):
    """The progress bar of transformers, with reward and KL at its end in place of a dictionary a log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {"reward": "reward", "kl": "KL/token", "rewards/accuracies": "ranked right", "entropy": "entropy"}
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
                story = shown(as_text(prompt), "dim") + shown(as_text(completion))
                table.add_row(*(f"{value:.1f}" for value in values), story)
            self.console.print(table)
