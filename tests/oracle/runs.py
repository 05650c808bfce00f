"""What the oracle's runs have in common: ragged prompts, a reward that tells texts apart, a stock trainer."""

import signal
import zlib
from contextlib import contextmanager
from pathlib import Path

from conftest import TINY_RUN, word_tokenizer
from datasets import Dataset
from families import VOCAB
from trl import RLOOConfig, RLOOTrainer

WORDS = ["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(3, VOCAB))]
PROMPTS = ["w11 w22 w33", "w4 w5 w6 w7 w8 w9 w10", "w11", "w12 w13 w14 w15"]
RUN = TINY_RUN | {
    "beta": 0.3,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 8,
    "max_steps": 1,
    "seed": 3,
    "temperature": 0.8,
    "disable_dropout": True,
}


def reward(completions, **kwargs):
    return [len(text.split()) / 10 + zlib.crc32(text.encode()) % 97 / 97 for text in completions]


def now_and_then(completions, **kwargs):
    """A reward that does not apply to every third completion."""
    return [float(len(text.split())) if i % 3 else None for i, text in enumerate(completions)]


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    word_tokenizer(WORDS, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    return folder


def stock_trainer(folder: Path, reward_funcs=reward, trainer=RLOOTrainer, config=RLOOConfig, **options):
    """A trainer of TRL on the model in a folder; what is no option of its configuration goes to the trainer."""
    defaults = {"train_dataset": Dataset.from_dict({"prompt": PROMPTS * 4})}
    defaults["processing_class"] = word_tokenizer(WORDS, unk_token="<unk>", pad_token="<pad>")
    given = {name: options.pop(name) for name in ("peft_config", "eval_dataset", *defaults) if name in options}
    args = config(**RUN | {"output_dir": str(folder / "out")} | options)
    return trainer(model=str(folder), reward_funcs=reward_funcs, args=args, **defaults | given)


@contextmanager
def time_limit(seconds: int):
    """`TimeoutError` after so many seconds, on the main thread."""

    def over(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
