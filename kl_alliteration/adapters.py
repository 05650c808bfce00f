"""LoRA adapters: loading them on the right base, which reference they are held to, stacking and merging them."""

from pathlib import Path

import torch
from accelerate.utils import DistributedType
from huggingface_hub import file_exists
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from . import kl
from ._trl import Rollout, rollout_seam
from .story_lm import MODEL_PATH

# What an adapter calls the embedded model: a path would be true on one machine only.
EMBEDDED = "kl_alliteration/story_lm/model"
ADAPTER, REFERENCE = "default", "ref"  # PEFT's name for the one that trains, TRL's for the one it is held to
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of log-probabilities, in nats; 0.1 in half precision


def is_adapter(name: str) -> bool:
    """Whether a folder or Hub id holds an adapter, not a whole model."""
    if Path(name).is_dir():
        return Path(name, "adapter_config.json").is_file()
    return file_exists(name, "adapter_config.json")


def default_lora_config(**options) -> LoraConfig:
    """LoRA on every linear layer but the head, as PEFT finds them: Llama, Qwen, GPT-2, GPT-Neo and the embedded model.

    Rank 16, alpha 32 as in TRL, without dropout, which would act in sampling and in every score of it.

    Args:
        options: PEFT's own for [`~peft.LoraConfig`], such as `use_dora=True` or `use_rslora=True`.
    """
    defaults = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = LoraConfig(**defaults | options)
    check_targets(config.target_modules, config.modules_to_save)
    return config


