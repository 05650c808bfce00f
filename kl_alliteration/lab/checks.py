"""What of a recipe's options is refused before a model is loaded or anything is written, in one line each."""

import math
from importlib.util import find_spec
from pathlib import Path

from .. import kl
from ..adapters import check_targets
from ..credit import check_credit_by_token, check_reward_to_go
from .frontier import read_base_rewards
from .gguf import SMOLLM2_FOLDER, is_gguf
from .hub import check_hub
from .options import (
    CONTROLLERS,
    GUARDS,
    LATEST,
    REFERENCES,
    GRPOArguments,
    OnlineArguments,
    PairArguments,
    StoryArguments,
)
from .refusals import check_sampling, check_target, check_trainer_options


def check_options(args: StoryArguments, training_args, model_args) -> None:
    """Refuse everything that can be refused before a model is loaded or anything is written."""
    if not training_args.beta >= 0 or math.isinf(training_args.beta):
        raise ValueError(f"beta must be >= 0 and finite, got {training_args.beta}; 0 trains without a penalty")
    if not args.reward_timeout > 0:
        raise ValueError(f"reward_timeout must be > 0, got {args.reward_timeout}")
    if args.eval_stories < 1:
        raise ValueError(f"eval_stories must be >= 1, got {args.eval_stories}")
    check_model_path("model_name_or_path", model_args.model_name_or_path)
    read_base_rewards(args, args if isinstance(args, PairArguments) else training_args, model_args.model_name_or_path)
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint not in (None, LATEST) and not Path(checkpoint).is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {checkpoint!r}; `latest` takes the newest one")
    if isinstance(args, OnlineArguments):
        check_penalty_options(args, training_args)
        check_online_options(args, training_args)
        check_adapter_options(args, training_args, model_args)
    elif model_args.use_peft:
        check_targets(model_args.lora_target_modules)
    if isinstance(args, PairArguments):
        check_pair_options(args)
    adapter = bool(model_args.use_peft or args.adapter_name_or_path)
    starts_from = [model_args.model_name_or_path, *filter(None, [args.adapter_name_or_path])]
    check_trainer_options(training_args, starts_from, adapter)
    if training_args.push_to_hub:
        check_hub(training_args)


def check_penalty_options(args: OnlineArguments, training_args) -> None:
    if args.target_kl_per_sequence is not None:
        check_target(args, training_args)
    if args.strict and args.penalty.complaint:
        raise ValueError(args.penalty.complaint)
    corrected = args.sampler_correction != "none" or args.sampler_divergence_type is not None
    if corrected and isinstance(args, GRPOArguments):
        raise ValueError("sampler_correction is RLOO's: GRPO has its own, --vllm_importance_sampling_mode")
    if args.score_as_sampled and isinstance(args, GRPOArguments):
        raise ValueError("score_as_sampled is RLOO's: sample GRPO's completions without truncation")
    if args.baseline == "none" and isinstance(args, GRPOArguments):
        raise ValueError("baseline 'none' is RLOO's: GRPO's is the mean of its group")
    if args.baseline == "none" and training_args.normalize_advantages:
        raise ValueError("baseline 'none' has no advantages to normalize: leave normalize_advantages out")
    if args.reward_discount is not None:
        check_reward_to_go(training_args, args.reward_discount, args.reward_prefix_tokens, args.reward_opening_tokens)
    if args.kl_to_go:
        check_credit_by_token(training_args, "kl_to_go")
        if not args.penalty.in_reward:
            raise ValueError(
                f"kl_to_go is for a penalty in the reward, and kl_placement is {args.penalty.placement!r}: take "
                "'both', or leave kl_to_go out"
            )
    if getattr(training_args, "normalize_advantages", False) and args.penalty.placement == "both":
        raise ValueError(
            "normalize_advantages divides the half of a penalty that is in the reward by the batch's spread, and not "
            "the half in the loss: leave it out, or take --kl_placement reward"
        )
    if args.baseline == "none" and (args.kl_to_go or args.reward_discount is not None):
        raise ValueError(
            "baseline 'none' goes with --reward_discount none and --kl_to_go false: by token, texts are compared "
            "within a group"
        )


def check_online_options(args: OnlineArguments, training_args) -> None:
    kl.check_choice("kl_controller", args.kl_controller, CONTROLLERS)
    kl.check_choice("collapse_guard", args.collapse_guard, GUARDS)
    if args.kl_controller != "fixed" and not (args.target_kl_per_token or 0) > 0:
        raise ValueError(
            f"target_kl_per_token must be > 0 with kl_controller {args.kl_controller!r}, "
            f"got {args.target_kl_per_token}"
        )
    if args.kl_controller == "fixed" and args.target_kl_per_token is not None:
        raise ValueError(
            "target_kl_per_token is what a kl_controller holds: name one, pi for instance, or state the nats of a "
            "sequence, --target_kl_per_sequence"
        )
    if args.kl_controller != "fixed" and training_args.beta == 0:
        raise ValueError(
            f"beta must not be 0 with kl_controller {args.kl_controller!r}: no rule leaves 0; start from 0.01"
        )
    if args.collapse_guard == "rollback" and training_args.save_strategy == "no":
        raise ValueError("collapse_guard 'rollback' needs checkpoints: add --save_strategy steps --save_steps 20")
    if args.kl_limit is not None and not args.kl_limit > 0:
        raise ValueError(f"kl_limit must be > 0, got {args.kl_limit}")
    if args.plot_price is not None and not 0 < args.plot_price < math.inf:
        raise ValueError(f"plot_price must be > 0 and finite, got {args.plot_price}")
    if (args.plots or args.plot_price) and find_spec("sklearn") is None:
        raise ValueError("plots needs scikit-learn: pip install 'kl_alliteration[lab]'")
    if args.base_samples < 100:
        raise ValueError(f"base_samples must be >= 100, got {args.base_samples}")
    if args.show_stories_every < 0:
        raise ValueError(f"show_stories_every must be >= 0, got {args.show_stories_every}; 0 shows none")
    if args.reward_model_name_or_path:
        check_model_path("reward_model_name_or_path", args.reward_model_name_or_path)
    rewards = len(args.reward_funcs) + bool(args.reward_model_name_or_path)
    if training_args.reward_weights is not None and len(training_args.reward_weights) != rewards:
        raise ValueError(f"reward_weights must be {rewards}, one a reward, got {len(training_args.reward_weights)}")


def check_pair_options(args: PairArguments) -> None:
    if args.pairs < 1:
        raise ValueError(f"pairs must be >= 1, got {args.pairs}")
    if args.group_size < 2:
        raise ValueError(f"group_size must be >= 2, got {args.group_size}: a rank needs two completions")
    if not 1 <= args.pairs_per_group <= args.group_size // 2:
        raise ValueError(f"pairs_per_group must be from 1 to half of group_size, got {args.pairs_per_group}")
    check_sampling(args)
    if args.eval_dataset_name is not None:
        raise ValueError("eval_dataset_name: DPO is judged on the prompts of its pairs: leave it out")
    if args.pairs_from is not None and not Path(args.pairs_from).is_file():
        raise ValueError(f"pairs_from: there is no file {args.pairs_from!r}")


def check_adapter_options(args: OnlineArguments, training_args, model_args) -> None:
    named = args.kl_reference not in REFERENCES  # another model
    if named and "/" not in args.kl_reference and not Path(args.kl_reference).exists():
        raise ValueError(
            f"kl_reference must be one of {', '.join(REFERENCES)}, or a model: a folder, a .gguf file or a Hub id, "
            f"user/model; got {args.kl_reference!r}"
        )
    if named:
        check_model_path("kl_reference", args.kl_reference)
    if named and training_args.beta == 0:
        raise ValueError("beta must not be 0 with a kl_reference that is a model: nothing would be measured from it")
    if args.kl_reference_on_cpu and not named and args.kl_reference != "loaded":
        raise ValueError("kl_reference_on_cpu needs a second model as kl_reference: `loaded`, a folder or a Hub id")
    adapted = model_args.use_peft or args.adapter_name_or_path
    if model_args.use_peft:
        check_targets(model_args.lora_target_modules)
    if args.kl_reference != "start" and not named and not adapted:
        raise ValueError(f"kl_reference {args.kl_reference!r} needs an adapter: --use_peft or --adapter_name_or_path")
    if args.kl_reference == "base" and model_args.use_peft and args.adapter_name_or_path:
        raise ValueError("kl_reference 'base': under a stack the base is gone, the first adapter is merged into it")
    if (args.reset_at_kl is not None or args.reset_optimizer) and args.kl_reference != "reset":
        raise ValueError("reset_at_kl and reset_optimizer need --kl_reference reset")
    if args.reset_at_kl is not None and not args.reset_at_kl > 0:
        raise ValueError(f"reset_at_kl must be > 0, got {args.reset_at_kl}")
    if args.kl_reference == "moving_average" and not 0 < training_args.ref_model_mixup_alpha <= 1:
        raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {training_args.ref_model_mixup_alpha}")
    if args.kl_reference in ("moving_average", "reset") and training_args.ref_model_sync_steps < 1:
        raise ValueError(f"ref_model_sync_steps must be >= 1, got {training_args.ref_model_sync_steps}")
    if training_args.sync_ref_model and named:
        raise ValueError("sync_ref_model moves the reference to the policy: it goes with no kl_reference of its own")
    if training_args.sync_ref_model and adapted:
        raise ValueError("sync_ref_model is for whole models; with an adapter it is --kl_reference moving_average")


def check_model_path(name: str, path: str) -> None:
    """`ValueError` for what looks like a folder and is none; anything else may be a Hub id.

    It looks like one too where its parent is a folder here: `runs/tall_tre` beside `runs/tall_tree`.
    """
    if path == SMOLLM2_FOLDER and not Path(path).is_dir():  # it would be asked for at the Hub
        raise ValueError(f"{name}: there is no folder {path!r} yet; `make smollm2` makes it")
    near = Path(path).parent != Path() and Path(path).parent.is_dir()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or near
    if looks_local and not Path(path).is_dir() and not is_gguf(path):
        raise ValueError(f"{name}: there is no folder {path!r}; name a folder, a .gguf file or a Hub id: user/model")
