"""A model's way from its last hidden states to log-probabilities: a linear head, or whatever the model itself does."""

import warnings
from dataclasses import replace

import torch
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .. import kl

PROBE = 16  # positions


class OwnHead:
    """The model's own code behind its backbone, for heads that are more than linear; as [`~kl.LMHead`] is called.

    The model's `forward` runs with a backbone that hands out the given states. `output` is one of the backbone's.
    """

    def __init__(self, model, output, temperature: float):
        self.model, self.kind, self.temperature = model, type(output), temperature
        self.vocab_size = model.config.get_text_config().vocab_size

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, V) log-probabilities, in float32 or better."""
        backbone, states = self.model.base_model, hidden.unsqueeze(1).to(self.model.device)
        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        forward, backbone.forward = backbone.forward, lambda *args, **kwargs: self.kind(last_hidden_state=states)
        try:
            logits = self.model(input_ids=ids).logits[:, -1]
        finally:
            backbone.forward = forward
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(logits / self.temperature, dim=-1)


def linear_head(model, temperature: float) -> kl.LMHead:
    """Of a head that ZeRO-3 shards a whole copy, without a gradient."""
    with maybe_gather_lm_head_ctx(*model.get_output_embeddings().parameters()):
        return kl.LMHead.of(model, temperature)


def beside(head: kl.LMHead | OwnHead, states: torch.Tensor) -> kl.LMHead | OwnHead:
    """The head of a model that may be elsewhere, on the device of its states."""
    if isinstance(head, OwnHead) or head.weight.device == states.device:
        return head
    bias = None if head.bias is None else head.bias.to(states.device)
    return replace(head, weight=head.weight.to(states.device), bias=bias)


@torch.no_grad()
def choose_head(model, temperature: float):
    """`linear_head`, or `OwnHead` where the model's logits are not those of a linear head; held against the logits.

    Returns:
        A function of the model and the temperature. Where a model cannot be asked with token ids alone, `linear_head`.

    Raises:
        `ValueError`: where neither gives the model's logits.
    """
    kept, training = [], model.training
    hook = model.base_model.register_forward_hook(lambda module, args, output: kept.append(output))
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.linspace(0, vocab_size - 1, PROBE, device=model.device).long().unsqueeze(0)
    model.eval()
    try:
        logits = model(input_ids=ids).logits[0]
        (output,) = kept
        states = output.last_hidden_state[0]
    except Exception:
        return linear_head
    finally:
        model.train(training)
        hook.remove()
    expected = (logits.float() / temperature).log_softmax(-1)

    def apart(head) -> float:
        return (head.log_probs(states).to(expected) - expected).abs().mean().item()

    if (off := apart(linear_head(model, temperature))) <= kl.rounding(model.dtype):
        return linear_head
    name = type(model).__name__
    warnings.warn(
        f"{name} turns hidden states into logits by more than a linear head. The KL is computed by the model's own "
        f"code; TRL's log-probabilities, with which it trains, are {off:.2g} nats off, averaged over the vocabulary.",
        kl.KLWarning,
        stacklevel=2,
    )
    backbone = set(model.base_model.modules())
    if any(hasattr(module, "base_layer") for module in model.modules() if module not in backbone):
        raise ValueError(
            f"an adapter is on the head of {name}, which the KL would see in policy and reference alike: leave what "
            "is not in its backbone out of lora_target_modules"
        )
    own = OwnHead(model, output, temperature)
    model.eval()
    try:
        if apart(own) <= kl.rounding(model.dtype):
            return lambda model, temperature: OwnHead(model, output, temperature)
    except Exception as error:
        off = f"{type(error).__name__}: {error}"
    finally:
        model.train(training)
    raise ValueError(f"no KL can be computed for {name}: its logits do not come from its last hidden states ({off})")
