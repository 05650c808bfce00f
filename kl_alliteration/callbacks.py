"""What users add to a trainer. In TRL's manner each takes `trainer=` and goes in with `trainer.add_callback(...)`."""

import json
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import ProgressCallback, TrainerCallback

from . import kl
from ._trl import Rollout, last_completions, last_reward_std, rollout_seam
from .rewards import as_text

CONTROL = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"}


def shown(text: str, style: str = "") -> Text:
    """A model's text for a terminal: neither markup nor control characters do anything."""
    return Text(text.translate(CONTROL), style=style)


class KLPenaltyCallback(TrainerCallback):
    """Choose the KL penalty of a stock [`~trl.RLOOTrainer`]: which estimate of the KL, where it goes, and its budget.

    It takes effect when it is made, at the price `trainer.beta`. TRL's metric `kl` keeps its meaning, the mean
    log-ratio in nats per token, whatever the penalty is. At `trainer.beta == 0` there is no penalty to choose.
    [`kl.gradient_contract`] names the gradient of each choice; a null or wrong one warns with what to use instead.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock.
        kl_estimator (`str`, *optional*, defaults to `"k1"`):
            `"k1"`, `"k2"`, `"k3"`, `"abs"` of the sampled tokens; `"exact"`, `"top_k"` of the whole vocabulary.
        kl_placement (`str`, *optional*, defaults to `"reward"`):
            `"reward"`: subtracted from the reward, as in TRL. `"loss"`: added to the loss, differentiable. `"both"`.
        kl_reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"`: beta is a price per nat of the sequence, as in TRL. `"mean"`: per nat of a token, which with
            `"k1"` is the study's difference of mean cross-entropies.
        kl_direction (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"`, KL(policy || reference), or, of `"exact"` only, `"forward"`, KL(reference || policy).
        kl_budget_per_token (`float`, *optional*):
            Nats per token that a completion may spend for nothing: the penalty is that of the KL beyond this many
            times its length, and 0 within.
        kl_top_k (`int`, *optional*, defaults to `64`): Tokens that `"top_k"` takes in full.
        strict (`bool`, *optional*, defaults to `False`): Stop where it would warn of a gradient.

    Example:

    ```python
    trainer = RLOOTrainer(...)
    trainer.add_callback(KLPenaltyCallback(trainer, kl_estimator="exact", kl_placement="both"))
    ```
    """

    def __init__(
        self,
        trainer,
        kl_estimator: str = "k1",
        kl_placement: str = "reward",
        kl_reduction: str = "sum",
        kl_direction: str = "reverse",
        kl_budget_per_token: float | None = None,
        kl_top_k: int = 64,
        strict: bool = False,
    ):
        contract = kl.gradient_contract(kl_estimator, kl_placement, kl_reduction, kl_direction, kl_budget_per_token)
        kl.warn_of_gradient(contract, f"kl_estimator {kl_estimator!r}, kl_placement {kl_placement!r}", strict)
        warn_of_sampling(trainer.args, kl_estimator)
        seam = rollout_seam(trainer)
        if seam.penalty_in_loss:
            raise ValueError(
                f"{type(trainer).__name__} has its own penalty, k3 in the loss, and no place for another: take "
                "RLOOTrainer, or watch and steer GRPO's beta with KLMonitorCallback and KLControlCallback"
            )
        self.trainer = trainer
        self.kl_estimator, self.kl_placement, self.kl_reduction = kl_estimator, kl_placement, kl_reduction
        self.kl_budget_per_token = kl_budget_per_token
        self.options = {"direction": kl_direction, "k": kl_top_k}
        if kl_estimator in kl.FULL_VOCABULARY:
            kl.full_vocabulary_estimate(kl_estimator, **self.options)  # refuses wrong options now
            seam.need_hidden_states()
        # k1 and sum in the reward is what TRL computes: leaving it to TRL keeps every number the same bit for bit.
        stock = (kl_estimator, kl_placement, kl_reduction, kl_budget_per_token) == ("k1", "reward", "sum", None)
        seam.reward_penalty = None if stock else self.reward_penalty
        seam.loss_penalty = self.penalty if kl_placement in ("loss", "both") else None
        seam.budget_per_token = kl_budget_per_token

    def penalty(self, rollout: Rollout) -> torch.Tensor:
        """What beta multiplies, one number a completion: (B,)."""
        per_token_kl = rollout.per_token_kl(self.kl_estimator, **self.options)  # (B, T)
        penalty = kl.reduce_per_sequence(per_token_kl, rollout.completion_mask, self.kl_reduction)  # (B,)
        if self.kl_budget_per_token is None:
            return penalty
        return kl.over_budget(penalty, rollout.completion_mask, self.kl_reduction, self.kl_budget_per_token)

    def reward_penalty(self, rollout: Rollout) -> torch.Tensor:
        penalty = self.penalty(rollout)
        return torch.zeros_like(penalty) if self.kl_placement == "loss" else penalty


