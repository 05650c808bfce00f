"""Every causal language model that the installed transformers registers, built tiny: nothing here is a list of them.

A configuration is shrunk field by field, by what its name says that it measures (`SIZES`). Of its layers one of each
kind is kept. `HINTS` is for what no name says. A family that cannot be built this way is `NotBuilt`, with the reason.
"""

import copy
import dataclasses
import re

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VOCAB, EOS, PAD, BOS = 96, 0, 1, 2
MOST_PARAMETERS = 2_000_000  # of a family that counts as tiny
SIZES = {  # a field whose whole name fits a pattern, the first that does, becomes this where it is larger
    r".*vocab.*size.*|.*group_vocab|num_centroids": VOCAB,
    r"codebook_size": 64,
    r".*num_position_embeddings": 16,
    r".*(position(s|_embeddings)|seq_len|context_length|model_max_length|n_ctx|rel_extent)": 128,
    r".*(intermediate|ffn|feed_forward|mlp_dim).*|dim_ff|dff|d_inner|n_inner|d_ff": 48,
    r".*(key_value|kv)_.*heads|kv_n_heads|linear_num_key_heads|num_query_groups": 2,
    r".*(num|n)_heads?|.*num_.*heads|.*attention_heads|.*_n_heads": 4,
    r"qk_rope_head_dim|rotary_dim": 4,
    r".*(head_?dim|dim_head|d_head|head_size|kv_channels|pre_attn_scalar|d_kv|d_rel)": 8,
    r".*(state_size|d_state|_rank|lowrank|chunk_size|chunk_length|block_size|mem_len)": 8,
    r".*(hidden_layers|(num|encoder|decoder|n)_layers?|num_blocks|depth|layers_per_stack)": 2,
    r".*(experts|expert_num)": 4,
    r".*(per_tok|per_token|topk|top_k|moe_k)": 2,
    r".*(n_groups?|ngroups|topk_group|expert_group|o_groups|first_k_dense_replace|num_dense_layers)": 1,
    r".*(sliding_window|window_size|window_len|local_attention).*": 8,
    r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|embedding_dim|emb_dim|d_ssm|projector_.*dim).*": 32,
    r".*(_dim|_size|_width|_channels?|_filters|_features?)": 32,
}
KEEP = (
    r"image_size|patch_size|.*patch_size|num_channels|in_channels|.*kernel_size|conv1d_width|.*merge_size|ngram_size"
)
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
SHARED_KV = {"num_hidden_layers": 4, "layer_types": SLIDING_AND_FULL * 2, "num_kv_shared_layers": 2}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HINTS: dict[str, dict] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": EXPERTS | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
        "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "gemma3n_text": SHARED_KV | {"intermediate_size": 48, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    "gemma4_text": SHARED_KV,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"dim_model_base": 16},
    "ministral": {"head_dim": 8, "layer_types": SLIDING_AND_FULL},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 16},
}  # fmt: skip


class NotBuilt(Exception):
    """Why a family is not among those that are tried."""


def tiny(name: str, value: int) -> int:
    """What a size becomes, by its name."""
    if re.fullmatch(KEEP, name):
        return value
    return next((min(value, size) for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), value)


def pick_layers(per_layer: dict[str, list], count: int) -> list[int]:
    """Layers that have between them every kind that there is, two at least."""
    seen, picked = set(), []
    for i in range(count):
        kinds = {(name, repr(kinds[i])) for name, kinds in per_layer.items()}
        if not kinds <= seen:
            picked.append(i)
            seen |= kinds
    return picked if len(picked) > 1 else list(range(min(2, count)))


def shrink(default: PreTrainedConfig) -> dict:
    """Arguments that make a tiny one of a family's default configuration."""
    fields = {field.name: field.default for field in dataclasses.fields(default)}
    stored = {default.attribute_map.get(name, name): name for name in fields}
    values = {stored[name]: value for name, value in vars(default).items() if name in stored}
    count = default.num_hidden_layers if isinstance(getattr(default, "num_hidden_layers", None), int) else 0
    found: dict = {}
    per_layer, places = {}, {}
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and count and value:
            if all(type(v) is int for v in value) and list(value) == sorted(set(value)) and value[-1] < count:
                places[name] = list(value)
            elif len(value) == count:
                per_layer[name] = list(value)
    layers = pick_layers(per_layer | {n: [i in p for i in range(count)] for n, p in places.items()}, count)
    for name, value in values.items():
        if name in per_layer:
            value = [per_layer[name][i] for i in layers]
            found[name] = [tiny(name, v) if type(v) is int else v for v in value]
        elif name in places:
            found[name] = [new for new, old in enumerate(layers) if old in places[name]]
        elif isinstance(value, PreTrainedConfig):
            found[name] = shrink(value) | HINTS.get(value.model_type, {}) | {"model_type": value.model_type}
        elif "key_value_heads" in name and value == values.get("num_attention_heads"):
            found[name] = tiny("num_attention_heads", value)
        elif name == "num_hidden_layers" and layers:
            found[name] = len(layers)
        elif type(value) is int and name.endswith(("token_id", "token_index")):
            found[name] = min(value, VOCAB - 1)
        elif type(value) is int and fields.get(name) is not None:
            found[name] = tiny(name, value)
        elif type(value) is float and ("drop" in name or "jitter" in name):
            found[name] = 0.0
    ends = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": BOS}
    return found | ends | ({"is_decoder": True} if "is_decoder" in fields else {})


def configuration(family: str, **options) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[family]
    return config_class(**shrink(config_class()) | HINTS.get(family, {}) | options)


def model_class(family: str):
    """The class that the registry names, of several the one for text."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def build(family: str, **options):
    """A random model of the family, in float32, whose distributions are not flat.

    Raises:
        `NotBuilt`: with the reason.
    """
    kind = model_class(family)
    try:
        config = configuration(family, **options)
        if not isinstance(config, kind.config_class):  # it is one part of what the configuration describes
            config = config.get_text_config(decoder=True)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
        if parameters > MOST_PARAMETERS:
            raise NotBuilt(f"{parameters / 1e6:.0f} million parameters after shrinking")
        set_seed(0)
        model = kind(config).float()
    except (Exception, SystemExit) as error:
        raise error if isinstance(error, NotBuilt) else NotBuilt(in_a_line(error)) from error
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * (0.2 if name.endswith("bias") else 0.05))
    return model


def move(model, scale: float = 0.3) -> None:
    """What trains of a policy away from its reference."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                spread = parameter.float().std().item() if parameter.numel() > 1 else 0.1
                noise = torch.randn(parameter.shape, generator=generator) * scale * max(spread, 0.05)
                parameter.add_(noise.to(parameter.dtype))


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
