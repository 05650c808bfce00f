"""One line that names the option, the file or the row, before the first model is loaded; and printing ends nothing."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from programs import ROOT, run, script
from transformers import SchedulerType
from trl import DPOConfig, GRPOConfig, ModelConfig, RLOOConfig

from kl_alliteration.evaluation import ask_reward
from kl_alliteration.lab import checks, refusals
from kl_alliteration.lab.checks import check_model_path, check_options
from kl_alliteration.lab.gguf import SMOLLM2_FOLDER
from kl_alliteration.lab.options import GRPOArguments, OnlineArguments, PairArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe
from kl_alliteration.lab.progress import MetricsFileCallback
from kl_alliteration.lab.survival import one_line_errors

RECIPE = "rloo_tall_tree.py"
KINDS = {
    "rloo": (OnlineArguments, RLOOConfig),
    "grpo": (GRPOArguments, GRPOConfig),
    "dpo": (PairArguments, DPOConfig),
}


def parsed(*words, kind: str = "rloo"):
    """Options up to and with what is refused before a model is loaded."""
    parser = RecipeParser((*KINDS[kind], ModelConfig), ROOT / f"recipes/{kind}_tall_tree.yaml")
    found = parse_recipe(parser, ["--use_cpu", *map(str, words)])
    check_options(*found)
    return found


def refused(*words, kind: str = "rloo") -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (what it says is returned)
        parsed(*words, kind=kind)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_vllm_does_not_load_the_story_model(kind, tmp_path):
    assert refused("--use_vllm", kind=kind).startswith("use_vllm: vLLM does not load")
    other = tmp_path / "other"
    other.mkdir()
    config = {"model_type": "qwen2", "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
    (other / "config.json").write_text(json.dumps(config | {"max_window_layers": 28}))
    refusals.check_vllm(SimpleNamespace(use_vllm=True), str(other))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


LACKING = {
    "reduce_lr_on_plateau": "lr_scheduler_type reduce_lr_on_plateau requires an eval strategy",
    "greedy": "lr_scheduler_type greedy requires an eval strategy",
    "cosine_with_min_lr": "lr_scheduler_kwargs: none with lr_scheduler_type 'cosine_with_min_lr': ValueError: One of",
    "cosine_warmup_with_min_lr": "lr_scheduler_kwargs: none with lr_scheduler_type 'cosine_warmup_with_min_lr'",
    "warmup_stable_decay": "lr_scheduler_kwargs: none with lr_scheduler_type 'warmup_stable_decay': TypeError: wsd",
}


@pytest.mark.parametrize("name", [each.value for each in SchedulerType])
def test_every_scheduler_with_the_default_yaml(name):
    """Its `timescale` is the YAML's scheduler's: it goes where another is typed; what a scheduler lacks, it says."""
    if name in LACKING:
        assert refused("--lr_scheduler_type", name).startswith(LACKING[name])
    else:
        _, training_args, _ = parsed("--lr_scheduler_type", name)
        assert training_args.lr_scheduler_kwargs == ({"timescale": 100} if name == "inverse_sqrt" else None)


def test_wrong_kwargs_of_a_scheduler_and_a_file_s_own(tmp_path):
    words = "--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"timescale": 100}'
    assert refused(*words).startswith("lr_scheduler_kwargs: {'timescale': 100} with lr_scheduler_type 'cosine'")
    text = "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-5}\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert parsed("--config", "mine.yaml")[1].lr_scheduler_kwargs == {"min_lr": 1e-5}
    words = "--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 10}'
    assert parsed(*words)[1].lr_scheduler_kwargs == {"num_decay_steps": 10}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--top_k", -1), "top_k must be >= 0; 0 takes all tokens, got -1"),
        (("--temperature", 0), "temperature must be > 0, got 0"),
        (("--temperature", "nan"), "temperature must be > 0, got nan"),
        (("--temperature", "inf"), "temperature must be finite, got inf"),
        (("--top_p", 0), "top_p must be in (0, 1]"),
        (("--min_p", 2), "min_p must be in [0, 1]"),
        (("--repetition_penalty", 0), "repetition_penalty must be > 0"),
        (("--max_completion_length", 0), "max_completion_length must be >= 1"),
        (("--report_to", "foo"), "report_to: 'foo' is none of "),
        (("--model_name_or_path", "runs/tall_tre"), "model_name_or_path: there is no folder 'runs/tall_tre'"),
        (("--reward_model_name_or_path", "runs/x"), "reward_model_name_or_path: there is no folder 'runs/x'"),
        (("--model_name_or_path", SMOLLM2_FOLDER), f"model_name_or_path: there is no folder '{SMOLLM2_FOLDER}' yet"),
        (("--output_dir", "a.txt"), "output_dir: 'a.txt' is a file"),
    ],
)
@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_values(tmp_path, words, says, kind):
    (tmp_path / "runs").mkdir()
    (tmp_path / "a.txt").write_text("")
    assert refused(*words, kind=kind).startswith(says)


def test_dpo_has_its_own_two():
    assert refused("--temperature", 0, kind="dpo").startswith("temperature must be > 0")
    assert refused("--max_completion_length", 0, kind="dpo").startswith("max_completion_length must be >= 1")


def test_a_place_of_logs_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(refusals, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert refused("--report_to", "wandb") == (
        "report_to: wandb is not installed: pip install wandb, or --report_to none"
    )
    parsed("--report_to", "none")


K1 = ("--kl_estimator", "k1", "--kl_placement", "reward")


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        ("rloo", (), (1.0, True)),
        ("grpo", ("--kl_estimator", "exact", "--kl_placement", "both"), (1.0, True)),
        ("rloo", ("--kl_to_go", "false", "--reward_discount", "0.5"), (0.5, False)),
        ("rloo", ("--kl_to_go", "false"), (1.0, False)),
        # What has one advantage for a text has it with a target too.
        ("rloo", ("--reward_discount", "none", "--baseline", "none"), (None, False)),
        ("rloo", ("--reward_discount", "none", "--normalize_advantages", *K1), (None, False)),
        ("rloo", ("--kl_placement", "loss"), (0.8, False)),
        ("grpo", (), (1.0, True)),
        ("grpo", ("--kl_estimator", "exact", "--scale_rewards", "none"), (None, False)),  # in the loss, as in its YAML
        ("grpo", ("--kl_placement", "reward", "--importance_sampling_level", "sequence"), (None, False)),
    ],
)
def test_a_target_is_credited_by_token(kind, words, expected):
    args = parsed("--target_kl_per_sequence", "6", *words, kind=kind)[0]
    assert (args.reward_discount, args.kl_to_go) == expected
    assert args.kl_budget_per_token is None and args.kl_opening_tokens == 0


def test_a_target_has_no_opening_of_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("reward_discount: 0.8\nreward_opening_tokens: 12\n")
    args = parsed("--config", "mine.yaml", "--target_kl_per_sequence", "6")[0]
    assert (args.reward_discount, args.reward_opening_tokens) == (1.0, 0)
    typed = "--reward_discount", "0.9", "--reward_opening_tokens", "8"
    args = parsed("--config", "mine.yaml", "--target_kl_per_sequence", "6", *typed)[0]
    assert (args.reward_discount, args.reward_opening_tokens) == (0.9, 8)


def test_a_target_s_price_stands_beside_rewards():
    """GRPO's loss has them over their spread. What is typed stays; what is not becomes exact in both."""
    target = "--target_kl_per_sequence", "6"
    assert "take kl_placement 'both'" in refused(*target, "--kl_estimator", "exact", kind="grpo")
    assert "take kl_estimator 'exact'" in refused(*target, "--kl_placement", "loss", kind="grpo")
    penalty = parsed(*target, kind="grpo")[0].penalty
    assert (penalty.estimator, penalty.placement) == ("exact", "both")


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_the_recipe_of_a_target_steps_by_a_length(tmp_path, kind):
    """SGD's steps have a length only while gradients are clipped. It credits by token, as a typed target does."""
    args, training_args, _ = parsed("--config", ROOT / "recipes/target.yaml", kind=kind)
    assert (args.target_kl_per_sequence, args.reward_discount, args.kl_to_go) == (6.0, 1.0, True)
    length = training_args.max_grad_norm * training_args.learning_rate
    assert training_args.optim == "sgd" and length == pytest.approx(0.07)
    assert training_args.beta  # GRPO's own is 0
    for word, says in {
        "--beta": "beta must not be 0",
        "--kl_budget_per_token": "leave kl_budget_per_token out",
    }.items():
        assert says in refused("--config", ROOT / "recipes/target.yaml", word, "0", kind=kind)