class KLMonitorCallback(TrainerCallback):
    """Logs the KL as several estimators see it, in both units, over all processes, under `kl/`.

    `kl/{k1,k2,k3}_per_token` and `_per_sequence`, with `exact` also `kl/exact_...`; `kl/max_per_sequence`, the
    furthest completion of the batch; `kl/beta`; `kl/share_of_spread`, the standard deviation of the penalty in the
    reward over that of penalty and reward added up; with a budget `kl/budget_use`, KL over budget, and
    `kl/over_budget_share`; where completions are used for several updates (`num_iterations` > 1)
    `kl/rollout_per_sequence`, the mean log-ratio of the policy that sampled them and the policy as it is: what
    clipping bounds, and no bound on the KL to the reference.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock.
        exact (`bool`, *optional*, defaults to `False`): Log the full-vocabulary KL too.
        load_reference (`bool`, *optional*, defaults to `False`):
            At `beta` 0 a trainer without LoRA has no reference: load it, a second model, only to watch the KL.
    """

    def __init__(self, trainer, exact: bool = False, load_reference: bool = False):
        self.trainer, self.seam = trainer, rollout_seam(trainer)
        if self.seam.has_free_reference or load_reference:
            self.seam.need_reference_at_beta_zero()
        self.names = ("k1", "k2", "k3", "exact") if exact else ("k1", "k2", "k3")
        if exact:
            self.seam.need_hidden_states()
        warn_of_sampling(trainer.args, "exact" if exact else "k1")
        self.seam.observers.append(self.observe)
        self.seam.watch_rollout_policy = trainer.num_iterations > 1

    def observe(self, rollout: Rollout) -> None:
        accelerator, metrics, mask = self.trainer.accelerator, self.seam.metrics, rollout.completion_mask
        per_sequence = {  # (B,) each
            name: kl.reduce_per_sequence(rollout.per_token_kl(name), mask, "sum") for name in self.names
        }
        lengths = mask.sum(-1)
        budget = self.seam.budget_per_token
        best = per_sequence[self.names[-1] if "exact" in self.names else "k1"]
        sums = [lengths.sum(), torch.ones_like(lengths).sum(), *(values.sum() for values in per_sequence.values())]
        if budget:
            use = best / (budget * lengths.clamp(min=1))
            sums += [use.sum(), (use > 1).sum()]
        tokens, sequences, *totals = accelerator.reduce(torch.stack([s.double() for s in sums]), "sum").tolist()
        for name, total in zip(self.names, totals, strict=False):
            metrics[f"kl/{name}_per_token"].append(total / max(tokens, 1))
            metrics[f"kl/{name}_per_sequence"].append(total / sequences)
        if budget:
            metrics["kl/budget_use"].append(totals[-2] / sequences)
            metrics["kl/over_budget_share"].append(totals[-1] / sequences)
        metrics["kl/max_per_sequence"].append(accelerator.gather(best).max().item())
        metrics["kl/beta"].append(self.trainer.beta)
        if self.trainer.beta != 0 and not self.seam.penalty_in_loss:
            penalty_std = self.trainer.beta * accelerator.gather(self.seam.last_penalty).std(correction=0).item()
            reward_std = last_reward_std(self.trainer, int(sequences))
            spread = penalty_std + reward_std
            metrics["kl/share_of_spread"].append(penalty_std / spread if spread else 0.0)


