"""Truncated sampling scored as what it is: the policy over the tokens that top-k, top-p and min-p leave."""

from transformers import GenerationConfig

from .._trl import seam_of
from ..sampling_options import WARPERS, changes_of_sampling
from .generate import truncated


def score_as_sampled(trainer) -> None:
    """Score, and train, the policy of a stock `RLOOTrainer` over the tokens that `top_k`, `top_p` and `min_p` leave.

    Its log-probabilities are then those that its tokens were drawn with, so that k1 is unbiased again, for the KL of
    the policy as it is sampled, and its gradient in the reward is that of this KL: `tests/test_as_sampled.py`
    enumerates it. Call it before the callbacks, which otherwise warn. It costs a pass through the LM head, as the
    exact KL does. The tokens that are left are found anew from the scored logits, in the order top-k, top-p, min-p;
    `kl/sampler_k1_per_token` says whether the engine left the same. The reference stays whole. Estimates of the whole
    vocabulary stay those of all tokens, and warn.

    Raises:
        `ValueError`: for `GRPOTrainer`, and for an option that does something else, such as `repetition_penalty`.
    """
    seam, changes = seam_of(trainer), changes_of_sampling(trainer)
    changes.pop("temperature", None)  # by which TRL divides before this sees them
    if not hasattr(seam, "score_as_sampled"):
        raise ValueError("score_as_sampled is RLOO's: leave it out with GRPOTrainer, or sample without truncation")
    if others := {name: value for name, value in changes.items() if name not in WARPERS}:
        words = ", ".join(f"{name}={value}" for name, value in others.items())
        raise ValueError(f"score_as_sampled knows top_k, top_p and min_p, got {words}: leave that out")
    if changes:
        config = GenerationConfig(**changes)
        seam.score_as_sampled(lambda logits: truncated(logits, config))
