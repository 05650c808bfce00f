"""What may be wrong with the KL of a run: a symptom each, with its range, cause, remedy, and what sees it in a log."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from .log import FEW, Log

MANY = 8  # entries that a spread is taken of
KL_NAMES = ("kl/exact_per_token", "kl/k1_per_token", "kl")  # nats per token, the best first
SAMPLED_KL = ("kl/k1_per_token", "kl")


@dataclass(frozen=True)
class Symptom:
    """What may be wrong, in words. `look` says what a [`Log`] shows of it; `None` where only the trainer shows it.

    One that is no alarm is a note: it says how the other numbers are to be read.
    """

    name: str
    healthy: str
    cause: str
    remedy: str
    look: Callable[["Log"], str | None] | None = None
    alarm: bool = True


SYMPTOMS: dict[str, Symptom] = {}


def symptom(name: str, healthy: str, cause: str, remedy: str, alarm: bool = True):
    """Enter a function of a [`Log`] as the one that sees a symptom."""

    def enter(look: Callable[[Log], str | None]) -> Callable[[Log], str | None]:
        SYMPTOMS[name] = Symptom(name, healthy, cause, remedy, look, alarm)
        return look

    return enter


@symptom(
    "no_kl",
    "beta above 0",
    "No KL is in force: beta is 0, TRL's default in GRPO, and then no reference is loaded either.",
    "Nothing holds the policy near its start. Set beta, or watch it: KLMonitorCallback(trainer, load_reference=True).",
    alarm=False,
)
def _no_kl(log: Log) -> str | None:
    betas = log.finite("kl/beta", "beta")
    if len(betas) >= FEW and not any(betas):
        return "beta 0 in every entry"
    rewards = log.all("reward")
    if len(rewards) >= FEW and not log.present(*KL_NAMES):
        return f"no kl in {len(rewards)} entries of the log"
    return None


@symptom(
    "not_finite",
    "finite",
    "An overflow, most often of a half precision or of k3, which is exp of the log-ratio, or a mask without a token.",
    "Use k1 or the exact KL, bf16 or float32, a smaller learning rate, and look at the text.",
)
def _not_finite(log: Log) -> str | None:
    watched = [name for name in log.values if name in ("loss", "kl") or name.startswith("kl/")]
    bad = [name for name in watched if not math.isfinite(log.values[name][-1])]
    norms = log.all("grad_norm")[-FEW:]  # in float16 one overflows now and then, and the step is left out
    if len(norms) == FEW and not any(map(math.isfinite, norms)):
        bad.append("grad_norm")
    return ", ".join(f"{name} {log.values[name][-1]}" for name in bad) or None


@symptom(
    "spike",
    "at most 4 times the largest of the five entries before, or below 0.05 nats per token",
    "One batch was far off: a text that the reference finds all but impossible, too large a step, or k3, whose mean a "
    "few tokens make.",
    "Look at the text. Clip gradients (max_grad_norm), warm up, use k1 or the exact KL in place of k3.",
)
def _spike(log: Log) -> str | None:
    for name in log.present(*KL_NAMES)[:1]:
        values = log.finite(name)
        if len(values) > 5 and values[-1] > max(0.05, 4 * max(values[-6:-1])):
            return f"{name} {values[-1]:.3g} nats per token after at most {max(values[-6:-1]):.3g}"
    return None


@symptom(
    "explodes",
    "below 0.5 nats per token",
    "The policy has left the reference: the price of a nat is below what the reward pays for it.",
    "Raise beta, or bound the KL by a budget or a target (docs/control.md); halve the learning rate.",
)
def _explodes(log: Log) -> str | None:
    for name in log.present(*KL_NAMES)[:1]:
        if (value := log.recent(name)) is not None and value > 0.5:
            return f"{name} {value:.3g} nats per token"
    return None


@symptom(
    "negative",
    "above minus four standard errors",
    "A sampled log-ratio may fall below 0 by chance, but not so far: what was sampled is not what is scored. Dropout, "
    "truncated sampling, an engine with other weights, a wrong mask.",
    "Take these away one by one; the exact KL cannot be negative.",
)
def _negative(log: Log) -> str | None:
    values = log.finite(*SAMPLED_KL)[-MANY:]
    if len(values) < MANY:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / MANY**0.5
    if mean < -1e-3 and mean < -4 * error:
        return f"kl {mean:.3g} nats per token, standard error {error:.2g}, over {MANY} entries"
    return None


@symptom(
    "starts_apart",
    "below 0.01 nats per token before the first update",
    "The policy is not the reference at the start: dropout, another precision, an adapter that was trained before, or "
    "a reference of the user's.",
    "If none of these is meant, set disable_dropout and load both in one precision.",
    alarm=False,
)
def _starts_apart(log: Log) -> str | None:
    values = log.finite(*SAMPLED_KL)
    if log.step <= 1 and values and abs(values[-1]) > 0.01:
        return f"kl {values[-1]:.3g} nats per token at the first step"
    return None


@symptom(
    "sampler_differs",
    "below 0.01 nats per token, 1e-6 in one precision",
    "The engine that samples is not the policy that is scored: old weights, a lower precision, another temperature.",
    "Look at the sync of weights first. If it is precision, GRPO corrects it: vllm_importance_sampling_mode.",
)
def _sampler_differs(log: Log) -> str | None:
    value = log.recent("kl/sampler_k1_per_token")
    if value is not None and abs(value) > 0.01:
        return f"kl/sampler_k1_per_token {value:.3g}"
    value = log.recent("sampling/sampling_logp_difference/mean")
    return f"sampling_logp_difference {value:.3g}" if value is not None and value > 0.05 else None


@symptom(
    "penalty_is_noise",
    "below 0.6 of the spread of reward and penalty",
    "Most of what differs between the completions of a group is the penalty, so its noise is what is learnt.",
    "Use the exact KL in both, lower beta, or sample larger groups.",
)
def _penalty_is_noise(log: Log) -> str | None:
    value = log.recent("kl/share_of_spread")
    return f"{value:.2f} of the spread is the penalty's" if value is not None and value > 0.6 else None


@symptom(
    "beta_winds",
    "within a factor of 10 of its start",
    "A rule that holds a target has moved beta one way all along: the target is out of reach, or the rule is faster "
    "than the policy.",
    "State a target that the run can reach, raise beta's start, or slow the rule (docs/control.md).",
)
def _beta_winds(log: Log) -> str | None:
    betas = [abs(value) for value in log.finite("kl/beta", "beta")]
    if len(betas) < MANY or not min(betas[0], betas[-1]) > 0 or not log.present("kl/target_per_token"):
        return None  # without a target beta moves as it was asked to
    factor = betas[-1] / betas[0]
    one_way = all(
        later > earlier if factor > 1 else later < earlier
        for earlier, later in zip(betas[-MANY:], betas[-MANY + 1 :], strict=False)
    )
    if one_way and max(factor, 1 / factor) > 10:
        return f"beta from {betas[0]:.3g} to {betas[-1]:.3g}, {'up' if factor > 1 else 'down'} in {MANY} entries"
    return None


@symptom(
    "held_still",
    "reward that rises, or a KL that does",
    "The penalty, or a learning rate that is too small, keeps the policy where it was.",
    "Lower beta or set a budget; if the KL does not move then, raise the learning rate.",
)
def _held_still(log: Log) -> str | None:
    rewards, kls = log.finite("reward"), log.finite(*KL_NAMES)
    third = len(rewards) // 3
    if third < FEW or log.step < 50 or len(kls) != len(rewards):
        return None
    first, last = rewards[:third], rewards[-third:]
    error = math.hypot(statistics.stdev(first), statistics.stdev(last)) / third**0.5
    gain, middle, end = statistics.fmean(last) - statistics.fmean(first), kls[third:-third], kls[-third:]
    end = statistics.fmean(end)
    if gain < 2 * error and abs(end) < 0.005 and abs(end) < 1.5 * abs(statistics.fmean(middle)) + 1e-4:
        return f"reward {gain:+.2g} (standard error {error:.2g}) in {log.step} steps at kl {end:.2g} nats per token"
    return None


@symptom(
    "length_is_learnt",
    "a length within 1.5 times that of the start",
    "The reward, or a penalty that is summed or meant over tokens, pays for length.",
    "Pay per word, or bound the length in the reward; see whether the penalty's reduction is the one that you mean.",
)
def _length_is_learnt(log: Log) -> str | None:
    lengths, rewards = log.finite("completions/mean_length"), log.finite("reward")
    early, recent = log.early("completions/mean_length"), log.recent("completions/mean_length")
    if early is None or len(lengths) < MANY or len(lengths) != len(rewards) or not min(early, recent) > 0:
        return None
    if 1 / 1.5 < recent / early < 1.5 or min(map(len, map(set, (lengths, rewards)))) < 2:
        return None
    together = statistics.correlation(lengths, rewards)
    if abs(together) < 0.8:
        return None
    return f"length from {early:.0f} to {recent:.0f} tokens, correlation with the reward {together:.2f}"


@symptom(
    "never_ends",
    "a share of cut completions that does not rise",
    "Completions no longer end before max_completion_length: longer texts are paid, or the end token is lost.",
    "Look at the texts; pay per word; mask_truncated_completions.",
)
def _never_ends(log: Log) -> str | None:
    early, recent = log.early("completions/clipped_ratio"), log.recent("completions/clipped_ratio")
    if early is not None and early < 0.6 and recent > 0.9:
        return f"{recent:.2f} of the completions are cut, {early:.2f} at the start"
    return None


@symptom(
    "collapse",
    "distinct pairs above 0.45 and entropy above 0.5 of the start's, 0.7 of the texts different",
    "The policy tells one text: the reward pays more for it than the penalty charges.",
    "Go back to an earlier checkpoint with a budget or a higher beta: CollapseGuardCallback does.",
)
def _collapse(log: Log) -> str | None:
    found = []
    for name, limit in (("guard/distinct_2_left", 0.45), ("guard/different_share", 0.7)):
        if (value := log.recent(name)) is not None and value < limit:
            found.append(f"{name.removeprefix('guard/')} {value:.2f}")
    early, recent = log.early("entropy"), log.recent("entropy")
    # Where nothing is sampled, as in fine-tuning on given texts, entropy falls because they are learnt.
    if log.all("reward") and early is not None and early > 0 and recent < 0.5 * early:
        found.append(f"entropy {recent:.2g} of {early:.2g} nats per token")
    return ", ".join(found) or None


@symptom(
    "one_plot",
    "no plot in more than half of the texts, a tenth of the start's plots still told",
    "The KL is spent on the choice of what is told, not on how.",
    "More prompts, or a price on plots or openings (docs/variety.md).",
)
def _one_plot(log: Log) -> str | None:
    share, early, plots = (
        log.recent("plots/most_told_share"),
        log.early("plots/effective"),
        log.recent("plots/effective"),
    )
    if share is not None and (share > 0.5 or (early is not None and plots < 0.1 * early)):
        return f"one plot has {share:.2f} of the texts, {plots:.1f} are told"
    return None


@symptom(
    "no_signal",
    "below 0.8 of the groups",
    "All completions of a group have one reward, which teaches nothing: solved or hopeless prompts, or equal texts.",
    "Other prompts, a finer reward, larger groups.",
)
def _no_signal(log: Log) -> str | None:
    value = log.recent("frac_reward_zero_std")
    if log.recent("reward_std") == 0:  # RLOO with TRL's own penalty counts ties of rewards less the penalty
        value = 1.0
    return f"{value:.2f} of the groups have rewards without spread" if value is not None and value > 0.8 else None


@symptom(
    "inefficient",
    "above 0.1, or rising",
    "The KL buys little reward: nats go into noise, most often by too large steps.",
    "A smaller learning rate, longer warm-up, larger groups, plain SGD, the exact KL in both (docs/efficiency.md).",
)
def _inefficient(log: Log) -> str | None:
    values = log.finite("kl/efficiency")[-2 * FEW :]
    # While a run learns it is low, and rises.
    if len(values) == 2 * FEW and max(values) < 0.1 and sum(values[FEW:]) <= sum(values[:FEW]):
        return f"the reward could have cost {statistics.fmean(values):.2f} of the KL"
    return None


# What only the trainer shows: `KLHealthCallback` looks.
for known in (
    Symptom(
        "wrong_gradient",
        "the gradient of a KL",
        "The estimator does not have the gradient of a KL where it stands.",
        "Choose another pair of estimator and placement (docs/kl.md).",
    ),
    Symptom(
        "truncated_sampling",
        "sampling from the policy itself",
        "Completions are drawn from another distribution than the one that is scored, so every sampled KL is biased.",
        "top_p 1, top_k 0, min_p unset, no penalty of repetition; or a penalty that is the exact KL.",
    ),
    Symptom(
        "dropout",
        "none",
        "Policy and reference are scored with other units switched off each time: noise in every log-ratio.",
        "disable_dropout=True, lora_dropout 0, and dropout to 0 in the model's own configuration.",
    ),
    Symptom(
        "reference_moves",
        "a reference that stands",
        "The KL is measured from a reference that follows the policy: it stays small however far the policy goes.",
        "Read kl/base_per_sequence, the KL to where the run began, beside it.",
        alarm=False,
    ),
):
    SYMPTOMS[known.name] = known
