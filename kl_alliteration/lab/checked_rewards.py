"""Reward functions by dotted path: imported, checked at every call, summed."""

import importlib
import inspect
import math
import os
import sys
import threading
import traceback
from concurrent.futures import Future

from .survival import TrainingStopped


class CheckedReward:
    """A reward function that stops the run when it raises, hangs, returns the wrong number of rewards, or no number.

    `None` stays allowed: in TRL it means that the reward does not apply to a completion.
    """

    def __init__(self, function, path: str, timeout: float):
        self.function, self.path, self.timeout = function, path, timeout
        self.__name__ = getattr(function, "__name__", type(function).__name__)

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
        """In a thread of its own: a function that hangs cannot be stopped, but it can be left behind."""
        answer = Future()

        def call():
            try:
                answer.set_result(self.function(**kwargs))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=call, daemon=True).start()
        try:
            return answer.result(self.timeout)
        except Exception as error:
            if not answer.done():
                raise TrainingStopped(
                    f"reward_funcs: {self.path} has not answered for {self.timeout:g} s (reward_timeout)"
                ) from None
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise TrainingStopped(
                f"reward_funcs: {self.path} raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
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
            raise ValueError(f"reward_funcs: cannot import {path!r}: {error}") from None
        if not callable(function):
            raise ValueError(f"reward_funcs: {path!r} is a {type(function).__name__}, not a function")
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)
        rewards.append(function if is_async else CheckedReward(function, path, timeout))
    return rewards


def sum_rewards(functions: list, weights: list[float] | None = None):
    """One TRL-shaped function: the weighted sum of several, a reward that does not apply counting 0."""
    weights = [1.0] * len(functions) if weights is None else weights

    def reward(prompts, completions) -> list[float]:
        columns = [function(prompts=prompts, completions=completions) for function in functions]
        return [
            sum(w * (values[i] or 0.0) for values, w in zip(columns, weights, strict=True))
            for i in range(len(completions))
        ]

    return reward


def ranking_reward(paths: list[str], timeout: float | None = None):
    """The sum of the rewards at these dotted paths, of text; `ValueError` for an async one."""
    functions = load_rewards(paths, timeout=timeout)
    if not all(isinstance(function, CheckedReward) for function in functions):
        raise ValueError("reward_funcs: an async reward is for a trainer that samples; give a plain function here")
    return sum_rewards(functions)
