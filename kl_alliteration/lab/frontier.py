"""What the base's own rewards say of a run: its efficiency. They are a `frontier.json` of `recipes/best_of_n.py`."""

import json
from pathlib import Path

import torch

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
        rewards = torch.tensor(facts["rewards"])
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
    if len(base_rewards) > 1 and base_rewards.shape[-1] < MANY:  # their prompts' mean is not the held-out ones'
        together = centred(base_rewards)
        base_rewards = (together - together.mean() + before.reward_mean)[None]
    rewards, ratios = torch.tensor(after.rewards), torch.tensor(after.ref_log_ratios)
    return efficiency(base_rewards, rewards, ratios, after.exact_kl_per_sequence)
