"""Measure the README's figures: the recipe at several betas and seeds, one after the other, as a Markdown table.

    python benchmarks/tall_tree.py                       # beta 0, the default and 4; seeds 0, 1, 2
    python benchmarks/tall_tree.py --betas 0.3 --seeds 0 -- --use_peft

What stands behind `--` goes to the recipe. Runs that are already in the output folder are not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLUMNS = {
    "reward_mean": "reward",
    "different_share": "different",
    "distinct_2": "distinct pairs",
    "kl_per_token": "KL per token",
    "kl_per_sequence": "KL per sequence",
    "entropy_per_token": "entropy",
}


def run(beta: str, seed: int, folder: Path, options: list[str]) -> dict:
    if not (folder / "summary.json").exists():
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file"]
        config, recipe = ROOT / "accelerate_configs/cpu.yaml", ROOT / "recipes/rloo_tall_tree.py"
        arguments = ["--seed", str(seed), "--output_dir", str(folder), "--show_stories_every", "0", *options]
        if beta != "default":
            arguments += ["--beta", beta]
        subprocess.run([*launch, str(config), str(recipe), *arguments], check=True, cwd=ROOT, stdout=sys.stderr)
    return json.loads((folder / "summary.json").read_text())


def spread(values: list) -> str:
    if None in values:
        return "-"
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", nargs="+", default=["0", "default", "4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("options", nargs="*", help="more options of the recipe, behind --")
    args = parser.parse_args()
    lines = [f"| beta | {' | '.join(COLUMNS.values())} | seconds |", "|---" * (len(COLUMNS) + 2) + "|"]
    before = None
    for beta in args.betas:
        runs = [run(beta, seed, args.folder / f"beta_{beta}_seed_{seed}", args.options) for seed in args.seeds]
        before = before or runs
        cells = [spread([r["after"][name] for r in runs]) for name in COLUMNS]
        lines.append(f"| {beta} | {' | '.join(cells)} | {spread([r['seconds'] for r in runs])} |")
    cells = [spread([r["before"][name] for r in before]) for name in COLUMNS]
    lines.insert(2, f"| before | {' | '.join(cells)} | |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