class KLControlCallback(TrainerCallback):
    """Let a rule of [`control`] move `trainer.beta` after every optimizer step that used new completions.

    The rule's state goes into `trainer_state.json` of every checkpoint and comes back from it. On several processes
    every rank sees the same pooled KL and so has the same beta.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock, its `beta` not 0.
        controller: A rule of [`control`], such as `StepRule(0.25, target_kl_per_token=0.15)`.
        kl_estimator (`str`, *optional*, defaults to `"k1"`): The estimate that the rule is fed.
    """

    STATE = "kl_alliteration.KLControl"  # its place among the trainer's stateful callbacks

    def __init__(self, trainer, controller, kl_estimator: str = "k1"):
        kl.check_choice("kl_estimator", kl_estimator, kl.estimators())
        if trainer.beta == 0:
            raise ValueError(
                "beta must not be 0 at the start under control: TRL then loads no reference, and a rule that "
                "multiplies never leaves 0; start from a small beta such as 0.01"
            )
        self.trainer, self.controller, self.kl_estimator = trainer, controller, kl_estimator
        self.seam = rollout_seam(trainer)
        if kl_estimator in kl.FULL_VOCABULARY:
            self.seam.need_hidden_states()
        self.seam.observers.append(self.observe)
        self.seen = None  # (KL per token, completions) of the last generation batch
        trainer.beta = controller.value

    def observe(self, rollout: Rollout) -> None:
        if self.trainer.model.training:
            kl_per_token = self.seam.mean_per_token(rollout.per_token_kl(self.kl_estimator), rollout.completion_mask)
            self.seen = kl_per_token, len(rollout.logps) * self.trainer.accelerator.num_processes

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(self.STATE)
        if saved and state.global_step:
            vars(self.controller).update(saved["attributes"])
        self.trainer.beta = self.controller.value

    def on_step_end(self, args, state, control, **kwargs):
        if self.seen is not None:
            self.trainer.beta = self.controller.update(*self.seen)
            self.seen = None
        state.stateful_callbacks[self.STATE] = {"args": {}, "attributes": vars(self.controller).copy()}


def warn_of_sampling(args, kl_estimator: str) -> None:
    """Say that completions are not drawn from the distributions whose log-probabilities are compared."""
    truncated = [
        f"{name}={value}"
        for name, value, off in (
            ("top_k", args.top_k, (0, None)),
            ("top_p", args.top_p, (1.0, None)),
            ("min_p", args.min_p, (0.0, None)),
        )
        if value not in off
    ]
    if truncated and kl_estimator in kl.SAMPLED:
        warnings.warn(
            f"{', '.join(truncated)}: completions are sampled from a truncated policy, so sampled estimates of the KL "
            "are biased; kl_estimator 'exact' is not, at the states that are visited.",
            stacklevel=3,
        )
    if args.temperature != 1:
        warnings.warn(
            f"temperature={args.temperature}: TRL divides the logits of policy and reference by it, so every KL here "
            "is that of the tempered policies, not of the models at temperature 1.",
            stacklevel=3,
        )


class MetricsFileCallback(TrainerCallback):
    """Every log as one JSON line, with `generations` (completions sampled so far) and `beta` beside TRL's metrics.

    Of a trainer that samples none, `pairs`, what it has seen of its dataset. The file is written from the trainer's
    history when training starts, so a resumed run has no doubled lines.
    """

    def __init__(self, trainer, path: str | Path):
        self.trainer, self.path = trainer, Path(path)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history), encoding="utf-8")

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        entry = state.log_history[-1]
        # The entry is the trainer's own, so a checkpoint carries the two columns too.
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        iterations = getattr(self.trainer, "num_iterations", None)
        entry["generations" if iterations else "pairs"] = state.global_step * batch // (iterations or 1)
        entry["beta"] = self.trainer.beta
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class StoryProgressCallback(ProgressCallback):
    """The progress bar of transformers, with reward and KL at its end in place of a dictionary a log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {"reward": "reward", "kl": "KL/token", "rewards/accuracies": "ranked right", "entropy": "entropy"}
            values = {label: f"{logs[name]:.2f}" for name, label in shown.items() if logs.get(name) is not None}
            if values:
                self.training_bar.set_postfix(values)


class StoryTableCallback(TrainerCallback):
    """Prints a few of the last stories with their rewards, every `every_steps` steps."""

    def __init__(self, trainer, every_steps: int, stories: int = 3, console: Console | None = None):
        if every_steps < 1:
            raise ValueError(f"every_steps must be >= 1, got {every_steps}; leave the callback out to print nothing")
        self.trainer, self.every_steps, self.stories = trainer, every_steps, stories
        self.console = console or Console()

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step % self.every_steps == 0:
            prompts, completions, rewards = last_completions(self.trainer)
            table = Table(title=f"Step {state.global_step}", show_lines=True)
            for name in rewards:
                table.add_column(name.removesuffix("_reward"), justify="right")
            table.add_column("story", overflow="fold")
            rows = list(zip(prompts, completions, *rewards.values(), strict=True))[: self.stories]
            for prompt, completion, *values in rows:
                story = shown(as_text(prompt), "dim") + shown(as_text(completion))
                table.add_row(*(f"{value:.1f}" for value in values), story)
            self.console.print(table)
