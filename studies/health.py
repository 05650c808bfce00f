"""Is the KL healthy: runs that are ill on purpose, healthy ones of ten kinds, and what is said of each.

    python studies/health.py --at_a_time 2      # ill runs, 30 healthy ones, five of stock TRL without a callback
    python studies/health.py --kinds stock

Runs go into runs/health and are kept. Prints tables in Markdown: of an ill run the step at which its symptom was
caught, and the line; of the others every line. Draws the ill runs' curves into runs/health/health.png.
"""

import os
from pathlib import Path

import torch
from common import BUDGET, quiet, run_groups, runs_parser
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from kl_alliteration.health import examine
from kl_alliteration.health.log import read_entries
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import ROOT, Run, seeds_of
from kl_alliteration.rewards import alliteration_reward
from kl_alliteration.story_lm import MODEL_PATH, PROMPT

QUICK = ("--eval_stories", "8", "--show_stories_every", "0", "--report_to", "none", "--disable_tqdm", "true")
K1 = ("--config", str(ROOT / "recipes/fixed_beta.yaml"))  # in the reward, as stock TRL; two groups of ten
FREE = {"kl_budget_per_token": "none"}
ILL = {  # symptom: options that bring it about, what of the log shows it, and the words before
    "no_kl": ({"beta": 0, "max_steps": 20}, "reward", K1),
    "explodes": ({"beta": 0, "kl_monitor": True, "use_peft": True, "learning_rate": 2e-2}, "kl/k1_per_token", K1),
    "collapse": ({"beta": 0, "learning_rate": 2e-3, "max_steps": 100}, "guard/distinct_2_left", K1),
    "penalty_is_noise": ({"beta": 10, "max_steps": 60}, "kl/share_of_spread", K1),
    "held_still": ({"beta": 50, "learning_rate": 3e-5, "logging_steps": 2, "max_steps": 60}, "reward", K1),
    "wrong_gradient": (FREE | {"kl_placement": "loss", "kl_estimator": "k1", "max_steps": 40}, "kl", BUDGET),
    "truncated_sampling": ({"top_k": 5, "max_steps": 10}, "kl", K1),
    "negative": (
        {"model_name_or_path": "flat", "kl_reference": str(MODEL_PATH), "top_k": 2, "learning_rate": 1e-6}
        | {"logging_steps": 1, "max_steps": 12},
        "kl",
        K1,
    ),
    "dropout": ({"use_peft": True, "lora_dropout": 0.2, "max_steps": 20}, "kl", K1),
    "starts_apart": ({"kl_reference": "apart", "max_steps": 10, "logging_steps": 1}, "kl", K1),
    "reference_moves": ({"use_peft": True, "kl_reference": "reset", "ref_model_sync_steps": 20}, "kl", K1),
    "beta_winds": (
        FREE | {"kl_controller": "step", "target_kl_per_token": 2.0, "logging_steps": 2, "max_steps": 60},
        "beta",
        BUDGET,
    ),
    "length_is_learnt": (
        {"reward_funcs": "health.fewer_tokens", "beta": 0, "learning_rate": 1e-3, "max_steps": 60},
        "completions/mean_length",
        K1,
    ),
    "no_signal": ({"reward_funcs": "health.says_zebra", "max_steps": 20}, "frac_reward_zero_std", K1),
    "inefficient": (
        {"learning_rate": 2e-3, "warmup_steps": 0, "num_generations": 10, "per_device_train_batch_size": 10},
        "kl/efficiency",
        BUDGET,
    ),
    "one_plot": ({"plots": True, "max_steps": 100}, "plots/most_told_share", BUDGET),
}
SHORT = {"max_steps": 40, "num_generations": 20, "per_device_train_batch_size": 20}
GRPO = ROOT / "recipes/grpo_tall_tree.py"
HEALTHY = {  # name: options, words, recipe
    "budget": ({}, BUDGET, Run.recipe),
    "tight_budget": ({"kl_budget_per_token": 0.06, "beta": 4}, BUDGET, Run.recipe),
    "target": ({"target_kl_per_sequence": 6}, BUDGET, Run.recipe),
    "k1": ({}, K1, Run.recipe),
    "adapter": ({"use_peft": True}, BUDGET, Run.recipe),
    "k2_in_loss": (FREE | {"kl_estimator": "k2", "kl_placement": "loss", "beta": 0.3}, BUDGET, Run.recipe),
    "s_words": ({"reward_funcs": "kl_alliteration.rewards.alliteration_on_s"}, BUDGET, Run.recipe),
    "two_updates": ({"num_iterations": 2}, BUDGET, Run.recipe),
    "rule": (FREE | {"kl_controller": "pi", "target_kl_per_token": 0.1, "beta": 0.5}, BUDGET, Run.recipe),
    "grpo": ({}, (), GRPO),
}


def fewer_tokens(completion_ids, **kwargs) -> list[float]:
    """What makes texts short."""
    return [-len(ids) / 10 for ids in completion_ids]


def says_zebra(completions, **kwargs) -> list[float]:
    """What no story says: every reward is 0."""
    return [float("zebra zebra" in text) for text in completions]


def other_models(folder: Path) -> None:
    """The embedded model twice: `apart`, with noise on its weights, and `flat`, less sure of every token."""
    torch.manual_seed(0)
    for name in ("apart", "flat"):
        model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
        with torch.no_grad():
            if name == "flat":
                model.model.norm.weight.mul_(0.7)
            for weight in model.parameters() if name == "apart" else ():
                weight.add_(torch.randn_like(weight) * 0.05 * weight.std())
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(MODEL_PATH).save_pretrained(folder / name)


def stock(folder: Path) -> dict[str, Path]:
    """Five runs of TRL's own trainers, with nothing of this package but the reward and the model."""
    rloo, grpo = (RLOOTrainer, RLOOConfig), (GRPOTrainer, GRPOConfig)
    runs = {
        "stock_rloo": (rloo, {"beta": 0.3}),
        "stock_rloo_beta_0": (rloo, {"beta": 0.0}),
        "stock_grpo_default": (grpo, {}),
        "stock_grpo_beta_0.04": (grpo, {"beta": 0.04}),
        "stock_grpo_too_fast": (grpo, {"beta": 1e-4, "learning_rate": 1e-2}),
    }
    for name, ((trainer_class, config), options) in runs.items():
        if (folder / name / "trainer_state.json").is_file():
            continue
        options = {"learning_rate": 3e-4, "max_steps": 30, "logging_steps": 1} | options
        args = config(
            str(folder / name),
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=60,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            **options,
        )
        trainer = trainer_class(
            str(MODEL_PATH), alliteration_reward, args=args, train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 64})
        )
        trainer.train()
        trainer.save_state()
    return {name: folder / name for name in runs}


def found_in(folder: Path) -> dict:
    """By symptom, as the command finds them."""
    return {each.symptom: each for each in examine(folder).findings}


def draw(folders: dict[str, Path], path: Path) -> None:
    """A small figure a symptom: what of the log shows it, and where it was caught."""
    columns = 4
    rows = -(-len(folders) // columns)
    figure = Figure(figsize=(14, 2.4 * rows), layout="tight")
    axes = figure.subplots(rows, columns, squeeze=False)
    for name, axis in zip(folders, axes.flat, strict=False):
        shown, caught = ILL[name][1], found_in(folders[name]).get(name)
        points = [(e["step"], e[shown]) for e in read_entries(folders[name])[0] if e.get(shown) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", linewidth=1)
        if caught is not None:
            axis.axvline(caught.step, color="tab:red", linewidth=1)
        axis.set_title(f"{name}: {shown}", fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(folders) :]:
        axis.axis("off")
    figure.savefig(path, dpi=90)


@one_line_errors
def main():
    parser = runs_parser(__doc__, "health")
    parser.add_argument("--kinds", nargs="+", choices=("ill", "healthy", "stock"), default=["ill", "healthy", "stock"])
    parser.add_argument("--only", nargs="+", help="ill or healthy runs by name")
    args = parser.parse_args()
    known = [*(ILL if "ill" in args.kinds else ()), *(HEALTHY if "healthy" in args.kinds else ())]
    if unknown := [name for name in args.only or () if name not in known]:
        parser.error(f"--only {' '.join(unknown)}: they are {', '.join(known)}")
    quiet()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    if "ill" in args.kinds:
        if not (args.folder / "flat/model.safetensors").is_file():
            other_models(args.folder)
        groups = {}
        for name, (options, _, words) in ILL.items():
            if args.only and name not in args.only:
                continue
            options = {k: str(args.folder / v) if v in ("apart", "flat") else v for k, v in options.items()}
            groups[name] = [Run(f"ill_{name}", options, (*words, *QUICK))]
        folders = {name: paths[0] for name, paths in run_groups(groups, args).items()}
        print("| ill of | caught at step | what is seen | and also |\n|---|---|---|---|")
        for name, folder in folders.items():
            found = found_in(folder)
            caught = found.pop(name, None)
            seen = (f"{caught.step}", caught.seen) if caught else ("missed", "-")
            print(f"| `{name}` | {seen[0]} | {seen[1]} | {', '.join(f'`{each}`' for each in found) or '-'} |")
        if folders:
            draw(folders, args.folder / "health.png")
    if "healthy" in args.kinds:
        groups = {
            name: seeds_of(name, SHORT | options, args.seeds, (*words, *QUICK), recipe)
            for name, (options, words, recipe) in HEALTHY.items()
            if not args.only or name in args.only
        }
        alarms = 0
        print("\n| healthy | alarms | notes |\n|---|---|---|")
        for name, folders in run_groups(groups, args).items():
            lines = [each for folder in folders for each in found_in(folder).values()]
            said = [f"{each.symptom} at {each.step}: {each.seen}" for each in lines if each.alarm]
            notes = ", ".join(sorted({each.symptom for each in lines if not each.alarm}))
            print(f"| {name} x {len(folders)} | {'; '.join(said) or 0} | {notes or '-'} |")
            alarms += len(said)
        print(f"\n{alarms} alarms on {sum(map(len, groups.values()))} healthy runs")
    if "stock" in args.kinds:
        print("\n| stock TRL | found |\n|---|---|")
        for name, folder in stock(args.folder).items():
            found = [f"{each.symptom} at step {each.step}: {each.seen}" for each in found_in(folder).values()]
            print(f"| {name} | {'; '.join(found) or 'nothing'} |")


if __name__ == "__main__":
    main()
