"""What TRL's GRPO divides a completion by in its loss, by `loss_type`, and an advantage by, by `scale_rewards`."""

import torch
import trl
from trl.trainer.utils import nanstd

from .baseline import group_size, weighted
from .seam import READ_FROM, UnknownTRLError

LOSS_TYPES = ("grpo", "sapo", "bnpo", "dr_grpo", "luspo", "dapo", "cispo", "vespo")


def check_loss_type(trainer) -> None:
    if trainer.loss_type not in LOSS_TYPES:
        raise UnknownTRLError(
            f"loss_type {trainer.loss_type!r} of trl {trl.__version__} is none that kl_alliteration knows, which was "
            f"written against trl {READ_FROM}: take one of {', '.join(LOSS_TYPES)}, or put the penalty into the reward"
        )


def divisor_of_completions(trainer, inputs, mask: torch.Tensor) -> torch.Tensor:
    """(B,) by which TRL's loss divides what values per token sum to over a completion's counted tokens.

    (B, T) mask. Every loss type is such a sum: the mean over a completion's tokens (`grpo`, `sapo`), over those of the
    micro-batch (`bnpo`), of the generation batch (`dapo`, `cispo`, `vespo`), over a constant (`dr_grpo`), or the sum
    itself (`luspo`).
    """
    training, lengths = trainer.model.training, mask.sum(-1).clamp(min=1.0)  # (B, T) -> (B,)
    steps = trainer.current_gradient_accumulation_steps if training else 1.0
    rows, every = len(mask), torch.ones_like(lengths)
    if trainer.loss_type in ("grpo", "sapo"):
        return lengths * rows * steps
    if trainer.loss_type == "bnpo":
        return every * mask.sum().clamp(min=1.0) * steps
    if trainer.loss_type == "dr_grpo":
        return every * rows * trainer.max_completion_length * steps
    if trainer.loss_type == "luspo":
        return every * rows * steps
    check_loss_type(trainer)
    tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return every * (tokens * steps / trainer.args.steps_per_generation if training else tokens)


def weights_of_kl(trainer, logps: torch.Tensor, old: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor | float:
    """(B, T) or (B, 1) by which TRL multiplies the k3 of tokens that another policy sampled, `use_bias_correction_kl`.

    (B, T) log-probabilities, now and when they were sampled; `None` is the same.
    """
    if old is None or not trainer.args.use_bias_correction_kl:
        return 1.0
    log_ratio = logps - old
    if trainer.importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    return log_ratio.exp()


def scale_of_batch(trainer, batch, rows: int) -> torch.Tensor:
    """(B,), [`scale_of_advantages`] of a generation batch's rewards, less their penalty, for this process's `rows`."""
    charged, here = weighted(trainer, batch.rewards), trainer.accelerator.process_index * rows
    if batch.penalty is not None:
        charged = charged - trainer.beta * trainer.accelerator.gather(batch.penalty).to(charged.device)
    return scale_of_advantages(trainer, charged)[here : here + rows]


def scale_of_credit(trainer, batch, credit: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,) by which (B, T) credit of tokens is multiplied: [`scale_of_batch`], and no more than makes it of size 1.

    Rewards of a group that tie leave the penalty's spread alone, by which what each word adds would be a thousand.
    """
    scale = scale_of_batch(trainer, batch, len(credit))
    if trainer.scale_rewards == "none":
        return scale
    squares = trainer.accelerator.gather((credit.square() * mask).sum(-1) / mask.sum(-1).clamp(min=1))
    groups = squares.view(-1, trainer.num_generations if trainer.scale_rewards == "group" else len(squares))
    sizes = groups.mean(1).sqrt().repeat_interleave(groups.shape[1])
    here = trainer.accelerator.process_index * len(credit)
    return scale.minimum(1 / (sizes[here : here + len(credit)].to(scale) + 1e-4))


def scale_of_advantages(trainer, charged: torch.Tensor) -> torch.Tensor:
    """(B of all processes,) by which TRL multiplies what a reward, less its penalty, is above its group's mean.

    0 where TRL gives no advantage: no reward applied, or the group has no second reward to spread from. 1 where the
    group has no spread, as after a collapse: its advantages are 0, and a penalty in the loss would be 10,000 times
    itself.
    """
    scale = torch.ones_like(charged)
    if trainer.scale_rewards != "none":
        groups = charged.view(-1, group_size(trainer) if trainer.scale_rewards == "group" else len(charged))
        spread = nanstd(groups, dim=1).repeat_interleave(groups.shape[1])
        scale = torch.where(spread < 1e-4, 1.0, 1 / (spread + 1e-4)).masked_fill(spread.isnan(), torch.nan)
    return scale.masked_fill(charged.isnan() | scale.isnan(), 0.0)
