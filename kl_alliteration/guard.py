"""Collapse: the limits that show it in a generation batch, and the callback that acts on it."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback

from . import kl, text
from ._trl import forget_batches, last_completions, last_reward_std, seam_of


@dataclass
class CollapseLimits:
    """The limits of a healthy generation batch; `None` switches one off.

    `distinct_2_left` is distinct-2 divided by that of the run's first batch: distinct-2 depends on the batch size.
    `kl_per_sequence`, in nats, has each batch scored for it: by GRPO's own k3 it is not; at beta 0 a whole model's
    reference is loaded.
    """

    different_share: float | None = 0.7
    distinct_2_left: float | None = 0.4
    distinct_2: float | None = None
    compression_ratio: float | None = 6.0
    reward_std: float | None = None
    entropy_per_token: float | None = None
    kl_per_sequence: float | None = None

    # Limits from below; the rest, from above.
    BELOW = ("different_share", "distinct_2_left", "distinct_2", "reward_std", "entropy_per_token")

    def broken(self, seen: dict[str, float]) -> list[str]:
        """The values of `seen` that are out of their limits, in words."""
        found = []
        for name, value in seen.items():
            limit = getattr(self, name)
            if limit is not None and value is not None and (value < limit if name in self.BELOW else value > limit):
                found.append(f"{name} {value:.3g} (limit {limit:g})")
        return found


class CollapseGuardCallback(TrainerCallback):
    """Watches every generation batch for collapse, and warns, stops, or goes back to the last good checkpoint.

    The limits are compared with means over the last `smoothing` batches, so that one odd batch is not taken for a
    collapse. These means are logged under `guard/`. A checkpoint is good if no limit was broken when it was saved.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock.
        action (`str`, *optional*, defaults to `"stop"`):
            `"warn"` once; `"stop"` the run, saying where the last good checkpoint is; `"rollback"`, which also needs
            [`CollapseGuardCallback.train`] in place of `trainer.train`, to go on from there with a stronger penalty.
        limits ([`CollapseLimits`], *optional*): The limits; by default those of the class.
        stronger (`float`, *optional*, defaults to `2.0`): Factor on beta at each rollback.
        rollbacks (`int`, *optional*, defaults to `3`): The largest number of rollbacks.
    """

    ACTIONS = ("warn", "stop", "rollback")
    STATE = "kl_alliteration.CollapseGuard"  # its place among the trainer's stateful callbacks

    def __init__(
        self,
        trainer,
        action: str = "stop",
        limits: CollapseLimits | None = None,
        smoothing: int = 2,
        stronger: float = 2.0,
        rollbacks: int = 3,
    ):
        kl.check_choice("action", action, self.ACTIONS)
        if action == "rollback" and trainer.args.save_strategy == "no":
            raise ValueError("action 'rollback' needs checkpoints: set save_strategy='steps' and save_steps")
        if smoothing < 1 or not stronger > 1:
            raise ValueError(f"smoothing must be >= 1 and stronger > 1, got {smoothing} and {stronger}")
        self.trainer, self.action, self.limits = trainer, action, limits or CollapseLimits()
        self.smoothing, self.stronger, self.rollbacks = smoothing, stronger, rollbacks
        self.seam = seam_of(trainer)
        if self.limits.kl_per_sequence is not None:
            self.seam.observers.append(lambda rollout: None)  # without one GRPO scores no batch beside its loss
            if trainer.beta == 0:
                self.seam.scorer.need_reference_at_beta_zero()
            self.seam.check_reference()
        self.seam.after_batch.append(self.observe)
        self.recent: list[dict[str, float]] = []
        self.first_distinct_2: float | None = None
        self.entropy: float | None = None  # of the last update, which a log takes out of the trainer's metrics
        self.last_good: str | None = None
        self.collapse: str | None = None  # what ended the run, in words
        self.factor = 1.0

    def observe(self, rollout: kl.Rollout | None) -> None:
        trainer = self.trainer
        if not trainer.model.training:
            return
        _, completions, _ = last_completions(trainer)
        texts = [text.answer_of(completion) for completion in completions]
        seen = {
            "different_share": text.different_share(texts),
            "distinct_2": (distinct_2 := text.distinct_n(texts, 2)),
            "compression_ratio": text.compression_ratio(texts),
            "reward_std": last_reward_std(self.seam),
        }
        if self.first_distinct_2 is None:
            self.first_distinct_2 = distinct_2
        if self.first_distinct_2:
            seen["distinct_2_left"] = distinct_2 / self.first_distinct_2
        if rollout is not None:
            seen["kl_per_sequence"] = self.seam.mean_per_sequence(rollout.ref_log_ratio, rollout.completion_mask)
        if self.entropy is not None:
            seen["entropy_per_token"] = self.entropy
        self.recent = [*self.recent, seen][-self.smoothing :]
        for name, value in self.mean().items():
            self.seam.metrics[f"guard/{name}"].append(value)

    def mean(self) -> dict[str, float]:
        names = set.intersection(*(set(seen) for seen in self.recent)) if self.recent else set()
        return {name: sum(seen[name] for seen in self.recent) / len(self.recent) for name in sorted(names)}

    def on_step_end(self, args, state, control, **kwargs):
        if entropies := self.seam.metrics.get("entropy"):
            self.entropy = entropies[-1]
        if control.should_save:
            self.protect(args, state, self.last_good)
        state.stateful_callbacks[self.STATE] = {
            "args": {},
            "attributes": {"first_distinct_2": self.first_distinct_2, "recent": self.recent}
            | {"factor": self.factor, "rollbacks": self.rollbacks, "entropy": self.entropy},
        }
        broken = self.limits.broken(self.mean()) if len(self.recent) == self.smoothing else []
        if not broken or self.collapse:
            return
        self.collapse = f"step {state.global_step}: {', '.join(broken)}"
        if self.last_good is not None and not Path(self.last_good).is_dir():
            self.last_good = None  # gone, by `save_total_limit` and a best model of somebody else's
        good = f"the last good checkpoint is {self.last_good}" if self.last_good else "there is no good checkpoint"
        if state.is_world_process_zero:
            warnings.warn(f"collapse at {self.collapse}; {good}", kl.KLWarning, stacklevel=2)
        if self.action != "warn":
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_save:
            self.protect(args, state, self.last_good)

    def protect(self, args, state, checkpoint: str | None) -> None:
        """Have `save_total_limit` spare this checkpoint, as it spares the best one, while the next is saved."""
        if args.metric_for_best_model is None:
            state.best_model_checkpoint = checkpoint

    def on_save(self, args, state, control, **kwargs):
        self.protect(args, state, None)  # else the last one would go at the end of training
        if not self.collapse and not self.limits.broken(self.mean()):
            self.last_good = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_begin(self, args, state, control, **kwargs):
        self.protect(args, state, None)  # of the checkpoint that this run goes on from
        self.recent, self.collapse, self.entropy = [], None, None
        if state.global_step and (saved := state.stateful_callbacks.get(self.STATE)):
            self.first_distinct_2 = saved["attributes"]["first_distinct_2"]
            self.recent, self.entropy = saved["attributes"].get("recent", []), saved["attributes"].get("entropy")
            # Of another process's rollbacks; this one's own are beyond what a checkpoint from before them knows.
            self.factor = max(self.factor, saved["attributes"].get("factor", 1.0))
            self.rollbacks = min(self.rollbacks, saved["attributes"].get("rollbacks", self.rollbacks))
        if self.factor != 1:
            self.seam.strengthen(self.factor)  # what the checkpoint brought back was too weak

    def train(self, resume_from_checkpoint=None):
        """`trainer.train`; after a collapse again from the last good checkpoint, at most `rollbacks` times."""
        output = self.trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        while self.action == "rollback" and self.collapse and self.rollbacks > 0:
            if self.last_good is None or not Path(self.last_good).is_dir():
                raise RuntimeError(
                    f"collapse at {self.collapse}, and no good checkpoint to go back to: save more often"
                )
            self.rollbacks -= 1
            forget_batches(self.trainer)
            self.factor *= self.stronger
            output = self.trainer.train(resume_from_checkpoint=self.last_good)
        return output
