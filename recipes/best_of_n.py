"""The yardstick for reward per nat: best-of-n sampling from the reference model.

    python recipes/best_of_n.py                                   # the embedded model, 12,000 stories
    python recipes/best_of_n.py --runs runs/tall_tree runs/other  # with training runs drawn over it
    python recipes/best_of_n.py --model_name_or_path models/smollm2-135m-instruct --temperature 0.7 \
        --dataset_name recipes/instruct_held_out.jsonl --stories 8000 --max_new_tokens 64 \
        --reward_func kl_alliteration.rewards.alliteration_in_25_words

Keeping the best of n stories costs at most `log n - (n - 1) / n` nats per sequence (Beirami et al., arXiv 2401.01879),
and needs no training: a trained policy should lie above it. Expected rewards are those of all subsets of size
n of the sampled stories, with bootstrap bands up to a fortieth of them. The dashed curve is the least KL that
any policy pays for a reward; it ends where the samples show no more. Of a data set every prompt gets its share of the
stories, and the means over prompts count. Into the output folder go `frontier.json` and `frontier.png`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import PartialState
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from kl_alliteration.evaluation import ask_reward, plain_sampling, sample_rows
from kl_alliteration.lab.checked_rewards import load_rewards
from kl_alliteration.lab.checks import check_model_path
from kl_alliteration.lab.figures import plot_frontier, read_run
from kl_alliteration.lab.gguf import as_folder
from kl_alliteration.lab.inputs import load_prompts
from kl_alliteration.lab.runs import check_yardstick
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.sampling import use_fast_generate
from kl_alliteration.story_lm import MODEL_PATH, PROMPT
from kl_alliteration.yardsticks import best_of_n, least_kl


@dataclass
class Arguments:
    model_name_or_path: str = field(default=str(MODEL_PATH), metadata={"help": "Folder or Hub id of the reference."})
    output_dir: str = field(default="runs/best_of_n", metadata={"help": "Folder of frontier.json and frontier.png."})
    prompt: str = field(default=PROMPT, metadata={"help": "What every story starts with."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts of a file, a folder or a Hub id in place of the one."}
    )
    reward_func: str = field(
        default="kl_alliteration.rewards.alliteration_reward", metadata={"help": "Reward by dotted import path."}
    )
    stories: int = field(default=12_000, metadata={"help": "Stories to sample."})
    largest_n: int | None = field(
        default=None, metadata={"help": "The frontier's last point; 3,000, or half of a prompt's stories, by default."}
    )
    max_new_tokens: int = field(default=100, metadata={"help": "Tokens after the prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling."})
    batch_size: int = field(default=200, metadata={"help": "Stories sampled at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling and bootstrap."})
    runs: list[str] = field(default_factory=list, metadata={"help": "Folders of training runs to draw over it."})


@one_line_errors
def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    check_model_path("model_name_or_path", args.model_name_or_path)
    named = SimpleNamespace(**vars(args), dataset_config=None, dataset_train_split="train")
    prompts = load_prompts(named, 1).to_list() if args.dataset_name else [{"prompt": args.prompt}]
    each = args.stories // len(prompts)
    largest = min(3_000, each // 2) if args.largest_n is None else args.largest_n
    if not 1 <= largest <= each // 2:
        raise ValueError(f"largest_n must be at least 1 and at most half of a prompt's {each} stories, got {largest}")
    if args.batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {args.batch_size}")
    (reward,) = load_rewards([args.reward_func])
    runs = [read_run(folder) for folder in args.runs]
    sampled = {"reward_func": args.reward_func, "prompt": None if args.dataset_name else args.prompt}
    sampled |= {name: getattr(args, name) for name in ("dataset_name", "temperature", "max_new_tokens")}
    path = as_folder(args.model_name_or_path)
    facts = {"model": Path(path).name, "sampled": sampled}
    check_yardstick(facts, args.runs)
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(path).to(PartialState().device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    use_fast_generate(model)
    config = plain_sampling(model, tokenizer, args.max_new_tokens, args.temperature)
    rows = [row for row in prompts for _ in range(each)]
    found: list[float] = []
    for start in track(range(0, len(rows), args.batch_size), description="stories"):
        some = rows[start : start + args.batch_size]
        sampled = sample_rows(model, tokenizer, some, config)
        found += ask_reward(reward, some, sampled.completions, sampled.completion_ids)
    rewards = torch.tensor(found).view(len(prompts), each)
    left = int(rewards.isnan().sum())
    if left:
        print(f"{left} of {len(rows)} stories are left out: the reward does not apply to them")
        if len(prompts) > 1:
            raise ValueError("dataset_name: the reward must apply to every story where there are several prompts")
        rewards = rewards[~rewards.isnan()][None]
        if rewards.numel() // 2 < (args.largest_n or 1):
            raise ValueError(f"largest_n must be at most half of the {rewards.numel()} stories that have a reward")
        largest = min(largest, rewards.numel() // 2)
    frontier = best_of_n(rewards, largest, seed=args.seed)
    spread = rewards.std(-1).mean().item() or 1.0
    least = least_kl(rewards, [spread * 2 ** (i / 4) for i in range(-16, 17)], bootstraps=200)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    facts |= {"stories": rewards.numel(), "frontier": frontier, "least_kl": least}
    facts["rewards"] = [[int(value) if value.is_integer() else value for value in row] for row in rewards.tolist()]
    text = ",\n".join(f'"{name}": {json.dumps(value, separators=(",", ":"))}' for name, value in facts.items())
    (folder / "frontier.json").write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    plot_frontier(frontier, runs, folder / "frontier.png", least)
    print("| n | KL (nats per sequence) | reward | 95 % band |\n|---|---|---|---|")
    for point in frontier:
        band = "-" if point["low"] is None else f"{point['low']:.2f} to {point['high']:.2f}"
        print(f"| {point['n']} | {point['kl_per_sequence']:.2f} | {point['reward']:.2f} | {band} |")
    print("\n| least KL (nats per sequence) | reward | 95 % band | price | effective samples |\n|---|---|---|---|---|")
    for point in least:
        cells = [f"{point['kl_per_sequence']:.2f}", f"{point['reward']:.2f}"]
        cells += [f"{point['low']:.2f} to {point['high']:.2f}", f"{point['price']:.2f}"]
        print(f"| {' | '.join(cells)} | {point['effective_samples']:.0f} |")
    print(f"frontier.json, frontier.png: {folder}")


if __name__ == "__main__":
    main()