def check_targets(target_modules, modules_to_save=None) -> None:
    """`ValueError` where the LM head is to be adapted or trained."""
    targets = [target_modules] if isinstance(target_modules, str) else target_modules or []
    for name in [*targets, *(modules_to_save or [])]:
        if name.split(".")[-1] in ("lm_head", "embed_out"):
            raise ValueError(
                f"the adapter must not hold {name}: TRL reads the head's weight past the adapter, so it would train "
                "nothing, and where it is tied to the embeddings a merge would change those; leave it out"
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
        `ValueError`: where the adapter was trained on another base, or on another commit of it.
    """
    config = PeftConfig.from_pretrained(name, revision=adapter_revision)
    check_targets(config.target_modules, config.modules_to_save)
    known = base_of(config)
    if base and known and base != known and not Path(base).is_dir() and not Path(known).is_dir():
        raise ValueError(f"the adapter {name} was trained on {known}, not on {base}")
    revision = revision or config.revision
    model = AutoModelForCausalLM.from_pretrained(base or known, revision=revision or "main", **model_kwargs)
    commit = commit_of(model)
    if config.revision and commit and config.revision not in (commit, revision):
        raise ValueError(
            f"the adapter {name} was trained on revision {config.revision} of {known}, and revision {revision} is "
            f"{commit}; leave the revision out or give the adapter's"
        )
    return PeftModel.from_pretrained(model, name, is_trainable=is_trainable, config=config, revision=adapter_revision)


def commit_of(model: PreTrainedModel) -> str | None:
    """Hub commit that a model was loaded from, where it was."""
    return getattr(model.config, "_commit_hash", None)


def name_base(model: PeftModel) -> None:
    """Write into the adapter's configuration what it was trained on: the exact commit, and no path of this machine."""
    config = model.peft_config[ADAPTER]
    config.revision = commit_of(model.get_base_model()) or config.revision
    name = config.base_model_name_or_path
    if name and Path(name).is_dir() and Path(name).samefile(MODEL_PATH):
        config.base_model_name_or_path = EMBEDDED


@torch.no_grad()
def probe(model) -> torch.Tensor:
    """A model's log-probabilities, (2, 16, V) in float32 on the CPU, after tokens from all over its vocabulary."""
    ids = torch.linspace(0, model.config.vocab_size - 1, 32, device=model.device).long().view(2, 16)
    return model(ids).logits.float().log_softmax(-1).cpu()


def check_agreement(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> float:
    """Largest difference of two results of [`probe`] in nats; `ValueError` where it is too large for the dtype."""
    difference = (found - expected).abs().max().item()
    if not difference <= TOLERANCE.get(dtype, 0.1):
        raise ValueError(f"{what} is {difference:.2g} nats off, in {dtype}")
    return difference


def merge(model: PeftModel) -> PreTrainedModel:
    """`merge_and_unload`, once its log-probabilities are seen to be the adapter's.

    Raises:
        `ValueError`: where they differ by more than 0.001 nats in float32, 0.1 in half precision: weights that are
            too coarse for the adapter; merge in float32.
    """
    before = probe(model.eval())
    merged = model.merge_and_unload(safe_merge=True)
    check_agreement(probe(merged), before, merged.dtype, "the merged model")
    return merged


def save_stacked(below: str, above: str, folder: str) -> None:
    """Save as one adapter the sum of two: `below`, and `above`, which was trained on base and `below` merged.

    Exact: the ranks are put side by side, so the sum of both updates loads on the base alone.

    Args:
        below, above (`str`): Adapters, folder or Hub id. Plain LoRA; DoRA's norms do not add.
        folder (`str`): Where it goes.
    """
    model = load_adapter(below)
    model.load_adapter(above, "above")
    for config in model.peft_config.values():
        if config.use_dora:
            raise ValueError("a stack of adapters cannot be one adapter with DoRA: merge the lower one and save it")
    model.add_weighted_adapter([ADAPTER, "above"], [1.0, 1.0], "stacked", combination_type="cat")
    model.delete_adapter(ADAPTER)
    model.add_weighted_adapter(["stacked"], [1.0], ADAPTER, combination_type="cat")
    name_base(model)
    model.save_pretrained(folder, selected_adapters=[ADAPTER])


class ReferenceCallback(TrainerCallback):
    """What the KL of a LoRA run is measured from, with the KL to the base, adapter off, beside it.

    Logs `kl/base_per_token` and `kl/base_per_sequence`, the mean log-ratio of policy and base in nats, wherever the
    base is not the reference itself: there they are TRL's `kl` and the monitor's `k1`. A reference of its own is a
    frozen adapter called `ref`, as in TRL, so it is saved with every checkpoint and resumed from it.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock, of a `PeftModel`.
        reference (`str`, *optional*, defaults to `"start"`):
            `"start"`: the adapter as it is now, which of a new adapter is the base. `"base"`: the base, even where TRL
            would take the adapter that one goes on from.

    Raises:
        `ValueError`: without an adapter, with an unknown reference, or for a moving reference under ZeRO-3, which
            shards it.
    """

    MOVES = False

    def __init__(self, trainer, reference: str = "start"):
        kl.check_choice("reference", reference, ("base", "start"))
        self.trainer, self.seam = trainer, rollout_seam(trainer)
        if not self.seam.has_free_reference:
            raise ValueError("a reference adapter needs a model with an adapter: use_peft")
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        check_trains(self.model)
        plugin = trainer.args.deepspeed_plugin
        if self.MOVES and plugin is not None and plugin.zero_stage == 3:
            raise ValueError("a moving reference cannot be kept under DeepSpeed ZeRO-3: use stage 2")
        if self.MOVES and trainer.args.distributed_state.distributed_type == DistributedType.FSDP:
            raise ValueError("a moving reference cannot be kept under FSDP: use DDP or ZeRO-2")
        if reference == "base":
            if REFERENCE in self.model.peft_config:
                self.model.delete_adapter(REFERENCE)
        else:
            if REFERENCE not in self.model.peft_config:
                self.model.add_adapter(REFERENCE, self.model.peft_config[ADAPTER])
                self.model.set_adapter(ADAPTER)
            self.move_reference(1.0)
            self.seam.need_reference_at_beta_zero()
            self.seam.score_base = True
            self.seam.observers.append(self.observe)

    @torch.no_grad()
    def move_reference(self, alpha: float) -> None:
        """`ref <- alpha * policy + (1 - alpha) * ref`, parameter by parameter."""
        for name, parameter in self.model.named_parameters():
            parts = name.split(".")
            if ADAPTER in parts:
                reference = self.model.get_parameter(".".join(REFERENCE if p == ADAPTER else p for p in parts))
                reference.requires_grad_(False).lerp_(parameter.to(reference.dtype), alpha)

    def observe(self, rollout: Rollout) -> None:
        metrics, mask = self.seam.metrics, rollout.completion_mask
        ratio = rollout.logps - rollout.base_logps
        metrics["kl/base_per_token"].append(self.seam.mean_per_token(ratio, mask))
        metrics["kl/base_per_sequence"].append(self.seam.mean_per_sequence(ratio, mask))


class MovingAverageReferenceCallback(ReferenceCallback):
    """The reference follows the policy: `ref <- alpha * policy + (1 - alpha) * ref` every `steps` steps.

    The average is of the adapter's parameters, not of their products. TRL's `sync_ref_model`, which it refuses with
    PEFT; names and defaults are TRL's. The formula is TR-DPO's soft update (arXiv 2404.09656, section 3).

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock, of a `PeftModel`.
        alpha (`float`, *optional*, defaults to `0.6`): The policy's share, in (0, 1].
        steps (`int`, *optional*, defaults to `512`): Optimizer steps between two moves.
    """

    MOVES = True

    def __init__(self, trainer, alpha: float = 0.6, steps: int = 512):
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha}")
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        super().__init__(trainer)
        self.alpha, self.steps = alpha, steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.move_reference(self.alpha)


class ResetReferenceCallback(ReferenceCallback):
    """The reference becomes the policy every `steps` steps, or when the KL to it passes a bound.

    Logs `kl/reference_resets`, the share of steps that ended in a reset.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock, of a `PeftModel`.
        steps (`int`, *optional*): Optimizer steps between two resets.
        kl_per_sequence (`float`, *optional*): Mean log-ratio of a generation batch, in nats per sequence, beyond which
            the step ends in a reset.
        reset_optimizer (`bool`, *optional*, defaults to `False`): Forget the optimizer's moments too.
    """

    MOVES = True

    def __init__(
        self,
        trainer,
        steps: int | None = None,
        kl_per_sequence: float | None = None,
        reset_optimizer: bool = False,
    ):
        if steps is None and kl_per_sequence is None:
            raise ValueError("a reset needs steps, or kl_per_sequence")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        if kl_per_sequence is not None and not kl_per_sequence > 0:
            raise ValueError(f"kl_per_sequence must be > 0, got {kl_per_sequence}")
        super().__init__(trainer)
        self.steps, self.kl_per_sequence, self.reset_optimizer = steps, kl_per_sequence, reset_optimizer
        self.last_kl = 0.0

    def observe(self, rollout: Rollout) -> None:
        super().observe(rollout)
        self.last_kl = self.seam.mean_per_sequence(rollout.ref_log_ratio, rollout.completion_mask)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        due = self.steps is not None and state.global_step % self.steps == 0
        due = due or (self.kl_per_sequence is not None and self.last_kl > self.kl_per_sequence)
        self.seam.metrics["kl/reference_resets"].append(float(due))
        if due:
            self.move_reference(1.0)
            self.last_kl = 0.0
            if self.reset_optimizer:
                optimizer.state.clear()
