"""Rules that change beta during training, on plain floats. [`KLControlCallback`] applies them to a trainer.

Every rule is a dataclass whose fields are its whole state, with `.value`, the beta to use now, and
`.update(kl_per_token, generations)`, called once per generation batch with its mean KL and its number of completions.
KL is in nats per token, as TRL's metric `kl` is; beta is reward per nat of the sequence, as TRL's `beta` is.
"""

import math
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainerCallback

from . import kl
from ._trl import seam_of


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


@dataclass
class FixedBeta:
    """A beta that stays."""

    STATE: ClassVar = ()
    value: float

    def update(self, kl_per_token: float, generations: int) -> float:
        return self.value


@dataclass
class StepRule:
    """`beta *= up` where the KL is above `above` times its target, `beta *= down` where it is below `below` times it.

    The defaults are the tiny-stories study's. [`ppo_rule`] has those of PPO (Schulman et al. 2017, arXiv 1707.06347,
    section 4).
    """

    STATE: ClassVar = ("value",)
    value: float
    target_kl_per_token: float
    up: float = 1.1
    down: float = 0.9
    above: float = 1.5
    below: float = 0.5

    def __post_init__(self):
        _positive(beta=self.value, target_kl_per_token=self.target_kl_per_token)
        if not (self.up > 1 > self.down > 0 and self.above > self.below > 0):
            raise ValueError("StepRule needs up > 1 > down > 0 and above > below > 0")

    def update(self, kl_per_token: float, generations: int) -> float:
        if kl_per_token > self.above * self.target_kl_per_token:
            self.value *= self.up
        elif kl_per_token < self.below * self.target_kl_per_token:
            self.value *= self.down
        return self.value


def ppo_rule(value: float, target_kl_per_token: float) -> StepRule:
    """PPO's adaptive penalty: doubled above 1.5 times the target, halved below a 1.5th of it."""
    return StepRule(value, target_kl_per_token, up=2.0, down=0.5, above=1.5, below=1 / 1.5)


@dataclass
class ProportionalRule:
    """`beta *= 1 + clip(kl / target - 1, -limit, limit) * generations / horizon` (Ziegler et al., arXiv 1909.08593).

    `horizon` is in generations, more than `limit` times those of an update: beta would fall below 0. Its usual 10,000
    moves beta by 4 % in 200 updates of 10 completions.
    """

    STATE: ClassVar = ("value",)
    value: float
    target_kl_per_token: float
    horizon: float = 10_000.0
    limit: float = 0.2

    def __post_init__(self):
        _positive(
            beta=self.value, target_kl_per_token=self.target_kl_per_token, horizon=self.horizon, limit=self.limit
        )

    def update(self, kl_per_token: float, generations: int) -> float:
        if self.limit * generations >= self.horizon:
            raise ValueError(f"horizon must be > limit * generations of an update, {self.limit * generations:g}")
        error = max(-self.limit, min(self.limit, kl_per_token / self.target_kl_per_token - 1))
        self.value *= 1 + error * generations / self.horizon
        return self.value


@dataclass
class LogPIRule:
    """Proportional and integral control of log beta on the relative error of a smoothed KL, within bounds.

    `log beta = log beta_0 + proportional * e + integral * sum of e`, `e = kl / target - 1` clipped to `-below` and 1.
    Two guards against integral windup: an error below the target counts as `-below` at most, since there the policy
    needs time, not a smaller beta; and the sum stays as it is while beta is at a bound and the error pushes beyond it.
    """

    STATE: ClassVar = ("value", "start", "smoothed_kl_per_token", "error_sum")
    value: float
    target_kl_per_token: float
    proportional: float = 2.0
    integral: float = 0.02
    below: float = 0.2
    smoothing: float = 0.7  # weight of the past in the moving average of the KL
    smallest: float = 1e-3
    largest: float = 1e3
    start: float = field(default=math.nan)  # log beta_0; made from `value`
    smoothed_kl_per_token: float | None = None
    error_sum: float = 0.0

    def __post_init__(self):
        _positive(beta=self.value, target_kl_per_token=self.target_kl_per_token, smallest=self.smallest)
        if not self.smallest <= self.value <= self.largest:
            raise ValueError(f"beta must lie within {self.smallest} and {self.largest}, got {self.value}")
        if math.isnan(self.start):
            self.start = math.log(self.value)

    def update(self, kl_per_token: float, generations: int) -> float:
        past = kl_per_token if self.smoothed_kl_per_token is None else self.smoothed_kl_per_token
        self.smoothed_kl_per_token = self.smoothing * past + (1 - self.smoothing) * kl_per_token
        error = max(-self.below, min(1.0, self.smoothed_kl_per_token / self.target_kl_per_token - 1))
        low, high = math.log(self.smallest), math.log(self.largest)
        wanted = self.start + self.proportional * error + self.integral * (self.error_sum + error)
        if low <= wanted <= high or (wanted > high) == (error < 0):
            self.error_sum += error
        self.value = math.exp(max(low, min(high, wanted)))
        return self.value


