"""What the base's own rewards say of a run: its efficiency. They are a `frontier.json` of `recipes/best_of_n.py`."""

import json
from collections import deque
from pathlib import Path

import torch
from transformers import TrainerCallback

from .._trl import last_rewards, seam_of
from ..evaluation import Judgement
from ..story_lm import MODEL_PATH
from ..yardsticks import centred, efficiency

EMBEDDED = MODEL_PATH.parent / "frontier.json"
NAMES = ("model", "reward_func", "prompt", "temperature", "max_new_tokens")  # that have to be the run's
MANY = 1000  # samples of a prompt that give it a curve of its own
AT_REFERENCE = 1e-2  # nats per sequence within which a run begins at its reference


def read_base_rewards(args, sampling, model_name_or_path: str) -> torch.Tensor | None:
    """(P, M) rewards of the base: those of `--base_frontier`, or of the embedded model where the run is of its kind.

    Args:
        args: The recipe's options, [`~lab.options.StoryArguments`].
        sampling: What has the run's `temperature` and `max_completion_length`.

    Raises:
        `ValueError`: where the named file cannot be read, or was sampled in another way than the run samples.
    """
    named = args.base_frontier
    if named is None and Path(model_name_or_path) != MODEL_PATH:
        return None
    try:
        facts = json.loads(Path(named or EMBEDDED).read_text(encoding="utf-8"))
        sampled = {name: (facts["sampled"] | {"model": facts["model"].casefold()})[name] for name in NAMES}
        rewards = torch.tensor(facts["rewards"], dtype=torch.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"base_frontier: {named} is no frontier.json of recipes/best_of_n.py ({type(error).__name__}: {error})"
        ) from None
    ours = {
        "model": Path(model_name_or_path).name.casefold(),  # a Hub id and a folder of it agree
        "reward_func": args.reward_funcs[0] if len(args.reward_funcs) == 1 else args.reward_funcs,
        "prompt": None if args.dataset_name else args.prompt,
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_completion_length,
    }
    weighted = getattr(sampling, "reward_weights", None) not in (None, [1.0]) or args.reward_model_name_or_path
    other = [name for name in NAMES if ours[name] != sampled[name]]
    if named is None:
        return None if other or weighted else rewards
    if weighted:
        raise ValueError("base_frontier: a weighted reward or a reward model is none that recipes/best_of_n.py asks")
    if other:
        name = other[0]
        raise ValueError(f"base_frontier: {named} has {name} {sampled[name]!r}, the run has {ours[name]!r}")
    return rewards


def efficiency_of(before: Judgement, after: Judgement, base_rewards: torch.Tensor | None) -> float | None:
    """`None` where the base's rewards are unknown or do not reach as far, or a run began off its reference."""
    if base_rewards is None or not after.ref_log_ratios or abs(before.exact_kl_per_sequence) > AT_REFERENCE:
        return None
    base_rewards = one_curve(base_rewards, before.reward_mean)
    rewards, ratios = torch.tensor(after.rewards), torch.tensor(after.ref_log_ratios)
    return efficiency(base_rewards, rewards, ratios, after.exact_kl_per_sequence)


def one_curve(base_rewards: torch.Tensor, mean: float) -> torch.Tensor:
    """(P, M) rewards of prompts with a curve each; with few samples each as of one, (1, P * M), about this mean."""
    if len(base_rewards) == 1 or base_rewards.shape[-1] >= MANY:
        return base_rewards
    together = centred(base_rewards)
    return (together - together.mean() + mean)[None]


class EfficiencyCallback(TrainerCallback):
    """Logs `kl/efficiency` of the last 400 completions, where the reference's rewards carry it.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, with its monitors.
        base_rewards (`torch.Tensor`): (P, M) rewards of the reference's samples.
    """

    def __init__(self, trainer, base_rewards: torch.Tensor, window: int = 400):
        self.trainer, self.seam = trainer, seam_of(trainer)
        self.base_rewards = one_curve(base_rewards, base_rewards.nanmean().item())
        self.seen = deque(maxlen=window)  # reward, log-ratio and KL of a completion
        self.seam.observers.append(self.observe)

    def observe(self, rollout) -> None:
        if self.trainer.model.training:
            gather, mask = self.trainer.accelerator.gather, rollout.completion_mask
            spent = rollout.per_token_kl("exact" if rollout.hidden is not None else "k1")
            columns = [gather((values * mask).sum(-1)).tolist() for values in (rollout.ref_log_ratio, spent)]
            self.seen.extend(zip(last_rewards(self.trainer)[-len(columns[0]) :].tolist(), *columns, strict=True))

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and self.seen:
            rewards, ratios, spent = torch.tensor(list(self.seen)).T
            found = efficiency(self.base_rewards, rewards, ratios, spent.mean().item())
            if found is not None:
                self.seam.metrics["kl/efficiency"].append(found)
