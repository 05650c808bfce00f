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

    Weighted, summed and clipped as the trainer does. A function that does not apply to a prefix (`None`) says of it
    what it said of the one before. Where a completion is over its reward stands as TRL has it. A function that is not
    [`scores_prefixes`] is asked of none.

    Returns:
        Two tensors (B, K): the rewards, and the last token of each prefix. NaN where the completion has no reward.
    """
    trainer, (rows, completions, _) = seam.trainer, seam.batch.rewarded
    accelerator = trainer.accelerator
    lengths, points = mask.sum(1), torch.arange(step, ids.shape[1] + step, step, device=ids.device)  # (B,), (K,)
    b, k = (points < lengths.unsqueeze(1)).nonzero(as_tuple=True)  # the M prefixes that are not whole
    # Every process has to ask for as many: what is missing are copies of the first completion.
    missing = int(accelerator.gather(torch.tensor([len(b)], device=ids.device)).max()) - len(b)
    of = b.tolist() + [0] * missing
    tokens, stops = ids.tolist(), points.tolist()
    parts = [tokens[row][: stops[place]] for row, place in zip(b.tolist(), k.tolist(), strict=True)]
    parts += [tokens[0]] * missing
    start = accelerator.process_index * len(ids)
    whole = seam.batch.rewards[start : start + len(ids)]  # (B, functions)
    found = whole.unsqueeze(1).repeat(1, len(points), 1)  # (B, K, functions)
    asked = [place for place, function in enumerate(trainer.reward_funcs) if scores_prefixes(function)]
    if parts:
        texts = trainer.processing_class.batch_decode(parts, skip_special_tokens=True)
        prefixes = [_of_text(completions[row], text) for row, text in zip(of, texts, strict=True)]
        with _these_alone(trainer, asked):
            answers = rewards_of(trainer, [rows[row] for row in of], prefixes, parts)[: len(b)]
        for column, place in enumerate(asked):
            found[b, k, place] = answers[:, column].to(found)
    known = torch.zeros_like(whole)
    for point, column in zip(points, found.unbind(1), strict=True):
        unsaid = column.isnan() & (point < lengths).unsqueeze(1)
        column.copy_(known := torch.where(unsaid, known, column))
    total = weighted(trainer, found.flatten(0, 1)).view(found.shape[:2])
    total[whole.isnan().all(1)] = torch.nan
    ends = torch.minimum(points, lengths.unsqueeze(1)).clamp(min=1) - 1
    return total, ends


def rewards_of_nothing(seam, rows: int) -> torch.Tensor:
    """(B,) of the same completions, what none of their tokens is worth: the rewards that are of whole texts alone."""
    trainer, start = seam.trainer, seam.trainer.accelerator.process_index * rows
    whole = seam.batch.rewards[start : start + rows].clone()
    whole[:, [place for place, function in enumerate(trainer.reward_funcs) if scores_prefixes(function)]] = 0.0
    return weighted(trainer, whole)


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
