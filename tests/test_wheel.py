"""What is installed from a wheel works without the checkout, and says what it needs."""

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# All in one process: each would cost seconds of imports.
WITHOUT_THE_CHECKOUT = """
import contextlib, io, json, pathlib, runpy, sys

sys.modules["matplotlib"] = None  # as where the extra is not installed
import kl_alliteration

found = {"file": kl_alliteration.__file__}
try:
    import kl_alliteration.lab
except ImportError as error:
    found["without the extra"] = str(error)
del sys.modules["matplotlib"]

def run(module, *words):
    sys.argv = [module, *words]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_module(f"kl_alliteration.lab.{module}", run_name="__main__", alter_sys=True)
    return printed.getvalue()

found["report"] = run("report", "runs")
found["letters"] = run("letters", "--help")
found["corpus"] = run("story_model.corpus", "sample", "1")
found["train"] = run("story_model.train", "--help")

from kl_alliteration.lab.sweep import Run, launch_command
try:
    launch_command(Run("a"), pathlib.Path("runs"), "cpu.yaml")
except ValueError as error:
    found["sweep"] = str(error)
import matplotlib

found["backend"] = matplotlib.get_backend(auto_select=False)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by what `pip wheel . --no-deps --no-build-isolation` calls."""
    build = pytest.importorskip("hatchling.build", reason="pip install hatchling")
    folder, before = tmp_path_factory.mktemp("wheel"), os.getcwd()
    os.chdir(ROOT)
    try:
        return folder / build.build_wheel(str(folder))
    finally:
        os.chdir(before)


def outside(*command, cwd: Path, **env) -> str:
    """A command that finds nothing of the checkout."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=kept | env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def made_up_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    log = [{"generations": 20 * i, "reward": 4.0 + i, "kl": 0.1 * i, "beta": 0.1} for i in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    numbers = {"reward_mean": 5.0, "different_share": 1.0, "distinct_2": 0.5}
    (folder / "summary.json").write_text(json.dumps({"before": numbers, "after": numbers, "stories": ["tall tree"]}))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kl_alliteration").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == wanted
    for name in ("lab/templates/report.html", "lab/story_model/lexicon.txt", "lab/story_model/stories/courage.txt"):
        assert f"kl_alliteration/{name}" in inside
    for name in ("py.typed", "rewards/letters.json", "story_lm/frontier.json", "story_lm/model/model.safetensors"):
        assert f"kl_alliteration/{name}" in inside


def test_its_metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith("/METADATA")]
        lines = file.read(name).decode().splitlines()
    needs = [line.split(": ")[1] for line in lines if line.startswith("Requires-Dist: ")]
    always = {need.split(">=")[0] for need in needs if "extra ==" not in need}
    assert always == {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "regex", "tqdm"}
    lab = {need.split(">=")[0] for need in needs if "extra == 'lab'" in need}
    assert lab == {"jinja2", "matplotlib", "plotly", "psutil", "rich", "scikit-learn"}
    assert "License-Expression: Apache-2.0" in lines and "Classifier: Typing :: Typed" in lines
    assert "Description-Content-Type: text/markdown" in lines


def test_it_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    made_up_run(tmp_path / "elsewhere/runs/beta_0.1_seed_0")
    printed = outside(
        sys.executable, "-c", WITHOUT_THE_CHECKOUT, cwd=tmp_path / "elsewhere", PYTHONPATH=str(tmp_path / "unpacked")
    )
    found = json.loads(printed.splitlines()[-1])
    assert found["file"] == str(tmp_path / "unpacked/kl_alliteration/__init__.py")
    assert found["without the extra"] == "kl_alliteration.lab needs matplotlib: pip install 'kl_alliteration[lab]'"
    assert found["report"].strip() == "runs/report.html"
    page = (tmp_path / "elsewhere/runs/report.html").read_text()
    assert "<mark>tall</mark>" in page and page.count("plotly-graph-div") == 2
    assert "--stories" in found["letters"] and "--output_dir" in found["train"]
    assert found["corpus"].startswith("Once upon a time")
    assert "recipes are in the repository, not in the package" in found["sweep"] and "\n" not in found["sweep"]
    assert found["backend"] is None, "drawing chose a backend for the whole process"


@pytest.mark.parametrize("name", ["jinja2", "matplotlib", "psutil", "rich"])
def test_the_lab_names_what_is_not_installed(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "kl_alliteration.lab", raising=False)
    with pytest.raises(
        ImportError, match=rf"^kl_alliteration.lab needs {name}: pip install 'kl_alliteration\[lab\]'$"
    ):
        importlib.import_module("kl_alliteration.lab")


@pytest.mark.long
def test_it_installs_and_trains_in_a_fresh_environment(tmp_path):
    """First without the extra: the README's script trains. Then with it: a folder of runs becomes a page."""
    python, elsewhere = tmp_path / "venv/bin/python", tmp_path / "elsewhere"
    made_up_run(elsewhere / "runs/beta_0.1_seed_0")
    script = (ROOT / "recipes/minimal.py").read_text(encoding="utf-8")
    (elsewhere / "minimal.py").write_text(re.sub(r"max_steps=\d+", "max_steps=5", script), encoding="utf-8")
    outside(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    outside(python, "-m", "pip", "wheel", ROOT, "--no-deps", "--quiet", "-w", tmp_path / "dist", cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    install = python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"
    outside(*install, wheel, cwd=tmp_path)
    told = outside(python, "minimal.py", cwd=elsewhere, OMP_NUM_THREADS="1")
    assert "Once upon a time" in told
    refused = subprocess.run(
        [python, "-m", "kl_alliteration.lab.report", "runs"], cwd=elsewhere, capture_output=True, text=True
    )
    assert refused.returncode != 0
    assert "kl_alliteration.lab needs matplotlib: pip install" in refused.stderr.splitlines()[-1]
    outside(*install, f"{wheel}[lab]", cwd=tmp_path)
    assert outside(python, "-m", "kl_alliteration.lab.report", "runs", cwd=elsewhere).strip() == "runs/report.html"
    outside(python, "-m", "pip", "check", cwd=elsewhere)
