"""What the leave-one-out baseline is for: REINFORCE against RLOO, rewarded for words that start with "a".

    python studies/reinforce_vs_rloo.py
    python studies/reinforce_vs_rloo.py --seeds 0 --max_steps 60 --reward_funcs my_rewards.rhymes

REINFORCE is the same run without the baseline: every text is made likelier by its reward, the poor ones too.
After 1,700 generations RLOO is at 99 to 101 words, REINFORCE at 15 to 34 (three seeds, docs/study.md).
Options that are not the recipe's own go to `rloo_tall_tree.py`. Ends in a report as `sweep_beta.py` does.
"""

from pathlib import Path

from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import SweepArguments, parse_sweep, run_sweep, seeds_of


@one_line_errors
def main():
    args, words = parse_sweep(SweepArguments, Path(__file__).with_suffix(".yaml"))
    runs = seeds_of("rloo", {"baseline": "leave_one_out"}, args.seeds, words)
    runs += seeds_of("reinforce", {"baseline": "none"}, args.seeds, words)
    run_sweep(runs, args)


if __name__ == "__main__":
    main()
