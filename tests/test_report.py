"""The page of a folder of runs: what is there is drawn, what is not is said."""

import json
import re

import pytest

from kl_alliteration.alliteration import alliterating_words
from kl_alliteration.report import write_report


def a_run(folder, name: str, beta: float, reward: float, finished: bool = True):
    run = folder / name
    run.mkdir(parents=True)
    log = [
        {"generations": 20 * i, "reward": reward + i, "kl": 0.1 * i, "beta": beta, "entropy": 1.0} for i in (1, 2, 3)
    ]
    for entry in log:
        entry["kl/k1_per_sequence"] = 9 * entry["kl"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    if finished:
        numbers = {"reward_mean": reward, "different_share": 0.5, "distinct_2": 0.25, "kl_per_token": None}
        summary = {"before": numbers, "after": numbers, "stories": ["A tall t<ree> & [b]tried[/b]", "once upon"]}
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_the_page_holds_table_figures_and_stories(tmp_path):
    for seed, reward in ((0, 10.0), (1, 12.0)):
        a_run(tmp_path, f"beta_0.1_seed_{seed}", 0.1, reward)
    a_run(tmp_path, "beta_10_seed_0", 10, 4.0)
    page = write_report(tmp_path).read_text()
    cells = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page)][1:]
    assert [row[:4] for row in cells] == [
        ["beta_0.1", "0.1", "2", "11.00 (10.00 to 12.00)"],
        ["beta_10", "10", "1", "4.00"],
    ]
    assert page.count("data:image/png;base64,") == 4  # reward, KL, entropy, reward over KL: no guard in these logs
    assert "share of different stories in a batch: not in any log" in page
    assert "<mark>tall</mark> <mark>t&lt;ree&gt;</mark> &amp; [b]tried[/b]" in page  # a story is no markup
    assert "http" not in page and "<script" not in page
    markdown = (tmp_path / "report.md").read_text()
    assert "| beta_0.1 | 0.1 | 2 | 11.00 (10.00 to 12.00) |" in markdown
    assert "**tall**" in markdown


def test_what_is_missing_is_said_and_the_rest_is_drawn(tmp_path):
    a_run(tmp_path, "good_seed_0", 0.1, 10.0)
    a_run(tmp_path, "half_seed_0", 0.2, 10.0, finished=False)
    broken = a_run(tmp_path, "broken_seed_0", 0.3, 10.0)
    (broken / "metrics.jsonl").write_text("not JSON\n")
    torn = a_run(tmp_path, "torn_seed_0", 0.4, 10.0)
    (torn / "summary.json").write_text('{"before": ')
    page = write_report(tmp_path, frontier_path=tmp_path / "nowhere.json").read_text()
    for words in (
        "half_seed_0: not finished, drawn as far as it went",
        "broken_seed_0: no metrics.jsonl that can be read, left out",
        "torn_seed_0: not finished",
        "nowhere.json cannot be read",
    ):
        assert words in page
    assert "good" in page and page.count("data:image/png") == 4


def test_an_empty_folder_is_a_page_and_none_is_an_error(tmp_path):
    assert "not in any log" in write_report(tmp_path).read_text()
    with pytest.raises(ValueError, match="there is no folder"):
        write_report(tmp_path / "nowhere")


def test_both_words_of_a_pair_are_marked():
    found = alliterating_words("A tall Tree saw it, the tiger")
    assert [word for word, alliterates in found if alliterates] == ["tall", "Tree", "the", "tiger"]
    assert alliterating_words("") == []
