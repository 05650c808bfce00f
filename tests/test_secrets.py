"""A token of the Hub, in whatever spelling, is in no file and on no screen."""

import os
from pathlib import Path

import pytest
from programs import ROOT, run
from trl import ModelConfig, RLOOConfig

from kl_alliteration.lab import secrets
from kl_alliteration.lab.options import OnlineArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe

TOKEN = "hf_PlantedSecretOfThisTest"
R = (
    "--max_steps 2 --num_generations 4 --per_device_train_batch_size 4 --max_completion_length 8 --eval_stories 2 "
    "--logging_steps 1 --show_stories_every 1 --output_dir out --save_strategy steps --save_steps 1"
).split()
MAPPING = f'{{"token": "{TOKEN}"}}'
SPELLINGS = {
    "dash": ["--hub-token", TOKEN],
    "equals": [f"--hub_token={TOKEN}"],
    "dash and equals": [f"--hub-token={TOKEN}"],
    "mapping": ["--model_init_kwargs", MAPPING],
    "mapping with a dash": [f"--model-init-kwargs={MAPPING}"],
}


def found_in(folder: Path) -> list[str]:
    """The files that hold the token, in their bytes."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("words", SPELLINGS.values(), ids=list(SPELLINGS))
def test_it_moves_into_the_environment(monkeypatch, words):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", "")
    parser = RecipeParser((OnlineArguments, RLOOConfig, ModelConfig), ROOT / "recipes/rloo_tall_tree.yaml")
    parsed = parse_recipe(parser, words)
    assert os.environ["HF_TOKEN"] == TOKEN and TOKEN not in str([vars(each) for each in parsed])
    assert TOKEN not in str(parser.given)


@pytest.mark.parametrize("words", [SPELLINGS["dash"], SPELLINGS["mapping"]], ids=["dash", "mapping"])
def test_a_run_with_checkpoints_and_a_fault(tmp_path, words):
    """`recipe.yaml`, `training_args.bin`, checkpoints, logs, `error.txt`, and all that is printed."""
    (tmp_path / "mine.py").write_text(
        "import os\nn = 0\n\ndef reward(completions, **kwargs):\n    global n\n    n += 1\n    if n == 3:\n"
        "        raise KeyError(os.environ['HF_TOKEN'])\n    return [1.0 * len(c) for c in completions]\n"
    )
    done = run("rloo_tall_tree.py", *R, *words, "--reward_funcs", "mine.reward", cwd=tmp_path, check=False)
    assert done.returncode == 3 and "raised KeyError: '***'" in done.stderr
    assert "***" in (tmp_path / "out/error.txt").read_text() and (tmp_path / "out/checkpoint-1").is_dir()
    (tmp_path / "mine.yaml").write_text(f"hub_token: {TOKEN}\nmodel_init_kwargs: {{token: {TOKEN}}}\n")
    config = [] if words is SPELLINGS["dash"] else ["--config", "mine.yaml"]
    again = run("rloo_tall_tree.py", *config, *R, *words, cwd=tmp_path)
    (tmp_path / "mine.yaml").unlink()
    assert TOKEN not in done.stdout + done.stderr + again.stdout + again.stderr
    assert (tmp_path / "out/recipe.yaml").exists() and found_in(tmp_path) == []


@pytest.mark.parametrize("words", SPELLINGS.values(), ids=list(SPELLINGS))
def test_a_sweep_refuses_it(tmp_path, words):
    done = run("sweep_beta.py", "--betas", "1", "--output_dir", "sweep", *words, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "error: hub_token: a sweep writes its commands into logs" in done.stderr
    assert TOKEN not in done.stdout + done.stderr and found_in(tmp_path) == []


def test_a_yaml_that_is_wrong_about_it(tmp_path):
    for text in (f"hub_token: [{TOKEN}]\n", f"hub_token: {{a: {TOKEN}}}\n", f"hub_tokn: {TOKEN}\n"):
        (tmp_path / "wrong.yaml").write_text(text)
        done = run("rloo_tall_tree.py", "--config", "wrong.yaml", cwd=tmp_path, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and TOKEN not in done.stderr + done.stdout


def test_what_is_a_secret_and_what_is_none():
    options = {
        "hub_token": "a", "pad_token": "<pad>", "eos_token": "b", "hub_model_id": "u/m", "hub_token_": "c",
        "model_init_kwargs": {"token": "d", "deep": {"use_auth_token": "e"}}, "prompt": '{"token": ',
    }  # fmt: skip
    assert secrets.values_of(options) == {"a", "d", "e"}
    kept = secrets.without(options)
    assert kept["pad_token"] == "<pad>" and kept["model_init_kwargs"] == {"deep": {}} and "hub_token" not in kept
