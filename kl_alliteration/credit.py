"""Credit by token: a token's advantage in RLOO is what its completion earned from there on, not all that it earned."""

import warnings

import torch

from . import kl
from ._trl import partial_rewards, scores_prefixes, seam_of


def to_go(increments: torch.Tensor, discount: float) -> torch.Tensor:
    """(B, T) rewards by token -> (B, T), the discounted sum from each token on: `G_t = r_t + discount * G_t+1`."""
    total, sums = torch.zeros_like(increments[:, 0]), []
    for column in increments.flip(1).unbind(1):
        total = column + discount * total
        sums.append(total)
    return torch.stack(sums[::-1], dim=1)


def less_the_others(values: torch.Tensor, group: int) -> torch.Tensor:
    """(N, ...) less the mean of the others in its group of neighbouring rows; NaN is left out, and comes out as 0."""
    grouped = values.view(-1, group, *values.shape[1:])
    others = grouped.nansum(1, keepdim=True) - grouped, (~grouped.isnan()).sum(1, keepdim=True) - 1
    return (grouped - others[0] / others[1]).reshape(values.shape).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def use_reward_to_go(trainer, discount: float = 1.0, every_tokens: int = 1) -> None:
    """Let a stock [`~trl.RLOOTrainer`] credit each token with the reward that its completion earned from there on.

    RLOO multiplies every token's gradient with the whole completion's advantage, so that a token is praised for what
    stood before it: noise, which is paid in KL. Here the reward of a completion is what its prefixes add to it,
    `r_t = R(tokens up to t) - R(tokens before t)`, and token t gets the sum of `r` from t on less the mean of that in
    the other completions of its group (reward-to-go; Sutton et al. 2000). On average that is the same gradient. The
    penalty stays where it is, on the whole completion. Proven by enumeration in `tests/test_reward_to_go.py`.

    With a `discount` below 1 a reward that comes n tokens later counts `discount ** n`. That is another objective,
    which looks 1 / (1 - discount) tokens ahead: less noise again, and a token is no longer paid for what the text
    becomes much later. So training learns to alliterate in every plot before it chooses the plot that alliterates.

    It is for reward functions with an attribute `scores_prefixes = True`, which the alliteration rewards have, and
    yours may: `my_reward.scores_prefixes = True`. They are called once more a batch, of as many texts as there are
    tokens, with `None` for `log_metric`; where they say nothing of a prefix (`None`) it adds nothing. All others are
    credited as before, and where none has it a warning says so. Logs `reward_to_go/spread`, the spread of the tokens'
    advantages over that of the completions'.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock.
        discount (`float`): From 0, the next word alone, to 1, the same objective.
        every_tokens (`int`): Tokens from one prefix to the next, for rewards that are slow. They share what they add.

    Raises:
        `ValueError`: for a discount outside of 0 and 1, `every_tokens` below 1, `normalize_advantages`, and for
            `GRPOTrainer`.
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"reward_discount must be from 0 to 1, got {discount}")
    if every_tokens < 1:
        raise ValueError(f"reward_prefix_tokens must be >= 1, got {every_tokens}")
    seam = seam_of(trainer)
    if not hasattr(seam, "changes"):
        raise ValueError("reward_discount is RLOO's: GRPOTrainer has one advantage for all tokens of a completion")
    if trainer.args.normalize_advantages:
        raise ValueError("reward_discount gives tokens advantages in reward: leave normalize_advantages out")

    if not any(map(scores_prefixes, trainer.reward_funcs)):
        names = ", ".join(trainer.reward_func_names)
        warnings.warn(
            f"reward_discount does nothing: of {names} none has `scores_prefixes = True`", kl.KLWarning, stacklevel=2
        )
        return

    def credit(output: dict) -> None:
        if not trainer.model.training:
            return
        ids, mask, gather = output["completion_ids"], output["completion_mask"], trainer.accelerator.gather
        rewards, ends = partial_rewards(trainer, ids, mask, every_tokens)  # (B, K), (B, K)
        first = torch.zeros_like(rewards[:, :1])
        added = torch.zeros(ids.shape, device=ids.device).scatter_add_(1, ends, rewards.diff(dim=1, prepend=first))
        length = int(gather(torch.tensor([ids.shape[1]], device=ids.device)).max())
        added = torch.nn.functional.pad(added, (0, length - ids.shape[1]))
        here = slice(trainer.accelerator.process_index * len(ids), (trainer.accelerator.process_index + 1) * len(ids))
        everywhere, group = gather(added), trainer.num_generations
        by_token = less_the_others(to_go(everywhere, discount), group)[here, : ids.shape[1]]
        by_text = less_the_others(everywhere.sum(1), group)[here]
        output["kl_credit"] = (by_token - by_text.unsqueeze(1)) * mask  # what comes on top of TRL's advantage
        spread = seam.mean_per_token((output["advantages"].unsqueeze(1) + output["kl_credit"]) ** 2, mask) ** 0.5
        of_texts = (gather(output["advantages"]) ** 2).mean().item() ** 0.5
        seam.metrics["reward_to_go/spread"].append(spread / of_texts if of_texts else 1.0)

    seam.changes.append(credit)
