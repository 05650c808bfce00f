"""TRL's own tests of its trainers with this package's callbacks in each: what passes without passes with them.

    TRL_SOURCE=../trl pytest -s tests/test_trl_suite.py

takes a source tree of the installed TRL, or its `tests` alone. Skipped where none is named. Random models stand in for
those of the Hub (`stand_ins.py`), on CPUs, 4 steps a test; with `TRL_HUB=1` the tests load the Hub's and run as they
are. What came of it stands in `docs/versions.md`.
"""

import functools
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import stand_ins

HERE = Path(__file__).parent
SUITES = "tests/test_grpo_trainer.py", "tests/test_rloo_trainer.py"
SOURCE = os.environ.get("TRL_SOURCE")
HUB = os.environ.get("TRL_HUB") == "1"
# What a test looks at and a setting must change. This one puts a mock in place of `GenerationMixin.generate`, which
# `use_fast_sampling` does not call; so no completion ends, all are masked, and nothing is learned.
CHANGED = {"fast": {"test_train_with_mask_truncated_completions"}}


def outcomes(source: Path, suite: str, report: Path, penalty: str | None, offline: bool = False) -> dict[str, str]:
    """`passed`, `failed`, `error` or `skipped` by the name of each test; without the callbacks for `None`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", suite]
    for plugin in ["stand_ins"] * offline + ["in_every_trainer"] * (penalty is not None):
        command += ["-p", plugin]
    environment = os.environ | {"KL_ALLITERATION_PENALTY": penalty or ""}
    environment["HF_HUB_OFFLINE"] = "0" if HUB else "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, cwd=source, env=environment, timeout=7200)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        child = next((each.tag for each in case if each.tag in ("failure", "error", "skipped")), "passed")
        found[f"{case.get('classname')}.{case.get('name')}"] = {"failure": "failed"}.get(child, child)
    return found


def worse(plain: dict[str, str], watched: dict[str, str]) -> list[str]:
    """What passes without the callbacks and not with them."""
    return [name for name, outcome in plain.items() if outcome == "passed" and watched.get(name) != "passed"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The source tree, or a folder with its tests and the stand-ins."""
    if HUB:
        return Path(SOURCE).resolve()
    folder = tmp_path_factory.mktemp("stand_ins")
    stand_ins.make(Path(SOURCE), folder)
    return folder


@pytest.fixture(scope="module")
def plain(tree, tmp_path_factory):
    """A suite's outcomes without the callbacks, run once."""
    return functools.cache(
        lambda suite: outcomes(tree, suite, tmp_path_factory.mktemp("plain") / "plain.xml", None, not HUB)
    )


@pytest.mark.skipif(SOURCE is None, reason="TRL_SOURCE names no source tree of TRL")
@pytest.mark.parametrize("penalty", ["watched", "own", "exact", "fast"])
@pytest.mark.parametrize("suite", SUITES)
def test_what_passes_without_the_callbacks_passes_with_them(tree, plain, tmp_path, suite, penalty):
    without = plain(suite)
    watched = outcomes(tree, suite, tmp_path / "watched.xml", penalty, not HUB)
    counts = [list(each.values()).count("passed") for each in (without, watched)]
    print(f"\n{suite}, {penalty}: {counts[0]} of {len(without)} pass without the callbacks, {counts[1]} with them")
    broken = {name.rpartition(".")[2] for name in worse(without, watched)}
    assert "passed" in without.values() and not broken - CHANGED.get(penalty, set())


# Passes where no callbacks are put into every trainer, and there alone.
IS_STOCK = "def test_is_stock():\n    assert not hasattr(GRPOTrainer.__init__, 'with_callbacks')\n"


def test_the_runner_sees_what_the_callbacks_break(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / SUITES[0]).write_text(
        "from trl import GRPOTrainer\n\n\n" + IS_STOCK + "\n\n"
        "def test_always():\n    pass\n\n\ndef test_never():\n    assert False\n"
    )
    watched = outcomes(tmp_path, SUITES[0], tmp_path / "watched.xml", "own")
    suite = "tests.test_grpo_trainer."
    assert watched == {
        suite + "test_is_stock": "failed",
        suite + "test_always": "passed",
        suite + "test_never": "failed",
    }
    plain = watched | {suite + "test_is_stock": "passed"}
    assert worse(plain, watched) == [suite + "test_is_stock"]


def test_stand_ins_are_found_under_the_names_of_the_hub(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "tests").mkdir(parents=True)
    copy.mkdir()
    (source / SUITES[0]).write_text(
        "from datasets import load_dataset\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from trl import GRPOConfig, GRPOTrainer\n\n\n"
        "def test_loads(tmp_path):\n"
        "    name = 'trl-internal-testing/tiny-Qwen2ForCausalLM-2.5'\n"
        "    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)\n"
        "    assert [tokenizer.eos_token_id, model.config.pad_token_id] == [151645, 151643]\n"
        "    assert tokenizer.decode([64648, 22785, 198, 40]) == 'multiply_tool\\nI'\n"
        "    assert len(load_dataset('trl-internal-testing/zen', 'conversational_prompt_only')['train']) == 17\n"
        "    assert GRPOConfig(tmp_path).max_steps == 4 and GRPOConfig(tmp_path, max_steps=1).max_steps == 1\n\n\n"
        + IS_STOCK
    )
    stand_ins.make(source, copy)
    assert [path.name for path in (copy / "trl-internal-testing").glob("tiny-*")] == ["tiny-Qwen2ForCausalLM-2.5"]
    plain = outcomes(copy, SUITES[0], tmp_path / "report.xml", None, offline=True)
    assert list(plain.values()) == ["passed", "passed"]
