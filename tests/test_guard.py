import json

import pytest
import torch
from transformers import TrainerCallback

from kl_alliteration import CollapseGuardCallback, CollapseLimits, KLControlCallback, control
from kl_alliteration._trl import seam_of
from kl_alliteration.kl import KLWarning

ALWAYS = CollapseLimits(different_share=1.1)  # no batch reaches it


def test_limits_by_hand():
    limits = CollapseLimits(different_share=0.7, distinct_2=None, compression_ratio=6.0, kl_per_sequence=20.0)
    seen = {"different_share": 0.6, "distinct_2": 0.0, "compression_ratio": 9.0, "kl_per_sequence": 19.0}
    assert limits.broken(seen) == ["different_share 0.6 (limit 0.7)", "compression_ratio 9 (limit 6)"]


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_it_stops_after_as_many_batches_as_it_smooths_over(make_trainer, beta):
    trainer = make_trainer(beta=beta, max_steps=6)
    guard = CollapseGuardCallback(trainer, limits=ALWAYS, smoothing=2)
    trainer.add_callback(guard)
    with pytest.warns(KLWarning, match="collapse at step 2: different_share .*; there is no good checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 2 and guard.collapse.startswith("step 2")
    logged = [e for e in trainer.state.log_history if "guard/different_share" in e]
    assert ("guard/kl_per_sequence" in logged[-1]) == (beta != 0)


def test_it_warns_once_and_goes_on(make_trainer):
    trainer = make_trainer(max_steps=6)
    trainer.add_callback(CollapseGuardCallback(trainer, action="warn", limits=ALWAYS))
    with pytest.warns(KLWarning, match="collapse at step 2") as caught:
        trainer.train()
    assert trainer.state.global_step == 6 and sum("collapse" in str(w.message) for w in caught) == 1


def test_warning_alone_takes_nobody_s_stop_back(make_trainer):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = make_trainer(max_steps=6)
    trainer.add_callback(Stops())
    trainer.add_callback(CollapseGuardCallback(trainer, action="warn", limits=ALWAYS))
    with pytest.warns(KLWarning, match="collapse at step 2"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("logging_steps", [1, 2, 5])
def test_the_entropy_is_that_of_the_update_before_whatever_is_logged_in_between(make_trainer, logging_steps):
    trainer = make_trainer(max_steps=6, logging_steps=logging_steps)
    none = dict.fromkeys(("different_share", "distinct_2_left", "compression_ratio"))
    guard = CollapseGuardCallback(trainer, limits=CollapseLimits(**none, entropy_per_token=100.0), smoothing=2)
    trainer.add_callback(guard)
    with pytest.warns(
        KLWarning, match="collapse at step 3: entropy_per_token"
    ):  # the first batch has no update before
        trainer.train()
    assert trainer.state.global_step == 3


def test_what_it_sees_is_of_the_batch(make_trainer):
    trainer = make_trainer(max_steps=3)
    guard = CollapseGuardCallback(trainer, smoothing=1)
    trainer.add_callback(guard)
    trainer.train()
    texts = list(trainer._logs["completion"])
    assert guard.mean()["different_share"] == len(set(texts)) / 8
    rewards = torch.tensor(list(trainer._logs["rewards"]["reward"]))
    assert guard.mean()["reward_std"] == pytest.approx(rewards.std(correction=0).item())


def test_variety_is_measured_against_the_first_batch_of_the_run_over_a_resumption_too(make_trainer, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(**options)
    guard = CollapseGuardCallback(first, "warn", smoothing=1)
    first.add_callback(guard)
    first.train()
    shares = [e["guard/distinct_2_left"] for e in first.state.log_history if "guard/distinct_2_left" in e]
    values = [e["guard/distinct_2"] for e in first.state.log_history if "guard/distinct_2" in e]
    assert shares == pytest.approx([1.0, values[1] / values[0]])
    resumed = make_trainer(**options | {"max_steps": 3})
    again = CollapseGuardCallback(resumed, "warn", smoothing=1)
    resumed.add_callback(again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.first_distinct_2 == guard.first_distinct_2


class AfterStep(CollapseLimits):
    """Broken once, after a given number of looks."""

    def broken(self, seen):
        self.looks = getattr(self, "looks", 0) + 1
        return ["made up"] if self.looks == 8 else []


def test_rollback_goes_on_from_the_last_good_checkpoint_with_a_stronger_penalty(make_trainer, tmp_path):
    """Optimizer, schedule, random state and rule: bit for bit what a new trainer resumed with that beta does."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}

    def make(name, **more):
        trainer = make_trainer(output_dir=str(tmp_path / name), **options | more)
        rule = control.ProportionalRule(0.5, target_kl_per_token=0.01, horizon=400)
        trainer.add_callback(KLControlCallback(trainer, rule))
        return trainer, rule

    trainer, rule = make("guarded")
    guard = CollapseGuardCallback(trainer, "rollback", AfterStep(), smoothing=1, stronger=3.0)
    trainer.add_callback(guard)
    with pytest.warns(KLWarning, match="made up; the last good checkpoint is .*checkpoint-4"):
        guard.train()
    assert trainer.state.global_step == 8 and guard.rollbacks == 2

    folder = tmp_path / "guarded" / "checkpoint-4"
    saved = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]
    expected, expected_rule = make("expected", save_strategy="no")

    class Stronger(CollapseGuardCallback):
        def observe(self, rollout):
            pass

    again = Stronger(expected, "warn")
    again.factor = 3.0
    expected.add_callback(again)
    expected.train(resume_from_checkpoint=str(folder))
    assert saved["kl_alliteration.KLControl"]["attributes"]["value"] != rule.value
    assert rule == expected_rule and trainer.beta == expected.beta
    for a, b in zip(trainer.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_wrong_use_is_refused(make_trainer):
    with pytest.raises(ValueError, match="action must be one of warn, stop, rollback, got 'pray'"):
        CollapseGuardCallback(make_trainer(), "pray")
    with pytest.raises(ValueError, match="needs checkpoints: set save_strategy"):
        CollapseGuardCallback(make_trainer(), "rollback")


def test_a_resumed_guard_goes_on_with_the_batches_before(make_trainer, tmp_path):
    def run(folder, checkpoint=None):
        trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / folder))
        trainer.add_callback(CollapseGuardCallback(trainer, "warn", smoothing=3))
        trainer.train(resume_from_checkpoint=checkpoint)
        entries = [e for e in trainer.state.log_history if e.get("step", 0) > 2 and "kl" in e]
        return [{k: v for k, v in e.items() if k.startswith("guard/")} for e in entries]

    whole = run("whole")
    assert len(whole) == 2 and whole[0] and run("half", str(tmp_path / "whole/checkpoint-2")) == whole


@pytest.mark.parametrize("first", ["guard", "rule"])
@pytest.mark.parametrize("kind", ["pi", "schedule", "none"])
def test_a_stronger_penalty_stays(make_trainer, kind, first):
    """Whatever rule makes beta anew at each step, in whatever order the callbacks came; once, not each time."""

    def run(factor):
        trainer, betas = make_trainer(max_steps=3), []
        guard = CollapseGuardCallback(trainer, "warn")
        guard.factor = factor
        rule = {"pi": lambda: control.LogPIRule(0.5, 1e3), "schedule": lambda: control.Schedule(0.5, 0.1, 24)}.get(
            kind
        )
        callbacks = [guard, *([KLControlCallback(trainer, rule())] if rule else [])]
        for callback in callbacks if first == "guard" else callbacks[::-1]:
            trainer.add_callback(callback)
        seam_of(trainer).observers.append(lambda rollout: betas.append(trainer.beta))
        trainer.train()
        trainer.train()
        return betas

    plain = run(1.0)
    assert run(3.0) == pytest.approx([3 * beta for beta in plain]) and len(plain) == 6


def test_another_process_goes_on_with_the_stronger_penalty(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(max_steps=2, **options)
    guard = CollapseGuardCallback(trainer, "rollback", rollbacks=3)
    guard.factor, guard.rollbacks = 4.0, 1  # as after two
    trainer.add_callback(guard)
    trainer.train()
    resumed = make_trainer(max_steps=3, **options)
    again = CollapseGuardCallback(resumed, "rollback", rollbacks=3)
    resumed.add_callback(again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (resumed.beta, again.factor, again.rollbacks) == (2.0, 4.0, 1)  # 4 times 0.5
