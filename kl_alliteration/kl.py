"""KL estimators, their reductions and their units: free functions on tensors, and `Rollout`, which uses them.

Notation: B completions, T completion tokens, V vocabulary, H hidden size; p is the policy, q the reference.
`ref_log_ratio = logps - ref_logps` (B, T) is the log-ratio of the sampled tokens; its mean over samples of the policy
is KL(p || q). `completion_mask` (B, T), 1 = counted. Everything is in nats.

There are two kinds of estimator. To add one, write a function and put it into its table:

- `SAMPLED`, of the sampled tokens' log-ratio alone: `f(ref_log_ratio)`, (B, T) -> (B, T). After Schulman,
  "Approximating KL Divergence" (2020, http://joschu.net/blog/kl-approx.html).
- `FULL_VOCABULARY`, of both next-token distributions: `f(log_p, log_q, token_ids)`, (N, V), (N, V), (N,) -> (N,).
  `from_hidden_states` feeds it a chunk of positions at a time, so that (B, T, V) is never held.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

# exp() is continued linearly beyond this log-ratio: float32 overflows at 88.7, and a clamp of the result would turn
# inf * 0 into a NaN gradient. The tangent keeps the sign of the gradient, which a clamp of the argument would lose.
LINEAR_BEYOND = 20.0

# Log-probabilities that a chunk of positions may hold for one of the two models: 16 MB in float32.
CHUNK_ELEMENTS = 2**22


class KLWarning(UserWarning):
    """Category of this package's warnings: a biased estimate, a null or wrong gradient, a collapse."""


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
REDUCTIONS = ("sum", "mean")


def estimators() -> tuple[str, ...]:
    """The names of all estimators."""
    return (*SAMPLED, *FULL_VOCABULARY)


