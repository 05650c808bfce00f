"""A run deletes only what it made, and loads only what it made."""

import json
import os
import shutil
import time
from types import SimpleNamespace

import pytest
from conftest import TINY_RUN, reward
from datasets import Dataset
from programs import run
from trl import RLOOConfig, RLOOTrainer

from kl_alliteration.lab import runs
from kl_alliteration.lab.refusals import check_rotation, check_trainer_options
from kl_alliteration.lab.run import run_training, save_final
from kl_alliteration.lab.runs import as_json, begin_record, check_folder, checkpoints, last_checkpoint, read_metrics
from kl_alliteration.lab.survival import TrainingStopped
from kl_alliteration.story_lm import MODEL_PATH

RECIPE = "rloo_tall_tree.py"
R = (
    "--max_steps 2 --num_generations 4 --per_device_train_batch_size 4 --max_completion_length 12 --eval_stories 4 "
    "--logging_steps 1 --warmup_steps 0 --report_to none --show_stories_every 0 --output_dir out"
).split()


def checkpoint(folder, name: str, complete: bool = True):
    (folder / name).mkdir(parents=True)
    (folder / name / "mine.txt").write_text("mine")
    if complete:
        (folder / name / "trainer_state.json").write_text("{}")
    return folder / name


def make(tiny_model, folder, reward=reward, **options):
    return RLOOTrainer(
        model=str(tiny_model),
        reward_funcs=reward,
        args=RLOOConfig(**TINY_RUN | {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1} | options),
        train_dataset=Dataset.from_dict({"prompt": ["once upon a time"] * 16}),
    )


def test_only_folders_with_a_number_are_checkpoints(tmp_path):
    for name in ("checkpoint-3", "checkpoint-20", "checkpoint-best", "checkpoint-merged", "checkpoint-5-old"):
        checkpoint(tmp_path, name)
    checkpoint(tmp_path, "checkpoint-30", complete=False)
    (tmp_path / "checkpoint-40").write_text("a file")
    assert sorted(checkpoints(tmp_path)) == [3, 20, 30]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


def test_a_reward_that_raises_deletes_nothing_of_the_user_s(tiny_model, tmp_path):
    """Folders that were there stay, complete or not, whatever they are called; so does a file `error.txt`."""
    theirs = [
        checkpoint(tmp_path, "checkpoint-merged", complete=False),
        checkpoint(tmp_path, "checkpoint-best"),
        checkpoint(tmp_path, "checkpoint-700", complete=False),
        checkpoint(tmp_path, "_unfinished", complete=False),
    ]

    def raises(completions, **kwargs):
        raises.calls += 1
        if raises.calls == 3:
            (tmp_path / "checkpoint-9").mkdir()  # one that was being written
            raise KeyError("word")
        return reward(completions)

    raises.calls = 0
    trainer = make(tiny_model, tmp_path, raises)
    with pytest.raises(TrainingStopped, match="the last good checkpoint is .*checkpoint-2: go on with"):
        run_training(trainer)
    assert all((path / "mine.txt").read_text() == "mine" for path in theirs)
    assert not (tmp_path / "checkpoint-9").exists() and sorted(checkpoints(tmp_path)) == [1, 2, 700]
    assert "KeyError: 'word'" in (tmp_path / "error.txt").read_text()
    again = make(tiny_model, tmp_path, resume_from_checkpoint="latest")
    run_training(again)
    assert again.state.global_step == 3 and not (tmp_path / "error.txt").exists()
    (tmp_path / "error.txt").write_text("notes of mine")
    run_training(make(tiny_model, tmp_path, resume_from_checkpoint="latest"))
    assert (tmp_path / "error.txt").read_text() == "notes of mine"


def test_latest_is_of_the_last_run_here(tiny_model, tmp_path, capsys):
    """A first run leaves three; the second begins anew and is stopped before it saves, then after it has saved one."""
    run_training(make(tiny_model, tmp_path))
    assert last_checkpoint(tmp_path).endswith("checkpoint-3")

    def raises(completions, **kwargs):
        raises.calls += 1
        if raises.calls > raises.at:
            raise KeyError("word")
        return reward(completions)

    raises.calls, raises.at = 0, 0
    with pytest.raises(TrainingStopped, match="there is no checkpoint"):
        run_training(make(tiny_model, tmp_path, raises))
    raises.calls, raises.at = 0, 1
    with pytest.raises(TrainingStopped, match="the last good checkpoint is .*checkpoint-1:"):
        run_training(make(tiny_model, tmp_path, raises))
    assert sorted(checkpoints(tmp_path)) == [1, 2, 3]
    capsys.readouterr()
    run_training(make(tiny_model, tmp_path, resume_from_checkpoint="latest"))
    assert "Resuming from" in (said := capsys.readouterr().out) and "checkpoint-1\n" in said


