"""Symptoms by hand: a log that has each, and the same log just within the range; the callback and the command."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import reward
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, LlamaConfig, OPTConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from kl_alliteration import KLHealthCallback, KLPenalty, KLPenaltyCallback, health
from kl_alliteration._trl import drops
from kl_alliteration.health import SYMPTOMS, Examined, Finding, diagnose, examine
from kl_alliteration.health.__main__ import main


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


def test_what_is_learnt_from_given_texts_is_no_collapse():
    log = [{name: value for name, value in entry.items() if name not in ("reward", "kl", "beta")}
           for entry in entries(entropy=lambda i: 1.7 - 0.1 * i)]  # fmt: skip
    assert diagnose(log) == []
