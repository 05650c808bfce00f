"""Whether what TRL scores is the policy that sampled: asked of a few completions, at first and of padded ones."""

import warnings

import torch

from .. import kl

TOKENS = 32  # of a completion


def is_due(scorer, attention_mask: torch.Tensor, length: int) -> bool:
    """Whether a batch is the first with padding before a counted prompt on any process, or the first with none at all.

    From then on it is not. (B, P + T) mask, T = `length`.
    """
    if True in scorer.checked:
        return False
    counted = attention_mask[:, -length:].any(1)
    seen = torch.stack([counted.any(), (counted & (attention_mask[:, :-length] == 0).any(1)).any()])
    any_counts, any_is_padded = scorer.trainer.accelerator.gather(seen[None]).any(0).tolist()
    if not any_counts or any_is_padded in scorer.checked:
        return False
    scorer.checked.add(any_is_padded)
    return True


def rows_to_ask(attention_mask: torch.Tensor, prompt: int) -> torch.Tensor:
    """Two rows of (B, P + T), with counted tokens where there are: those with the most and the least padding."""
    counted = attention_mask[:, prompt : prompt + TOKENS].any(1)
    order = (((attention_mask[:, :prompt] == 0).sum(1) + 1) * counted).argsort(descending=True)
    return order[[0, max(int(counted.sum()) - 1, 0)]]


@torch.no_grad()
def say_what_differs(scorer, model, scored, input_ids, attention_mask, temperature: float) -> bool:
    """Warn where TRL's log-probabilities are not the model's own, with the reason and the number of nats.

    Args:
        scored (`torch.Tensor`): (B, T), what `scorer` found for the whole batch.

    Returns:
        `bool`: False where all it takes to put it right are the positions that `generate` counts. On every process the
        same, whichever saw it.
    """
    accelerator, length = scorer.trainer.accelerator, min(scored.shape[1], TOKENS)
    inner, prompt = accelerator.unwrap_model(model), input_ids.shape[1] - scored.shape[1]
    rows = rows_to_ask(attention_mask, prompt)
    ids, mask = input_ids[rows, : prompt + length], attention_mask[rows, : prompt + length]
    computed_in = kl.autocast_dtype(accelerator) or inner.dtype
    counted, training, found = mask[:, prompt:], inner.training, scored[rows, :length]

    def differs(some, other) -> float:
        off = torch.tensor([kl.mean_difference(some, other, counted)], device=ids.device)
        off = accelerator.gather(off).max().item()
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
