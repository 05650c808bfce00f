"""A decoder-only transformer of transformers as plain tensors, its weights laid out once.

A decode step is a few matrix products on projections that read the same input side by side, and one attention over
the cache of `attention.py`. LoRA is folded into copies of the weights, never in place: the base is the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..kl import distinct_prompts
from . import packed
from .attention import Rows, attend_prompt
from .known import unknown_part


class Unsupported(ValueError):
    """Why a call goes to the model's own `generate`."""


class Linear:
    """A projection, or several side by side: (Out, In) weight and (Out,) bias, laid out for products of few rows.

    On a CPU the weight is packed once, as oneDNN wants it; a plain product packs it at every call, which costs two to
    four times as much as the product of a decode step itself. `dtype` is that of the product, as under autocast.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None):
        self.dtype = dtype or weight.dtype
        weight = weight.to(self.dtype)
        self.packed = packed.can_pack(weight)
        if self.packed:
            self.weight = packed.pack(weight)
        else:
            self.weight = weight.detach().t().contiguous()  # (In, Out): a product of few rows reads it in order
        self.bias = None if bias is None else bias.detach().to(self.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        if self.packed:
            return packed.linear(x, self.weight, self.bias)
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


@dataclass
class Layer:
    norm1: Callable
    qkv: Linear
    out: Linear
    norm2: Callable
    mlp_in: Linear
    mlp_out: Linear
    window: int | None  # tokens that attention sees, itself included


@dataclass
class Decoder:
    """A decoder-only transformer as plain tensors, read from one of transformers' models."""

    embedding: torch.Tensor  # (V, H)
    positions: torch.Tensor | None  # (P, H), learned; None with rotary positions
    rotary: Callable | None
    layers: list[Layer]
    norm: Callable
    head: Linear  # to V logits
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    activation: Callable
    gated: bool

    def start(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int) -> torch.Tensor:
        """Prompts, (B, P), left-padded, of rows of `length` tokens -> (B, V) logits after them.

        Each distinct prompt is computed once, and from [`~kl_alliteration.sampling.attention.SPLIT_FROM`] columns on
        its keys and values are held once.
        """
        row, first = distinct_prompts(input_ids, attention_mask)
        self.rows, self.cache = Rows(attention_mask[first], length), []
        self.angles = None if self.rotary is None else self._signed_angles()
        logits = self._step(input_ids[first], 0)[row]
        self.rows.share(row)
        for cache in self.cache:
            cache.share(row, self.rows, length)
        self._pick_angles(row)
        self.filled = input_ids.shape[1]
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) tokens that follow those seen so far -> (B, V) logits after them."""
        self.filled += 1
        return self._step(tokens[:, None], self.filled - 1)

    def _step(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        batch, length = ids.shape
        last = first + length
        x = self.embedding[ids]  # (B, T, H)
        if self.positions is not None:
            x = x + self.positions[self.rows.places[:, first:last]]
        x = x.view(batch * length, -1)
        angles = None if self.angles is None else tuple(a[:, None, first:last] for a in self.angles)
        heads, kv_heads, scale = self.heads, self.kv_heads, self.scale
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norm1(x)).view(batch, length, -1, self.head_dim).transpose(1, 2)
            qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
            q, k = (qk if angles is None else _rotate(qk, *angles)).split([heads, kv_heads], dim=1)
            if first == 0:
                y, cache = attend_prompt(q, k, v, self.rows, layer.window, scale)
                self.cache.append(cache)
            else:
                y = self.cache[number].attend(q, k, v, self.rows, last, layer.window, scale)
            x = x + layer.out(y)
            h = layer.mlp_in(layer.norm2(x))
            if self.gated:
                gate, up = h.chunk(2, dim=-1)
                h = self.activation(gate) * up
            else:
                h = self.activation(h)
            x = x + layer.mlp_out(h)
        return self.head(self.norm(x.view(batch, length, -1)[:, -1])).float()

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, (B,) booleans, and drop the others."""
        self.rows.keep(rows)
        for cache in self.cache:
            cache.keep(rows)
        self._pick_angles(rows)

    def _signed_angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, (U or 1, L, D), the sine of the first half negative: see `_rotate`."""
        cos, sin = self.rotary(self.embedding, self.rows.places)
        left, right = sin.chunk(2, dim=-1)
        return cos, torch.cat((-left, right), dim=-1)

    def _pick_angles(self, rows: torch.Tensor) -> None:
        if self.angles is not None and self.rows.padded:
            self.angles = tuple(a[rows] for a in self.angles)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs of (B, H, T, D), half of D apart, by their angles; `sin` carries the signs."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _effective(module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(Out, In) weight and bias of a linear module, an active LoRA folded into a copy."""
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if type(base) not in (torch.nn.Linear, Conv1D):
        raise Unsupported(f"a projection is a {type(base).__name__}")
    weight = base.weight
    if isinstance(module, LoraLayer) and not module.disable_adapters and not module.merged:
        for name in module.active_adapters:
            if name not in module.lora_A:
                continue
            if name in module.lora_variant or module.lora_B[name].bias is not None:
                raise Unsupported("the adapter is a variant of LoRA, such as DoRA")
            weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return (weight.t() if isinstance(base, Conv1D) else weight), base.bias


