"""What a KL choice costs: time of a training step against stock TRL, in turns, every run a process of its own.

    python benchmarks/step_time.py [--rounds 5] [--steps 5] [--variants "exact in both" "stock, reward by token"]
    python benchmarks/step_time.py --grpo [--model models/smollm2-135m-instruct --lora]

Embedded model, batch 40 in groups of 10, 100 new tokens, learning rate 0, so that all train on the same completions.
With `--grpo` it is stock GRPO, and beside it the same with fast sampling and shared prompts, under three penalties.
Each round trains every variant for `--steps` steps after one that is not counted, in another order. Prints a Markdown
table of medians over all steps, relative to the stock trainer's, with the quartiles of the rounds' own ratios.
"""

import argparse
import random
import statistics
import sys
import time

import torch
from common import device, in_a_process, make_trainer, quiet, say
from transformers import TrainerCallback

from kl_alliteration import (
    KLMonitorCallback,
    KLPenalty,
    KLPenaltyCallback,
    default_lora_config,
    share_prompts,
    use_fast_sampling,
    use_kl_to_go,
    use_reward_to_go,
)
from kl_alliteration.story_lm import MODEL_PATH

VARIANTS = {
    "stock": None,
    "k1 in reward": KLPenalty("k1"),
    "k2 in loss": KLPenalty("k2", "loss"),
    "k3 in both": KLPenalty("k3", "both"),
    "abs in reward": KLPenalty("abs"),
    "budget of k1": KLPenalty("k1", budget_per_token=0.1),
    "exact in reward": KLPenalty("exact"),
    "exact in both": KLPenalty("exact", "both"),
    "top_k in both": KLPenalty("top_k", "both"),
    "stock, monitored": "monitored",
    "stock, reward by token": use_reward_to_go,
    "stock, KL by token": use_kl_to_go,
}
GRPO = {
    "stock": None,
    "fast, its own k3": KLPenalty("k3", "loss"),
    "fast, k1 in reward": KLPenalty("k1"),
    "fast, exact in both": KLPenalty("exact", "both"),
}


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def train(variant, steps: int, grpo: bool, model: str, lora: bool) -> list[float]:
    adapter = default_lora_config() if lora else None
    trainer = make_trainer(model, adapter, grpo=grpo, beta=0.25, max_steps=steps + 1)
    if variant == "monitored":
        trainer.add_callback(KLMonitorCallback(trainer))
    elif variant in (use_reward_to_go, use_kl_to_go):
        variant(trainer)
    elif variant:
        KLPenaltyCallback(trainer, variant)
    if grpo and variant:
        share_prompts(trainer)
        use_fast_sampling(trainer)
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return times.seconds[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--grpo", action="store_true", help="GRPO, with and without fast sampling")
    parser.add_argument("--model", default=str(MODEL_PATH), help="a folder or a Hub id")
    parser.add_argument("--lora", action="store_true", help="train an adapter")
    parser.add_argument("--variants", nargs="+", help="some of them, beside stock, by the names in the table")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet()
    variants = GRPO if args.grpo else VARIANTS
    if args.variant:
        return say(train(variants[args.variant], args.steps, args.grpo, args.model, args.lora))
    if args.variants:
        if unknown := [name for name in args.variants if name not in variants]:
            parser.error(f"--variants {' '.join(unknown)}: they are {', '.join(variants)}")
        variants = {name: variants[name] for name in dict.fromkeys(["stock", *args.variants])}
    seconds = {name: [] for name in variants}
    for round_ in range(args.rounds):
        names = list(variants)
        random.Random(round_).shuffle(names)
        for name in names:
            # What fast sampling lets a process keep of its memory would make the stock steps behind it faster.
            options = ["--variant", name, "--steps", str(args.steps), "--model", args.model]
            options += ["--grpo"] * args.grpo + ["--lora"] * args.lora
            seconds[name].append(in_a_process(__file__, *options))
            found = ", ".join(f"{step:.2f}" for step in seconds[name][-1])
            print(f"round {round_ + 1} of {args.rounds}, {name}: {found} s", file=sys.stderr, flush=True)
    medians = {name: [statistics.median(steps) for steps in rounds] for name, rounds in seconds.items()}
    whole = {name: statistics.median(sum(rounds, [])) for name, rounds in seconds.items()}
    print(f"{device()}; {args.rounds * args.steps} steps each; stock step {whole['stock']:.2f} s\n")
    print("| | step time / stock | quartiles of rounds |\n|---|---|---|")
    for name in variants:
        ratios = [mine / stock for mine, stock in zip(medians[name], medians["stock"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(f"| {name} | {whole[name] / whole['stock']:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
