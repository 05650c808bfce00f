"""RLOO, clipped updates, GRPO and DPO from one base, for one reward, at several betas: reward against exact KL.

    python studies/kl_across_algorithms.py
    python studies/kl_across_algorithms.py --seeds 0 --use_peft --output_dir runs/algorithms_lora
    python studies/kl_across_algorithms.py --config my.yaml   # other algorithms, recipes, betas

Each finished run is judged in the same way, by fresh stories and in nats per sequence to the base, whatever its own
reference was. Into the output folder go a folder a run, `algorithms.png`, `algorithms.json` and `algorithms.md`, with
two stories of each at equal KL. Finished and judged runs are kept. Options that are not its own go to every run.
"""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import track
from transformers.utils import logging

from kl_alliteration.lab.comparison import judged, write_page
from kl_alliteration.lab.judging import judge_run
from kl_alliteration.lab.runs import read_summary, read_yardsticks
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.lab.sweep import (
    ROOT,
    Run,
    SweepArguments,
    as_words,
    launch_command,
    parse_sweep,
    run_all,
    seeds_of,
)

KEYS = {"recipe", "config", "betas", "options", "shares"}


@dataclass
class AcrossArguments(SweepArguments):
    """What is compared; everything else is an option of every run."""

    algorithms: dict | str | None = field(
        default=None,
        metadata={
            "help": "Name to `recipe`, `config`, `betas`, and if need be `options` of its own and what the runs of "
            "one seed share: `shares: {option: file}`, a file that the first beta's run leaves."
        },
    )
    stories: int = field(default=300, metadata={"help": "Fresh stories of each trained model that are judged."})

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.algorithms, str):
            self.algorithms = json.loads(self.algorithms)
        if not self.algorithms:
            raise ValueError("algorithms must name at least one: see studies/kl_across_algorithms.yaml")
        if self.frontier is None:
            raise ValueError("frontier must be a frontier.json of best_of_n.py: its first point is the base")
        if self.stories < 2:
            raise ValueError(f"stories must be >= 2, got {self.stories}")
        for name, given in self.algorithms.items():
            if not isinstance(given, dict) or not {"recipe", "config", "betas"} <= set(given) <= KEYS:
                raise ValueError(f"algorithms: {name} needs recipe, config and betas, and may have options and shares")
            for key in ("recipe", "config"):
                if not Path(given[key]).is_file() and not (ROOT / given[key]).is_file():
                    raise ValueError(f"algorithms: {name}: there is no file {given[key]!r}")


def runs_of(name: str, given: dict, args: AcrossArguments, words: tuple[str, ...]) -> list[list[Run]]:
    """The runs of each beta, a run a seed."""
    recipe, config = (
        path if (path := Path(given[key])).is_file() else ROOT / given[key] for key in ("recipe", "config")
    )
    own = [word for option in given.get("options", {}).items() for word in as_words(*option)]
    words = ("--config", str(config), *own, *words)
    label = name.replace(" ", "_")
    groups = [seeds_of(f"{label}_beta_{b:g}", {"beta": b}, args.seeds, words, recipe) for b in given["betas"]]
    for group in groups[1:]:
        for run, first in zip(group, groups[0], strict=True):
            for option, file in given.get("shares", {}).items():
                run.options[option] = str(Path(args.output_dir, first.name, file))
    return groups


@one_line_errors
def main():
    args, (_, _, *words) = parse_sweep(AcrossArguments, Path(__file__).with_suffix(".yaml"))
    folder = Path(args.output_dir)
    groups = {name: runs_of(name, given, args, tuple(words)) for name, given in args.algorithms.items()}
    sharing = [found for name, found in groups.items() if "shares" in args.algorithms[name]]
    plain = [found for name, found in groups.items() if "shares" not in args.algorithms[name]]
    first = [found[0] for found in sharing] + [group for found in plain for group in found]
    waves = [sum(first, []), sum((group for found in sharing for group in found[1:]), [])]
    if args.print_commands:
        for run in sum(waves, []):
            print(shlex.join(launch_command(run, folder, args.launch_config)))
        return
    read_yardsticks(args.frontier, [])  # before anything trains
    failed = [run for w in filter(None, waves) for run in run_all(w, folder, args.launch_config, args.at_a_time)]
    logging.disable_progress_bar()
    found = [
        judged(name, run.options["beta"], folder / run.name, args.stories, judge_run)
        for name, betas in track(groups.items(), description="judging")
        for group in betas
        for run in group
        if read_summary(folder / run.name) is not None
    ]
    if found:
        print(write_page(found, read_yardsticks(args.frontier, [run.folder for run in found])[0], folder))
    if failed:
        raise ValueError(f"{len(failed)} of {sum(map(len, waves))} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
