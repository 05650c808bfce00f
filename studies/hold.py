"""Does the sweet spot hold, what does it cost, and which rule holds it?

    python studies/hold.py held          # a budget alone, recipes/budget.yaml, for 20,000 generations and more
    python studies/hold.py ahead         # reward per nat: that, stock TRL at five betas, and best-of-n
    python studies/hold.py controllers   # every rule on the same seeds
    python studies/hold.py guard         # beta 0, stopped by the guard

Three seeds each. Runs go into runs/hold and are kept: a second call draws what is there and trains the rest. Prints
Markdown; figures go into --figures. `ahead` draws the frontier that recipes/best_of_n.py wrote for the embedded model.
"""

import json
import statistics
from pathlib import Path

import numpy
from common import BUDGET, run_groups, runs_parser
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl_alliteration import alliteration_reward, judge
from kl_alliteration.lab.figures import plot_frontier, plot_runs, read_run
from kl_alliteration.lab.runs import read_metrics, read_summary
from kl_alliteration.lab.sweep import ROOT, seeds_of
from kl_alliteration.story_lm import MODEL_PATH, PROMPT

TARGET = 0.15  # nats per token
WINDOW = 20  # steps of a mean of the KL
REWARD_WINDOW = 2_000  # generations of a mean of the reward
QUIET = {"config": BUDGET[1], "disable_tqdm": True, "show_stories_every": 0, "report_to": "none", "logging_steps": 1}
STOCK = {"kl_estimator": "k1", "kl_placement": "reward", "kl_budget_per_token": "none", "max_steps": 60}
# At 0.06 nats a token a nat buys more than 1 of reward: a beta of 1 would not hold it.
HELD = {0.06: 2.0, 0.12: 1.0, 0.18: 1.0}
RULED = STOCK | {"max_steps": 100, "target_kl_per_token": TARGET, "beta": 0.3}
EXPERIMENTS = {
    "held": {"budget 0.15": {"max_steps": 600, "eval_stories": 500}},
    "ahead": {
        f"budget {budget}": {"kl_budget_per_token": budget, "beta": beta, "max_steps": 160}
        for budget, beta in HELD.items()
    }
    | {f"stock {beta}": STOCK | {"beta": beta} for beta in (0.1, 0.2, 0.3, 0.45, 0.7)},
    "controllers": {"fixed": RULED | {"target_kl_per_token": "none"}}
    | {rule: RULED | {"kl_controller": rule} for rule in ("step", "ppo", "ziegler", "pi")},
    "guard": {
        "beta 0": {
            "config": str(ROOT / "recipes/fixed_beta.yaml"),
            "beta": 0,
            "collapse_guard": "stop",
            "save_strategy": "steps",
            "save_steps": 10,
        }
    },
}


def running_mean(values: list[float], window: int) -> list[float]:
    return [statistics.fmean(values[i : i + window]) for i in range(len(values) - window + 1)]


