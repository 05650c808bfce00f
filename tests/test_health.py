"""What the callback of health says of a run, and what its command reads."""

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
from conftest import reward
from peft import LoraConfig
from test_symptoms import entries
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, LlamaConfig, OPTConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from kl_alliteration import KLHealthCallback, KLPenalty, KLPenaltyCallback, health
from kl_alliteration._trl import drops
from kl_alliteration.health import Finding, diagnose, examine
from kl_alliteration.health.__main__ import main


def said(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "kl_alliteration.health"]


def test_the_callback_says_what_no_log_shows(make_trainer, caplog, tmp_path):
    trainer = make_trainer(lora=LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]), top_k=5, temperature=0.9)
    with pytest.warns(UserWarning):
        trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("k1", "loss")))
    watching = KLHealthCallback(trainer)
    trainer.add_callback(watching)
    with caplog.at_level(logging.INFO, "kl_alliteration.health"):
        trainer.train()
    lines = said(caplog)
    for name, seen in (
        ("wrong_gradient", "zero: only noise"),
        ("truncated_sampling", "top_k=5; healthy"),
        ("dropout", "q_proj"),
    ):
        assert sum(f"{name}: " in line and seen in line for line in lines) == 1
    assert lines[-1].startswith("KL health after 3 steps: 3 alarms")
    kept = [Finding(**row) for row in json.loads((tmp_path / "health.json").read_text())]
    assert kept == watching.findings and {each.symptom for each in kept} >= {"wrong_gradient", "dropout"}


def test_truncated_sampling_is_no_alarm_for_a_penalty_that_is_exact(make_trainer):
    trainer = make_trainer(top_k=5)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    seen = dict(KLHealthCallback(trainer).look_at_trainer())
    assert seen["truncated_sampling"] is None


@pytest.mark.parametrize(
    ("config", "differ"),
    [
        (BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2), False),
        (FalconConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), False),
        (OPTConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                   word_embed_proj_dim=16, dropout=0.1), True),
        (LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                     attention_dropout=0.1), True),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)  # fmt: skip
