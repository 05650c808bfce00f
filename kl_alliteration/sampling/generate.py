"""Sampling without the overhead of a module tree.

With a small model most of a decode step is Python: modules, hooks, cache objects, logits processors, a draw of V
exponentials a row. Here a decode step is that of `decoder.py` and one uniform number a row, turned into a token
by the inverse of the cumulative distribution. The distribution that is sampled is that of transformers' `generate`.

What is not supported goes to the model's own `generate`, and the log says why, once.
"""

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import GenerationConfig
from transformers.utils import logging

from .. import kl
from ..sampling_options import beyond_warpers, merged
from .decoder import Decoder, Unsupported, read_decoder

logger = logging.get_logger(__name__)

# Rows that have ended are computed along until only this share is left; dropping them copies the cache.
DROP_AT = 0.75
CHECKED = 4  # rows of the first batch that are held against the model
BLOCK = 64  # tokens whose probabilities are summed first when one is drawn


def check_options(config: GenerationConfig, others: dict) -> None:
    """`Unsupported` for what this module does not sample; `config` is what `generate` would sample by."""
    if beyond := beyond_warpers(config):
        raise Unsupported(", ".join(f"{name}={value!r}" for name, value in beyond.items()))
    if others := {name: value for name, value in others.items() if value is not None}:
        raise Unsupported(f"arguments {', '.join(others)}")
    if config.max_new_tokens is None:
        raise Unsupported("max_new_tokens is not given")


def probabilities(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """(B, V) logits -> (B, V) probabilities, warped by temperature, top-k, top-p and min-p, in this order."""
    if config.temperature not in (None, 1.0):
        logits = logits / config.temperature
    return truncated(logits, config).softmax(-1)


def truncated(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """(B, V) -> (B, V), -inf outside of what top-k, top-p and min-p leave, in this order.

    Each as in `transformers/generation/logits_process.py`.
    """
    if config.top_k:
        k = min(config.top_k, logits.shape[-1])
        logits = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)
    if config.top_p is not None and config.top_p < 1:
        ordered, places = logits.sort(descending=False)
        gone = ordered.softmax(-1).cumsum(-1) <= 1 - config.top_p
        gone[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(gone).scatter(1, places, gone), -torch.inf)
    if config.min_p:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < config.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits


def draw(
    logits: torch.Tensor, config: GenerationConfig, said: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, V) logits -> (B,) tokens by the inverse of the cumulative distribution, and, if `said`, log-probabilities.

    One uniform number a row. The sums are taken over blocks of the vocabulary and then within one block, which is a
    third of the work.
    """
    if not config.do_sample:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])
    p = whole = probabilities(logits, config)
    if beyond := -p.shape[-1] % BLOCK:
        p = F.pad(p, (0, beyond))
    p = p.view(len(p), -1, BLOCK)
    blocks = p.sum(-1).cumsum(-1)  # (B, V / BLOCK)
    if not blocks[:, -1].isfinite().all():
        raise Unsupported("the logits hold inf or nan")
    # Each search takes the first sum beyond a number in [0, total), so that what it finds has a probability above 0.
    uniform = _below(torch.rand_like(blocks[:, -1:]) * blocks[:, -1:], blocks)
    block = torch.searchsorted(blocks, uniform, right=True)  # (B, 1)
    before = blocks.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0)
    within = p[torch.arange(len(p), device=p.device), block.squeeze(1)].cumsum(-1)  # (B, BLOCK)
    place = torch.searchsorted(within, _below((uniform - before).clamp(min=0), within), right=True)
    tokens = (block * BLOCK + place).squeeze(1)
    if not said:
        return tokens, None
    return tokens, (whole.gather(1, tokens[:, None]).squeeze(1) / blocks[:, -1]).log()


def _below(x: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """`x`, kept below the last of the sums, which rounding might otherwise reach."""
    total = sums[:, -1:]
    return torch.minimum(x, torch.nextafter(total, torch.zeros_like(total)))


@torch.no_grad()
def sample(
    decoder: Decoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    config: GenerationConfig,
    logps: torch.Tensor | None = None,
    drawn_logps: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, P) left-padded prompts -> (B, P + T), up to `max_new_tokens` sampled and padding after an end of text.

    Args:
        logps (`torch.Tensor`, *optional*):
            (R, `max_new_tokens`), filled with the log-probabilities of what the first R rows sampled, before warping.
        drawn_logps (`torch.Tensor`, *optional*): (B, `max_new_tokens`), filled with those of all rows after warping.
    """
    batch, prompt = input_ids.shape
    eos = torch.as_tensor(config.eos_token_id if config.eos_token_id is not None else [], device=input_ids.device)
    ends = eos.view(-1).tolist()
    pad = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]  # as transformers
    out = input_ids.new_full((batch, prompt + config.max_new_tokens), pad)
    out[:, :prompt] = input_ids
    rows = torch.arange(batch, device=input_ids.device)  # that are still computed
    over = torch.zeros_like(rows, dtype=torch.bool)  # and that have ended nevertheless
    logits = decoder.start(input_ids, attention_mask, prompt + config.max_new_tokens)
    for place in range(prompt, prompt + config.max_new_tokens):
        tokens, drawn = draw(logits, config, drawn_logps is not None)
        if drawn_logps is not None:
            drawn_logps[rows, place - prompt] = drawn.to(drawn_logps)
        tokens = tokens.masked_fill(over, pad)
        out[rows, place] = tokens
        if logps is not None:
            few = rows < len(logps)
            sampled = tokens[few].unsqueeze(-1)
            logps[rows[few], place - prompt] = logits[few].log_softmax(-1).gather(-1, sampled).squeeze(-1).to(logps)
        if eos.numel():
            over = over | torch.isin(tokens, eos)
            going = (~over).sum()
            if going == 0:
                return out[:, : place + 1]
            if going <= DROP_AT * len(rows):
                decoder.keep(~over)
                rows, tokens, over = rows[~over], tokens[~over], over[~over]
        if place + 1 < out.shape[1]:
            logits = decoder.step(tokens)
    return out


