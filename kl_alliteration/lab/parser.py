"""A recipe's command line and YAML: conversions, defaults, one-line errors, and the file that repeats a run."""

import argparse
import copy
import difflib
import os
import shlex
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from peft import PeftConfig
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.integrations import is_tensorboard_available
from transformers.utils import is_torch_bf16_gpu_available
from trl import TrlParser

from .. import kl
from ..adapters import base_of
from ..credit import TAKES
from ..story_lm import MODEL_PATH
from . import secrets
from .checks import check_model_path
from .options import NEEDS, OnlineArguments

# transformers 5.23 gave these options new names, and TRL's default of an old one warns there. Either name works with
# either version: the one that this version lacks is read as the other.
OLD_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
HAS_NEW_NAMES = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
RENAMED = OLD_NAMES if HAS_NEW_NAMES else {new: old for old, new in OLD_NAMES.items()}

JUDGED_BY = ("max_completion_length", "temperature")  # by `judge_run`, which knows no trainer's defaults

# What a target on the command line sets or stands in place of, and what it is then: a file's do not count.
SET_BY_TARGET = {"kl_budget_per_token": None, "kl_within_budget": 0.0, "kl_opening_tokens": 0, "kl_opening_price": 0.0}
# And how its reward and KL are credited, where nothing wants one advantage of a text: the same objective, less noise.
BY_TOKEN = {"reward_discount": 1.0, "reward_opening_tokens": 0, "kl_to_go": True}


class RecipeParser(TrlParser):
    """`TrlParser` with one-line errors, no abbreviated options, and the recipe's own YAML as its defaults."""

    def __init__(self, dataclass_types, defaults: Path, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.defaults, self.started = defaults, time.time()
        self.words: list[str] = []  # of the command line
        self.spelled: dict = {}  # the YAML file's values as they are written
        self.scheduler: str | None = None  # and its lr_scheduler_type
        # All linear layers but the head, by PEFT's own finding; dropout would act in sampling and in every score.
        self.set_defaults(lora_target_modules=["all-linear"], lora_dropout=0.0)
        for action in self._actions:  # of argparse no pair, which transformers makes one word
            if action.dest == "reward_clip_range":
                action.nargs, action.type, action.metavar = 2, float, ("LOW", "HIGH")
        if HAS_NEW_NAMES:
            self.set_defaults(**{new: self.get_default(old) for old, new in RENAMED.items()})

    def canonical(self, words: list[str]) -> list[str]:
        """The command line with every option's name in one spelling, apart from its value."""
        known = {option for action in self._actions for option in action.option_strings} | {"--config"}
        found: list[str] = []
        for word, following in zip(words, [*words[1:], "--"], strict=False):
            name, equals, value = word.partition("=")
            spelled = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
            option = RENAMED.get(spelled.removeprefix("--").removeprefix("no_"))
            if spelled not in known:
                found.append(word)
            elif option is None:
                found += [spelled, *([value] if equals else [])]
            else:
                flag = "false" if spelled.startswith("--no_") else "true"
                found += [f"--{option}", *([value] if equals else [flag] if following.startswith("-") else [])]
        return found

    def parse(self, args: list[str] | None = None):
        args = self.words = self.canonical(list(sys.argv[1:] if args is None else args))
        if "--config" not in args:
            args = ["--config", str(self.defaults), *args]
        elif args[-1] == "--config":
            raise ValueError("--config needs the path of a YAML file")
        self.spelled = read_words(Path(args[args.index("--config") + 1]))
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
        asked = {word.removeprefix("--") for word in self.words}
        asked |= set(self.spelled) if "--config" in self.words else set()
        self.idle = {  # of what is typed or in a file that was named, with what it lacks
            name: needs
            for name, (needs, there) in NEEDS.items()
            if name in asked and getattr(self.namespace, name) != stock[name] and not there(self.namespace)
        }
        for name, needs in self.idle.items():
            switched_off = not needs.startswith("that no") and {*needs.replace(",", "").split()} & {*self.words}
            if f"--{name}" in self.words and not switched_off:
                raise ValueError(f"{name} needs {needs}: it does nothing here")
        # Before the dataclasses derive more from them: what is given, in a file or on the command line.
        given = {k: v for k, v in vars(self.namespace).items() if v != stock[k] or k in JUDGED_BY}
        self.given, self.hidden = secrets.without(given), secrets.values_of(given)
        for each in parsed:
            secrets.move_to_environment(vars(each))
        return parsed

    def set_defaults_with_config(self, **config):
        """What a YAML file says goes through the same conversions as the command line's words."""
        actions = {action.dest: action for action in reversed(self._actions)}
        config = {RENAMED.get(name, name): value for name, value in config.items()}
        for name, value in config.items():  # `off` and `12:30` are words where an option takes words
            if isinstance(value, bool | int | float | date) and name in actions:
                if actions[name].type is str or (isinstance(value, bool) and not takes_bool(actions[name])):
                    config[name] = self.spelled.get(name, value)
        self.scheduler = config.get("lr_scheduler_type")
        known = {name: from_yaml(actions[name], value) for name, value in config.items() if name in actions}
        return super().set_defaults_with_config(**config | known)

    def parse_known_args(self, args=None, namespace=None):
        self.namespace, rest = super().parse_known_args(args, namespace)
        if "--learning_rate" in self.words:  # what is typed goes before what a file has for adapters
            self.namespace.adapter_learning_rate = None
        target = getattr(self.namespace, "target_kl_per_sequence", None)
        if target is not None and not self.namespace.beta and not {"--beta", "beta"} & {*self.words, *self.spelled}:
            self.namespace.beta = 1.0  # which the target sets. GRPO's own is 0, and TRL then loads no reference
        if target is not None and "--target_kl_per_sequence" in self.words:
            if "--kl_within_budget" in self.words:
                raise ValueError("target_kl_per_sequence sets the price within the budget: leave kl_within_budget out")
            if not {"--kl_estimator", "--kl_placement"} & {*self.words}:
                sampled = self.namespace.kl_estimator in kl.SAMPLED
                if sampled and self.namespace.kl_placement != "reward":  # which keeps no budget: GRPO's own k3
                    self.namespace.kl_estimator, self.namespace.kl_placement = "exact", "both"
            of_texts = self.namespace.baseline == "none" or self.namespace.kl_placement == "loss"
            of_texts = of_texts or any(getattr(self.namespace, name, takes) != takes for name, takes in TAKES.items())
            for name, value in (SET_BY_TARGET | ({} if of_texts else BY_TOKEN)).items():
                if f"--{name}" not in self.words:
                    setattr(self.namespace, name, value)
        named = str(getattr(self.namespace.lr_scheduler_type, "value", self.namespace.lr_scheduler_type))
        typed = "--lr_scheduler_type" in self.words and "--lr_scheduler_kwargs" not in self.words
        if typed and named != self.scheduler:
            self.namespace.lr_scheduler_kwargs = None  # a file's are those of the file's scheduler
        return copy.copy(self.namespace), rest

    def error(self, message):
        raise ValueError(message)


def from_yaml(action, value):
    """A YAML value converted to the option's type; `ValueError` where that fails."""
    name = action.dest
    if value is None:
        if action.default is not None:
            raise ValueError(f"{name}: has no value in the YAML file")
        return None
    if isinstance(value, dict):
        if name.endswith(("_kwargs", "_config")) or name == "deepspeed":
            return value
        raise ValueError(f"{name}: takes no mapping, got {secrets.hide(str(value), name)}")
    if isinstance(value, list) and action.nargs is None and name != "report_to":
        raise ValueError(f"{name}: takes one value, got {secrets.hide(str(value), name)}")
    values = []
    for each in value if isinstance(value, list) else [value]:
        try:
            values.append(action.type(str(each)) if action.type else str(each))
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            raise ValueError(f"{name}: invalid value {each!r} in the YAML file") from None
        if action.choices is not None and values[-1] not in action.choices:
            raise ValueError(f"{name}: {each!r} is none of {', '.join(map(str, action.choices))}")
    return values if isinstance(value, list) else values[0]


AS_WRITTEN = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}


