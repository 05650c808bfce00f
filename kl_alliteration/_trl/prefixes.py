"""Rewards of the beginnings of completions, by TRL's own code."""

from contextlib import contextmanager

import torch

from .asking import rewards_of
from .baseline import weighted

OF_FUNCTIONS = ("reward_funcs", "reward_func_names", "reward_processing_classes")


def scores_prefixes(function) -> bool:
    """Whether a reward function says of itself that it may be asked of a text that is not over."""
    return getattr(function, "scores_prefixes", False)


def partial_rewards(seam, ids: torch.Tensor, mask: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the generation batch under way, (B, T) tokens: what its first `step`, 2 `step`, ... tokens are worth.

    Weighted, summed and clipped as the trainer does, and carried on over prefixes to which no function applies. Where
    a completion is over its reward stands as TRL has it. A function that is not [`scores_prefixes`] is asked of none.

    Returns:
        Two tensors (B, K): the rewards, and the last token of each prefix. NaN where the completion has no reward.
    """
    lengths, points = mask.sum(1), torch.arange(step, ids.shape[1] + step, step, device=ids.device)  # (B,), (K,)
    b, k = (points < lengths.unsqueeze(1)).nonzero(as_tuple=True)  # the M prefixes that are not whole
    tokens, stops = ids.tolist(), points.tolist()
    parts = [tokens[row][: stops[place]] for row, place in zip(b.tolist(), k.tolist(), strict=True)]
    total = weighted(seam.trainer, _of_wholes(seam, len(ids))).unsqueeze(1).repeat(1, len(points))  # (B, K)
    total[b, k] = _rewards_of_parts(seam, len(ids), b.tolist(), parts).to(total)
    nothing = total[:, -1].isnan()  # of the whole completion
    known = torch.zeros_like(total[:, 0])
    for column in total.unbind(1):
        column.copy_(known := torch.where(column.isnan(), known, column))
    total[nothing] = torch.nan
    ends = torch.minimum(points, lengths.unsqueeze(1)).clamp(min=1) - 1
    return total, ends


def rewards_of_next(seam, ids: torch.Tensor, tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """What the same completions up to a token are worth with another in its place, (B, T, k); NaN where not asked."""
    b, t, k = asked.nonzero(as_tuple=True)
    before, places = ids.tolist(), zip(b.tolist(), t.tolist(), tokens[b, t, k].tolist(), strict=True)
    parts = [[*before[row][:stop], token] for row, stop, token in places]
    total = torch.full(tokens.shape, torch.nan, device=ids.device)
    total[b, t, k] = _rewards_of_parts(seam, len(ids), b.tolist(), parts).to(total)
    return total


def rewards_of_nothing(seam, rows: int) -> torch.Tensor:
    """(B,) of the same completions, what none of their tokens is worth: the rewards that are of whole texts alone."""
    whole = _of_wholes(seam, rows).clone()
    whole[:, _asked_of_prefixes(seam.trainer)] = 0.0
    return weighted(seam.trainer, whole)


def _of_wholes(seam, rows: int) -> torch.Tensor:
    """(B, functions), of this process's completions as TRL has them."""
    start = seam.trainer.accelerator.process_index * rows
    return seam.batch.rewards[start : start + rows]


def _asked_of_prefixes(trainer) -> list[int]:
    return [place for place, function in enumerate(trainer.reward_funcs) if scores_prefixes(function)]


def _rewards_of_parts(seam, rows: int, of: list[int], parts: list[list[int]]) -> torch.Tensor:
    """(M,) of M parts of this process's completions `of` which they are: every process has to ask together.

    What a function says that is of whole texts alone stands as TRL has it.
    """
    trainer, (inputs, completions, _) = seam.trainer, seam.batch.rewarded
    found, asked = _of_wholes(seam, rows)[of], _asked_of_prefixes(trainer)
    # Every process has to ask for as many: what is missing are empty parts of the first completion.
    most = int(trainer.accelerator.gather(torch.tensor([len(of)], device=trainer.accelerator.device)).max())
    if not most:
        return weighted(trainer, found)
    of, parts = of + [0] * (most - len(of)), parts + [[]] * (most - len(parts))
    texts = trainer.processing_class.batch_decode(parts, skip_special_tokens=True)
    texts = [_of_text(completions[row], text) for row, text in zip(of, texts, strict=True)]
    with _these_alone(trainer, asked):
        answers = rewards_of(trainer, [inputs[row] for row in of], texts, parts)
    found[:, asked] = answers[: len(found)].to(found)
    return weighted(trainer, found)


@contextmanager
def _these_alone(trainer, places: list[int]):
    """Some of its reward functions alone, `None` for `log_metric` and `log_extra`: nothing of prefixes is logged."""
    before = {name: getattr(trainer, name) for name in OF_FUNCTIONS}
    for name, values in before.items():
        setattr(trainer, name, [values[place] for place in places])
    trainer._log_metric = trainer._log_completion_extra = None
    try:
        yield
    finally:
        del trainer._log_metric, trainer._log_completion_extra
        for name, values in before.items():
            setattr(trainer, name, values)


def _of_text(completion, text: str):
    """A completion with another text: plain, or the assistant's one message."""
    if isinstance(completion, str):
        return text
    if len(completion) > 1:
        raise ValueError("reward_discount: a completion in which tools speak has no prefixes that rewards understand")
    return [completion[0] | {"content": text}]
