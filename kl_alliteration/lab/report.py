"""A folder of runs, or one run, as a page: health, table, figures and stories, all from the runs' own files.

    python -m kl_alliteration.lab.report runs/sweep
    python -m kl_alliteration.lab.report runs/tall_tree --watch 30    # again every 30 seconds while it trains

Writes `report.html`, which needs no network and no other file, `report.md` and the figures as PNG. What is missing or
broken is said on the page, and the rest is drawn. While a run trains the page reloads itself.
"""

import argparse
import statistics
import time
from pathlib import Path

from .. import health
from ..kl import to_study_beta
from . import curves, heat
from .figures import plot_frontier, plot_groups, plot_runs, read_run
from .pages import fill_template
from .runs import group_of, read_metrics, read_summary, read_yardsticks
from .survival import one_line_errors

COLUMNS = {
    "reward_mean": "reward",
    "different_share": "different",
    "distinct_2": "distinct pairs",
    "kl_per_token": "KL per token",
    "kl_per_sequence": "KL per sequence",
    "entropy_per_token": "entropy",
    "efficiency": "efficiency",
    "effective_plots": "plots",
}
PANELS = {  # file: (log entry, label)
    "reward.png": ("reward", "reward"),
    "kl.png": ("kl", "KL to the reference (nats per token)"),
    "entropy.png": ("entropy", "entropy (nats per token)"),
    "different.png": ("guard/different_share", "share of different stories in a batch"),
}
GROWS = 600  # seconds since an unfinished run last wrote, up to which it still trains
NEEDED = tuple(COLUMNS)[:3]  # of a summary; the others are not there without a reference
COLLAPSED = 0.2  # of the untrained model's distinct pairs of words
LEARNT = 1.4  # times the untrained model's reward
NOTE = (
    "Means over seeds (smallest to largest) of fresh stories after training. KL in nats, k1; KL per token is the "
    "study's penalty before the factor, its sign turned. Collapsed: under half of the stories differ, or pairs of "
    f"words are less than {COLLAPSED} times as varied as before; learns: a reward above {LEARNT} times the one before."
)


