"""What the studies share: which seeds, where the runs go, and bringing them to their end."""

import argparse
import statistics
import warnings
from pathlib import Path

import torch
from transformers.utils import logging

from kl_alliteration.lab.sweep import ROOT, Run, run_all

BUDGET = ("--config", str(ROOT / "recipes/budget.yaml"))  # what most studies change one thing of
JUDGED = ("--eval_stories", "400", "--show_stories_every", "0", "--report_to", "none", "--disable_tqdm", "true")


def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def runs_parser(doc: str, folder: str) -> argparse.ArgumentParser:
    """Seeds, the folder of the runs under `runs`, and how many run side by side."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / folder)
    parser.add_argument("--at_a_time", type=int, default=1)
    return parser


def run_groups(groups: dict[str, list[Run]], args: argparse.Namespace) -> dict[str, list[Path]]:
    """Bring all runs of `rloo_tall_tree` to their end; their folders by group. Exits where one failed."""
    config = str(ROOT / f"accelerate_configs/{'single_gpu' if torch.cuda.is_available() else 'cpu'}.yaml")
    if run_all([run for group in groups.values() for run in group], args.folder, config, args.at_a_time):
        raise SystemExit(1)
    return {name: [args.folder / run.name for run in group] for name, group in groups.items()}


def spread(values: list[float | None]) -> str:
    """The mean, and the range where there are several; a dash where a run has none, for the others are a selection."""
    if not values or None in values:
        return "-"
    around = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{around}"
