"""What a run shows and writes as it goes: metrics, a progress bar, tables of stories."""

import warnings
from pathlib import Path

from datasets.utils import logging as datasets_logging
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging

from .._trl import last_completions
from ..text import as_dialogue, as_text
from .runs import as_json

CONTROL = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"}


def clear_screen_of_libraries() -> None:
    """Keep a run's screen clear: no loading bars of other libraries, and none of their warnings."""
    datasets_logging.disable_progress_bar()
    logging.disable_progress_bar()
    # trl 1.16 asks every model of transformers 5.23 by the old name, in each forward pass.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def shown(text: str, style: str = "") -> Text:
    """A model's text, safe for a terminal: markup and control characters have no effect."""
    return Text(text.translate(CONTROL), style=style)


class MetricsFileCallback(TrainerCallback):
    """Every log as one JSON line, with `generations` (completions sampled so far) and `beta` beside TRL's metrics.

    DPO, which does not sample, has `pairs` instead: the pairs that it has seen. The file is written from the trainer's
    history when training starts, so that a resumed run has no line twice. Every line is JSON: NaN and infinity are
    `null`. A run that is shorter than `logging_steps` is logged once, at its end.
    """

    def __init__(self, trainer, path: str | Path):
        self.trainer, self.path = trainer, Path(path)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(as_json(entry) + "\n" for entry in state.log_history), encoding="utf-8")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and not state.log_history and not control.should_log:
            control.should_log = True
            if state.is_world_process_zero:
                print(
                    f"logging_steps {args.logging_steps} is more than the run's {state.max_steps}: logged at its end"
                )

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
            file.write(as_json(entry) + "\n")


class StoryProgressCallback(ProgressCallback):
    """The progress bar of transformers, with reward and KL at its end in place of a dictionary a log."""

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and state.is_world_process_zero:  # `on_log` draws it, with the step's numbers
            self.training_bar.n, self.current_step = state.global_step, state.global_step
        else:
            super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {"reward": "reward", "kl": "KL/token", "rewards/accuracies": "ranked right", "entropy": "entropy"}
            values = {label: f"{logs[name]:.2f}" for name, label in shown.items() if logs.get(name) is not None}
            if values:
                self.training_bar.set_postfix(values)
            else:
                self.training_bar.refresh()


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
                story = shown(as_dialogue(prompt), "dim") + shown(as_text(completion))
                table.add_row(*(f"{value:.1f}" for value in values), story)
            self.console.print(table)
