"""KL estimators, their reductions, their units, and the gradient that each choice gives: free functions on tensors.

Notation: B completions, T completion tokens, V vocabulary, H hidden size; p is the policy, q the reference.
`ref_log_ratio = logps - ref_logps` (B, T) is the log-ratio of the sampled tokens; its mean over samples of the policy
is KL(p || q). `completion_mask` (B, T), 1 = counted. Everything is in nats.

There are two kinds of estimator. To add one, write a function and put it into its table:

- `SAMPLED`, of the sampled tokens' log-ratio alone: `f(ref_log_ratio)`, (B, T) -> (B, T). After Schulman,
  "Approximating KL Divergence" (2020, http://joschu.net/blog/kl-approx.html).
- `FULL_VOCABULARY`, of both next-token distributions: `f(log_p, log_q, token_ids)`, (N, V), (N, V), (N,) -> (N,).
  `from_hidden_states` feeds it a chunk of positions at a time, so that (B, T, V) is never held.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

# exp() is continued linearly beyond this log-ratio: float32 overflows at 88.7, and a clamp of the result would turn
# inf * 0 into a NaN gradient. The tangent keeps the sign of the gradient, which a clamp of the argument would lose.
LINEAR_BEYOND = 20.0

# Log-probabilities that a chunk of positions may hold for one of the two models: 16 MB in float32.
CHUNK_ELEMENTS = 2**22


def k1(ref_log_ratio: torch.Tensor) -> torch.Tensor:
    """The log-ratio itself, (B, T) -> (B, T) nats: unbiased, may be negative."""
    return ref_log_ratio


def k2(ref_log_ratio: torch.Tensor) -> torch.Tensor:
    """Half the squared log-ratio, (B, T) -> (B, T) nats: biased, never negative."""
    return ref_log_ratio.square() / 2


def k3(ref_log_ratio: torch.Tensor) -> torch.Tensor:
    """`exp(-x) - 1 + x`, (B, T) -> (B, T) nats: unbiased, never negative. Finite, with finite gradients, at any x."""
    excess = (-ref_log_ratio - LINEAR_BEYOND).clamp(min=0)
    inside = (-ref_log_ratio).clamp(max=LINEAR_BEYOND)
    return torch.expm1(inside) + excess * torch.exp(inside) + ref_log_ratio


def absolute(ref_log_ratio: torch.Tensor) -> torch.Tensor:
    """The log-ratio's absolute value, (B, T) -> (B, T) nats: biased, never negative. The `abs` of other trainers."""
    return ref_log_ratio.abs()


def exact(log_p: torch.Tensor, log_q: torch.Tensor, token_ids=None, direction: str = "reverse") -> torch.Tensor:
    """The KL itself, (N, V), (N, V) -> (N,) nats: no noise from the sampled token (Amini et al., arXiv 2504.10637).

    `direction`: `"reverse"`, KL(p || q), or `"forward"`, KL(q || p).
    """
    if direction == "forward":
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def top_k(log_p: torch.Tensor, log_q: torch.Tensor, token_ids: torch.Tensor, k: int = 64) -> torch.Tensor:
    """KL(p || q) of the policy's `k` likeliest tokens in full, of all others by the sampled one, (N, V) -> (N,) nats.

    Unbiased at any k and `exact` at k >= V: a sampled token outside of the k adds its log-ratio (arXiv 2602.04417).
    """
    k = min(k, log_p.shape[-1])
    top_log_p, top_ids = log_p.topk(k, dim=-1)  # (N, k)
    head = (top_log_p.exp() * (top_log_p - log_q.gather(-1, top_ids))).sum(-1)
    sampled = token_ids.unsqueeze(-1)  # (N, 1)
    tail = (log_p.gather(-1, sampled) - log_q.gather(-1, sampled)).squeeze(-1)
    return head + tail * (top_ids != sampled).all(-1)


SAMPLED: dict[str, Callable] = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}
FULL_VOCABULARY: dict[str, Callable] = {"exact": exact, "top_k": top_k}
PLACEMENTS = ("reward", "loss", "both")
REDUCTIONS = ("sum", "mean")
DIRECTIONS = ("reverse", "forward")


def estimators() -> tuple[str, ...]:
    """The names that `kl_estimator` may have."""
    return (*SAMPLED, *FULL_VOCABULARY)


