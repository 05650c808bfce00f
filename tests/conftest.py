"""Tests own their models: a two-layer Llama with a word-level tokenizer, built in process. No Hub."""

import gc
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # GRPO's rollout_func, in tests/test_algorithms.py
# Tiny models: a second thread costs more than it gives, most of all on a busy machine. Here and in what is started.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from datasets import Dataset
from enumeration import save_model
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import RLOOConfig, RLOOTrainer

gc.freeze()  # what the imports made stays: looking through it again and again costs a third of a second each time
torch.set_num_threads(1)

WORDS = "<eos> <pad> <unk> once upon a time there was tall tree that tried to touch the top of sky and fox".split()


# Options of RLOOConfig and GRPOConfig: three short steps on a CPU, silent; two groups of four a batch.
TINY_RUN = {
    "beta": 0.5,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def reward(completions, **kwargs):
    return [float(text.split().count("tree") + len(text.split()) / 10) for text in completions]


async def slowly(completions, **kwargs):
    return reward(completions)


def word_tokenizer(words: list[str], unk_token: str = "<eos>", pad_token: str = "<eos>") -> PreTrainedTokenizerFast:
    """One token a word, split on spaces; the first word is `<eos>`."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=unk_token))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": pad_token, "unk_token": unk_token, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random 2-layer Llama whose 22-word tokenizer splits on spaces."""
    folder = tmp_path_factory.mktemp("tiny")
    word_tokenizer(WORDS, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def enumerated_model(tmp_path_factory):
    """Folder of the model of `enumeration`."""
    folder = tmp_path_factory.mktemp("enumerated")
    save_model(folder)
    return folder


@pytest.fixture
def make_trainer(tiny_model, tmp_path):
    """`make_trainer(lora=False, **RLOOConfig options)`: a stock trainer on the tiny model."""

    plain_lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    def make(lora: bool | LoraConfig = False, reward_funcs=reward, reward_processing_classes=None, **options):
        trainer = RLOOTrainer(
            model=str(tiny_model),
            reward_funcs=reward_funcs,
            reward_processing_classes=reward_processing_classes,
            args=RLOOConfig(**TINY_RUN | {"output_dir": str(tmp_path), "seed": 3} | options),
            train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 8}),
            peft_config=plain_lora if lora is True else lora or None,
        )
        return trainer

    torch.manual_seed(0)
    return make


@pytest.fixture
def browser():
    """A real one, headless; skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        try:
            launched = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield launched
        launched.close()
