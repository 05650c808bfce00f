"""RLOO's correction, and trust region, for an engine that samples from another distribution than is trained."""

import warnings

import torch

from .. import kl
from .._trl import listen_to_engine, seam_of

CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
DIVERGENCES = {"binary_tv": 0.15, "binary_kl": 0.05}  # and the thresholds of arXiv 2602.04879, in probability and nats


def sampler_weights(
    logps: torch.Tensor, sampler_logps: torch.Tensor, mask: torch.Tensor, correction: str, cap: float
) -> torch.Tensor:
    """What the gradient of each token's log-probability is multiplied with: policy over sampler, bounded by `cap`.

    `token_...` takes each token's own ratio, `sequence_...` the completion's product for all of its tokens. Beyond
    the cap `..._truncate` takes the cap and `..._mask` takes 0. The names and forms are those of TRL's GRPO
    (`vllm_importance_sampling_mode`); truncated: Yao et al. 2025, masked: IcePop, Ling team 2025.

    Args:
        logps, sampler_logps, mask (`torch.Tensor`): (B, T); NaN of the sampler counts as the policy's own.

    Returns:
        `torch.Tensor`: (B, T), without a gradient.
    """
    log_ratio = (logps.detach() - sampler_logps).nan_to_num(nan=0.0) * mask  # (B, T)
    if correction.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)  # (B, T) -> (B, 1) -> (B, T)
    ratio = log_ratio.exp()
    return ratio.clamp(max=cap) if correction.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)


def trusted(
    logps: torch.Tensor, sampler_logps: torch.Tensor, advantages: torch.Tensor, divergence_type: str, threshold: float
) -> torch.Tensor:
    """Which tokens' gradients count: not those that were moved too far from the sampler, and are pushed further.

    DPPO's mask (arXiv 2602.04879), named as in TRL's experimental trainer of it. A token is two outcomes, itself or
    any other: `binary_tv` is their total variation, `binary_kl` their KL(sampler || policy). A positive advantage
    pushes a token up, a negative one down.

    Args:
        logps, sampler_logps (`torch.Tensor`): (B, T); NaN of the sampler counts as the policy's own.
        advantages (`torch.Tensor`): (B, 1), or (B, T) of each token's own.

    Returns:
        `torch.Tensor`: (B, T), 1 or 0.
    """
    log_ratio = (logps - sampler_logps).nan_to_num(nan=0.0)  # (B, T)
    p, sampled = logps.exp(), (logps - log_ratio).exp()
    if divergence_type == "binary_tv":
        divergence = (p - sampled).abs()
    else:
        rest, sampled_rest = ((1 - each).clamp(min=torch.finfo(p.dtype).eps) for each in (p, sampled))
        divergence = sampled_rest * (sampled_rest / rest).log() - sampled * log_ratio
    away = advantages * log_ratio > 0
    return (~(away & (divergence > threshold))).to(logps)


def use_sampler_correction(
    trainer,
    correction: str = "sequence_truncate",
    cap: float = 3.0,
    divergence_type: str | None = None,
    divergence_threshold: float | None = None,
) -> None:
    """Weight the gradient of a stock `RLOOTrainer` by policy over sampler, where the sampler says how likely its
    tokens were: vLLM, or [`use_fast_sampling`].

    `sequence_...` gives the gradient of the policy's own distribution wherever the cap is not reached, for the reward
    and for the penalty in reward and loss; `token_...` leaves out what a token's prefix and its future differ by, and
    leaves a penalty in the loss as it is, as TRL's GRPO does. Proven by enumeration in
    `tests/test_sampler_correction.py`. Logs `kl/sampler_weight`, the mean weight, and `kl/sampler_clipped_share`, the
    share of tokens at the cap.

    With `divergence_type`, `"binary_tv"` or `"binary_kl"`, a trust region stands around the sampler: at each pass the
    loss drops the gradient of tokens beyond `divergence_threshold` that the advantage pushes further, see [`trusted`].
    By default that is 0.15 in probability, or 0.05 nats. A penalty in the loss is not masked. Logs
    `kl/sampler_dropped_share`. RLOO clips the completion's ratio as well: a wide `epsilon` leaves the region alone.

    Raises:
        `ValueError`: for an unknown correction or divergence, a cap or threshold that is not above 0, a threshold
            without a divergence, and for `GRPOTrainer`, which has its own.
    """
    kl.check_choice("sampler_correction", correction, CORRECTIONS)
    if divergence_type is not None:
        kl.check_choice("sampler_divergence_type", divergence_type, DIVERGENCES)
    if divergence_threshold is None:
        divergence_threshold = DIVERGENCES.get(divergence_type)
    elif divergence_type is None:
        raise ValueError(
            f"sampler_divergence_threshold {divergence_threshold} needs a sampler_divergence_type: "
            f"{' or '.join(DIVERGENCES)}"
        )
    for name, value in (("correction_cap", cap), ("divergence_threshold", divergence_threshold)):
        if value is not None and not value > 0:
            raise ValueError(f"sampler_{name} must be > 0, got {value}")
    if correction == "none" and divergence_type is None:
        return
    asked = f"sampler_correction {correction!r}"
    if correction == "none":
        asked = f"sampler_divergence_type {divergence_type!r}"
    seam = seam_of(trainer)
    if hasattr(trainer, "vllm_importance_sampling_correction"):
        raise ValueError(
            "sampler_correction is RLOO's: GRPOTrainer has its own, vllm_importance_sampling_correction with "
            "vllm_importance_sampling_mode and vllm_importance_sampling_cap"
        )
    listen_to_engine(seam)

    def in_trust_region(logps: torch.Tensor, inputs: dict) -> torch.Tensor:
        sampler_logps = inputs["kl_sampler_logps"]
        advantages = inputs["advantages"].unsqueeze(1) + inputs.get("kl_credit", 0.0)
        kept = trusted(logps, sampler_logps, advantages, divergence_type, divergence_threshold)
        dropped = seam.mean_per_token(1 - kept, inputs["completion_mask"])
        seam.metrics["kl/sampler_dropped_share"].append(dropped)
        return kept

    def correct(output: dict) -> None:
        sampled, mask = seam.batch.sampled, output["completion_mask"]
        logps = seam.batch.scored[0].logps
        if len(sampled) != 1 or sampled[0].shape != logps.shape:
            warnings.warn(
                f"{asked} does nothing: what samples does not say how likely its tokens "
                "were. vLLM and use_fast_sampling do",
                kl.KLWarning,
                stacklevel=2,
            )
            return
        if divergence_type is not None:
            output["kl_sampler_logps"], seam.batch.trusted = sampled[0].to(logps), in_trust_region
        weights = torch.ones_like(logps)
        if correction != "none":
            weights = sampler_weights(logps, sampled[0].to(logps), mask, correction, cap)
        output["kl_token_weights"] = weights
        if correction.startswith("sequence"):
            output["kl_text_weights"] = weights[:, 0]
        seam.metrics["kl/sampler_weight"].append(seam.mean_per_token(weights, mask))
        clipped = ((weights == cap) | (weights == 0)).to(weights)
        seam.metrics["kl/sampler_clipped_share"].append(seam.mean_per_token(clipped, mask))

    seam.changes["sampler_correction"] = correct
