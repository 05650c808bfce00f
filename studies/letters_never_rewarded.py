"""Does alliteration that is learnt on half of the letters show on the other half?

    make smollm2
    python studies/letters_never_rewarded.py                      # SmolLM2; the embedded story model is the control
    python studies/letters_never_rewarded.py --models story --seeds 0
    python studies/letters_never_rewarded.py --prompting          # beside it: the base asked for it, untrained

Each run is rewarded for pairs on one half of the letters and judged on both, SmolLM2 on topics that it was not trained
on. Transfer is the gain on the letters that were never rewarded over the gain on those that were, in pairs per 100
words; 0 is none, 1 all of it. Runs are kept in runs/letters_never_rewarded. Prints Markdown: the gains, the transfer
with a 95 % interval over the runs, the letters and the commonest pairs before and after, texts as they come.
"""

import json
import math
import statistics
from collections import Counter

import torch
from common import BUDGET, quiet, run_groups, runs_parser
from scipy.stats import t
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl_alliteration.evaluation import judge
from kl_alliteration.lab.checks import check_model_path
from kl_alliteration.lab.gguf import SMOLLM2_FOLDER
from kl_alliteration.lab.judging import judge_run
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import ROOT, seeds_of
from kl_alliteration.sampling import use_fast_generate
from kl_alliteration.text import alliterating_pairs, bare

# Of about equal share in the alliterating pairs of both bases: 0.53 and 0.47 of SmolLM2's, 0.47 and 0.53 of the story
# model's (352 and 600 texts). `t` and `a`, the articles' letters, are apart.
HALVES = ("twhcmdfnkgjqx", "asiolbreupvyz")
COMMON = {"report_to": "none", "save_strategy": "no", "show_stories_every": 0}
MODELS = {  # the recipe's words, and the words of a text
    "smollm2": (("--config", str(ROOT / "recipes/instruct.yaml"), "--model_name_or_path", SMOLLM2_FOLDER), 25),
    "story": (BUDGET, 75),
}
ASKED = {
    "as it is": "{}",
    "asked for": "{} Let neighbouring words start with the same letter.",
    "with an example": "{} Let neighbouring words start with the same letter, as in: Six silver swans swam silently "
    "seaward.",
}


def pairs_of(texts: list[str]):
    """The alliterating pairs of different words of all texts, and the number of words."""
    words = [[word for word in map(bare, text.split()) if word] for text in texts]
    found = [pair for each in words for pair in alliterating_pairs(each) if not pair.identical]
    return found, max(1, sum(map(len, words)))


def rates(texts: list[str]) -> dict[str, float]:
    """Pairs per 100 words by first letter."""
    found, words = pairs_of(texts)
    return {letter: 100 * n / words for letter, n in Counter(pair.initial for pair in found).items()}


def on(rate: dict[str, float], letters: str) -> float:
    return sum(rate.get(letter, 0.0) for letter in letters)


