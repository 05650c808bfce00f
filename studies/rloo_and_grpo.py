"""RLOO and GRPO under the same penalty, and GRPO's own beside them: KL, reward, variety, seconds.

    python studies/rloo_and_grpo.py                    # a budget of 0.06 nats a token, exact in both; three seeds
    python studies/rloo_and_grpo.py --seeds 0 --at_a_time 2

All have the options of recipes/budget.yaml: the embedded model, 60 steps of one group of forty. Runs go into
runs/rloo_and_grpo and are kept. Prints the table in Markdown, means with the range over seeds.
"""

import statistics

from common import BUDGET, JUDGED, quiet, run_groups, runs_parser, spread

from kl_alliteration.lab.runs import read_metrics, read_summary
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import ROOT, seeds_of

TIGHT = {"kl_budget_per_token": 0.06, "beta": 4}
OWN = {"kl_estimator": "k3", "kl_placement": "loss", "kl_budget_per_token": "none"}
SETTINGS = {  # recipe, options
    "RLOO, budget": ("rloo", TIGHT),
    "GRPO, budget": ("grpo", TIGHT),
    "GRPO, budget, rewards not scaled": ("grpo", TIGHT | {"scale_rewards": "none"}),
    "GRPO, its own k3 at 0.12": ("grpo", OWN | {"beta": 0.12}),
    "GRPO, its own k3 at 0.4": ("grpo", OWN | {"beta": 0.4}),
}
COLUMNS = {
    "exact_kl_per_sequence": "KL, nats per sequence",
    "reward_mean": "reward",
    "efficiency": "efficiency",
    "distinct_2": "distinct-2",
}


@one_line_errors
def main():
    args = runs_parser(__doc__, "rloo_and_grpo").parse_args()
    quiet()
    groups = {}
    for name, (recipe, options) in SETTINGS.items():
        folder = name.replace(", ", "_").replace(" ", "_")
        script = ROOT / f"recipes/{recipe}_tall_tree.py"
        groups[name] = seeds_of(folder, options, args.seeds, (*BUDGET, *JUDGED), script)
    print(f"| | {' | '.join(COLUMNS.values())} | seconds a step |\n|---|---|---|---|---|---|", flush=True)
    for name, paths in run_groups(groups, args).items():
        found = [read_summary(path)["after"] for path in paths]
        cells = [spread([each[column] for each in found]) for column in COLUMNS]
        steps = [statistics.median(m["step_time"] for m in read_metrics(path) if "step_time" in m) for path in paths]
        print(f"| {name} | {' | '.join(cells)} | {spread(steps)} |")


if __name__ == "__main__":
    main()
