"""What a recipe's options come to, typed or in a file."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import ROOT
from trl import DPOConfig, ModelConfig, RLOOConfig

from kl_alliteration.lab.datafiles import read_dataset
from kl_alliteration.lab.inputs import load_held_out
from kl_alliteration.lab.options import NEEDS, OnlineArguments, PairArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe


def parsed(tmp_path, *words, file: str = ""):
    (tmp_path / "mine.yaml").write_text(file or "{}")
    parser = RecipeParser((OnlineArguments, RLOOConfig, ModelConfig), defaults=Path("none.yaml"))
    config = "--config", str(tmp_path / "mine.yaml"), "--use_cpu", "--output_dir", str(tmp_path / "out")
    return parse_recipe(parser, [*config, *words])


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["--reward_clip_range", "-5", "5"], ""),
        ([], "reward_clip_range: [-5, 5]\n"),
        (["--reward-clip-range", "-5", "5"], ""),
    ],
    ids=["typed", "file", "hyphens"],
)
def test_a_range_is_two_numbers(tmp_path, words, file):
    _, training_args, _ = parsed(tmp_path, *words, file=file)
    assert list(training_args.reward_clip_range) == [-5.0, 5.0]


def test_one_number_is_no_range(tmp_path):
    with pytest.raises(ValueError, match="reward_clip_range.*: expected 2 arguments"):
        parsed(tmp_path, "--reward_clip_range", "5")


def test_what_does_nothing_is_said_of_a_file(tmp_path, capsys):
    """Which may be for runs with and without; typed it is refused (test_recipe_refusals.py)."""
    parsed(tmp_path, file="lora_r: 8\nkl_top_k: 5\n")
    said = capsys.readouterr().out
    assert "lora_r needs --use_peft: it does nothing here" in said and "kl_top_k needs --kl_estimator top_k" in said
    parsed(tmp_path, "--use_peft", "--kl_estimator", "top_k", file="lora_r: 8\nkl_top_k: 5\n")
    assert "does nothing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--use_peft false --lora_r 8", "lora_r needs"),
        ("--sampler_correction none --sampler_correction_cap 2", "sampler_correction_cap needs"),
        ("--use_dora false", ""),
        ("--eval_dataset_name a/b --dataset_config en", ""),
        (f"--lora_r {ModelConfig.__dataclass_fields__['lora_r'].default}", ""),
    ],
)
def test_what_is_switched_off_is_said_and_what_stays_is_not(tmp_path, capsys, words, said):
    parsed(tmp_path, *words.split())
    printed = capsys.readouterr().out
    assert said in printed and ("does nothing" in printed) == bool(said)


def test_a_recipe_s_own_yaml_is_nobody_s_option(tmp_path, capsys):
    parser = RecipeParser((PairArguments, DPOConfig, ModelConfig), defaults=ROOT / "recipes/dpo_tall_tree.yaml")
    parse_recipe(parser, ["--pairs_from", "p.jsonl", "--use_cpu", "--output_dir", str(tmp_path / "out")])
    assert "does nothing" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="prompt needs that no --dataset_name or --pairs_from is given"):
        parse_recipe(parser, ["--pairs_from", "p.jsonl", "--prompt", "hello", "--use_cpu"])


def test_every_option_that_needs_another_is_one():
    known = {*OnlineArguments.__dataclass_fields__, *PairArguments.__dataclass_fields__}
    known |= {*RLOOConfig.__dataclass_fields__, *ModelConfig.__dataclass_fields__}
    assert set(NEEDS) <= known


def test_a_part_of_a_file(tmp_path):
    for name in ("train", "held_out"):
        rows = [{"prompt": f"{name} {i}"} for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = SimpleNamespace(
        dataset_name=str(tmp_path / "train.jsonl"), eval_dataset_name=str(tmp_path / "held_out.jsonl")
    )
    args.dataset_config, args.dataset_train_split = None, "train[:3]"
    assert read_dataset(args)["prompt"] == ["train 0", "train 1", "train 2"]
    assert len(load_held_out(args)) == 10  # of which that is no part
    args.dataset_train_split = "validation"
    with pytest.raises(ValueError, match=r"dataset_name: .*train.jsonl': .*validation"):
        read_dataset(args)
    args.dataset_config, args.dataset_train_split = "en", "train"
    with pytest.raises(ValueError, match="dataset_config: .*train.jsonl' is a file, which has none"):
        read_dataset(args)
