"""Sampling without the overhead of a module tree.

With a small model most of a decode step is Python: modules, hooks, cache objects, logits processors, a draw of V
exponentials a row. Here a decode step is that of `decoder.py` and one uniform number a row, turned into a token
by the inverse of the cumulative distribution. The distribution that is sampled is that of transformers' `generate`.

What is not supported goes to the model's own `generate`, and the log says why, once.
"""

import torch
import torch.nn.functional as F
from transformers import GenerationConfig
from transformers.utils import logging

from .decoder import Decoder, Unsupported, read_decoder

logger = logging.get_logger(__name__)

# Generation options with which transformers samples as this module does; any other value goes to `generate`.
PLAIN = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "repetition_penalty": (1.0, None),
    "no_repeat_ngram_size": (0, None),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "typical_p": (1.0, None),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "top_h": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1.0),
    "penalty_alpha": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
    "watermarking_config": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "dola_layers": (None,),
    "constraints": (None,),
    "output_scores": (False, None),
    "output_logits": (False, None),
    "return_dict_in_generate": (False, None),
}


# Rows that have ended are computed along until only this share is left; dropping them copies the cache.
DROP_AT = 0.75
BLOCK = 64  # tokens whose probabilities are summed first when one is drawn


def check_options(config: GenerationConfig, others: dict) -> None:
    """`Unsupported` for what this module does not sample."""
    for name, plain in PLAIN.items():
        if getattr(config, name, None) not in plain:
            raise Unsupported(f"{name}={getattr(config, name)!r}")
    if others := {name: value for name, value in others.items() if value is not None}:
        raise Unsupported(f"arguments {', '.join(others)}")
    if config.max_new_tokens is None:
        raise Unsupported("max_new_tokens is not given")


def probabilities(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """(B, V) logits -> (B, V) probabilities, warped by temperature, top-k, top-p and min-p, in this order.

    Each as in `transformers/generation/logits_process.py`.
    """
    if config.temperature not in (None, 1.0):
        logits = logits / config.temperature
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
    return logits.softmax(-1)


def draw(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """(B, V) logits -> (B,) tokens by the inverse of the cumulative distribution: one uniform number a row.

    The sums are taken over blocks of the vocabulary and then within one block, which is a third of the work.
    """
    if not config.do_sample:
        return logits.argmax(-1)
    p = probabilities(logits, config)
    if beyond := -p.shape[-1] % BLOCK:
        p = F.pad(p, (0, beyond))
    p = p.view(len(p), -1, BLOCK)
    blocks = p.sum(-1).cumsum(-1)  # (B, V / BLOCK)
    # Each search takes the first sum beyond a number in [0, total), so that what it finds has a probability above 0.
    uniform = _below(torch.rand_like(blocks[:, -1:]) * blocks[:, -1:], blocks)
    block = torch.searchsorted(blocks, uniform, right=True)  # (B, 1)
    before = blocks.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0)
    within = p[torch.arange(len(p), device=p.device), block.squeeze(1)].cumsum(-1)  # (B, BLOCK)
    place = torch.searchsorted(within, _below((uniform - before).clamp(min=0), within), right=True)
    return (block * BLOCK + place).squeeze(1)


def _below(x: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """`x`, less than the last of the sums in spite of rounding."""
    total = sums[:, -1:]
    return torch.minimum(x, torch.nextafter(total, torch.zeros_like(total)))


@torch.no_grad()
def sample(
    decoder: Decoder, input_ids: torch.Tensor, attention_mask: torch.Tensor, config: GenerationConfig
) -> torch.Tensor:
    """(B, P) left-padded prompts -> (B, P + T), up to `max_new_tokens` sampled and padding after an end of text."""
    batch, prompt = input_ids.shape
    eos = torch.as_tensor(config.eos_token_id if config.eos_token_id is not None else [], device=input_ids.device)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    out = input_ids.new_full((batch, prompt + config.max_new_tokens), pad)
    out[:, :prompt] = input_ids
    decoder.start(attention_mask, prompt + config.max_new_tokens)
    rows = torch.arange(batch, device=input_ids.device)  # that are still computed
    over = torch.zeros_like(rows, dtype=torch.bool)  # and that have ended nevertheless
    logits = decoder.step(input_ids)
    for place in range(prompt, prompt + config.max_new_tokens):
        tokens = draw(logits, config).masked_fill(over, pad)
        out[rows, place] = tokens
        if eos.numel():
            over = over | torch.isin(tokens, eos)
            going = (~over).sum()
            if going == 0:
                return out[:, : place + 1]
            if going <= DROP_AT * len(rows):
                decoder.keep(~over)
                rows, tokens, over = rows[~over], tokens[~over], over[~over]
        if place + 1 < out.shape[1]:
            logits = decoder.step(tokens[:, None])
    return out


def use_fast_generate(model, sharded: bool = False) -> None:
    """Replace `generate` of a model, full or LoRA, by this module's sampling, where that knows how.

    Args:
        sharded (`bool`): No process has the whole weights (FSDP, DeepSpeed): leave it all to the old one, and say so.
    """
    original, said = model.generate, set()

    def generate(input_ids=None, attention_mask=None, generation_config=None, **others):
        try:
            if sharded:
                raise Unsupported("the weights are sharded")
            if input_ids is None or generation_config is None:
                raise Unsupported("generate was called without input_ids or generation_config")
            check_options(generation_config, others)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return sample(read_decoder(model), input_ids, mask, generation_config)
        except Unsupported as reason:
            if str(reason) not in said:
                said.add(str(reason))
                logger.warning(f"fast sampling is off, transformers' generate takes over: {reason}")
        return original(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config, **others
        )

    model.generate = generate
