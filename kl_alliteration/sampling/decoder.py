"""A decoder-only transformer of transformers as plain tensors: weights laid out once, a cache of fixed size.

A decode step is a few matrix products on projections that read the same input side by side, and one attention over
the cache. LoRA is folded into copies of the weights, never in place: the base is the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from . import packed
from .known import unknown_part


class Unsupported(ValueError):
    """Why a call goes to the model's own `generate`."""


class Linear:
    """A projection, or several side by side: (Out, In) weight and (Out,) bias, laid out for products of few rows.

    On a CPU in float32 the weight is packed once, as oneDNN wants it; a plain product packs it at every call, which
    costs two to four times as much as the product of a decode step itself.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.packed = packed.can_pack(weight)
        if self.packed:
            self.weight = packed.pack(weight)
        else:
            self.weight = weight.detach().t().contiguous()  # (In, Out): a product of few rows reads it in order
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
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

    def start(self, attention_mask: torch.Tensor, length: int) -> None:
        """Empty caches for B rows of `length` tokens; `attention_mask` (B, P) is the prompt's, left-padded."""
        batch, prompt = attention_mask.shape
        shape = batch, self.kv_heads, length, self.head_dim
        like = self.embedding
        self.cache = [(like.new_empty(shape), like.new_empty(shape)) for _ in self.layers]
        # Left padding: the first real position of each row, and how far its positions lag behind.
        self.padding = prompt - attention_mask.sum(-1)  # (B,)
        self.padded = bool(self.padding.any())
        places = torch.arange(length, device=like.device)
        self.places = (places - self.padding[:, None]).clamp(min=0) if self.padded else places[None]  # (B or 1, L)
        self.real = places >= self.padding[:, None]  # (B, L)
        self.angles = None if self.rotary is None else self.rotary(like, self.places)  # cos, sin: (B or 1, L, D)
        self.filled = 0

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens that follow those seen so far -> (B, V) logits after the last of them."""
        batch, length = ids.shape
        first, last = self.filled, self.filled + length
        x = self.embedding[ids]  # (B, T, H)
        if self.positions is not None:
            x = x + self.positions[self.places[:, first:last]]
        x = x.view(batch * length, -1)
        cos = sin = None
        if self.angles is not None:
            cos, sin = (a[:, None, first:last] for a in self.angles)  # (B or 1, 1, T, D)
        masks: dict = {}
        heads, kv_heads = self.heads, self.kv_heads
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            qkv = layer.qkv(layer.norm1(x)).view(batch, length, -1, self.head_dim).transpose(1, 2)
            qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
            if cos is not None:
                qk = _rotate(qk, cos, sin)
            q, k = qk.split([heads, kv_heads], dim=1)
            keys[:, :, first:last] = k
            values[:, :, first:last] = v
            # One token sees the end of the cache that its window covers; more than one need a mask.
            begin = max(0, last - layer.window) if layer.window and length == 1 else 0
            if (layer.window, begin) not in masks:
                masks[layer.window, begin] = self._mask(first, last, begin, layer.window)
            y = F.scaled_dot_product_attention(
                q,
                keys[:, :, begin:last],
                values[:, :, begin:last],
                attn_mask=masks[layer.window, begin],
                scale=self.scale,
                enable_gqa=kv_heads != heads,
            )
            x = x + layer.out(y.transpose(1, 2).reshape(batch * length, -1))
            h = layer.mlp_in(layer.norm2(x))
            if self.gated:
                gate, up = h.chunk(2, dim=-1)
                h = self.activation(gate) * up
            else:
                h = self.activation(h)
            x = x + layer.mlp_out(h)
        self.filled = last
        return self.head(self.norm(x.view(batch, length, -1)[:, -1])).float()

    def _mask(self, first: int, last: int, begin: int, window: int | None) -> torch.Tensor | None:
        """(B or 1, 1, T, last - begin), True where a token may look; None where it may look everywhere."""
        if last - first == 1:
            return self.real[:, None, None, begin:last] if self.padded else None
        places = torch.arange(last, device=self.real.device)
        query, key = places[first:, None], places[None, :]
        seen = (key <= query) & (key > query - (window or last))
        # A padded query may look at itself, so that its row of the softmax is not empty; nobody looks at it.
        return (seen & (self.real[:, None, None, :last] | (key == query)))[:, :, :, begin:]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch and drop the others."""
        self.cache = [(keys[rows], values[rows]) for keys, values in self.cache]
        self.real = self.real[rows]
        if self.padded:
            self.places = self.places[rows]
            if self.angles is not None:
                self.angles = tuple(a[rows] for a in self.angles)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


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