def whole(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The whole parameter, gathered where it is sharded."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    return parameter.detach().clone() if hasattr(parameter, "ds_status") else parameter


@dataclass(frozen=True)
class LMHead:
    """From hidden states to log-probabilities in the order of TRL's fused head: scale, soft-capping, temperature.

    `weight` (V, H), `bias` (V,) or `None`. The configuration names that scale the logits are those that
    `add_fused_lm_head` in `trl/trainer/utils.py` of trl 1.16.0 reads.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model, temperature: float = 1.0) -> "LMHead":
        """The head of a causal language model of transformers, at a sampling temperature.

        A head that FSDP2 shards is gathered, with its gradient. A head that ZeRO-3 shards must be gathered by the
        caller around this call. It is copied here, because it is released afterwards; the copy has no gradient. For
        a head in PEFT's `modules_to_save` this is the one in use now: the trained one, or, adapter off, the original.

        Raises:
            `ValueError`: for a head with an adapter on it, since only the base's weight would be read.
        """
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        if hasattr(head, "original_module"):  # of PEFT's wrapper
            saved = [name for name in head.active_adapters if name in head.modules_to_save]
            head = head.original_module if head.disable_adapters or not saved else head.modules_to_save[saved[0]]
        if hasattr(head, "base_layer"):
            raise ValueError(
                "the LM head carries an adapter, which full-vocabulary KL estimates do not see: leave lm_head out of "
                "lora_target_modules, or use the estimator k1"
            )
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        scale = next((s for name in names if (s := getattr(config, name, None)) is not None), None)
        if scale is None and (scaling := getattr(config, "logits_scaling", None)) is not None:
            scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
        softcap = getattr(config, "final_logit_softcapping", None)
        weight, bias = (whole(t) for t in (head.weight, head.bias))
        return cls(weight, bias, temperature, 1.0 if scale is None else scale, softcap)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, V) log-probabilities, in float32 or better."""
        logits = torch.nn.functional.linear(hidden.to(self.weight), self.weight, self.bias)
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

    Positions are projected in chunks of `rows`, and only those that the mask counts. The backward pass computes each
    chunk again. So memory is that of one chunk, `rows` x V, not of B x T x V.

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
    rows = rows or max(1, CHUNK_ELEMENTS // head.vocab_size)

    def chunk(policy_rows, ref_rows, ids):
        with torch.no_grad():
            log_q = ref_head.log_probs(ref_rows)
        log_p = head.log_probs(policy_rows)
        return estimate(log_p, log_q.to(log_p.device), ids.to(log_p.device))

    values = [
        checkpoint(chunk, *parts, use_reentrant=False) if torch.is_grad_enabled() else chunk(*parts)
        for parts in zip(
            # A model that is split over devices ends on another one than it begins with.
            *(t[counted.to(t.device)].split(rows) for t in (hidden, ref_hidden, token_ids)),
            strict=True,
        )
    ]
    values = torch.cat(values).to(counted.device)
    return values.new_zeros(counted.shape).masked_scatter(counted, values)


def full_vocabulary_estimate(estimator: str, direction: str = "reverse", k: int = 64) -> partial:
    """The function of `FULL_VOCABULARY` with its options bound: `f(log_p, log_q, token_ids)`."""
    options = {"exact": {"direction": direction}, "top_k": {"k": k}}
    return partial(FULL_VOCABULARY[estimator], **options.get(estimator, {}))


@dataclass(frozen=True)
class HiddenStates:
    """What the full-vocabulary estimators need: (B, T, H) states that predict the completion tokens, and LM heads."""

    policy: torch.Tensor
    reference: torch.Tensor
    head: LMHead
    ref_head: LMHead


@dataclass(frozen=True)
class Rollout:
    """Completions on this process, scored by policy and reference, (B, T) each.

    Detached in a generation batch; in the loss `logps` and `hidden.policy` carry the policy's gradient.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    hidden: HiddenStates | None = None
    known: dict = field(default_factory=dict)  # full-vocabulary estimates that were asked for already
    graphs: dict | None = None  # and the same with their graph, where the loss will ask again
    base_logps: torch.Tensor | None = None  # of the base, adapter off, where the reference is another adapter
    sampler_logps: torch.Tensor | None = None  # by what sampled them, where that is another engine; warped as it warps

    @property
    def ref_log_ratio(self) -> torch.Tensor:
        return self.logps - self.ref_logps  # (B, T); its mean over policy samples is KL(policy || reference)

    def per_token_kl(self, estimator: str, direction: str = "reverse", k: int = 64) -> torch.Tensor:
        """Any estimator, (B, T) nats; a full-vocabulary one is computed once."""
        if estimator in SAMPLED:
            return SAMPLED[estimator](self.ref_log_ratio)
        estimate = full_vocabulary_estimate(estimator, direction, k)
        key = estimator, *estimate.keywords.items()  # its own options, not the others'
        if key not in self.known:
            with nullcontext() if self.graphs is None else torch.enable_grad():
                values = self._from_hidden_states(estimate)
            if self.graphs is not None:
                self.graphs[key], values = values, values.detach()
            self.known[key] = values
        return self.known[key]

    def _from_hidden_states(self, estimate: Callable) -> torch.Tensor:
        states = self.hidden
        models = states.policy, states.reference, states.head, states.ref_head
        return from_hidden_states(estimate, *models, self.completion_ids, self.completion_mask)


def reduce_per_sequence(per_token_kl: torch.Tensor, completion_mask: torch.Tensor, reduction: str) -> torch.Tensor:
    """One number a completion, (B, T) -> (B,): `"sum"` in nats per sequence, `"mean"` in nats per counted token.

    `"mean"` divides by each completion's own number of counted tokens; a completion with none gets 0.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    kl_per_sequence = (per_token_kl * completion_mask).sum(-1)  # (B, T) -> (B,)
    return kl_per_sequence if reduction == "sum" else kl_per_sequence / completion_mask.sum(-1).clamp(min=1)


def over_budget(
    reduced_kl: torch.Tensor, length: torch.Tensor, reduction: str, budget_per_token: float
) -> torch.Tensor:
    """The part of each completion's KL beyond its budget, (B,) -> (B,), in the reduction's unit; 0 within the budget.

    The budget is `budget_per_token` nats times `length`, (B,) counted tokens, whether the KL is summed or averaged.
    """
    budget = budget_per_token * (length.to(reduced_kl.dtype) if reduction == "sum" else 1)
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


def check_choice(field: str, value, choices) -> None:
    """`ValueError` that names the field, the value and what it may be."""
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")


def model_logps(
    model, ids: torch.Tensor, attention_mask: torch.Tensor, length: int, temperature=1.0, positions=True
) -> torch.Tensor:
    """What a causal language model itself says of the last `length` tokens: (B, P + T) -> (B, T), from its logits.

    `positions`: give it [`positions_of`] the mask, where it takes them.
    """
    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    kwargs = {"input_ids": ids, "attention_mask": attention_mask}
    if positions and "position_ids" in inspect.signature(inner.forward).parameters:
        kwargs["position_ids"] = positions_of(attention_mask)
    logits = model(**kwargs).logits[:, -length - 1 : -1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = (logits / temperature).log_softmax(-1)  # (B, T, V)
    return log_probs.gather(-1, ids[:, -length:, None]).squeeze(-1)


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L) positions counted from the first token that is no padding, as transformers' `generate` counts them."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def distinct_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each of B left-padded prompts' place among the U distinct ones, (B,), and a row with each of those, (U,).

    (B, P) ids and mask; the distinct ones are in the order of their first rows.
    """
    ids = input_ids.masked_fill(attention_mask == 0, -1)
    found, row = torch.unique(ids, dim=0, return_inverse=True)
    rows = torch.arange(len(row), device=row.device)
    first = rows.new_full((len(found),), len(row)).scatter_reduce(0, row, rows, "amin")
    order = first.argsort()
    return order.argsort()[row], first[order]


def mean_difference(logps: torch.Tensor, others: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean absolute difference of (B, T) log-probabilities over the counted tokens, in nats."""
    return (((logps - others).abs() * mask).sum() / mask.sum().clamp(min=1)).item()


def rounding(dtype: torch.dtype) -> float:
    """How far apart, in nats a token, two ways of computing the same log-probabilities may be on average."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 0.05)


def autocast_dtype(accelerator) -> torch.dtype | None:
    """What an accelerator's mixed precision computes in; `None` without it."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
