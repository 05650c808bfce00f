"""Measure the README's figures: the recipe's default, and a fixed beta at several values, as a Markdown table.

    python benchmarks/tall_tree.py                       # the default; fixed betas 0, 0.3, 4; seeds 0, 1, 2
    python benchmarks/tall_tree.py --betas 0.3 --seeds 0 -- --use_peft

What stands behind `--` goes to the recipe. Runs that are already in the output folder are not repeated.
"""

import argparse
import statistics
from pathlib import Path

from kl_alliteration.report import COLUMNS
from kl_alliteration.runs import read_summary
from kl_alliteration.sweep import ROOT, Run, run_all


def spread(values: list) -> str:
    if None in values:
        return "-"
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", nargs="+", default=["default", "0", "0.3", "4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("--at_a_time", type=int, default=1)
    parser.add_argument("options", nargs="*", help="more options of the recipe, behind --")
    args = parser.parse_args()
    runs = {}
    for beta in args.betas:
        words = () if beta == "default" else ("--config", str(ROOT / "recipes/fixed_beta.yaml"), "--beta", beta)
        words = (*words, "--show_stories_every", "0", *args.options)
        runs[beta] = [Run(f"beta_{beta}_seed_{seed}", {"seed": seed}, words) for seed in args.seeds]
    recipe, config = ROOT / "recipes/rloo_tall_tree.py", str(ROOT / "accelerate_configs/cpu.yaml")
    if run_all([run for group in runs.values() for run in group], recipe, args.folder, config, args.at_a_time):
        raise SystemExit(1)
    found = {beta: [read_summary(args.folder / run.name) for run in group] for beta, group in runs.items()}
    print(f"| beta | {' | '.join(COLUMNS.values())} | seconds |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    cells = [spread([s["before"][name] for s in next(iter(found.values()))]) for name in COLUMNS]
    print(f"| before | {' | '.join(cells)} | |")
    for beta, summaries in found.items():
        cells = [spread([s["after"][name] for s in summaries]) for name in COLUMNS]
        print(f"| {beta} | {' | '.join(cells)} | {spread([s['seconds'] for s in summaries])} |")


if __name__ == "__main__":
    main()
