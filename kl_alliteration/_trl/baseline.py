"""A batch's rewards and their groups: weighted, their spread, and RLOO's advantages without the others' mean."""

import torch
from trl.trainer.utils import nanstd


def leave_baseline_out(seam) -> None:
    """Of an RLOO trainer's seam, from now on."""
    seam.changes["baseline"] = lambda output: output.update(advantages=without_baseline(seam, output["advantages"]))


def without_baseline(seam, advantages: torch.Tensor) -> torch.Tensor:
    """(B,): the rewards less the penalty, in place of TRL's advantages, in its logs too."""
    trainer, batch = seam.trainer, seam.batch
    rewards = weighted(trainer, batch.rewards)
    start = trainer.accelerator.process_index * len(advantages)
    rewards = rewards[start : start + len(advantages)].to(advantages)
    if seam.beta != 0:
        rewards = rewards - seam.beta * batch.penalty
    rewards = rewards.nan_to_num(nan=0.0)
    everywhere, logged = trainer.accelerator.gather(rewards).tolist(), trainer._logs["advantages"]
    for _ in range(min(len(everywhere), len(logged))):  # which keeps a limited number
        logged.pop()
    logged.extend(everywhere)
    return rewards


def weighted(trainer, rewards: torch.Tensor) -> torch.Tensor:
    """(B, functions) rewards -> (B,), weighted and clipped as TRL does; NaN where no function applied."""
    total = (rewards * trainer.reward_weights.to(rewards)).nansum(1)
    if clip := getattr(trainer, "reward_clip_range", None):
        total = total.clamp(*clip)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)


def group_size(trainer) -> int:
    """Completions of a prompt, in training or in evaluation, whichever the trainer is in."""
    return trainer.num_generations if trainer.model.training else trainer.num_generations_eval


def spreads_in_groups(seam) -> tuple[float, float]:
    """Standard deviations about the means of groups, of the last penalty and of the rewards; 0 where none applies."""
    trainer, batch = seam.trainer, seam.batch
    found = []
    for values in (trainer.accelerator.gather(batch.penalty), weighted(trainer, batch.rewards)):
        groups = values.view(-1, group_size(trainer))
        spread = (groups - groups.nanmean(1, keepdim=True)).square().nanmean().sqrt()
        found.append(spread.nan_to_num(nan=0.0).item())
    return tuple(found)


def share_of_ties(trainer, rewards: torch.Tensor) -> float:
    """What TRL logs as `frac_reward_zero_std`, of (B of all processes, functions) rewards without a penalty."""
    rewards = weighted(trainer, rewards)
    groups = rewards.view(
        -1, group_size(trainer) if getattr(trainer, "scale_rewards", "") != "batch" else len(rewards)
    )
    spread = nanstd(groups, dim=1) if groups.shape[1] > 1 else torch.zeros_like(groups[:, 0])
    return spread.isclose(torch.zeros_like(spread)).float().mean().item()


def last_rewards(seam) -> torch.Tensor:
    """Of the last generation batch, over all processes, without the penalty: (B of all,), as [`weighted`]."""
    return weighted(seam.trainer, seam.batch.rewards).cpu()  # not TRL's log, in which functions of a name are one


def last_reward_std(seam) -> float:
    """Spread of the last rewards that apply; 0 where none does."""
    rewards = last_rewards(seam)
    rewards = rewards[~rewards.isnan()]
    return rewards.std(correction=0).item() if len(rewards) else 0.0