def test_a_hub_id_is_no_mistyped_folder(tmp_path):
    check_model_path("model_name_or_path", "roneneldan/TinyStories-33M")
    (tmp_path / "runs/tall_tree").mkdir(parents=True)
    check_model_path("model_name_or_path", "runs/tall_tree")


@pytest.mark.parametrize("word", ["off", "no", "Off", "NO", "off # comment"])
def test_yaml_s_bare_off_and_no_are_words_where_words_are_taken(tmp_path, word):
    name = "collapse_guard" if "off" in word.lower() else "save_strategy"
    value = word if word in ("Off", "NO") else word.lower()
    (tmp_path / "mine.yaml").write_text(f"{name}: {value}\nkl_monitor: {word}\nfast_sampling: yes\nuse_peft: on\n")
    if word in ("Off", "NO"):  # the option's own word is in small letters
        assert value in refused("--config", "mine.yaml")
        return
    args, training_args, model_args = parsed("--config", "mine.yaml")
    assert (args.collapse_guard if name == "collapse_guard" else training_args.save_strategy.value) == word[:3].strip()
    assert args.kl_monitor is False and args.fast_sampling is True and model_args.use_peft is True


@pytest.mark.parametrize("prompt", ["12:30", "2026-11-30", "1_000", "0x1F", "1.50", "007"])
def test_yaml_s_numbers_and_dates_are_words_where_words_are_taken(tmp_path, prompt):
    """And numbers where numbers are."""
    (tmp_path / "mine.yaml").write_text(f"prompt: {prompt}\nrun_name: {prompt}\nmax_steps: 1_000\nbeta: .5\n")
    args, training_args, _ = parsed("--config", "mine.yaml")
    assert (args.prompt, training_args.run_name) == (prompt, prompt)
    assert (training_args.max_steps, training_args.beta) == (1000, 0.5)


