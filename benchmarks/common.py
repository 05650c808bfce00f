"""What the benchmarks share: the trainer that they time, silence, and groups of runs."""

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging
from trl import RLOOConfig, RLOOTrainer

from kl_alliteration import alliteration_reward
from kl_alliteration.story_lm import MODEL_PATH, PROMPT
from kl_alliteration.sweep import ROOT, Run, run_all

TOKENS = 100


def make_trainer(folder: str = str(MODEL_PATH), **options) -> RLOOTrainer:
    """A stock trainer on the recipe's task, groups of 10, silent; `options` are RLOOConfig's."""
    defaults = {
        "output_dir": tempfile.mkdtemp(),
        "num_generations": 10,
        "per_device_train_batch_size": 40,
        "max_completion_length": TOKENS,
        "learning_rate": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "bf16": torch.cuda.is_available(),
        "logging_steps": 1000,
    }
    trainer = RLOOTrainer(
        model=folder,
        reward_funcs=alliteration_reward,
        args=RLOOConfig(**defaults | options),
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 10_000}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"


def runs_parser(doc: str, folder: str) -> argparse.ArgumentParser:
    """Seeds, the folder of the runs under `runs`, and how many run side by side."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / folder)
    parser.add_argument("--at_a_time", type=int, default=1)
    return parser


def run_groups(groups: dict[str, list[Run]], args: argparse.Namespace) -> dict[str, list[Path]]:
    """Bring all runs of `rloo_tall_tree` to their end; their folders by group. Exits where one failed."""
    recipe, config = ROOT / "recipes/rloo_tall_tree.py", str(ROOT / "accelerate_configs/cpu.yaml")
    if run_all([run for group in groups.values() for run in group], recipe, args.folder, config, args.at_a_time):
        raise SystemExit(1)
    return {name: [args.folder / run.name for run in group] for name, group in groups.items()}