class WordsLoader(yaml.SafeLoader):
    """YAML 1.2's booleans, `true` and `false`: in 1.1 `no` and `off` are false. Numbers and dates as written."""

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in AS_WRITTEN and (tag != "tag:yaml.org,2002:bool" or first in "tTfF")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_words(path: Path) -> dict:
    """A YAML file with `no`, `off` and `12:30` as the words that they are; `{}` where it is none."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), WordsLoader)  # noqa: S506  (of the safe one's kind)
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # which the parser says by itself
    return found if isinstance(found, dict) else {}


def takes_bool(action) -> bool:
    return isinstance(action.default, bool) or action.type is string_to_bool or action.nargs == 0


def parse_recipe(parser: RecipeParser, argv: list[str] | None = None):
    """A recipe's arguments, its trainer's and the model's, with the embedded model and this device's precision."""
    args, training_args, model_args = parser.parse(argv)
    adapter = args.adapter_name_or_path
    if adapter:
        check_model_path("adapter_name_or_path", adapter)
    if not model_args.model_name_or_path:
        model_args.model_name_or_path = base_of(PeftConfig.from_pretrained(adapter)) if adapter else str(MODEL_PATH)
    if isinstance(args, OnlineArguments) and args.beta_unit == "study":
        training_args.beta = kl.study_beta(training_args.beta)
    if args.adapter_learning_rate is not None and (model_args.use_peft or adapter):
        training_args.learning_rate = args.adapter_learning_rate
        say(training_args, f"learning_rate {args.adapter_learning_rate:g}, an adapter's; --learning_rate sets another")
    for name, needs in parser.idle.items():  # a file may be for runs with and without it
        say(training_args, f"{name} needs {needs}: it does nothing here")
    if "tensorboard" in training_args.report_to and not is_tensorboard_available():
        training_args.report_to.remove("tensorboard")
        say(training_args, "TensorBoard is not installed and gets no logs: pip install 'kl_alliteration[tensorboard]'")
    return args, training_args, model_args


def say(training_args, words: str) -> None:
    """On the screen, once for all processes."""
    if training_args.process_index == 0:
        print(words)


def write_recipe(path: Path, parser: RecipeParser) -> None:
    """The options that were given as a YAML for `--config`, under the command that was run; no secret in either."""
    command = " ".join(as_typed(word) for word in (Path(sys.argv[0]).name, *parser.words))
    for secret in sorted(parser.hidden, key=len, reverse=True):
        command = command.replace(secret, "***")
    text = f"# accelerate launch recipes/{command}\n# kl_alliteration {version('kl_alliteration')}, "
    text += f"trl {version('trl')}, transformers {version('transformers')}, torch {version('torch')}\n"
    path.write_text(text + yaml.safe_dump(parser.given, sort_keys=False), encoding="utf-8")


def as_typed(word: str) -> str:
    """A word for a shell, in one line whatever is in it: a line feed is `$'\\n'`."""
    if word.isprintable():
        return shlex.quote(word)
    spelled = (
        c if c.isprintable() and c not in "\\'" else f"\\{c}" if c.isprintable() else f"\\U{ord(c):08x}" for c in word
    )
    return "$'" + "".join(spelled).replace("\\U0000000a", "\\n") + "'"