def test_an_adapter_and_then_a_whole_model(tmp_path):
    """The second run's model is what is told from, and nothing of the first is left to be loaded with it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    run(RECIPE, *R, "--use_peft", cwd=tmp_path)
    assert (tmp_path / "out/adapter_config.json").exists()
    run(RECIPE, *R, cwd=tmp_path)
    assert not list((tmp_path / "out").glob("adapter_*")) and (tmp_path / "out/README.md").read_text() == "mine"
    told = run("tell_stories.py", "--model_name_or_path", "out", "--stories", 1, "--max_new_tokens", 5, cwd=tmp_path)
    assert "adapter" not in told.stdout
    run(RECIPE, *R, "--use_peft", cwd=tmp_path)
    assert not (tmp_path / "out/model.safetensors").exists() and (tmp_path / "out/adapter_config.json").exists()


def refused(cwd, *options) -> str:
    done = run(RECIPE, *R, *options, cwd=cwd, check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2
    return line


def test_files_that_nobody_of_us_made_are_refused_before_training(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/adapter_config.json").write_text("{}")
    line = refused(tmp_path)
    assert line.startswith("error: output_dir: 'out' holds adapter_config.json of an adapter that no run here made")
    assert os.listdir(tmp_path / "out") == ["adapter_config.json"]
    (tmp_path / "out/adapter_config.json").unlink()
    (tmp_path / "out/model.safetensors").write_bytes(b"")
    assert "holds model.safetensors of a whole model" in refused(tmp_path, "--use_peft")
    shutil.copytree(MODEL_PATH, tmp_path / "base")
    line = refused(tmp_path, "--model_name_or_path", "./base", "--output_dir", "base")
    assert line == "error: output_dir: 'base' is the model that the run starts from: name another folder"


def test_a_file_that_was_changed_since_is_no_longer_ours(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    runs.remember(tmp_path, "adapter_config.json")
    check_folder(tmp_path, adapter=False)
    (tmp_path / "adapter_config.json").write_text("{ }")
    with pytest.raises(ValueError, match="holds adapter_config.json"):
        check_folder(tmp_path, adapter=False)
    runs.remove_ours(tmp_path, "adapter_config.json")
    assert (tmp_path / "adapter_config.json").exists()


def test_nothing_is_saved_over_the_adapter_that_it_starts_from(tmp_path):
    (tmp_path / "adapter").mkdir()
    args = RLOOConfig(output_dir=str(tmp_path / "adapter"), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="adapter' is the model that the run starts from: name another folder"):
        check_trainer_options(args, ["model", str(tmp_path / "other/../adapter")], adapter=True)


def test_a_limit_of_checkpoints_that_would_delete_another_s(tmp_path):
    def args(**options):
        defaults = {"save_total_limit": 1, "save_strategy": "steps", "resume_from_checkpoint": None}
        return SimpleNamespace(**defaults | options)

    checkpoint(tmp_path, "checkpoint-best")
    check_rotation(tmp_path, args())
    checkpoint(tmp_path, "checkpoint-60")
    for wrong in (args(), args(save_total_limit=2)):
        with pytest.raises(ValueError, match="^output_dir: .* holds checkpoint-60, which save_total_limit"):
            check_rotation(tmp_path, wrong)
    for right in (args(save_total_limit=None), args(save_strategy="no"), args(resume_from_checkpoint="latest")):
        check_rotation(tmp_path, right)
    checkpoint(tmp_path, "checkpoint-5-old")  # transformers reads 5
    with pytest.raises(ValueError, match="holds checkpoint-5-old, which"):
        check_rotation(tmp_path, args(resume_from_checkpoint="latest"))


def test_a_run_that_was_killed_while_it_saved_leaves_nothing_for_good(tiny_model, tmp_path):
    (tmp_path / "_unfinished_of_mine").mkdir()
    (tmp_path / "_unfinished_1234").mkdir()
    (tmp_path / "_unfinished_1234/adapter_config.json").write_text("{}")
    runs.write_record(tmp_path, unfinished="_unfinished_1234")
    save_final(make(tiny_model, tmp_path))
    assert [path.name for path in tmp_path.glob("_unfinished*")] == ["_unfinished_of_mine"]
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_prompt_of_two_lines_comes_back(tmp_path):
    prompt = "Once\nupon\u2028a\x85t\x07ime 'it'"
    run(RECIPE, *R, "--prompt", prompt, cwd=tmp_path)
    text = (tmp_path / "out/recipe.yaml").read_text()
    assert sum(line.startswith("#") for line in text.splitlines()) == 2 and text.isascii()
    run(RECIPE, "--config", "out/recipe.yaml", "--output_dir", "again", cwd=tmp_path)
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "again"))
    assert first["stories"] == second["stories"] and first["stories"][0].startswith(prompt)


def test_lines_of_metrics_are_json_whatever_is_in_them(tmp_path):
    entry = {"reward": float("nan"), "kl": float("inf"), "step": 1, "deep": [{"x": float("-inf")}]}
    entry["words"] = "a\u2028b"
    assert json.loads(as_json(entry), parse_constant=pytest.fail) == {
        "reward": None, "kl": None, "step": 1, "deep": [{"x": None}], "words": "a\u2028b",
    }  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(as_json(entry) + '\n{"words": "a\u2028b"}\n\n{"half', encoding="utf-8")
    assert read_metrics(tmp_path) == [{"step": 1, "deep": [{"x": None}], "words": "a\u2028b"}, {"words": "a\u2028b"}]


def test_a_mark_is_of_size_and_time(tmp_path):
    (tmp_path / "a").write_text("x")
    first = runs.mark_of(tmp_path / "a")
    os.utime(tmp_path / "a", ns=(time.time_ns(), time.time_ns() + 10**9))
    assert runs.mark_of(tmp_path / "a") != first and runs.mark_of(tmp_path / "none") is None


@pytest.mark.parametrize("anew", [True, False])
def test_a_run_that_begins_has_no_results_of_the_one_before(tmp_path, anew):
    """A report would show them beside its curves."""
    names = {"summary.json", "stories.jsonl", "stories.md", "curves.png", "health.json", "adapter_config.json"}
    for name in names:
        (tmp_path / name).write_text("{}")
    begin_record(tmp_path, anew)
    assert names <= {path.name for path in tmp_path.iterdir()}  # no run was here: they are the user's
    runs.write_record(tmp_path, files={})
    begin_record(tmp_path, anew)
    left = {path.name for path in tmp_path.iterdir()} - {"_made.json"}
    assert left == {"adapter_config.json"} | (set() if anew else {"health.json"})
