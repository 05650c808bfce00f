"""What the decoder knows by name. It computes no module that is not here, so the model's own `generate` has to."""

import torch
from peft import LoraModel, PeftModel, PeftModelForCausalLM
from peft.tuners.lora import Linear as LoraLinear
from transformers.pytorch_utils import Conv1D

from .._trl import rotary_by_length

SHARED = {torch.nn.Embedding, torch.nn.Linear, torch.nn.ModuleList, torch.nn.LayerNorm, torch.nn.Dropout, Conv1D}
LORA = {PeftModel, PeftModelForCausalLM, LoraModel, LoraLinear, torch.nn.ModuleDict, torch.nn.ParameterDict}
LORA |= {torch.nn.Identity}
OF_FAMILY = {
    "LlamaForCausalLM": "Llama",
    "Qwen2ForCausalLM": "Qwen2",
    "GPT2LMHeadModel": "GPT2",
    "GPTNeoForCausalLM": "GPTNeo",
}
PARTS = (  # of a family's modeling file, behind the family's name
    "ForCausalLM", "LMHeadModel", "Model", "DecoderLayer", "Block", "Attention", "SelfAttention", "MLP", "RMSNorm",
    "RotaryEmbedding",
)  # fmt: skip
ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


def unknown_part(model) -> str | None:
    """The first module of a model, base or `PeftModel`, that the decoder does not know; `None` where it knows all."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    family = OF_FAMILY.get(type(base).__name__)
    if family is None:
        return f"{type(base).__name__} is none of {', '.join(OF_FAMILY)}"
    home = type(base).__module__
    if not home.startswith("transformers.models."):
        return f"{type(base).__name__} is of {home}, not of transformers"
    names = {f"{family}{part}" for part in PARTS}
    for path, module in model.named_modules():
        kind = type(module)
        known = kind in SHARED or kind in LORA or kind.__module__ in ACTIVATIONS
        if not known and not (kind.__module__ == home and kind.__name__ in names):
            # PEFT's containers of what LoRA does not use are there, and empty.
            if kind.__module__.startswith("peft.") and not any(True for _ in module.parameters()):
                continue
            return f"{path or 'the model'} is a {kind.__name__}"
    rope = rotary_by_length(base.config)
    return rope and f"rotary positions of type {rope!r}"
