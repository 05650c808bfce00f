"""LoRA adapters: their configuration, loading them on the right base, stacking and merging them."""

import json
import warnings
from itertools import pairwise
from pathlib import Path

import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from . import kl
from ._trl import why_off_is_not_the_base
from .story_lm import MODEL_PATH

# What an adapter calls the embedded model: a path would be true on one machine only.
EMBEDDED = "kl_alliteration/story_lm/model"
ORIGIN = "origin.json"  # in a folder made of a GGUF file: the file, and as `hub_id` what that was made of
ADAPTER, REFERENCE = "default", "ref"  # PEFT's name for the one that trains, TRL's for the one it is held to
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of log-probabilities, in nats
STEPS = 4  # in half precision, of the largest log-probability's rounding: a bfloat16 between 16 and 32 is 0.125 wide


def is_adapter(name: str) -> bool:
    """Whether a folder or Hub id holds an adapter, not a whole model."""
    if Path(name).is_dir():
        return Path(name, "adapter_config.json").is_file()
    adapter, whole = (isinstance(try_to_load_from_cache(name, f"{kind}config.json"), str) for kind in ("adapter_", ""))
    try:
        return adapter or file_exists(name, "adapter_config.json")
    except Exception:  # without the Hub what was fetched from it says so
        if not whole:
            raise
        return False


def default_lora_config(**options) -> LoraConfig:
    """LoRA on every linear layer but the head, as PEFT finds them: Llama, Qwen, GPT-2, GPT-Neo and the embedded model.

    Rank 16, alpha 32 as in TRL, without dropout, which would also act in sampling and scoring.

    Args:
        options: PEFT's own for [`~peft.LoraConfig`], such as `use_dora=True` or `use_rslora=True`.
    """
    defaults = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = LoraConfig(**defaults | options)
    check_targets(config.target_modules)
    return config


def check_targets(target_modules) -> None:
    """`ValueError` where the LM head is to be adapted. Trained whole, in `modules_to_save`, it is seen."""
    for name in [target_modules] if isinstance(target_modules, str) else target_modules or []:
        if name.split(".")[-1] in ("lm_head", "embed_out"):
            raise ValueError(
                f"the adapter must not hold {name}: TRL reads the head's weight past the adapter, so it would train "
                "nothing; leave it out, or put it into modules_to_save, which trains all of it"
            )


def check_trains(model: PeftModel) -> None:
    """`ValueError` where no parameter requires a gradient, with the reason."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if any(config.inference_mode for config in model.peft_config.values()):
        raise ValueError(
            "the adapter is frozen, so nothing would train: load it with is_trainable=True, or start a new one"
        )
    raise ValueError("no parameter of the model requires a gradient, so nothing would train")


def read_origin(folder: str | Path) -> dict:
    """What a folder says it was made of; empty for any other."""
    try:
        return json.loads(Path(folder, ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def base_of(config: PeftConfig) -> str:
    """Folder or Hub id of an adapter's base."""
    name = config.base_model_name_or_path
    return str(MODEL_PATH) if name == EMBEDDED else name


def load_adapter(
    name: str,
    base: str | None = None,
    revision: str | None = None,
    is_trainable: bool = False,
    adapter_revision: str | None = None,
    **model_kwargs,
) -> PeftModel:
    """An adapter, folder or Hub id, on its base.

    Args:
        name (`str`): The adapter.
        base (`str`, *optional*): Its base, where it is not the one that the adapter names.
        revision (`str`, *optional*): Revision of the base; else the adapter's.
        is_trainable (`bool`): Whether its parameters require gradients.
        adapter_revision (`str`, *optional*): Revision of the adapter.
        model_kwargs: For the base's `from_pretrained`.

    Raises:
        `ValueError`: where the adapter was trained on another base, or on another commit of it; for a base that is
            neither a folder here nor a Hub id.
    """
    config = PeftConfig.from_pretrained(name, revision=adapter_revision)
    check_targets(config.target_modules)
    known = base_of(config)
    if base and known and base != known:
        check_base(name, known, base)
        on_hub = config.revision or read_origin(base).get("hub_id") == known  # a path that is gone may read as an id
        if not (is_hub_id(known) and on_hub and Path(base).is_dir()):
            config.base_model_name_or_path = base
    if (path := base or known) and not Path(path).exists():
        try:
            validate_repo_id(path)
        except HFValidationError:
            raise ValueError(
                f"the adapter {name} has the base {path!r}, which is not here and no Hub id: name it, base=FOLDER or "
                "--base_model_name_or_path FOLDER"
            ) from None
    revision = revision or config.revision
    model = AutoModelForCausalLM.from_pretrained(base or known, revision=revision or "main", **model_kwargs)
    commit = commit_of(model)
    if config.revision and commit and config.revision not in (commit, revision):
        raise ValueError(
            f"the adapter {name} was trained on revision {config.revision} of {known}, and revision {revision} is "
            f"{commit}; leave the revision out or give the adapter's"
        )
    try:
        return PeftModel.from_pretrained(
            model, name, is_trainable=is_trainable, config=config, revision=adapter_revision
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of torch: sizes that differ
        said = (str(error).splitlines() or [""])[-1].strip()
        raise ValueError(f"the adapter {name} does not fit {base or known}: {said}") from None


def tokenizer_of(name: str, model: PeftModel | PreTrainedModel, **options):
    """The tokenizer of a model or adapter, folder or Hub id; of an adapter that was saved without one its base's."""
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):
        if not isinstance(model, PeftModel):
            raise
        return AutoTokenizer.from_pretrained(model.get_base_model().config.name_or_path, **options)


