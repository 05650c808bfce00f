"""The loss that tutorials print, run as it stands, beside the right one.

    python studies/tutorial_loss.py

Both start from the same policy, which 40 steps for the reward alone have taken away from the embedded model, and go on
at a price of 1 per nat of the sequence: 40 batches of 40 fresh stories, a fresh AdamW. Three seeds. Prints Markdown
and draws docs/images/tutorial_loss.png. The expected gradients of both are enumerated in tests/test_algorithms.py.
"""

import argparse
import copy
import statistics
from pathlib import Path

import torch
from common import quiet
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from kl_alliteration import alliteration_reward
from kl_alliteration.evaluation import plain_sampling
from kl_alliteration.lab.figures import plot_lines
from kl_alliteration.lab.report import spread
from kl_alliteration.lab.sweep import ROOT
from kl_alliteration.sampling import keep_freed_memory
from kl_alliteration.sampling.decoder import read_decoder
from kl_alliteration.sampling.generate import sample
from kl_alliteration.story_lm import MODEL_PATH, PROMPT

BATCH, STEPS, BETA, LEARNING_RATE, WARMUP = 40, 40, 1.0, 3e-4, 20
LAST = 10  # batches of the means in the table


def tutorial_loss(rewards, logprobs, ref_logprobs, beta):
    """(B,), (B, T), (B, T) -> the printed loss."""
    return (-(rewards - beta * (logprobs - ref_logprobs).mean())).mean()


def right_loss(rewards, logprobs, ref_logprobs, beta):
    """The same with the KL in the reward, where it has a gradient, and a log-probability for the reward to act on."""
    rewards = rewards - beta * (logprobs - ref_logprobs).sum(-1).detach()  # (B,)
    advantages = (len(rewards) * rewards - rewards.sum()) / (len(rewards) - 1)  # less the mean of the others
    return -(advantages * logprobs.sum(-1)).mean()


class Loop:
    """Policy, reference and optimizer; a step is a batch of stories, a loss, an update."""

    def __init__(self):
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH, padding_side="left")
        self.reference = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()
        self.policy = copy.deepcopy(self.reference)
        self.fresh_optimizer()
        self.prompts = self.tokenizer([PROMPT] * BATCH, return_tensors="pt")["input_ids"]
        self.config = plain_sampling(self.reference, self.tokenizer, 100)

    def fresh_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.taken = 0

    def logprobs(self, model, ids, mask):
        """(B, T) of the completions, 0 after their end."""
        width = mask.shape[1]
        logits = model(input_ids=ids).logits[:, -width - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, -width:].unsqueeze(-1)).squeeze(-1) * mask

    def step(self, loss, beta) -> tuple[float, float]:
        """`(mean reward, mean KL per sequence)` of the batch, before the update that it gives."""
        ids = sample(read_decoder(self.policy), self.prompts, torch.ones_like(self.prompts), self.config)
        completions = ids[:, self.prompts.shape[1] :]
        ends = (completions == self.tokenizer.eos_token_id).int()
        mask = (ends.cumsum(-1) - ends) == 0
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = torch.tensor(alliteration_reward(prompts=[PROMPT] * BATCH, completions=texts), dtype=torch.float32)
        with torch.no_grad():
            ref_logprobs = self.logprobs(self.reference, ids, mask)
        logprobs = self.logprobs(self.policy, ids, mask)
        self.optimizer.zero_grad()
        loss(rewards, logprobs, ref_logprobs, beta).backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.taken += 1
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, self.taken / WARMUP)
        self.optimizer.step()
        return rewards.mean().item(), (logprobs - ref_logprobs).sum(-1).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/images/tutorial_loss.png")
    args = parser.parse_args()
    quiet()
    keep_freed_memory()
    arms = {"as printed": tutorial_loss, "KL in the reward": right_loss}
    seen = {name: [] for name in arms}  # a list of (reward, KL) a seed
    for seed in args.seeds:
        set_seed(seed)
        start = Loop()
        away = [start.step(right_loss, 0.0) for _ in track(range(STEPS), f"seed {seed}, the reward alone")]
        for name, loss in arms.items():
            loop = copy.deepcopy(start)
            loop.fresh_optimizer()  # the moments of the reward's gradient would go on pushing
            set_seed(1000 + seed)
            seen[name].append(away + [loop.step(loss, BETA) for _ in track(range(STEPS), f"seed {seed}, {name}")])
    panels = {"reward": 0, "KL to the reference (nats per sequence)": 1}
    lines = {
        label: {
            name: [[((i + 1) * BATCH, point[column]) for i, point in enumerate(run)] for run in runs]
            for name, runs in seen.items()
        }
        for label, column in panels.items()
    }
    plot_lines(lines, args.figure, mark=(STEPS * BATCH, "the loss changes here"))
    print(f"| last {LAST} of {STEPS} batches | reward | KL per sequence |\n|---|---|---|")
    rows = {"where both start": [run[STEPS - LAST : STEPS] for run in next(iter(seen.values()))]}
    rows |= {name: [run[-LAST:] for run in runs] for name, runs in seen.items()}
    for name, runs in rows.items():
        cells = [spread([statistics.fmean(point[i] for point in run) for run in runs]) for i in (0, 1)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
