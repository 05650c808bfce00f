"""Reward functions by dotted path: imported, checked at every call, summed."""

import importlib
import inspect
import math
import os
import sys
import traceback
from pathlib import Path

from . import watchdog
from .survival import TrainingStopped
from .watchdog import TimeIsUp, limited


class CheckedReward:
    """A reward function that stops the run when it raises, hangs, returns the wrong number of rewards, or no number.

    It runs where it is called, on the main thread, so that it may use signals and event loops. What it may take is
    kept by [`~lab.watchdog.limited`]. `None` stays allowed: in TRL it means that the reward does not apply to a
    completion.
    """

    def __init__(self, function, path: str, timeout: float):
        self.function, self.path, self.timeout = function, path, timeout
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.scores_prefixes = getattr(function, "scores_prefixes", False)

    def __call__(self, prompts, completions, **kwargs):
        rewards = self.answer(prompts=prompts, completions=completions, **kwargs)
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards  # a tensor or array
        if not isinstance(rewards, (list, tuple)):
            raise TrainingStopped(
                f"reward_funcs: {self.path} returned a {type(rewards).__name__}, not a list of rewards"
            )
        if len(rewards) != len(completions):
            raise TrainingStopped(
                f"reward_funcs: {self.path} returned {len(rewards)} rewards for {len(completions)} completions"
            )
        for reward, completion in zip(rewards, completions, strict=True):
            if reward is not None and not is_finite(reward):
                raise TrainingStopped(f"reward_funcs: {self.path} returned {reward} for {str(completion)[:60]!r}")
        return rewards

    def answer(self, **kwargs):
        limit = f"{self.timeout:g} s" if self.timeout else "any time"
        late = f"reward_funcs: {self.path} has not answered for {limit} (reward_timeout)"
        try:
            return limited(self.function, self.timeout, late, **kwargs)
        except TimeIsUp:
            raise TrainingStopped(late) from None
        except (Exception, SystemExit) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            called = Path(frame.filename) != Path(watchdog.__file__)  # else it does not take what TRL hands over
            where = f" ({frame.filename}:{frame.lineno})" if called else ""
            raise TrainingStopped(
                f"reward_funcs: {self.path} raised {type(error).__name__}: {error}{where}"
            ) from error


def is_finite(reward) -> bool:
    try:
        return math.isfinite(reward)
    except (TypeError, ValueError, OverflowError):
        return False


def load_rewards(paths: list[str], model: str | None = None, timeout: float | None = None) -> list:
    """Reward functions by dotted path, the working directory included, after a reward model's path if there is one."""
    rewards = [] if model is None else [model]
    for path in paths:
        module_name, _, name = path.rpartition(".")
        if not module_name:
            raise ValueError(f"reward_funcs: {path!r} is no dotted path such as package.module.function")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            function = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"reward_funcs: cannot import {path!r} from {os.getcwd()}: {error}") from None
        except (Exception, SystemExit) as error:  # of the user's file
            raise ValueError(f"reward_funcs: cannot import {path!r}: {type(error).__name__}: {error}") from error
        if not callable(function):
            raise ValueError(f"reward_funcs: {path!r} is a {type(function).__name__}, not a function")
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)
        rewards.append(function if is_async else CheckedReward(function, path, timeout))
    return rewards


def sum_rewards(functions: list, weights: list[float] | None = None, clip: list[float] | None = None):
    """One TRL-shaped function: the weighted sum of several, clipped; `None` where none of them applies."""
    weights = [1.0] * len(functions) if weights is None else weights
    low, high = clip or (-math.inf, math.inf)

    def reward(prompts, completions, **columns) -> list[float | None]:
        found = [function(prompts=prompts, completions=completions, **columns) for function in functions]
        return [
            min(high, max(low, sum(w * value for w, value in zip(weights, row, strict=True) if value is not None)))
            if any(value is not None for value in row)
            else None
            for row in zip(*found, strict=True)
        ]

    return reward


def ranking_reward(paths: list[str], timeout: float | None = None, weights=None, clip=None):
    """The sum of the rewards at these dotted paths, of text, as [`sum_rewards`]; `ValueError` for an async one."""
    functions = load_rewards(paths, timeout=timeout)
    if not all(isinstance(function, CheckedReward) for function in functions):
        raise ValueError("reward_funcs: an async reward is for a trainer that samples; give a plain function here")
    return sum_rewards(functions, weights, clip)
