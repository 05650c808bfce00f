"""Measure the README's figures: the recipe's default, a budget alone, a fixed beta, as a Markdown table.

    python studies/tall_tree.py                       # the default, a budget, fixed betas 0, 0.3, 4; seeds 0, 1, 2
    python studies/tall_tree.py --betas 0.3 --seeds 0 -- --use_peft

What stands behind `--` goes to the recipe. Runs that are already in the output folder are not repeated.
"""

import statistics

from common import BUDGET, run_groups, runs_parser

from kl_alliteration.lab.report import COLUMNS
from kl_alliteration.lab.runs import read_summary
from kl_alliteration.lab.sweep import ROOT, Run


def spread(values: list) -> str:
    if None in values:
        return "-"
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    parser = runs_parser(__doc__, "benchmark")
    parser.add_argument("--betas", nargs="+", default=["default", "budget", "0", "0.3", "4"])
    parser.add_argument("options", nargs="*", help="more options of the recipe, behind --")
    args = parser.parse_args()
    runs = {}
    for beta in args.betas:
        fixed = ("--config", str(ROOT / "recipes/fixed_beta.yaml"), "--beta", beta)
        words = {"default": (), "budget": BUDGET}.get(beta, fixed)
        words = (*words, "--show_stories_every", "0", *args.options)
        runs[beta] = [Run(f"beta_{beta}_seed_{seed}", {"seed": seed}, words) for seed in args.seeds]
    found = {beta: [read_summary(path) for path in paths] for beta, paths in run_groups(runs, args).items()}
    print(f"| beta | {' | '.join(COLUMNS.values())} | seconds |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    cells = [spread([s["before"][name] for s in next(iter(found.values()))]) for name in COLUMNS]
    print(f"| before | {' | '.join(cells)} | |")
    for beta, summaries in found.items():
        cells = [spread([s["after"][name] for s in summaries]) for name in COLUMNS]
        print(f"| {beta} | {' | '.join(cells)} | {spread([s['seconds'] for s in summaries])} |")


if __name__ == "__main__":
    main()
