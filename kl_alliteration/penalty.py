"""The KL penalty as one value: which estimate, where it goes, in which unit, and the gradient that this gives."""

import warnings
from dataclasses import dataclass

import torch
from transformers import TrainerCallback

from . import kl
from ._trl import seam_of
from .sampling_options import warn_of_sampling

PLACEMENTS = ("reward", "loss", "both")
DIRECTIONS = ("reverse", "forward")


@dataclass(frozen=True)
class GradientContract:
    """The expected gradient of `E[penalty]` that a choice really gives, and, where it is null or wrong, the remedy."""

    gradient: str
    use_instead: str | None = None


PARTIAL = "sum over t of E[grad KL_t]: partial, no credit for the states that a token leads to"
REVERSE = "the gradient of the reverse KL, KL(policy || reference)"
CONTRACT = {
    ("k1", "reward"): GradientContract(REVERSE),
    ("k1", "loss"): GradientContract("zero: only noise", "k2 in the loss, or k1 in the reward"),
    ("k1", "both"): GradientContract(f"{REVERSE}; the loss adds noise and nothing else", "k1 in the reward"),
    ("k2", "reward"): GradientContract(
        "that of E[k2] less the partial reverse-KL gradient: no gradient of a KL",
        "k2 in the loss, or k1 in the reward",
    ),
    ("k2", "loss"): GradientContract(f"of the reverse KL, {PARTIAL}"),
    ("k2", "both"): GradientContract(
        "that of the mean squared log-ratio, E[k2]: no gradient of a KL", "k2 in the loss, or k1 in the reward"
    ),
    ("k3", "reward"): GradientContract(
        "the reverse-KL gradient less the partial forward-KL gradient: vanishes near the reference, and pushes tokens "
        "that the policy already under-weights further away",
        "k1 in the reward, k3 in both, or k3 in the loss",
    ),
    ("k3", "loss"): GradientContract(f"of the forward KL, KL(reference || policy), {PARTIAL}"),
    ("k3", "both"): GradientContract(REVERSE),
    ("abs", "reward"): GradientContract(
        "that of E|log-ratio| less twice the total variation's partial gradient: no gradient of a KL",
        "k1 in the reward",
    ),
    ("abs", "loss"): GradientContract(
        "twice the total variation distance's, per token: partial, and of one size however far the policy is"
    ),
    ("abs", "both"): GradientContract("that of E|log-ratio|: no gradient of a KL", "k1 in the reward"),
    ("exact", "reward"): GradientContract(
        "the future-state term only: no own-token term, so the last token is not held at all",
        "exact in both, or k1 in the reward",
    ),
    ("exact", "loss"): GradientContract(f"of the reverse KL, {PARTIAL}; no sampling noise in the value"),
    ("exact", "both"): GradientContract(f"{REVERSE}, at far lower variance than k1"),
    ("top_k", "reward"): GradientContract(
        "the future-state term, and of the own-token term only what lies outside of the k likeliest tokens",
        "top_k in both, or k1 in the reward",
    ),
    ("top_k", "loss"): GradientContract(
        f"of the reverse KL, {PARTIAL}, and without the tokens outside of the k likeliest"
    ),
    ("top_k", "both"): GradientContract(f"{REVERSE}, at lower variance than k1"),
}
FORWARD = {
    "reward": GradientContract(
        "the future-state term of the forward KL only: no own-token term", "exact in both, direction forward"
    ),
    "loss": GradientContract(f"of the forward KL, KL(reference || policy), {PARTIAL}; no sampling noise in the value"),
    "both": GradientContract("that of the forward KL, KL(reference || policy), per token on the policy's own texts"),
}


