"""What a run leaves in its folder, read back: checkpoints, `metrics.jsonl`, `summary.json`."""

import json
import re
from pathlib import Path


def group_of(name: str) -> str:
    """The name without its seed, as words: `beta_0.1_seed_2` is of `beta 0.1`."""
    return re.sub(r"_seed_\d+$", "", name).replace("_", " ")


def read_summary(folder: Path) -> dict | None:
    """`summary.json` of a finished run; `None` where there is none, or half of one."""
    try:
        return json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_metrics(folder: Path) -> list[dict]:
    """The lines of `metrics.jsonl` so far; a last line that is still being written is left out."""
    try:
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer writes `trainer_state.json` last."""
    try:
        json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in a folder, `None` where there is none.

    `transformers.trainer_utils.get_last_checkpoint` takes the highest number, complete or not.
    """
    complete = filter(is_complete, Path(folder).glob("checkpoint-*"))
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)
