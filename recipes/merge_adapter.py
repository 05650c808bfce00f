"""Merge an adapter into its base: a whole model that needs no PEFT.

    python recipes/merge_adapter.py --adapter_name_or_path runs/tall_tree --output_dir runs/merged

It saves nothing unless the merged model's log-probabilities equal the adapter's.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from kl_alliteration.adapters import is_adapter, load_adapter, merge, tokenizer_of
from kl_alliteration.lab.checks import check_model_path
from kl_alliteration.lab.survival import one_line_errors


@dataclass
class Arguments:
    adapter_name_or_path: str = field(metadata={"help": "The adapter, folder or Hub id."})
    output_dir: str = field(metadata={"help": "Where the whole model goes."})
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Its base, where it is not the one that it names."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Precision of the base while merging, such as float32; `auto` is its own."}
    )


@one_line_errors
def main():
    (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    check_model_path("adapter_name_or_path", args.adapter_name_or_path)
    if not is_adapter(args.adapter_name_or_path):
        raise ValueError(f"adapter_name_or_path: {args.adapter_name_or_path!r} holds no adapter")
    if Path(args.output_dir).exists() and any(Path(args.output_dir).iterdir()):
        raise ValueError(f"output_dir: {args.output_dir!r} is not empty")
    model = load_adapter(args.adapter_name_or_path, args.base_model_name_or_path, dtype=args.dtype)
    tokenizer = tokenizer_of(args.adapter_name_or_path, model)
    merge(model).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"Merged; log-probabilities agree: {args.output_dir}")


if __name__ == "__main__":
    main()