def held(folder: Path) -> list[str]:
    """One row: what the issue of holding asks of a run whose logs are one a step."""
    log = [entry for entry in read_metrics(folder) if "reward" in entry]
    summary = read_summary(folder)
    kl = [entry.get("kl/exact_per_token", entry["kl"]) for entry in log]
    batch = log[0]["generations"]
    means = running_mean(kl, WINDOW)
    reached = next((i for i, mean in enumerate(means) if mean >= 0.8 * TARGET), None)
    if reached is None:
        return [folder.name, "not reached"]
    held_for = batch * (len(log) - reached - WINDOW)
    after = means[reached:]
    rewards = running_mean([entry["reward"] for entry in log], REWARD_WINDOW // batch)
    stories, base = summary["after"], summary["before"]
    return [
        folder.name,
        f"{batch * (reached + WINDOW):,}",
        f"{held_for:,}",
        f"{max(means) / TARGET:.2f}",
        f"{min(after) / TARGET:.2f} to {max(after) / TARGET:.2f}",
        f"{statistics.fmean(abs(m / TARGET - 1) <= 0.2 for m in after):.1%}",
        f"{rewards[-1]:.1f}",
        f"{rewards[-1] / max(rewards):.2f}",
        f"{stories['different_share']:.1%}",
        f"{stories['distinct_2'] / base['distinct_2']:.2f}",
        f"{stories['kl_per_sequence']:.1f}",
    ]


HELD_COLUMNS = (
    "run",
    "reached at (generations)",
    "held for (generations)",
    f"largest {WINDOW}-step mean / target",
    "then, / target",
    "within 20 %",
    f"reward, last {REWARD_WINDOW:,}",
    "of the best",
    "different",
    "distinct pairs / base",
    "KL per sequence",
)


def table(columns, rows) -> None:
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def reward_at(folder: Path, kl_per_sequence: float) -> float | None:
    """Mean reward of the last 20 steps at which the KL, a mean of 10 steps, was within a tenth of this one.

    The last ones: a run that is held at a KL is judged where it got to, one that passes by where it passed.
    """
    points = read_run(folder)["points"]
    smooth = running_mean([kl for kl, _ in points], 10)
    near = [points[i + 5][1] for i, mean in enumerate(smooth) if abs(mean / kl_per_sequence - 1) <= 0.1]
    return statistics.fmean(near[-20:]) if near else None


def ahead(runs: dict[str, list[Path]], frontier: list[dict], figures: Path) -> None:
    levels = (6, 12, 15, 18)
    rows = []
    for name, folders in runs.items():
        cells = []
        for level in levels:
            rewards = [r for folder in folders if (r := reward_at(folder, level)) is not None]
            spread = f"{statistics.fmean(rewards):.1f} ({min(rewards):.1f} to {max(rewards):.1f})" if rewards else "-"
            cells.append(f"{spread}, {len(rewards)} of {len(folders)}")
        rows.append([name, *cells])
    columns = [[p[name] for p in frontier] for name in ("kl_per_sequence", "reward", "low", "high")]
    columns = [[numpy.nan if value is None else value for value in column] for column in columns]  # beyond its bands
    best = [[float(numpy.interp(level, columns[0], c, right=numpy.nan)) for c in columns[1:]] for level in levels]
    rows.append(["best of n", *("no such n" if r != r else f"{r:.1f} ({a:.1f} to {b:.1f})" for r, a, b in best)])
    table(("", *(f"reward at {level} nats" for level in levels)), rows)
    drawn = [{**read_run(folders[0]), "name": name} for name, folders in runs.items()]
    stock = [run for run in drawn if run["name"].startswith("stock")]
    for run in stock:
        run |= {"color": "0.55", "name": "stock, five betas" if run is stock[0] else ""}
    for run in drawn:
        columns = zip(*run["points"], strict=True)
        run["points"] = list(zip(*(running_mean(list(c), 10) for c in columns), strict=True))
    plot_frontier(frontier, drawn, figures / "frontier.png")


GUARD_COLUMNS = (
    "run",
    "stopped at",
    "different in the last batch",
    "smallest in any",
    "last good checkpoint",
    "its 100 stories: different share",
    "distinct pairs",
    "reward",
)


def guard(folder: Path) -> list[str]:
    """One row: where the guard stopped a run, and what its last good checkpoint writes."""
    share = [entry["guard/different_share"] for entry in read_metrics(folder) if "reward" in entry]
    summary = read_summary(folder)
    if summary["collapse"] is None:
        return [folder.name, "not stopped"]
    checkpoint = ROOT / summary["last_good_checkpoint"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    stories = judge(model, tokenizer, [PROMPT] * 100, alliteration_reward)
    words = summary["collapse"], f"{share[-1]:.0%}", f"{min(share):.0%}", checkpoint.name
    numbers = f"{stories.different_share:.0%}", f"{stories.distinct_2:.2f}", f"{stories.reward_mean:.1f}"
    return [folder.name, *words, *numbers]


def main():
    parser = runs_parser(__doc__, "hold")
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    wanted = dict(EXPERIMENTS[args.experiment])
    if args.experiment == "ahead":
        wanted = EXPERIMENTS["held"] | wanted
    runs = {name: seeds_of(name.replace(" ", "_"), QUIET | options, args.seeds) for name, options in wanted.items()}
    folders = run_groups(runs, args)
    if args.experiment == "held":
        table(HELD_COLUMNS, [held(folder) for folder in folders["budget 0.15"]])
    if args.experiment == "ahead":
        frontier = json.loads((MODEL_PATH.parent / "frontier.json").read_text())["frontier"]
        ahead(folders, frontier, args.figures)
    if args.experiment == "guard":
        table(GUARD_COLUMNS, [guard(folder) for folder in folders["beta 0"]])
    if args.experiment in ("held", "controllers"):
        plot_runs(folders, args.figures / f"{args.experiment}.png", TARGET)


if __name__ == "__main__":
    main()
