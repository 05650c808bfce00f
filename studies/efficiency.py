"""How much of its KL a run must spend: efficiency with reward and KL credited by token, in a short and a long time.

    python studies/efficiency.py --at_a_time 3              # 2,400 generations, budgets of some 6, 12 and 15 nats
    python studies/efficiency.py --settings target_6_long   # 20,000 to a target of 6 nats, the rate falling to 0
    python studies/efficiency.py --settings budget_6 --seeds 0 -- --kl_to_go false

Runs go into runs/efficiency and are kept. Prints the table in Markdown, means with the range over seeds; a dash where
fewer than ten effective samples say what the least KL is.
"""

from common import BUDGET, quiet, run_groups, runs_parser, spread

from kl_alliteration.lab.runs import read_summary
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import seeds_of

BY_TOKEN = {"reward_discount": 1.0, "kl_to_go": True}
LONG = {"max_steps": 500, "learning_rate": 1.5e-4, "lr_scheduler_type": "linear"}
SETTINGS = {
    "budget_6": {"kl_budget_per_token": 0.06, "beta": 4.0},
    "budget_12": {"kl_budget_per_token": 0.12, "beta": 4.0},
    "budget_15": {"kl_budget_per_token": 0.15, "beta": 4.0},
    "target_6_long": {"target_kl_per_sequence": 6.0} | LONG,
    "price_6_long": {"kl_budget_per_token": "none", "beta": 0.93} | LONG,
}
# Many stories: an error of the reward is one of the least KL, and beyond the base's reach they say what that is.
JUDGED = ("--eval_stories", "1000", "--show_stories_every", "0", "--report_to", "none", "--disable_tqdm", "true")
COLUMNS = ("exact_kl_per_sequence", "reward_mean", "efficiency", "distinct_2")


@one_line_errors
def main():
    parser = runs_parser(__doc__, "efficiency")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["budget_6", "budget_12", "budget_15"])
    parser.add_argument("options", nargs="*", help="more options of the recipe, behind --")
    args = parser.parse_args()
    quiet()
    words = (*BUDGET, *JUDGED, *args.options)
    groups = {name: seeds_of(name, BY_TOKEN | SETTINGS[name], args.seeds, words) for name in args.settings}
    print("| | KL, nats per sequence | reward | efficiency | distinct-2 |\n|---|---|---|---|---|")
    for name, folders in run_groups(groups, args).items():
        found = [read_summary(folder)["after"] for folder in folders]
        cells = [spread([each[column] for each in found if each[column] is not None]) for column in COLUMNS]
        print(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
