"""A real language model under five penalties, and paid otherwise: what each reaches on topics that are held out.

    make smollm2
    python studies/instruct.py                                   # the recipe and four other penalties, three seeds
    python studies/instruct.py --settings recipe beta_0 --seeds 0
    python studies/instruct.py --frontier runs/best_of_n/frontier.json   # best-of-n and the least KL in the figure

Runs of recipes/instruct.yaml go into runs/instruct_study and are kept. Prints the table in Markdown, means with the
range over seeds, and writes reward_over_kl.png: the runs as they go, and where their seeds end on held-out topics. The
frontier is that of the command in recipes/best_of_n.py.
"""

import statistics
from pathlib import Path

from common import quiet, run_groups, runs_parser

from kl_alliteration.lab.checks import check_model_path
from kl_alliteration.lab.figures import plot_frontier, read_run
from kl_alliteration.lab.gguf import SMOLLM2_FOLDER
from kl_alliteration.lab.runs import read_summary, read_yardsticks
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import ROOT, seeds_of

SETTINGS = {
    "recipe": {},
    "budget_0.02": {"kl_budget_per_token": 0.02},
    "beta_0": {"kl_budget_per_token": "none", "beta": 0},
    "beta_1": {"kl_budget_per_token": "none", "beta": 1},
    "beta_4": {"kl_budget_per_token": "none", "beta": 4},
    "content": {  # words that carry meaning alone: no phrase such as "testament to the" pays
        "reward_funcs": "kl_alliteration.rewards.content_alliteration_in_25_words",
        "reward_discount": 0.8,
        "kl_to_go": True,
        "optim": "sgd",  # its gradients are clipped to a norm of 1: the rate is the length of a step
        "learning_rate": 0.06,
        "warmup_steps": 1,
        "lr_scheduler_kwargs": '{"timescale": 50}',
        "gradient_accumulation_steps": 1,
        "max_steps": 90,
    },
}
COLUMNS = {
    "reward_mean": "reward",
    "pairs_per_100_words": "pairs per 100 words",
    "exact_kl_per_token": "KL, nats per token",
    "distinct_2": "distinct-2",
    "mean_length": "tokens",
    "ended_share": "ended",
    "entropy_per_token": "entropy",
}


def numbers(judged: dict) -> dict:
    return judged | {"exact_kl_per_token": judged["exact_kl_per_sequence"] / judged["mean_length"]}


def cells(found: list[dict]) -> list[str]:
    """Means over the runs, with the range where there are several."""
    written = []
    for name in COLUMNS:
        values = [judged[name] for judged in found]
        spread = f" ({min(values):.2f} to {max(values):.2f})" if len(set(values)) > 1 else ""
        written.append(f"{statistics.fmean(values):.2f}{spread}")
    return written


@one_line_errors
def main():
    parser = runs_parser(__doc__, "instruct_study")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--frontier", type=Path, help="frontier.json of recipes/best_of_n.py")
    parser.add_argument("options", nargs="*", help="more options of the recipe, behind --")
    args = parser.parse_args()
    quiet()
    check_model_path("model", SMOLLM2_FOLDER)
    read_yardsticks(args.frontier, [])  # before anything trains
    config = ("--config", str(ROOT / "recipes/instruct.yaml"), "--model_name_or_path", SMOLLM2_FOLDER, *args.options)
    groups = {name: seeds_of(name, SETTINGS[name], args.seeds, config) for name in args.settings}
    folders = run_groups(groups, args)
    rewards = {name: SETTINGS[name].get("reward_funcs") for name in folders}
    drawable = [name for name in folders if rewards[name] == rewards[args.settings[0]]]  # on one axis, one reward
    best, least = read_yardsticks(args.frontier, [path for name in drawable for path in folders[name]])
    found = {name: [read_summary(path) for path in paths] for name, paths in folders.items()}
    print(f"| | {' | '.join(COLUMNS.values())} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    print(f"| before | {' | '.join(cells([numbers(s['before']) for s in next(iter(found.values()))]))} |")
    for name, summaries in found.items():
        print(f"| {name.replace('_', ' ')} | {' | '.join(cells([numbers(s['after']) for s in summaries]))} |")
    drawn = []
    for name, summaries in ((name, found[name]) for name in drawable):
        ends = [(s["after"]["exact_kl_per_sequence"], s["after"]["reward_mean"]) for s in summaries]
        try:
            points = read_run(folders[name][0])["points"]
        except ValueError:  # without a penalty no KL is logged: only the judge measures it
            points = [(0.0, summaries[0]["before"]["reward_mean"]), ends[0]]
        drawn.append({"name": name.replace("_", " "), "points": points, "dots": ends})
    figure = args.folder / "reward_over_kl.png"
    plot_frontier(best, drawn, figure, least)
    print(f"\n{figure}")


if __name__ == "__main__":
    main()
