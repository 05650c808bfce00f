"""The page of a folder of runs: what is there is drawn, what is not is said."""

import json
import os
import re
import shutil
import sys

import pytest

from kl_alliteration.lab import report
from kl_alliteration.lab.report import PANELS, order_of_rewards, spread, verdict, write_report
from kl_alliteration.lab.runs import begin_record
from kl_alliteration.text import alliterating_words


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
        before = numbers | {"reward_mean": 5.0}
        summary = {"before": before, "after": numbers, "stories": ["A tall t<ree> & [b]tried[/b]", "once upon"]}
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_the_page_holds_table_figures_and_stories(tmp_path):
    for seed, reward in ((0, 10.0), (1, 12.0)):
        a_run(tmp_path, f"beta_0.1_seed_{seed}", 0.1, reward)
    a_run(tmp_path, "beta_10_seed_0", 10, 4.0)
    page = write_report(tmp_path).read_text()
    cells = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page)][1:]
    assert [row[:6] for row in cells] == [
        ["before", "", "-", "-", "-", "5.00"],
        ["beta 0.1", "learns, varied", "0.1", "9.9", "2", "11.0 (10.0 to 12.0)"],
        ["beta 10", "as before", "10", "990", "1", "4.00"],
    ]
    assert page.count("plotly-graph-div") == 4  # reward, KL, entropy, reward over KL: no guard in these logs
    assert page.count("KL health after 3 steps: no alarm") == 3
    assert "share of different stories in a batch: not in any log" in page
    assert "<mark>tall</mark> <mark>t&lt;ree&gt;</mark> &amp; [b]tried[/b]" in page  # a story is no markup
    markdown = (tmp_path / "report.md").read_text()
    assert "| beta 0.1 | learns, varied | 0.1 | 9.9 | 2 | 11.0 (10.0 to 12.0) |" in markdown
    assert "**tall**" in markdown


def test_what_is_missing_is_said_and_the_rest_is_drawn(tmp_path):
    a_run(tmp_path, "good_seed_0", 0.1, 10.0)
    a_run(tmp_path, "half_seed_0", 0.2, 10.0, finished=False)
    broken = a_run(tmp_path, "broken_seed_0", 0.3, 10.0)
    (broken / "metrics.jsonl").write_text("not JSON\n")
    torn = a_run(tmp_path, "torn_seed_0", 0.4, 10.0)
    (torn / "summary.json").write_text('{"before": ')
    other = a_run(tmp_path, "other_seed_0", 0.5, 10.0)
    (other / "summary.json").write_text('{"before": [], "after": 3}')  # JSON, and none of ours
    page = write_report(tmp_path, frontier_path=tmp_path / "nowhere.json").read_text()
    for words in (
        "other_seed_0: not finished",
        "half_seed_0: not finished, drawn as far as it went",
        "broken_seed_0: no metrics.jsonl that can be read, left out",
        "torn_seed_0: not finished",
        "nowhere.json does not serve: ",
    ):
        assert words in page
    assert "good" in page and page.count("plotly-graph-div") == 4


def test_a_yardstick_of_another_reward_is_said_and_not_drawn(tmp_path):
    """Laid over runs that it is not of, it is a ceiling that is none."""
    sampled = {"reward_func": "mine.reward", "prompt": None, "dataset_name": "held_out.jsonl"}
    sampled |= {"temperature": 0.7, "max_new_tokens": 64}
    point = {"n": 2, "kl_per_sequence": 0.2, "reward": 6.0, "low": 5.0, "high": 7.0}
    yardstick = tmp_path / "frontier.json"
    yardstick.write_text(json.dumps({"model": "Tiny", "sampled": sampled, "frontier": [point]}))
    ours = sampled | {"model": "tiny", "dataset_name": "prompts.jsonl"}  # trains on others than it is judged on
    kinds = {"a": {}, "b": {"reward_func": "yours.reward"}, "c": {"temperature": 1.0}, "d": {"beside": "top_k 50"}}
    for name, changed in kinds.items():
        folder = a_run(tmp_path / name, "beta_1_seed_0", 1.0, 10.0)
        begin_record(folder, anew=False, sampled=ours | changed)
        a_run(tmp_path / name, "of_an_earlier_version", 1.0, 10.0)
    drawn, *others = (write_report(tmp_path / name, yardstick).read_text() for name in "abcd")
    curve = '"name":"best of n"'
    assert curve in drawn and not any(curve in page for page in others)
    assert (
        "yardstick&#39;s reward_func is &#39;mine.reward&#39;, and beta_1_seed_0 has &#39;yours.reward&#39;"
        in others[0]
    )
    assert "yardstick&#39;s temperature is 0.7, and beta_1_seed_0 has 1.0" in others[1]
    assert "it is of plain samples of the base, and beta_1_seed_0 has top_k 50" in others[2]


