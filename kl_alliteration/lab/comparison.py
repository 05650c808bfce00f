"""Runs of several algorithms in one picture: reward against the exact KL to their common base, stories at equal KL."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from .figures import plot_frontier
from .pages import fill_template
from .report import spread
from .runs import as_json, read_metrics, read_summary

NAME = "judged.json"
STORIES = 2  # of each algorithm on the page


@dataclass(frozen=True)
class JudgedRun:
    """A finished run of one algorithm at one beta, and what `judge_run` of `lab/run` found, with a few texts."""

    algorithm: str
    beta: float
    folder: Path
    numbers: dict
    texts: list[str]

    @property
    def kl(self) -> float:
        return self.numbers["exact_kl_per_sequence"]

    @property
    def reward(self) -> float:
        return self.numbers["reward_mean"]

    @property
    def rollout_kl(self) -> float | None:
        """Largest logged KL of the policy that sampled a batch to the one that it has made, nats per sequence."""
        logged = [e["kl/rollout_per_sequence"] for e in read_metrics(self.folder) if "kl/rollout_per_sequence" in e]
        return max(logged, default=None)


def judged(algorithm: str, beta: float, folder: Path, stories: int, judge_run) -> JudgedRun:
    """A run with its judgement: its folder's if that is newer than the run and of as many stories, else a new one."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        numbers, texts = found["numbers"], found["texts"]
        ended, then = ((folder / name).stat().st_mtime_ns for name in ("summary.json", NAME))
        known = numbers["stories"] == stories and ended <= then
    except (OSError, ValueError, KeyError):
        known = False
    if not known:
        judgement = judge_run(folder, stories)
        numbers, texts = judgement.numbers(), judgement.texts[:STORIES]
        (folder / NAME).write_text(as_json({"numbers": numbers, "texts": texts}, indent=1) + "\n", encoding="utf-8")
    return JudgedRun(algorithm, beta, folder, numbers, texts)


def grouped(runs: list[JudgedRun]) -> dict[str, dict[float, list[JudgedRun]]]:
    """By algorithm, then by beta, in their order."""
    groups: dict[str, dict[float, list[JudgedRun]]] = {}
    for run in runs:
        groups.setdefault(run.algorithm, {}).setdefault(run.beta, []).append(run)
    return groups


def equal_kl(runs: list[JudgedRun]) -> dict[str, JudgedRun]:
    """A run of each algorithm, so that their KLs are as near to one of them as can be, as a ratio."""
    groups = {
        name: [r for seeds in betas.values() for r in seeds if r.kl > 0] for name, betas in grouped(runs).items()
    }
    groups = {name: found for name, found in groups.items() if found}

    def nearest(kl: float) -> dict[str, JudgedRun]:
        return {name: min(found, key=lambda r: abs(math.log(r.kl / kl))) for name, found in groups.items()}

    def apart(chosen: dict[str, JudgedRun]) -> float:
        return max(r.kl for r in chosen.values()) / min(r.kl for r in chosen.values())

    return min((nearest(r.kl) for found in groups.values() for r in found), key=apart, default={})


def plot_algorithms(runs: list[JudgedRun], frontier: list[dict], path: Path) -> None:
    """Reward over exact KL per sequence: a dot a run, a line through the means of each beta, best-of-n behind."""
    drawn = []
    for name, betas in grouped(runs).items():
        means = [(statistics.fmean(r.kl for r in s), statistics.fmean(r.reward for r in s)) for s in betas.values()]
        points, labels = zip(*sorted(zip(means, (f"{beta:g}" for beta in betas), strict=True)), strict=True)
        dots = [(r.kl, r.reward) for seeds in betas.values() for r in seeds]
        drawn.append({"name": name, "points": list(points), "labels": labels, "dots": dots})
    plot_frontier(frontier, drawn, path)


COLUMNS = ["algorithm", "beta", "seeds", "exact KL per sequence", "reward", "times the base", "different"]
COLUMNS += ["distinct pairs", "largest KL to the sampling policy", "seconds"]


def table(runs: list[JudgedRun], base_reward: float) -> list[list[str]]:
    """A row an algorithm and beta, its cells those of `COLUMNS`."""
    rows = []
    for name, betas in grouped(runs).items():
        for beta, seeds in betas.items():
            rewards = [r.reward for r in seeds]
            cells = [name, f"{beta:g}", str(len(seeds)), spread([r.kl for r in seeds]), spread(rewards)]
            cells.append(spread([reward / base_reward for reward in rewards]) if base_reward else "-")
            cells += [spread([r.numbers[column] for r in seeds]) for column in ("different_share", "distinct_2")]
            cells.append(spread([kl for r in seeds if (kl := r.rollout_kl) is not None]))
            rows.append([*cells, spread([read_summary(r.folder)["seconds"] for r in seeds])])
    return rows


def write_page(runs: list[JudgedRun], frontier: list[dict], folder: Path) -> Path:
    """`algorithms.md`, `algorithms.png` and `algorithms.json` into a folder.

    Args:
        frontier (`list[dict]`): Of `recipes/best_of_n.py`; its first point is the base.
    """
    plot_algorithms(runs, frontier, folder / "algorithms.png")
    facts = [{"algorithm": r.algorithm, "beta": r.beta, "run": r.folder.name, **r.numbers} for r in runs]
    (folder / "algorithms.json").write_text(as_json(facts, indent=1) + "\n", encoding="utf-8")
    base = frontier[0]["reward"]
    return fill_template(
        folder / "algorithms.md",
        stories=runs[0].numbers["stories"],
        base=base,
        head=COLUMNS,
        rows=table(runs, base),
        equal=equal_kl(runs),
    )