def read_runs(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Run folders by group, seeds together, in order of their beta; and what is missing, in words."""
    groups: dict[str, list[Path]] = {}
    missing = []
    single = bool(read_metrics(folder))
    for run in [folder] if single else sorted(path for path in folder.iterdir() if path.is_dir()):
        if not read_metrics(run):
            missing.append(f"{run.name}: no metrics.jsonl that can be read, left out")
            continue
        if finished(run) is None:
            missing.append(f"{run.name}: not finished, drawn as far as it went")
        groups.setdefault(run.name if single else group_of(run.name), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: beta_of(item[1][0]))), missing


def beta_of(run: Path) -> float:
    """The beta that a run started with."""
    return next((entry["beta"] for entry in read_metrics(run) if "beta" in entry), 0.0)


def finished(run: Path) -> dict | None:
    """The run's summary; `None` where it has none that the report can use."""
    summary = read_summary(run)
    try:
        whole = all(isinstance(summary[when][name], (int, float)) for when in ("before", "after") for name in NEEDED)
    except (TypeError, KeyError):
        return None
    return summary if whole else None


def summaries(runs: list[Path], when: str) -> list[dict]:
    """What the finished ones of these runs wrote, `"before"` or `"after"` training."""
    return [summary[when] for run in runs if (summary := finished(run))]


def spread(values: list[float]) -> str:
    """Mean, and smallest to largest where they differ, to three digits."""
    if not values:
        return "-"
    size = max(map(abs, values))
    digits = 0 if size >= 99.5 else 1 if size >= 9.95 else 2 if size >= 0.0995 or size == 0 else 4
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def numbers(judgements: list[dict]) -> list[str]:
    return [spread([j[name] for j in judgements if j.get(name) is not None]) for name in COLUMNS]


def verdict(before: dict, after: dict) -> str:
    """What became of a run, in the words of the study."""
    if after["different_share"] < 0.5 or after["distinct_2"] < COLLAPSED * before["distinct_2"]:
        return "collapsed"
    gain, start = after["reward_mean"] - before["reward_mean"], abs(before["reward_mean"])  # a reward may be below 0
    return "learns, varied" if gain > (LEARNT - 1) * start else "as before"


def conclusions(groups: dict[str, list[Path]]) -> list[list[str]]:
    """A row for the model before training, and one a group: mean of the finished seeds, their range, a verdict."""
    untrained = [judgement for runs in groups.values() for judgement in summaries(runs, "before")]
    rows = [["before", "", "-", "-", "-", *numbers(untrained[:1])]] if untrained else []
    for group, runs in groups.items():
        done, beta = summaries(runs, "after"), beta_of(runs[0])
        verdicts = [verdict(*pair) for pair in zip(summaries(runs, "before"), done, strict=True)]
        words = ", ".join(
            v if verdicts.count(v) == len(verdicts) else f"{v}: {verdicts.count(v)}" for v in dict.fromkeys(verdicts)
        )
        rows.append([group, words, f"{beta:.3g}", f"{to_study_beta(beta):.3g}", str(len(done)), *numbers(done)])
    return rows


def order_of_rewards(groups: dict[str, list[Path]]) -> float | None:
    """Spearman's rank correlation of the groups' betas and mean final rewards; `None` for fewer than three betas."""
    means = [
        (beta_of(runs[0]), statistics.fmean(j["reward_mean"] for j in done))
        for runs in groups.values()
        if (done := summaries(runs, "after"))
    ]
    betas, rewards = [beta for beta, _ in means], [reward for _, reward in means]
    if len(set(betas)) < 3 or len(set(rewards)) < 2:
        return None
    # Equal values share the mean of their ranks.
    ranks = [
        [sum(w < v for w in values) + sum(w == v for w in values) / 2 for v in values] for values in (betas, rewards)
    ]
    return statistics.correlation(*ranks)


def stories(groups: dict[str, list[Path]]) -> dict[str, list[heat.Story]]:
    """Two fresh stories of the first finished run of every group, with the KL of their tokens where the run has it."""
    found = {}
    for group, runs in groups.items():
        for run in runs:
            if (summary := finished(run)) and summary.get("stories"):
                found[group] = heat.with_tokens(run, summary["stories"][:2])
                break
    return found


def health_of(run: Path) -> dict:
    """What is to be said of a run's KL: its name, whether there is an alarm, a line of summary, a line a finding."""
    try:
        examined = health.examine(run)
    except ValueError:  # a log that holds nothing of training yet
        examined = health.Examined(0, [])
    lines = [each.in_words() for each in examined.findings]
    return {"name": run.name, "alarmed": examined.alarmed, "summary": examined.in_words(), "lines": lines}


def still_trains(groups: dict[str, list[Path]]) -> bool:
    """Whether any of these runs is not finished and has written lately."""
    unfinished = (run for runs in groups.values() for run in runs if read_summary(run) is None)
    return any(time.time() - (run / "metrics.jsonl").stat().st_mtime < GROWS for run in unfinished)


def write_report(folder: str | Path, frontier_path: str | Path | None = None) -> Path:
    """Figures, `report.md` and `report.html` of a folder of runs, or of the folder of one, into that folder.

    Args:
        frontier_path (`str`, *optional*): `frontier.json` of `recipes/best_of_n.py`, drawn under reward over KL.

    Raises:
        `ValueError`: where the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}")
    groups, missing = read_runs(folder)
    figures, drawn = [], []  # as PNG for the Markdown, and to be hovered
    for name, (entry, label) in PANELS.items():
        if plot_groups(groups, entry, label, folder / name):
            figures.append((name, label))
            drawn.append((label, curves.over_time(groups, entry, label)))
        else:
            missing.append(f"{label}: not in any log")
    if groups:
        plot_runs(groups, folder / "together.png")
        figures.append(("together.png", "the KL beside the reward"))
    drawable = []
    for group, runs in groups.items():
        try:
            drawable.append(read_run(runs[0]) | {"name": group})
        except ValueError:
            missing.append(f"{group}: no KL per sequence in its logs")
    try:
        best, least = read_yardsticks(frontier_path, [run for runs in groups.values() for run in runs])
    except ValueError as error:
        best, least = [], []
        missing.append(f"best of n: {error}")
    if drawable:
        label = "reward over KL per sequence"
        plot_frontier(best, drawable, folder / "reward_over_kl.png", least)
        figures.append(("reward_over_kl.png", label))
        drawn.append((label, curves.frontier(groups, best, least)))
    order, told = order_of_rewards(groups), stories(groups)
    page = {
        "title": folder.absolute().name,
        "missing": missing,
        "health": [health_of(run) for runs in groups.values() for run in runs],
        "head": ["run", "verdict", "beta per nat", "beta, the study's", "seeds", *COLUMNS.values()],
        "rows": conclusions(groups),
        "notes": [NOTE] + ([f"Rank correlation of beta and final reward: {order:.2f}."] if order is not None else []),
        "stories": told,
    }
    fill_template(folder / "report.md", figures=figures, **page)
    page |= {"figures": drawn, "plotly": curves.script(), "growing": still_trains(groups)}
    page["scale"] = heat.scale([story for each in told.values() for story in each])
    page["warm"] = any(story.tokens for each in told.values() for story in each)
    return fill_template(folder / "report.html", **page)


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of one run, or with a folder a run")
    parser.add_argument("--frontier", help="frontier.json of recipes/best_of_n.py")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="write it again, while a run trains")
    args = parser.parse_args()
    print(write_report(args.folder, args.frontier), flush=True)
    while args.watch and still_trains(read_runs(Path(args.folder))[0]):
        time.sleep(args.watch)
        write_report(args.folder, args.frontier)


if __name__ == "__main__":
    main()
