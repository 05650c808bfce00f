"""The options of the recipes, each checked before a model is loaded."""

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from trl import ScriptArguments

from .. import control, kl
from ..adapters import check_targets
from ..guard import CollapseGuardCallback
from ..penalty import KLPenalty
from ..story_lm import PROMPT
from .frontier import read_base_rewards
from .gguf import SMOLLM2_FOLDER, is_gguf
from .hub import check_hub
from .refusals import check_sampling, check_target, check_trainer_options

ALLITERATION = "kl_alliteration.rewards.alliteration_reward"
BETA_UNITS = ("sequence", "study")
CONTROLLERS = {
    "fixed": None,
    "step": control.StepRule,
    "ppo": control.ppo_rule,
    "ziegler": control.ProportionalRule,
    "pi": control.LogPIRule,
}
BASELINES = ("leave_one_out", "none")
GUARDS = ("off", *CollapseGuardCallback.ACTIONS)
LATEST = "latest"  # of --resume_from_checkpoint
REFERENCES = ("start", "base", "loaded", "moving_average", "reset")


@dataclass
class StoryArguments(ScriptArguments):
    """Options of every recipe that trains: prompts, rewards, judging. `dataset_name` and its companions are TRL's."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: a Hub id, a folder or a .json/.jsonl file with a `prompt` column, plain or "
            "conversational. Default: the one prompt of --prompt."
        },
    )
    prompt: str = field(default=PROMPT, metadata={"help": "The prompt when no dataset is named."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, where it is not the model's own."}
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards by dotted import path, summed (online, weighted by --reward_weights). Default: "
            f"{ALLITERATION}, where no reward model is named."
        },
    )
    reward_timeout: float = field(
        default=1800.0, metadata={"help": "Seconds after which a reward function has hung, and the run stops."}
    )
    eval_stories: int = field(default=100, metadata={"help": "Fresh stories that are judged before and after."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts that are judged and not trained on. Default: those of the training."}
    )
    base_frontier: str | None = field(
        default=None,
        metadata={
            "help": "frontier.json of recipes/best_of_n.py, sampled as this run samples: the run's efficiency is read "
            "from its rewards. The embedded model brings its own."
        },
    )
    adapter_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate where an adapter trains, which wants some seven times that of full fine-tuning. "
            "--learning_rate on the command line goes before it."
        },
    )

    reward_model_name_or_path = adapter_name_or_path = (
        None  # options below, where the trainer does something with them
    )

    def __post_init__(self):
        if isinstance(self.reward_funcs, str):  # one path in a YAML file
            self.reward_funcs = [self.reward_funcs]
        if not self.reward_funcs and not self.reward_model_name_or_path:
            self.reward_funcs = [ALLITERATION]


@dataclass
class OnlineArguments(StoryArguments):
    """More options for a trainer that samples, RLOO or GRPO: monitor, rule for beta, reference, guard."""

    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A reward model, a Hub id or a folder with its tokenizer; the first of the rewards."},
    )
    kl_controller: str = field(
        default="fixed",
        metadata={"help": f"Rule that moves beta: {', '.join(CONTROLLERS)}; all but `fixed` need a target."},
    )
    target_kl_per_token: float | None = field(
        default=None, metadata={"help": "What the rule holds, in nats per token as TRL's `kl` is."}
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "An adapter, folder or Hub id, to go on training; with --use_peft a new one is stacked on it."
        },
    )
    kl_reference: str = field(
        default="start",
        metadata={
            "help": "What the KL of an adapter is measured from: `start`, the model one starts from; `base`, adapter "
            "off; `loaded`, the base as a second model, for adapters such as PiSSA whose off is not the base; "
            "`moving_average` (--ref_model_mixup_alpha, --ref_model_sync_steps); `reset` to the policy every "
            "--ref_model_sync_steps, or beyond --reset_at_kl."
        },
    )
    reset_at_kl: float | None = field(
        default=None, metadata={"help": "KL per sequence, in nats, beyond which kl_reference `reset` resets."}
    )
    reset_optimizer: bool = field(
        default=False, metadata={"help": "At a reset of the reference forget the optimizer's moments too."}
    )
    kl_limit: float | None = field(
        default=None, metadata={"help": "KL per sequence, in nats, at which the run stops with an error."}
    )
    collapse_guard: str = field(
        default="warn",
        metadata={
            "help": "When texts become alike: `off`, `warn`, `stop`, or `rollback` to the last good checkpoint."
        },
    )
    plots: bool = field(
        default=False,
        metadata={
            "help": "Log how many plots are told and what of the KL they cost: the embedded model's skeletons, else "
            "clusters of --base_samples."
        },
    )
    plot_price: float | None = field(
        default=None, metadata={"help": "Reward per nat of the KL of plots, charged beside the penalty; logs --plots."}
    )
    base_samples: int = field(
        default=2000, metadata={"help": "Completions of the base that a target's price and plots rest on."}
    )
    kl_monitor: bool = field(default=True, metadata={"help": "Log KL per token and per sequence under `kl/`."})
    fast_sampling: bool = field(
        default=True, metadata={"help": "Sample with kl_alliteration's own decoder where it knows the model."}
    )
    share_prompts: bool = field(
        default=True, metadata={"help": "Compute a group's prompt once, and the LM head for what is counted only."}
    )
    show_stories_every: int = field(default=30, metadata={"help": "Steps between tables of stories; 0 shows none."})


@dataclass
class PenaltyArguments(OnlineArguments):
    """More options for RLOO: the choice of the penalty."""

    kl_estimator: str = field(default="k1", metadata={"help": f"KL estimator: {', '.join(kl.estimators())}."})
    kl_placement: str = field(
        default="reward",
        metadata={"help": "`reward`: subtracted from the reward, as in TRL; `loss`: differentiable; or `both`."},
    )
    kl_reduction: str = field(
        default="sum",
        metadata={"help": "`sum`: beta is a price per nat of the sequence, as in TRL; `mean`: per nat of a token."},
    )
    kl_direction: str = field(
        default="reverse",
        metadata={"help": "`reverse`, KL(policy || reference); with kl_estimator `exact` also `forward`."},
    )
    kl_budget_per_token: float | None = field(
        default=None,
        metadata={
            "help": "Nats per token without a penalty; only the KL beyond that is penalised. `none` is no budget."
        },
    )
    kl_within_budget: float = field(
        default=0.0,
        metadata={"help": "What a nat within the budget costs, as a share of beta: 0 is free, 1 is no budget."},
    )
    target_kl_per_sequence: float | None = field(
        default=None,
        metadata={
            "help": "The KL to hold, in nats per sequence: beta, budget and the price within it are then read off the "
            "base's own rewards, those of --base_frontier or of --base_samples. `none` is no target."
        },
    )
    kl_top_k: int = field(default=64, metadata={"help": "Tokens that kl_estimator `top_k` takes in full."})
    beta_unit: str = field(
        default="sequence",
        metadata={"help": "`sequence`: --beta is TRL's, per nat of a sequence; `study`: the study's, 99 times that."},
    )
    baseline: str = field(
        default="leave_one_out",
        metadata={"help": "`leave_one_out`: RLOO; `none`: REINFORCE, the reward less the penalty as it is."},
    )
    strict: bool = field(default=False, metadata={"help": "Stop where a choice has a null or wrong gradient."})

    def __post_init__(self):
        super().__post_init__()
        try:
            self.penalty = KLPenalty(
                self.kl_estimator,
                self.kl_placement,
                self.kl_reduction,
                self.kl_direction,
                self.kl_budget_per_token,
                self.kl_top_k,
                self.kl_within_budget,
            )
        except ValueError as error:  # which names the penalty's field: the option is that with a prefix
            raise ValueError(f"kl_{error}") from None
        kl.check_choice("beta_unit", self.beta_unit, BETA_UNITS)
        kl.check_choice("baseline", self.baseline, BASELINES)


@dataclass
class PairArguments(StoryArguments):
    """More options for DPO: the pairs that are sampled from the base and ranked."""

    pairs: int = field(default=2000, metadata={"help": "Pairs to make, where none are of the same reward."})
    group_size: int = field(default=8, metadata={"help": "Completions of a prompt that are ranked together."})
    pairs_per_group: int = field(
        default=2, metadata={"help": "Pairs of a group: best and worst, second best and second worst, ..."}
    )
    pairs_from: str | None = field(
        default=None, metadata={"help": "pairs.jsonl of another run, or such a file: nothing is sampled."}
    )
    max_completion_length: int = field(default=100, metadata={"help": "Tokens of a completion, at most."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling."})


def check_options(args: StoryArguments, training_args, model_args) -> None:
    """Refuse everything that can be refused before a model is loaded or anything is written."""
    if isinstance(args, PenaltyArguments):
        check_penalty_options(args, training_args)
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
        check_online_options(args, training_args)
        check_adapter_options(args, training_args, model_args)
    elif model_args.use_peft:
        check_targets(model_args.lora_target_modules)
    if isinstance(args, PairArguments):
        check_pair_options(args)
    adapter = bool(model_args.use_peft or args.adapter_name_or_path)
    check_trainer_options(training_args, model_args.model_name_or_path, adapter)
    if training_args.push_to_hub:
        check_hub(training_args)


def check_penalty_options(args: PenaltyArguments, training_args) -> None:
    if args.target_kl_per_sequence is not None:
        check_target(args, training_args)
    if args.strict and args.penalty.complaint:
        raise ValueError(args.penalty.complaint)
    if args.baseline == "none" and training_args.normalize_advantages:
        raise ValueError("baseline 'none' has no advantages to normalize: leave normalize_advantages out")


def check_online_options(args: OnlineArguments, training_args) -> None:
    kl.check_choice("kl_controller", args.kl_controller, CONTROLLERS)
    kl.check_choice("collapse_guard", args.collapse_guard, GUARDS)
    if args.kl_controller != "fixed" and not (args.target_kl_per_token or 0) > 0:
        raise ValueError(
            f"target_kl_per_token must be > 0 with kl_controller {args.kl_controller!r}, "
            f"got {args.target_kl_per_token}"
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
    if args.pairs_from is not None and not Path(args.pairs_from).is_file():
        raise ValueError(f"pairs_from: there is no file {args.pairs_from!r}")


def check_adapter_options(args: OnlineArguments, training_args, model_args) -> None:
    kl.check_choice("kl_reference", args.kl_reference, REFERENCES)
    adapted = model_args.use_peft or args.adapter_name_or_path
    if model_args.use_peft:
        check_targets(model_args.lora_target_modules)
    if args.kl_reference != "start" and not adapted:
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
