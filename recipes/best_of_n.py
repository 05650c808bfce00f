"""The yardstick for reward per nat: best-of-n sampling from the reference model.

    python recipes/best_of_n.py                                   # the embedded model, 12,000 stories
    python recipes/best_of_n.py --runs runs/tall_tree runs/other  # with training runs drawn over it

Keeping the best of n stories costs at most `log n - (n - 1) / n` nats per sequence (Beirami et al., arXiv 2401.01879),
and needs no training: a trained policy should lie above it. Expected rewards are those of all subsets of size
n of the stories that were sampled, with bootstrap bands. Into the output folder go `frontier.json` and `frontier.png`.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from kl_alliteration.evaluation import ask_reward, best_of_n, plain_sampling, sample_rows
from kl_alliteration.lab.checked_rewards import load_rewards
from kl_alliteration.lab.figures import plot_frontier, read_run
from kl_alliteration.lab.options import check_model_path
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.sampling import use_fast_generate
from kl_alliteration.story_lm import MODEL_PATH, PROMPT


@dataclass
class Arguments:
    model_name_or_path: str = field(default=str(MODEL_PATH), metadata={"help": "Folder or Hub id of the reference."})
    output_dir: str = field(default="runs/best_of_n", metadata={"help": "Folder of frontier.json and frontier.png."})
    prompt: str = field(default=PROMPT, metadata={"help": "What every story starts with."})
    reward_func: str = field(
        default="kl_alliteration.rewards.alliteration_reward", metadata={"help": "Reward by dotted import path."}
    )
    stories: int = field(default=12_000, metadata={"help": "Stories to sample."})
    largest_n: int = field(default=3_000, metadata={"help": "The frontier's last point."})
    max_new_tokens: int = field(default=100, metadata={"help": "Tokens after the prompt."})
    batch_size: int = field(default=200, metadata={"help": "Stories sampled at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling and bootstrap."})
    runs: list[str] = field(default_factory=list, metadata={"help": "Folders of training runs to draw over it."})


@one_line_errors
def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    check_model_path("model_name_or_path", args.model_name_or_path)
    if not 1 <= args.largest_n <= args.stories // 2:
        raise ValueError(f"largest_n must be at least 1 and at most half of stories, got {args.largest_n}")
    (reward,) = load_rewards([args.reward_func])
    runs = [read_run(folder) for folder in args.runs]
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, padding_side="left")
    use_fast_generate(model)
    config = plain_sampling(model, tokenizer, args.max_new_tokens)
    rewards: list[float] = []
    for start in track(range(0, args.stories, args.batch_size), description="stories"):
        count = min(args.batch_size, args.stories - start)
        rows = [{"prompt": args.prompt}] * count
        found = sample_rows(model, tokenizer, rows, config)
        rewards += ask_reward(reward, rows, found.completions, found.completion_ids)
    applied = [value for value in rewards if not math.isnan(value)]
    if len(applied) < len(rewards):
        left = len(rewards) - len(applied)
        print(f"{left} of {len(rewards)} stories are left out: the reward does not apply to them")
    if args.largest_n > len(applied) // 2:
        raise ValueError(f"largest_n must be at most half of the {len(applied)} stories that have a reward")
    rewards = applied
    frontier = best_of_n(torch.tensor(rewards), args.largest_n, seed=args.seed)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"stories": len(rewards), "model": Path(args.model_name_or_path).name, "frontier": frontier}
    (folder / "frontier.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    plot_frontier(frontier, runs, folder / "frontier.png")
    print("| n | KL (nats per sequence) | reward | 95 % band |\n|---|---|---|---|")
    for point in frontier:
        band = f"{point['low']:.2f} to {point['high']:.2f}"
        print(f"| {point['n']} | {point['kl_per_sequence']:.2f} | {point['reward']:.2f} | {band} |")
    print(f"frontier.json, frontier.png: {folder}")


if __name__ == "__main__":
    main()
