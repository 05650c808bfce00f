"""What a run leaves in its folder, read back: checkpoints, `metrics.jsonl`, `summary.json`; what is whose."""

import json
import math
import re
from contextlib import suppress
from pathlib import Path

RECORD = "_made.json"  # of what a run made, by what it is known again; `_*` stays off the Hub
STORIES = "stories.jsonl"  # all that were judged, a line each, `before` and `after`
RESULTS = ("summary.json", STORIES, "stories.md", "curves.png")  # what a run leaves when it is over
RESULTS += ("way.json", "way.png")  # and recipes/go_back.py
CARD = "README.md"
CARD_MARKS = ("\n- kl_alliteration\n", "\n- generated_from_trainer\n")  # tags: of ours and of TRL's
CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")


def group_of(name: str) -> str:
    """The name without its seed, as words: `beta_0.1_seed_2` is of `beta 0.1`."""
    return re.sub(r"_seed_\d+$", "", name).replace("_", " ")


def as_json(value, **options) -> str:
    """JSON that every reader takes: what is no number, NaN or infinity, is `null`."""
    return json.dumps(without_nan(value), allow_nan=False, **options)


def without_nan(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    return [without_nan(each) for each in value] if isinstance(value, (list, tuple)) else value


def read_summary(folder: Path) -> dict | None:
    """`summary.json` of a finished run; `None` where there is none, or half of one."""
    try:
        return json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_metrics(folder: Path) -> list[dict]:
    """The lines of `metrics.jsonl` so far, without what is `null`; a last line that is being written is left out."""
    try:
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    except OSError:
        return []
    entries = []
    for line in filter(str.strip, lines):
        try:
            entries.append({name: value for name, value in json.loads(line).items() if value is not None})
        except (ValueError, AttributeError):
            break
    return entries


def place_of(entry: dict) -> tuple[str, int] | None:
    """How far its run was at an entry of the log: completions sampled, or pairs seen by DPO, or else steps."""
    return next(((name, entry[name]) for name in ("generations", "pairs", "step") if name in entry), None)


def read_stories(folder: Path, when: str, count: int) -> list[dict]:
    """The first lines of a run's `stories.jsonl` that are `"before"` or `"after"`, up to one that cannot be read."""
    found = []
    with suppress(OSError, ValueError), Path(folder, STORIES).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if isinstance(row, dict) and row.get("when") == when:
                found.append(row)
            if len(found) == count:
                break
    return found


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer writes `trainer_state.json` last."""
    try:
        json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoints(folder: Path) -> dict[int, Path]:
    """The trainer's checkpoints in a folder by step, complete or not: `checkpoint-20` and no `checkpoint-best`."""
    found = {path: CHECKPOINT.fullmatch(path.name) for path in Path(folder).glob("checkpoint-*") if path.is_dir()}
    return {int(match[1]): path for path, match in sorted(found.items()) if match}


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of a folder's last run, `None` where there is none.

    Those that an earlier run had left there are passed over, until the run has written one of the same step itself.
    """
    others = read_record(folder).get("others", {})
    complete = [
        step
        for step, path in checkpoints(folder).items()
        if is_complete(path) and others.get(path.name) != mark_of(path / "trainer_state.json")
    ]
    return str(checkpoints(folder)[max(complete)]) if complete else None


def read_record(folder: Path) -> dict:
    """`files` that runs made here, `others`' checkpoints; each by its name, with [`mark_of`] it."""
    try:
        record = json.loads(Path(folder, RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, **changes) -> None:
    path = Path(folder, RECORD)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(read_record(folder) | changes, indent=1) + "\n", encoding="utf-8")


def what_is_sampled(args, model_name_or_path: str) -> dict:
    """By which model, to which prompts, and for which rewards; a local file of prompts with its size and time."""
    names = ["adapter_name_or_path", "reward_funcs", "reward_model_name_or_path", "prompt"]
    names += ["dataset_name", "dataset_config", "dataset_train_split"]
    facts = {"model": model_name_or_path} | {name: getattr(args, name, None) for name in names}
    return facts | {"dataset_mark": mark_of(Path(args.dataset_name)) if args.dataset_name else None}


def what_was_sampled(facts: dict) -> dict:
    """What a `frontier.json` of `recipes/best_of_n.py` is of: model, reward, prompts, sampling.

    A model is known by its name alone: a Hub id and a folder of it agree.
    """
    sampled = {"dataset_name": None} | facts["sampled"] | {"model": facts["model"].casefold()}
    names = ("model", "reward_func", "prompt", "dataset_name", "temperature", "max_new_tokens")
    return {name: sampled[name] for name in names}


def check_yardstick(facts: dict, folders: list[str | Path]) -> None:
    """`ValueError` where a `frontier.json` is of another model, reward or sampling than one of the runs.

    Their data sets may differ: a run trains on some prompts and is judged on others. Of a run that has not said what
    it samples, one of an earlier version, nothing is known.
    """
    sampled = what_was_sampled(facts)
    for folder in folders:
        ours = read_record(folder).get("sampled", {})
        if ours.get("beside"):
            raise ValueError(f"it is of plain samples of the base, and {Path(folder).name} has {ours['beside']}")
        for name in ours.keys() & sampled.keys() - {"dataset_name"}:
            if ours[name] != sampled[name]:
                raise ValueError(
                    f"the yardstick's {name} is {sampled[name]!r}, and {Path(folder).name} has {ours[name]!r}"
                )


def read_yardsticks(path: str | Path | None, folders: list[str | Path]) -> tuple[list[dict], list[dict]]:
    """Best-of-n and the least KL of `frontier.json`, as points of reward over KL; nothing without a path.

    Raises:
        `ValueError`: where it cannot be read, or is not of what the runs in these folders are of.
    """
    if path is None:
        return [], []
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        check_yardstick(facts, folders)
        return facts["frontier"], facts.get("least_kl", [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"frontier: {path} does not serve: {error}") from None


def made_of(folder: Path, name: str, facts: dict) -> bool:
    """Whether what a run last wrote under this name was made of the same `facts`.

    Of an earlier version's file that is not known: where the folder has a checkpoint, it is taken for the run's own.
    """
    kept = read_record(folder).get("made_of", {}).get(name)
    return last_checkpoint(folder) is not None if kept is None else kept == plain(facts)


def plain(facts: dict) -> dict:
    """As JSON has it, to be compared with what was read."""
    return json.loads(json.dumps(facts, default=str))


def note_what_of(folder: Path, name: str, facts: dict) -> None:
    """Note what a file is made of, for [`made_of`]."""
    write_record(folder, made_of=read_record(folder).get("made_of", {}) | {name: plain(facts)})


def mark_of(path: Path) -> list[int] | None:
    """What a file is known by while nobody else writes it: its size and when it was written."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def model_files(folder: Path, adapter: bool | None = None) -> list[str]:
    """The names of files in a folder that make a model: of an adapter, of a whole model, or (`None`) of either."""
    kinds = {True: ("adapter_*",), False: ("config.json", "model*.safetensors*", "pytorch_model*.bin*"), None: ()}
    patterns = kinds[adapter] or kinds[True] + kinds[False]
    return sorted(path.name for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file())


def check_folder(folder: Path, adapter: bool) -> None:
    """`ValueError` for files that would be loaded together with what a run is going to save here, and are nobody's.

    Those that a run made are removed when the next one has saved its own.
    """
    others = [name for name in model_files(folder, adapter=not adapter) if not is_ours(folder, name)]
    if others:
        kinds = ("a whole model", "an adapter") if adapter else ("an adapter", "a whole model")
        raise ValueError(
            f"output_dir: {str(folder)!r} holds {', '.join(others)} of {kinds[0]} that no run here made, and with "
            f"{kinds[1]} beside it the one would be loaded for the other: move it, or name another folder"
        )


def begin_record(folder: Path, anew: bool, **facts) -> None:
    """A run begins here, from a checkpoint or anew, with these `facts`: what another left at its end is not of it."""
    for name in (*RESULTS, *(["health.json"] if anew else [])) if read_record(folder) else ():  # a run was here
        Path(folder, name).unlink(missing_ok=True)
    there = {path.name: mark_of(path / "trainer_state.json") for path in checkpoints(folder).values()}
    if anew and (there or read_record(folder)):  # whose checkpoints are not its own
        write_record(folder, others={name: mark for name, mark in there.items() if mark})
    if facts:
        write_record(folder, **facts)


def remember(folder: Path, *names: str) -> None:
    """Note that a run has just made these files."""
    files = read_record(folder).get("files", {})
    write_record(folder, files=files | {name: mark_of(Path(folder, name)) for name in names})


def is_ours(folder: Path, name: str) -> bool:
    """Whether a run made this file, and nobody has written it since."""
    mark = mark_of(Path(folder, name))
    return mark is not None and read_record(folder).get("files", {}).get(name) == mark


def is_theirs(path: Path) -> bool:
    """Whether a `README.md`, of which PEFT writes one with every adapter, is there already and the user's own."""
    if path.name != CARD or not path.exists() or is_ours(path.parent, path.name):
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return not any(mark in text for mark in CARD_MARKS)


def remove_ours(folder: Path, *names: str) -> None:
    """Remove those of these files that a run made."""
    for name in names:
        if is_ours(folder, name):
            Path(folder, name).unlink()
