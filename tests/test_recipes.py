"""Recipes as a person runs them, in this process where the process itself is not what is tested (`programs.py`)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from programs import ROOT, fork, run, run_process
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, RLOOConfig, RLOOTrainer

from kl_alliteration.adapters import load_adapter
from kl_alliteration.kl import KLWarning
from kl_alliteration.lab.options import OnlineArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe, write_recipe
from kl_alliteration.lab.plot_labels import main as count_plots
from kl_alliteration.lab.sweep import end_orphan
from kl_alliteration.rewards.reward_model import AlliterationRewardModel
from kl_alliteration.story_lm import MODEL_PATH

RECIPE = "rloo_tall_tree.py"
FIXED_BETA = "--config", ROOT / "recipes/fixed_beta.yaml"
SMALL = "--max_steps 2 --max_completion_length 12 --eval_stories 6 --logging_steps 1 --show_stories_every 1".split()
RATE = "--learning_rate", "1e-2"
ONE_CPU = "accelerate.commands.launch", "--quiet", "--config_file", str(ROOT / "accelerate_configs/cpu.yaml")
TWO_CPU = *ONE_CPU[:-1], str(ROOT / "accelerate_configs/two_cpu.yaml")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Where the recipe has trained a whole model for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    run(RECIPE, "--output_dir", "out", *SMALL, cwd=folder)
    return folder / "out"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """And where an adapter of rank 4."""
    folder = tmp_path_factory.mktemp("adapter")
    run(RECIPE, "--output_dir", "first", "--use_peft", "--lora_r", "4", *RATE, *SMALL, cwd=folder)
    return folder / "first"


def test_accelerate_launch_writes_everything_it_promises(tmp_path):
    done = run_process(RECIPE, "--output_dir", "out", *SMALL, cwd=tmp_path, launcher=ONE_CPU)
    out = tmp_path / "out"
    assert {"model.safetensors", "curves.png", "stories.md", "metrics.jsonl", "summary.json"} <= set(os.listdir(out))
    assert list((out / "runs").rglob("events.out.tfevents*")) or list(out.rglob("events.out.tfevents*"))
    summary = json.loads((out / "summary.json").read_text())
    for name in ("reward_mean", "different_share", "kl_per_token", "kl_per_sequence"):
        assert summary["after"][name] is not None
        assert name in done.stdout
    assert "Step 1" in done.stdout and "Once upon a time" in done.stdout
    assert [line["generations"] for line in lines(out / "metrics.jsonl")[:2]] == [40, 80]


def test_two_processes_train_one_model(tmp_path):
    """Half a group on each: a process that trained alone would refuse it."""
    half = "--num_generations", "8", "--per_device_train_batch_size", "4"
    run_process(RECIPE, "--output_dir", "out", *half, *SMALL, cwd=tmp_path, launcher=TWO_CPU)
    assert [line["generations"] for line in lines(tmp_path / "out/metrics.jsonl")[:2]] == [8, 16]


def test_peft_saves_a_small_adapter_whose_off_is_the_base(adapter):
    out = adapter
    assert not (out / "model.safetensors").exists()
    assert (out / "adapter_model.safetensors").stat().st_size < 1_000_000
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    ids = tokenizer("Once upon a time there was a tall tree", return_tensors="pt", return_token_type_ids=False)
    base = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL_PATH), out).eval()
    with torch.no_grad():
        expected = base(**ids).logits.log_softmax(-1)
        on = model(**ids).logits.log_softmax(-1)
        with model.disable_adapter():
            off = model(**ids).logits.log_softmax(-1)
    assert torch.equal(off, expected)
    assert not torch.allclose(on, expected)
    assert json.loads((out / "summary.json").read_text())["after"]["kl_per_sequence"] is not None
    told = run("tell_stories.py", "--model_name_or_path", "./first", "--stories", "2", cwd=out.parent).stdout
    assert "adapter on: " in told and "adapter off: " in told and told.count("Once upon") == 4


def test_an_adapter_goes_on_is_stacked_and_merged(adapter, tmp_path):
    """Each later run starts where the one before ended, and every folder loads on the base alone."""
    shutil.copytree(adapter, tmp_path / "first")
    saves = "--save_strategy", "steps", "--save_steps", "1"
    modes = "--kl_reference", "reset", "--ref_model_sync_steps", "1"
    go_on = RECIPE, "--output_dir", "more", "--adapter_name_or_path", "./first", *modes, *saves, *RATE, *SMALL
    run(*go_on, cwd=tmp_path)
    stack = "--output_dir", "two", "--adapter_name_or_path", "./first", "--use_peft"
    run(RECIPE, *stack, *RATE, *SMALL, cwd=tmp_path)

    def entries(name):
        return lines(tmp_path / name / "metrics.jsonl")

    assert [entry["kl/reference_resets"] for entry in entries("more")[:2]] == [1, 1]
    assert entries("more")[1]["kl"] == 0 and abs(entries("more")[1]["kl/base_per_token"]) > 1e-4
    assert (tmp_path / "more/checkpoint-2/ref/adapter_model.safetensors").exists()
    assert not (tmp_path / "more/ref").exists() and not (tmp_path / "more/_unfinished").exists()
    configs = {n: json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("first", "more", "two")}
    assert [configs[name]["r"] for name in configs] == [4, 4, 20]  # the stack: 4 and the default's 16 side by side
    assert {each["base_model_name_or_path"] for each in configs.values()} == {"kl_alliteration/story_lm/model"}
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert summary["before"]["kl_per_sequence"] == pytest.approx(0, abs=1e-3)  # to the base and the first adapter

    again = run(*go_on, "--max_steps", "3", "--resume_from_checkpoint", "latest", cwd=tmp_path)
    assert "Resuming from more/checkpoint-2" in again.stdout and len(entries("more")) >= 3

    told = run("merge_adapter.py", "--adapter_name_or_path", "./two", "--output_dir", "m", cwd=tmp_path).stdout
    assert "log-probabilities agree" in told
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "m")("Once upon a time there was", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            merged(ids).logits, load_adapter(str(tmp_path / "two")).eval()(ids).logits, atol=1e-3, rtol=0
        )


def test_beta_zero_loads_no_reference_and_says_so(tmp_path):
    run(RECIPE, "--output_dir", "out", "--beta", "0", *SMALL, cwd=tmp_path)
    assert json.loads((tmp_path / "out/summary.json").read_text())["after"]["kl_per_token"] is None


def test_own_prompts_rewards_and_estimator(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once upon a time"}\n{"prompt": "One windy day"}\n')
    (tmp_path / "mine.py").write_text(
        "def short(completions, **kwargs):\n    return [-float(len(c)) for c in completions]\n"
    )
    options = *FIXED_BETA, "--dataset_name", "prompts.jsonl", "--kl_estimator", "k3", "--kl_reduction", "mean"
    rewards = "--reward_funcs", "mine.short", "kl_alliteration.rewards.alliteration_reward"
    with pytest.warns(KLWarning, match="the KL penalty 'k3' in the reward gives a gradient that .* vanishes near"):
        done = run(RECIPE, "--output_dir", "out", *options, *rewards, *SMALL, cwd=tmp_path)
    first = lines(tmp_path / "out/metrics.jsonl")[0]
    assert first["rewards/short/mean"] < 0 <= first["rewards/alliteration_reward/mean"]
    assert "short" in done.stdout


def test_the_example_of_one_s_own_rewards(tmp_path):
    """The file of docs/rewards.md, as the words beside it launch it."""
    (example,) = re.findall(r"```python\n(# my_rewards.py\n.*?)```", (ROOT / "docs/rewards.md").read_text(), re.S)
    (tmp_path / "my_rewards.py").write_text(example)
    rewards = "--reward_funcs", "my_rewards.short", "my_rewards.ends_well", "--reward_weights", "1", "0.5"
    run(RECIPE, "--output_dir", "out", *rewards, *SMALL, cwd=tmp_path)
    first = lines(tmp_path / "out/metrics.jsonl")[0]
    assert first["rewards/short/mean"] < 0 and 0 <= first["ends_well/share"] <= 1


def test_a_reward_model_by_its_folder(trained, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    AlliterationRewardModel.from_tokenizer(tokenizer).save_pretrained(tmp_path / "alliteration")
    tokenizer.save_pretrained(tmp_path / "alliteration")
    model = "--reward_model_name_or_path", "./alliteration"
    run(RECIPE, "--output_dir", "out", *model, *SMALL, cwd=tmp_path)
    found, expected = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "out", trained))
    assert found["before"]["reward_mean"] == expected["before"]["reward_mean"] > 0
    first = lines(tmp_path / "out/metrics.jsonl")[0]
    assert first["rewards/alliteration/mean"] > 0
    # a program that does not know this package runs the folder's own code
    code = "from transformers import AutoModelForSequenceClassification as A; import sys; "
    code += "m = A.from_pretrained('alliteration', trust_remote_code=True, num_labels=1); "
    code += "print(type(m).__name__, 'kl_alliteration' in sys.modules)"
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "AlliterationRewardModel False", done.stderr[-2000:]


def test_the_penalty_s_options_and_the_study_s_unit(tmp_path):
    run(
        RECIPE,
        *("--output_dir", "out", "--beta", "40", "--beta_unit", "study", "--kl_estimator", "exact"),
        *("--kl_placement", "both", "--kl_budget_per_token", "0.01", "--kl_direction", "reverse", *SMALL),
        cwd=tmp_path,
    )
    first = lines(tmp_path / "out/metrics.jsonl")[0]
    assert first["beta"] == pytest.approx(40 / 99)
    assert "kl/exact_per_sequence" in first and "kl/budget_use" in first


def test_the_command_line_takes_a_budget_away(tmp_path):
    run(RECIPE, "--output_dir", "out", "--kl_budget_per_token", "none", *SMALL, cwd=tmp_path)
    first = lines(tmp_path / "out/metrics.jsonl")[0]
    assert "kl/exact_per_token" in first and "kl/budget_use" not in first


def test_a_rule_moves_beta(tmp_path):
    options = "--kl_controller", "ziegler", "--target_kl_per_token", "0.5", "--logging_steps", "1", "--max_steps", "3"
    run(RECIPE, "--output_dir", "out", *SMALL, *options, cwd=tmp_path)
    betas = [line["beta"] for line in lines(tmp_path / "out/metrics.jsonl") if "kl" in line]
    assert betas[0] > betas[1] > betas[2]  # the KL is far under its target


def test_a_target_takes_the_place_of_a_file_s_budget_and_beta(tmp_path, tiny_model):
    """Its price is read off samples that are written before the first step, and the efficiency off the same."""
    options = "--target_kl_per_sequence", "0.5", "--base_samples", "200", "--model_name_or_path", tiny_model
    reward = "--reward_funcs", "kl_alliteration.rewards.alliteration_reward"
    shown = run(RECIPE, "--output_dir", "out", *options, *reward, *SMALL, "--logging_steps", "1", cwd=tmp_path).stdout
    assert "target 0.5 nats per sequence: price" in shown and "reward_discount" not in shown
    assert len(lines(tmp_path / "out/base_samples.jsonl")) == 200
    first = lines(tmp_path / "out/metrics.jsonl")[0]
    assert first["kl/target_use"] == pytest.approx(first["kl/exact_per_sequence"] / 0.5, rel=1e-4)
    assert first["kl/beta"] == pytest.approx(200 * first["kl/price"], rel=1e-4)  # 4 of what 0.02 is charged of
    assert first["reward_to_go/spread"] > 0 and first["kl_to_go/spread"] > 0
    made = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert made["reward_discount"] == 1 and made["kl_to_go"] is True and "kl_opening_tokens" not in made


def test_plots_are_counted_by_skeletons_and_by_clusters(tmp_path, tiny_model, monkeypatch, capsys):
    options = "--plot_price", "2", "--reward_discount", "0.6", "--base_samples", "150", "--logging_steps", "1", *SMALL
    shown = run(RECIPE, "--output_dir", "embedded", *options, cwd=tmp_path).stdout
    assert "effective_plots" in shown and "kl_of_plots" in shown
    run(RECIPE, "--output_dir", "tiny", "--model_name_or_path", tiny_model, *options, cwd=tmp_path)
    for name in ("embedded", "tiny"):
        first = lines(tmp_path / name / "metrics.jsonl")[0]
        whole = first["plots/kl_per_sequence"] + first["plots/kl_within_per_sequence"]
        assert whole == pytest.approx(first["kl/exact_per_sequence"], abs=1e-3) and first["plots/effective"] >= 1
        assert 0 < first["reward_to_go/spread"] < 1
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["before"]["effective_plots"] >= 1 and 0 < summary["after"]["most_told_share"] <= 1
        assert "rewards/plot_penalty/mean" in first
        monkeypatch.setattr("sys.argv", ["plot_labels", str(tmp_path / name)])
        count_plots()
        row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")]
        assert row[1] == name and float(row[3]) == pytest.approx(summary["after"]["kl_of_plots"], abs=0.006)
        assert float(row[2]) == pytest.approx(float(row[3]) + float(row[4]), abs=0.011)


def test_conversational_prompts(tmp_path, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "chat")
    model.save_pretrained(tmp_path / "chat")
    row = {"prompt": [{"role": "user", "content": "once upon a time"}]}
    (tmp_path / "chat.jsonl").write_text((json.dumps(row) + "\n") * 4)
    run(
        RECIPE,
        *("--output_dir", "out", "--model_name_or_path", "./chat", "--dataset_name", "chat.jsonl", *SMALL),
        cwd=tmp_path,
    )
    assert (tmp_path / "out" / "summary.json").exists()
    options = "--config", ROOT / "recipes/instruct.yaml", "--dataset_name", ROOT / "recipes/instruct_prompts.jsonl"
    options += "--eval_dataset_name", ROOT / "recipes/instruct_held_out.jsonl"
    batch = "--num_generations", "4", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"
    run(RECIPE, "--output_dir", "lora", *options, *batch, "--model_name_or_path", "./chat", *SMALL, cwd=tmp_path)
    assert (tmp_path / "lora/adapter_model.safetensors").exists()
    first = lines(tmp_path / "lora/metrics.jsonl")[0]
    assert "rewards/alliteration_in_25_words/mean" in first and "alliteration/pairs" in first
    assert "kl/exact_per_token" in first and "kl/budget_use" in first


@pytest.mark.parametrize("words", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_a_token_is_in_no_file(tmp_path, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["rloo_tall_tree.py", "--output_dir", "out", *words, "--beta", "2"])
    parser = RecipeParser((OnlineArguments, RLOOConfig, ModelConfig), ROOT / "recipes/rloo_tall_tree.yaml")
    parse_recipe(parser)
    write_recipe(tmp_path / "recipe.yaml", parser)
    written = (tmp_path / "recipe.yaml").read_text()
    assert "hf_secret" not in written and "--hub_token" in written and "beta: 2.0" in written
    done = run("sweep_beta.py", "--betas", "1", *words, cwd=tmp_path, check=False)
    assert (
        done.returncode == 2 and "error: hub_token: a sweep writes its commands into logs; set HF_TOKEN" in done.stderr
    )


def test_a_trl_with_other_private_names_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.delattr(RLOOTrainer, "_compute_loss")
    done = run(RECIPE, "--output_dir", "out", *SMALL, cwd=tmp_path, check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "RLOOTrainer of trl 1.16.0 has no _compute_loss; kl_alliteration was" in line


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [1.0]", "mine.reward returned 1 rewards for 6 completions"),
        ("return [float('nan')] * len(completions)", "mine.reward returned nan for"),
    ],
)
def test_a_reward_that_is_wrong_stops_the_run(tmp_path, body, says):
    (tmp_path / "mine.py").write_text(f"def reward(completions, **kwargs):\n    {body}\n")
    done = run(RECIPE, "--output_dir", "out", "--reward_funcs", "mine.reward", *SMALL, cwd=tmp_path, check=False)
    assert done.returncode == 3 and says in done.stderr
    assert "Traceback" not in done.stderr


def test_best_of_n_draws_the_frontier(trained, tmp_path):
    words = "--stories", 60, "--largest_n", 30, "--runs", trained
    done = run("best_of_n.py", *words, cwd=tmp_path, check=False)  # of 100 tokens, and the run has 12
    assert done.returncode == 2 and "yardstick's max_new_tokens is 100, and out has 12" in done.stderr
    run("best_of_n.py", *words, "--max_new_tokens", 12, cwd=tmp_path)
    facts = json.loads((tmp_path / "runs/best_of_n/frontier.json").read_text())
    assert facts["frontier"][-1]["n"] == 30 and (tmp_path / "runs/best_of_n/frontier.png").stat().st_size > 5_000
    frontier = ("--base_frontier", "runs/best_of_n/frontier.json")
    options = [*SMALL, "--output_dir", "out", *frontier, "--max_completion_length"]
    run(RECIPE, *options, 12, cwd=tmp_path)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["after"]["efficiency"] is None  # two steps bought nothing that so few stories could tell from noise
    done = run(RECIPE, *options, 13, cwd=tmp_path, check=False)
    says = "frontier.json has max_new_tokens 12, the run has 13"
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(says)
    done = run("best_of_n.py", "--runs", "nowhere", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: runs: there is no nowhere/metrics.jsonl"


def test_best_of_n_takes_every_prompt_of_a_data_set(tmp_path):
    rows = [{"prompt": "Once upon a time", "noun": "time"}, {"prompt": "There was", "noun": "was"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = "[float(len(c) + len(n)) for c, n in zip(completions, noun)]"  # of a column too
    (tmp_path / "mine.py").write_text(f"def reward(completions, noun, **columns):\n    return {counts}\n")
    options = "--reward_func mine.reward --dataset_name prompts.jsonl --stories 81".split()
    options += "--max_new_tokens 12 --temperature 0.7".split()
    done = run("best_of_n.py", *options, cwd=tmp_path)
    facts = json.loads((tmp_path / "runs/best_of_n/frontier.json").read_text())
    assert facts["stories"] == 80 and facts["frontier"][0]["n"] == 1  # 40 of each
    assert facts["frontier"][-1]["n"] == 20  # half of them, where nobody says
    least = facts["least_kl"]
    assert [p["kl_per_sequence"] for p in least] == sorted(p["kl_per_sequence"] for p in least) and len(least) > 3
    assert least[0]["reward"] == pytest.approx(facts["frontier"][0]["reward"], rel=0.1)  # a high price buys nothing
    assert "| least KL (nats per sequence) | reward |" in done.stdout
    done = run("best_of_n.py", *options, "--largest_n", 21, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "at most half of a prompt's 40 stories, got 21" in done.stderr


def test_topics_that_are_held_out_share_no_word_with_those_of_the_training():
    common = set("write one sentence about a an the of who that in with and her his its at to as on".split())

    def words(name: str) -> list[set]:
        rows = [json.loads(line) for line in (ROOT / "recipes" / name).read_text().splitlines()]
        return [set(row["prompt"][0]["content"].lower().rstrip(".").split()) - common for row in rows]

    train, held_out = words("instruct_prompts.jsonl"), words("instruct_held_out.jsonl")
    assert len(train) >= 80 and len(held_out) == 40
    shared = set().union(*train) & set().union(*held_out)
    assert shared <= {"over", "without", "under", "one", "not", "inside", "behind"}  # no noun among them


def test_a_sweep_prints_its_commands_and_ends_in_a_report(tmp_path):
    options = "--betas", "0", "4", "--beta_unit", "sequence", "--seeds", "1", "--output_dir", "out", "--at_a_time", 2
    said = run("sweep_beta.py", *options, "--print_commands", cwd=tmp_path).stdout.splitlines()
    assert len(said) == 2 and "accelerate" in said[0] and "--beta 4.0" in said[1] and "--seed 1" in said[1]
    assert not (tmp_path / "out").exists()
    done = run("sweep_beta.py", *options, *SMALL, cwd=tmp_path)
    page = (tmp_path / "out/report.html").read_text()
    assert "beta 4" in page and page.count("plotly-graph-div") == 5
    started = (tmp_path / "out/beta_4_seed_1/process.json").read_text()
    run("sweep_beta.py", *options, *SMALL, cwd=tmp_path)  # finished runs are kept
    assert (tmp_path / "out/beta_4_seed_1/process.json").read_text() == started
    assert "done" in done.stdout
    done = run("sweep_beta.py", *options, "--betas", "-1", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "error: betas must be >= 0, got -1.0" in done.stderr


def test_the_extended_run_has_the_default_beside_it(tmp_path):
    config = "--config", ROOT / "studies/extended.yaml"
    said = run("sweep_beta.py", *config, "--print_commands", cwd=tmp_path).stdout.splitlines()
    assert len(said) == 6 and "fixed_beta.yaml" in said[0]
    assert "--max_steps 500" in said[0] and "--beta 20 --beta_unit study --seed 0" in said[0]
    assert "fixed_beta" not in said[3] and "--beta " not in said[3] and "--max_steps 600 --seed 0" in said[3]
    done = run("sweep_beta.py", *config, "--beside_config", "no.yaml", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "error: beside_config: there is no file 'no.yaml'" in done.stderr


def test_reinforce_against_rloo(tmp_path):
    options = "--seeds", "0", "--output_dir", "out", *SMALL
    run("reinforce_vs_rloo.py", *options, cwd=tmp_path)
    logs = {name: lines(tmp_path / f"out/{name}_seed_0/metrics.jsonl") for name in ("rloo", "reinforce")}
    # the same first batch, and then another policy
    name = "rewards/words_starting_with_a/mean"
    assert logs["rloo"][0][name] == logs["reinforce"][0][name] > 0
    assert logs["rloo"][0]["grad_norm"] != logs["reinforce"][0]["grad_norm"]
    assert "reinforce" in (tmp_path / "out/report.html").read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.long
def test_a_sweep_that_was_killed_ends_as_if_it_had_not_been(tmp_path):
    """The one that is killed is a process, with its run a process under its launcher; one thread each, as here."""
    options = "--betas 1 --beta_unit sequence --seeds 0 --save_strategy steps --save_steps 3 --max_steps 15".split()
    options = [*SMALL[2:], *options, "--report_to", "none", "--at_a_time", "1000"]
    run("sweep_beta.py", *options, "--output_dir", "whole", cwd=tmp_path)
    broken, ended = tmp_path / "killed/beta_1_seed_0", 0
    killed = "sweep_beta.py", *options, "--output_dir", "killed"
    sweep = fork(*killed, cwd=tmp_path, log=tmp_path / "log.txt")
    while not ended and not list(broken.glob("checkpoint-*/trainer_state.json")):
        ended, _ = os.waitpid(sweep, os.WNOHANG)
        time.sleep(0.02)
    assert not ended, (tmp_path / "log.txt").read_text()[-2000:]
    os.kill(sweep, signal.SIGKILL)
    os.waitpid(sweep, 0)
    end_orphan(broken)
    assert list(broken.glob("checkpoint-*")) and not (broken / "summary.json").exists()
    run(*killed, cwd=tmp_path)
    found, expected = (
        json.loads((tmp_path / name / "beta_1_seed_0/summary.json").read_text()) for name in ("killed", "whole")
    )
    other = {"seconds": 0, "last_good_checkpoint": ""}
    assert found | other == expected | other
    tables = [(tmp_path / name / "report.md").read_text().splitlines()[1:] for name in ("killed", "whole")]
    assert tables[0] == tables[1]
