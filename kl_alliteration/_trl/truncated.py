"""The policy's score over the tokens that truncated sampling leaves, in place of that over all of them."""

from dataclasses import replace

import torch

from .. import kl
from .scoring import Scored, Scorer


def as_sampled(scorer: Scorer, scored: Scored, input_ids: torch.Tensor, attention_mask: torch.Tensor, *_) -> Scored:
    """`scored` less the log of the mass that is left at each token, with its gradient, where it is scored so."""
    if scorer.truncate is None:
        return scored
    length = scored.logps.shape[1]
    ids, mask = input_ids[:, -length:], attention_mask[:, -length:]
    states, head = scored.states, scored.head

    def log_mass(log_p: torch.Tensor, _, token_ids: torch.Tensor) -> torch.Tensor:
        kept = scorer.truncate(log_p.detach()).isfinite().scatter(-1, token_ids.unsqueeze(-1), True)  # (N, V)
        return log_p.masked_fill(~kept, -torch.inf).logsumexp(-1)

    lost = kl.from_hidden_states(log_mass, states, states.detach(), head, head, ids, mask)  # (B, T)
    return replace(scored, logps=scored.logps - lost, results=(scored.results[0] - lost, *scored.results[1:]))
