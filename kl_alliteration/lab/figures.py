"""Figures of a run. Without pyplot: nothing here touches the user's backend or open figures."""

import math
import textwrap
from itertools import cycle
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from .runs import place_of, read_metrics

# Okabe-Ito, told apart by readers with any colour vision.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")
HALO = [withStroke(linewidth=3, foreground="white")]  # names stay readable on lines
WIDE = 60  # nats per sequence, from which on a linear axis shows a collapse and nothing else
PANELS = (
    ("reward", "reward", BLUE),
    ("kl", "KL to the reference (nats per token)", ORANGE),
    ("beta", "beta (reward per nat)", PURPLE),
    ("entropy", "entropy (nats per token)", GREEN),
)
PREFERENCE_PANELS = (
    ("rewards/accuracies", "pairs that are ranked right (share)", BLUE),
    ("rewards/margins", "margin: beta times the difference of log-ratios", ORANGE),
    ("rewards/chosen", "beta times the log-ratio of the chosen", PURPLE),
    ("entropy", "entropy (nats per token)", GREEN),
)


def plot_curves(log_history: list[dict], path: str | Path, title: str = "", base_reward: float | None = None) -> None:
    """`curves.png` of one run: reward, KL per token, beta and entropy over generations; of DPO its margins over pairs.

    Args:
        log_history (`list[dict]`): The lines of `metrics.jsonl`; an entry without a quantity is left out of its panel.
        base_reward (`float`, *optional*): Drawn as a dashed line.
    """
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    ranked = any("pairs" in entry for entry in log_history)
    unit, panels = ("pairs", PREFERENCE_PANELS) if ranked else ("generations", PANELS)
    for axis, (name, label, color) in zip(axes.flat, panels, strict=True):
        points = [(e[unit], e[name]) for e in log_history if e.get(name) is not None and unit in e]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, linewidth=2)
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="0.4")
        axis.set_title(label, loc="left", fontsize=12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=min(0, *(y for _, y in points)) if points else 0)
    if base_reward is not None and not ranked:
        axes[0, 0].axhline(base_reward, color="0.4", linestyle="--", linewidth=1)
        low, high = axes[0, 0].get_ylim()
        if math.isfinite(base_reward):  # and its name beside it, which would fall off the figure
            axes[0, 0].set_ylim(min(low, 1.05 * base_reward), max(high, 1.05 * base_reward))
        axes[0, 0].annotate("before", (1, base_reward), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    for axis in axes[1]:
        axis.set_xlabel(unit)
    figure.suptitle(textwrap.fill(title, 80), fontsize=13)
    figure.savefig(path, dpi=120)


def read_run(folder: str | Path) -> dict:
    """Name, KL per sequence and reward of each log of a run, from its `metrics.jsonl`.

    Takes the exact KL where the monitor logged it, else k1. Raises `ValueError` where there is nothing to draw.
    """
    path = Path(folder, "metrics.jsonl")
    if not path.is_file():
        raise ValueError(f"runs: there is no {path}")
    points = []
    for entry in read_metrics(folder):
        kl_per_sequence = entry.get("kl/exact_per_sequence", entry.get("kl/k1_per_sequence"))
        if kl_per_sequence is not None and "reward" in entry:
            points.append((kl_per_sequence, entry["reward"]))
    if not points:
        raise ValueError(f"runs: {path} has no KL per sequence; train with --kl_monitor and a reference")
    return {"name": Path(folder).name, "points": points}


def plot_frontier(frontier: list[dict], runs: list[dict], path: str | Path, least: list[dict] = ()) -> None:
    """Reward over KL per sequence: best-of-n with its band, the least KL that a reward costs, runs from [`read_run`].

    A run may have a `color`, `labels` of its points, and `dots`, more points around its line.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    if frontier:
        kl = [point["kl_per_sequence"] for point in frontier]
        carried = [point for point in frontier if point["low"] is not None]  # of which there is a band
        band = [[point[name] for point in carried] for name in ("kl_per_sequence", "low", "high")]
        axis.fill_between(*band, color="0.8", linewidth=0)
        axis.plot(kl, [p["reward"] for p in frontier], color="0.2", linewidth=2)
        last = frontier[-1]
        end = last["kl_per_sequence"], last["reward"]
        axis.annotate(f" best of n, to {last['n']:,}", end, fontsize=11, path_effects=HALO)
    if least:
        curve = [(point["kl_per_sequence"], point["reward"]) for point in least]
        axis.plot(*zip(*curve, strict=True), color="0.2", linewidth=1.5, linestyle="--")
        if "low" in least[0]:
            band = [p["low"] for p in least], [p["high"] for p in least]
            axis.fill_between([kl for kl, _ in curve], *band, color="0.9", linewidth=0)
        axis.annotate(" least KL", curve[-1], fontsize=11, path_effects=HALO)
    for i, (run, color) in enumerate(zip(runs, cycle(COLORS), strict=False)):
        color = run.get("color", color)
        axis.plot(*zip(*run["points"], strict=True), color=color, linewidth=1.5)
        if "dots" in run:
            axis.scatter(*zip(*run["dots"], strict=True), color=color, s=16, alpha=0.6, linewidths=0)
        for label, place in zip(run.get("labels", ()), run["points"], strict=False):
            axis.plot(*place, "o", color=color, markersize=6)
            offset = {"xytext": (0, -15 if i else 7), "textcoords": "offset points", "ha": "center"}
            axis.annotate(label, place, color=color, fontsize=9, path_effects=HALO, **offset)
        axis.annotate(f"  {run['name']}", run["points"][-1], color=color, fontsize=11, va="center", path_effects=HALO)
    if max((kl for run in runs for kl, _ in run["points"]), default=0) > WIDE:
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(left=0)
    axis.set_xlabel("KL to the reference (nats per sequence)")
    axis.set_ylabel("reward")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    figure.savefig(path, dpi=120)


def plot_groups(groups: dict[str, list[Path]], name: str, label: str, path: str | Path) -> bool:
    """One quantity of the logs over generations: a colour a group of run folders, a thin line a seed.

    `False`, and no file, where no log has it.
    """
    found = {
        group: [[(place_of(e), e[name]) for e in read_metrics(run) if name in e and place_of(e)] for run in runs]
        for group, runs in groups.items()
    }
    units = {unit for runs in found.values() for points in runs for (unit, _), _ in points}
    lines = {group: [[(x, y) for (_, x), y in points] for points in runs] for group, runs in found.items()}
    return plot_lines({label: lines}, path, unit=" or ".join(sorted(units)))


def plot_lines(
    panels: dict[str, dict[str, list[list[tuple]]]],
    path: str | Path,
    mark: tuple[float, str] | None = None,
    unit: str = "generations",
) -> bool:
    """Panels of quantities over generations, or another unit: label to group to a line of `(place, value)` a seed.

    `mark` is a place on the horizontal axis with its name. `False`, and no file, where all lines are empty.
    """
    height = 5 if len(panels) == 1 else 3.2 * len(panels)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    drawn = False
    for axis, (label, groups) in zip(axes[:, 0], panels.items(), strict=True):
        ends = []
        for (group, lines), color in zip(groups.items(), cycle(COLORS), strict=False):
            for points in filter(None, lines):
                axis.plot(*zip(*points, strict=True), color=color, linewidth=1.4, alpha=0.8)
            if last := [points[-1] for points in lines if points]:
                ends.append((fmean(y for _, y in last), max(x for x, _ in last), group, color))
        if mark is not None:
            axis.axvline(mark[0], color="0.4", linestyle="--", linewidth=1)
        if ends:
            drawn = True
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
            _label_ends(axis, ends, step=0.06 * 5 / (height / len(panels)))
        axis.set_title(label, loc="left", fontsize=14)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    if mark is not None:
        axes[0, 0].annotate(f"{mark[1]} ", (mark[0], 1), xycoords=("data", "axes fraction"), ha="right", va="top")
    axes[-1, 0].set_xlabel(unit, fontsize=12)
    if drawn:
        figure.savefig(path, dpi=120)
    return drawn


def _label_ends(axis, ends: list[tuple[float, float, str, str]], step: float = 0.06) -> None:
    """Names beside the right end of their lines, `step` of the axis's height apart where they would overlap."""
    to_axes, heights = axis.transData + axis.transAxes.inverted(), []
    for y, x, *_ in sorted(ends):
        heights.append(max(to_axes.transform((x, y))[1], heights[-1] + step if heights else 0))
    too_high = max(0, heights[-1] - 1) if heights else 0
    for (y, x, name, color), height in zip(sorted(ends), heights, strict=True):
        axis.annotate(
            name,
            (x, y),
            xytext=(to_axes.transform((x, y))[0] + 0.045, height - too_high),
            textcoords="axes fraction",
            color=color,
            fontsize=11,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.4, "linewidth": 0.8},
        )


