"""RLOO's correction for an engine that samples from another distribution than the policy that is trained."""

import warnings

import torch

from .. import kl
from .._trl import listen_to_engine, seam_of

CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


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


def use_sampler_correction(trainer, correction: str = "sequence_truncate", cap: float = 3.0) -> None:
    """Weight the gradient of a stock `RLOOTrainer` by policy over sampler, where the sampler says how likely its
    tokens were: vLLM, or [`use_fast_sampling`].

    `sequence_...` gives the gradient of the policy's own distribution wherever the cap is not reached, for the reward
    and for the penalty in reward and loss; `token_...` leaves out what a token's prefix and its future differ by, and
    leaves a penalty in the loss as it is, as TRL's GRPO does. Proven by enumeration in
    `tests/test_sampler_correction.py`. Logs `kl/sampler_weight`, the mean weight, and `kl/sampler_clipped_share`, the
    share of tokens at the cap.

    Raises:
        `ValueError`: for an unknown correction, a cap that is not above 0, and for `GRPOTrainer`, which has its own.
    """
    kl.check_choice("sampler_correction", correction, CORRECTIONS)
    if not cap > 0:
        raise ValueError(f"sampler_correction_cap must be > 0, got {cap}")
    if correction == "none":
        return
    seam = seam_of(trainer)
    if not hasattr(seam, "changes"):
        raise ValueError(
            "sampler_correction is RLOO's: GRPOTrainer has its own, vllm_importance_sampling_correction with "
            "vllm_importance_sampling_mode and vllm_importance_sampling_cap"
        )
    listen_to_engine(seam)

    def correct(output: dict) -> None:
        sampled, mask = seam.batch.sampled, output["completion_mask"]
        logps = seam.batch.scored[0].logps
        if len(sampled) != 1 or sampled[0].shape != logps.shape:
            warnings.warn(
                f"sampler_correction {correction!r} does nothing: what samples does not say how likely its tokens "
                "were. vLLM and use_fast_sampling do",
                kl.KLWarning,
                stacklevel=2,
            )
            return
        weights = sampler_weights(logps, sampled[0].to(logps), mask, correction, cap)
        output["kl_token_weights"] = weights
        if correction.startswith("sequence"):
            output["kl_text_weights"] = weights[:, 0]
        seam.metrics["kl/sampler_weight"].append(seam.mean_per_token(weights, mask))
        clipped = ((weights == cap) | (weights == 0)).to(weights)
        seam.metrics["kl/sampler_clipped_share"].append(seam.mean_per_token(clipped, mask))

    seam.changes.append(correct)