@pytest.mark.filterwarnings("error")
def test_a_run_without_a_penalty_is_drawn_too(tmp_path):
    for beta, reward in ((0.0, 90.0), (0.5, 5.0)):
        a_run(tmp_path, f"beta_{beta}_seed_0", beta, reward)
    assert write_report(tmp_path).read_text().count("plotly-graph-div") == 4
    assert write_report(a_run(tmp_path / "alone", "beta_0_seed_0", 0.0, 9.0).parent).is_file()


def test_a_run_of_dpo_is_drawn_over_its_pairs(tmp_path):
    run = tmp_path / "dpo_seed_0"
    run.mkdir()
    lines = [{"step": i, "pairs": 4 * i, "loss": 0.5, "entropy": 1.5 - i / 10} for i in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text()
    assert (tmp_path / "entropy.png").is_file() and "entropy (nats per token): not in any log" not in page
    assert "%{x} pairs: %{y:.4g}" in page


def test_an_empty_folder_is_a_page_and_none_is_an_error(tmp_path):
    assert "not in any log" in write_report(tmp_path).read_text()
    with pytest.raises(ValueError, match="there is no folder"):
        write_report(tmp_path / "nowhere")


def test_the_folder_of_one_run_is_a_page_with_its_health(tmp_path):
    run = a_run(tmp_path, "tall_seed_0", 0.1, 10.0)
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"generations": 80, "reward": 9.0, "loss": null, "step": 4}\n')
    page = write_report(run).read_text()
    assert "<td>tall_seed_0</td>" in page and "KL health after 4 steps: 1 alarm: not_finite" in page
    assert "step 4, not_finite: loss nan; healthy is finite" in page and page.count("plotly-graph-div") == 4


def test_a_page_reloads_itself_while_a_run_trains(tmp_path, monkeypatch):
    run = a_run(tmp_path, "half_seed_0", 0.2, 10.0, finished=False)
    assert "http-equiv" in write_report(tmp_path).read_text()
    waited = []

    def sleep(seconds):  # in which the run comes to its end
        waited.append(seconds)
        shutil.copy(a_run(tmp_path / "made", "other", 0.2, 10.0) / "summary.json", run)

    monkeypatch.setattr(report.time, "sleep", sleep)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "--watch", "7"])
    report.main()
    assert waited == [7] and "http-equiv" not in (tmp_path / "report.html").read_text()
    (run / "summary.json").unlink()
    long_ago = (run / "metrics.jsonl").stat().st_mtime - report.GROWS - 1
    os.utime(run / "metrics.jsonl", (long_ago, long_ago))
    assert "http-equiv" not in write_report(tmp_path).read_text()  # it was broken off


@pytest.mark.parametrize(
    ("after", "says"),
    [
        ({"reward_mean": 90.0, "different_share": 0.49, "distinct_2": 0.7}, "collapsed"),
        ({"reward_mean": 90.0, "different_share": 1.0, "distinct_2": 0.14}, "collapsed"),
        ({"reward_mean": 7.1, "different_share": 1.0, "distinct_2": 0.16}, "learns, varied"),
        ({"reward_mean": 6.9, "different_share": 1.0, "distinct_2": 0.7}, "as before"),
    ],
)
def test_the_verdict(after, says):
    assert verdict({"reward_mean": 5.0, "different_share": 1.0, "distinct_2": 0.75}, after) == says


