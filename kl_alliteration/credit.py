"""Credit by token: what a completion earns, and what it is charged, from a token on is that token's, not all of it."""

import warnings
from functools import partial

import torch

from . import kl
from ._trl import partial_rewards, rewards_of_nothing, scores_prefixes, seam_of
from .penalty import KLPenalty

# Options of TRL's by which a completion has one advantage, and what they have to be where its tokens have their own.
TAKES = {
    "normalize_advantages": False,
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
    "use_liger_kernel": False,
}


def to_go(increments: torch.Tensor, discount: float) -> torch.Tensor:
    """(B, T) rewards by token -> (B, T), the discounted sum from each token on: `G_t = r_t + discount * G_t+1`."""
    total, sums = torch.zeros_like(increments[:, 0]), []
    for column in increments.flip(1).unbind(1):
        total = column + discount * total
        sums.append(total)
    return torch.stack(sums[::-1], dim=1)


def less_the_mean(values: torch.Tensor, group: int, leave_one_out: bool) -> torch.Tensor:
    """(N, ...) less the mean of its group of neighbouring rows, or of the others in it; NaN counts as none, gets 0."""
    grouped = values.view(-1, group, *values.shape[1:])
    total, count = grouped.nansum(1, keepdim=True), (~grouped.isnan()).sum(1, keepdim=True)
    mean = (total - grouped) / (count - 1) if leave_one_out else total / count
    return (grouped - mean).reshape(values.shape).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def charged_with_others_futures(
    penalty: KLPenalty, per_token_kl: torch.Tensor, mask: torch.Tensor, group: int
) -> torch.Tensor:
    """What a completion would pay that is its own up to a token, and another's of its group from there on.

    (N, T) nats and counted tokens, groups of `group` = G neighbouring rows -> (N / G, G, G, T): row i up to token t,
    row j after it. The exact KL at t is known before t is sampled, and counts as the past; any other as the future.
    """

    def spliced(values: torch.Tensor, known: bool) -> torch.Tensor:
        values = values.view(-1, group, values.shape[1])
        past = values.cumsum(-1) - (0 if known else values)
        return past.unsqueeze(2) + (values.sum(-1, keepdim=True) - past).unsqueeze(1)

    spent, opening, length = penalty.parts(per_token_kl, mask)
    known = penalty.estimator == "exact"
    return penalty.of_sums(spliced(spent, known), spliced(opening, known), spliced(length, True))


def of_all(trainer, values: torch.Tensor) -> torch.Tensor:
    """(B, T) of this process -> (N, T of the longest) of all, in their order."""
    accelerator = trainer.accelerator
    return accelerator.gather(accelerator.pad_across_processes(values, dim=1))


