"""What the benchmarks share: the trainer that they time, and silence."""

import tempfile
import warnings

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging
from trl import RLOOConfig, RLOOTrainer

from kl_alliteration import alliteration_reward
from kl_alliteration.story_lm import MODEL_PATH, PROMPT

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
