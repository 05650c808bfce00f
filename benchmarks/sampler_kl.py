"""What the sampler's KL costs: a step's time with `kl/sampler_...` in the log and without, in turns.

    python benchmarks/sampler_kl.py [--pairs 30] [--batch 10]

Stock RLOO on the embedded model with fast sampling, shared prompts and the monitor, groups of 10, 100 new tokens,
learning rate 0. A small batch is the harder case: what is done once a token does not grow with it. Without a GPU the
time is the process's own, on one thread, which other jobs disturb less. Of each pair of steps, which sample the same
texts, one's sampler says how likely its tokens were and the other's does not; which comes first is drawn. Prints the
median of the pairs' ratios, its 95 % interval by bootstrap, and the quartiles; then the time of the added work alone.
"""

import argparse
import random
import statistics
import time

import torch
from common import TOKENS, device, make_trainer, quiet
from transformers import GenerationConfig, TrainerCallback

from kl_alliteration import KLMonitorCallback, kl, share_prompts, use_fast_sampling
from kl_alliteration.sampling import use_fast_generate
from kl_alliteration.sampling.generate import draw


def now() -> float:
    """Seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class InTurns(TrainerCallback):
    """Gives each step its sampler, and each pair its seed; notes the seconds, by pair."""

    def __init__(self, trainer, samplers: dict):
        self.model, self.samplers = trainer.accelerator.unwrap_model(trainer.model), samplers
        self.pairs, self.order = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.order:
            self.order = random.sample(list(self.samplers), 2)
            self.pairs.append({})
        self.name = self.order.pop()
        self.model.generate = self.samplers[self.name]
        torch.manual_seed(len(self.pairs))
        self.start = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.pairs[-1][self.name] = now() - self.start


def added_work(batch: int, vocabulary: int = 4608, repeats: int = 2000) -> float:
    """Seconds that it adds to a step by itself: what is said of each drawn token, and the monitor's sums."""
    logits, config = torch.randn(batch, vocabulary), GenerationConfig(do_sample=True)
    said, seconds = torch.zeros(batch, TOKENS), {True: [], False: []}
    for i in range(repeats):
        for each in random.sample([True, False], 2):
            start = now()
            _, logps = draw(logits, config, each)
            if each:
                said[:, i % TOKENS] = logps
            seconds[each].append(now() - start)
    a_token = statistics.median(seconds[True]) - statistics.median(seconds[False])
    mask, sums = torch.ones(batch, TOKENS), []
    for _ in range(200):
        start = now()
        ratio = (said - said / 2).nan_to_num(nan=0.0) * mask
        for values in (kl.k1(ratio), kl.k3(ratio)):
            torch.stack([(values * mask).sum(), mask.sum()]).tolist()
        (ratio.sum(-1).mean() + ratio.abs().amax().exp()).item()
        sums.append(now() - start)
    return TOKENS * a_token + statistics.median(sums)


def in_turns(pairs: int, batch: int) -> list[dict]:
    """Seconds of each pair's two steps, `with` and `without`."""
    trainer = make_trainer(beta=0.25, max_steps=2 * pairs + 2, per_device_train_batch_size=batch)
    share_prompts(trainer)
    trainer.add_callback(KLMonitorCallback(trainer))
    model = trainer.accelerator.unwrap_model(trainer.model)
    stock = model.generate
    use_fast_sampling(trainer)
    samplers = {"with": model.generate}
    model.generate = stock
    use_fast_generate(model)
    samplers["without"] = model.generate
    turns = InTurns(trainer, samplers)
    trainer.add_callback(turns)
    trainer.train()
    return turns.pairs[1:]  # the first proves the samplers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=10, help="completions of a step")
    args = parser.parse_args()
    quiet()
    random.seed(0)
    torch.set_num_threads(1)
    pairs = in_turns(args.pairs, args.batch)
    ratios = [pair["with"] / pair["without"] for pair in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    boots = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(2000))
    print(
        f"{device()}; {len(pairs)} pairs; a step without it {statistics.median(p['without'] for p in pairs):.2f} s",
        flush=True,
    )
    print(f"with / without: {middle:.3f} (95 % {boots[50]:.3f} to {boots[-51]:.3f}), quartiles {low:.3f}, {high:.3f}")
    print(f"what it does, by itself: {1000 * added_work(args.batch):.1f} ms a step")


if __name__ == "__main__":
    main()
