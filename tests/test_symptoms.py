"""Symptoms by hand: a log that has each, and the same log just within the range."""

import math
from pathlib import Path

import pytest

from kl_alliteration.health import SYMPTOMS, Examined, diagnose


def entries(count: int = 12, every: int = 5, **series) -> list[dict]:
    """`count` healthy entries, a number or a function of the entry's place by name."""
    plain = {"reward": lambda i: 4 + i, "kl": 0.1, "loss": 0.1, "beta": 1.0, "entropy": 1.4}
    named = {name.replace("__", "/"): value for name, value in (plain | series).items()}
    return [
        {name: value(i) if callable(value) else value for name, value in named.items()} | {"step": every * (i + 1)}
        for i in range(count)
    ]


def alternating(mean: float, by: float):
    return lambda i: mean + by * (-1) ** i


# symptom: what shows it, the step at which it must be caught, what is just within the range
BY_HAND = {
    "no_kl": ({"beta": 0.0}, 15, {"beta": lambda i: float(i > 1)}),
    "not_finite": ({"kl": lambda i: math.nan if i == 6 else 0.1}, 35, {"num_tokens": math.nan}),
    "spike": ({"kl": lambda i: 0.41 if i == 7 else 0.1}, 40, {"kl": lambda i: 0.4 if i == 7 else 0.1}),
    # The mean of the last three, 0.1, 0.1, 1.4, is above 0.5 at the sixth; 1.2 makes 0.47.
    "explodes": ({"kl": lambda i: 1.4 if i == 5 else 0.1}, 30, {"kl": lambda i: 1.2 if i == 5 else 0.1}),
    # Standard deviation of eight values +-d about their mean: d sqrt(8 / 7); error d / sqrt 7. Four of them: 1.51 d.
    "negative": ({"kl": alternating(-0.016, 0.01)}, 40, {"kl": alternating(-0.015, 0.01)}),
    "starts_apart": ({"kl": 0.011, "every": 1}, 1, {"kl": 0.009, "every": 1}),
    "sampler_differs": ({"kl__sampler_k1_per_token": -0.011}, 15, {"kl__sampler_k1_per_token": 0.009}),
    "penalty_is_noise": ({"kl__share_of_spread": 0.61}, 15, {"kl__share_of_spread": 0.59}),
    "beta_winds": (
        {"beta": lambda i: 1.5**i, "kl__target_per_token": 0.1},
        40,
        {"beta": lambda i: 1.2**i, "kl__target_per_token": 0.1},
    ),
    "held_still": ({"reward": alternating(4, 0.1), "kl": 0.004}, 50, {"reward": alternating(4, 0.1), "kl": 0.006}),
    "length_is_learnt": (
        {"completions__mean_length": lambda i: 20 + 5 * i},  # the first three 25, 46 at the eighth's
        40,
        {"completions__mean_length": lambda i: 20 + 0.5 * i},
    ),
    "never_ends": (
        {"completions__clipped_ratio": lambda i: 0.5 if i < 3 else 0.95},
        30,
        {"completions__clipped_ratio": lambda i: 0.5 if i < 3 else 0.85},
    ),
    "collapse": ({"entropy": lambda i: 1.4 if i < 3 else 0.6}, 30, {"entropy": lambda i: 1.4 if i < 3 else 0.8}),
    "one_plot": ({"plots__most_told_share": 0.6, "plots__effective": 9.0}, 15, {"plots__most_told_share": 0.4}),
    "no_signal": ({"frac_reward_zero_std": 0.9}, 15, {"frac_reward_zero_std": 0.7}),
    "inefficient": ({"kl__efficiency": 0.09}, 30, {"kl__efficiency": lambda i: 0.008 * i}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_symptom_and_its_range_by_hand(name):
    ill, step, healthy = BY_HAND[name]
    found = {each.symptom: each for each in diagnose(entries(**ill))}
    assert found[name].step == step
    assert name not in {each.symptom for each in diagnose(entries(**healthy))}
    line = found[name].in_words()
    assert "\n" not in line and found[name].seen in line and f"docs/health.md#{name}" in line


def test_every_symptom_of_a_log_is_tried_and_every_one_stands_in_the_docs():
    assert set(BY_HAND) == {name for name, symptom in SYMPTOMS.items() if symptom.look is not None}
    docs = Path(__file__).parents[1].joinpath("docs/health.md").read_text(encoding="utf-8")
    for name in SYMPTOMS:
        assert f"\n### {name}\n" in docs


def test_a_healthy_log_has_none_and_each_is_said_once():
    assert diagnose(entries(60)) == []
    found = diagnose(entries(60, beta=0.0, kl__share_of_spread=0.9))
    assert [(each.symptom, each.step) for each in found] == [("no_kl", 15), ("penalty_is_noise", 15)]
    assert Examined(300, found).in_words() == "KL health after 300 steps: 1 alarm: penalty_is_noise; to know: no_kl"
    assert Examined(300, []).in_words() == "KL health after 300 steps: no alarm"


@pytest.mark.parametrize(
    "series",
    [
        {"beta": lambda i: 1.5**i},  # by a schedule: nothing holds a target
        {"beta": lambda i: 0.05 if i < 4 else 1.0, "kl__target_per_token": 0.1},  # once, and then it stood
        {"beta": lambda i: 2.0**i if i < 6 else 60.0 - i, "kl__target_per_token": 0.1},  # up, and down again
        {"grad_norm": lambda i: math.inf if i < 2 else 1.0},  # as float16's scaler has it
    ],
)
def test_what_is_meant_is_no_symptom(series):
    assert diagnose(entries(20, **series)) == []


def test_norms_of_the_gradient_that_stay_infinite_are_one():
    found = diagnose(entries(grad_norm=math.inf))
    assert [(each.symptom, each.step, each.seen) for each in found] == [("not_finite", 15, "grad_norm inf")]


def test_rewards_that_are_all_the_same_are_no_signal_where_the_penalty_breaks_the_ties():
    found = diagnose(entries(reward=1.0, reward_std=0.0, frac_reward_zero_std=0.0))
    assert [(each.symptom, each.step) for each in found] == [("no_signal", 15)]


def test_the_best_estimate_speaks_for_the_others():
    """As `kl` of GRPO, which is k3, beside the exact KL of every other entry."""
    assert diagnose(entries(20, kl__exact_per_token=0.1, kl=lambda i: 40.0 if i % 2 else 0.2)) == []


@pytest.mark.parametrize(
    ("step", "expected"),
    [({"train/global_step": 30, "_step": 3}, 30), ({"_step": 3}, 3), ({"step": 7, "_step": 3}, 7)],
)
def test_an_export_counts_the_trainer_s_steps_where_it_has_them(step, expected):
    assert diagnose([{"train/loss": math.nan} | step])[0].step == expected


def test_evaluations_and_the_last_entry_are_passed_over():
    odd = [{"eval_reward": 1.0, "eval_kl": 99.0, "step": 3}, {"train_runtime": 3.0, "step": 60}]
    assert diagnose([*entries(), *odd]) == []


def test_what_is_learnt_from_given_texts_is_no_collapse():
    log = [{name: value for name, value in entry.items() if name not in ("reward", "kl", "beta")}
           for entry in entries(entropy=lambda i: 1.7 - 0.1 * i)]  # fmt: skip
    assert diagnose(log) == []
