"""What TensorBoard shows of a run: charts in groups, their units in the titles (its page "Custom scalars")."""

import re

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

# group: {chart, with its unit: names in the log, as regular expressions}
LAYOUT = {
    "1 Reward": {
        "reward": ("reward",),
        "spread of the rewards (standard deviation)": ("reward_std",),
        "groups whose rewards do not differ (share)": ("frac_reward_zero_std",),
        "spread of the tokens' advantages over the completions' (1 = the same)": ("reward_to_go/spread",),
        "the same of what they are charged (1 = the same)": ("kl_to_go/spread",),
        "pairs that are ranked right (share)": ("rewards/accuracies",),
    },
    "2 KL to the reference": {
        "KL, nats per token": (r"kl/(k1|k2|k3|exact)_per_token", "kl", "kl/base_per_token", "kl/target_per_token"),
        "KL, nats per sequence": (r"kl/(k1|k2|k3|exact)_per_sequence", "kl/base_per_sequence"),
        "furthest completion, nats per sequence": ("kl/max_per_sequence",),
        "since the rollout, nats per sequence": ("kl/rollout_per_sequence",),
    },
    "3 Its price": {
        "reward per nat": ("kl/beta", "kl/price"),
        "of the budget or the target (1 = all of it)": ("kl/budget_use", "kl/target_use", "kl/wall"),
        "share (0 to 1)": ("kl/share_of_spread", "kl/over_budget_share", "kl/efficiency"),
    },
    "4 The sampler": {
        "KL to the policy, nats per token": (r"kl/sampler_k[13]_per_token",),
        "largest ratio of a token (1 = the same)": ("kl/sampler_max_ratio",),
        "weight of the correction (1 = none), share that is capped or dropped": (
            "kl/sampler_weight",
            r"kl/sampler_(clipped|dropped)_share",
        ),
    },
    "5 The texts": {
        "entropy, nats per token": ("entropy",),
        "length, tokens": (r"completions/(mean|min|max)_length",),
        "cut off (share)": ("completions/clipped_ratio",),
        "variety (share)": ("guard/different_share", "guard/distinct_2", "guard/distinct_2_left"),
        "plots told (number)": ("plots/effective",),
        "the most told plot (share)": ("plots/most_told_share",),
        "KL of plots, and within them, nats per sequence": (r"plots/kl(_within)?_per_sequence",),
    },
    "6 The optimizer": {
        "loss (says nothing of progress)": ("loss",),
        "norm of the gradient": ("grad_norm",),
        "learning rate": ("learning_rate",),
        "seconds a step": ("step_time",),
    },
}
LATER = ("plots/kl_per_sequence", "plots/kl_within_per_sequence")  # of a run with plots, but not in its first log


def layout(names: list[str]) -> dict[str, dict[str, list]]:
    """Groups of charts for a log with these names, in TensorBoard's form; a chart without a name is left out."""
    found: dict[str, dict[str, list]] = {}
    for group, charts in LAYOUT.items():
        for title, patterns in charts.items():
            if any(re.fullmatch(pattern, name) for pattern in patterns for name in names):
                tags = [f"^train/{pattern}$" for pattern in patterns]
                found.setdefault(group, {})[title] = ["Multiline", tags]
    return found


class TensorBoardLayoutCallback(TrainerCallback):
    """Writes the groups once, at a run's first log of training, where it reports to TensorBoard; else does nothing.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, stock.
    """

    def __init__(self, trainer):
        self.trainer, self.written = trainer, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.written or "loss" not in (logs or {}):
            return
        self.written = True
        charts = layout([*logs, *(LATER if "plots/effective" in logs else ())])
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_custom_scalars(charts)
