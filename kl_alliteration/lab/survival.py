"""What ends a run early: a signal, a fault, a limit. One message says the step, the cause and where to go on."""

import os
import re
import shutil
import signal
import sys
import threading
import traceback
from functools import wraps
from pathlib import Path

from transformers import TrainerCallback

from .._trl import UnknownTRLError, end_training, seam_of
from ..kl import Rollout
from .runs import checkpoints, is_complete, last_checkpoint, remember, remove_ours
from .secrets import hide

FULL = 16 * 2**20  # bytes free, less than a checkpoint of the smallest model


class TrainingStopped(RuntimeError):
    """A run that cannot go on; recipes print it as one line and exit with `status`."""

    status = 3


class Terminated(TrainingStopped):
    """A run that was asked to end, and saved itself; the status is the system's for "try again later"."""

    status = 75


def one_line_errors(main):
    """One line on standard error: for a user's mistake with exit status 2, for a run that was stopped with its own.

    Anything else keeps its traceback. Nothing that is printed ends a run: what the terminal lacks is replaced.
    """

    @wraps(main)
    def wrapped(*args, **kwargs):
        if hasattr(sys.stdout, "reconfigure"):  # the tests' has not
            sys.stdout.reconfigure(errors="replace")
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError, ImportError, UnknownTRLError, TrainingStopped) as error:
            if os.environ.get("KL_ALLITERATION_TRACEBACK"):
                raise
            message = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
            print(f"error: {hide(message)}", file=sys.stderr)
            sys.exit(getattr(error, "status", 2))

    return wrapped


class NothingLeft(Exception):
    """The checkpoint that a run goes on from is that of its last step."""


class TerminationCallback(TrainerCallback):
    """On SIGTERM, which clusters send before they kill a job: save a checkpoint and stop; in all processes.

    It does so after the step, and after the last update on a generation batch, whose other updates a resumed run could
    not make. `terminated` is then true. Outside of training the signal has its earlier effect.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock.
    """

    def __init__(self, trainer):
        self.accelerator, self.before = trainer.accelerator, None
        self.terminated = self.asked = False
        self.seam = seam_of(trainer) if hasattr(trainer, "reward_funcs") else None  # DPO samples nothing

    def on_train_begin(self, args, state, control, **kwargs):
        if 0 < state.max_steps <= state.global_step:
            raise NothingLeft  # the trainer would make one step more
        self.terminated = self.asked = False
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, lambda *_: self.accelerator.set_trigger())

    def on_step_end(self, args, state, control, **kwargs):
        self.asked |= self.accelerator.check_trigger()
        last = control.should_training_stop or state.global_step >= state.max_steps
        if self.asked and (last or self.seam is None or self.seam.batch_is_used_up):
            self.terminated = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Restore the signal's earlier handler; a run that raises ends without `on_train_end`."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            self.before = None


def stop_beyond(trainer, kl_per_sequence: float) -> None:
    """Stop a trainer at the first generation batch whose mean log-ratio, in nats per sequence, passes a limit."""
    seam = seam_of(trainer)
    if trainer.beta == 0:  # then TRL scores no reference, and a whole model has none
        seam.scorer.need_reference_at_beta_zero()

    def observe(rollout: Rollout) -> None:
        if not trainer.model.training:
            return
        found = seam.mean_per_sequence(rollout.ref_log_ratio, rollout.completion_mask)
        if found > kl_per_sequence:
            raise TrainingStopped(f"the KL is {found:.1f} nats per sequence, beyond kl_limit {kl_per_sequence:g}")

    seam.observers.append(observe)


def train_or_say_why(trainer, train) -> None:
    """`train()`; if anything ends it early, one message with the step, the cause and the last good checkpoint.

    A checkpoint that this run was writing is removed, and nothing that was there before; the whole traceback goes to
    `error.txt` in the output directory.

    Raises:
        `TrainingStopped`: in place of any exception, Ctrl-C included. `Terminated`: after a SIGTERM, its checkpoint
            saved.
    """
    callback = TerminationCallback(trainer)
    trainer.add_callback(callback)
    folder = Path(trainer.args.output_dir)
    before = set(checkpoints(folder).values())
    try:
        train()
    except NothingLeft:
        if trainer.is_world_process_zero():
            print(f"All {trainer.state.global_step} steps were made: nothing is left to train")
        end_training(trainer)
    except (Exception, KeyboardInterrupt) as error:
        cause = str(error) if isinstance(error, TrainingStopped) else f"{type(error).__name__}: {error}"
        cause = "interrupted" if isinstance(error, KeyboardInterrupt) else cause
        if folder.is_dir() and shutil.disk_usage(folder).free < FULL:  # libraries word it in their own ways
            cause = f"the disk of {folder} is full ({cause})"
        good = last_checkpoint(folder)
        if trainer.is_world_process_zero():
            for checkpoint in set(checkpoints(folder).values()) - before:
                if not is_complete(checkpoint):
                    shutil.rmtree(checkpoint, ignore_errors=True)
            try:
                text = hide(traceback.format_exc())
                Path(folder, "error.txt").write_text(text, encoding="utf-8", errors="replace")
                remember(folder, "error.txt")
            except OSError:
                pass  # a full disk
        stopped = TrainingStopped(f"stopped at step {trainer.state.global_step}: {cause}; {go_on_from(good)}")
        if isinstance(error, KeyboardInterrupt):
            stopped.status = 130  # a shell's for Ctrl-C
        for bar in (getattr(each, "training_bar", None) for each in trainer.callback_handler.callbacks):
            if bar is not None:
                bar.close()  # or what is printed next stands at its end
        raise stopped from error
    finally:
        callback.restore()
        trainer.remove_callback(callback)
    if trainer.is_world_process_zero():
        remove_ours(folder, "error.txt")  # of the run that this one went on from
    if callback.terminated:
        good = last_checkpoint(folder)
        raise Terminated(f"SIGTERM at step {trainer.state.global_step}; {go_on_from(good)}")


def go_on_from(checkpoint: str | None) -> str:
    if checkpoint is None:
        return "there is no checkpoint (--save_strategy steps --save_steps 20 makes some)"
    return f"the last good checkpoint is {checkpoint}: go on with --resume_from_checkpoint latest"
