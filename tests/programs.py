"""Recipes and studies run in the tests' own process: a new one costs some seven seconds of imports.

`run("rloo_tall_tree.py", "--max_steps", 2, cwd=tmp_path)` is what `python recipes/rloo_tall_tree.py --max_steps 2` is
to a person in that folder: its exit status, what it printed, what it left there. What a process would take with it
when it ends is put back by hand. Where the process itself is what is tested, `run_process` starts one.
"""

import contextlib
import gc
import importlib
import io
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets.utils.logging
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState

from kl_alliteration.kl import KLWarning
from kl_alliteration.lab import run as lab_run
from kl_alliteration.lab import sweep

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def script(name: str | Path) -> Path:
    """A recipe or a study by its file's name, or any other script by its path."""
    if isinstance(name, Path):
        return name
    return next(path for folder in ("recipes", "studies") if (path := ROOT / folder / name).is_file())


@contextlib.contextmanager
def as_in_a_new_process(cwd: Path, env: dict[str, str]) -> Iterator[None]:
    """What a program finds in a process of its own, and everything as it was before when it has ended."""
    environment, path, modules, folder = dict(os.environ), list(sys.path), set(sys.modules), os.getcwd()
    argv, handlers, level = sys.argv, list(logging.root.handlers), logging.root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    verbosity, threads, bytecode = (
        transformers.logging.get_verbosity(),
        torch.get_num_threads(),
        sys.dont_write_bytecode,
    )
    os.environ.update(env)
    os.chdir(cwd)
    sys.dont_write_bytecode = True  # a reward file that is written anew within a second has the same date
    importlib.invalidate_caches()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("default", category=KLWarning)  # for a person it is no error
            yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, sys.path[:], sys.dont_write_bytecode = argv, path, bytecode
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(f"{cwd}{os.sep}"):
                del sys.modules[name]  # the user's rewards
        for number, handler in signals.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        logging.root.handlers[:], logging.root.level = handlers, level
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        datasets.utils.logging.enable_progress_bar()
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()  # a trainer is a circle


def execute(path: Path, words, stdout, stderr) -> int:
    """Run a script as `__main__` with these words on its command line; its exit status."""
    sys.argv = [str(path), *map(str, words)]
    sys.path.insert(0, str(path.parent))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
                return 1
            return ended.code or 0
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


def run(
    name: str | Path, *words, cwd: Path, check: bool = True, env=ENVIRONMENT, curves: bool = False
) -> SimpleNamespace:
    """A recipe or study in this process: `returncode`, `stdout`, `stderr`. A sweep's runs are run in it too.

    Without `curves` no run draws its `curves.png`, which takes half of a short run's time.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    drawing = contextlib.nullcontext() if curves else no_curves()
    with as_in_a_new_process(Path(cwd), env), runs_in_this_process(), drawing:
        status = execute(script(name), words, stdout, stderr)
    done = SimpleNamespace(returncode=status, stdout=stdout.getvalue(), stderr=stderr.getvalue())
    assert not check or status == 0, done.stderr[-3000:]
    return done


def run_process(name: str, *words, cwd: Path, launcher=(), check: bool = True) -> subprocess.CompletedProcess:
    """The same in a process of its own, under a launcher such as `accelerate.commands.launch` where one is named."""
    command = [sys.executable, *(("-m", *launcher) if launcher else ()), str(script(name)), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def fork(name: str | Path, *words, cwd: Path, log: Path, env: dict[str, str] | None = None) -> int:
    """The same in a child of this process, which has the imports already: the child's number. For signals and ranks.

    What it prints goes to `log`; the runs of a sweep are processes of their own.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("w", buffering=1) as output, as_in_a_new_process(Path(cwd), ENVIRONMENT | (env or {})):
                status = execute(script(name), words, output, output)
        finally:
            os._exit(status)
    return child


def fork_ranks(name: str | Path, *words, cwd: Path, logs: Path, ranks: int = 2) -> str:
    """The same on several processes, told of each other as torchrun tells them; what the first one printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everywhere = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    everywhere |= {"ACCELERATE_USE_CPU": "true"}
    children = {}
    for rank in range(ranks):
        env = {key: str(value) for key, value in (everywhere | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        children[fork(name, *words, cwd=cwd, log=logs / f"rank_{rank}.txt", env=env)] = rank
    while children:
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                rank = children.pop(child)
                if status:
                    for other in children:
                        os.kill(other, signal.SIGKILL)
                        os.waitpid(other, 0)
                    said = (logs / f"rank_{rank}.txt").read_text()[-3000:]
                    raise AssertionError(f"rank {rank} ended with {status}: {said}")
        time.sleep(0.05)
    return (logs / "rank_0.txt").read_text()


class InThisProcess:
    """In a sweep, in place of a run's process: the run is over when it is made.

    A process that does nothing is started beside it, so that the sweep has a number to write down.
    """

    def __init__(self, command, stdout, **kwargs):
        self.nothing = subprocess.Popen([sys.executable, "-S", "-c", ""], start_new_session=True)
        self.pid = self.nothing.pid
        at = next(i for i, word in enumerate(command) if word.endswith(".py"))
        with as_in_a_new_process(Path.cwd(), ENVIRONMENT):
            self.returncode = execute(Path(command[at]), command[at + 1 :], stdout, stdout)

    def poll(self) -> int:
        self.nothing.wait()
        return self.returncode


@contextlib.contextmanager
def runs_in_this_process() -> Iterator[None]:
    """Sweeps run their runs here, one after the other, and do not wait."""
    real = sweep.subprocess, sweep.time
    here = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT")}
    sweep.subprocess = SimpleNamespace(Popen=InThisProcess, **here)
    sweep.time = SimpleNamespace(sleep=lambda seconds: None)
    try:
        yield
    finally:
        sweep.subprocess, sweep.time = real


@contextlib.contextmanager
def no_curves() -> Iterator[None]:
    real, lab_run.plot_curves = lab_run.plot_curves, lambda *args, **kwargs: None
    try:
        yield
    finally:
        lab_run.plot_curves = real
