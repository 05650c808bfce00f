"""Several runs of a recipe, some at a time, resumable: what the sweeps and the benchmarks share, and their report.

A run is a process group of its own, started by `accelerate launch`. It is finished when its folder holds
`summary.json`; a run that was broken off goes on from its last checkpoint.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table
from trl import TrlParser

from . import secrets
from .report import write_report
from .runs import last_checkpoint, read_metrics, read_summary

ROOT = Path(__file__).parents[2]  # the checkout: recipes and launch configurations are not in the package


@dataclass(frozen=True)
class Run:
    """A name, which is its folder's too, and options of the recipe: `{"beta": 0.3, "seed": 1}`, or words as typed."""

    name: str
    options: dict = field(default_factory=dict)
    words: tuple[str, ...] = ()
    recipe: Path = ROOT / "recipes/rloo_tall_tree.py"

    @property
    def asked(self) -> list[str]:
        """All its options, as words of a command line."""
        return [*self.words, *(word for option in self.options.items() for word in as_words(*option))]

    @property
    def made_of(self) -> dict:
        """By which it is known again: its options, its recipe, and what the files of its `--config` say."""
        names = [after for word, after in pairwise(self.asked) if word == "--config"]
        files = {name: Path(name).read_text(encoding="utf-8") for name in names if Path(name).is_file()}
        return {"asked": self.asked, "recipe": self.recipe.name, "config": files}


def as_words(name: str, value) -> list[str]:
    """One option as it is typed: a list as several words, a mapping as JSON."""
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]


def seeds_of(name: str, options: dict, seeds, words: tuple[str, ...] = (), recipe: Path = Run.recipe) -> list[Run]:
    """The same options once a seed, as `name_seed_0`, ..."""
    return [Run(f"{name}_seed_{seed}", options | {"seed": seed}, words, recipe) for seed in seeds]


def launch_command(run: Run, folder: Path, launch_config: str, threads: int | None = None) -> list[str]:
    """The `accelerate launch` command of a run, with `--resume_from_checkpoint` where there is a checkpoint."""
    if not run.recipe.is_file():
        raise ValueError(
            f"there is no {run.recipe}: recipes are in the repository, not in the package; clone it and install it "
            "with pip install -e '.[lab]'"
        )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", launch_config]
    if threads:
        command += ["--num_cpu_threads_per_process", str(threads)]
    command += [str(run.recipe), *run.asked, "--output_dir", str(folder / run.name)]
    checkpoint = last_checkpoint(folder / run.name)
    return command + (["--resume_from_checkpoint", checkpoint] if checkpoint else [])


class Process:
    """One run under way. What it prints goes to `log.txt` in its folder."""

    def __init__(self, run: Run, command: list[str], folder: Path):
        self.run, self.folder = run, folder
        folder.mkdir(parents=True, exist_ok=True)
        end_orphan(folder)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        started = psutil.Process(self.process.pid).create_time()
        (folder / "process.json").write_text(json.dumps({"pid": self.process.pid, "started": started} | run.made_of))

    def last_words(self) -> str:
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing"


def end_orphan(folder: Path) -> None:
    """End the processes that a killed sweep left running for this folder."""
    try:
        left = json.loads((folder / "process.json").read_text())
    except (OSError, ValueError):
        return
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == left["pid"] and process.create_time() >= left["started"]:
                process.kill()
                process.wait(10)
        except (OSError, psutil.Error):
            continue


def check_same_run(run: Run, folder: Path) -> None:
    """`ValueError` where the folder is that of a run of another kind, which would pass for this one."""
    try:
        left = dict(json.loads((folder / "process.json").read_text()))
    except (OSError, ValueError, TypeError):
        return
    for name, words in (("asked", "options"), ("recipe", "recipe"), ("config", "content in its --config")):
        ours, theirs = run.made_of[name], left.get(name)
        if theirs not in (None, ours):  # earlier versions kept less
            said = theirs if isinstance(theirs, str) else " ".join(theirs)  # of files their names
            raise ValueError(
                f"{folder} holds a run with other {words} ({said}): name another folder, or delete that one"
            )