@dataclass(frozen=True)
class LMHead:
    """From hidden states to log-probabilities in the order of TRL's fused head: scale, soft-capping, temperature.

    `weight` (V, H), `bias` (V,) or `None`. Which configuration names scale the logits is read off
    `trl/trainer/utils.py`, `add_fused_lm_head`, of trl 1.16.0.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model, temperature: float = 1.0) -> "LMHead":
        """The head of a causal language model of transformers, at a sampling temperature.

        A head that FSDP2 shards is gathered, with its gradient.

        Raises:
            `ValueError`: for a head with an adapter, whose weight would be the base's, or one that ZeRO-3 shards.
        """
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        if hasattr(head, "base_layer") or hasattr(head, "original_module"):  # of PEFT's wrappers
            raise ValueError(
                "the LM head carries an adapter, which full-vocabulary KL estimates do not see: leave lm_head out of "
                "lora_target_modules and modules_to_save, or use kl_estimator k1"
            )
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        scale = next((s for name in names if (s := getattr(config, name, None)) is not None), None)
        if scale is None and (scaling := getattr(config, "logits_scaling", None)) is not None:
            scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
        softcap = getattr(config, "final_logit_softcapping", None)
        if hasattr(head.weight, "ds_status"):
            raise ValueError(
                "DeepSpeed ZeRO-3 shards the LM head, which full-vocabulary KL estimates read whole: use ZeRO-2 or "
                "FSDP2, or kl_estimator k1"
            )
        weight, bias = (t.full_tensor() if isinstance(t, DTensor) else t for t in (head.weight, head.bias))
        return cls(weight, bias, temperature, 1.0 if scale is None else scale, softcap)

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, V) log-probabilities, in float32 or better."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return torch.log_softmax(logits, dim=-1)


def from_hidden_states(
    estimate: Callable,
    hidden: torch.Tensor,
    ref_hidden: torch.Tensor,
    head: LMHead,
    ref_head: LMHead,
    token_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    rows: int | None = None,
) -> torch.Tensor:
    """A full-vocabulary estimate per token from two models' last hidden states.

    Only `rows` positions are projected at a time, in the backward pass too, where a chunk is computed again, and only
    positions that the mask counts: memory is that of a chunk, `rows` x V, and not of B x T x V.

    Args:
        estimate (callable): `f(log_p, log_q, token_ids)`, (N, V), (N, V), (N,) -> (N,), such as [`exact`].
        hidden, ref_hidden (`torch.Tensor`): (B, T, H), the states that predict the T completion tokens.
        head, ref_head ([`LMHead`]): Two for full fine-tuning; for LoRA, whose head is frozen, the same one twice.
        token_ids, completion_mask (`torch.Tensor`): (B, T).
        rows (`int`, *optional*): Positions in a chunk; by default as many as keep it at `CHUNK_ELEMENTS`.

    Returns:
        `torch.Tensor`: (B, T) nats per token, 0 where the mask is 0; differentiable in `hidden` and in `head`.
    """
    counted = completion_mask.bool()
    rows = rows or max(1, CHUNK_ELEMENTS // head.weight.shape[0])

    def chunk(policy_rows, ref_rows, ids):
        with torch.no_grad():
            log_q = ref_head.log_probs(ref_rows)
        return estimate(head.log_probs(policy_rows), log_q, ids)

    values = [
        checkpoint(chunk, *parts, use_reentrant=False) if torch.is_grad_enabled() else chunk(*parts)
        for parts in zip(
            hidden[counted].split(rows), ref_hidden[counted].split(rows), token_ids[counted].split(rows), strict=True
        )
    ]
    values = torch.cat(values)
    return values.new_zeros(counted.shape).masked_scatter(counted, values)


def reduce_per_sequence(per_token_kl: torch.Tensor, completion_mask: torch.Tensor, reduction: str) -> torch.Tensor:
    """One number a completion, (B, T) -> (B,): `"sum"` in nats per sequence, `"mean"` in nats per counted token.

    `"mean"` divides by each completion's own number of counted tokens; a completion with none gets 0.
    """
    check_choice("kl_reduction", reduction, REDUCTIONS)
    kl_per_sequence = (per_token_kl * completion_mask).sum(-1)  # (B, T) -> (B,)
    return kl_per_sequence if reduction == "sum" else kl_per_sequence / completion_mask.sum(-1).clamp(min=1)


def over_budget(
    reduced_kl: torch.Tensor, completion_mask: torch.Tensor, reduction: str, budget_per_token: float
) -> torch.Tensor:
    """What of a completion's KL exceeds its budget, (B,) -> (B,), in the reduction's unit; 0 within the budget.

    The budget is `budget_per_token` nats times the completion's counted tokens, whether the KL is summed or averaged.
    """
    budget = budget_per_token * (completion_mask.sum(-1).to(reduced_kl.dtype) if reduction == "sum" else 1)
    return (reduced_kl - budget).clamp(min=0)


def study_beta(beta_per_study: float, positions: int = 99) -> float:
    """The tiny-stories study's coefficient in nats per sequence, TRL's unit.

    The study multiplies the mean log-ratio over all `positions` of a text, 99 in its texts of 100 tokens, TRL the sum:
    40 is 0.404, 100 is 1.01. `to_study_beta` goes back.
    """
    return beta_per_study / positions


def to_study_beta(beta_per_sequence: float, positions: int = 99) -> float:
    """A coefficient in TRL's unit as the study would state it; see [`study_beta`]."""
    return beta_per_sequence * positions


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