def interval(values: list[float]) -> str:
    """Mean and Student's 95 % interval over independent runs."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.2f} (one run)"
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f}, {len(values)} runs)"


def commonest(texts: list[str], letters: str, most: int = 12) -> str:
    found, _ = pairs_of(texts)
    counts = Counter(f"{pair.left} {pair.right}".lower() for pair in found if pair.initial in letters)
    return ", ".join(f"{words} {n}" if n > 1 else words for words, n in counts.most_common(most))


def show(name: str, folders: dict[str, list], stories: int) -> None:
    """A model's table: a row a run, and what is the same over all of them."""
    print(f"\n### {name}, {stories} texts a run\n")
    print("| rewarded | run | rewarded letters | never rewarded | transfer | nats per token | distinct-2 |")
    print("|---" * 7 + "|")
    transfers, after, before = {half: [] for half in folders}, {}, []
    for half, paths in folders.items():
        other = next(letters for letters in HALVES if letters != half)
        after[half] = []
        for path in paths:
            # Texts of the base for each run, or their error would be in all runs alike and in no interval.
            judged = judge_run(path, stories)
            untrained = judge_run(path, stories, seed=2 + len(before) // stories, untrained=True).completions
            before += untrained
            first, last = rates(untrained), rates(judged.completions)
            gains = [on(last, letters) - on(first, letters) for letters in (half, other)]
            transfers[half].append(gains[1] / gains[0])
            after[half] += judged.completions
            cells = [f"{on(first, letters):.2f} -> {on(last, letters):.2f}" for letters in (half, other)]
            kl = judged.exact_kl_per_sequence / judged.mean_length
            cells += [f"{value:.3f}" for value in (transfers[half][-1], kl, judged.distinct_2)]
            print(f"| {half} | {path.name} | {' | '.join(cells)} |", flush=True)
    for half, values in transfers.items():
        print(f"\nTransfer, `{half}` rewarded: {interval(values)}.")
    print(f"\nBoth: {interval([value for values in transfers.values() for value in values])}.")
    first = rates(before)
    for half, texts in after.items():
        other = next(letters for letters in HALVES if letters != half)
        last = rates(texts)
        moved = sorted(set(first) | set(last), key=lambda letter: first.get(letter, 0) - last.get(letter, 0))
        gains = [f"{letter} {last.get(letter, 0) - first.get(letter, 0):+.2f}" for letter in moved]
        print(f"\n`{half}` rewarded. Gains by letter: {', '.join(gains[:10])}; least: {', '.join(gains[-4:])}.")
        print(f"Commonest rewarded pairs: {commonest(texts, half)}; before: {commonest(before, half)}.")
        print(f"Commonest never rewarded: {commonest(texts, other)}; before: {commonest(before, other)}.")
        for text in texts[:5]:
            print(f"\n> {' '.join(text.split())}")


@torch.no_grad()
def prompting(path: str, stories: int) -> None:
    """What the untrained model does when it is asked for it: pairs per 100 words on each half."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path, padding_side="left"),
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    use_fast_generate(model)
    lines = (ROOT / "recipes/instruct_held_out.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["prompt"][0]["content"] for line in lines]
    print(f"\n### Prompting alone, {stories} texts\n\n| prompt | {' | '.join(HALVES)} | words | ended | distinct-2 |")
    print("|---" * 6 + "|")
    texts = {}
    for name, form in ASKED.items():
        prompts = [[{"role": "user", "content": form.format(asked[i % len(asked)])}] for i in range(stories)]
        found = judge(
            model, tokenizer, prompts, lambda prompts, completions: [0.0] * len(prompts),
            max_new_tokens=64, temperature=0.7,
        )  # fmt: skip
        texts[name] = found.completions
        rate, words = rates(found.completions), pairs_of(found.completions)[1] / stories
        cells = [f"{on(rate, letters):.2f}" for letters in HALVES]
        print(f"| {name} | {' | '.join(cells)} | {words:.0f} | {found.ended_share:.2f} | {found.distinct_2:.2f} |")
    for name, some in texts.items():
        print(f"\nCommonest pairs, {name}: {commonest(some, ''.join(HALVES))}.")
        for text in some[:5]:
            print(f"\n> {' '.join(text.split())}")


@one_line_errors
def main():
    parser = runs_parser(__doc__, "letters_never_rewarded")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--stories", type=int, default=400, help="texts that are judged, a run")
    parser.add_argument("--prompting", action="store_true", help="measure prompting alone, and train nothing")
    parser.add_argument("options", nargs="*", help="more options of the recipe, behind --")
    args = parser.parse_args()
    quiet()
    if args.prompting or "smollm2" in args.models:
        check_model_path("models", SMOLLM2_FOLDER)
    if args.prompting:
        return prompting(SMOLLM2_FOLDER, args.stories)
    groups = {
        f"{model}_{half}": seeds_of(
            f"{model}_{half}",
            COMMON | {"reward_funcs": f"kl_alliteration.rewards.alliteration_in_{words}_words_on_{half}"},
            args.seeds,
            (*recipe, *args.options),
        )
        for model in args.models
        for recipe, words in [MODELS[model]]
        for half in HALVES
    }
    folders = run_groups(groups, args)
    for model in args.models:
        show(model, {half: folders[f"{model}_{half}"] for half in HALVES}, args.stories)


if __name__ == "__main__":
    main()