def run_all(
    runs: list[Run], folder: Path, launch_config: str, at_a_time: int = 1, console: Console | None = None
) -> list[Run]:
    """Bring all runs to their end, in order, `at_a_time` side by side; returns those that failed.

    Finished runs are kept. Shows an overview of all while they run; an interrupt ends the runs under way.
    """
    if at_a_time < 1:
        raise ValueError(f"at_a_time must be >= 1, got {at_a_time}")
    for name in {run.name for run in runs}:
        if sum(run.name == name for run in runs) > 1:
            raise ValueError(f"two runs are called {name!r}")
    for run in runs:
        check_same_run(run, folder / run.name)
    threads = max(1, len(os.sched_getaffinity(0)) // at_a_time) if hasattr(os, "sched_getaffinity") else None
    waiting = [run for run in runs if read_summary(folder / run.name) is None]
    under_way: list[Process] = []
    failed: dict[str, str] = {}
    console = console or Console()
    with Live(console=console, refresh_per_second=1, transient=True) as live:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < at_a_time:
                    run = waiting.pop(0)
                    command = launch_command(run, folder, launch_config, threads)
                    under_way.append(Process(run, command, folder / run.name))
                live.update(overview(runs, folder, {p.run.name for p in under_way}, failed))
                time.sleep(1)
                for process in [p for p in under_way if p.process.poll() is not None]:
                    under_way.remove(process)
                    if process.process.returncode or read_summary(process.folder) is None:
                        failed[process.run.name] = process.last_words()
        finally:
            for process in under_way:
                with suppress(ProcessLookupError):
                    os.killpg(process.process.pid, signal.SIGTERM)
    console.print(overview(runs, folder, set(), failed))
    for name, words in failed.items():
        console.print(f"{name} failed: {words}", markup=False, soft_wrap=True)
    return [run for run in runs if run.name in failed]


def overview(runs: list[Run], folder: Path, under_way: set[str], failed: dict[str, str]) -> Table:
    table = Table()
    for column in ("run", "", "generations", "reward", "KL per token", "beta"):
        table.add_column(column, justify="left" if column in ("run", "") else "right")
    for run in runs:
        state = "runs" if run.name in under_way else "failed" if run.name in failed else "waits"
        state = "done" if read_summary(folder / run.name) is not None else state
        last = next((e for e in reversed(read_metrics(folder / run.name)) if "reward" in e), {})
        formats = {"generations": ",d", "reward": ".1f", "kl": ".3f", "beta": ".3g"}
        values = [format(last[k], f) if last.get(k) is not None else "-" for k, f in formats.items()]
        table.add_row(run.name, state, *values)
    return table


@dataclass
class SweepArguments:
    """What every recipe of several runs has; options that it does not know go to the runs' recipe."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    output_dir: str = field(default="runs/sweep", metadata={"help": "Folder of the runs and the report."})
    recipe_config: str = field(
        default=str(ROOT / "recipes/fixed_beta.yaml"), metadata={"help": "YAML of the runs' defaults."}
    )
    at_a_time: int = field(default=2, metadata={"help": "Runs side by side; each gets its share of the cores."})
    launch_config: str = field(
        default=str(ROOT / "accelerate_configs/cpu.yaml"), metadata={"help": "Accelerate config of every run."}
    )
    frontier: str | None = field(
        default=None, metadata={"help": "frontier.json of best_of_n.py, drawn under reward over KL."}
    )
    print_commands: bool = field(default=False, metadata={"help": "Print one command a run, and run none."})

    FILES = ("launch_config", "recipe_config", "frontier")

    def __post_init__(self):
        for name in self.FILES:
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                if not (ROOT / path).is_file():  # as the YAML files here name them
                    raise ValueError(f"{name}: there is no file {path!r}")
                setattr(self, name, str(ROOT / path))


def parse_sweep(arguments: type[SweepArguments], defaults: Path) -> tuple[SweepArguments, tuple[str, ...]]:
    """A sweep's own arguments, from `--config` or else the YAML of its defaults, and the words for every run."""
    argv = sys.argv[1:]
    if not any(arg.split("=")[0] == "--config" for arg in argv):
        argv = ["--config", str(defaults), *argv]
    args, options = TrlParser((arguments,), allow_abbrev=False).parse_args_and_config(
        argv, return_remaining_strings=True
    )
    if secrets.in_words(options):
        raise ValueError("hub_token: a sweep writes its commands into logs; set HF_TOKEN, or run `hf auth login`")
    return args, ("--config", args.recipe_config, *options)


def run_sweep(runs: list[Run], args: SweepArguments) -> None:
    """Print the commands, or run all and write the report.

    Raises:
        `ValueError`: where a run failed, after the report of the others.
    """
    folder = Path(args.output_dir)
    if args.print_commands:
        for run in runs:
            print(shlex.join(launch_command(run, folder, args.launch_config)))
        return
    failed = run_all(runs, folder, args.launch_config, args.at_a_time)
    print(write_report(folder, args.frontier))
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again")
