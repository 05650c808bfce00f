"""Train at several betas and seeds, side by side where there is room, and draw the study.

    python recipes/sweep_beta.py                                       # the study's first sweep, embedded model
    python recipes/sweep_beta.py --config recipes/second_sweep.yaml
    python recipes/sweep_beta.py --betas 0.1 0.3 1 --beta_unit sequence --seeds 0 --use_peft
    python recipes/sweep_beta.py --print_commands                      # one command a run, for a job array

Options that are not the sweep's own go to `rloo_tall_tree.py`; `--recipe_config` is the YAML of its defaults here.
Finished runs are kept and broken ones go on from their last checkpoint, so the same command again ends an interrupted
sweep. Into the output folder goes a folder a run, and the report: `report.html`, `report.md` and figures.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from kl_alliteration.recipe import BETA_UNITS, one_line_errors
from kl_alliteration.report import write_report
from kl_alliteration.sweep import ROOT, Run, launch_command, run_all

RECIPE = Path(__file__).with_name("rloo_tall_tree.py")


@dataclass
class SweepArguments:
    """What is swept; everything else is an option of the recipe."""

    betas: list[float] = field(default_factory=list, metadata={"help": "Coefficients, one run a seed each."})
    beta_unit: str = field(default="study", metadata={"help": f"Unit of the betas: {' or '.join(BETA_UNITS)}."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds."})
    output_dir: str = field(default="runs/sweep", metadata={"help": "Folder of the runs and the report."})
    recipe_config: str = field(
        default=str(Path(__file__).with_name("fixed_beta.yaml")), metadata={"help": "YAML of the recipe's defaults."}
    )
    at_a_time: int = field(default=1, metadata={"help": "Runs side by side; each gets its share of the cores."})
    launch_config: str = field(
        default=str(ROOT / "accelerate_configs/cpu.yaml"), metadata={"help": "Accelerate config of every run."}
    )
    print_commands: bool = field(default=False, metadata={"help": "Print one command a run, and run none."})


@one_line_errors
def main():
    argv = sys.argv[1:]
    if not any(arg.split("=")[0] == "--config" for arg in argv):
        argv = ["--config", str(Path(__file__).with_name("first_sweep.yaml")), *argv]
    parser = TrlParser((SweepArguments,), allow_abbrev=False)
    args, options = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if not args.betas:
        raise ValueError("betas must name at least one coefficient, such as --betas 0 1 100")
    if any(beta < 0 for beta in args.betas):
        raise ValueError(f"betas must be >= 0, got {min(args.betas)}")
    if args.at_a_time < 1:
        raise ValueError(f"at_a_time must be >= 1, got {args.at_a_time}")
    for name in ("launch_config", "recipe_config"):
        if not Path(getattr(args, name)).is_file():
            raise ValueError(f"{name}: there is no file {getattr(args, name)!r}")
    folder = Path(args.output_dir)
    words = ("--config", args.recipe_config, *options)
    runs = [
        Run(f"beta_{beta:g}_seed_{seed}", {"beta": beta, "beta_unit": args.beta_unit, "seed": seed}, words)
        for beta in args.betas
        for seed in args.seeds
    ]
    if args.print_commands:
        for run in runs:
            print(shlex.join(launch_command(run, RECIPE, folder, args.launch_config)))
        return
    failed = run_all(runs, RECIPE, folder, args.launch_config, args.at_a_time)
    write_report(folder)
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
