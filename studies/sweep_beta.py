"""Train at several betas and seeds, side by side where there is room, and draw the study.

    python studies/sweep_beta.py                                       # the study's first sweep, embedded model
    python studies/sweep_beta.py --config studies/second_sweep.yaml
    python studies/sweep_beta.py --config studies/extended.yaml        # one beta for long, and a budget beside it
    python studies/sweep_beta.py --betas 0.1 0.3 1 --beta_unit sequence --seeds 0 --use_peft
    python studies/sweep_beta.py --print_commands                      # one command a run, for a job array

Options that are not the sweep's own go to `rloo_tall_tree.py`; `--recipe_config` is the YAML of its defaults here.
Finished runs are kept and broken ones go on from their last checkpoint, so the same command again ends an interrupted
sweep. The first sweep takes 21 minutes on two cores; its mean rewards fall from 92 at beta 0 to 10 at beta 100.
Into the output folder goes a folder a run, and the report: `report.html`, `report.md` and figures.
"""

from dataclasses import dataclass, field
from pathlib import Path

from kl_alliteration.lab.options import BETA_UNITS
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import SweepArguments, parse_sweep, run_sweep, seeds_of


@dataclass
class BetaArguments(SweepArguments):
    """What is swept; everything else is an option of the recipe."""

    betas: list[float] = field(default_factory=list, metadata={"help": "Coefficients, one run a seed each."})
    beta_unit: str = field(default="study", metadata={"help": f"Unit of the betas: {' or '.join(BETA_UNITS)}."})
    beside_config: str | None = field(
        default=None, metadata={"help": "YAML of another run a seed, drawn beside, at its own beta."}
    )
    beside_steps: int = field(default=600, metadata={"help": "Steps of the runs beside."})

    FILES = (*SweepArguments.FILES, "beside_config")

    def __post_init__(self):
        super().__post_init__()
        if not self.betas:
            raise ValueError("betas must name at least one coefficient, such as --betas 0 1 100")
        if any(beta < 0 for beta in self.betas):
            raise ValueError(f"betas must be >= 0, got {min(self.betas)}")


@one_line_errors
def main():
    args, words = parse_sweep(BetaArguments, Path(__file__).with_name("first_sweep.yaml"))
    runs = []
    for beta in args.betas:
        options = {"beta": beta, "beta_unit": args.beta_unit}
        runs += seeds_of(f"beta_{beta:g}", options, args.seeds, words)
    if args.beside_config:
        options = {"config": args.beside_config, "max_steps": args.beside_steps}
        runs += seeds_of(Path(args.beside_config).stem, options, args.seeds, words[2:])
    run_sweep(runs, args)


if __name__ == "__main__":
    main()
