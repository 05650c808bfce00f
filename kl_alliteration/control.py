"""Rules that move beta: plain floats in, a price per nat of the sequence out. [`KLControlCallback`] applies them.

Every rule is a dataclass whose fields are its whole state, with `.value`, the beta to use now, and
`.update(kl_per_token, generations)`, called once per generation batch with its mean KL and its number of completions.
KL is in nats per token, as TRL's metric `kl` is; beta is reward per nat of the sequence, as TRL's `beta` is.
"""

import math
from dataclasses import dataclass, field

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

    value: float

    def update(self, kl_per_token: float, generations: int) -> float:
        return self.value


@dataclass
class StepRule:
    """`beta *= up` where the KL is above `above` times its target, `beta *= down` where it is below `below` times it.

    The defaults are the tiny-stories study's. [`ppo_rule`] has those of PPO (Schulman et al. 2017, arXiv 1707.06347,
    section 4).
    """

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

    `horizon` is in generations. Its usual 10,000 moves beta by 4 % in 200 updates of 10 completions.
    """

    value: float
    target_kl_per_token: float
    horizon: float = 10_000.0
    limit: float = 0.2

    def __post_init__(self):
        _positive(
            beta=self.value, target_kl_per_token=self.target_kl_per_token, horizon=self.horizon, limit=self.limit
        )

    def update(self, kl_per_token: float, generations: int) -> float:
        error = max(-self.limit, min(self.limit, kl_per_token / self.target_kl_per_token - 1))
        self.value *= 1 + error * generations / self.horizon
        return self.value


@dataclass
class LogPIRule:
    """Proportional and integral control of log beta on the relative error of a smoothed KL, within bounds.

    `log beta = log beta_0 + proportional * e + integral * sum of e`, `e = kl / target - 1` clipped to `-below` and 1.
    Two guards against windup: far below the target the error counts as `-below` alone, for there the policy needs time
    and not a smaller beta, and the sum stands still while beta is at a bound that the error pushes it beyond.
    """

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
    """From `value` to `end` over `total_generations`, after `warmup_generations` from zero's neighbourhood up to it.

    `shape`: `"linear"` or `"cosine"`. Warm-up starts at a hundredth of `value`: zero itself would absorb.
    """

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
    """Let a rule move `trainer.beta` after every optimizer step that used new completions.

    The rule's state goes into `trainer_state.json` of every checkpoint and comes back from it. On several processes
    every rank sees the same pooled KL and so has the same beta.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock, its `beta` not 0.
        controller: A rule, such as `StepRule(0.25, target_kl_per_token=0.15)`.
        kl_estimator (`str`, *optional*, defaults to `"k1"`): The estimate that the rule is fed.
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
        if kl_estimator in kl.FULL_VOCABULARY:
            self.seam.scorer.need_hidden_states()
        self.seam.observers.append(self.observe)
        self.seen = None  # (KL per token, completions) of the last generation batch
        self.seam.controller, self.seam.beta = controller, controller.value

    def observe(self, rollout: kl.Rollout) -> None:
        if self.trainer.model.training:
            kl_per_token = self.seam.mean_per_token(rollout.per_token_kl(self.kl_estimator), rollout.completion_mask)
            self.seen = kl_per_token, len(rollout.logps) * self.trainer.accelerator.num_processes

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(self.STATE)
        if saved and state.global_step:
            vars(self.controller).update(saved["attributes"])
        self.seam.beta = self.controller.value

    def on_step_end(self, args, state, control, **kwargs):
        if self.seen is not None:
            self.seam.beta = self.controller.update(*self.seen)
            self.seen = None
        state.stateful_callbacks[self.STATE] = {"args": {}, "attributes": vars(self.controller).copy()}
