"""What a person reads who calls a recipe wrongly: one line, and nothing is left behind."""

from pathlib import Path

import pytest
from programs import ROOT, run

RECIPE = "rloo_tall_tree.py"
FIXED_BETA = "--config", ROOT / "recipes/fixed_beta.yaml"


def refusal(*options, cwd: Path, recipe: str = RECIPE) -> str:
    """The one line a wrong call prints; it must leave nothing behind."""
    before = sorted(p.name for p in cwd.iterdir())
    done = run(recipe, "--output_dir", "out", *options, cwd=cwd, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in cwd.iterdir()) == before
    return line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--bta", "0.1"], "unknown option --bta; did you mean --beta?"),
        (["--kl_estimator", "k4"], "kl_estimator must be one of k1, k2, k3, abs, exact, top_k, got 'k4'"),
        (["--beta_unit", "study", "--kl_reduction", "mean"], "beta_unit 'study' is per nat of a mean already"),
        (
            ["--model_name_or_path", "m.gguf", "--output_dir", "./m"],
            "output_dir: 'm' is the model that the run starts",
        ),
        (["--kl_reduction", "max"], "kl_reduction must be one of sum, mean, got 'max'"),
        (["--kl_estimator", "top_k", "--kl_top_k", "0"], "kl_top_k must be >= 1, got 0"),
        (["--kl_top_k", "8"], "kl_top_k needs --kl_estimator top_k: it does nothing here"),
        (["--lora-r=8"], "lora_r needs --use_peft: it does nothing here"),
        (["--use_dora"], "use_dora needs --use_peft: it does nothing here"),
        (
            [*FIXED_BETA, "--reward_prefix_tokens", "4"],
            "reward_prefix_tokens needs --reward_discount: it does nothing here",
        ),
        (
            [*FIXED_BETA, "--reward_opening_tokens", "8"],
            "reward_opening_tokens needs --reward_discount: it does nothing",
        ),
        (["--reward_opening_tokens", "8", "--reward_discount", "1"], "needs a reward_discount below 1, got 8"),
        (["--base_samples", "500"], "base_samples needs --target_kl_per_sequence, --plots or --plot_price: it does"),
        (
            ["--ref_model_sync_steps", "5"],
            "needs --sync_ref_model, or online --kl_reference moving_average or reset: it",
        ),
        (["--dataset_config", "en"], "dataset_config needs --dataset_name or --eval_dataset_name: it does nothing"),
        (
            ["--dataset_name", "p.jsonl", "--prompt", "A"],
            "prompt needs that no --dataset_name or --pairs_from is given: it",
        ),
        (["--kl_placement", "top"], "kl_placement must be one of reward, loss, both, got 'top'"),
        (
            ["--kl_estimator", "k3"],
            "in the loss needs the estimator exact or top_k, got 'k3'; none takes the budget away",
        ),
        ([*FIXED_BETA, "--kl_direction", "forward"], "kl_direction 'forward' needs the estimator 'exact', got 'k1'"),
        (["--kl_budget_per_token", "-1"], "kl_budget_per_token must be >= 0 and finite, got -1.0"),
        (
            [*FIXED_BETA, "--kl_placement", "loss", "--strict"],
            "gives a gradient that is zero: only noise. Use k2 in the loss",
        ),
        (["--baseline", "mean"], "baseline must be one of leave_one_out, none, got 'mean'"),
        (["--baseline", "none", "--normalize_advantages"], "baseline 'none' has no advantages to normalize"),
        (["--reward_discount", "2"], "reward_discount must be from 0 to 1, got 2.0; none credits whole texts"),
        (["--reward_discount", "1", "--reward_prefix_tokens", "0"], "reward_prefix_tokens must be >= 1, got 0"),
        (
            ["--reward_discount", "1", "--normalize_advantages"],
            "normalize_advantages True has one advantage for a text",
        ),
        (["--reward_discount", "1", "--baseline", "none"], "baseline 'none' goes with --reward_discount none and"),
        (
            ["--kl_to_go", "--reward_discount", "none", "--baseline", "none"],
            "and --kl_to_go false: by token",
        ),
        (
            ["--kl_to_go", "--kl_placement", "loss"],
            "kl_to_go is for a penalty in the reward, and kl_placement is 'loss'",
        ),
        (
            ["--kl_to_go", "--reward_discount", "none", "--normalize_advantages"],
            "normalize_advantages True has one advantage for a text: with kl_to_go it is False",
        ),
        (["--beta_unit", "week"], "beta_unit must be one of sequence, study, got 'week'"),
        (["--kl_controller", "pid"], "kl_controller must be one of fixed, step, ppo, ziegler, pi, got 'pid'"),
        (["--kl_controller", "pi"], "target_kl_per_token must be > 0 with kl_controller 'pi', got None"),
        (["--target_kl_per_token", "0.1"], "target_kl_per_token is what a kl_controller holds: name one"),
        (["--target_kl_per_sequence", "0"], "target_kl_per_sequence must be > 0 and finite, got 0.0"),
        (["--target_kl_per_sequence", "6", "--beta", "0"], "beta must not be 0 with target_kl_per_sequence"),
        (["--target_kl_per_sequence", "6", "--kl_budget_per_token", "1"], "leave kl_budget_per_token out"),
        (["--target_kl_per_sequence", "6", "--kl_reduction", "mean"], "needs kl_reduction 'sum', got 'mean'"),
        (["--target_kl_per_sequence", "6", "--kl_direction", "forward"], "kl_direction 'reverse', got 'forward'"),
        (["--target_kl_per_sequence", "6", "--kl_within_budget", "0.5"], "leave kl_within_budget out"),
        (["--target_kl_per_sequence", "6", "--kl_estimator", "k3"], "kl_placement 'both' take kl_estimator 'exact'"),
        (["--target_kl_per_sequence", "6", "--sync_ref_model"], "a reference that stays: leave sync_ref_model out"),
        (
            ["--normalize_advantages", "--reward_discount", "none"],
            "divides the half of a penalty that is in the reward by the batch's spread",
        ),
        (["--plot_price", "-1"], "plot_price must be > 0 and finite, got -1.0"),
        (["--plots", "--base_samples", "9"], "base_samples must be >= 100, got 9"),
        (["--target_kl_per_sequence", "6", "--kl_controller", "pi"], "kl_controller 'pi' both move beta: take one"),
        (["--target_kl_per_sequence", "6", "--kl_reference", "reset"], "needs a reference that the run begins at"),
        (["--kl_reference", "a/b/c"], "kl_reference: there is no folder 'a/b/c'"),
        (["--kl_reference", "./nowhere"], "kl_reference: there is no folder './nowhere'"),
        (["--kl_reference", "a/b", "--beta", "0"], "beta must not be 0 with a kl_reference that is a model"),
        (["--kl_reference", "a/b", "--sync_ref_model"], "it goes with no kl_reference of its own"),
        (["--collapse_guard", "pray"], "collapse_guard must be one of off, warn, stop, rollback, got 'pray'"),
        (["--collapse_guard", "rollback"], "needs checkpoints: add --save_strategy steps"),
        (["--beta", "-1"], "beta must be >= 0 and finite, got -1.0"),
        (["--beta", "nan"], "beta must be >= 0 and finite, got nan"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path: there is no folder './nowhere'"),
        (["--prompt", ""], "prompt must not be empty"),
        (["--dataset_name", "no.jsonl"], "dataset_name: there is no file 'no.jsonl'"),
        (["--reward_weights", "1", "2"], "reward_weights must be 1, one a reward, got 2"),
        (["--reward_model_name_or_path", "./nowhere"], "reward_model_name_or_path: there is no folder './nowhere'"),
        (["--reward_funcs", "kl_alliteration.rewards.alliteration_on_7"], "letter must be one letter, got '7'"),
        (["--reward_funcs", "math.nothing"], "reward_funcs: cannot import 'math.nothing'"),
        (["--reward_funcs", "math.pi"], "reward_funcs: 'math.pi' is a float, not a function"),
        (["--reward_funcs", "plain"], "reward_funcs: 'plain' is no dotted path"),
        (["--eval_stories", "0"], "eval_stories must be >= 1, got 0"),
        (["--push_to_hub"], "push_to_hub: no valid login at the Hub"),
        (["--use_peft", "--lora_target_modules", "q_proj", "lm_head"], "the adapter must not hold lm_head: TRL reads"),
        (["--kl_reference", "base"], "kl_reference 'base' needs an adapter: --use_peft or --adapter_name_or_path"),
        (
            ["--use_peft", "--kl_reference", "policy"],
            "kl_reference must be one of start, base, loaded, moving_average, reset, or a model",
        ),
        (["--kl_reference_on_cpu", "true"], "kl_reference_on_cpu needs a second model as kl_reference: `loaded`, a"),
        (["--use_peft", "--reset_at_kl", "3"], "reset_at_kl and reset_optimizer need --kl_reference reset"),
        (["--use_peft", "--kl_reference", "reset", "--reset_at_kl", "0"], "reset_at_kl must be > 0, got 0.0"),
        (["--use_peft", "--sync_ref_model"], "with an adapter it is --kl_reference moving_average"),
        (["--adapter_name_or_path", "./nowhere"], "adapter_name_or_path: there is no folder './nowhere'"),
        (
            ["--resume_from_checkpoint", "out/checkpoint-9"],
            "resume_from_checkpoint: there is no folder 'out/checkpoint-9'",
        ),
        (["--num_generations", "many"], "invalid int value: 'many'"),
        (["--kl_budget_per_token", "much"], "invalid float value: 'much'"),
    ],
)
def test_refusals(tmp_path, options, says):
    assert says in refusal(*options, cwd=tmp_path)


def test_refusals_of_files(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "Once"}\n')
    assert "has no column `prompt`, only text" in refusal("--dataset_name", "rows.jsonl", cwd=tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": ""}\n')
    assert "holds an empty prompt" in refusal("--dataset_name", "rows.jsonl", cwd=tmp_path)
    (tmp_path / "typo.yaml").write_text("betta: 0.1\n")
    assert "unknown option --betta; did you mean --beta?" in refusal("--config", "typo.yaml", cwd=tmp_path)
