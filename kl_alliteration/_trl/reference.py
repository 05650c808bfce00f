"""The reference: loaded as TRL loads its own, or a model with its adapter off, where that is the base."""

from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel
from transformers import AutoTokenizer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
)

OF_PATH = ("revision", "subfolder", "gguf_file")  # options that say where in a path a model is
# Initialisations of LoRA that leave the base's weights as they are; others, PiSSA's first, take something out of them.
KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def load_reference(trainer, model, path: str | None = None, on_cpu: bool = False):
    """A second model, ready to score: from the path of `model`, a causal language model, or from another one.

    `on_cpu`: it stays there, whatever is asked of it goes there, and what it answers comes back.

    The policy's own path is loaded at the commit that the policy is of.

    Raises:
        `ValueError`: where another one has other tokens, so that no token's probabilities could be compared; for a
            policy that was loaded from nowhere; on the CPU beside DeepSpeed or FSDP.
    """
    if on_cpu and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise ValueError("a reference on the CPU goes without DeepSpeed and FSDP, which shard it beside the policy")
    kwargs = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    options = (trainer.args.model_init_kwargs or {}) | ({"device_map": None} if on_cpu else {})
    if path is not None and path != get_config_model_id(model.config):
        check_tokens(trainer, path)
        options = {name: value for name, value in options.items() if name not in OF_PATH}
    elif commit := getattr(model.config, "_commit_hash", None):
        options["revision"] = commit
    path = path or get_config_model_id(model.config)
    if not path:
        raise ValueError(
            "there is no path to load a reference from, for the policy was made in memory: save it, and let the "
            "trainer load it (model='folder'), or name a reference, use_loaded_reference(trainer, 'folder')"
        )
    reference = create_model_from_path(path, **options | kwargs)
    heads = [each.get_output_embeddings().weight for each in (model, reference)]
    sizes = [getattr(head, "ds_shape", head.shape)[0] for head in heads]  # ZeRO-3 leaves an empty weight
    if sizes[0] != sizes[1]:
        raise ValueError(f"kl_reference: {path} has a vocabulary of {sizes[1]}, the policy one of {sizes[0]}")
    disable_dropout_in_model(reference)
    in_fp32 = getattr(trainer.args, "cast_lm_head_to_fp32", False)
    add_fused_lm_head(reference, temperature=trainer.temperature, cast_lm_head_to_fp32=in_fp32)
    if on_cpu:
        return add_hook_to_module(reference.requires_grad_(False).eval(), AlignDevicesHook("cpu", io_same_device=True))
    if trainer.is_deepspeed_enabled:  # sharded where the policy is, as TRL's own reference
        return prepare_deepspeed(reference, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(reference, trainer.accelerator)
    return trainer.accelerator.prepare_model(reference, evaluation_mode=True)


def check_tokens(trainer, path: str) -> None:
    ours = getattr(trainer.processing_class, "tokenizer", trainer.processing_class).get_vocab()
    theirs = AutoTokenizer.from_pretrained(path).get_vocab()
    other = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if other:
        raise ValueError(
            f"kl_reference: the tokens of {path} are not the policy's: {len(other)} differ, such as {min(other)!r}; a "
            "KL needs one tokenizer"
        )


def why_off_is_not_the_base(model: PeftModel) -> str | None:
    """What of an adapter stays when it is off, in words."""
    for config in model.peft_config.values():
        if (init := getattr(config, "init_lora_weights", None)) not in KEEP_THE_BASE:
            return f"init_lora_weights={init!r} changes the base's weights"
        if getattr(config, "layer_replication", None):
            return "layer_replication repeats the base's layers"
    marks = (getattr(model.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens", "prompt_encoder")
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not any(mark in n for mark in marks)]
    return f"parameters of the base train too ({trained[0]})" if trained else None
