"""A step with shared prompts and fast sampling against stock TRL's, in turns, every run a process of its own.

    python benchmarks/shared_prompts.py                        # the embedded model, prompts of 4 to 1,000 tokens
    python benchmarks/shared_prompts.py --model FOLDER --lora  # any model, a LoRA of rank 16 on all layers
    python benchmarks/shared_prompts.py --short                # `make bench`: three ratios at short prompts

One group a batch, completions of 64 tokens, k1 in the reward, learning rate 0; one step is not counted. Prints
Markdown: medians in seconds and MB, and ours over stock's with the quartiles of the rounds. `--bf16` takes TRL's mixed
precision; `--exact` puts the exact KL into reward and loss and under the monitor on our side, where stock keeps k1;
`--grpo` takes GRPO for RLOO, with its own k3 in the loss.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import llama_folder, make_trainer, model_folder, quiet
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, kl, share_prompts, use_fast_sampling
from kl_alliteration.sampling.decoder import read_decoder
from kl_alliteration.sampling.generate import sample

SMOLLM2 = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
TEXT = "There was a tall tree by the lake, and a little bird who told it about the town on the other side. " * 60
PARTS = ("step", "generate", "score", "update", "peak")
SHORT = {  # of `--short`: prompt, group, batch, completion, whether it is LoRA; steps, of which small models need more
    "embedded": ((4, 10, 40, 100, False), 6),
    "Llama of 64 wide": ((4, 10, 40, 100, False), 6),
    "SmolLM2-135M, LoRA": ((55, 8, 8, 48, True), 2),
}


class Parts(TrainerCallback):
    """Seconds of every step, of sampling, of what else makes a batch, and of the update."""

    def __init__(self, trainer):
        self.found, self.sampled, self.batch = [], 0.0, 0.0
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.generate = self.timed(model.generate, "sampled")
        trainer._generate_and_score_completions = self.timed(trainer._generate_and_score_completions, "batch")

    def timed(self, call, name: str):
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                setattr(self, name, getattr(self, name) + time.perf_counter() - start)

        return run

    def on_step_begin(self, args, state, control, **kwargs):
        self.start, self.sampled, self.batch = time.perf_counter(), 0.0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        step = time.perf_counter() - self.start
        self.found.append((step, self.sampled, self.batch - self.sampled, step - self.batch))


def folder_of(model: str) -> str:
    if model == "Llama of 64 wide":
        return llama_folder()
    return str(SMOLLM2) if model.startswith("SmolLM2") else model_folder(model) if model == "embedded" else model


def measure(
    model: str,
    prompt: int,
    group: int,
    batch: int,
    length: int,
    lora: bool,
    exact: bool,
    grpo: bool,
    ours: bool,
    steps: int,
    bf16: bool,
):
    """Medians of the parts over the steps but the first, and the process's peak in MB."""
    quiet()
    folder = folder_of(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = make_trainer(
        folder,
        LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"][:prompt]),
        grpo,
        num_generations=group,
        per_device_train_batch_size=batch,
        max_completion_length=length,
        max_steps=steps + 1,
        beta=0.05,
        bf16=bf16,
        use_cpu=True,
    )
    if ours and exact:
        trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
        trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    if ours:
        share_prompts(trainer)
        use_fast_sampling(trainer)
    parts = Parts(trainer)
    trainer.add_callback(parts)
    trainer.train()
    found = [statistics.median(values) for values in zip(*parts.found[1:], strict=True)]
    return [*found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]


def in_turns(rounds: int, threads: int, steps: int, bf16: bool, *shape) -> list[tuple[list[float], list[float]]]:
    """Stock's and our numbers of each round; which goes first changes with the round."""
    found = []
    for round_ in range(rounds):
        pair = {}
        for ours in (False, True) if round_ % 2 == 0 else (True, False):
            command = [sys.executable, __file__, "--measure", json.dumps([*shape, ours, steps, bf16])]
            env = os.environ | {"OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
            pair[ours] = json.loads(done.stdout.splitlines()[-1])
        found.append((pair[False], pair[True]))
    return found


def ratio(rounds: list[tuple[list[float], list[float]]], part: int) -> str:
    """Ours over stock's: the median, and the quartiles or both ends of the rounds."""
    ratios = sorted(ours[part] / stock[part] for stock, ours in rounds)
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{statistics.median(ratios):.2f} ({low:.2f} - {high:.2f})"


def short(rounds: int) -> None:
    print("| | threads | stock step (s) | ours: generate, score, update (s) | step / stock |\n|---|---|---|---|---|")
    for name, (shape, steps) in SHORT.items():
        if name.startswith("SmolLM2") and not SMOLLM2.is_dir():
            print(f"| {name} | | | | not there: {SMOLLM2.relative_to(SMOLLM2.parents[1])} |")
            continue
        for threads in (1, 2):
            found = in_turns(rounds, threads, steps, False, name, *shape, False, False)
            seconds = statistics.median(stock[0] for stock, _ in found)
            parts = ", ".join(f"{statistics.median(ours[part] for _, ours in found):.2f}" for part in (1, 2, 3))
            print(f"| {name} | {threads} | {seconds:.2f} | {parts} | {ratio(found, 0)} |", flush=True)


@torch.no_grad()
def half_precision(model: str) -> None:
    """How far bfloat16 is off, of 64 completions of 48 tokens that the decoder samples in it: nats per token."""
    folder = folder_of(model)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :55].repeat(16, 1)
    mask, config = torch.ones_like(ids), GenerationConfig(max_new_tokens=48, do_sample=True, pad_token_id=0)
    rows = []
    for _ in range(4):
        sampled = torch.zeros(len(ids), 48)
        texts = sample(read_decoder(policy, torch.bfloat16), ids, mask, config, sampled)
        told = torch.ones_like(texts)
        whole = kl.model_logps(policy, texts, told, 48)
        with torch.autocast("cpu", torch.bfloat16):
            half = kl.model_logps(policy, texts, told, 48)
        rows.append(torch.stack([sampled, whole, half]))
    sampled, whole, half = torch.cat(rows, dim=1)
    print("| | mean absolute difference | KL of the sampler from it |\n|---|---|---|")
    for name, other in (("the model in float32", whole), ("the model under autocast", half)):
        difference = sampled - other
        error = difference.mean(1).std() / len(difference) ** 0.5
        print(f"| {name} | {difference.abs().mean():.4f} | {difference.mean():.5f} +- {error:.5f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="`embedded` or a folder")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 50, 250, 1000])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--grpo", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--half-precision", action="store_true", help="the error of bfloat16, nothing else")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*json.loads(args.measure))))
        return
    if args.half_precision:
        half_precision(args.model)
        return
    if args.short:
        short(args.rounds)
        return
    heads = [f"{part} {'(MB)' if part == 'peak' else '(s)'}" for part in PARTS]
    kind = (", LoRA" if args.lora else "") + (", exact in both and watched" if args.exact else "")
    kind = (", GRPO" if args.grpo else "") + kind
    print(f"{Path(args.model).name}{kind}, {args.threads} thread(s); stock, ours, ours / stock\n")
    print(f"| prompt | group | {' | '.join(heads)} |\n|{'---|' * (2 + len(heads))}")
    for prompt in args.prompts:
        for group in args.groups:
            shape = args.model, prompt, group, group, 64, args.lora, args.exact, args.grpo
            found = in_turns(args.rounds, args.threads, args.steps, args.bf16, *shape)
            cells = []
            for part, name in enumerate(PARTS):
                stock, ours = (statistics.median(pair[side][part] for pair in found) for side in (0, 1))
                digits = 0 if name == "peak" else 2
                cells.append(f"{stock:.{digits}f}, {ours:.{digits}f}, **{ratio(found, part)}**")
            print(f"| {prompt} | {group} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