def _linear(*modules) -> Linear:
    weights, biases = zip(*(_effective(m) for m in modules), strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    return Linear(torch.cat(weights), bias)


def _rms_norm(module) -> Callable:
    weight, eps = module.weight, module.variance_epsilon

    def norm(x: torch.Tensor) -> torch.Tensor:
        return weight * F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype)

    return norm


def _layer_norm(module) -> Callable:
    return lambda x: F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def _from_llama(model) -> Decoder:
    config, backbone = model.config, model.model
    layers = []
    for layer in backbone.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            Layer(
                norm1=_rms_norm(layer.input_layernorm),
                qkv=_linear(attention.q_proj, attention.k_proj, attention.v_proj),
                out=_linear(attention.o_proj),
                norm2=_rms_norm(layer.post_attention_layernorm),
                mlp_in=_linear(mlp.gate_proj, mlp.up_proj),
                mlp_out=_linear(mlp.down_proj),
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
        head=_linear(model.get_output_embeddings()),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        activation=ACT2FN[config.hidden_act],
        gated=True,
    )


def _from_gpt(model, layers: list[Layer], heads: int, hidden_size: int, scale: float, activation: str) -> Decoder:
    backbone = model.transformer
    return Decoder(
        embedding=backbone.wte.weight,
        positions=backbone.wpe.weight,
        rotary=None,
        layers=layers,
        norm=_layer_norm(backbone.ln_f),
        head=_linear(model.get_output_embeddings()),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden_size // heads,
        scale=scale,
        activation=ACT2FN[activation],
        gated=False,
    )


def _from_gpt2(model) -> Decoder:
    config = model.config
    if config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn or not config.scale_attn_weights:
        raise Unsupported("GPT-2 with another scaling of attention")
    layers = [
        Layer(
            norm1=_layer_norm(block.ln_1),
            qkv=_linear(block.attn.c_attn),
            out=_linear(block.attn.c_proj),
            norm2=_layer_norm(block.ln_2),
            mlp_in=_linear(block.mlp.c_fc),
            mlp_out=_linear(block.mlp.c_proj),
            window=None,
        )
        for block in model.transformer.h
    ]
    scale = (config.n_embd // config.n_head) ** -0.5
    return _from_gpt(model, layers, config.n_head, config.n_embd, scale, config.activation_function)


def _from_gpt_neo(model) -> Decoder:
    config = model.config
    layers = []
    for block, kind in zip(model.transformer.h, config.attention_layers, strict=True):
        attention = block.attn.attention
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        layers.append(
            Layer(
                norm1=_layer_norm(block.ln_1),
                qkv=_linear(*projections),
                out=_linear(attention.out_proj),
                norm2=_layer_norm(block.ln_2),
                mlp_in=_linear(block.mlp.c_fc),
                mlp_out=_linear(block.mlp.c_proj),
                window=config.window_size if kind == "local" else None,
            )
        )
    # GPT-Neo does not scale its attention.
    return _from_gpt(model, layers, config.num_heads, config.hidden_size, 1.0, config.activation_function)


READERS = {
    "LlamaForCausalLM": _from_llama,
    "Qwen2ForCausalLM": _from_llama,
    "GPT2LMHeadModel": _from_gpt2,
    "GPTNeoForCausalLM": _from_gpt_neo,
}


def read_decoder(model) -> Decoder:
    """Plain tensors of a model, LoRA folded in. Raises `Unsupported` with the reason."""
    if unknown := unknown_part(model):
        raise Unsupported(unknown)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return READERS[type(model).__name__](model)