@dataclass
class Schedule:
    """From `value` to `end` over `total_generations`, after a warm-up to `value` over `warmup_generations`.

    `shape`: `"linear"` or `"cosine"`. Warm-up starts at a hundredth of `value`: at 0 TRL does not score the reference.
    """

    STATE: ClassVar = ("value", "start", "seen")
    value: float
    end: float
    total_generations: int
    shape: str = "linear"
    warmup_generations: int = 0
    start: float = field(default=math.nan)
    seen: int = 0

    def __post_init__(self):
        _positive(beta=self.value, end=self.end, total_generations=self.total_generations)
        if self.shape not in ("linear", "cosine"):
            raise ValueError(f"shape must be linear or cosine, got {self.shape!r}")
        if not 0 <= self.warmup_generations < self.total_generations:
            raise ValueError(f"warmup_generations must be within 0 and {self.total_generations}")
        if math.isnan(self.start):
            self.start = self.value
            self.value = self._at(0)

    def _at(self, generations: int) -> float:
        if generations < self.warmup_generations:
            return self.start * max(0.01, generations / self.warmup_generations)
        share = (generations - self.warmup_generations) / (self.total_generations - self.warmup_generations)
        share = min(1.0, share)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share

    def update(self, kl_per_token: float, generations: int) -> float:
        self.seen += generations
        self.value = self._at(self.seen)
        return self.value


class KLControlCallback(TrainerCallback):
    """Change `trainer.beta` by a rule, from one generation batch to the next; logs its target, `kl/target_per_token`.

    The rule's state goes into `trainer_state.json` of every checkpoint and comes back from it. On several processes
    every rank sees the same pooled KL and so has the same beta.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock, its `beta` not 0.
        controller: A rule, such as `StepRule(0.25, target_kl_per_token=0.15)`.
        kl_estimator (`str`, *optional*, defaults to `"k1"`): The estimator whose value the rule gets.
    """

    STATE = "kl_alliteration.KLControl"  # its place among the trainer's stateful callbacks

    def __init__(self, trainer, controller, kl_estimator: str = "k1"):
        kl.check_choice("kl_estimator", kl_estimator, kl.estimators())
        if trainer.beta == 0:
            raise ValueError(
                "beta must not be 0 at the start under control: TRL then loads no reference, and a rule that "
                "multiplies never leaves 0; start from a small beta such as 0.01"
            )
        self.trainer, self.controller, self.kl_estimator = trainer, controller, kl_estimator
        self.seam = seam_of(trainer)
        self.seam.check_reference()
        if kl_estimator in kl.FULL_VOCABULARY:
            self.seam.scorer.need_hidden_states()
        self.seam.own_price(type(self).__name__)
        self.seam.observers.append(self.observe)
        self.seen = None  # (KL per token, tokens, completions) of what was sampled since the last update
        self.seam.charge(controller.value)

    def observe(self, rollout: kl.Rollout) -> None:
        if self.trainer.model.training:
            mask, accelerator = rollout.completion_mask, self.trainer.accelerator
            mean, tokens = self.seam.mean_per_token(rollout.per_token_kl(self.kl_estimator), mask), mask.sum().float()
            tokens, completions = accelerator.reduce(tokens, "sum").item(), len(mask) * accelerator.num_processes
            if self.seen is not None:  # several batches are one update
                before, earlier, others = self.seen
                mean = (before * earlier + mean * tokens) / max(1.0, earlier + tokens)
                tokens, completions = earlier + tokens, others + completions
            self.seen = mean, tokens, completions
            if (target := getattr(self.controller, "target_kl_per_token", None)) is not None:
                self.seam.metrics["kl/target_per_token"].append(target)

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(self.STATE)
        if saved and state.global_step:
            self.restore(saved["attributes"], saved["args"].get("rule", type(self.controller).__name__))
        self.seam.charge(self.controller.value)

    def restore(self, attributes: dict, rule: str) -> None:
        """Go on with what a rule has come to; what it is asked to do stays what it is asked now."""
        if rule != type(self.controller).__name__:
            warnings.warn(
                f"the checkpoint was written under {rule}: {type(self.controller).__name__} goes on from its beta, "
                f"{attributes['value']:g}, with nothing else of it",
                kl.KLWarning,
                stacklevel=2,
            )
            self.controller.value = attributes["value"]
            return
        own = getattr(self.controller, "STATE", tuple(attributes))
        asked = {name: value for name, value in vars(self.controller).items() if name not in own}
        other = [f"{name} {value} in place of {attributes[name]}" for name, value in asked.items()
                 if name in attributes and attributes[name] != value]  # fmt: skip
        if other:
            warnings.warn(
                f"{rule} goes on from its state in the checkpoint, with {', '.join(other)}", kl.KLWarning, stacklevel=2
            )
        vars(self.controller).update({name: attributes[name] for name in own if name in attributes})

    def on_step_end(self, args, state, control, **kwargs):
        if self.seen is not None and self.seam.batch_is_used_up:
            kl_per_token, tokens, completions = self.seen
            if tokens or not hasattr(self.controller, "target_kl_per_token"):  # of truncated texts none may count
                self.seam.charge(self.controller.update(kl_per_token, completions))
            self.seen = None
        rule = type(self.controller).__name__
        state.stateful_callbacks[self.STATE] = {"args": {"rule": rule}, "attributes": vars(self.controller).copy()}
