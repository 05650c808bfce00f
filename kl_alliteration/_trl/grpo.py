"""The GRPO seam: it looks on while the penalty is TRL's own, k3 in the loss, and places any other."""

import dataclasses

import torch
from trl.trainer.utils import nanstd, pad

from .. import kl
from .baseline import share_of_ties, weighted
from .looking_on import look_on
from .loss_types import check_loss_type, divisor_of_completions, scale_of_batch, scale_of_credit, weights_of_kl
from .penalised import Batch, PenaltySeam
from .seam import unknown_order


class GRPOSeam(PenaltySeam):
    """Wraps five bound methods of a stock `GRPOTrainer`.

    In the reward: `_calculate_rewards` returns one more column, beta times the penalty, whose weight is -1 while the
    batch is made: TRL sums, takes the group's mean away and divides by its spread. In the loss: TRL's loss is taken at
    beta 0, without its k3, and the penalty is added, divided as TRL's `loss_type` divides what a completion's tokens
    sum to. In both: that part is divided by the same spread, so that the two halves have one price.
    """

    OWN = ("k3", "loss")
    LEAVES_ONE_OUT = False  # the baseline is the mean of the whole group
    NEEDS = (
        "_generate", "reward_weights", "loss_type", "scale_rewards", "multi_objective_aggregation", "num_generations",
        "num_generations_eval", "max_completion_length", "use_vllm", "vllm_importance_sampling_correction",
    )  # fmt: skip

    def __init__(self, trainer):
        super().__init__(trainer)
        self.scorer.places = False  # but while it looks on, or places a penalty
        self.stock.calculate_rewards, self.stock.generate = trainer._calculate_rewards, trainer._generate
        trainer._generate = self.generate
        trainer._calculate_rewards = self.calculate_rewards
        trainer._get_per_token_logps_and_entropies = self.get_logps
        trainer._generate_and_score_completions = self.generate_and_score
        trainer._compute_loss = self.compute_loss

    def use_penalty(self, penalty) -> None:
        if penalty.in_reward and self.trainer.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "multi_objective_aggregation must be 'sum_then_normalize' with a KL penalty in the reward: "
                f"{self.trainer.multi_objective_aggregation!r} divides each reward by its own spread, and a penalty "
                "so divided has no price; put it into the loss"
            )
        if penalty.in_loss:
            check_loss_type(self.trainer)
        super().use_penalty(penalty)
        self.scorer.places = not self.is_stock

    def use_loaded_reference(self, path: str | None = None, on_cpu: bool = False) -> None:
        super().use_loaded_reference(path, on_cpu)
        self.scorer.places = self.scorer.own_reference is not None

    @property
    def is_stock(self) -> bool:
        """Whether TRL makes the penalty, every number the same bit for bit."""
        return self.penalty is None or (self.penalty.is_plain(*self.OWN) and self.scorer.own_reference is None)

    @property
    def on_policy(self) -> bool:
        """Whether TRL takes the loss's own log-probabilities for those of the policy that sampled."""
        corrected = self.trainer.use_vllm and self.trainer.vllm_importance_sampling_correction
        return self.is_one_update and not corrected

    def generate_and_score(self, inputs):
        if self.penalty is None and self.scorer.own_reference is not None and self.beta != 0:
            raise ValueError(
                f"{type(self.trainer).__name__} takes its own penalty from the model with the adapter off: with a "
                "loaded reference it needs KLPenaltyCallback(trainer, KLPenalty(...))"
            )
        if self.is_stock or self.beta == 0:
            self.batch = Batch(under_way=False)
            output = self.stock.generate_and_score(inputs)
            return self._finish(output, look_on(self, output))
        trainer, self.loss_pass = self.trainer, None
        self.batch, weights = (batch := Batch()), trainer.reward_weights
        try:
            output = self.stock.generate_and_score(inputs)
        finally:
            trainer.reward_weights, batch.under_way = weights, False
        if batch.rollout is None or len(batch.scored) != (expected := 1 if self.on_policy else 2):
            raise unknown_order(
                f"asked for log-probabilities {len(batch.scored)} times in a generation batch, expected {expected}"
            )
        batch.scored = []
        if self.penalty.in_reward:
            self._put_right(output)
        self._keep_for_loss(output)
        return self._finish(output, batch.rollout)

    def _finish(self, output: dict, rollout: kl.Rollout | None) -> dict:
        self._check_rows(output)
        for change in self.changes.values():
            change(output)
        self.tell(rollout, output.get("sampling_per_token_logps"))
        return output

    def generate(self, prompts):
        generated = self.stock.generate(prompts)
        if self.batch is not None and self.batch.under_way:
            self.batch.own_tokens = generated[2]  # a mask each: 0 where a tool or an environment wrote
        return generated

    def get_logps(self, model, *asked, **kwargs):
        """TRL's method, its results recorded: in a generation batch off policy the policy's, then the reference's."""
        if self._asks_for_loss(model, asked):
            self.loss_pass.scored = self._score_for_loss(model, *asked, **kwargs)
            return self.loss_pass.scored.results
        batch = self.batch
        if batch is None or not batch.under_way:
            return self.scorer.score(model, *asked, **kwargs).results
        of_policy, size = not self.on_policy and not batch.scored, [kwargs.pop("batch_size")]
        own = self.scorer.own_reference is not None and not of_policy
        score = self.scorer.score_checked if of_policy else self.scorer.score_reference if own else self.scorer.score
        batch.scored.append(score(model, *asked, *size, **kwargs))
        batch.asked = (*asked, *size), kwargs
        return batch.scored[-1].results

    def calculate_rewards(self, *args, **kwargs):
        rewards, batch = self.stock.calculate_rewards(*args, **kwargs), self.batch
        self.keep_rewards(rewards, *args, **kwargs)
        if batch is None or not batch.under_way or not batch.scored:
            return rewards
        self._make_rollout()
        if not self.penalty.in_reward:
            return rewards
        trainer = self.trainer
        with torch.no_grad():
            batch.penalty = self.penalty(batch.rollout)
        everywhere = trainer.accelerator.gather(batch.penalty).to(rewards.device)  # in its own precision
        # Where there is no reward, there is no penalty and no advantage.
        column = (self.beta * everywhere).masked_fill(rewards.isnan().all(1), torch.nan)
        trainer.reward_weights = torch.cat([trainer.reward_weights, trainer.reward_weights.new_tensor([-1.0])])
        return torch.cat([rewards, column[:, None]], dim=1)

    def _make_rollout(self) -> None:
        """Of both scores, the policy's made here where TRL has asked for none."""
        batch, scorer, model = self.batch, self.scorer, self.trainer.model
        (asked, kwargs), reference = batch.asked, batch.scored[-1]
        if self.on_policy:
            keep_graph = self.one_forward and model.training
            with torch.set_grad_enabled(keep_graph):
                policy = scorer.score_checked(model, *asked, **kwargs, compute_entropy=keep_graph)
            if keep_graph:
                batch.graph, policy = policy, dataclasses.replace(policy, logps=policy.logps.detach())
        else:
            policy = batch.scored[0]
        with torch.no_grad():
            base_logps = scorer.base_logps(model, *asked, **kwargs)
        rollout = scorer.rollout(policy, reference, *asked[:2], base_logps)
        if batch.own_tokens is not None:
            masks = [torch.tensor(mask, device=asked[0].device) for mask in batch.own_tokens]
            own = pad(masks, padding_value=1, padding_side="right", pad_to_multiple_of=self.trainer.pad_to_multiple_of)
            rollout = dataclasses.replace(rollout, completion_mask=rollout.completion_mask * own)
        if batch.graph is not None and self.in_loss:
            rollout = dataclasses.replace(rollout, graphs=batch.estimates)
        batch.rollout, batch.ref_head = rollout, self._head_of(reference)

    def _put_right(self, output: dict) -> None:
        """The log's rewards without the penalty in them; the spread by which TRL has divided, for the loss's half."""
        trainer, batch = self.trainer, self.batch
        rewards, metrics = weighted(trainer, batch.rewards), self.metrics
        metrics["reward"][-1], metrics["reward_std"][-1] = rewards.nanmean().item(), nanstd(rewards).item()
        metrics["frac_reward_zero_std"][-1] = share_of_ties(trainer, batch.rewards)
        if self.in_loss:
            output["kl_scale"] = scale_of_batch(trainer, batch, len(batch.penalty))

    def credit_tokens(self, output: dict, credit: torch.Tensor) -> torch.Tensor:
        """Advantages of tokens, (B, T), which TRL's loss takes as well: the completion's and what stands on top."""
        scale = scale_of_credit(self.trainer, self.batch, credit, output["completion_mask"])
        output["advantages"] = output["advantages"].view(len(credit), -1) + scale.unsqueeze(1) * credit
        return output["advantages"]

    def compute_loss(self, model, inputs):
        beta, loss_pass = self.beta, self._begin_loss(model, inputs)
        ours = not self.is_stock and beta != 0
        try:
            self.beta = 0.0 if ours else beta  # TRL leaves its own penalty out
            loss = self.stock.compute_loss(model, inputs)
        finally:
            self.beta, self.loss_pass = beta, None
        mask, old = inputs["completion_mask"] * inputs.get("tool_mask", 1), inputs.get("old_per_token_logps")
        sampled = None if old is None else (old * mask).sum(1)
        if (scored := loss_pass.scored) is not None:
            self.log_rollout_kl(scored.logps, mask, sampled)
        elif ours:
            raise unknown_order("computed a loss without log-probabilities of its batch")
        if ours:  # what TRL's log means by `kl`
            k3 = kl.k3((logps := scored.logps.detach()) - inputs["ref_per_token_logps"])
            k3 = k3 * weights_of_kl(self.trainer, logps, old, mask)
            self.metrics["kl"].append(self.mean_per_token(k3, mask))
        if ours and self.in_loss:
            penalty = self._penalty_of_loss(loss_pass, inputs, mask, sampled)
            penalty = penalty * inputs.get("kl_scale", 1.0) / divisor_of_completions(self.trainer, inputs, mask)
            loss = loss + beta * penalty.sum()
        return self.checked(loss)
