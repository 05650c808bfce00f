"""Does fast sampling leave the result alone? The recipe at a fixed beta with and without it, the same seeds.

    python studies/agreement.py             # three seeds each, runs/agreement

Prints reward and KL per token in each quarter of the run, mean and range over seeds, and the difference of the means
in standard errors; a figure of the curves goes into the runs' folder.
"""

import statistics
from pathlib import Path

from common import run_groups, runs_parser

from kl_alliteration.lab.figures import plot_groups
from kl_alliteration.lab.runs import read_metrics
from kl_alliteration.lab.sweep import ROOT, seeds_of

QUIET = {"disable_tqdm": True, "show_stories_every": 0, "report_to": "none", "logging_steps": 1, "max_steps": 60}
QUIET["config"] = str(ROOT / "recipes/fixed_beta.yaml")
VARIANTS = {"stock": {"fast_sampling": False}, "fast": {}}


def quarters(folder: Path, name: str) -> list[float]:
    values = [entry[name] for entry in read_metrics(folder) if name in entry]
    size = len(values) // 4
    return [statistics.fmean(values[i * size : (i + 1) * size]) for i in range(4)]


def main():
    parser = runs_parser(__doc__, "agreement")
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error("--seeds: a standard error needs two at least")
    folders = run_groups(
        {name: seeds_of(name, QUIET | options, args.seeds) for name, options in VARIANTS.items()}, args
    )
    print("| | quarter | stock TRL | fast sampling | difference (standard errors) |\n|---|---|---|---|---|")
    for name in ("reward", "kl"):
        found = {variant: [quarters(folder, name) for folder in folders[variant]] for variant in VARIANTS}
        for quarter in range(4):
            values = [[run[quarter] for run in found[variant]] for variant in VARIANTS]
            cells = [f"{statistics.fmean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in values]
            error = sum(statistics.variance(v) / len(v) for v in values) ** 0.5
            difference = (statistics.fmean(values[1]) - statistics.fmean(values[0])) / error
            print(f"| {name} | {quarter + 1} | {' | '.join(cells)} | {difference:+.1f} |")
    plot_groups(folders, "reward", "reward (alliterating pairs)", args.folder / "reward.png")


if __name__ == "__main__":
    main()
