"""Figures of a run."""

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
