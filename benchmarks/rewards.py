"""The rewards' speed and their agreement with the study's function, on one thread.

    python benchmarks/rewards.py

Medians of seven repetitions in turns, and the quickest: these machines are shared. Prints Markdown.
"""

import random
import statistics
import time
from functools import partial
from itertools import pairwise

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl_alliteration import judge, rewards
from kl_alliteration.rewards.reward_model import AlliterationRewardModel, character_tables
from kl_alliteration.story_lm import MODEL_PATH, PROMPT

NAMES = (
    "alliteration_reward", "alliteration_per_100_words", "distinct_alliteration", "run_alliteration",
    "letter_saturating_alliteration", "pair_saturating_alliteration", "rare_letter_alliteration", "alliteration_on_b",
)  # fmt: skip


ANYTHING = [*range(0xD800), *range(0xE000, 0x110000)]  # code points that are characters


def study(text: str) -> int:
    """The study's function, written again."""
    words = text.split()
    return sum(a[0].lower() == b[0].lower() for a, b in pairwise(words))


def seconds(jobs: dict, repetitions: int = 7) -> dict[str, list[float]]:
    found = {name: [] for name in jobs}
    for _ in range(repetitions):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            found[name].append(time.perf_counter() - start)
    return found


def random_text(rng: random.Random) -> str:
    """Letters that lower-case oddly, spaces of all kinds, and anything else that is a character."""
    odd = " aAbB\n\t\u0130\u03a3\u03c3\u00df\u01c5\u2003\u00a0\u001c\"'"
    return "".join(
        rng.choice(odd) if rng.random() < 0.7 else chr(rng.choice(ANYTHING)) for _ in range(rng.randrange(60))
    )


def main():
    torch.set_num_threads(1)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(2_000)]
    stories = [" ".join(rng.choices(words, k=100)) for _ in range(10_000)]
    empty = [""] * len(stories)
    found = seconds({name: partial(getattr(rewards, name), empty, stories) for name in NAMES})
    print("| 10,000 stories of 100 words | median, s | quickest, s |\n|---|---|---|")
    for name, times in found.items():
        print(f"| `{name}` | {statistics.median(times):.3f} | {min(times):.3f} |")

    sizes = (10_000, 100_000, 1_000_000)
    texts = {size: (" ".join(rng.choices(words, k=size // 6 + 1)))[:size] for size in sizes}
    found = seconds({size: partial(rewards.alliteration_reward, [""], [text]) for size, text in texts.items()})
    print("\n| one text of | median, ms | ns a character |\n|---|---|---|")
    for size, times in found.items():
        print(f"| {size:,} characters | {statistics.median(times) * 1e3:.2f} | {min(times) / size * 1e9:.1f} |")

    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH, padding_side="left")
    model = AlliterationRewardModel.from_tokenizer(tokenizer)
    character_tables(torch.device("cpu"))
    policy = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    sampled = judge(policy, tokenizer, [PROMPT] * 1_000, rewards.alliteration_reward).texts
    batch = tokenizer(sampled, return_tensors="pt", padding=True, padding_side="right")
    ids, mask = batch["input_ids"].long(), batch["attention_mask"].long()
    times = [1e3 * t for t in seconds({"model": partial(model, ids[:256, :100])}, 30)["model"]]
    median = statistics.median(times)
    print(f"\nReward model, 256 x 100 tokens: median {median:.1f} ms, quickest {min(times):.1f} ms.")

    odd = [random_text(rng) for _ in range(100_000)]
    different = [sum(study(t) != rewards.alliteration_reward.score(t) for t in texts) for texts in (odd, sampled)]
    decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
    logits = model(ids, mask).logits[:, 0].tolist()
    different.append(sum(study(text) != logit for text, logit in zip(decoded, logits, strict=True)))
    print("\nOther than the study's function:")
    for what, count in zip(
        ("100,000 random texts", "1,000 stories", "and by the reward model"), different, strict=True
    ):
        print(f"- {what}: {count}")


if __name__ == "__main__":
    main()
