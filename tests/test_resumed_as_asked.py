"""What is resumed is what is asked for, and a checkpoint that is announced is there."""

import copy
import re
from pathlib import Path

import pytest
from transformers import TrainerCallback

from kl_alliteration import CollapseGuardCallback, CollapseLimits, KLControlCallback
from kl_alliteration.control import LogPIRule, ProportionalRule, StepRule
from kl_alliteration.kl import KLWarning

SAVES = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}


class AtTheStart(TrainerCallback):
    """The rule and beta as they are when training begins."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_begin(self, args, state, control, **kwargs):
        self.rule, self.beta = copy.deepcopy(self.callback.controller), self.callback.trainer.beta


def controlled(make_trainer, rule, **options) -> KLControlCallback:
    trainer = make_trainer(**SAVES | options)
    callback = KLControlCallback(trainer, rule)
    trainer.add_callback(callback)
    callback.began = AtTheStart(callback)
    trainer.add_callback(callback.began)
    return callback


def checkpoint_of(callback) -> str:
    return str(Path(callback.trainer.args.output_dir) / "checkpoint-2")


def test_a_rule_goes_on_from_its_state_towards_the_target_that_is_asked_now(make_trainer):
    first = controlled(make_trainer, LogPIRule(0.1, target_kl_per_token=0.15), max_steps=2)
    first.trainer.train()
    then = vars(first.controller).copy()
    assert then["value"] != 0.1 and then["error_sum"] != 0
    rule = LogPIRule(0.1, target_kl_per_token=0.01, integral=0.5)
    callback = controlled(make_trainer, rule, max_steps=2)
    with pytest.warns(KLWarning, match=r"target_kl_per_token 0.01 in place of 0.15, integral 0.5 in place of 0.02"):
        callback.trainer.train(resume_from_checkpoint=checkpoint_of(first))
    expected = then | {"target_kl_per_token": 0.01, "integral": 0.5}
    assert vars(callback.began.rule) == expected and callback.began.beta == then["value"]


def test_another_rule_takes_over_beta_and_nothing_else(make_trainer):
    first = controlled(make_trainer, LogPIRule(0.1, target_kl_per_token=0.15), max_steps=2)
    first.trainer.train()
    callback = controlled(make_trainer, ProportionalRule(0.7, 0.2), max_steps=2)
    with pytest.warns(KLWarning, match="written under LogPIRule: ProportionalRule goes on from its beta"):
        callback.trainer.train(resume_from_checkpoint=checkpoint_of(first))
    assert callback.began.rule == ProportionalRule(first.controller.value, 0.2)


def test_the_same_rule_resumes_without_a_word(make_trainer, recwarn):
    first = controlled(make_trainer, StepRule(0.1, 1e-9), max_steps=2)
    first.trainer.train()
    callback = controlled(make_trainer, StepRule(0.1, 1e-9), max_steps=2)
    callback.trainer.train(resume_from_checkpoint=checkpoint_of(first))
    assert callback.began.beta == first.controller.value != 0.1
    assert not [w for w in recwarn if w.category is KLWarning]


class BrokenFrom(CollapseLimits):
    """Every batch from a step on is a collapse."""

    def broken(self, seen):
        return [] if self.trainer.state.global_step < self.step else ["different_share 0 (limit 1)"]


def guarded(make_trainer, step: int, **options) -> CollapseGuardCallback:
    trainer = make_trainer(save_strategy="steps", save_steps=1, save_total_limit=1, **options)
    limits = BrokenFrom()
    limits.trainer, limits.step = trainer, step
    guard = CollapseGuardCallback(trainer, limits=limits, smoothing=1, action="warn")
    trainer.add_callback(guard)
    return guard


def test_the_good_checkpoint_that_is_announced_outlives_later_ones(make_trainer):
    guard = guarded(make_trainer, step=3, max_steps=6)
    with pytest.warns(KLWarning, match="collapse at step 3") as said:
        guard.trainer.train()
    (announced,) = [m for w in said if (m := re.search(r"checkpoint is (.*)", str(w.message)))]
    assert announced[1] == guard.last_good and Path(guard.last_good).name == "checkpoint-2"
    assert {p.name for p in Path(guard.last_good).parent.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}


def test_a_good_checkpoint_that_is_gone_is_not_announced(make_trainer):
    guard = guarded(make_trainer, step=3, max_steps=4)
    guard.trainer.args.metric_for_best_model = "loss"  # then somebody else says what is best
    guard.on_save_before = guard.on_save

    def on_save(args, state, control, **kwargs):
        state.best_model_checkpoint = None
        guard.on_save_before(args, state, control, **kwargs)
        if state.global_step == 2:
            guard.last_good = str(Path(args.output_dir) / "checkpoint-1")  # rotated away by now

    guard.on_save = on_save
    with pytest.warns(KLWarning, match="there is no good checkpoint"):
        guard.trainer.train()
    assert guard.last_good is None


def test_rollback_finds_its_checkpoint_where_only_one_is_kept(make_trainer):
    guard = guarded(make_trainer, step=3, max_steps=4)
    guard.action, calls = "rollback", []
    healthy = guard.limits.broken

    def broken(seen):  # collapsed the first time only
        found = healthy(seen) if guard.factor == 1 else []
        calls.append(bool(found))
        return found

    guard.limits.broken = broken
    with pytest.warns(KLWarning, match="collapse at step 3.*checkpoint-2"):
        guard.train()
    assert guard.trainer.state.global_step == 4 and guard.factor == 2.0 and any(calls)
