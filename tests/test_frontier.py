"""The base's own rewards beside a run: which file is its own, and the efficiency that is read from it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl import ModelConfig, RLOOConfig

from kl_alliteration import Judgement
from kl_alliteration._trl import seam_of
from kl_alliteration.lab.frontier import (
    EfficiencyCallback,
    efficiency_of,
    one_curve,
    read_base_rewards,
    reference_stays,
)
from kl_alliteration.lab.options import ALLITERATION, OnlineArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe
from kl_alliteration.story_lm import MODEL_PATH, PROMPT
from kl_alliteration.yardsticks import least_kl_at

SAMPLED = {"reward_func": ALLITERATION, "prompt": PROMPT, "temperature": 1.0, "max_new_tokens": 100}


def read(model=MODEL_PATH, **changed):
    args = {"base_frontier": None, "reward_funcs": [ALLITERATION], "reward_model_name_or_path": None}
    args |= {"dataset_name": None, "prompt": PROMPT, "temperature": 1.0, "max_completion_length": 100}
    args |= {"adapter_name_or_path": None, "kl_reference": "start", "top_p": 1.0, "top_k": 0, "min_p": None}
    args = SimpleNamespace(**args | changed)
    return read_base_rewards(args, args, str(model))


def judged(reward: float, kl: float, ratios: list[float]) -> Judgement:
    numbers = dict.fromkeys(Judgement.__dataclass_fields__, 0.0) | {"exact_kl_per_sequence": kl}
    return Judgement(**numbers | {"rewards": [reward] * len(ratios), "ref_log_ratios": ratios})


def test_the_embedded_model_brings_its_own():
    rewards = read()
    assert rewards.shape == (1, 120_000) and rewards.mean().item() == pytest.approx(4.28, abs=0.05)


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.7},
        {"max_completion_length": 48},
        {"reward_funcs": ["mine.reward"]},
        {"reward_funcs": [ALLITERATION, ALLITERATION]},
        {"reward_weights": [2.0]},
        {"reward_model_name_or_path": "a/model"},
        {"prompt": "There was"},
        {"dataset_name": "prompts.jsonl"},
        {"adapter_name_or_path": "runs/adapter"},
        {"kl_reference": "reset"},
        {"kl_reference": "another/model"},
        {"sync_ref_model": True},
        {"top_p": 0.5},
        {"repetition_penalty": 1.3},
        {"reward_clip_range": (0.0, 5.0)},
    ],
    ids=str,
)
def test_a_run_of_another_kind_has_none_of_it(tmp_path, changed):
    tiny = tmp_path / "tiny"
    assert read(**changed) is None and read(model=tiny) is None
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps({"model": "Tiny", "sampled": SAMPLED, "rewards": [[0, 1]]}))
    named = read(model=tiny, base_frontier=str(path))
    assert named.tolist() == [[0, 1]] and named.is_floating_point()
    with pytest.raises(ValueError, match="^base_frontier: "):
        read(model=tiny, base_frontier=str(path), **changed)
    with pytest.raises(ValueError, match="has model 'tiny', the run has 'model'"):
        read(base_frontier=str(path))
    of_data = SAMPLED | {"prompt": None, "dataset_name": "mine.jsonl"}
    path.write_text(json.dumps({"model": "Tiny", "sampled": of_data, "rewards": [[0, 1]]}))
    assert read(model=tiny, base_frontier=str(path), dataset_name="mine.jsonl") is not None
    with pytest.raises(ValueError, match="has dataset_name 'mine.jsonl', the run has 'yours.jsonl'"):
        read(model=tiny, base_frontier=str(path), dataset_name="yours.jsonl")


def test_from_the_base_an_adapter_that_goes_on_has_the_base_s(tmp_path):
    for reference in ("base", "loaded"):
        assert read(adapter_name_or_path="runs/adapter", kl_reference=reference) is not None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sampled": {}}', '{"sampled": {}, "rewards": [["a"]]}', None])
def test_what_is_no_frontier_is_named(tmp_path, content):
    path = tmp_path / "frontier.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="base_frontier: .* is no frontier.json of recipes/best_of_n.py"):
        read(base_frontier=str(path))


def test_efficiency_is_the_least_over_the_spent():
    rewards = read()
    least = least_kl_at(rewards, reward=9.0)["kl_per_sequence"]
    before, after = judged(4.3, 0.0, [0.0] * 4), judged(9.0, 4.0, [4.0] * 4)
    assert efficiency_of(before, after, rewards) == pytest.approx(least / 4) and 1 < least < 2.25
    assert efficiency_of(judged(4.3, 3.0, [3.0] * 4), after, rewards) is None  # it did not begin at its reference
    assert efficiency_of(before, judged(15.9, 9.0, [9.0] * 4), rewards) is None  # nobody has seen that
    assert efficiency_of(before, after, None) is None


def test_the_log_has_the_efficiency_of_the_last_completions(make_trainer, monkeypatch):
    """What `efficiency` says of the window, and nothing where it says nothing."""
    asked = []

    def known(ref_rewards, rewards, ratios, spent, one_prompt):
        assert one_prompt
        asked.append((rewards.tolist(), ratios.tolist(), spent))
        return None if len(asked) == 1 else 0.5

    monkeypatch.setattr("kl_alliteration.lab.frontier.efficiency", known)
    trainer = make_trainer(max_steps=3, logging_steps=1, learning_rate=1e-2)
    told = []
    seam_of(trainer).observers.append(
        lambda rollout: told.extend((rollout.ref_log_ratio * rollout.completion_mask).sum(-1).tolist())
    )
    trainer.add_callback(EfficiencyCallback(trainer, torch.rand(1, 100), window=16))
    trainer.train()
    logs = trainer.state.log_history
    assert [log.get("kl/efficiency") for log in logs[:3]] == [None, 0.5, 0.5]
    assert [ratios for _, ratios, _ in asked] == [told[:8], told[:16], told[8:24]]
    for (rewards, ratios, spent), log in zip(asked, logs, strict=False):
        assert spent == pytest.approx(sum(ratios) / len(ratios))
        assert sum(rewards[-8:]) / 8 == pytest.approx(log["reward"], rel=1e-4)


def test_prompts_with_few_samples_each_are_one_curve():
    rewards = torch.tensor([[0.0, 1.0], [5.0, 6.0]]).repeat(4, 1)
    together = one_curve(rewards, mean=20.0)
    assert together.shape == (1, 16) and together.mean().item() == pytest.approx(20)
    assert together.std(correction=0).item() == pytest.approx(
        0.5 * math.sqrt(2)
    )  # less the mean of two: a half is left
    many = torch.rand(2, 1000)
    assert one_curve(many, 20.0) is many and one_curve(rewards[:1], 20.0).shape == (1, 2)


def test_of_many_prompts_the_policy_s_own_samples_say_nothing():
    """A tilt of prompts whose means differ: its rewards' spread is mostly not to be bought, and the base is blind."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, 8, generator=generator) + 3 * torch.randn(20, 1, generator=generator)
    before, after = judged(0.0, 0.0, [0.0] * 4), judged(4.0, 8.0, [8.0] * 4)
    rewards = 4.0 + 3 * torch.randn(4000, generator=generator, dtype=torch.float64)
    after = replace(after, rewards=rewards.tolist(), ref_log_ratios=[8.0] * 4000)
    assert efficiency_of(before, after, base) is None
    assert efficiency_of(before, after, base[:1]) is not None  # of one prompt they would


@pytest.mark.parametrize(("options", "stays"), [([], True), (["--kl_reference", "reset", "--use_peft"], False)])
def test_no_efficiency_where_the_reference_moves(options, stays):
    path = Path(__file__).parents[1] / "recipes/rloo_tall_tree.yaml"
    parser = RecipeParser((OnlineArguments, RLOOConfig, ModelConfig), defaults=path)
    args, training_args, _ = parse_recipe(parser, [*options, "--report_to", "none"])
    assert reference_stays(args, training_args) is stays
