"""TRL's own tests of its trainers with this package's callbacks in each: what passes without passes with them.

    TRL_SOURCE=../trl pytest -s tests/test_trl_suite.py

takes a source tree of the installed TRL, whose tests load models from the Hub. Skipped where none is named.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

SUITES = "tests/test_grpo_trainer.py", "tests/test_rloo_trainer.py"
SOURCE = os.environ.get("TRL_SOURCE")


def outcomes(source: Path, suite: str, report: Path, plugin: bool, penalty: str = "own") -> dict[str, str]:
    """`passed`, `failed`, `error` or `skipped` by the name of each test of a suite."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", suite]
    here = Path(__file__).parent
    environment = os.environ | {"KL_ALLITERATION_PENALTY": penalty}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command + (["-p", "in_every_trainer"] if plugin else []), cwd=source, env=environment, timeout=7200)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        child = next((each.tag for each in case if each.tag in ("failure", "error", "skipped")), "passed")
        found[f"{case.get('classname')}.{case.get('name')}"] = {"failure": "failed"}.get(child, child)
    return found


def worse(plain: dict[str, str], watched: dict[str, str]) -> list[str]:
    """What passes without the callbacks and not with them."""
    return [name for name, outcome in plain.items() if outcome == "passed" and watched.get(name) != "passed"]


@pytest.mark.skipif(SOURCE is None, reason="TRL_SOURCE names no source tree of TRL")
@pytest.mark.parametrize("penalty", ["own", "exact"])
@pytest.mark.parametrize("suite", SUITES)
def test_what_passes_without_the_callbacks_passes_with_them(tmp_path, suite, penalty):
    plain = outcomes(Path(SOURCE), suite, tmp_path / "plain.xml", plugin=False)
    watched = outcomes(Path(SOURCE), suite, tmp_path / "watched.xml", plugin=True, penalty=penalty)
    print(f"\n{suite}: {list(plain.values()).count('passed')} of {len(plain)} pass without the callbacks")
    assert "passed" in plain.values() and not worse(plain, watched)


def test_the_runner_sees_what_the_callbacks_break(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / SUITES[0]).write_text(
        "from trl import GRPOTrainer\n\n\n"
        "def test_is_stock():\n    assert not hasattr(GRPOTrainer.__init__, 'with_callbacks')\n\n\n"
        "def test_always():\n    pass\n\n\ndef test_never():\n    assert False\n"
    )
    plain = outcomes(tmp_path, SUITES[0], tmp_path / "plain.xml", plugin=False)
    watched = outcomes(tmp_path, SUITES[0], tmp_path / "watched.xml", plugin=True)
    assert [name.rpartition(".")[2] for name in worse(plain, watched)] == ["test_is_stock"]
    assert sorted(plain.values()) == ["failed", "passed", "passed"]
