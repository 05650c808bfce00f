"""What the benchmarks share: the trainer that they time, and silence."""

import json
import subprocess
import sys
import tempfile
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
)
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from kl_alliteration import alliteration_reward
from kl_alliteration.story_lm import MODEL_PATH, PROMPT

TOKENS = 100
FOUND = "FOUND "  # before what a child says


def make_trainer(folder: str = str(MODEL_PATH), peft_config=None, prompt: str = PROMPT, grpo: bool = False, **options):
    """A stock trainer, RLOO or GRPO, on the recipe's task, groups of 10, silent; `options` are its configuration's."""
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
    make, configure = (GRPOTrainer, GRPOConfig) if grpo else (RLOOTrainer, RLOOConfig)
    trainer = make(
        model=folder,
        reward_funcs=alliteration_reward,
        args=configure(**defaults | options),
        train_dataset=Dataset.from_dict({"prompt": [prompt] * 10_000}),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def model_folder(name: str) -> str:
    """`embedded`, or a random model of the shape of TinyStories-33M, with the embedded model's tokenizer."""
    if name == "embedded":
        return str(MODEL_PATH)
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=50_257,
        hidden_size=768,
        num_layers=4,
        num_heads=16,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=2048,
        window_size=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    folder = tempfile.mkdtemp()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_PATH).save_pretrained(folder)
    return folder


def llama_folder() -> str:
    """A random Llama of 64 wide, 5 layers, 8 heads over 4 and 512 tokens, with a tokenizer of 512 words."""
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(509))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "left"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"


def in_a_process(script: str, *options: str):
    """What a child of a benchmark's own file said by [`say`]: memory, and what a process keeps, are its own then."""
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(FOUND)]
    if not lines:
        sys.exit(done.stderr[-2000:])
    return json.loads(lines[0].removeprefix(FOUND))


def say(found) -> None:
    print(FOUND + json.dumps(found))
