"""Whether what TRL scores is the policy that sampled: asked once, of a few completions of the first batch."""

import warnings

import torch

from .. import kl

ROWS, TOKENS = 2, 32


@torch.no_grad()
def say_what_differs(scorer, model, scored, input_ids, attention_mask, temperature: float) -> bool:
    """Warn where TRL's log-probabilities are not the model's own, with the reason and the number of nats.

    Args:
        scored (`torch.Tensor`): (B, T), what `scorer` found for the whole batch.

    Returns:
        `bool`: False where all it takes to put it right are the positions that `generate` counts.
    """
    inner, length = scorer.trainer.accelerator.unwrap_model(model), min(scored.shape[1], TOKENS)
    prompt = input_ids.shape[1] - scored.shape[1]
    ids, mask = input_ids[:ROWS, : prompt + length], attention_mask[:ROWS, : prompt + length]
    computed_in = kl.autocast_dtype(scorer.trainer.accelerator) or inner.dtype
    counted, training, found = mask[:, prompt:], inner.training, scored[:ROWS, :length]

    def differs(some, other) -> float:
        off = kl.mean_difference(some, other, counted)
        return off if off > kl.rounding(computed_in) else 0.0

    inner.eval()
    try:
        expected = kl.model_logps(model, ids, mask, length, temperature)
        if not differs(found, expected):
            return True
        calm = scorer.score(model, ids, mask, length).logps
        if off := differs(found, calm):
            _warn(
                f"dropout is on while completions are scored: it moves log-probabilities by {off:.2g} nats per token, "
                "which every KL takes for distance to the reference. Set disable_dropout=True, and dropout to 0 in "
                "the model's configuration where that is not enough"
            )
        if not (off := differs(calm, expected)):
            return True
        placeless = not differs(calm, kl.model_logps(model, ids, mask, length, temperature, positions=False))
        name = type(inner.get_base_model() if hasattr(inner, "get_base_model") else inner).__name__
        if placeless:
            _warn(
                f"padding moves the positions of {name}: TRL scores left-padded prompts without position_ids, "
                f"{off:.2g} nats per token off the policy that sampled them. They are scored with them from here on"
            )
        else:
            _warn(
                f"TRL's log-probabilities are {off:.2g} nats per token off the logits of {name}: it trains another "
                "policy than the one that samples, and every KL is of that one"
            )
        return not placeless
    finally:
        inner.train(training)


def _warn(words: str) -> None:
    warnings.warn(f"{words}.", kl.KLWarning, stacklevel=2)
