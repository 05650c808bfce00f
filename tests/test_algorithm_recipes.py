"""GRPO, DPO and all algorithms beside each other, as a person runs them."""

import json
import os

import pytest
import yaml
from programs import ROOT, fork_ranks, run
from test_recipe_refusals import refusal
from test_recipes import SMALL, lines

from kl_alliteration.lab.judging import judge_run

TINY = [*SMALL[:-2], "--report_to", "none", "--disable_tqdm", "true"]
DPO = "dpo_tall_tree.py"
FEW = (
    "--pairs 12 --group_size 4 --pairs_per_group 1 --max_completion_length 12 --per_device_train_batch_size 4".split()
)


def test_grpo(tmp_path):
    group = "--num_generations", "4", "--per_device_train_batch_size", "4"
    rule = "--kl_controller", "step", "--target_kl_per_token", "0.1"
    run("grpo_tall_tree.py", "--output_dir", "out", *group, *rule, *TINY, cwd=tmp_path)
    out = tmp_path / "out"
    assert [entry["generations"] for entry in lines(out / "metrics.jsonl")[:2]] == [4, 8]
    assert lines(out / "metrics.jsonl")[0]["kl/k3_per_token"] == pytest.approx(0, abs=1e-6)
    assert json.loads((out / "summary.json").read_text())["after"]["exact_kl_per_sequence"] >= 0
    penalty = "--kl_estimator", "exact", "--kl_placement", "both", "--kl_budget_per_token", "0.1"
    run("grpo_tall_tree.py", "--output_dir", "exact", *group, *penalty, *TINY, cwd=tmp_path)
    first = lines(tmp_path / "exact/metrics.jsonl")[0]
    assert "kl/budget_use" in first and "kl/exact_per_token" in first and "kl" in first
    target = "--target_kl_per_sequence", "3", "--kl_estimator", "exact", "--kl_placement", "both"
    told = run("grpo_tall_tree.py", "--output_dir", "target", *group, *target, *TINY, cwd=tmp_path).stdout
    assert "target 3 nats per sequence: price" in told and "kl/price" in lines(tmp_path / "target/metrics.jsonl")[0]
    done = run("grpo_tall_tree.py", "--baseline", "none", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "baseline 'none' is RLOO's" in done.stderr
    text = "--reward_discount", "1", "--importance_sampling_level", "sequence"
    done = run("grpo_tall_tree.py", *text, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "importance_sampling_level 'sequence' has one advantage" in done.stderr


@pytest.mark.parametrize("lora", [(), ("--use_peft", "--learning_rate", "1e-2")], ids=["full", "lora"])
def test_dpo_its_pairs_again_and_its_judge(tmp_path, lora):
    saves = "--save_strategy", "steps", "--save_steps", "1"
    done = run(DPO, "--output_dir", "out", *FEW, *TINY, *saves, *lora, cwd=tmp_path, curves=True)
    out = tmp_path / "out"
    pairs = lines(out / "pairs.jsonl")
    assert f"{len(pairs)} pairs: " in done.stdout and 3 < len(pairs) <= 12
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    entries = lines(out / "metrics.jsonl")
    assert [entry["pairs"] for entry in entries[:2]] == [4, 8] and "rewards/margins" in entries[0]
    assert (out / "curves.png").stat().st_size > 10_000

    again = run(DPO, "--output_dir", "again", "--pairs_from", "out/pairs.jsonl", *FEW, *TINY, *lora, cwd=tmp_path)
    assert "pairs: " not in again.stdout and not (tmp_path / "again/pairs.jsonl").exists()
    times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    kept = [{k: v for k, v in e.items() if k not in times} for e in lines(tmp_path / "again/metrics.jsonl")]
    assert kept == [{k: v for k, v in e.items() if k not in times} for e in entries]

    changed = (out / "pairs.jsonl").stat().st_mtime_ns
    more = "--max_steps", "3", "--resume_from_checkpoint", "latest"
    run(DPO, "--output_dir", "out", *FEW, *TINY, *saves, *lora, *more, cwd=tmp_path)
    assert (out / "pairs.jsonl").stat().st_mtime_ns == changed  # the same pairs, not new ones
    assert [entry["pairs"] for entry in lines(out / "metrics.jsonl")[:3]] == [4, 8, 12]

    if lora:
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "kl_alliteration/story_lm/model"  # no path of this machine
    judgement = judge_run(out, stories=3)
    assert len(judgement.texts) == 3 and judgement.exact_kl_per_sequence > 0
    assert judgement.mean_length <= 12
    asked = yaml.safe_load((out / "recipe.yaml").read_text())
    (out / "recipe.yaml").write_text(yaml.safe_dump(asked | {"reward_weights": [-2.0], "reward_clip_range": [-6, 9]}))
    paid = judge_run(out, stories=3)
    assert paid.rewards == [max(-6.0, -2 * reward) for reward in judgement.rewards]
    if lora:  # of one that goes on with an adapter: the base is the adapter's, whatever model is here by default
        (out / "recipe.yaml").write_text(yaml.safe_dump({"adapter_name_or_path": "somewhere/else"}))
        config = json.loads((out / "adapter_config.json").read_text())
        other = config | {"base_model_name_or_path": str(tmp_path / "gone")}
        (out / "adapter_config.json").write_text(json.dumps(other))
        with pytest.raises((OSError, ValueError), match="gone"):
            judge_run(out, stories=3)
        (out / "adapter_config.json").write_text(json.dumps(config))
    (out / "recipe.yaml").write_text(yaml.safe_dump(asked | {"reward_model_name_or_path": "a/model"}))
    with pytest.raises(ValueError, match="was paid by a reward model too"):
        judge_run(out, stories=3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_make_pairs_together(tmp_path):
    fork_ranks(DPO, "--output_dir", "out", *FEW, *TINY, "--group_size", "2", cwd=tmp_path, logs=tmp_path)
    pairs = lines(tmp_path / "out/pairs.jsonl")
    stories = {pair[side] for pair in pairs for side in ("chosen", "rejected")}
    assert 6 < len(pairs) <= 12 and len(stories) == 2 * len(pairs)  # no process repeats another's
    assert [entry["pairs"] for entry in lines(tmp_path / "out/metrics.jsonl")[:2]] == [8, 16]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pairs", "0"], "pairs must be >= 1, got 0"),
        (["--group_size", "1"], "group_size must be >= 2, got 1: a rank needs two completions"),
        (
            ["--group_size", "4", "--pairs_per_group", "3"],
            "pairs_per_group must be from 1 to half of group_size, got 3",
        ),
        (["--pairs_from", "no.jsonl"], "pairs_from: there is no file 'no.jsonl'"),
        (
            ["--temperature", "0"],
            "temperature must be > 0, got 0.0",
        ),
        (["--max_completion_length", "0"], "max_completion_length must be >= 1, got 0"),
        (["--beta", "-1"], "beta must be >= 0 and finite, got -1.0"),
        (["--kl_controller", "pi"], "unknown option --kl_controller"),
        (["--reward_funcs", "conftest.slowly"], "reward_funcs: an async reward is for a trainer that samples"),
        (["--reward_funcs", "my.nothing"], "reward_funcs: cannot import 'my.nothing'"),
    ],
)
def test_refusals_of_dpo(tmp_path, options, says):
    assert says in refusal(*options, cwd=tmp_path, recipe=DPO)


def test_all_algorithms_beside_each_other(tmp_path):
    """Two algorithms, two betas: a page, kept runs, shared pairs; a failure is named and the rest is on the page."""
    algorithms = yaml.safe_load((ROOT / "studies/kl_across_algorithms.yaml").read_text())["algorithms"]
    small = {"max_completion_length": 12, "per_device_train_batch_size": 4, "max_steps": 2, "warmup_steps": 0}
    clipped = algorithms["clipped"] | {"betas": [0], "options": small | {"num_iterations": 2, "num_generations": 4}}
    dpo = algorithms["DPO"] | {
        "betas": [0.1, 1.0],
        "options": small | {"pairs": 12, "group_size": 4, "pairs_per_group": 1},
    }
    config = {"algorithms": {"clipped": clipped, "DPO": dpo}, "stories": 4, "eval_stories": 2, "logging_steps": 1}
    known = (ROOT / "kl_alliteration/story_lm/frontier.json").read_text()
    (tmp_path / "f.json").write_text(known.replace('"max_new_tokens":100', '"max_new_tokens":12'))
    config |= {"frontier": "f.json", "seeds": [0], "output_dir": "out"}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(config | {"report_to": "none"}))
    study, options = "kl_across_algorithms.py", {"cwd": tmp_path, "check": False}
    said = run(study, "--config", "few.yaml", "--print_commands", **options).stdout.splitlines()
    assert (
        len(said) == 3 and sum("--num_iterations 2" in line for line in said) == 1 and not (tmp_path / "out").exists()
    )
    done = run(study, "--config", "few.yaml", **options)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "out/algorithms.md").read_text()
    assert page.count("\n| DPO | ") == 2 and page.count("\n> ") == 4 and "### clipped: " in page
    assert not (tmp_path / "out/DPO_beta_1_seed_0/pairs.jsonl").exists()
    assert (
        "--pairs_from out/DPO_beta_0.1_seed_0/pairs.jsonl" in (tmp_path / "out/DPO_beta_1_seed_0/log.txt").read_text()
    )
    assert lines(tmp_path / "out/clipped_beta_0_seed_0/metrics.jsonl")[1]["kl/rollout_per_sequence"] != 0
    (tmp_path / "out/DPO_beta_1_seed_0/summary.json").unlink()
    log = (tmp_path / "out/clipped_beta_0_seed_0/log.txt").read_text()
    done = run(study, "--config", "few.yaml", **options)
    assert (tmp_path / "out/clipped_beta_0_seed_0/log.txt").read_text() == log
    again = (tmp_path / "out/algorithms.md").read_text()  # the same but for the last column, the seconds
    assert [line.split(" | ")[:9] for line in again.splitlines()] == [
        line.split(" | ")[:9] for line in page.splitlines()
    ]
    done = run(study, "--config", "few.yaml", "--frontier", "no.json", **options)
    assert done.returncode == 2 and "error: frontier: there is no file 'no.json'" in done.stderr
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(config | {"algorithms": {"PPO": {"betas": [1]}}}))
    done = run(study, "--config", "few.yaml", **options)
    assert done.returncode == 2 and "error: algorithms: PPO needs recipe, config and betas" in done.stderr