@dataclass(frozen=True)
class KLPenalty:
    """The KL penalty that `beta` multiplies, as one value: checked when it is made, and called on a [`~kl.Rollout`].

    Args:
        estimator (`str`, *optional*, defaults to `"k1"`):
            `"k1"`, `"k2"`, `"k3"`, `"abs"` of the sampled tokens; `"exact"`, `"top_k"` of the whole vocabulary.
        placement (`str`, *optional*, defaults to `"reward"`):
            `"reward"`: subtracted from the reward, as in TRL. `"loss"`: added to the loss, differentiable. `"both"`.
        reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"`: beta is a price per nat of the sequence, as in TRL. `"mean"`: per nat of a token, which with
            `"k1"` is the study's difference of mean cross-entropies.
        direction (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"`, KL(policy || reference), or, of `"exact"` only, `"forward"`, KL(reference || policy).
        budget_per_token (`float`, *optional*):
            Nats per token without a penalty: only the KL beyond this many times the completion's length is
            penalised. `None` is no budget. With 0 every KL above zero is penalised.
        top_k (`int`, *optional*, defaults to `64`): Tokens that `"top_k"` takes in full.
        within_budget (`float`, *optional*, defaults to 0):
            What a nat within the budget costs, as a share of what one beyond it costs, from 0 to 1. Where it costs
            nothing, noise is free. 1 is no budget at all.
        opening_tokens (`int`, *optional*, defaults to 0):
            How many of a completion's first tokens have a price of their own: those that choose what it is about.
        opening_price (`float`, *optional*, defaults to 0):
            What a nat of theirs costs beside the rest of the penalty, in multiples of beta, budget or not. Their KL is
            that of the openings' distributions (chain rule), so that a high price keeps them as varied as they were.

    Raises:
        `ValueError`: for an unknown choice, or a combination that has no meaning.
    """

    estimator: str = "k1"
    placement: str = "reward"
    reduction: str = "sum"
    direction: str = "reverse"
    budget_per_token: float | None = None
    top_k: int = 64
    within_budget: float = 0.0
    opening_tokens: int = 0
    opening_price: float = 0.0

    def __post_init__(self):
        kl.check_choice("estimator", self.estimator, kl.estimators())
        kl.check_choice("placement", self.placement, PLACEMENTS)
        kl.check_choice("reduction", self.reduction, kl.REDUCTIONS)
        kl.check_choice("direction", self.direction, DIRECTIONS)
        if self.direction == "forward" and self.estimator != "exact":
            raise ValueError(
                f"direction 'forward' needs the estimator 'exact', got {self.estimator!r}: samples of the policy "
                "cannot say what the reference alone would write"
            )
        if self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}")
        if not 0 <= self.within_budget <= 1:
            raise ValueError(f"within_budget must be from 0 to 1, got {self.within_budget}")
        if self.opening_tokens < 0:
            raise ValueError(f"opening_tokens must be >= 0, got {self.opening_tokens}")
        if not 0 <= self.opening_price < float("inf"):
            raise ValueError(f"opening_price must be >= 0 and finite, got {self.opening_price}")
        if bool(self.opening_tokens) != bool(self.opening_price):
            raise ValueError(
                f"opening_tokens {self.opening_tokens} and opening_price {self.opening_price:g} need each other: set "
                "both, or both to 0"
            )
        if self.budget_per_token is None:
            if self.within_budget:
                raise ValueError(f"within_budget {self.within_budget} needs a budget: set budget_per_token")
            return
        if not 0 <= self.budget_per_token < float("inf"):
            raise ValueError(f"budget_per_token must be >= 0 and finite, got {self.budget_per_token}")
        if self.in_loss and not self.full_vocabulary:
            raise ValueError(
                f"budget_per_token in the loss needs the estimator {' or '.join(kl.FULL_VOCABULARY)}, "
                f"got {self.estimator!r}; none takes the budget away"
            )

    @property
    def in_reward(self) -> bool:
        return self.placement != "loss"

    @property
    def in_loss(self) -> bool:
        return self.placement != "reward"

    @property
    def full_vocabulary(self) -> bool:
        """Whether it needs both models' hidden states."""
        return self.estimator in kl.FULL_VOCABULARY

    @property
    def is_stock(self) -> bool:
        """Whether TRL computes it by itself: leaving it to TRL keeps every number the same bit for bit."""
        return self.is_plain("k1", "reward")

    def is_plain(self, estimator: str, placement: str) -> bool:
        """Whether it is that estimate there, in nats of the sequence, and nothing more."""
        choice = self.estimator, self.placement, self.reduction, self.budget_per_token, self.opening_tokens
        return choice == (estimator, placement, "sum", None, 0)

    def __call__(self, rollout: kl.Rollout) -> torch.Tensor:
        """What beta multiplies, one number a completion: (B,)."""
        per_token_kl = rollout.per_token_kl(self.estimator, self.direction, self.top_k)  # (B, T)
        mask = rollout.completion_mask
        return self.of_sums(*(values.sum(-1) for values in self.parts(per_token_kl, mask)))

    def parts(self, per_token_kl: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What [`of_sums`] takes the sums of, (B, T) each: the counted tokens' KL, the opening's, and the mask."""
        per_token_kl = per_token_kl * mask
        return per_token_kl, per_token_kl * (mask.cumsum(-1) <= self.opening_tokens), mask

    def of_sums(self, spent: torch.Tensor, opening: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """What beta multiplies, of completions' KL, their opening's, and their counted tokens; any one shape."""
        if self.reduction == "mean":
            spent, opening = spent / length.clamp(min=1), opening / length.clamp(min=1)
        penalty = spent
        if self.budget_per_token is not None:
            beyond = kl.over_budget(spent, length, self.reduction, self.budget_per_token)
            penalty = self.within_budget * spent + (1 - self.within_budget) * beyond
        return penalty + self.opening_price * opening if self.opening_tokens else penalty

    def in_words(self, beta: float | None = None) -> str:
        """For titles, cards and logs: `exact in the reward and loss, beta 1 per nat of the sequence beyond ...`."""
        words = f"{self.estimator} in the {'reward and loss' if self.placement == 'both' else self.placement}"
        words = f"forward {words}" if self.direction == "forward" else words
        words += ", " + ("" if beta is None else f"beta {beta:g} ")
        words += f"per nat of the {'sequence' if self.reduction == 'sum' else 'token'}"
        if self.budget_per_token is not None:
            words += f" beyond a budget of {self.budget_per_token:g} nats per token"
            words += f", {self.within_budget:g} of it within" if self.within_budget else ""
        if self.opening_tokens:
            words += f", and {self.opening_price:g} times beta per nat of the first {self.opening_tokens} tokens"
        return words

    @property
    def contract(self) -> GradientContract:
        """Which gradient it gives on average over completions that the policy itself sampled.

        Every row is proven by enumeration in `tests/test_contract.py`; with `num_iterations` > 1 those in the loss
        hold too (`tests/test_off_policy.py`). An estimator of your own has no row.
        """
        rows = FORWARD if self.direction == "forward" else CONTRACT
        row = rows.get(self.placement if self.direction == "forward" else (self.estimator, self.placement))
        if row is None:
            return GradientContract(f"unknown: {self.estimator!r} has no row in the contract")
        words = row.gradient
        if self.reduction == "mean":
            words += "; divided by the completion's length, so that long completions count less per token"
        if self.budget_per_token is not None:
            inside = f"{self.within_budget:g} of it" if self.within_budget else "none"
            words += f"; {inside} within the budget, that of the completions beyond it only outside"
        if self.opening_tokens:
            words += f"; and {self.opening_price:g} times that of the first {self.opening_tokens} tokens alone"
        return GradientContract(words, row.use_instead)

    @property
    def complaint(self) -> str | None:
        """The warning where the gradient is null or wrong, with what to use instead; else `None`."""
        if self.contract.use_instead is None:
            return None
        return (
            f"the KL penalty {self.estimator!r} in the {self.placement} gives a gradient that is "
            f"{self.contract.gradient}. Use {self.contract.use_instead}."
        )


class KLPenaltyCallback(TrainerCallback):
    """Use a [`KLPenalty`] in a stock [`~trl.RLOOTrainer`] or [`~trl.GRPOTrainer`], multiplied by `trainer.beta`.

    It takes effect as soon as the callback is made. TRL's metric `kl` keeps its meaning, whatever the penalty is: in
    nats per token, RLOO's the mean log-ratio, GRPO's the mean k3. With `trainer.beta == 0` there is no penalty, and a
    warning says so. A choice with a null or wrong gradient warns, with what to use instead.

    On GRPO the penalty in the reward is subtracted before TRL takes the group's mean away and divides by its spread
    (`scale_rewards`), and in the loss a completion has the weight that TRL's `loss_type` gives to its tokens. So a nat
    costs beta beside a reward, in either half of `"both"`; in the loss alone it costs beta beside a reward over the
    spread, as TRL's own k3 does.

    Args:
        trainer ([`~trl.RLOOTrainer`] or [`~trl.GRPOTrainer`]): The trainer, stock.
        penalty ([`KLPenalty`], *optional*): The choice; by default TRL's own, k1 in RLOO's reward, k3 in GRPO's loss.
        strict (`bool`, *optional*, defaults to `False`): Raise instead of warning of a gradient.

    Raises:
        `ValueError`: for a model whose head the estimate cannot read; on GRPO for a penalty in the reward beside
            `multi_objective_aggregation="normalize_then_sum"`, on RLOO for one in both beside `normalize_advantages`.

    Example:

    ```python
    trainer = RLOOTrainer(...)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    ```
    """

    def __init__(self, trainer, penalty: KLPenalty | None = None, strict: bool = False):
        if penalty is not None and trainer.beta == 0:
            warnings.warn(
                "beta is 0, GRPO's default: the penalty charges nothing, and TRL loads no reference. Set beta, the "
                "reward per nat, in the trainer's configuration",
                kl.KLWarning,
                stacklevel=2,
            )
        self.trainer, self.penalty = trainer, penalty or KLPenalty(*seam_of(trainer).OWN)
        if complaint := self.penalty.complaint:
            if strict:
                raise ValueError(complaint)
            warnings.warn(complaint, kl.KLWarning, stacklevel=2)
        warn_of_sampling(trainer, self.penalty.estimator, seam_of(trainer).is_as_sampled)
        seam_of(trainer).use_penalty(self.penalty)
