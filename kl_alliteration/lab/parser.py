"""A recipe's command line and YAML: conversions, defaults, one-line errors, and the file that repeats a run."""

import argparse
import copy
import difflib
import os
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from peft import PeftConfig
from transformers.integrations import is_tensorboard_available
from transformers.utils import is_torch_bf16_gpu_available
from trl import TrlParser

from .. import kl
from ..adapters import base_of
from ..story_lm import MODEL_PATH
from .options import PenaltyArguments, check_model_path


class RecipeParser(TrlParser):
    """`TrlParser` with one-line errors, no abbreviated options, and the recipe's own YAML as its defaults."""

    def __init__(self, dataclass_types, defaults: Path, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.defaults, self.started = defaults, time.time()
        for action in self._actions:
            if action.dest in ("kl_budget_per_token", "target_kl_per_token"):
                action.type = float_or_none
        # All linear layers but the head, by PEFT's own finding; dropout would act in sampling and in every score.
        self.set_defaults(lora_target_modules=["all-linear"], lora_dropout=0.0)

    def parse(self, args: list[str] | None = None):
        args = list(sys.argv[1:] if args is None else args)
        for i, arg in enumerate(args):
            if arg.startswith("--config="):
                args[i : i + 1] = ["--config", arg.removeprefix("--config=")]
        if "--config" not in args:
            args = ["--config", str(self.defaults), *args]
        elif args[-1] == "--config":
            raise ValueError("--config needs the path of a YAML file")
        # bf16 where the GPU has it, else float32; RLOOConfig alone says bf16 everywhere and then refuses on a CPU. And
        # it has to be told that there is no GPU, or each of several processes trains alone.
        asked_for = "--use_cpu" in args or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
        on_cpu = asked_for or not torch.accelerator.is_available()
        self.set_defaults(bf16=not on_cpu and "--fp16" not in args and is_torch_bf16_gpu_available())
        self.set_defaults(use_cpu=on_cpu)
        stock = {a.dest: a.default for a in reversed(self._actions)}  # the first one's counts; --no_x comes later
        try:
            *parsed, unknown = self.parse_args_and_config(args, return_remaining_strings=True)
        except (ValueError, OSError):
            raise
        except yaml.YAMLError as error:
            raise ValueError(f"--config: not a YAML file: {error}") from None
        except Exception as error:  # of the dataclasses, which expect sensible values
            raise ValueError(f"the options do not work together: {type(error).__name__}: {error}") from None
        for option in unknown:
            name = option.split("=")[0]
            if name.startswith("-"):
                known = [o for action in self._actions for o in action.option_strings]
                close = difflib.get_close_matches(name, known, n=1)
                remedy = f"did you mean {close[0]}?" if close else "see --help for all options"
                raise ValueError(f"unknown option {name}; {remedy}")
        if unknown:
            raise ValueError(f"unexpected argument {unknown[0]!r}; options start with --")
        # Before the dataclasses derive more from them: what is given, in a file or on the command line.
        self.given = {k: v for k, v in vars(self.namespace).items() if v != stock[k]}
        return parsed

    def set_defaults_with_config(self, **config):
        """What a YAML file says goes through the same conversions as the command line's words."""
        actions = {action.dest: action for action in reversed(self._actions)}
        known = {name: from_yaml(actions[name], value) for name, value in config.items() if name in actions}
        return super().set_defaults_with_config(**config | known)

    def parse_known_args(self, args=None, namespace=None):
        self.namespace, rest = super().parse_known_args(args, namespace)
        return copy.copy(self.namespace), rest

    def error(self, message):
        raise ValueError(message)


def from_yaml(action, value):
    """A YAML value as the option's type; `ValueError` where it is none."""
    name = action.dest
    if value is None:
        if action.default is not None:
            raise ValueError(f"{name}: has no value in the YAML file")
        return None
    if isinstance(value, dict):
        if name.endswith(("_kwargs", "_config")) or name == "deepspeed":
            return value
        raise ValueError(f"{name}: takes no mapping, got {value}")
    if isinstance(value, list) and action.nargs is None and name != "report_to":
        raise ValueError(f"{name}: takes one value, got {value}")
    values = []
    for each in value if isinstance(value, list) else [value]:
        try:
            values.append(action.type(str(each)) if action.type else str(each))
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            raise ValueError(f"{name}: invalid value {each!r} in the YAML file") from None
        if action.choices is not None and values[-1] not in action.choices:
            raise ValueError(f"{name}: {each!r} is none of {', '.join(map(str, action.choices))}")
    return values if isinstance(value, list) else values[0]


def float_or_none(value: str) -> float | None:
    """So that the command line can take away what a YAML file gives."""
    try:
        return None if value.lower() == "none" else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or none, got {value!r}") from None


def parse_recipe(parser: RecipeParser, argv: list[str] | None = None):
    """A recipe's arguments, its trainer's and the model's, with the embedded model and this device's precision."""
    args, training_args, model_args = parser.parse(argv)
    adapter = args.adapter_name_or_path
    if adapter:
        check_model_path("adapter_name_or_path", adapter)
    if not model_args.model_name_or_path:
        model_args.model_name_or_path = base_of(PeftConfig.from_pretrained(adapter)) if adapter else str(MODEL_PATH)
    if isinstance(args, PenaltyArguments) and args.beta_unit == "study":
        training_args.beta = kl.study_beta(training_args.beta)
    if "tensorboard" in training_args.report_to and not is_tensorboard_available():
        training_args.report_to.remove("tensorboard")
        print("TensorBoard is not installed, so it gets no logs: pip install 'kl_alliteration[tensorboard]'")
    return args, training_args, model_args


def write_recipe(path: Path, parser: RecipeParser) -> None:
    """The options that were given as a YAML for `--config`, under the command that was run."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    for i, word in enumerate(words):
        if word.startswith("--hub_token="):
            words[i] = "--hub_token=***"
        elif word == "--hub_token":
            words[i + 1] = "***"
    options = {name: value for name, value in parser.given.items() if name != "hub_token"}
    text = f"# accelerate launch recipes/{shlex.join(words)}\n# kl_alliteration {version('kl_alliteration')}, "
    text += f"trl {version('trl')}, transformers {version('transformers')}, torch {version('torch')}\n"
    path.write_text(text + yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
