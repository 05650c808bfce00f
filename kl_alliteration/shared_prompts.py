"""A group's prompt is computed once: `share_prompts(trainer)`."""

from ._trl import seam_of


def share_prompts(trainer) -> None:
    """Let a stock trainer's models compute each distinct prompt of a scoring call once, not once per completion.

    RLOO and GRPO sample a group of completions for one prompt. TRL computes that prompt for each of them: when policy
    and reference score, and in the loss and its backward pass. From here on a call computes its distinct prompts, and
    the completions go on from their keys and values. The LM head is applied to the tokens that are counted, and to no
    prompt or padding. Log-probabilities, losses and gradients are the same to rounding. Prompts may be of different
    lengths, and a micro-batch may cut through groups.

    The first batch, the first that is padded and the first with gradients prove it: four rows are computed both ways.
    Where they differ, prompts are computed once per completion, and the log says why, in one line. So it is with
    dropout, sharded weights (FSDP, ZeRO-3), images, and models whose cache does not hold all of a prompt; and, in the
    loss, with gradient checkpointing. Sampling shares prompts by [`use_fast_sampling`].
    """
    seam_of(trainer).scorer.share_prompts()