def own_rows(trainer, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's (B, T), as `like` is, of what [`of_all`] has."""
    start = trainer.accelerator.process_index * len(like)
    return values[start : start + len(like), : like.shape[1]]


def check_credit_by_token(args, option: str) -> None:
    """`ValueError` for options of a trainer's `args`, RLOO's or GRPO's, by which a completion has one advantage."""
    for name, takes in TAKES.items():
        if (value := getattr(args, name, takes)) != takes:
            raise ValueError(f"{name} {value!r} has one advantage for a text: with {option} it is {takes!r}")


def check_reward_to_go(args, discount: float, every_tokens: int = 1, opening_tokens: int = 0) -> None:
    """`ValueError` for what [`use_reward_to_go`] cannot do with a trainer's `args`, RLOO's or GRPO's."""
    if not 0 <= discount <= 1:
        raise ValueError(f"reward_discount must be from 0 to 1, got {discount}; none credits whole texts")
    if every_tokens < 1:
        raise ValueError(f"reward_prefix_tokens must be >= 1, got {every_tokens}")
    if opening_tokens < 0 or (opening_tokens and discount == 1):
        raise ValueError(
            "reward_opening_tokens must be >= 0 and needs a reward_discount below 1, got "
            f"{opening_tokens}: with 1 all tokens are credited so"
        )
    check_credit_by_token(args, "a reward_discount")


def use_reward_to_go(trainer, discount: float = 1.0, every_tokens: int = 1, opening_tokens: int = 0) -> None:
    """Let a stock trainer credit each token with the reward that its completion earned from there on.

    RLOO and GRPO multiply every token's gradient with the whole completion's advantage, so that a token is praised for
    what stood before it: noise, which is paid in KL. Here the reward of a completion is what its prefixes add to it,
    `r_t = R(tokens up to t) - R(tokens before t)`, and token t gets the sum of `r` from t on less the mean of that in
    its group, RLOO's without itself (reward-to-go; Sutton et al. 2000). On average that is the same gradient. The
    penalty stays where it is, on the whole completion, and so does the spread by which GRPO divides, but where rewards
    tie: what tokens add is divided by its own size at least. Proven by enumeration in `tests/test_reward_to_go.py`.

    With a `discount` below 1 a reward that comes n tokens later counts `discount ** n`. That is another objective,
    which looks 1 / (1 - discount) tokens ahead: less noise again, and a token is no longer paid for what the text
    becomes much later. So a small price on openings keeps many plots: `KLPenalty(opening_tokens=, opening_price=)`.

    The first `opening_tokens` are credited with all that follows, whatever the discount. Where they choose what the
    text will be about, and the words behind them only what comes soon, that is nearly the objective of a discount of
    1, without the noise of crediting every word with all that is told long after it.

    It is for reward functions with an attribute `scores_prefixes = True`, which the alliteration rewards have, and
    yours may: `my_reward.scores_prefixes = True`. They are called once more a batch, of as many texts as there are
    tokens, with `None` for `log_metric` and `log_extra`; where they say nothing of a prefix (`None`) it adds nothing.
    All others are credited as before, and where none has it a warning says so. Called again, the last call counts.
    Logs `reward_to_go/spread`, the spread of the tokens' advantages over that of the completions'.

    Args:
        trainer ([`~trl.RLOOTrainer`] or [`~trl.GRPOTrainer`]): The trainer, stock.
        discount (`float`): From 0, the next word alone, to 1, the same objective.
        every_tokens (`int`): Tokens from one prefix to the next, for rewards that are slow. They share what they add.
        opening_tokens (`int`): Tokens of the beginning that no discount is for.

    Raises:
        `ValueError`: for a discount outside of 0 and 1, `every_tokens` below 1, `opening_tokens` below 0 or beside a
            discount of 1, a `reward_clip_range` over rewards of both kinds, and options by which a completion has one
            advantage: `normalize_advantages`; in GRPO sequence-level importance sampling, rewards that are normalized
            one by one, the Liger kernel.
    """
    check_reward_to_go(trainer.args, discount, every_tokens, opening_tokens)
    seam, asked = seam_of(trainer), [*map(scores_prefixes, trainer.reward_funcs)]
    if not any(asked):
        names = ", ".join(trainer.reward_func_names)
        warnings.warn(
            f"reward_discount does nothing: of {names} none has `scores_prefixes = True`", kl.KLWarning, stacklevel=2
        )
        return
    if not all(asked) and getattr(trainer, "reward_clip_range", None):
        raise ValueError(
            "reward_clip_range clips a sum of rewards by token and of whole texts, of which no token's part is known: "
            "leave it out, or reward_discount"
        )

    def credit(output: dict) -> None:
        if not trainer.model.training:
            return
        ids, mask = output["completion_ids"], output["completion_mask"]
        rewards, ends = partial_rewards(seam, ids, mask, every_tokens)  # (B, K), (B, K)
        first = rewards_of_nothing(seam, len(ids)).unsqueeze(1).to(rewards)
        added = torch.zeros(ids.shape, device=ids.device).scatter_add_(1, ends, rewards.diff(dim=1, prepend=first))
        added = of_all(trainer, added)
        of_texts = seam.mean_per_token(output["advantages"].view(len(ids), -1) ** 2, mask)
        centred = partial(less_the_mean, group=trainer.num_generations, leave_one_out=seam.LEAVES_ONE_OUT)
        earned = torch.cat([to_go(added, 1.0)[:, :opening_tokens], to_go(added, discount)[:, opening_tokens:]], dim=1)
        by_token = centred(earned) - centred(added.sum(1)).unsqueeze(1)
        of_tokens = seam.mean_per_token(
            seam.credit_tokens(output, own_rows(trainer, by_token, mask) * mask) ** 2, mask
        )
        seam.metrics["reward_to_go/spread"].append((of_tokens / of_texts) ** 0.5 if of_texts else 1.0)

    seam.changes["reward_to_go"] = credit


def use_kl_to_go(trainer) -> None:
    """Let a stock trainer charge each token the KL that its completion spends from there on.

    A penalty in the reward charges every token the whole completion's, so that it pays for what stood before it:
    noise, which is largest where the penalty matters. Here each token has a baseline of its own: what its completion
    would have paid with its own past and the futures of the others in its group, RLOO's without itself. That depends
    on nothing which the token decides, so on average the gradient is the same (a baseline of the state; Williams
    1992), for any [`KLPenalty`], budgets and openings too. Where the penalty is linear in the nats, what is left is
    the KL from the token on. Proven by enumeration in `tests/test_kl_to_go.py`. A penalty that is in the loss alone
    stays as it is.

    Any reward will do; [`use_reward_to_go`] does it for rewards. Logs `kl_to_go/spread`, the spread of what tokens are
    charged over that of what completions are, each less its baseline.

    Args:
        trainer ([`~trl.RLOOTrainer`] or [`~trl.GRPOTrainer`]): The trainer, stock.

    Raises:
        `ValueError`: for options by which a completion has one advantage, as [`use_reward_to_go`].
    """
    check_credit_by_token(trainer.args, "kl_to_go")
    seam = seam_of(trainer)

    def credit(output: dict) -> None:
        penalty, rollout = seam.penalty or KLPenalty(*seam.OWN), seam.batch.rollout
        if not trainer.model.training or seam.beta == 0 or rollout is None or not penalty.in_reward:
            return
        group, mask = trainer.num_generations, rollout.completion_mask
        nats = rollout.per_token_kl(penalty.estimator, penalty.direction, penalty.top_k)
        charged = charged_with_others_futures(penalty, of_all(trainer, nats), of_all(trainer, mask), group)
        own = charged.diagonal(dim1=1, dim2=2)[:, 0]  # (N / G, G), with its own future
        counted = ~seam.batch.rewards.to(own.device).isnan().all(1).view(-1, group)
        others = counted.unsqueeze(1).expand(-1, group, -1).to(own)  # (N / G, G, G), 1 where j is one of them
        if seam.LEAVES_ONE_OUT:
            others = others * (1 - torch.eye(group, dtype=own.dtype, device=own.device))
        others = others / others.sum(-1, keepdim=True).clamp(min=1)
        by_token = torch.einsum("nij,nijt->nit", others, charged)
        by_text = torch.einsum("nij,nj->ni", others, own).unsqueeze(-1)
        by_token, by_text, own = (
            own_rows(trainer, (each * counted.unsqueeze(-1)).flatten(0, 1), mask)
            for each in (by_token, by_text, own.unsqueeze(-1))
        )
        seam.credit_tokens(output, seam.beta * (by_token - by_text) * mask)
        of_tokens, of_texts = (seam.mean_per_token((own - each) ** 2, mask) for each in (by_token, by_text))
        seam.metrics["kl_to_go/spread"].append((of_tokens / of_texts) ** 0.5 if of_texts else 1.0)

    seam.changes["kl_to_go"] = credit