def plot_runs(groups: dict[str, list[Path]], path: str | Path, target_kl_per_token: float | None = None) -> None:
    """KL per token, beta and reward over generations: a colour a group of run folders, a thin line a seed.

    KL and reward are running means over a tenth of the run, 20 logs at most. `target_kl_per_token` is drawn with the
    20 % on both sides of it.
    """
    figure = Figure(figsize=(9, 9), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    panels = (("kl", "KL to the reference (nats per token)"), ("beta", "beta (reward per nat)"))
    panels += (("reward", "reward"),)
    for axis, (name, label) in zip(axes, panels, strict=True):
        ends = []
        for (group, folders), color in zip(groups.items(), cycle(COLORS), strict=False):
            last = []
            for folder in folders:
                log = [e for e in read_metrics(folder) if e.get(name) is not None and "generations" in e]
                window = 1 if name == "beta" else min(20, max(1, len(log) // 10))
                values = [e.get("kl/exact_per_token", e["kl"]) if name == "kl" else e[name] for e in log]
                means = [fmean(values[i : i + window]) for i in range(len(values) - window + 1)]
                places = [e["generations"] for e in log[window - 1 :]]
                axis.plot(places, means, color=color, linewidth=1.4, alpha=0.85)
                last += list(zip(places, means, strict=True))[-1:]
            if last:
                ends.append((fmean(y for _, y in last), max(x for x, _ in last), group, color))
        axis.set_title(label, loc="left", fontsize=12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if name == "beta":
            ends = [end for end in ends if end[0] > 0]  # there is no 0 on a logarithmic axis
            axis.set_yscale("log" if ends else "linear")
        else:
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        if len(groups) > 1:
            _label_ends(axis, ends, step=0.085)
    if target_kl_per_token:
        axes[0].axhspan(0.8 * target_kl_per_token, 1.2 * target_kl_per_token, color="0.9", zorder=0)
        axes[0].axhline(target_kl_per_token, color="0.4", linestyle="--", linewidth=1)
    axes[-1].set_xlabel("generations")
    figure.savefig(path, dpi=120)
