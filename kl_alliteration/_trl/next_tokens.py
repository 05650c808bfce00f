"""The likeliest next tokens at each place of a completion, and the gradient of what they are credited with."""

from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from .. import kl
from .heads import OwnHead
from .looking_on import policy_alone
from .scoring import Scored


def likeliest(seam, output: dict, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a generation batch (B, T): (B, T, k) probabilities of the policy's likeliest tokens, and the tokens.

    The largest first; 0 where the mask is, and no more than there are in the vocabulary. From the states that were
    kept of the batch, or by a pass of the policy where TRL has asked for none.
    """
    states, head = _policy_of(seam, output)
    k, counted = min(k, head.vocab_size), output["completion_mask"].bool()
    chance = torch.zeros((*counted.shape, k), device=counted.device)
    tokens = torch.zeros(chance.shape, dtype=torch.long, device=counted.device)
    rows = states[counted].split(max(1, kl.CHUNK_ELEMENTS // head.vocab_size))
    with torch.no_grad():
        values, ids = zip(*(head.log_probs(each).topk(k, dim=-1) for each in rows), strict=True)
    chance[counted], tokens[counted] = torch.cat(values).exp().to(chance), torch.cat(ids).to(tokens)
    return chance, tokens


def _policy_of(seam, output: dict) -> tuple:
    batch = seam.batch
    if batch.rollout is not None and batch.rollout.hidden is not None:
        return batch.rollout.hidden.policy, batch.rollout.hidden.head
    scored = batch.scored[0] if batch.scored else policy_alone(seam, output)
    return scored.states, scored.head


def keep(output: dict, of_next: tuple | None, scale: torch.Tensor | float = 1.0) -> None:
    """Next tokens and their credit among what TRL shuffles and splits, for [`pushed`]."""
    if of_next is not None:
        output["kl_next_tokens"], output["kl_next_credit"] = of_next[0], scale * of_next[1]


def pushed(scored: Scored, inputs: dict) -> torch.Tensor:
    """(B,) values of 0, with the gradient of the log-probabilities of next tokens (B, T, k), each times its credit.

    The credits of a place sum to 0: what a log-softmax takes away from all of its tokens alike is without effect, and
    only the logits of those tokens are computed. Differentiable in the states and the head.
    """
    head, tokens, credit = scored.head, inputs["kl_next_tokens"], inputs["kl_next_credit"]

    def chunk(states, tokens, credit):
        few, places = (None, tokens) if isinstance(head, OwnHead) else tokens.unique(return_inverse=True)
        bias = None if few is None or head.bias is None else head.bias[few]
        its = head if few is None else replace(head, weight=head.weight[few], bias=bias)
        return (its.log_probs(states).gather(-1, places) * credit).sum(-1)

    counted = (credit != 0).any(-1)  # (B, T)
    rows = max(1, kl.CHUNK_ELEMENTS // (scored.states.shape[-1] * tokens.shape[-1]))
    parts = zip(*(each[counted].split(rows) for each in (scored.states, tokens, credit)), strict=True)
    sums = torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])
    sums = sums.new_zeros(counted.shape).masked_scatter(counted, sums).sum(1)
    return (sums - sums.detach()) * inputs.get("kl_text_weights", 1.0)
