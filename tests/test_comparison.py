"""Several algorithms in one picture: who is compared with whom, what is kept, what is refused."""

import json
import os
from pathlib import Path

from kl_alliteration.lab.comparison import JudgedRun, equal_kl, judged, write_page

FRONTIER = [{"n": 1, "kl_per_sequence": 0.0, "reward": 4.0, "low": 4.0, "high": 4.0}]
FRONTIER.append({"n": 9, "kl_per_sequence": 1.3, "reward": 7.0, "low": 6.5, "high": 7.5})


def judged_run(algorithm, beta, seed, kl, reward, folder=Path(".")):
    numbers = {"exact_kl_per_sequence": kl, "reward_mean": reward, "different_share": 1.0, "distinct_2": 0.5}
    name = f"{algorithm}_beta_{beta:g}_seed_{seed}"
    texts = [f"tall trees by {algorithm} {seed}", "a <b> cat"]
    return JudgedRun(algorithm, beta, folder / name, numbers | {"stories": 5}, texts)


def test_equal_kl_is_where_the_ratio_of_the_furthest_is_smallest():
    """By hand: 10 of A is between 9 and 11; 2 of A would leave C at 4.5 times it; a KL of 0 is no place to meet."""
    runs = [judged_run("A", 1, 0, 2, 5), judged_run("A", 0.1, 0, 10, 9), judged_run("A", 0.01, 0, 0, 4)]
    runs += [judged_run("B", 1, 0, 2.1, 5), judged_run("B", 0.1, 0, 11, 9), judged_run("C", 1, 0, 9, 5)]
    assert {name: run.kl for name, run in equal_kl(runs).items()} == {"A": 10, "B": 11, "C": 9}


def test_the_page(tmp_path):
    runs = [
        judged_run("RLOO", beta, seed, 3 / beta + seed, 8 + seed, tmp_path) for beta in (0.1, 1) for seed in (0, 1)
    ]
    runs += [judged_run("clipped", 0, 0, 29.0, 8, tmp_path)]
    for run in runs:
        run.folder.mkdir()
        (run.folder / "summary.json").write_text('{"seconds": 60}')
    logs = [{"kl/rollout_per_sequence": value} for value in (0.25, 0.5, 0.125)]
    (runs[-1].folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in logs))
    text = write_page(runs, FRONTIER, tmp_path).read_text()
    assert "| RLOO | 0.1 | 2 | 30.5 (30.0 to 31.0) | 8.50 (8.00 to 9.00) | 2.12 (2.00 to 2.25) |" in text
    assert "| clipped | 0 | 1 | 29.0 | 8.00 | 2.00 | 1.00 | 0.50 | 0.50 | 60.0 |" in text
    assert "### RLOO: 30.0 nats, reward 8.0 (RLOO_beta_0.1_seed_0)" in text
    assert "> **tall** **trees** by RLOO 0" in text and "a &lt;b&gt; cat" in text
    assert (tmp_path / "algorithms.png").stat().st_size > 10_000
    assert [each["beta"] for each in json.loads((tmp_path / "algorithms.json").read_text())] == [0.1, 0.1, 1, 1, 0]


class Found:
    texts = ["one", "two", "three"]

    def __init__(self, stories):
        self.stories = stories

    def numbers(self):
        return {"stories": self.stories, "reward_mean": 5.0, "exact_kl_per_sequence": 2.0}


def test_a_run_is_judged_once_a_number_of_stories(tmp_path):
    asked = []

    def judge_run(folder, stories):
        asked.append(stories)
        return Found(stories)

    (tmp_path / "summary.json").write_text("{}")
    for stories in (5, 5, 7, 7):
        run = judged("RLOO", 0.1, tmp_path, stories, judge_run)
        assert (run.kl, run.texts, run.numbers["stories"]) == (2.0, ["one", "two"], stories)
    assert asked == [5, 7]
    (tmp_path / "judged.json").write_text('{"numbers": ')
    judged("RLOO", 0.1, tmp_path, 7, judge_run)
    assert asked == [5, 7, 7]
    os.utime(tmp_path / "summary.json", ns=(2**62, 2**62))  # trained again since
    judged("RLOO", 0.1, tmp_path, 7, judge_run)
    assert asked == [5, 7, 7, 7]
