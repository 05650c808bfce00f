"""The one module that knows TRL's private names. Read from trl 1.16.0, `trl/trainer/rloo_trainer.py`.

What is leaned on, each guarded by `tests/test_trl_seam.py`:

- `_generate_and_score_completions(inputs)` makes one generation batch. Inside it `_get_per_token_logps_and_entropies`
  is called for the policy and then, if `beta != 0`, for the reference; nothing else calls it there. Its first result
  is `logps` (B, T); its second to fourth positional arguments are `input_ids` and `attention_mask` (B, P + T) and
  `logits_to_keep`, T. With LoRA the second call runs while the adapter is off.
- the penalty is `beta * ((logps - ref_logps) * completion_mask).sum(-1)`, subtracted from the reward.
- what it returns is a dictionary whose tensors, (B, ...), are shuffled and split together; `old_logps` is (B,).
- `_compute_loss(model, inputs)` calls `_get_per_token_logps_and_entropies` once, and means its loss over B.
- both calls end in the backbone, `base_model` of the causal language model, once a chunk of B, with the positions of
  prompt and completion; its `last_hidden_state` is what the LM head is applied to.
- `_metrics[mode]["kl"]` holds one mean log-ratio per generation batch, averaged at the next log.
- `_step` counts micro-batches and `_buffered_inputs` holds those of the generation batch under way.
- `_logs` holds the last generation batch, of all processes in their order: `prompt`, `completion`, `rewards` by name,
  `advantages`; the returned `advantages` are this process's slice.
- of `GRPOTrainer` (`grpo_trainer.py`), which has the same names: what `_generate_and_score_completions` returns holds
  `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`, (B, P) and (B, T), and its loss reads `beta` anew.
- `_load_from_checkpoint(checkpoint)`, of transformers, brings model or adapters back.
- `use_adapter` and `create_model_from_path`, `add_fused_lm_head`, `disable_dropout_in_model`, by which it makes the
  reference.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import trl
from peft import PeftModel
from trl import GRPOTrainer
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    use_adapter,
)

from . import kl

READ_FROM = "1.16.0"
METHODS = (
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_compute_loss",
    "_load_from_checkpoint",
)
ATTRIBUTES = ("beta", "ref_model", "temperature", "num_iterations", "aux_loss_enabled", "_metrics", "_logs", "_step")


class UnknownTRLError(RuntimeError):
    """The installed TRL is not one whose private names and call order this module knows."""


@dataclass(frozen=True)
class HiddenStates:
    """What the full-vocabulary estimators need: (B, T, H) states that predict the completion tokens, and LM heads."""

    policy: torch.Tensor
    reference: torch.Tensor
    head: kl.LMHead
    ref_head: kl.LMHead


@dataclass(frozen=True)
class Rollout:
    """Completions on this process, scored by policy and reference, (B, T) each.

    Detached in a generation batch; in the loss `logps` and `hidden.policy` carry the policy's gradient.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    hidden: HiddenStates | None = None
    known: dict = field(default_factory=dict)  # full-vocabulary estimates that were asked for already
    graphs: dict | None = None  # and the same with their graph, where the loss will ask again
    base_logps: torch.Tensor | None = None  # of the base, adapter off, where the reference is another adapter

    @property
    def ref_log_ratio(self) -> torch.Tensor:
        return self.logps - self.ref_logps  # (B, T); its mean over policy samples is KL(policy || reference)

    def per_token_kl(self, estimator: str, direction: str = "reverse", k: int = 64) -> torch.Tensor:
        """Any estimator of `kl`, (B, T) nats; a full-vocabulary one is computed once."""
        if estimator in kl.SAMPLED:
            return kl.SAMPLED[estimator](self.ref_log_ratio)
        estimate = kl.full_vocabulary_estimate(estimator, direction, k)
        key = estimator, *estimate.keywords.items()  # its own options, not the others'
        if key not in self.known:
            with nullcontext() if self.graphs is None else torch.enable_grad():
                values = self._from_hidden_states(estimate)
            if self.graphs is not None:
                self.graphs[key], values = values, values.detach()
            self.known[key] = values
        return self.known[key]

    def _from_hidden_states(self, estimate: Callable) -> torch.Tensor:
        states = self.hidden
        models = states.policy, states.reference, states.head, states.ref_head
        return kl.from_hidden_states(estimate, *models, self.completion_ids, self.completion_mask)


