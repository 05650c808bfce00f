"""KL estimators and their reductions: free functions on tensors.

Notation: B completions, T completion tokens. `ref_log_ratio = logps - ref_logps` (B, T) is the log-ratio of the
sampled tokens to the reference policy; its mean over samples of the policy is KL(policy || reference).
`completion_mask` (B, T), 1 = counted. Everything is in nats.

Estimators after Schulman, "Approximating KL Divergence" (2020, http://joschu.net/blog/kl-approx.html). To add one,
write a function of `ref_log_ratio` and put it into `ESTIMATORS`.
"""

import torch

# exp() is continued linearly beyond this log-ratio: float32 overflows at 88.7, and a clamp of the result would turn
# inf * 0 into a NaN gradient. The tangent keeps the sign of the gradient, which a clamp of the argument would lose.
LINEAR_BEYOND = 20.0


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


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
REDUCTIONS = ("sum", "mean")


def reduce_per_sequence(per_token_kl: torch.Tensor, completion_mask: torch.Tensor, reduction: str) -> torch.Tensor:
    """One number a completion, (B, T) -> (B,): `"sum"` in nats per sequence, `"mean"` in nats per counted token.

    `"mean"` divides by each completion's own number of counted tokens; a completion with none gets 0.
    """
    check_choice("kl_reduction", reduction, REDUCTIONS)
    kl_per_sequence = (per_token_kl * completion_mask).sum(-1)  # (B, T) -> (B,)
    return kl_per_sequence if reduction == "sum" else kl_per_sequence / completion_mask.sum(-1).clamp(min=1)


def check_choice(field: str, value, choices) -> None:
    """`ValueError` that names the field, the value and what it may be."""
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")
