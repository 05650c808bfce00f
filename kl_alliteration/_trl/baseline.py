"""REINFORCE on a stock `RLOOTrainer`: what RLOO's advantages are without the others' mean."""

import torch


def leave_baseline_out(seam) -> None:
    """Of an RLOO trainer's seam, from now on."""
    seam.changes.append(lambda output: output.update(advantages=without_baseline(seam, output["advantages"])))


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
