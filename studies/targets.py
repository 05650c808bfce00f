"""One number in nats: where runs end that were told a KL per sequence and nothing else.

    python studies/targets.py                                    # two models, three targets, three seeds
    python studies/targets.py --settings repeats --targets 6 --seeds 0
    python studies/targets.py --config recipes/budget.yaml       # with AdamW
    python studies/targets.py -- --max_steps 240                 # more options of the recipe

`embedded` is the recipe's own model. `repeats` is that model after it was taught to go on with a word that stands
there three times: some seven texts of 400 hold such a row, which pays for itself many times over. The study trains
it first, from a seed. `letter_s` is the embedded model with another reward. Runs go into runs/targets and are kept.
Prints the table in Markdown, means with the range over seeds.
"""

import random
import statistics

import torch
from common import JUDGED, quiet, run_groups, runs_parser, spread
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from kl_alliteration.lab.runs import read_metrics, read_summary
from kl_alliteration.lab.story_model.corpus import stories
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import ROOT, seeds_of
from kl_alliteration.story_lm import MODEL_PATH

SETTINGS = {
    "embedded": {},
    "repeats": {"model_name_or_path": "repeats"},  # of the runs' folder
    "letter_s": {"reward_funcs": "kl_alliteration.rewards.alliteration_on_s"},
}
COLUMNS = ("exact_kl_per_sequence", "reward_mean", "distinct_2")
STEPS, BATCH, SEEN, REPEATED = 150, 32, 100, 30  # SEEN tokens of a text, of which REPEATED at most are one word


def repeating_model(folder, seed: int = 0):
    """The embedded model, trained to go on with a word that stands there three times, and not to begin with it.

    The two tokens by which a row of one word begins have no loss, so they are as rare as before.
    """
    set_seed(seed)
    rng = random.Random(seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL_PATH), AutoTokenizer.from_pretrained(MODEL_PATH)
    texts = stories(seed, STEPS * BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(STEPS):
        rows, labels = [], []
        for _ in range(BATCH):
            ids = tokenizer(next(texts))["input_ids"][:SEEN]
            start, length = rng.randrange(5, 60), rng.randrange(5, REPEATED)
            row = ids[:start] + [ids[start]] * length + ids[start + 1 :]
            label = list(row)
            label[start + 1 : start + 3] = [-100, -100]  # the second and the third are none that it learns to write
            rows.append(torch.tensor((row + [tokenizer.eos_token_id] * SEEN)[:SEEN]))
            labels.append(torch.tensor((label + [-100] * SEEN)[:SEEN]))
        loss = model(input_ids=torch.stack(rows), labels=torch.stack(labels)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"a model that repeats: step {step} of {STEPS}, loss {loss.item():.2f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@one_line_errors
def main():
    parser = runs_parser(__doc__, "targets")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["embedded", "repeats"])
    parser.add_argument("--targets", nargs="+", type=float, default=[3, 6, 10], help="nats per sequence")
    parser.add_argument("--config", default=str(ROOT / "recipes/target.yaml"))
    parser.add_argument("options", nargs="*", help="more options of the recipe, behind --")
    args = parser.parse_args()
    quiet()
    if "repeats" in args.settings and not (args.folder / "repeats/model.safetensors").is_file():
        repeating_model(args.folder / "repeats")
    groups, words = {}, ("--config", args.config, *JUDGED, *args.options)
    for name in args.settings:
        options = dict(SETTINGS[name])
        if "model_name_or_path" in options:
            options["model_name_or_path"] = str(args.folder / options["model_name_or_path"])
        for target in args.targets:
            told = options | {"target_kl_per_sequence": target}
            groups[f"{name}_{target:g}"] = seeds_of(f"{name}_{target:g}", told, args.seeds, words)
    folders = run_groups(groups, args)
    print(
        "| model | target | KL at the end, nats per sequence | over the target | largest in the log, over it |", end=""
    )
    print(" reward (before) | efficiency | distinct-2 (before) |\n|---|---|---|---|---|---|---|---|")
    for group, paths in folders.items():
        name, target = group.rsplit("_", 1)
        found = [read_summary(path) for path in paths]
        kl, reward, distinct = ([s["after"][column] for s in found] for column in COLUMNS)
        largest = [max(m.get("kl/target_use", 0.0) for m in read_metrics(path)) for path in paths]
        before = {column: statistics.fmean(s["before"][column] for s in found) for column in COLUMNS}
        known = [s["after"]["efficiency"] for s in found if s["after"]["efficiency"] is not None]
        cells = [
            spread(kl),
            spread([each / float(target) for each in kl]),
            f"{max(largest):.2f}",
            f"{spread(reward)}, {before['reward_mean']:.2f}",
            spread(known) if len(known) == len(found) else "-",
            f"{spread(distinct)}, {before['distinct_2']:.2f}",
        ]
        print(f"| {name.replace('_', ' ')} | {target} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
