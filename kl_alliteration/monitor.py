"""The KL in the logs, by several estimators."""

import torch
from transformers import TrainerCallback

from . import kl
from ._trl import listen_to_engine, seam_of, spreads_in_groups
from .sampling_options import warn_of_sampling


class KLMonitorCallback(TrainerCallback):
    """Logs the KL by several estimators, per token and per sequence, over all processes, under `kl/`.

    `kl/{k1,k2,k3}_per_token` and `_per_sequence`, with `exact` also `kl/exact_...`; `kl/max_per_sequence`, the
    furthest completion of the batch; `kl/beta`; `kl/share_of_spread`, the penalty's standard deviation within
    groups over the sum of the penalty's and the reward's; with a budget `kl/budget_use`, KL over budget, and
    `kl/over_budget_share`; where completions are used for several updates (`num_iterations`, `steps_per_generation`)
    `kl/rollout_per_sequence`, the mean log-ratio of the policy that sampled them and the policy as it is: that is
    what clipping bounds, not the KL to the reference. Where the engine that samples says how likely its tokens were,
    fast sampling or vLLM: `kl/sampler_k1_per_token`, `_k3_per_token`, `_k1_per_sequence`, the KL of that engine
    to the policy as the trainer scores it, and `kl/sampler_max_ratio`, the largest ratio of one token's probabilities.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock.
        exact (`bool`, *optional*, defaults to `False`): Log the full-vocabulary KL too.
        load_reference (`bool`, *optional*, defaults to `False`):
            At `beta` 0 a trainer without LoRA has no reference: load one, a second model, just to log the KL.

    Raises:
        `ValueError`: where the reference would be a model with its adapter off that is not its base.
    """

    def __init__(self, trainer, exact: bool = False, load_reference: bool = False):
        self.trainer, self.seam = trainer, seam_of(trainer)
        if self.seam.scorer.has_free_reference or load_reference:
            self.seam.scorer.need_reference_at_beta_zero()
        self.seam.check_reference()
        self.names = ("k1", "k2", "k3", "exact") if exact else ("k1", "k2", "k3")
        if exact:
            self.seam.scorer.need_hidden_states()
        warn_of_sampling(trainer, "exact" if exact else "k1", seam_of(trainer).is_as_sampled)
        listen_to_engine(self.seam)
        self.seam.observers.append(self.observe)
        self.seam.watch_rollout_policy = not self.seam.is_one_update

    def observe(self, rollout: kl.Rollout) -> None:
        accelerator, metrics, mask = self.trainer.accelerator, self.seam.metrics, rollout.completion_mask
        per_sequence = {  # (B,) each
            name: kl.reduce_per_sequence(rollout.per_token_kl(name), mask, "sum") for name in self.names
        }
        lengths = mask.sum(-1)
        budget = getattr(self.seam.penalty, "budget_per_token", None)
        best = per_sequence[self.names[-1] if "exact" in self.names else "k1"]
        sums = [
            lengths.sum(),
            (lengths > 0).sum(),
            *(values.sum() for values in per_sequence.values()),
        ]
        if budget is not None:
            if budget > 0:
                sums.append((best / (budget * lengths.clamp(min=1))).sum())
            sums.append((best > budget * lengths).sum())
        tokens, sequences, *totals = accelerator.reduce(torch.stack([s.double() for s in sums]), "sum").tolist()
        if not sequences:  # of which a token counts: of truncated ones none may, and that is no KL of 0
            return
        for name, total in zip(self.names, totals, strict=False):
            metrics[f"kl/{name}_per_token"].append(total / tokens)
            metrics[f"kl/{name}_per_sequence"].append(total / sequences)
        if budget is not None:
            if budget > 0:  # a share of nothing is no number
                metrics["kl/budget_use"].append(totals[-2] / sequences)
            metrics["kl/over_budget_share"].append(totals[-1] / sequences)
        if rollout.sampler_logps is not None:
            self.observe_sampler(rollout)
        metrics["kl/max_per_sequence"].append(accelerator.gather(best).max().item())
        metrics["kl/beta"].append(self.seam.beta)
        if self.seam.beta != 0 and self.seam.last_penalty is not None:
            penalty, reward = spreads_in_groups(self.seam)
            penalty = self.seam.beta * penalty
            metrics["kl/share_of_spread"].append(penalty / (penalty + reward) if penalty + reward else 0.0)

    def observe_sampler(self, rollout: kl.Rollout) -> None:
        """KL(sampler || policy) of what another engine sampled: 0 but for rounding where both are one policy."""
        metrics, mask = self.seam.metrics, rollout.completion_mask
        # A token whose probability the engine did not give is none that it differs in.
        ratio = (rollout.sampler_logps - rollout.logps).nan_to_num(nan=0.0) * mask
        for name in ("k1", "k3"):
            metrics[f"kl/sampler_{name}_per_token"].append(self.seam.mean_per_token(kl.SAMPLED[name](ratio), mask))
        metrics["kl/sampler_k1_per_sequence"].append(self.seam.mean_per_sequence(ratio, mask))
        furthest = self.trainer.accelerator.gather(ratio.abs().amax().exp()[None])
        metrics["kl/sampler_max_ratio"].append(furthest.max().item())
