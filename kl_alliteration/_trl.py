"""The one module that knows TRL's private names. Read from trl 1.16.0, `trl/trainer/rloo_trainer.py`.

What is leaned on, each guarded by `tests/test_trl_seam.py`:

- `_generate_and_score_completions(inputs)` makes one generation batch. Inside it `_get_per_token_logps_and_entropies`
  is called for the policy and then, if `beta != 0`, for the reference; nothing else calls it there. Its first result
  is `logps` (B, T); its third and fourth positional arguments are `attention_mask` (B, P + T) and `logits_to_keep`, T.
- the penalty is `beta * ((logps - ref_logps) * completion_mask).sum(-1)`, subtracted from the reward.
- `_metrics[mode]["kl"]` holds one mean log-ratio per generation batch, averaged at the next log.
- `_logs` holds the last generation batch: `prompt`, `completion`, `rewards` by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import trl

READ_FROM = "1.16.0"
METHODS = ("_generate_and_score_completions", "_get_per_token_logps_and_entropies")
ATTRIBUTES = ("beta", "_metrics", "_logs")


class UnknownTRLError(RuntimeError):
    """The installed TRL is not one whose private names and call order this module knows."""


@dataclass(frozen=True)
class Rollout:
    """One generation batch on this process: log-probabilities of the sampled tokens, detached, (B, T) each."""

    logps: torch.Tensor
    ref_logps: torch.Tensor
    completion_mask: torch.Tensor

    @property
    def ref_log_ratio(self) -> torch.Tensor:
        return self.logps - self.ref_logps  # (B, T); its mean over policy samples is KL(policy || reference)


def check_trainer(trainer) -> None:
    """Refuse, by name, a trainer without the private names that this module was written against."""
    missing = [name for name in METHODS + ATTRIBUTES if not hasattr(trainer, name)]
    if missing:
        raise UnknownTRLError(
            f"{type(trainer).__name__} of trl {trl.__version__} has no {', '.join(missing)}; kl_alliteration was "
            f"written against trl {READ_FROM}'s RLOOTrainer: install that version or a newer kl_alliteration"
        )


class RolloutSeam:
    """Wraps two bound methods of one stock trainer, so that a penalty other than TRL's can be subtracted.

    At the reference's log-probabilities, the second of the two calls, it hands back values whose difference to the
    policy's sums to `penalty(rollout)` under the mask. TRL does the rest: gathering, beta, baseline, advantages.
    """

    def __init__(self, trainer):
        check_trainer(trainer)
        self.trainer = trainer
        self.penalty: Callable[[Rollout], torch.Tensor] | None = None
        self._logps_calls: list[torch.Tensor] | None = None
        self._rollout: Rollout | None = None
        self._generate_and_score = trainer._generate_and_score_completions
        self._get_logps = trainer._get_per_token_logps_and_entropies
        trainer._generate_and_score_completions = self.generate_and_score
        trainer._get_per_token_logps_and_entropies = self.get_logps

    def generate_and_score(self, inputs):
        trainer = self.trainer
        self._logps_calls, self._rollout = [], None
        try:
            output = self._generate_and_score(inputs)
            expected = 1 if trainer.beta == 0 else 2
            if len(self._logps_calls) != expected:
                raise UnknownTRLError(
                    f"trl {trl.__version__} asked for log-probabilities {len(self._logps_calls)} times in a "
                    f"generation batch, expected {expected}: kl_alliteration was written against trl {READ_FROM}"
                )
        finally:
            self._logps_calls = None
        if self._rollout is not None and self.penalty is not None:
            self._restore_kl_metric(self._rollout)
        return output

    def get_logps(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        logps, *rest = self._get_logps(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if self._logps_calls is not None:
            self._logps_calls.append(logps)
            if len(self._logps_calls) == 2:
                completion_mask = attention_mask[:, -logits_to_keep:]
                self._rollout = Rollout(self._logps_calls[0], logps, completion_mask)
                if self.penalty is not None:
                    logps = self._as_reference(self._rollout)
        return logps, *rest

    def _as_reference(self, rollout: Rollout) -> torch.Tensor:
        """Log-probabilities whose masked difference to the policy's is the penalty: all of it on the first token."""
        penalty = self.penalty(rollout)  # (B,)
        ref_logps = rollout.logps.clone()
        ref_logps[:, 0] -= penalty
        return ref_logps

    def _restore_kl_metric(self, rollout: Rollout) -> None:
        """TRL logged the penalty under `kl`; put the mean log-ratio in nats per token back, which `kl` means."""
        trainer = self.trainer
        mask = rollout.completion_mask
        stats = torch.stack([(rollout.ref_log_ratio * mask).sum(), mask.sum().float()])
        total, count = trainer.accelerator.reduce(stats, reduction="sum")
        trainer._metrics["train" if trainer.model.training else "eval"]["kl"][-1] = (total / count.clamp(min=1)).item()


def rollout_seam(trainer) -> RolloutSeam:
    """The trainer's one seam, installed at the first call."""
    if "_kl_alliteration_seam" not in vars(trainer):
        trainer._kl_alliteration_seam = RolloutSeam(trainer)
    return trainer._kl_alliteration_seam


def last_completions(trainer) -> tuple[list, list, dict[str, list[float]]]:
    """`(prompts, completions, rewards by function name)` of the last generation batch, over all processes."""
    logs = trainer._logs
    return (
        list(logs["prompt"]),
        list(logs["completion"]),
        {name: list(values) for name, values in logs["rewards"].items()},
    )