def test_best_of_n_leaves_out_what_the_reward_does_not_apply_to(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def reward(completions, **kw):\n    return [None if i % 3 == 0 else 1.0 for i in range(len(completions))]\n"
        "def never(completions, **kw):\n    return [None] * len(completions)\n"
    )
    words = "--stories", 60, "--largest_n", 20, "--max_new_tokens", 4, "--batch_size", 30
    done = run("best_of_n.py", *words, "--reward_func", "mine.reward", cwd=tmp_path)
    assert "20 of 60 stories are left out: the reward does not apply to them" in done.stdout
    facts = json.loads((tmp_path / "runs/best_of_n/frontier.json").read_text())
    assert facts["stories"] == 40 and all(p["reward"] == pytest.approx(1) for p in facts["frontier"])
    done = run("best_of_n.py", *words, "--reward_func", "mine.never", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "largest_n must be at most half of the 0 stories" in done.stderr


def test_a_run_shorter_than_logging_steps_is_logged_once(tmp_path, tiny_model):
    words = "--max_steps 2 --num_generations 4 --per_device_train_batch_size 4 --max_completion_length 6"
    words += " --report_to none --eval_stories 2 --logging_steps 100 --show_stories_every 0 --output_dir out"
    done = run(RECIPE, *words.split(), cwd=tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "reward" in entry] == [2]
    assert "logging_steps 100 is more than the run's 2: logged at its end" in done.stdout


def test_metrics_are_json_when_a_reward_is_not_a_number(tmp_path):
    history = [{"reward": float("nan"), "kl": float("inf"), "step": 1}]
    state = SimpleNamespace(is_world_process_zero=True, log_history=history, global_step=1)
    args = SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=1, world_size=1)
    callback = MetricsFileCallback(SimpleNamespace(num_iterations=1, beta=0.5), tmp_path / "metrics.jsonl")
    callback.on_train_begin(args, SimpleNamespace(is_world_process_zero=True, log_history=[]), None)
    callback.on_log(args, state, None)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "reward": None, "kl": None, "step": 1, "generations": 2, "beta": 0.5,
    }  # fmt: skip


def test_no_letter_ends_a_run(tmp_path, monkeypatch):
    """A terminal of 8 bits and a story with an emoji: a mark in its place, and everything is written as it is."""
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding="cp1252", errors="strict")
    words = "--max_steps 1 --num_generations 4 --per_device_train_batch_size 4 --max_completion_length 6"
    words += " --report_to none --eval_stories 2 --logging_steps 1 --show_stories_every 1 --output_dir out"
    code = compile(script(RECIPE).read_text(), str(script(RECIPE)), "exec")
    monkeypatch.setattr(sys, "argv", [RECIPE, *words.split(), "--prompt", "Once \U0001f600 upon \u4e00 time"])
    monkeypatch.setattr(sys, "stdout", terminal)
    exec(code, {"__name__": "__main__", "__file__": str(script(RECIPE))})
    terminal.flush()
    assert b"Once ? upon ? time" in raw.getvalue()
    assert "\U0001f600" in (tmp_path / "out/stories.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/summary.json").exists()


def test_the_helper_leaves_a_terminal_without_errors_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    one_line_errors(lambda: print("\U0001f600"))()
    assert sys.stdout.getvalue() == "\U0001f600\n"


def test_the_hub_is_asked_last(monkeypatch):
    """Nothing is made at the Hub for a run that is refused."""
    monkeypatch.setattr(checks, "check_hub", lambda args: pytest.fail("asked"))
    refused("--push_to_hub", "--top_k", -1)


def test_none_is_does_not_apply():
    found = ask_reward(lambda prompts, completions: [None, 2], [{"prompt": "a"}] * 2, ["b", "c"], [[1], [2]])
    assert torch.tensor(found).isnan().tolist() == [True, False]