def test_dropout_is_seen_where_two_passes_differ(config, differ):
    """After what TRL switches off."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    disable_dropout_in_model(model)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits) is not differ
    assert any(map(drops, model.modules())) is differ


def test_a_start_apart_is_seen_however_seldom_is_logged(make_trainer):
    trainer = make_trainer(max_steps=4, logging_steps=10)
    trainer.add_callback(watching := KLHealthCallback(trainer))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    trainer.train()
    assert [(each.symptom, each.step) for each in watching.findings] == [("starts_apart", 1)]


def test_a_first_text_that_is_no_number_is_named(make_trainer):
    trainer = make_trainer(max_steps=1)
    watching = KLHealthCallback(trainer)
    trainer.add_callback(watching)
    score = watching.seam._score_reference

    def broken(*args, **kwargs):
        scored = score(*args, **kwargs)
        scored[0][3] = math.nan
        return scored

    watching.seam._score_reference = broken
    trainer.train()
    found = watching.findings[0]
    assert found.symptom == "not_finite" and repr(list(trainer._logs["completion"])[3]) in found.seen


def test_a_new_run_in_the_folder_has_nothing_of_the_one_before(make_trainer, tmp_path):
    trainer = make_trainer(beta=0.0)
    trainer.add_callback(KLHealthCallback(trainer))
    trainer.train()
    assert json.loads((tmp_path / "health.json").read_text())
    kept = []

    class Reads(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(json.loads((tmp_path / "health.json").read_text()))

    trainer = make_trainer()
    trainer.add_callback(KLHealthCallback(trainer))
    trainer.add_callback(Reads())
    trainer.train()
    assert kept == [[]] * 3


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_healthy_run_is_silent_and_trains_the_same(make_trainer, caplog, kind, tiny_model, tmp_path):
    def trained(watched: bool):
        trainer = make_trainer(learning_rate=1e-4)
        if kind == "grpo":
            own = {
                name: getattr(trainer.args, name) for name in ("beta", "learning_rate", "num_generations", "max_steps")
            }
            own |= {"per_device_train_batch_size": 8, "max_completion_length": 6, "logging_steps": 1, "use_cpu": True}
            own |= {"report_to": "none", "save_strategy": "no", "bf16": False, "disable_tqdm": True, "seed": 3}
            args = GRPOConfig(str(tmp_path), **own)
            dataset = trainer.train_dataset
            trainer = GRPOTrainer(str(tiny_model), trainer.reward_funcs[0], args=args, train_dataset=dataset)
        if watched:
            trainer.add_callback(KLHealthCallback(trainer))
        trainer.train()
        return trainer.model.state_dict()

    with caplog.at_level(logging.INFO, "kl_alliteration.health"):
        watched = trained(True)
    assert said(caplog) == ["KL health after 3 steps: no alarm"]
    assert all(torch.equal(weight, watched[name]) for name, weight in trained(False).items())


def test_a_script_without_logging_sees_the_lines_and_one_with_it_decides(make_trainer, caplog, capsys, monkeypatch):
    trainer = make_trainer()
    trainer.add_callback(KLHealthCallback(trainer))
    trainer.train()
    assert said(caplog) == [] and "KL health after 3 steps: no alarm\n" in capsys.readouterr().err
    health.tell("an alarm", alarm=True)
    assert said(caplog) == ["an alarm"] and not capsys.readouterr().err  # once
    monkeypatch.setattr(health.logger, "propagate", False)  # as where no handler is set up at all
    health.tell("an alarm", alarm=True)
    assert capsys.readouterr().err == "an alarm\n"
    monkeypatch.undo()
    with caplog.at_level(logging.ERROR, "kl_alliteration.health"):
        health.tell("a note", alarm=False)
    assert said(caplog) == ["an alarm"] and not capsys.readouterr().err


def test_a_spike_comes_with_its_text(make_trainer):
    batches = []

    def remembered(completions, **kwargs):
        batches.append(list(completions))
        return reward(completions)

    trainer = make_trainer(reward_funcs=remembered, max_steps=8, learning_rate=1e-4)
    health = KLHealthCallback(trainer)
    trainer.add_callback(health)
    stock = health.seam._score_reference

    def once_far(*args, **kwargs):
        scored = stock(*args, **kwargs)
        if len(batches) == 6:  # the seventh is rewarded after it is scored
            scored[0][3] -= 5.0  # the fourth text is all but impossible to the reference
        return scored

    health.seam._score_reference = once_far
    trainer.train()
    spike = next(each for each in health.findings if each.symptom == "spike")
    assert spike.step == 7 and spike.seen.endswith(repr(batches[6][3]))


def test_it_goes_on_where_a_checkpoint_was(make_trainer, tmp_path):
    def run(**options):
        trainer = make_trainer(beta=0.0, save_strategy="steps", save_steps=4, max_steps=8, **options)
        trainer.add_callback(health := KLHealthCallback(trainer))
        return trainer, health

    trainer, health = run()
    trainer.train()
    assert [(each.symptom, each.step) for each in health.findings] == [("no_kl", 0)]
    trainer, health = run()
    found = json.loads((tmp_path / "health.json").read_text())
    found.append({"symptom": "collapse", "step": 7, "seen": "after the checkpoint"})
    (tmp_path / "health.json").write_text(json.dumps(found))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [(each.symptom, each.step) for each in health.findings] == [("no_kl", 0)]
    assert len(health.log.values["reward"]) == 8


@pytest.fixture
def command(monkeypatch, capsys):
    """`python -m kl_alliteration.health` in this process: its status and what it wrote."""

    def run(*paths):
        monkeypatch.setattr(sys, "argv", ["health", *map(str, paths)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


def test_the_command_reads_runs_that_knew_nothing_of_this_package(tmp_path, command):
    healthy, ill = tmp_path / "healthy", tmp_path / "ill/checkpoint-60"
    healthy.mkdir()
    ill.mkdir(parents=True)
    lines = [json.dumps({f"train/{k}" if k != "step" else k: v for k, v in e.items()}) for e in entries()]
    (healthy / "metrics.jsonl").write_text("\n".join([*lines, '{"reward": 3']))  # a line that is being written
    (ill / "trainer_state.json").write_text(json.dumps({"log_history": entries(kl=2.0)}))
    words = [sys.executable, "-m", "kl_alliteration.health", str(healthy)]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.endswith("KL health after 60 steps: no alarm\n")
    assert command(healthy) == (0, found.stdout, "")
    status, said, _ = command(healthy, tmp_path / "ill")
    assert status == 1 and "explodes: kl 2 nats per token" in said
    assert command(ill / "trainer_state.json")[0] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no"),
        ({}, r"holds no metrics.jsonl.*trainer.save_state\(\)"),
        ({"metrics.jsonl": '{"acc": 1}\n'}, "no entry with a loss"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(tmp_path, command, content, message):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        examine(folder)
    status, out, err = command(folder)
    assert status == 2 and len(err.splitlines()) == 1 and not out


def test_odd_folders_and_entries_are_read_as_far_as_they_can_be(tmp_path, command):
    run = tmp_path / "run"
    for name, kl, step in (("checkpoint-20", 2.0, 20), ("checkpoint-9", 0.1, 9), ("", 0.1, 12), ("other", 0.1, 30)):
        (run / name).mkdir(parents=True, exist_ok=True)
        state = {"global_step": step, "log_history": entries(kl=kl)}
        (run / name / "trainer_state.json").write_text(json.dumps(state))
    assert "explodes" in command(run)[1]  # the furthest, though the root's was saved last
    odd = tmp_path / "odd"
    odd.mkdir()
    for log in (None, "none", [None, 3]):
        (odd / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        status, _, err = command(odd)
        assert status == 2 and "holds no entry with a loss" in err
    for step in (None, "3.0", math.inf):
        found = diagnose([entry | {"step": step} for entry in entries(kl=0.005)])
        assert found == []
