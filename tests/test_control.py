"""Controllers: hand-worked steps, step responses on a simulated plant, and the callback on a stock trainer."""

import json
import math

import pytest

from kl_alliteration import KLControlCallback, control
from kl_alliteration._trl import seam_of


def test_the_study_s_rule_by_hand():
    rule = control.StepRule(1.0, target_kl_per_token=0.1)
    assert rule.update(0.16, 10) == pytest.approx(1.1)  # above 0.15
    assert rule.update(0.14, 10) == pytest.approx(1.1)  # in between
    assert rule.update(0.04, 10) == pytest.approx(0.99)  # below 0.05


def test_ppo_s_rule_by_hand():
    rule = control.ppo_rule(1.0, target_kl_per_token=0.3)
    assert [rule.update(kl, 10) for kl in (0.46, 0.3, 0.19, 0.21)] == [2.0, 2.0, 1.0, 1.0]


def test_ziegler_s_rule_by_hand():
    rule = control.ProportionalRule(1.0, target_kl_per_token=0.1, horizon=1000)
    assert rule.update(0.11, 100) == pytest.approx(1.01)  # + 0.1 * 100 / 1000
    assert rule.update(10.0, 100) == pytest.approx(1.01 * 1.02)  # clipped to 0.2
    assert rule.update(0.0, 100) == pytest.approx(1.01 * 1.02 * 0.98)


def test_its_usual_horizon_moves_beta_by_4_percent_in_200_updates():
    rule = control.ProportionalRule(1.0, target_kl_per_token=0.1)
    for _ in range(200):
        rule.update(1.0, 10)
    assert rule.value == pytest.approx(1.04, abs=2e-3)


def test_pi_by_hand():
    rule = control.LogPIRule(1.0, 0.1, proportional=0.5, integral=0.1, smoothing=0.5)
    assert rule.update(0.15, 10) == pytest.approx(math.exp(0.5 * 0.5 + 0.1 * 0.5))
    # smoothed (0.15 + 0.05) / 2 = 0.1: no error, the sum stays at 0.5
    assert rule.update(0.05, 10) == pytest.approx(math.exp(0.1 * 0.5))


def test_pi_waits_far_below_its_target():
    """50 steps without any KL count as 50 errors of 0.2, not of 1: log beta = 2 * -0.2 + 0.02 * -10."""
    rule = control.LogPIRule(1.0, 0.1)
    for _ in range(50):
        rule.update(0.0, 40)
    assert rule.value == pytest.approx(math.exp(-0.6))


def test_pi_does_not_wind_up():
    """A long time at the bound costs no more steps to leave than a short one."""
    rules = []
    for steps in (20, 2000):
        rule = control.LogPIRule(1.0, 0.1, proportional=0.5, integral=0.2, smoothing=0.0, largest=3.0)
        for _ in range(steps):
            rule.update(1.0, 10)
        assert rule.value == pytest.approx(3.0)
        rules.append(rule.update(0.0, 10))
    assert rules[0] == pytest.approx(rules[1]) and rules[0] < 3.0


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.55), ("cosine", 0.55)], ids=["linear", "cosine"])
def test_schedules_by_hand(shape, half):
    rule = control.Schedule(1.0, 0.1, total_generations=1200, shape=shape, warmup_generations=200)
    assert rule.value == pytest.approx(0.01)
    assert rule.update(0.0, 100) == pytest.approx(0.5)
    assert rule.update(0.0, 100) == pytest.approx(1.0)
    quarter = 0.775 if shape == "linear" else 1.0 - 0.9 * (1 - math.sqrt(0.5)) / 2
    assert rule.update(0.0, 250) == pytest.approx(quarter)
    assert rule.update(0.0, 250) == pytest.approx(half)
    assert rule.update(0.0, 900) == pytest.approx(0.1)


def plant(rule, steps: int = 3000) -> list[float]:
    """KL per token that lags behind a tilted optimum's: k = 0.1 / beta, a twentieth of the way a step."""
    kl, trace = 0.0, []
    for _ in range(steps):
        kl += (0.1 / rule.value - kl) / 20
        rule.update(kl, 40)
        trace.append(kl)
    return trace


@pytest.mark.parametrize("start", [0.05, 5.0], ids=["too cheap", "too dear"])
@pytest.mark.parametrize("name", ["step", "ppo", "ziegler", "pi"])
def test_step_response(name, start):
    """From either side every rule comes to its target's band, and beta to what the plant needs there."""
    target = 0.15
    rule = {
        "step": lambda: control.StepRule(start, target),
        "ppo": lambda: control.ppo_rule(start, target),
        "ziegler": lambda: control.ProportionalRule(start, target, horizon=2000),
        "pi": lambda: control.LogPIRule(start, target),
    }[name]()
    trace = plant(rule)
    held = trace[-500:]
    low, high = {"step": (0.5, 1.5), "ppo": (0.4, 2.6), "ziegler": (0.95, 1.05), "pi": (0.95, 1.05)}[name]
    assert low * target <= min(held) and max(held) <= high * target


