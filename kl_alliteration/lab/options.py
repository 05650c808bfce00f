"""The options of the recipes, each checked before a model is loaded."""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments

from .. import control, kl
from ..guard import CollapseGuardCallback
from ..penalty import KLPenalty
from ..story_lm import PROMPT

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


# Options that do nothing by themselves: what each needs, in words, and whether it is there.
NEEDS = {
    "kl_top_k": ("--kl_estimator top_k", lambda given: given.kl_estimator == "top_k"),
    "reward_prefix_tokens": ("--reward_discount", lambda given: given.reward_discount is not None),
    "reward_opening_tokens": ("--reward_discount", lambda given: given.reward_discount is not None),
    "sampler_correction_cap": ("--sampler_correction", lambda given: given.sampler_correction != "none"),
    "sampler_divergence_threshold": ("--sampler_divergence_type", lambda given: given.sampler_divergence_type),
    "base_samples": (
        "--target_kl_per_sequence, --plots or --plot_price",
        lambda given: given.target_kl_per_sequence is not None or given.plots or given.plot_price is not None,
    ),
    "prompt": (
        "that no --dataset_name or --pairs_from is given",
        lambda given: given.dataset_name is None and not getattr(given, "pairs_from", None),
    ),
}
NEEDS |= dict.fromkeys(
    ("dataset_config", "dataset_train_split"),
    ("--dataset_name or --eval_dataset_name", lambda given: given.dataset_name or given.eval_dataset_name),
)
NEEDS |= dict.fromkeys(
    ("ref_model_mixup_alpha", "ref_model_sync_steps"),
    (
        "--sync_ref_model, or online --kl_reference moving_average or reset",
        lambda given: given.sync_ref_model or getattr(given, "kl_reference", None) in ("moving_average", "reset"),
    ),
)
NEEDS |= dict.fromkeys(
    [name for name in ModelConfig.__dataclass_fields__ if name.startswith("lora_")] + ["use_rslora", "use_dora"],
    ("--use_peft", lambda given: given.use_peft),
)


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
    """More options for a trainer that samples, RLOO or GRPO: penalty, monitor, rule for beta, reference, guard."""

    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A reward model, a Hub id or a folder with its tokenizer; the first of the rewards."},
    )
    kl_controller: str = field(
        default="fixed",
        metadata={"help": f"Rule that moves beta: {', '.join(CONTROLLERS)}; all but `fixed` need a target."},
    )
    target_kl_per_token: float | None = field(
        default=None, metadata={"help": "What kl_controller holds, in nats per token as TRL's `kl` is."}
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
            "help": "What the KL is measured from: `start`, the model one starts from, or another model with its "
            "tokens, a folder or a Hub id. With an adapter also `base`, adapter "
            "off; `loaded`, the base as a second model, for adapters such as PiSSA whose off is not the base; "
            "`moving_average` (--ref_model_mixup_alpha, --ref_model_sync_steps); `reset` to the policy every "
            "--ref_model_sync_steps, or beyond --reset_at_kl."
        },
    )
    kl_reference_on_cpu: bool = field(
        default=False, metadata={"help": "A reference that is a second model stays on the CPU and scores there."}
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
    health: bool = field(
        default=True, metadata={"help": "Say, a line a symptom, what is wrong with the KL (docs/health.md)."}
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
    kl_opening_tokens: int = field(
        default=0, metadata={"help": "How many of a completion's first tokens, which choose the plot, cost more."}
    )
    kl_opening_price: float = field(
        default=0.0, metadata={"help": "What a nat of theirs costs beside the rest, in multiples of beta."}
    )
    target_kl_per_sequence: float | None = field(
        default=None,
        metadata={
            "help": "The KL to hold, in nats per sequence: the price of a nat, and so beta, is read off the base's "
            "rewards, those of --base_frontier or of --base_samples; the budget follows. `none` is no target."
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
    reward_discount: float | None = field(
        default=None,
        metadata={
            "help": "Credit each token with the reward from there on, n tokens later times this to the n-th: 1 "
            "is the same objective with less noise, 0.8 looks five tokens ahead. For rewards with "
            "`scores_prefixes = True`. `none` credits the whole text."
        },
    )
    reward_prefix_tokens: int = field(
        default=1, metadata={"help": "With reward_discount: tokens from one prefix that is rewarded to the next."}
    )
    reward_opening_tokens: int = field(
        default=0,
        metadata={
            "help": "With reward_discount: so many first tokens are credited with all of the reward that follows, "
            "where they choose what a text is about."
        },
    )
    kl_to_go: bool = field(
        default=False,
        metadata={
            "help": "Charge each token the KL that its completion spends from there on, in place of all of it: the "
            "same objective with less noise, for a penalty in the reward."
        },
    )
    sampler_correction: str = field(
        default="none",
        metadata={
            "help": "RLOO: weight gradients by policy over the engine that samples, bounded: `token_truncate`, "
            "`token_mask`, `sequence_truncate`, `sequence_mask`, as TRL's GRPO names it."
        },
    )
    sampler_correction_cap: float = field(default=3.0, metadata={"help": "The largest weight of that correction."})
    sampler_divergence_type: str | None = field(
        default=None,
        metadata={
            "help": "RLOO: drop the gradient of tokens that are this far from what the engine sampled by, and pushed "
            "further: `binary_tv`, `binary_kl` (DPPO)."
        },
    )
    sampler_divergence_threshold: float | None = field(
        default=None, metadata={"help": "How far: by default 0.15 in probability, or 0.05 nats."}
    )
    score_as_sampled: bool = field(
        default=False,
        metadata={"help": "RLOO: score the policy over the tokens that top_k, top_p and min_p leave: k1 is unbiased."},
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
                self.kl_opening_tokens,
                self.kl_opening_price,
            )
        except ValueError as error:  # which names the penalty's field: the option is that with a prefix
            raise ValueError(f"kl_{error}") from None
        kl.check_choice("beta_unit", self.beta_unit, BETA_UNITS)
        if self.beta_unit == "study" and self.kl_reduction == "mean":
            raise ValueError(
                "beta_unit 'study' is per nat of a mean already, which kl_reduction 'mean' takes once more"
            )
        kl.check_choice("baseline", self.baseline, BASELINES)


@dataclass
class GRPOArguments(OnlineArguments):
    """The same for GRPO, whose own penalty is k3 in the loss."""

    kl_estimator: str = field(default="k3", metadata={"help": f"KL estimator: {', '.join(kl.estimators())}."})
    kl_placement: str = field(
        default="loss",
        metadata={
            "help": "`loss`, differentiable: as in TRL, where it is k3; `reward`: before its group's mean; `both`."
        },
    )


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
