"""The house rules that a machine can check."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "kl_alliteration").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
STDLIB_ONLY = ("alliteration.py", "corpus.py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", [p for p in PACKAGE + RECIPES if p.name != "_trl.py"], ids=lambda p: p.name)
def test_private_names_of_the_trainer_live_in_one_module(path):
    assert not re.search(r"trainer\._[a-z]", path.read_text())


@pytest.mark.parametrize("name", STDLIB_ONLY)
def test_text_and_corpus_need_the_standard_library_alone(name):
    (path,) = [p for p in PACKAGE if p.name == name]
    assert not imports(path) & {"torch", "transformers", "trl", "datasets", "tokenizers", "numpy"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_stay_short_and_public(path):
    assert len(path.read_text().splitlines()) <= 150
    assert "kl_alliteration._" not in path.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_launch_configs_hold_launch_strategy_only(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = yaml.safe_load(path.read_text())
    assert not set(config) & {"learning_rate", "beta", "batch_size", "gradient_accumulation_steps"}
    assert load_config_from_file(str(path)).num_processes == config["num_processes"]
