"""What of the trainer's own options, and of its folder, is refused before a model is loaded; in one line each."""

import json
import math
from pathlib import Path

import torch
from transformers import get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .runs import check_folder, checkpoints


def check_trainer_options(training_args, starts_from: list[str], adapter: bool) -> None:
    """Everything below, and that what is trained is not saved over the model, or the adapter, that it starts from."""
    check_sampling(training_args)
    check_scheduler(training_args)
    check_reports(training_args)
    check_vllm(training_args, starts_from[0])
    folder = Path(training_args.output_dir)
    for path in map(Path, starts_from):
        path = path.with_suffix("") if path.suffix.lower() == ".gguf" else path  # which is converted into that folder
        if folder.resolve() == path.resolve():
            raise ValueError(f"output_dir: {str(folder)!r} is the model that the run starts from: name another folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: {str(folder)!r} is a file: name a folder")
    check_folder(folder, adapter)
    check_rotation(folder, training_args)


def check_sampling(args) -> None:
    """What a trainer hands to `generate`; options that it does not have are passed over."""
    wanted = {
        "temperature": (lambda x: x > 0, "> 0"),
        "top_k": (lambda x: x >= 0, ">= 0; 0 takes all tokens"),
        "top_p": (lambda x: 0 < x <= 1, "in (0, 1]; 1 takes all tokens"),
        "min_p": (lambda x: 0 <= x <= 1, "in [0, 1]; leave it out to take all tokens"),
        "repetition_penalty": (lambda x: x > 0, "> 0; 1 is none"),
        "max_completion_length": (lambda x: x >= 1, ">= 1"),
    }
    for name, (is_right, words) in wanted.items():
        value = getattr(args, name, None)
        if value == math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
        if value is not None and not is_right(value):
            raise ValueError(f"{name} must be {words}, got {value}")


def check_scheduler(args) -> None:
    """Make the scheduler once, for a parameter of its own: it says itself what it does not take, or lacks."""
    kwargs = args.lr_scheduler_kwargs or {}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else 100
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, dict(kwargs))
    except Exception as error:
        said = str(error).replace("get_", "").replace("()", "")
        raise ValueError(
            f"lr_scheduler_kwargs: {kwargs or 'none'} with lr_scheduler_type {str(args.lr_scheduler_type.value)!r}: "
            f"{type(error).__name__}: {said}"
        ) from None


def check_reports(args) -> None:
    """`ValueError` for a place of logs that is not installed here, or that transformers does not know."""
    for name in args.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: {name!r} is none of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, none")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: {name} is not installed: pip install {name}, or --report_to none")


def check_vllm(args, model_path: str) -> None:
    """`ValueError` for a model that vLLM's `qwen2.py` (0.31) ends on, long after it has started."""
    file = Path(model_path, "config.json")
    if not getattr(args, "use_vllm", False) or not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    mixed = len(set(config.get("layer_types") or ())) > 1
    mixed = mixed and config.get("max_window_layers") != config["num_hidden_layers"]
    if config.get("model_type") == "qwen2" and mixed:
        raise ValueError(
            f"use_vllm: vLLM does not load {str(model_path)!r}, a Qwen2 with a sliding window in some of its layers: "
            "leave use_vllm out, or name another model_name_or_path"
        )


def check_rotation(folder: Path, args) -> None:
    """`ValueError` where `save_total_limit` would delete what this run has not made."""
    if not args.save_total_limit or args.save_strategy == "no":
        return
    own = {path.name for path in checkpoints(folder).values()}
    foreign = sorted(path.name for path in folder.glob("checkpoint-[0-9]*") if path.is_dir() and path.name not in own)
    if args.resume_from_checkpoint is None:
        foreign += sorted(own)
    if foreign:
        raise ValueError(
            f"output_dir: {str(folder)!r} holds {', '.join(foreign)}, which save_total_limit would count and delete: "
            "move it, name another folder, or go on from it with --resume_from_checkpoint latest"
        )


def check_target(args, training_args) -> None:
    if not 0 < args.target_kl_per_sequence < math.inf:
        raise ValueError(f"target_kl_per_sequence must be > 0 and finite, got {args.target_kl_per_sequence}")
    if training_args.beta == 0:
        raise ValueError("beta must not be 0 with target_kl_per_sequence, which sets it: leave it out")
    if args.kl_controller != "fixed":
        raise ValueError(f"target_kl_per_sequence and kl_controller {args.kl_controller!r} both move beta: take one")
    if args.penalty.budget_per_token is not None:
        raise ValueError("target_kl_per_sequence sets the budget: leave kl_budget_per_token out, or make it `none`")
    for name, takes in {"reduction": "sum", "direction": "reverse"}.items():
        if (value := getattr(args.penalty, name)) != takes:
            raise ValueError(f"target_kl_per_sequence needs kl_{name} {takes!r}, got {value!r}")
    if args.penalty.in_loss and not args.penalty.full_vocabulary:
        raise ValueError(
            f"target_kl_per_sequence has a budget, which in the loss no sampled estimate can keep: with kl_placement "
            f"{args.penalty.placement!r} take kl_estimator 'exact', got {args.penalty.estimator!r}"
        )
    if not args.penalty.in_reward and getattr(training_args, "scale_rewards", "none") != "none":
        raise ValueError(
            "target_kl_per_sequence has its price beside rewards, and in GRPO's loss a nat stands beside rewards over "
            "their spread: take kl_placement 'both', or scale_rewards 'none'"
        )
    if training_args.sync_ref_model:
        raise ValueError("target_kl_per_sequence needs a reference that stays: leave sync_ref_model out")
    if args.kl_reference not in ("start", "base", "loaded"):
        raise ValueError(
            f"target_kl_per_sequence needs a reference that the run begins at, got kl_reference {args.kl_reference!r}"
        )
    if args.adapter_name_or_path and args.kl_reference != "start":
        raise ValueError("target_kl_per_sequence begins at the reference: an adapter goes on with kl_reference start")
