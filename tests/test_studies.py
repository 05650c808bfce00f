"""What the studies ask their recipes for is what the recipes take. Nothing is trained."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from trl import DPOConfig, GRPOConfig, ModelConfig, RLOOConfig

from kl_alliteration.lab import sweep
from kl_alliteration.lab.checks import check_options
from kl_alliteration.lab.gguf import SMOLLM2_FOLDER
from kl_alliteration.lab.options import GRPOArguments, OnlineArguments, PairArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe
from kl_alliteration.story_lm import MODEL_PATH

ARGUMENTS = {
    "rloo_tall_tree.py": (OnlineArguments, RLOOConfig),
    "grpo_tall_tree.py": (GRPOArguments, GRPOConfig),
    "dpo_tall_tree.py": (PairArguments, DPOConfig),
}
STUDIES = [
    "agreement",
    "efficiency",
    "health --kinds ill",
    "health --kinds healthy",
    "instruct",
    "kl_across_algorithms",
]
STUDIES += [f"hold {experiment}" for experiment in ("held", "ahead", "controllers", "guard")]
STUDIES += ["letters_never_rewarded", "reinforce_vs_rloo", "rloo_and_grpo", "swap_rewards", "sweep_beta", "tall_tree"]
STUDIES += ["targets", "variety"]


class Asked(BaseException):
    """Runs that a study wants made."""


def runs_of(study: str, folder: Path, monkeypatch) -> list[sweep.Run]:
    def ask(runs, *args, **kwargs):
        raise Asked([run for group in runs.values() for run in group] if isinstance(runs, dict) else runs)

    name, *words = study.split()
    monkeypatch.syspath_prepend(str(sweep.ROOT / "studies"))
    module = importlib.import_module(name)
    for made in ("run_groups", "run_all", "run_sweep"):
        monkeypatch.setattr(module, made, ask, raising=False)
    for other in ("check_model_path", "other_models", "repeating_model", "quiet"):
        monkeypatch.setattr(module, other, lambda *args: None, raising=False)
    where = "--folder" if "runs_parser" in vars(module) else "--output_dir"
    monkeypatch.setattr(sys, "argv", [name, *words, where, str(folder)])
    with pytest.raises(Asked) as asked:
        module.main()
    return asked.value.args[0]


@pytest.mark.parametrize("study", STUDIES)
def test_every_run_of_a_study_is_one_that_its_recipe_takes(study, tmp_path, monkeypatch):
    runs = runs_of(study, tmp_path, monkeypatch)
    assert runs
    for run in runs:
        words = [  # models that a study makes, or that are made by hand
            str(MODEL_PATH) if word == SMOLLM2_FOLDER or word.startswith(str(tmp_path)) else word for word in run.asked
        ]
        defaults = run.recipe.with_suffix(".yaml")
        parser = RecipeParser((*ARGUMENTS[run.recipe.name], ModelConfig), defaults=defaults)
        check_options(*parse_recipe(parser, [*words, "--output_dir", str(tmp_path / "out" / run.name)]))


def test_settings_of_a_study_are_different_runs(tmp_path, monkeypatch):
    """Else one is trained twice, and a table says two things of it."""
    found = {}
    for run in runs_of("instruct", tmp_path, monkeypatch):
        parser = RecipeParser((*ARGUMENTS[run.recipe.name], ModelConfig), defaults=run.recipe.with_suffix(".yaml"))
        words = [str(MODEL_PATH) if word == SMOLLM2_FOLDER else word for word in run.asked]
        found[run.name] = [str(vars(each)) for each in parse_recipe(parser, words)]
    assert len({str(value) for value in found.values()}) == len(found)


def test_signal_and_its_share_by_hand(monkeypatch):
    """Of three gradients in the plane, the first part of which they share; leaving one out by hand too."""
    monkeypatch.syspath_prepend(str(sweep.ROOT / "studies"))
    study = importlib.import_module("gradient_noise")
    gradients = torch.tensor([[2.0, 1.0], [2.0, -1.0], [2.0, 2.0]])
    products = gradients @ gradients.T  # 5, 5, 8 on the diagonal; 3, 6 and 2 off it
    assert study.signal_of(products) == (pytest.approx(11 / 3), pytest.approx(11 / 18))
    left = [2 / 6.5, 6 / 6.5, 3 / 5]  # without the first, the second, the third
    mean = sum(left) / 3
    assert study.jackknife(products) == pytest.approx((2 / 3 * sum((each - mean) ** 2 for each in left)) ** 0.5)