def is_hub_id(name: str) -> bool:
    """Whether it reads as one, and is no path here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def check_base(adapter: str, known: str, base: str) -> None:
    """`ValueError` where an adapter's base, `known`, is not the one that is named; a warning where it may be.

    A folder may be a copy of a Hub id, and a path that is gone may have been anything.
    """
    embedded, folders = Path(known) == MODEL_PATH, Path(known).is_dir() and Path(base).is_dir()
    if (is_hub_id(known) or embedded) and not Path(base).is_dir():
        raise ValueError(f"the adapter {adapter} was trained on {EMBEDDED if embedded else known}, not on {base}")
    if folders and not Path(known).samefile(base):
        warnings.warn(
            f"the adapter {adapter} names another folder as its base, {known}, than {base}: it is right if one is a "
            "copy of the other",
            kl.KLWarning,
            stacklevel=3,
        )


def commit_of(model: PreTrainedModel) -> str | None:
    """Hub commit that a model was loaded from, where it was."""
    return getattr(model.config, "_commit_hash", None)


def name_base(model: PeftModel) -> None:
    """Write into the adapter's configuration what it was trained on: the exact commit, and no path of this machine."""
    config = model.peft_config[ADAPTER]
    config.revision = commit_of(model.get_base_model()) or config.revision
    name = config.base_model_name_or_path
    if not name or not Path(name).is_dir():
        return
    if Path(name).samefile(MODEL_PATH):
        config.base_model_name_or_path = EMBEDDED
    elif hub_id := read_origin(name).get("hub_id"):
        config.base_model_name_or_path = hub_id


@torch.no_grad()
def probe(model) -> torch.Tensor:
    """A model's log-probabilities, (2, 16, V) in float32 on the CPU, after tokens from all over its vocabulary."""
    ids = torch.linspace(0, model.config.vocab_size - 1, 32, device=model.device).long().view(2, 16)
    return model(ids).logits.float().log_softmax(-1).cpu()


def check_agreement(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> float:
    """Largest difference of two results of [`probe`] in nats; `ValueError` where it is too large for the dtype."""
    difference = (found - expected).abs().max().item()
    allowed = TOLERANCE.get(dtype) or STEPS * torch.finfo(dtype).eps * expected.abs().max().item()
    if not difference <= allowed:
        remedy = "" if dtype in TOLERANCE else "; load the base in float32"
        raise ValueError(f"{what} is {difference:.2g} nats off, in {dtype}, where rounding is {allowed:.1g}{remedy}")
    return difference


def merge(model: PeftModel) -> PreTrainedModel:
    """`merge_and_unload`, with a check that the log-probabilities stay those of the adapter.

    Raises:
        `ValueError`: where they differ by more than rounding, 0.001 nats in float32: weights that are too coarse for
            the adapter, or that are tied to others which it does not reach.
    """
    before = probe(model.eval())
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of PEFT
        raise ValueError(f"the adapter cannot be merged: {error}") from None
    check_agreement(probe(merged), before, merged.dtype, "the merged model")
    return merged


def beside_its_product(config: PeftConfig) -> list[str]:
    """What an adapter trains beside the product of LoRA's two matrices, by the options that say so."""
    names = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "layer_replication")
    found = [name for name in names if getattr(config, name, None)]
    return found + (["bias"] if getattr(config, "bias", "none") != "none" else [])