@torch.no_grad()
def check_decoder(
    model, ids: torch.Tensor, attention_mask: torch.Tensor, eos, logps: torch.Tensor, dtype=None
) -> None:
    """`Unsupported` where the decoder's log-probabilities of what it sampled are not the model's, beyond rounding.

    Args:
        ids (`torch.Tensor`): (B, P + T), prompts and what was sampled; `attention_mask` (B, P) is the prompts'.
        logps (`torch.Tensor`): (R, at least T), of [`sample`].
    """
    few, prompt = len(logps), attention_mask.shape[1]
    ids, length = ids[:few], ids.shape[1] - prompt
    completion = ids[:, prompt:]
    ends = torch.isin(completion, torch.as_tensor([] if eos is None else eos, device=ids.device)).int()
    counted = (ends.cumsum(-1) - ends) == 0  # (R, T), an end of text itself counts
    mask = torch.cat([attention_mask[:few], counted.to(attention_mask)], dim=1)
    training = model.training
    model.eval()
    try:
        expected = kl.model_logps(model, ids, mask, length)
    finally:
        model.train(training)
    apart = kl.mean_difference(logps[:, :length], expected, counted)
    if not apart <= kl.rounding(dtype or model.dtype):
        raise Unsupported(
            f"its log-probabilities of the first batch are {apart:.2g} nats per token off the model's own"
        )


def use_fast_generate(model, sharded: bool = False, dtype: torch.dtype | None = None, keep=None) -> None:
    """Replace `generate` of a model, full or LoRA, by this module's sampling, where that knows how and is right.

    It proves itself on the first batch, and on the first that is padded: where its log-probabilities are not the
    model's own, or where it fails for whatever reason, the old `generate` makes that batch and all others, with one
    line in the log.

    Args:
        sharded (`bool`): No process has the whole weights (FSDP, DeepSpeed): keep the old `generate`, and say so.
        dtype (`torch.dtype`, *optional*): What the model computes in under autocast.
        keep (callable, *optional*): Called with (B, T) log-probabilities of what was sampled, after warping.
    """
    original, said, proven = model.generate, set(), set()
    broken: list[str] = ["the weights are sharded"] if sharded else []  # why it is off for good

    def fast(input_ids, attention_mask, generation_config, others) -> torch.Tensor:
        if broken:
            raise Unsupported(broken[0])
        if input_ids is None or attention_mask is None or generation_config is None:
            raise Unsupported("generate was called without input_ids, attention_mask or generation_config")
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        config = merged(generation_config, base.generation_config)
        check_options(config, others)
        padded, decoder = bool((attention_mask == 0).any()), read_decoder(model, dtype)
        drawn = None if keep is None else torch.zeros(len(input_ids), config.max_new_tokens, device=input_ids.device)
        prove = padded not in proven
        few = min(CHECKED, len(input_ids))
        logps = torch.zeros(few, config.max_new_tokens, device=input_ids.device) if prove else None
        try:
            ids = sample(decoder, input_ids, attention_mask, config, logps, drawn)
            if prove:
                check_decoder(model, ids, attention_mask, config.eos_token_id, logps, dtype)
        except Unsupported as reason:
            if prove:
                broken.append(str(reason))
            raise
        proven.add(padded)
        if keep is not None:
            keep(drawn[:, : ids.shape[1] - input_ids.shape[1]])
        return ids

    def generate(inputs=None, generation_config=None, *rest, input_ids=None, attention_mask=None, **others):
        input_ids = inputs if input_ids is None else input_ids
        try:
            if rest:
                raise Unsupported("generate was called with more than two arguments by position")
            return fast(input_ids, attention_mask, generation_config, others)
        except Unsupported as error:
            reason = str(error)
        except Exception as error:  # not the user's: what is wrong with the call, the old one says itself
            reason = f"{type(error).__name__}: {error}"
            broken.append(reason)
        if reason not in said:
            said.add(reason)
            logger.warning(f"fast sampling is off, transformers' generate takes over: {reason}")
        return original(input_ids, generation_config, *rest, attention_mask=attention_mask, **others)

    model.generate = generate
