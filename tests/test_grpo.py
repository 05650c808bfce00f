"""On a stock GRPOTrainer the callbacks look on, steer beta and judge, while the penalty is GRPO's own."""

import pytest
import torch
from conftest import TINY_RUN, reward
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from kl_alliteration import (
    CollapseGuardCallback,
    KLControlCallback,
    KLMonitorCallback,
    ReferenceCallback,
)
from kl_alliteration.control import LogPIRule

OURS = ("kl/", "guard/")
TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "profiling")


@pytest.fixture
def make_grpo(tiny_model, tmp_path):
    def make(lora=False, **options):
        defaults = TINY_RUN | {"output_dir": str(tmp_path), "beta": 0.3, "max_steps": 4}
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, task_type="CAUSAL_LM")
        return GRPOTrainer(
            model=str(tiny_model),
            reward_funcs=reward,
            args=GRPOConfig(**defaults | options),
            train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 8}),
            peft_config=config if lora is True else lora or None,
        )

    return make


def history(trainer) -> list[dict]:
    trainer.train()
    return [{k: v for k, v in e.items() if not k.startswith(TIMES)} for e in trainer.state.log_history]


CASES = {"full": {}, "lora": {"lora": True}, "off-policy": {"num_iterations": 2}, "beta-zero": {"beta": 0.0}}


@pytest.mark.parametrize("case", CASES)
def test_watching_changes_nothing_bit_for_bit(make_grpo, case):
    stock = make_grpo(**CASES[case])
    expected = history(stock)
    watched = make_grpo(**CASES[case])
    watched.add_callback(KLMonitorCallback(watched, exact=True))
    watched.add_callback(CollapseGuardCallback(watched, "warn"))
    found = history(watched)
    assert [{k: v for k, v in e.items() if not k.startswith(OURS)} for e in found] == expected
    assert all(map(torch.equal, watched.model.parameters(), stock.model.parameters()))
    assert ("kl/k1_per_token" in found[0]) == (case != "beta-zero") and "guard/distinct_2" in found[0]


def test_the_monitor_s_k3_is_the_kl_of_grpo_s_own_loss(make_grpo):
    trainer = make_grpo()
    trainer.add_callback(KLMonitorCallback(trainer))
    entries = [e for e in history(trainer) if "kl" in e]
    assert [e["kl/k3_per_token"] for e in entries] == pytest.approx([e["kl"] for e in entries], rel=1e-5, abs=1e-9)
    assert entries[-1]["kl"] > 1e-4


def test_a_rule_moves_the_beta_that_the_loss_reads(make_grpo):
    losses = {}
    for start in (0.1, 30.0):
        trainer = make_grpo()
        trainer.add_callback(KLControlCallback(trainer, LogPIRule(start, target_kl_per_token=0.01)))
        entries = [e for e in history(trainer) if "loss" in e]
        losses[start] = [e["loss"] for e in entries]
        assert trainer.beta != start
    assert losses[0.1][0] == losses[30.0][0]  # at the reference the penalty is 0
    assert losses[0.1][1] != losses[30.0][1]


def test_a_reference_adapter(make_grpo):
    trainer = make_grpo(lora=True)
    trainer.add_callback(KLMonitorCallback(trainer))
    trainer.add_callback(ReferenceCallback(trainer))
    entries = [e for e in history(trainer) if "kl" in e]
    for entry in entries:
        assert entry["kl/base_per_token"] == pytest.approx(entry["kl/k1_per_token"], abs=1e-6)