def check_stacks(config: PeftConfig) -> None:
    """`ValueError` for an adapter whose sum with another is none."""
    of_some_layers = ("layers_to_transform", "layers_pattern", "exclude_modules")  # which the other's need not be
    more = beside_its_product(config) + [name for name in of_some_layers if getattr(config, name, None)]
    if not isinstance(config, LoraConfig) or more:
        raise ValueError(
            f"a stack of adapters is one adapter for plain LoRA alone, got {config.peft_type.value} {' '.join(more)}: "
            "merge the lower one (recipes/merge_adapter.py) and start from that"
        )


@torch.no_grad()
def save_stacked(
    below: str, above: str, folder: str, base: str | None = None, revision: str | None = None, **model_kwargs
) -> None:
    """Save as one adapter the sum of two: `below`, and `above`, which was trained on base and `below` merged.

    The ranks are put side by side, so the sum of both updates loads on the base alone. Made in float32, whatever the
    base's own precision.

    Args:
        below, above (`str`): Adapters, folder or Hub id. Plain LoRA only: the sum of two DoRA adapters is none.
        folder (`str`): Where it goes.
        base, revision, model_kwargs: As for [`load_adapter`].

    Raises:
        `ValueError`: for any other adapter, and where the sum's log-probabilities are not those of the two.
    """
    for name in (below, above):
        check_stacks(PeftConfig.from_pretrained(name))
    model = load_adapter(below, base, revision, dtype=torch.float32, **model_kwargs)
    model.load_adapter(above, "above")
    model.eval()
    for config in model.peft_config.values():
        config.use_rslora = False  # each has its scale by now, and the sum's is 1
    model.base_model.set_adapter([ADAPTER, "above"])
    both = probe(model)
    model.add_weighted_adapter([ADAPTER, "above"], [1.0, 1.0], "stacked", combination_type="cat")
    model.set_adapter("stacked")
    model.delete_adapter(ADAPTER)
    model.add_weighted_adapter(["stacked"], [1.0], ADAPTER, combination_type="cat")
    model.set_adapter(ADAPTER)
    check_agreement(probe(model), both, model.dtype, "the sum of the two adapters")
    name_base(model)
    model.save_pretrained(folder, selected_adapters=[ADAPTER])


def check_fraction(fraction: float) -> None:
    """`ValueError` for what is no point of the way."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1, got {fraction}")


@torch.no_grad()
def go_back(model: PreTrainedModel | PeftModel, fraction: float, base: PreTrainedModel | None = None) -> None:
    """Move a trained model to a fraction of the way from its base, in place: at 0 it is the base, at 1 it stays.

    Part of the way often has more reward for its KL than the same training had when it passed that KL. Interpolation
    is that of WiSE-FT (arXiv 2109.01903), and towards the reference in RLHF WARP's (arXiv 2406.16768).

    Args:
        model: A whole model, or one with a LoRA adapter, whose product is scaled; of several, those that are active.
        base ([`~transformers.PreTrainedModel`], *optional*): What a whole model was trained from; on its device.

    Raises:
        `ValueError`: for a fraction outside of 0 to 1, and an adapter that is not a product of two matrices alone, or
            that starts with a part of the base in it (PiSSA).
    """
    check_fraction(fraction)
    if fraction == 1:
        return
    if not isinstance(model, PeftModel):
        if base is None:
            raise ValueError("a whole model goes back to a base: give it")
        if [p.shape for p in model.parameters()] != [p.shape for p in base.parameters()]:
            raise ValueError("the base has other parameters than the model: it was trained from another")
        for parameter, other in zip(model.parameters(), base.parameters(), strict=True):
            parameter.copy_(torch.lerp(other.to(parameter.dtype), parameter, fraction))
        return
    active = model.active_adapters
    for config in (model.peft_config[name] for name in active):
        more = beside_its_product(config)
        if not isinstance(config, LoraConfig) or more:
            raise ValueError(f"only plain LoRA can go part of the way, got {config.peft_type.value} {' '.join(more)}")
    if reason := why_off_is_not_the_base(model):
        raise ValueError(f"only an adapter whose off is its base can go part of the way back to it: {reason}")
    for name, parameter in model.named_parameters():
        if any(m in ("lora_B", "lora_embedding_B") and adapter in active for m, adapter in pairwise(name.split("."))):
            parameter.mul_(fraction)
