"""A target in nats per sequence: a wall at it, and within it a price that the reference's own rewards name."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from transformers import TrainerCallback

from . import kl
from ._trl import seam_of
from .penalty import KLPenalty
from .yardsticks import ENOUGH, centred, least_kl_at

WALL = 4.0  # prices that a nat beyond the target costs
LARGEST = 1e3  # of the price: where a text that repeats itself pays for its KL many times over
# How the wall moves at a step: a fifth of the error, but out slowly, or a KL that still rises overshoots; and how far.
WALL_RATE, WALL_OUT, WALL_IN, WALL_AT_MOST = 0.2, 0.01, 0.04, 1.5
AHEAD = 1.1  # of the text that spends most: a wall that texts heed, and that waited for one beyond it, would not move
START = 0.02  # of the price, from which it rises: a full price from the first step slows the start
# Of the target: below the first the price falls, above it it rises to what was read off, and above the second further.
HELD, BEYOND = 0.9, 1.1
SMOOTHING = 0.7  # weight of the past in the moving averages of KL and length


@dataclass(frozen=True)
class TargetPrice:
    """What the reference's samples say of a target: the price whose optimum has that KL, and how far they see.

    `price` is reward per nat; `kl_per_sequence` the KL, in nats, that the samples carry at it, at most the target;
    `effective_samples` and `largest_weight` what it rests on; `blind` says that the target lies further away.
    """

    target_kl_per_sequence: float
    price: float
    reward: float
    kl_per_sequence: float
    effective_samples: float
    largest_weight: float
    samples: int

    @property
    def blind(self) -> bool:
        return self.kl_per_sequence < 0.999 * self.target_kl_per_sequence

    def in_words(self) -> str:
        words = f"target {self.target_kl_per_sequence:g} nats per sequence: price {self.price:.3g} reward per nat, "
        words += f"{WALL * self.price:.3g} beyond the target. {self.samples} samples of the reference show reward "
        words += f"{self.reward:.3g} at {self.kl_per_sequence:.3g} nats ({self.effective_samples:.0f} effective, "
        words += f"largest weight {self.largest_weight:.2f})"
        return words + ("; further they are blind, and the price is that of there" if self.blind else "")


def price_of_target(ref_rewards: torch.Tensor, kl_per_sequence: float) -> TargetPrice:
    """The price of a target from rewards of the reference's own samples.

    Of several prompts they are taken together, [`~yardsticks.centred`].

    Args:
        ref_rewards (`torch.Tensor`): (M,) of one prompt or (P, M) of P prompts; NaN does not apply.
        kl_per_sequence (`float`): The target, in nats.

    Raises:
        `ValueError`: for a target that is no number above 0, and for rewards that do not differ: no KL buys any.
    """
    if not 0 < kl_per_sequence < math.inf:
        raise ValueError(f"target_kl_per_sequence must be > 0 and finite, got {kl_per_sequence}")
    known = centred(ref_rewards)
    known = known - (mean := known.mean())  # a price is one of differences, which rounding must not make
    spread = (known.max() - known.min()).item() if len(known) else 0.0
    if not spread > 1e-12 * torch.as_tensor(ref_rewards).double().nan_to_num().abs().max().item():
        raise ValueError(
            f"target_kl_per_sequence: the reference's {len(known)} rewards do not differ, so that no KL buys any: "
            "take another reward, or more samples"
        )
    point = None
    try:
        point = least_kl_at(known, kl_per_sequence=kl_per_sequence)
    except ValueError:  # beyond log M nats
        pass
    if point is None or point["effective_samples"] < ENOUGH:
        point = _furthest(known)
    point["reward"] += mean.item()
    names = ("price", "reward", "kl_per_sequence", "effective_samples", "largest_weight")
    return TargetPrice(kl_per_sequence, **{name: point[name] for name in names}, samples=len(known))


def _furthest(rewards: torch.Tensor) -> dict:
    """The last point of the curve that enough samples carry, by bisection of the KL."""
    low, high, found = 0.0, math.log(len(rewards)), None
    for _ in range(20):
        middle = (low + high) / 2
        try:
            point = least_kl_at(rewards, kl_per_sequence=middle)
        except ValueError:
            high = middle
            continue
        if point["effective_samples"] >= min(ENOUGH, len(rewards) / 2):
            low, found = middle, point
        else:
            high = middle
    return found


@dataclass
class PriceRule:
    """Moves a price by `price *= exp(rate * clip(kl / held - 1, -1, 1))` of a smoothed KL per sequence, within bounds.

    `held` is 0.9 of the target up to the `full` price, and 1.1 of it above. So a policy that has nats left is not
    slowed, one that has none has to spend them better, and only one that runs away pays more than the full price.
    """

    STATE: ClassVar = ("value", "smoothed_kl_per_sequence")
    value: float
    target_kl_per_sequence: float
    full: float
    rate: float = 1.0
    smoothing: float = SMOOTHING
    smoothed_kl_per_sequence: float | None = None

    def __post_init__(self):
        if not START * self.full <= self.value <= LARGEST * self.full < math.inf:
            raise ValueError(f"a price must lie within {START} and {LARGEST:g} times the full one, got {self.value}")

    def update(self, kl_per_sequence: float) -> float:
        past = kl_per_sequence if self.smoothed_kl_per_sequence is None else self.smoothed_kl_per_sequence
        self.smoothed_kl_per_sequence = self.smoothing * past + (1 - self.smoothing) * kl_per_sequence
        use = self.smoothed_kl_per_sequence / self.target_kl_per_sequence
        low, high = START * self.full, LARGEST * self.full
        # The full price is a stop on the way in either direction, and a rest between the two.
        if self.value < self.full or (self.value == self.full and use < HELD):
            error, high = use / HELD - 1, self.full
        else:
            error, low = use / BEYOND - 1, self.full
        self.value = max(low, min(high, self.value * math.exp(self.rate * max(-1.0, min(1.0, error)))))
        return self.value


class KLTargetCallback(TrainerCallback):
    """Hold a KL in nats per sequence, the one number to state, in a stock `RLOOTrainer` or `GRPOTrainer`.

    A nat within the wall costs a price that [`PriceRule`] moves after every generation batch, from a fiftieth of
    what [`price_of_target`] reads off the reference's rewards to all of it, where the target is reached. A nat beyond
    it costs four times that reading, more where a policy runs away; it holds where the samples are blind. The
    wall is a budget per token that follows the mean length of the completions, so that the target is one of the
    sequence. It charges each text by itself, which would hold the mean below the target where texts differ: so it
    moves out, to one and a half targets at most, until the mean is at the target; less than the full price leaves it
    no more than a tenth ahead of the text that spends most. Sets `trainer.beta` and takes the place of
    [`KLPenaltyCallback`]. Logs `kl/price`, reward per nat within the wall, `kl/target_use`, KL over target, and
    `kl/wall`, where the wall stands over the target. Its state is in every checkpoint.

    Args:
        trainer ([`~trl.RLOOTrainer`] or [`~trl.GRPOTrainer`]): The trainer, stock, its `beta` not 0, so that TRL loads
            a reference.
        kl_per_sequence (`float`): The target, in nats.
        ref_rewards (`torch.Tensor`): (M,) rewards of the reference's samples of one prompt, or (P, M) of P prompts;
            some thousands in all.
        penalty ([`KLPenalty`], *optional*, defaults to `KLPenalty("exact", "both")`): What the price is paid for, with
            no budget of its own and summed over the sequence.

    Raises:
        `ValueError`: for a target or rewards that name no price.
    """

    STATE = "kl_alliteration.KLTarget"  # its place among the trainer's stateful callbacks

    def __init__(self, trainer, kl_per_sequence: float, ref_rewards: torch.Tensor, penalty: KLPenalty | None = None):
        penalty = penalty or KLPenalty("exact", "both")
        if trainer.beta == 0:
            raise ValueError("beta must not be 0 with a target: TRL then loads no reference; any other is replaced")
        if penalty.budget_per_token is not None or (penalty.reduction, penalty.direction) != ("sum", "reverse"):
            raise ValueError("the penalty of a target has reduction 'sum', direction 'reverse' and no budget")
        self.trainer, self.seam, self.ref_rewards = trainer, seam_of(trainer), torch.as_tensor(ref_rewards)
        self.price = price_of_target(ref_rewards, kl_per_sequence)
        if self.price.blind:
            warnings.warn(
                f"the reference's {self.price.samples} samples show nothing beyond {self.price.kl_per_sequence:.3g} "
                f"nats: the price of a target of {kl_per_sequence:g} is that of there, and the wall has to hold",
                kl.KLWarning,
                stacklevel=2,
            )
        price = self.price.price
        self.rule = PriceRule(START * price, kl_per_sequence, full=price)
        self.wall = 1.0  # of the target
        self.length: float | None = None  # tokens of a completion, smoothed
        # Of what was sampled since the last update: KL per sequence, length, the most that a text spends of its share.
        self.seen: tuple[float, float, float] | None = None
        self.texts: list[torch.Tensor] = []  # and of the texts in it KL and length, (2, N) a batch
        # Before the first batch, in which no policy has spent anything, a length is unknown: the longest.
        budget = kl_per_sequence / trainer.max_completion_length
        self.seam.own_price(type(self).__name__, replace(penalty, budget_per_token=budget))
        self.estimator = penalty.estimator if penalty.full_vocabulary else "k1"
        self.seam.observers.append(self.observe)
        self._apply()

    def _apply(self) -> None:
        length = self.length or self.trainer.max_completion_length
        beta = WALL * max(self.price.price, self.rule.value)
        self.seam.charge(beta)
        self.seam.penalty = replace(
            self.seam.penalty,
            budget_per_token=self.wall * self.price.target_kl_per_sequence / length,
            within_budget=self.rule.value / beta,
        )

    def observe(self, rollout: kl.Rollout) -> None:
        mask, target = rollout.completion_mask, self.price.target_kl_per_sequence
        nats = rollout.per_token_kl(self.estimator, k=self.seam.penalty.top_k)
        of_texts, lengths = (self.seam.of_texts(values, mask).cpu().double() for values in (nats, mask))
        if not len(of_texts):
            return
        spent = of_texts.mean().item()
        self.seam.metrics["kl/price"].append(self.rule.value)
        self.seam.metrics["kl/target_use"].append(spent / target)
        self.seam.metrics["kl/wall"].append(self.wall)
        if self.trainer.model.training and math.isfinite(spent):
            if self.seen is None:
                self.texts = []
            self.texts.append(torch.stack([of_texts, lengths]))
            of_texts, lengths = torch.cat(self.texts, dim=1)
            spent, length = of_texts.mean().item(), lengths.mean().item()
            self.seen = spent, length, (of_texts / lengths).max().item() * length / target

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(self.STATE)
        if saved and state.global_step:
            own = saved["attributes"]
            self.wall, self.length = own["wall"], own["length"]
            vars(self.rule).update({name: own[name] for name in self.rule.STATE})
        self._apply()

    def on_step_end(self, args, state, control, **kwargs):
        if self.seen is not None and self.seam.batch_is_used_up:
            spent, length, most = self.seen
            self.length = length if self.length is None else SMOOTHING * self.length + (1 - SMOOTHING) * length
            move = WALL_RATE * (1 - spent / self.price.target_kl_per_sequence)
            self.wall *= math.exp(max(-WALL_IN, min(WALL_OUT, move)))
            # Where the full price is paid the price holds the mean, and texts may differ as its optimum has them.
            leaning = AHEAD * most if self.rule.value < self.rule.full else WALL_AT_MOST
            self.wall = max(1.0, min(self.wall, WALL_AT_MOST, leaning))
            self.rule.update(spent)
            self._apply()
            self.seen = None
        own = {name: getattr(self.rule, name) for name in self.rule.STATE} | {"wall": self.wall, "length": self.length}
        state.stateful_callbacks[self.STATE] = {"args": {}, "attributes": own}
