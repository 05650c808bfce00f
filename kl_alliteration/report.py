"""Figures of a run."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Okabe-Ito, told apart by readers with any colour vision.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
PANELS = (
    ("reward", "reward (alliterating pairs)", BLUE),
    ("kl", "KL to the reference (nats per token)", ORANGE),
    ("beta", "beta (reward per nat)", PURPLE),
    ("entropy", "entropy (nats per token)", GREEN),
)


def plot_curves(log_history: list[dict], path: str | Path, title: str = "", base_reward: float | None = None) -> None:
    """`curves.png` of one run: reward, KL per token, beta and entropy over generations.

    Args:
        log_history (`list[dict]`): The lines of `metrics.jsonl`; an entry without a quantity is left out of its panel.
        base_reward (`float`, *optional*): Drawn as a dashed line.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    for axis, (name, label, color) in zip(axes.flat, PANELS, strict=True):
        points = [(e["generations"], e[name]) for e in log_history if e.get(name) is not None and "generations" in e]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, linewidth=2)
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="0.4")
        axis.set_title(label, loc="left", fontsize=12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=min(0, *(y for _, y in points)) if points else 0)
    if base_reward is not None:
        axes[0, 0].axhline(base_reward, color="0.4", linestyle="--", linewidth=1)
        axes[0, 0].annotate("before", (1, base_reward), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    for axis in axes[1]:
        axis.set_xlabel("generations")
    figure.suptitle(title, fontsize=13)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read_run(folder: str | Path) -> dict:
    """Name, KL per sequence and reward of each log of a run, from its `metrics.jsonl`.

    Takes the exact KL where the monitor logged it, else k1. Raises `ValueError` where there is nothing to draw.
    """
    path = Path(folder, "metrics.jsonl")
    if not path.is_file():
        raise ValueError(f"runs: there is no {path}")
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        kl_per_sequence = entry.get("kl/exact_per_sequence", entry.get("kl/k1_per_sequence"))
        if kl_per_sequence is not None and "reward" in entry:
            points.append((kl_per_sequence, entry["reward"]))
    if not points:
        raise ValueError(f"runs: {path} has no KL per sequence; train with --kl_monitor and a reference")
    return {"name": Path(folder).name, "points": points}


def plot_frontier(frontier: list[dict], runs: list[dict], path: str | Path) -> None:
    """Reward over KL per sequence: best-of-n with its band, and training runs from [`read_run`]."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    kl = [point["kl_per_sequence"] for point in frontier]
    axis.fill_between(kl, [p["low"] for p in frontier], [p["high"] for p in frontier], color="0.8", linewidth=0)
    axis.plot(kl, [p["reward"] for p in frontier], color="0.2", linewidth=2)
    last = frontier[-1]
    axis.annotate(f"best of n, to {last['n']:,}", (last["kl_per_sequence"], last["reward"]), fontsize=11)
    for run, color in zip(runs, [BLUE, ORANGE, GREEN, PURPLE] * len(runs), strict=False):
        axis.plot(*zip(*run["points"], strict=True), color=color, marker="o", markersize=3, linewidth=1.5)
        axis.annotate(run["name"], run["points"][-1], color=color, fontsize=11)
    axis.set_xlabel("KL to the reference (nats per sequence)")
    axis.set_ylabel("reward (alliterating pairs)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    plt.close(figure)
