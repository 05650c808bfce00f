"""What the policy alliterates on under each reward, at one budget of KL.

    python studies/swap_rewards.py --at_a_time 2

recipes/budget.yaml for 240 steps, by when every reward has spent the budget; three seeds a reward, 500 fresh
stories of each trained model. A letter is in use where it carries at least 5 % of the pairs. Runs go into
runs/swap_rewards and are kept. Prints Markdown.
"""

from collections import Counter
from pathlib import Path

import torch
from common import BUDGET, run_groups, runs_parser
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from kl_alliteration.evaluation import plain_sampling
from kl_alliteration.lab.report import spread
from kl_alliteration.lab.runs import read_summary
from kl_alliteration.lab.sweep import seeds_of
from kl_alliteration.sampling.decoder import read_decoder
from kl_alliteration.sampling.generate import sample
from kl_alliteration.story_lm import MODEL_PATH, PROMPT
from kl_alliteration.text import alliterating_pairs, different_share, identical_share, letter_counts

REWARDS = ("alliteration_reward", "distinct_alliteration", "rare_letter_alliteration", "alliteration_on_b")
OPTIONS = {
    "config": BUDGET[1],
    "max_steps": 240,
    "disable_tqdm": True,
    "show_stories_every": 0,
    "report_to": "none",
    "logging_steps": 5,
}
STORIES = 500


@torch.no_grad()
def facts(model: str | Path) -> dict:
    """What 500 fresh stories of a model alliterate on."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    decoder, config = read_decoder(policy), plain_sampling(policy, tokenizer, 100)
    set_seed(1)
    prompts = tokenizer([PROMPT] * 100, return_tensors="pt")
    batches = [sample(decoder, prompts["input_ids"], prompts["attention_mask"], config) for _ in range(STORIES // 100)]
    texts = [text for ids in batches for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    found = [alliterating_pairs(text.split()) for text in texts]
    pairs = [pair for each in found for pair in each]
    letters = letter_counts(pairs)
    repeats = 0  # texts of whose pairs more than half are the same two words again, or one word twice
    for each in found:
        same = Counter((pair.left.lower(), pair.right.lower()) for pair in each)
        again = sum(pair.identical for pair in each) + sum(n - 1 for (left, right), n in same.items() if left != right)
        repeats += bool(each) and again > len(each) / 2
    commonest = letters.most_common()
    return {
        "pairs a story": len(pairs) / STORIES,
        "identical": identical_share(pairs),
        "texts that live on repeats": repeats / STORIES,
        "letters in use": sum(n >= 0.05 * len(pairs) for n in letters.values()),
        "on the two commonest": sum(n for _, n in commonest[:2]) / len(pairs),
        "on b": letters["b"] / len(pairs),
        "commonest": " ".join(letter for letter, _ in commonest[:3]),
        "different": different_share(texts),
    }


def main():
    args = runs_parser(__doc__, "swap_rewards").parse_args()
    runs = {
        name: seeds_of(name, OPTIONS | {"reward_funcs": f"kl_alliteration.rewards.{name}"}, args.seeds)
        for name in REWARDS
    }
    folders = run_groups(runs, args)
    rows = {"before": [facts(MODEL_PATH) | {"KL per sequence": 0.0}]}
    for name, paths in folders.items():
        rows[name] = [
            facts(path) | {"KL per sequence": read_summary(path)["after"]["kl_per_sequence"]} for path in paths
        ]
    columns = list(rows["before"][0])
    print(f"| reward | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, found in rows.items():
        cells = [[each[column] for each in found] for column in columns]
        words = [", ".join(cell) if isinstance(cell[0], str) else spread(cell) for cell in cells]
        print(f"| {name} | {' | '.join(words)} |")


if __name__ == "__main__":
    main()
