"""Runs side by side: kept when finished, gone on with when broken off, named when failed."""

import json
import os
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from programs import fork, runs_in_this_process
from rich.console import Console

from kl_alliteration.lab.runs import read_metrics, read_summary
from kl_alliteration.lab.sweep import ROOT, Run, end_orphan, launch_command, run_all, seeds_of

CPU = str(ROOT / "accelerate_configs/cpu.yaml")
# A recipe's manners without its work: counts its starts, and ends as it is told.
RECIPE = """
import json, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(options["--output_dir"])
starts = folder / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if options["--ending"] == "fails":
    sys.exit("error: no such thing")
time.sleep(float(options.get("--seconds", 0)))
folder.joinpath("summary.json").write_text(json.dumps({"seed": options["--seed"]}))
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def test_finished_runs_are_kept_and_failed_ones_are_named(recipe, tmp_path):
    runs = [*seeds_of("good", {"ending": "well"}, [0, 1], recipe=recipe)]
    runs.append(Run("bad", {"ending": "fails", "seed": 0}, recipe=recipe))
    folder = tmp_path / "runs"
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    failed = run_all(runs, folder, CPU, at_a_time=3, console=console)  # three processes under their launchers
    assert [run.name for run in failed] == ["bad"]
    assert read_summary(folder / "good_seed_1") == {"seed": "1"}
    said = console.export_text()
    assert "bad failed: error: no such thing" in said
    (folder / "good_seed_0" / "summary.json").write_text('{"half": ')  # of a run that was broken off as it wrote
    with runs_in_this_process():
        run_all(runs[:2], folder, CPU, at_a_time=2, console=console)
    assert [len((folder / run.name / "starts").read_text()) for run in runs[:2]] == [2, 1]


def test_two_runs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two runs are called 'a'"):
        run_all([Run("a"), Run("a")], tmp_path, CPU)


def test_other_options_in_the_same_folder_are_refused(recipe, tmp_path):
    """The finished run of one question must not pass for the answer to another."""
    with runs_in_this_process():
        run_all([Run("a", {"ending": "well", "seed": 0}, recipe=recipe)], tmp_path, CPU)
    with pytest.raises(ValueError, match="holds a run with other options .*--seed 0"):
        run_all([Run("a", {"ending": "well", "seed": 1}, recipe=recipe)], tmp_path, CPU)


def test_another_recipe_or_a_config_that_was_edited_is_refused(recipe, tmp_path):
    config, folder = tmp_path / "some.yaml", tmp_path / "runs"
    config.write_text("beta: 1\n")
    run = Run("a", {"ending": "well", "seed": 0}, ("--config", str(config)), recipe)
    with runs_in_this_process():
        run_all([run], folder, CPU)
        assert run_all([run], folder, CPU) == []
    config.write_text("beta: 2\n")
    with pytest.raises(ValueError, match=r"holds a run with other content in its --config \(.*some.yaml\)"):
        run_all([run], folder, CPU)
    config.write_text("beta: 1\n")
    other = shutil.copy(recipe, tmp_path / "other.py")
    with pytest.raises(ValueError, match=r"holds a run with other recipe \(recipe.py\)"):
        run_all([Run("a", run.options, run.words, Path(other))], folder, CPU)


@pytest.mark.parametrize("at_a_time", [0, -1])
def test_none_at_a_time_is_refused(tmp_path, at_a_time):
    with pytest.raises(ValueError, match=f"at_a_time must be >= 1, got {at_a_time}"):
        run_all([], tmp_path, CPU, at_a_time)


def test_a_run_goes_on_from_its_last_complete_checkpoint(recipe, tmp_path):
    for step, state in ((20, "{}"), (100, "{}"), (120, '{"epoch": 0.'), (140, None)):
        (tmp_path / "a" / f"checkpoint-{step}").mkdir(parents=True)
        if state is not None:
            (tmp_path / "a" / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    options = {"beta": 0.3, "warp": {"by": 2}, "betas": [1, 2]}
    command = launch_command(Run("a", options, ("--reward_funcs", "x.y", "z.w"), recipe), tmp_path, CPU, 1)
    assert command[-2:] == ["--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-100")]
    assert f'{recipe} --reward_funcs x.y z.w --beta 0.3 --warp {{"by": 2}} --betas 1 2' in " ".join(command)
    assert "--resume" not in " ".join(launch_command(Run("b"), tmp_path, CPU))


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_what_a_killed_sweep_left_running_is_ended(recipe, tmp_path):
    script = textwrap.dedent(f"""
        from pathlib import Path
        from kl_alliteration.lab.sweep import Run, run_all
        options = {{"ending": "well", "seconds": 60, "seed": 0}}
        run_all([Run("a", options, recipe=Path({str(recipe)!r}))], Path({str(tmp_path)!r}), {CPU!r})
    """)
    (tmp_path / "sweep.py").write_text(script)
    starts, ended = tmp_path / "a" / "starts", 0
    sweep = fork(tmp_path / "sweep.py", cwd=tmp_path, log=tmp_path / "log.txt")
    while not ended and not starts.exists():
        ended, _ = os.waitpid(sweep, os.WNOHANG)
        time.sleep(0.1)
    assert not ended, (tmp_path / "log.txt").read_text()
    os.kill(sweep, signal.SIGKILL)
    os.waitpid(sweep, 0)
    leader = json.loads((tmp_path / "a" / "process.json").read_text())["pid"]
    group = [p for p in psutil.process_iter() if p.pid and os.getpgid(p.pid) == leader]
    assert len(group) >= 2  # the launcher and the recipe outlive the sweep
    end_orphan(tmp_path / "a")
    assert not [p for p in group if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    Path(tmp_path, "metrics.jsonl").write_text('{"reward": 1}\n{"reward": 2}\n{"rew')
    assert read_metrics(tmp_path) == [{"reward": 1}, {"reward": 2}]
    assert read_metrics(tmp_path / "nowhere") == []
