"""What keeps many plots, and what it costs: openings at a price, and each token credited with what follows soon.

    python studies/variety.py                          # seven settings, seed 0, 2,400 generations; a figure
    python studies/variety.py --settings default --seeds 0 1 2 -- --max_steps 500

Runs go into runs/variety and are kept. Prints the table in Markdown, means with the range over seeds, and draws the
plots that are told over the reward as the runs go on (--figure).
"""

from pathlib import Path

from common import BUDGET, JUDGED, quiet, run_groups, runs_parser, spread
from matplotlib.figure import Figure

from kl_alliteration.lab.runs import read_metrics, read_summary
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import ROOT, seeds_of

OPENING = {"kl_opening_tokens": 12}
SETTINGS = {  # options of the default beside which a setting stands, or of a budget alone; and its words in the figure
    "budget": (BUDGET, {}, "a budget alone"),
    "discount_1": (BUDGET, {"reward_discount": 1.0}, "reward by token"),
    "discount_0.9": (BUDGET, {"reward_discount": 0.9}, "discount 0.9"),
    "discount_0.6": (BUDGET, {"reward_discount": 0.6}, "discount 0.6"),
    "opening_0.5": (BUDGET, OPENING | {"kl_opening_price": 0.5}, "openings at 0.5"),
    "default": ((), {}, "discount 0.8, openings at 0.5: the default"),
    "0.9_and_0.75": ((), {"reward_discount": 0.9, "kl_opening_price": 0.75}, "0.9, at 0.75"),
}
COLUMNS = ("exact_kl_per_sequence", "kl_of_plots", "effective_plots", "most_told_share", "distinct_2", "reward_mean")


def row(name: str, summaries: list[dict]) -> str:
    """Behind three of them that of the base; at the end the reward over the base's."""
    before, cells = summaries[0]["before"], []
    for column in COLUMNS:
        base = f", {before[column]:.2f}" if column in ("effective_plots", "distinct_2", "reward_mean") else ""
        cells.append(spread([summary["after"][column] for summary in summaries]) + base)
    over = [summary["after"]["reward_mean"] / summary["before"]["reward_mean"] for summary in summaries]
    return f"| {name} | {' | '.join(cells)} | {spread(over)} |"


def draw(groups: dict[str, list[Path]], path: Path) -> None:
    """Plots over reward, a line a setting through the logs of its first seed, with a dot at the end."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for i, (name, folders) in enumerate(groups.items()):
        # The window of four hundred texts is full from the tenth step on.
        log = [entry for entry in read_metrics(folders[0]) if "plots/effective" in entry and entry["step"] >= 10]
        points = [(entry["reward"], entry["plots/effective"]) for entry in log]
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), color=f"C{i}", linewidth=1.5, label=SETTINGS[name][2])
        axis.plot(*points[-1], "o", color=f"C{i}")
    axis.set_xlabel("reward")
    axis.set_ylabel("plots told (effective number)")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


@one_line_errors
def main():
    parser = runs_parser(__doc__, "variety")
    parser.set_defaults(seeds=[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--figure", type=Path, default=ROOT / "runs/variety.png")
    parser.add_argument("options", nargs="*", help="more options of the recipe, behind --")
    args = parser.parse_args()
    quiet()
    groups = {}
    for name in args.settings:
        config, options, _ = SETTINGS[name]
        groups[name] = seeds_of(name, options, args.seeds, (*config, "--plots", "true", *JUDGED, *args.options))
    folders = run_groups(groups, args)
    head = "KL, nats per sequence | of plots | plots (before) | most told | distinct-2 (before) | reward (before)"
    print(f"| | {head} | over the base's |\n|---|---|---|---|---|---|---|---|")
    for name, paths in folders.items():
        print(row(SETTINGS[name][2], [read_summary(path) for path in paths]))
    draw(folders, args.figure)


if __name__ == "__main__":
    main()