@pytest.mark.parametrize(("before", "after"), [(-10.0, -13.5), (-10.0, -7.0), (0.0, 0.0)])
def test_below_zero_a_lower_reward_is_nothing_learnt(before, after):
    judged = {"different_share": 1.0, "distinct_2": 0.7}
    said = verdict(judged | {"reward_mean": before}, judged | {"reward_mean": after})
    assert said == "as before"
    assert verdict(judged | {"reward_mean": -10.0}, judged | {"reward_mean": -5.0}) == "learns, varied"


def test_cells_have_three_digits():
    assert [spread([value]) for value in (123.4, 12.34, 1.234, -12.34, 0.1234)] == [
        "123",
        "12.3",
        "1.23",
        "-12.3",
        "0.12",
    ]
    assert spread([0.0042, 0.0043]) == "0.0043 (0.0042 to 0.0043)"
    assert spread([0.0, 1.0]) == "0.50 (0.00 to 1.00)"


def test_the_order_of_rewards(tmp_path):
    rewards = {0.0: 90.0, 0.1: 95.0, 1.0: 20.0, 10.0: 4.0}
    groups = {f"beta_{beta}": [a_run(tmp_path, f"beta_{beta}_seed_0", beta, r)] for beta, r in rewards.items()}
    # ranks 1 2 3 4 against 3 4 2 1: differences -2 -2 1 3, 1 - 6 * 18 / (4 * 15)
    assert order_of_rewards(groups) == pytest.approx(-0.8)
    assert order_of_rewards(dict(list(groups.items())[:2])) is None


def test_groups_of_one_beta_all_count_in_the_order_of_rewards(tmp_path):
    found = {"low": (0.0, 9.0), "one": (1.0, 6.0), "one_with_a_budget": (1.0, 3.0)}
    groups = {name: [a_run(tmp_path, f"{name}_seed_0", *numbers)] for name, numbers in found.items()}
    assert order_of_rewards(groups) is None  # of two betas
    groups["high"] = [a_run(tmp_path, "high_seed_0", 10.0, 1.0)]
    # ranks 1 2.5 2.5 4 against 4 3 2 1, about their mean: (-1.5 * 1.5 + 0 + 0 - 1.5 * 1.5) / sqrt(4.5 * 5)
    assert order_of_rewards(groups) == pytest.approx(-4.5 / 22.5**0.5)


def test_a_browser_finds_each_figure_and_story(browser, tmp_path):
    a_run(tmp_path, "beta_0.1_seed_0", 0.1, 10.0)
    a_run(tmp_path, "beta_10_seed_0", 10, 4.0)
    path = write_report(tmp_path)
    page, asked, errors = browser.new_page(viewport={"width": 420, "height": 800}), [], []
    page.on("request", lambda request: asked.append(request.url[:5]))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(path.as_uri())
    page.wait_for_selector(".main-svg")
    lines = "all => all.map(e => [e.querySelector('h2').innerText, e.querySelectorAll('.lines').length > 0])"
    drawn = page.eval_on_selector_all(".figures section", lines)
    told = page.eval_on_selector_all("blockquote", "all => all.map(q => q.innerText)")
    marked = page.eval_on_selector_all("mark", "all => all.map(q => q.innerText)")
    wide = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.reload()  # a figure takes its width when it is drawn
    page.wait_for_selector(".main-svg")
    sizes = "all => all.map(e => [e.clientWidth, e.querySelector('.main-svg').getBoundingClientRect().width])"
    widths = page.eval_on_selector_all(".figures section", sizes)
    labels = [label for _, label in list(PANELS.values())[:3]]
    assert drawn == [[label, True] for label in (*labels, "reward over KL per sequence")]
    assert told == ["A tall t<ree> & [b]tried[/b]", "once upon"] * 2
    assert marked == ["tall", "t<ree>"] * 2
    assert set(asked) <= {"file:", "data:"} and not errors
    assert all(figure <= section < 700 for section, figure in widths), widths  # two columns, none over the other
    assert not wide  # a phone scrolls the table, not the page


def test_both_words_of_a_pair_are_marked():
    found = alliterating_words("A tall Tree saw it, the tiger")
    assert [word for word, alliterates in found if alliterates] == ["tall", "Tree", "the", "tiger"]
    assert alliterating_words("") == []