def test_a_flipped_sign_would_be_seen():
    rule = control.LogPIRule(1.0, 0.15, proportional=-0.3, integral=-0.01)
    assert not 0.14 < plant(rule)[-1] < 0.16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: control.StepRule(0.0, 0.1), "beta must be > 0"),
        (lambda: control.ProportionalRule(1.0, -0.1), "target_kl_per_token must be > 0"),
        (lambda: control.StepRule(1.0, 0.1, up=0.9), "up > 1"),
        (lambda: control.LogPIRule(1e9, 0.1), "beta must lie within"),
        (lambda: control.Schedule(1.0, 0.1, 100, shape="steps"), "shape must be linear or cosine"),
    ],
)
def test_wrong_rules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_beta_moves_after_every_step_whatever_the_logging(make_trainer):
    seen = []
    for logging_steps in (1, 100):
        trainer = make_trainer(max_steps=4, logging_steps=logging_steps)
        rule = control.ProportionalRule(0.5, target_kl_per_token=0.01, horizon=40)
        trainer.add_callback(KLControlCallback(trainer, rule))
        trainer.train()
        seen.append(trainer.beta)
    assert seen[0] == seen[1] != 0.5


def test_once_for_each_generation_batch(make_trainer):
    """With two iterations on a batch, 4 steps are 2 batches of 8 completions."""
    calls, betas = [], []

    class Watched(control.FixedBeta):
        def update(self, kl_per_token, generations):
            calls.append(generations)
            self.value += 0.1
            return self.value

    trainer = make_trainer(max_steps=4, num_iterations=2)
    trainer.add_callback(KLControlCallback(trainer, Watched(0.3), kl_estimator="exact"))
    loss = trainer._compute_loss
    trainer._compute_loss = lambda *asked: (betas.append(trainer.beta), loss(*asked))[1]
    trainer.train()
    assert calls == [8, 8] and betas == pytest.approx([0.3, 0.3, 0.4, 0.4]) and trainer.beta == pytest.approx(0.5)


def test_all_batches_of_a_step_are_one_update(make_trainer):
    """Four batches of 8 a step: their KL pooled over tokens, and all of their completions."""
    told, sampled = [], []

    class Watched(control.FixedBeta):
        def update(self, kl_per_token, generations):
            told.append((kl_per_token, generations))
            return self.value

    trainer = make_trainer(max_steps=2, gradient_accumulation_steps=4, steps_per_generation=1, learning_rate=0.1)
    trainer.add_callback(KLControlCallback(trainer, Watched(0.3)))
    seam_of(trainer).observers.append(
        lambda rollout: sampled.append(((rollout.ref_log_ratio * rollout.completion_mask).sum().item(),
                                        rollout.completion_mask.sum().item()))
    )  # fmt: skip
    trainer.train()
    pooled = [
        (sum(kl for kl, _ in some) / sum(tokens for _, tokens in some), 32) for some in (sampled[:4], sampled[4:])
    ]
    assert [generations for _, generations in told] == [32, 32] and len(sampled) == 8
    assert [kl for kl, _ in told] == pytest.approx([kl for kl, _ in pooled], rel=1e-4) and told[1][0] > 0


def test_beta_zero_is_refused_with_the_reason(make_trainer):
    with pytest.raises(ValueError, match="beta must not be 0 at the start .* no reference"):
        KLControlCallback(make_trainer(beta=0.0), control.FixedBeta(0.0))


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("stop", [2, 5])
def test_interrupted_and_resumed_equals_uninterrupted(make_trainer, tmp_path, stop, restore):
    def make(**options):
        trainer = make_trainer(max_steps=6, restore_callback_states_from_checkpoint=restore, **options)
        rule = control.LogPIRule(0.5, target_kl_per_token=0.01, integral=0.2)
        trainer.add_callback(KLControlCallback(trainer, rule))
        return trainer, rule

    whole, expected = make(save_strategy="steps", save_steps=stop, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed, rule = make(output_dir=str(tmp_path / "resumed"))
    folder = tmp_path / "whole" / f"checkpoint-{stop}"
    assert "kl_alliteration.KLControl" in json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]
    resumed.train(resume_from_checkpoint=str(folder))
    assert rule == expected and resumed.beta == whole.beta == rule.value
