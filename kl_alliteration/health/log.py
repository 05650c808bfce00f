"""A training log as series of numbers, and where a run keeps one."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

FEW = 3  # entries that a mean is taken of


class Log:
    """The entries of a training log so far, by name."""

    def __init__(self, entries: Iterable[dict] = ()):
        self.step, self.values = 0, {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: dict) -> bool:
        """One entry, if it is of training; whether it is. What is no number is left out, and `None` is not finite."""
        entry = {name.removeprefix("train/"): value for name, value in entry.items()}
        if not {"loss", "reward", "kl"} & set(entry):  # of an evaluation, or the last one, of times
            return False
        step = next((entry[name] for name in ("step", "global_step", "_step") if name in entry), None)
        self.step = int(step) if isinstance(step, (int, float)) and math.isfinite(step) else self.step + 1
        for name, value in entry.items():
            value = math.nan if value is None else value
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.values.setdefault(name, []).append(float(value))
        return True

    def all(self, *names: str) -> list[float]:
        """The values under the first of these names that is in the log."""
        return next((self.values[name] for name in names if name in self.values), [])

    def present(self, *names: str) -> list[str]:
        """Those of these names that are in the log."""
        return [name for name in names if name in self.values]

    def finite(self, *names: str) -> list[float]:
        return [value for value in self.all(*names) if math.isfinite(value)]

    def early(self, *names: str) -> float | None:
        """Mean of the first entries; `None` while there are no others."""
        values = self.finite(*names)
        return statistics.fmean(values[:FEW]) if len(values) >= 2 * FEW else None

    def recent(self, *names: str) -> float | None:
        """Mean of the last entries; `None` while there are too few."""
        values = self.finite(*names)
        return statistics.fmean(values[-FEW:]) if len(values) >= FEW else None


def read_entries(path: str | Path) -> tuple[list[dict], Path]:
    """The entries of a run's log, and the folder that it is in.

    Args:
        path (`str`): A folder with `metrics.jsonl`, `trainer_state.json` or checkpoints; or such a file.

    Raises:
        `ValueError`: where there is none, or no entry of training in it.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"there is no {str(path)!r}: name the folder of a run, its trainer_state.json, or a metrics file"
        )
    file = path
    if path.is_dir():
        states = [path / "trainer_state.json", *path.glob("checkpoint-*/trainer_state.json")]
        files = [path / "metrics.jsonl", *sorted(states, key=_step_of, reverse=True)]  # the furthest knows the most
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise ValueError(
                f"{str(path)!r} holds no metrics.jsonl, no trainer_state.json and no checkpoint of a trainer: a "
                "script of your own leaves its log there by trainer.save_state() after training, or by checkpoints"
            )
    text = file.read_text(encoding="utf-8")
    try:
        entries = [entry for entry in json.loads(text)["log_history"] if isinstance(entry, dict)]
    except (ValueError, TypeError, KeyError):
        entries = _lines(text)
    if not any({"loss", "reward", "kl"} & {name.removeprefix("train/") for name in entry} for entry in entries):
        raise ValueError(f"{str(file)!r} holds no entry with a loss, a reward or a kl: is it the log of a trainer?")
    return entries, path if path.is_dir() else file.parent


def _step_of(state: Path) -> int:
    """The step of a `trainer_state.json`; -1 where none can be read."""
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, TypeError, KeyError):
        return -1


def _lines(text: str) -> list[dict]:
    """One JSON object a line; a last one that is being written is left out."""
    entries = []
    for line in filter(str.strip, text.split("\n")):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries
