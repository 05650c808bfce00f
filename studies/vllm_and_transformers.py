"""The same training sampled by vLLM and by transformers: reward curves of three seeds, and the cost of asking vLLM.

    make .venv-vllm/.installed
    .venv-vllm/bin/python studies/vllm_and_transformers.py

A random two-layer Llama with heads of 64 and 22 words learns to write "tree": stock RLOO, 30 steps of 32 completions
of at most 16 words. vLLM runs in the trainer's process, in float32 and in bfloat16, which TRL takes by default.
Prints the mean reward of every five steps, mean (smallest to largest) over the seeds, and the largest distance of two
curves in standard errors; then the time of a step in which vLLM is asked for log-probabilities over that of one in
which it is not, in turns. No lab in it: the environment of vLLM has none.
"""

import argparse
import functools
import os
import random
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from transformers.utils import logging
from trl import RLOOConfig, RLOOTrainer
from trl.generation import vllm_generation
from vllm import LLM
from vllm.model_executor.layers import utils

from kl_alliteration import KLMonitorCallback

WORDS = "<eos> <pad> <unk> once upon a time there was tall tree that tried to touch the top of sky and fox".split()
SAMPLERS = {"transformers": None, "vLLM, float32": "float32", "vLLM, bfloat16": "bfloat16"}
WINDOW = 5  # steps


def trees(completions, **kwargs) -> list[float]:
    return [float(text.split().count("tree")) for text in completions]


def make_model(folder: str) -> str:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "left"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    set_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "head_dim": 64, "max_position_embeddings": 128, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **heads, eos_token_id=0, bos_token_id=None, pad_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_trainer(model: str, dtype: str | None, **options) -> RLOOTrainer:
    """`dtype`: of vLLM's weights; `None` samples by transformers."""
    if dtype is not None:
        vllm_generation.LLM = functools.partial(LLM, dtype=dtype)
        options |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        options |= {"vllm_max_model_length": 64}
    args = RLOOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=0.05,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=16,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        **options,
    )
    prompts = Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 500})
    trainer = RLOOTrainer(model=model, reward_funcs=trees, args=args, train_dataset=prompts)
    trainer.add_callback(KLMonitorCallback(trainer))
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def windows(rewards: list[float]) -> list[float]:
    return [statistics.fmean(rewards[i : i + WINDOW]) for i in range(0, len(rewards), WINDOW)]


def spread(values) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def apart(curves: list[list[float]], others: list[list[float]]) -> float:
    """The largest difference of two means over seeds, in standard errors of that difference."""

    def each(ours, theirs):
        error = ((statistics.variance(ours) + statistics.variance(theirs)) / len(ours)) ** 0.5
        return abs(statistics.fmean(ours) - statistics.fmean(theirs)) / error

    return max(
        each(ours, theirs) for ours, theirs in zip(zip(*curves, strict=True), zip(*others, strict=True), strict=True)
    )


class InTurns(TrainerCallback):
    """Asks vLLM for log-probabilities in one step of each pair and not in the other; notes the seconds."""

    def __init__(self, engine, stock):
        self.engine, self.pairs, self.order = engine, [], []
        self.generate = {True: engine.generate, False: stock}

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.order:
            self.order = random.sample([True, False], 2)
            self.pairs.append({})
        self.asked = self.order.pop()
        self.engine.generate, self.engine.logprobs = self.generate[self.asked], 0 if self.asked else None
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.pairs[-1][self.asked] = time.perf_counter() - self.start


def cost_of_asking(model: str, pairs: int) -> None:
    trainer = make_trainer(model, "float32", learning_rate=0.0, max_steps=2 * pairs + 2, seed=0)
    engine = trainer.vllm_generation
    stock = functools.partial(type(engine).generate, engine)
    turns = InTurns(engine, stock)
    trainer.add_callback(turns)
    trainer.train()
    if len(logged(trainer, "kl/sampler_k1_per_token")) != pairs + 1:
        raise RuntimeError("half of the steps should have the sampler's KL in the log")
    ratios = [pair[True] / pair[False] for pair in turns.pairs[1:]]
    low, middle, high = statistics.quantiles(ratios, n=4)
    seconds = statistics.median(pair[False] for pair in turns.pairs[1:])
    print(
        f"\nasked / not asked: {middle:.3f}, quartiles {low:.3f}, {high:.3f}; {pairs} pairs, steps of {seconds:.2f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--pairs", type=int, default=40, help="of steps for the cost of asking; 0 leaves it out")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    random.seed(0)
    if not torch.cuda.is_available():  # vLLM repacks linear weights on a CPU, and TRL's sync of weights then fails
        utils.dispatch_cpu_unquantized_gemm = lambda layer, *args, **kwargs: setattr(
            layer, "cpu_linear", torch.nn.functional.linear
        )
    model, curves = make_model(tempfile.mkdtemp()), {}
    for name in args.samplers:
        began, curves[name], seen, ratios = time.perf_counter(), [], [], []
        for seed in args.seeds:
            trainer = make_trainer(model, SAMPLERS[name], seed=seed, max_steps=args.steps, learning_rate=2e-3)
            set_seed(seed)  # vLLM sets it to 0 when it starts
            trainer.train()
            curves[name].append(windows(logged(trainer, "reward")))
            seen += [abs(value) for value in logged(trainer, "kl/sampler_k1_per_token")]
            ratios += logged(trainer, "kl/sampler_max_ratio")
        seen = f", largest |kl/sampler_k1_per_token| {max(seen):.1e}, ratio {max(ratios):.4f}" if seen else ""
        print(f"{name}: {(time.perf_counter() - began) / len(args.seeds):.0f} s a run{seen}", flush=True)
    print(f"\n| steps | {' | '.join(curves)} |\n|{'---|' * (len(curves) + 1)}")
    for i in range(args.steps // WINDOW):
        cells = (spread([curve[i] for curve in of_seeds]) for of_seeds in curves.values())
        print(f"| {WINDOW * i + 1} to {WINDOW * (i + 1)} | {' | '.join(cells)} |")
    theirs = curves.get("transformers")
    for name, ours in curves.items():
        if theirs and ours is not theirs:
            print(f"{name} from transformers: {apart(ours, theirs):.2f} standard errors at most")
    if args.pairs:
        cost_of_asking(model, args.pairs)


if __name__ == "__main__":
    main()
