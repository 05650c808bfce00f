"""The page's figures, to be hovered and switched by their legend: plotly's, in the page itself, without a network."""

from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from .figures import COLORS, read_run
from .runs import place_of, read_metrics

HEIGHT = 360  # pixels
CONFIG = {"displaylogo": False, "responsive": True}
# On light and on dark: no ground of its own.
LOOK = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": "#888"},
    "margin": {"l": 50, "r": 10, "t": 10, "b": 40},
    "legend": {"orientation": "h", "y": -0.2},
    "hovermode": "closest",
    "height": HEIGHT,
}
AXIS = {"gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.5)"}


def script() -> str:
    """Plotly's own script, which a page needs once."""
    return get_plotlyjs()


def _html(traces: list[go.Scatter], x: str, y: str) -> str:
    figure = go.Figure(traces, LOOK | {"xaxis": AXIS | {"title": x}, "yaxis": AXIS | {"title": y}})
    return figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)


def over_time(groups: dict[str, list[Path]], entry: str, label: str) -> str | None:
    """An entry of the logs over generations, a line a run; a click on a group's name hides its runs.

    `None` where no log has it.
    """
    traces, units = [], set()
    for place, (group, runs) in enumerate(groups.items()):
        for number, run in enumerate(runs):
            points = [(*place_of(e), e[entry]) for e in read_metrics(run) if entry in e and place_of(e)]
            if points:
                names, x, y = zip(*points, strict=True)
                units.add(names[0])
                traces.append(
                    go.Scatter(
                        x=x,
                        y=y,
                        name=group,
                        legendgroup=group,
                        showlegend=not number,
                        line={"color": COLORS[place % len(COLORS)], "width": 1.5},
                        hovertemplate=f"{run.name}<br>%{{x}} {names[0]}: %{{y:.4g}}<extra></extra>",
                    )
                )
    return _html(traces, " or ".join(sorted(units)), label) if traces else None


def frontier(groups: dict[str, list[Path]], best_of_n: list[dict], least: list[dict]) -> str | None:
    """Reward over KL per sequence: the first run of each group, best-of-n, and the least KL that a reward costs."""
    traces = []
    for name, points, dash in (("best of n", best_of_n, "solid"), ("least KL", least, "dash")):
        if points:
            x, y = ([point[key] for point in points] for key in ("kl_per_sequence", "reward"))
            traces.append(go.Scatter(x=x, y=y, name=name, line={"color": "#888", "dash": dash}))
    for place, (group, runs) in enumerate(groups.items()):
        try:
            x, y = zip(*read_run(runs[0])["points"], strict=True)
        except ValueError:
            continue
        color = {"color": COLORS[place % len(COLORS)]}
        traces.append(go.Scatter(x=x, y=y, name=group, mode="lines+markers", line=color, marker={"size": 4}))
    return _html(traces, "KL to the reference (nats per sequence)", "reward") if traces else None
