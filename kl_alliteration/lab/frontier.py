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
from .runs import what_was_sampled

EMBEDDED = MODEL_PATH.parent / "frontier.json"
STAYS = ("start", "base", "loaded")  # of kl_reference
# Options with which a run samples, or is paid, otherwise than the base was, and their values that change nothing.
PLAIN = {"top_k": (0,), "top_p": (1.0,), "min_p": (0.0,), "repetition_penalty": (1.0,)}
PLAIN |= {"generation_kwargs": ({},), "reward_clip_range": ()}
MANY = 1000  # samples of a prompt that give it a curve of its own
AT_REFERENCE = 1e-2  # nats per sequence within which a run begins at its reference


def sampled_as(args, sampling, model_name_or_path: str) -> dict:
    """What a run samples, and is paid for, under the names that `frontier.json` has for it."""
    return {
        "model": Path(model_name_or_path).name.casefold(),
        "reward_func": args.reward_funcs[0] if len(args.reward_funcs) == 1 else args.reward_funcs,
        "prompt": None if args.dataset_name else args.prompt,
        "dataset_name": args.dataset_name,
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_completion_length,
    }


def read_base_rewards(args, sampling, model_name_or_path: str) -> torch.Tensor | None:
    """(P, M) rewards of the base: those of `--base_frontier`, or of the embedded model where the run is of its kind.

    Args:
        args: The recipe's options, [`~lab.options.StoryArguments`].
        sampling: What has the run's `temperature` and `max_completion_length`.

    Raises:
        `ValueError`: where the named file cannot be read, or was sampled in another way than the run samples.
    """
    named, ours = args.base_frontier, sampled_as(args, sampling, model_name_or_path)
    if named is None and Path(model_name_or_path) != MODEL_PATH:
        return None
    try:
        facts = json.loads(Path(named or EMBEDDED).read_text(encoding="utf-8"))
        sampled = what_was_sampled(facts)
        rewards = torch.tensor(facts["rewards"], dtype=torch.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"base_frontier: {named} is no frontier.json of recipes/best_of_n.py ({type(error).__name__}: {error})"
        ) from None
    other = [name for name in ours if ours[name] != sampled[name]]
    unlike = beside_the_base(args, sampling)
    if named is None:
        return None if other or unlike else rewards
    if unlike:
        raise ValueError(f"base_frontier: {named} is of plain samples of the base, and the run has {unlike}")
    if other:
        name = other[0]
        raise ValueError(f"base_frontier: {named} has {name} {sampled[name]!r}, the run has {ours[name]!r}")
    return rewards


def reference_stays(args, sampling) -> bool:
    """Whether the KL is measured, all along, from one of the models that a run can start from."""
    return getattr(args, "kl_reference", "start") in STAYS and not getattr(sampling, "sync_ref_model", False)


def beside_the_base(args, sampling) -> str | None:
    """What of a run, in words, makes rewards of the base's plain samples others than those of its reference."""
    reference = getattr(args, "kl_reference", "start")
    if args.reward_model_name_or_path or getattr(sampling, "reward_weights", None) not in (None, [1.0]):
        return "a weighted reward or a reward model"
    if args.adapter_name_or_path and reference == "start":
        return f"adapter_name_or_path {args.adapter_name_or_path!r} as its reference"
    if not reference_stays(args, sampling):
        return f"kl_reference {reference!r}" if reference not in STAYS else "sync_ref_model"
    for name, plain in PLAIN.items():
        if (value := getattr(sampling, name, None)) is not None and value not in plain:
            return f"{name} {value!r}"
    return None


def efficiency_of(before: Judgement, after: Judgement, base_rewards: torch.Tensor | None) -> float | None:
    """`None` where the base's rewards are unknown or do not reach as far, or a run began off its reference."""
    if base_rewards is None or not after.ref_log_ratios or abs(before.exact_kl_per_sequence) > AT_REFERENCE:
        return None
    rewards, ratios = torch.tensor(after.rewards), torch.tensor(after.ref_log_ratios)
    curve, one = one_curve(base_rewards, before.reward_mean), len(base_rewards) == 1
    return efficiency(curve, rewards, ratios, after.exact_kl_per_sequence, one)


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
        self.one_prompt = len(base_rewards) == 1
        self.seen = deque(maxlen=window)  # reward, log-ratio and KL of a completion
        self.seam.observers.append(self.observe)

    def observe(self, rollout) -> None:
        if self.trainer.model.training:
            mask, spent = (
                rollout.completion_mask,
                rollout.per_token_kl("exact" if rollout.hidden is not None else "k1"),
            )
            counted = self.trainer.accelerator.gather(mask.sum(-1)).cpu() > 0
            rewards = last_rewards(self.seam)[-len(counted) :][counted]
            columns = (self.seam.of_texts(values, mask).tolist() for values in (rollout.ref_log_ratio, spent))
            self.seen.extend(zip(rewards.tolist(), *columns, strict=True))

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and self.seen:
            rewards, ratios, spent = torch.tensor(list(self.seen)).T
            found = efficiency(self.base_rewards, rewards, ratios, spent.mean().item(), self.one_prompt)
            if found is not None:
                self.seam.metrics["kl/efficiency"].append(found)
