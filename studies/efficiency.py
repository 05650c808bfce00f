"""How much of its KL a run must spend: efficiency with reward and KL credited by token, in a short and a long time.

    python studies/efficiency.py --at_a_time 3              # 2,400 generations, budgets of some 6, 12 and 15 nats
    python studies/efficiency.py --settings target_6_long   # 20,000 to a target of 6 nats, the rate falling to 0
    python studies/efficiency.py --settings budget_6 --seeds 0 -- --kl_to_go false
    python studies/efficiency.py --nearer runs/efficiency/price_6_long_seed_0

Runs go into runs/efficiency and are kept. Prints the table in Markdown, means with the range over seeds; a dash where
for some seed fewer than thirty effective samples say what the least KL is. Where the base's samples and a run's own do
not, `--nearer` asks those of a run that is nearer to the least.
"""

import torch
from common import BUDGET, quiet, run_groups, runs_parser, spread

from kl_alliteration.lab.judging import judge_run
from kl_alliteration.lab.runs import read_summary
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import seeds_of
from kl_alliteration.yardsticks import least_kl_carried

BY_TOKEN = {"reward_discount": 1.0, "kl_to_go": True}
# Plain SGD, whose gradients are clipped to a norm of 1: the rate is the length of a step.
SGD = {"optim": "sgd", "warmup_steps": 20}
LONG = {"max_steps": 500, "lr_scheduler_type": "linear"}
ADAMW_LONG, SGD_LONG = LONG | {"learning_rate": 1.5e-4}, LONG | SGD | {"learning_rate": 0.07}
SGD_6 = SGD | {"kl_budget_per_token": 0.065, "beta": 4.0, "learning_rate": 0.07}
SGD_12 = SGD | {"kl_budget_per_token": 0.13, "beta": 4.0, "learning_rate": 0.1}
SGD_15 = SGD | {"kl_budget_per_token": 0.16, "beta": 4.0, "learning_rate": 0.1}
# The first tokens choose the plot, and are paid for all of it; the others for what is near.
OPENING = {"reward_discount": 0.8, "reward_opening_tokens": 12}
SETTINGS = {
    "sgd_6": SGD_6,
    "sgd_12": SGD_12,
    "sgd_15": SGD_15,
    "opening_6": SGD_6 | OPENING,
    "opening_12": SGD_12 | OPENING,
    "opening_15": SGD_15 | OPENING,
    "budget_6": {"kl_budget_per_token": 0.06, "beta": 4.0},
    "budget_12": {"kl_budget_per_token": 0.12, "beta": 4.0},
    "budget_15": {"kl_budget_per_token": 0.15, "beta": 4.0},
    "target_6_long": ADAMW_LONG | {"target_kl_per_sequence": 6.0},
    "price_6_long": ADAMW_LONG | {"kl_budget_per_token": "none", "beta": 0.93},
    "sgd_target_6_long": SGD_LONG | {"target_kl_per_sequence": 6.0},
    "sgd_6_long": SGD_LONG | {"kl_budget_per_token": "none", "beta": 1.0},
    "sgd_12_long": SGD_LONG | {"kl_budget_per_token": "none", "beta": 0.6},
}
# Many stories: an error of the reward is one of the least KL, and beyond the base's reach they say what that is.
JUDGED = ("--eval_stories", "1000", "--show_stories_every", "0", "--report_to", "none", "--disable_tqdm", "true")
MORE = 4000  # texts of --nearer
COLUMNS = ("exact_kl_per_sequence", "reward_mean", "efficiency", "distinct_2")


@one_line_errors
def main():
    parser = runs_parser(__doc__, "efficiency")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["sgd_6", "sgd_12", "sgd_15"])
    parser.add_argument("--nearer", help="folder of a finished run, of which 4,000 more texts are sampled")
    parser.add_argument("options", nargs="*", help="more options of the recipe, behind --")
    args = parser.parse_args()
    quiet()
    words = (*BUDGET, *JUDGED, *args.options)
    groups = {name: seeds_of(name, BY_TOKEN | SETTINGS[name], args.seeds, words) for name in args.settings}
    done = run_groups(groups, args)
    nearer = None
    if args.nearer:
        judged = judge_run(args.nearer, MORE)
        nearer = torch.tensor(judged.rewards), torch.tensor(judged.ref_log_ratios)
    print("| | KL, nats per sequence | reward | efficiency | distinct-2 |\n|---|---|---|---|---|")
    for name, folders in done.items():
        found = [read_summary(folder)["after"] for folder in folders]
        for each in found:
            if each["efficiency"] is None and nearer:
                least = least_kl_carried(each["reward_mean"], [nearer])
                each["efficiency"] = None if least is None else least / each["exact_kl_per_sequence"]
        columns = {column: [each[column] for each in found] for column in COLUMNS}
        cells = [spread([] if None in values else values) for values in columns.values()]
        print(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