def check_trainer(trainer) -> None:
    """Refuse, by name, a trainer without the private names that this module was written against."""
    missing = [name for name in METHODS + ATTRIBUTES if not hasattr(trainer, name)]
    if missing:
        raise UnknownTRLError(
            f"{type(trainer).__name__} of trl {trl.__version__} has no {', '.join(missing)}; kl_alliteration was "
            f"written against trl {READ_FROM}'s RLOOTrainer and GRPOTrainer: install that version or a newer "
            "kl_alliteration"
        )


class RolloutSeam:
    """Wraps three bound methods of one stock trainer, so that a penalty other than TRL's can be used and watched.

    In the reward: at the reference's log-probabilities, the second of the two calls, it hands back values whose
    difference to the policy's sums to `reward_penalty(rollout)` under the mask. TRL does the rest: gathering, beta,
    baseline, advantages. In the loss: the reference goes into the batch that TRL shuffles and splits, and `beta` times
    the mean of `loss_penalty(rollout)` is added to TRL's loss.
    """

    def __init__(self, trainer):
        check_trainer(trainer)
        self.trainer = trainer
        self.reward_penalty: Callable[[Rollout], torch.Tensor] | None = None  # -> (B,)
        self.loss_penalty: Callable[[Rollout], torch.Tensor] | None = None  # -> (B,)
        self.observers: list[Callable[[Rollout], None]] = []  # called after every generation batch with a reference
        self.after_batch: list[Callable[[Rollout | None], None]] = []  # and after every one
        self.budget_per_token: float | None = None
        self.baseline = True
        self.reference_at_beta_zero = False
        self.watch_rollout_policy = False  # log, in the loss, how far the policy is from the one that sampled
        self.score_base = False  # score with the adapter off too; the model has one
        self._one_forward = False
        self._kept: tuple | None = None  # (logps, entropies, states, head) with their graph, for the loss to come
        self._kept_estimates: dict = {}  # and the full-vocabulary estimates that were made of them
        self._ref_model = None  # only where TRL itself made none
        self.last_penalty: torch.Tensor | None = None  # (B,), what beta was last multiplied with in the reward
        self._scored: list[tuple] | None = None  # (logps, states, head) of policy and reference in a generation batch
        self._loss_scored: tuple | None = None  # the same of the policy in the loss
        self._rollout: Rollout | None = None
        self._loss_rows: torch.Tensor | None = None
        self._ref_head: kl.LMHead | None = None
        self._states: list[torch.Tensor] | None = None  # of the forward pass under way, where anyone needs them
        self._hooked: list[torch.nn.Module] = []  # backbones whose states are kept
        self._generate_and_score = trainer._generate_and_score_completions
        self._get_logps = trainer._get_per_token_logps_and_entropies
        self._compute_loss = trainer._compute_loss
        trainer._compute_loss = self.compute_loss
        if self.penalty_in_loss:
            trainer._generate_and_score_completions = self.generate_and_observe
        else:
            trainer._generate_and_score_completions = self.generate_and_score
            trainer._get_per_token_logps_and_entropies = self.get_logps
        self._load_from_checkpoint = trainer._load_from_checkpoint
        trainer._load_from_checkpoint = self.load_from_checkpoint

    def load_from_checkpoint(self, checkpoint, *args, **kwargs):
        """transformers before 5.23 leaves the adapter that trains as it is where another, `ref`, is saved below it."""
        self._load_from_checkpoint(checkpoint, *args, **kwargs)
        if self.has_free_reference and Path(checkpoint, "adapter_model.safetensors").is_file():
            self.trainer.accelerator.unwrap_model(self.trainer.model).load_adapter(
                checkpoint, "default", is_trainable=True
            )

    @property
    def penalty_in_loss(self) -> bool:
        """GRPO: its k3 is in its loss, and what is here only looks on."""
        return isinstance(self.trainer, GRPOTrainer)

    def need_hidden_states(self) -> None:
        """From here on rollouts carry hidden states."""
        for model in filter(None, (self.trainer.model, self.trainer.ref_model, self._ref_model)):
            backbone = self._causal_lm(model).base_model
            kl.LMHead.of(self._causal_lm(model))  # refuses a head that it cannot read now, not in the first batch
            if backbone not in self._hooked:
                self._hooked.append(backbone)
                backbone.register_forward_hook(self._keep_states)

    def need_reference_at_beta_zero(self) -> None:
        """Score with the reference even when `beta` is 0: free of memory with LoRA, else a second model is loaded."""
        trainer = self.trainer
        self.reference_at_beta_zero = True
        if trainer.beta == 0 and trainer.ref_model is None and not self.has_free_reference:
            model = trainer.model
            kwargs = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
            self._ref_model = create_model_from_path(
                get_config_model_id(model.config), **(trainer.args.model_init_kwargs or {}) | kwargs
            )
            disable_dropout_in_model(self._ref_model)
            add_fused_lm_head(self._ref_model, temperature=trainer.temperature)
            self._ref_model = trainer.accelerator.prepare_model(self._ref_model, evaluation_mode=True)
            if self._hooked:
                self.need_hidden_states()

    def one_forward(self) -> bool:
        """Let the loss use the policy's scoring pass and its graph; `False` where a batch is not one update.

        On policy the loss's forward pass repeats the scoring pass. It has to be made anew after an update
        (`num_iterations`, `steps_per_generation`), under gradient checkpointing, which it would defeat, with a
        load-balancing loss, and where a wrapper of the model sees to the gradients of several processes.
        """
        trainer, args = self.trainer, self.trainer.args
        self._one_forward = (
            not self.penalty_in_loss
            and trainer.num_iterations == 1
            and args.steps_per_generation == 1
            and trainer.accelerator.num_processes == 1
            and not args.gradient_checkpointing
            and not trainer.aux_loss_enabled
        )
        return self._one_forward

    def generate_and_score(self, inputs):
        trainer = self.trainer
        self._scored, self._rollout, self._kept, self._kept_estimates = [], None, None, {}
        try:
            output = self._generate_and_score(inputs)
            expected = 1 if trainer.beta == 0 else 2
            if len(self._scored) != expected:
                raise UnknownTRLError(
                    f"trl {trl.__version__} asked for log-probabilities {len(self._scored)} times in a "
                    f"generation batch, expected {expected}: kl_alliteration was written against trl {READ_FROM}"
                )
        finally:
            self._scored = None
        rollout = self._rollout
        if not self.baseline:
            output["advantages"] = self._rewards_without_baseline(output["advantages"])
        if self._kept is not None:
            output["kl_row"] = torch.arange(len(output["old_logps"]), device=output["old_logps"].device)
        if rollout is not None:
            if self.reward_penalty is not None and trainer.beta != 0:
                self._restore_kl_metric(rollout)
            if self.loss_penalty is not None:
                output["kl_ref_logps"] = rollout.ref_logps
                if rollout.hidden is not None:
                    output["kl_ref_hidden"] = rollout.hidden.reference
        self._tell(rollout)
        return output

    def generate_and_observe(self, inputs):
        """GRPO's generation batch, and its rollout: on policy TRL does not score the policy there, so it is done here.

        Without a gradient and with the random state put back: training is what it would be without anybody looking on.
        """
        output = self._generate_and_score(inputs)
        trainer, self._rollout = self.trainer, None
        if self.observers and (trainer.beta != 0 or self.reference_at_beta_zero):
            input_ids, attention_mask = (
                torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
            )
            length = output["completion_ids"].shape[1]
            asked = input_ids, attention_mask, length, trainer.args.per_device_train_batch_size
            device = trainer.accelerator.device
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                (logps, *_), states, head = self._score(trainer.model, *asked)
                self._scored = [(logps, states, head)]
                self._finish_rollout(input_ids, attention_mask, self._score_reference(trainer.model, *asked))
                self._scored = None
                self._add_base(trainer.model, *asked)
        self._tell(self._rollout)
        return output

    def _tell(self, rollout: Rollout | None) -> None:
        if rollout is not None:
            with torch.no_grad():
                for observe in self.observers:
                    observe(rollout)
        for observe in self.after_batch:
            observe(rollout)

    def get_logps(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """TRL's own, seen. In a generation batch the second one is the reference's, or stands in for it."""
        if self._scored is None and self._kept is not None:  # the loss, in the batch's shuffled order
            (logps, entropies, states, head), self._kept = self._kept, None
            rows = self._loss_rows
            self._loss_scored = logps[rows], None if states is None else states[rows], head
            return logps[rows], entropies[rows], None
        keep_graph = self._scored == [] and self._one_forward and self.trainer.model.training
        with torch.enable_grad() if keep_graph else nullcontext():
            if keep_graph:
                kwargs["compute_entropy"] = True
            found = self._score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        (logps, *rest), states, head = found
        if self._scored is None:  # the loss
            self._loss_scored = logps, states, head
            return logps, *rest
        if keep_graph:
            self._kept = logps, rest[0], states, head
            logps = logps.detach()
        self._scored.append((logps, states, head))
        if len(self._scored) == 1 and self.trainer.beta == 0 and self.reference_at_beta_zero:
            found = self._score_reference(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            self._finish_rollout(input_ids, attention_mask, found)
        if len(self._scored) == 2:
            self._finish_rollout(input_ids, attention_mask, found)
            if self.reward_penalty is None:
                mask = self._rollout.completion_mask
                self.last_penalty = kl.reduce_per_sequence(self._rollout.ref_log_ratio, mask, "sum")
            else:
                self.last_penalty = self.reward_penalty(self._rollout)
                # Log-probabilities whose masked difference to the policy's is the penalty: all of it on one token.
                logps = self._rollout.logps.clone()
                logps[:, 0] -= self.last_penalty
        if self._rollout is not None:
            self._add_base(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        return logps, *rest

    def _add_base(self, model, *args, **kwargs) -> None:
        if self.score_base:
            with use_adapter(self.trainer.accelerator.unwrap_model(model), adapter_name=None):
                base_logps = self._get_logps(model, *args, **kwargs)[0]
            self._rollout = replace(self._rollout, base_logps=base_logps)

    def compute_loss(self, model, inputs):
        self._loss_scored, self._loss_rows = None, inputs.get("kl_row")
        loss = self._compute_loss(model, inputs)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()}")
        trainer = self.trainer
        scored, self._loss_scored = self._loss_scored, None
        if self.watch_rollout_policy and scored is not None and trainer.model.training:
            new_logps = (scored[0].detach() * inputs["completion_mask"]).sum(1)
            moved = trainer.accelerator.gather(inputs["old_logps"] - new_logps).mean().item()
            self.metrics["kl/rollout_per_sequence"].append(moved)
        if self.loss_penalty is None or trainer.beta == 0:
            return loss
        if scored is None or "kl_ref_logps" not in inputs:
            raise UnknownTRLError(
                f"trl {trl.__version__} computed a loss without log-probabilities of its batch: kl_alliteration was "
                f"written against trl {READ_FROM}"
            )
        logps, states, head = scored
        mask = inputs["completion_mask"]
        hidden = None if states is None else HiddenStates(states, inputs["kl_ref_hidden"], head, self._ref_head)
        estimates, self._kept_estimates = self._kept_estimates, {}
        known = {key: values[self._loss_rows] for key, values in estimates.items()}
        rollout = Rollout(logps, inputs["kl_ref_logps"], inputs["completion_ids"], mask, hidden, known)
        penalty = self.loss_penalty(rollout)
        # Completions of an earlier policy (num_iterations > 1) are weighted to the present one, within the clip range.
        ratio = ((logps.detach() * mask).sum(1) - inputs["old_logps"]).exp()
        weight = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
        return loss + trainer.beta * (weight * penalty).mean()

    def _causal_lm(self, model):
        model = self.trainer.accelerator.unwrap_model(model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def has_free_reference(self) -> bool:
        """With LoRA the reference is the model itself, adapter off."""
        return isinstance(self.trainer.accelerator.unwrap_model(self.trainer.model), PeftModel)

    def _keep_states(self, module, args, output):
        if self._states is not None:
            self._states.append(output.last_hidden_state)

    def _score(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """TRL's results, the (B, T, H) states behind them, and the head that they went through."""
        self._states = [] if self._hooked else None
        results = self._get_logps(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        kept, self._states = self._states, None
        if kept is None:
            return results, None, None
        states = torch.cat([s[:, -logits_to_keep - 1 : -1] for s in kept])
        return results, states, kl.LMHead.of(self._causal_lm(model), self.trainer.temperature)

    def _score_reference(self, model, *args, **kwargs):
        ref_model = self.trainer.ref_model if self._ref_model is None else self._ref_model
        if ref_model is not None:
            return self._score(ref_model, *args, **kwargs)
        unwrapped = self.trainer.accelerator.unwrap_model(model)
        with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
            return self._score(model, *args, **kwargs)

    def _finish_rollout(self, input_ids, attention_mask, reference) -> None:
        logps, states, head = self._scored[0]
        (ref_logps, *_), ref_states, self._ref_head = reference
        length = logps.shape[1]
        hidden = None if states is None else HiddenStates(states, ref_states, head, self._ref_head)
        ids, mask = input_ids[:, -length:], attention_mask[:, -length:]
        self._rollout = Rollout(logps, ref_logps, ids, mask, hidden)
        if self._kept is not None and self.loss_penalty is not None:
            self._rollout = replace(self._rollout, graphs=self._kept_estimates)

    def _rewards_without_baseline(self, advantages: torch.Tensor) -> torch.Tensor:
        """REINFORCE's weights, (B,): the rewards less the penalty, where RLOO takes the others' mean away."""
        trainer = self.trainer
        everywhere = len(advantages) * trainer.accelerator.num_processes
        rewards = last_rewards(trainer)[-everywhere:]  # an evaluation's batch may be smaller than what is kept
        if trainer.reward_clip_range:
            rewards = rewards.clamp(*trainer.reward_clip_range)
        start = trainer.accelerator.process_index * len(advantages)
        rewards = rewards[start : start + len(advantages)].to(advantages)
        if trainer.beta != 0:
            rewards = rewards - trainer.beta * self.last_penalty
        rewards = rewards.nan_to_num(nan=0.0)
        logged = trainer._logs["advantages"]
        for _ in range(everywhere):
            logged.pop()
        logged.extend(trainer.accelerator.gather(rewards).tolist())
        return rewards

    def _restore_kl_metric(self, rollout: Rollout) -> None:
        """TRL logged the penalty under `kl`; put the mean log-ratio in nats per token back, which `kl` means."""
        self.metrics["kl"][-1] = self.mean_per_token(rollout.ref_log_ratio, rollout.completion_mask)

    def mean_per_token(self, values: torch.Tensor, mask: torch.Tensor) -> float:
        """Mean of (B, T) values over the counted tokens of all processes: sums and counts are reduced, not means."""
        sums = torch.stack([(values * mask).sum(), mask.sum().float()])
        total, count = self.trainer.accelerator.reduce(sums, reduction="sum")
        return (total / count.clamp(min=1)).item()

    def mean_per_sequence(self, values: torch.Tensor, mask: torch.Tensor) -> float:
        """Mean over the completions of all processes of what (B, T) values sum to under the mask."""
        return self.trainer.accelerator.gather((values * mask).sum(-1)).mean().item()

    @property
    def metrics(self) -> dict[str, list[float]]:
        """TRL's metrics of the mode that it is in, averaged and emptied at the next log."""
        return self.trainer._metrics["train" if self.trainer.model.training else "eval"]


def rollout_seam(trainer) -> RolloutSeam:
    """The trainer's one seam, installed at the first call."""
    if "_kl_alliteration_seam" not in vars(trainer):
        trainer._kl_alliteration_seam = RolloutSeam(trainer)
    return trainer._kl_alliteration_seam


def last_completions(trainer) -> tuple[list, list, dict[str, list[float]]]:
    """`(prompts, completions, rewards by function name)` of the last generation batch, over all processes."""
    logs = trainer._logs
    return (
        list(logs["prompt"]),
        list(logs["completion"]),
        {name: list(values) for name, values in logs["rewards"].items()},
    )


def forget_batches(trainer) -> None:
    """Make `train` begin with a new generation batch, as a new trainer's would."""
    trainer._step, trainer._buffered_inputs = 0, None


def last_rewards(trainer) -> torch.Tensor:
    """Weighted rewards of the last generation batch, over all processes, without the penalty: (B of all,).

    NaN where no function applied.
    """
    rewards = torch.tensor(list(trainer._logs["rewards"].values()))  # (functions, B of all)
    weighted = (rewards * trainer.reward_weights.cpu().unsqueeze(1)).nansum(0)
    return weighted.masked_fill(rewards.isnan().all(0), torch.nan)


def last_reward_std(trainer, completions: int | None = None) -> float:
    """Spread of the last rewards that apply, of the last `completions` or of all that are kept; 0 where none does."""
    rewards = last_rewards(trainer)[-completions if completions else None :]
    rewards = rewards[~rewards.isnan()]
    return rewards.std(correction=0).item() if len(rewards) else 0.0