def gradient_contract(
    estimator: str,
    placement: str = "reward",
    reduction: str = "sum",
    direction: str = "reverse",
    budget_per_token: float | None = None,
) -> GradientContract:
    """Which gradient a penalty gives on average over completions that the policy itself sampled.

    Every row is proven by enumeration in `tests/test_contract.py`. An estimator of your own has no row.

    Raises:
        `ValueError`: for a choice that does not exist.
    """
    check_penalty(estimator, placement, reduction, direction, budget_per_token)
    row = FORWARD[placement] if direction == "forward" else CONTRACT.get((estimator, placement))
    if row is None:
        return GradientContract(f"unknown: {estimator!r} has no row in the contract")
    words = row.gradient
    if reduction == "mean":
        words += "; divided by the completion's length, so that long completions count less per token"
    if budget_per_token is not None:
        words += "; none within the budget, that of the completions beyond it only outside"
    return GradientContract(words, row.use_instead)


def warn_of_gradient(contract: GradientContract, choice: str, strict: bool = False) -> None:
    """Warn of a null or wrong gradient, or stop with a `ValueError` where `strict`."""
    if contract.use_instead is None:
        return
    message = f"{choice} gives a gradient that is {contract.gradient}. Use {contract.use_instead}."
    if strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def check_penalty(estimator: str, placement: str, reduction: str, direction: str, budget_per_token) -> None:
    """`ValueError` for what is no penalty."""
    check_choice("kl_estimator", estimator, estimators())
    check_choice("kl_placement", placement, PLACEMENTS)
    check_choice("kl_reduction", reduction, REDUCTIONS)
    check_choice("kl_direction", direction, DIRECTIONS)
    if direction == "forward" and estimator != "exact":
        raise ValueError(
            f"kl_direction 'forward' needs kl_estimator 'exact', got {estimator!r}: samples of the policy cannot say "
            "what the reference alone would write"
        )
    if budget_per_token is not None:
        if not 0 <= budget_per_token < float("inf"):
            raise ValueError(f"kl_budget_per_token must be >= 0 and finite, got {budget_per_token}")
        if placement != "reward" and estimator not in FULL_VOCABULARY:
            raise ValueError(
                f"kl_budget_per_token in the loss needs kl_estimator {' or '.join(FULL_VOCABULARY)}, "
                f"got {estimator!r}; take it away with kl_budget_per_token none"
            )


def full_vocabulary_estimate(estimator: str, direction: str = "reverse", k: int = 64) -> partial:
    """The function of `FULL_VOCABULARY` with its options bound: `f(log_p, log_q, token_ids)`."""
    if k < 1:
        raise ValueError(f"kl_top_k must be >= 1, got {k}")
    options = {"exact": {"direction": direction}, "top_k": {"k": k}}
    return partial(FULL_VOCABULARY[estimator], **options.get(estimator, {}))


def check_choice(field: str, value, choices) -> None:
    """`ValueError` that names the field, the value and what it may be."""
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")
