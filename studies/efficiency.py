"""How much of its KL a run must spend: efficiency at three KLs, in a short time and in a long one.

    python studies/efficiency.py --at_a_time 3            # 2,400 generations at about 6, 12 and 15 nats, three seeds
    python studies/efficiency.py --settings 6_long        # 20,000
    python studies/efficiency.py --settings 6 --seeds 0 -- --kl_to_go false

Every run has its reward and its KL credited by token. Runs go into runs/efficiency and are kept. Prints the table in
Markdown, means with the range over seeds; a dash where fewer than ten effective samples say what the least KL is.
"""

from common import BUDGET, quiet, run_groups, runs_parser, spread

from kl_alliteration.lab.runs import read_summary
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import seeds_of

BY_TOKEN = {"reward_discount": 1.0, "kl_to_go": True}
LONG = {"max_steps": 500, "lr_scheduler_type": "linear", "lr_scheduler_kwargs": "{}"}
LEVELS = {
    "6": {"kl_budget_per_token": 0.06, "beta": 4.0},
    "12": {"kl_budget_per_token": 0.12, "beta": 4.0},
    "15": {"kl_budget_per_token": 0.15, "beta": 4.0},
}
SETTINGS = LEVELS | {f"{name}_long": options | LONG for name, options in LEVELS.items()}
# Many stories: the reward's error moves the least KL, and they are what says it beyond the base's own.
JUDGED = ("--eval_stories", "2000", "--show_stories_every", "0", "--report_to", "none", "--disable_tqdm", "true")
COLUMNS = ("exact_kl_per_sequence", "reward_mean", "efficiency", "distinct_2")


@one_line_errors
def main():
    parser = runs_parser(__doc__, "efficiency")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(LEVELS))
    parser.add_argument("options", nargs="*", help="more options of the recipe, behind --")
    args = parser.parse_args()
    quiet()
    words = (*BUDGET, *JUDGED, *args.options)
    groups = {name: seeds_of(name, BY_TOKEN | SETTINGS[name], args.seeds, words) for name in args.settings}
    print("| about, nats | KL, nats per sequence | reward | efficiency | distinct-2 |\n|---|---|---|---|---|")
    for name, folders in run_groups(groups, args).items():
        found = [read_summary(folder)["after"] for folder in folders]
        cells = [spread([each[column] for each in found if each[column] is not None]) for column in COLUMNS]
        print(f"| {name.replace('_', ', ')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
