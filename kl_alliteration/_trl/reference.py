"""The reference: loaded as TRL loads its own, or a model with its adapter off, where that is the base."""

from peft import PeftModel
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
)

# Initialisations of LoRA that leave the base's weights as they are; others, PiSSA's first, take something out of them.
KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def load_reference(trainer, model):
    """A second model from the path of `model`, a causal language model, ready to score."""
    kwargs = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    path, options = get_config_model_id(model.config), trainer.args.model_init_kwargs or {}
    reference = create_model_from_path(path, **options | kwargs)
    disable_dropout_in_model(reference)
    add_fused_lm_head(reference, temperature=trainer.temperature)
    return trainer.accelerator.prepare_model(reference, evaluation_mode=True)


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
