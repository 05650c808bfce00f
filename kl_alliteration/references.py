"""What the KL of a run with an adapter is measured from: where it started, the base, or a reference that moves."""

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from . import kl
from ._trl import seam_of, why_off_is_not_the_base
from .adapters import ADAPTER, REFERENCE, check_trains


def use_loaded_reference(trainer, model_name_or_path: str | None = None, on_cpu: bool = False) -> None:
    """Measure the KL from a second model that is loaded for it, frozen.

    By default from the path of the first, and not from the adapter off: for adapters that leave something in the base
    when they are off, PiSSA and its like, trained biases. Or from any model with the same tokens, a teacher or an
    earlier release, with an adapter or without. It costs the memory of a second model. Call it before any callback.

    Args:
        trainer ([`~trl.RLOOTrainer`] or [`~trl.GRPOTrainer`]): The trainer, stock, its `beta` not 0. GRPO with an
            adapter needs a `KLPenaltyCallback` too: its own penalty would still take the adapter off.
        model_name_or_path (`str`, *optional*): A Hub id or a folder.
        on_cpu (`bool`, *optional*, defaults to `False`):
            It stays on the CPU and scores there, slowly, where a card has no room for a second model.

    Raises:
        `ValueError`: for a model with other tokens; where TRL moves the reference by itself (`sync_ref_model`); on the
            CPU beside DeepSpeed or FSDP.
    """
    if trainer.args.sync_ref_model:
        raise ValueError("sync_ref_model moves the reference to the policy: it goes with none that is loaded")
    seam_of(trainer).use_loaded_reference(model_name_or_path, on_cpu)


class ReferenceCallback(TrainerCallback):
    """Choose what the KL of a LoRA run is measured from, and log the KL to the base (adapter off) as well.

    Logs `kl/base_per_token` and `kl/base_per_sequence`, the mean log-ratio of policy and base in nats, if the
    base is not the reference; if it is, they would equal TRL's `kl` and the monitor's `k1`. Any other reference is a
    frozen adapter called `ref`, as in TRL, so it is saved with every checkpoint and resumed from it.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock, of a `PeftModel`.
        reference (`str`, *optional*, defaults to `"start"`):
            `"start"`: the adapter as it is now; for a new adapter that is the base. `"base"`: the base, even where TRL
            would take the adapter that training started from.

    Raises:
        `ValueError`: without an adapter, with one that changes its base (PiSSA), with an unknown reference, or for a
            moving reference under ZeRO-3, which shards it.
    """

    MOVES = False

    def __init__(self, trainer, reference: str = "start"):
        kl.check_choice("reference", reference, ("base", "start"))
        self.trainer, self.seam = trainer, seam_of(trainer)
        if not self.seam.scorer.has_free_reference:
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
                if reason := why_off_is_not_the_base(self.model):  # a second one would change the base again
                    raise ValueError(
                        f"with its adapter off this model is not its base: {reason}. A reference that starts from the "
                        "adapter, or moves, cannot be kept beside it: take use_loaded_reference(trainer)"
                    )
                self.model.add_adapter(REFERENCE, self.model.peft_config[ADAPTER])
                self.model.set_adapter(ADAPTER)
            self.move_reference(1.0)
            self.seam.scorer.need_reference_at_beta_zero()
            self.seam.scorer.with_base = True
            self.seam.observers.append(self.observe)

    @torch.no_grad()
    def move_reference(self, alpha: float) -> None:
        """`ref <- alpha * policy + (1 - alpha) * ref`, parameter by parameter."""
        for name, parameter in self.model.named_parameters():
            parts = name.split(".")
            if ADAPTER in parts:
                reference = self.model.get_parameter(".".join(REFERENCE if p == ADAPTER else p for p in parts))
                reference.requires_grad_(False).lerp_(parameter.to(reference.dtype), alpha)

    def observe(self, rollout: kl.Rollout) -> None:
        metrics, mask = self.seam.metrics, rollout.completion_mask
        ratio = rollout.logps - rollout.base_logps
        metrics["kl/base_per_token"].append(self.seam.mean_per_token(ratio, mask))
        metrics["kl/base_per_sequence"].append(self.seam.mean_per_sequence(ratio, mask))


class MovingAverageReferenceCallback(ReferenceCallback):
    """The reference follows the policy: `ref <- alpha * policy + (1 - alpha) * ref` every `steps` steps.

    The average is of the adapter's parameters, not of their products. It is TRL's `sync_ref_model`, refused there with
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

    def observe(self, rollout: kl.Rollout) -> None:
        super().observe(rollout)
        if not self.trainer.model.training:
            return
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