def _linear(*modules, dtype: torch.dtype | None) -> Linear:
    weights, biases = zip(*(_effective(m) for m in modules), strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    return Linear(torch.cat(weights), bias, dtype)


def _rms_norm(module) -> Callable:
    weight, eps = module.weight, module.variance_epsilon
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def _layer_norm(module) -> Callable:
    return lambda x: F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def _from_llama(model, linear: Callable) -> Decoder:
    config, backbone = model.config, model.model
    layers = []
    for layer in backbone.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            Layer(
                norm1=_rms_norm(layer.input_layernorm),
                qkv=linear(attention.q_proj, attention.k_proj, attention.v_proj),
                out=linear(attention.o_proj),
                norm2=_rms_norm(layer.post_attention_layernorm),
                mlp_in=linear(mlp.gate_proj, mlp.up_proj),
                mlp_out=linear(mlp.down_proj),
                window=getattr(attention, "sliding_window", None),
            )
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Decoder(
        embedding=backbone.embed_tokens.weight,
        positions=None,
        rotary=backbone.rotary_emb,
        layers=layers,
        norm=_rms_norm(backbone.norm),
        head=linear(model.get_output_embeddings()),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        activation=ACT2FN[config.hidden_act],
        gated=True,
    )


def _from_gpt(model, layers: list[Layer], linear, heads: int, hidden_size: int, scale: float, activation) -> Decoder:
    backbone = model.transformer
    return Decoder(
        embedding=backbone.wte.weight,
        positions=backbone.wpe.weight,
        rotary=None,
        layers=layers,
        norm=_layer_norm(backbone.ln_f),
        head=linear(model.get_output_embeddings()),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden_size // heads,
        scale=scale,
        activation=ACT2FN[activation],
        gated=False,
    )


def _from_gpt2(model, linear: Callable) -> Decoder:
    config = model.config
    if config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn or not config.scale_attn_weights:
        raise Unsupported("GPT-2 with another scaling of attention")
    layers = [
        Layer(
            norm1=_layer_norm(block.ln_1),
            qkv=linear(block.attn.c_attn),
            out=linear(block.attn.c_proj),
            norm2=_layer_norm(block.ln_2),
            mlp_in=linear(block.mlp.c_fc),
            mlp_out=linear(block.mlp.c_proj),
            window=None,
        )
        for block in model.transformer.h
    ]
    scale = (config.n_embd // config.n_head) ** -0.5
    return _from_gpt(model, layers, linear, config.n_head, config.n_embd, scale, config.activation_function)


def _from_gpt_neo(model, linear: Callable) -> Decoder:
    config = model.config
    layers = []
    for block, kind in zip(model.transformer.h, config.attention_layers, strict=True):
        attention = block.attn.attention
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        layers.append(
            Layer(
                norm1=_layer_norm(block.ln_1),
                qkv=linear(*projections),
                out=linear(attention.out_proj),
                norm2=_layer_norm(block.ln_2),
                mlp_in=linear(block.mlp.c_fc),
                mlp_out=linear(block.mlp.c_proj),
                window=config.window_size if kind == "local" else None,
            )
        )
    # GPT-Neo does not scale its attention.
    return _from_gpt(model, layers, linear, config.num_heads, config.hidden_size, 1.0, config.activation_function)


READERS = {
    "LlamaForCausalLM": _from_llama,
    "Qwen2ForCausalLM": _from_llama,
    "GPT2LMHeadModel": _from_gpt2,
    "GPTNeoForCausalLM": _from_gpt_neo,
}


def read_decoder(model, dtype: torch.dtype | None = None) -> Decoder:
    """Plain tensors of a model, LoRA folded in. Raises `Unsupported` with the reason.

    `dtype`: of products and cache, where that is not the weights' (mixed precision).
    """
    if unknown := unknown_part(model):
        raise Unsupported(unknown)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return READERS[type(model).__name__](model, partial(_linear, dtype=dtype))
