"""A data set by name: a file, a folder or a Hub id. What is wrong with a file is said in one line, with the row."""

import glob
import json
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.utils import logging

MEGABYTE = 1 << 20
KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_dataset(args) -> Dataset:
    """The data set that the options `dataset_name`, `dataset_config` and `dataset_train_split` name.

    Raises:
        `ValueError`: for a file that is not there or is none of its kind, and for whatever `datasets` cannot load.
    """
    name, path = args.dataset_name, Path(args.dataset_name)
    kind = KINDS.get(path.suffix.lower())
    near = name.startswith((".", "/", "~")) or (path.parent != Path() and path.parent.is_dir())
    if not path.exists() and (kind or near):
        raise ValueError(f"dataset_name: there is no {'file' if kind else 'file or folder'} {name!r}")
    if path.is_file() and kind is None:
        raise ValueError(f"dataset_name: {name!r} must be one of {', '.join(KINDS)}, a folder or a Hub id")
    if path.is_file():
        if args.dataset_config:
            raise ValueError(f"dataset_config: {name!r} is a file, which has none")
        check_encoding(path)
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it would print what is said below
    try:
        if path.is_file():
            return load_dataset(kind, data_files=glob.escape(name), split=args.dataset_train_split)
        return load_dataset(name, name=args.dataset_config, split=args.dataset_train_split)
    except Exception as error:
        cause = error.__cause__ or error
        said = what_is_wrong(path) if kind == "json" else None
        raise ValueError(f"dataset_name: {name!r}: {said or f'{type(cause).__name__}: {cause}'}") from None
    finally:
        logging.set_verbosity(level)


def check_encoding(path: Path) -> None:
    """`ValueError` for a file without content, and for a text that is not UTF-8."""
    with path.open("rb") as file:
        start = file.read(MEGABYTE)
    if not start.strip():
        raise ValueError(f"dataset_name: {str(path)!r} is empty")
    if path.suffix.lower() == ".parquet":
        return
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in start[:200]:
        raise ValueError(f"dataset_name: {str(path)!r} is UTF-16, not UTF-8: save it as UTF-8")
    try:
        start.decode()
    except UnicodeDecodeError as error:
        if len(start) < MEGABYTE or error.start < MEGABYTE - 4:  # else its end cuts a character in two
            row = start[: error.start].count(b"\n") + 1
            byte = f"the byte {start[error.start]:#x} is not UTF-8"
            raise ValueError(f"dataset_name: {str(path)!r}, row {row}: {byte}: save it as UTF-8") from None


def what_is_wrong(path: Path) -> str | None:
    """The first line of a file of JSON lines that is none, or no row; `None` where each is one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        return None
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except ValueError as error:
            return f"no JSON ({error})"
        return None
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            return f"row {number} is no JSON ({error}): {line[:40]!r}"
        if not isinstance(row, dict):
            return f"row {number} is no object with a `prompt`: {line[:40]!r}"
    return None
