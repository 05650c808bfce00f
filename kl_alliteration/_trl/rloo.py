"""The RLOO seam: another penalty in the reward, in the loss, or in both, and one forward pass where TRL makes two."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from .. import kl
from .baseline import without_baseline
from .scoring import Scored
from .seam import Seam, unknown_order


@dataclass
class Batch:
    """A generation batch, while it is made, and what its loss needs of it."""

    under_way: bool = True
    scored: list[Scored] = field(default_factory=list)  # policy, reference
    rollout: kl.Rollout | None = None
    rewards: torch.Tensor | None = None  # (B of all processes, functions)
    penalty: torch.Tensor | None = None  # (B,), what beta is multiplied with in the reward
    ref_head: kl.LMHead | None = None
    graph: Scored | None = None  # the policy's score with its graph, for a loss that uses it
    estimates: dict = field(default_factory=dict)  # and the full-vocabulary estimates that were made of it


@dataclass
class LossPass:
    """One micro-batch's loss under way: its rows of the batch, and the policy's score."""

    rows: torch.Tensor | None
    scored: Scored | None = None


class RLOOSeam(Seam):
    """Wraps three bound methods of a stock `RLOOTrainer`.

    In the reward: where TRL asks for the reference's log-probabilities, the second of two calls, it returns values
    whose difference to the policy's sums to `penalty(rollout)` under the mask. TRL does the rest: gathering, beta,
    baseline, advantages. In the loss: the reference is added to the batch that TRL shuffles and splits, and `beta`
    times the mean of `penalty(rollout)` is added to TRL's loss.
    """

    def __init__(self, trainer):
        super().__init__(trainer)
        self.baseline = True
        self.one_forward = False  # the loss uses the policy's scoring pass and its graph
        self.batch: Batch | None = None
        self.loss_pass: LossPass | None = None
        self.stock.calculate_rewards = trainer._calculate_rewards
        trainer._calculate_rewards = self.calculate_rewards
        trainer._generate_and_score_completions = self.generate_and_score
        trainer._get_per_token_logps_and_entropies = self.get_logps
        trainer._compute_loss = self.compute_loss

    def use_penalty(self, penalty) -> None:
        self.check_reference()
        if penalty.full_vocabulary:
            self.scorer.need_hidden_states(with_gradient=penalty.in_loss)
        self.penalty = penalty

    @property
    def last_penalty(self) -> torch.Tensor | None:
        return None if self.batch is None else self.batch.penalty

    def use_one_forward(self) -> bool:
        """Let the loss use the policy's scoring pass and its graph; `False` where a batch is not one update.

        On policy the loss's forward pass repeats the scoring pass. It has to be made anew after an update
        (`num_iterations`, `steps_per_generation`), under gradient checkpointing, which it would defeat, with a
        load-balancing loss, on several processes, and with a head that PEFT freezes while the adapter is off.
        """
        trainer, args = self.trainer, self.trainer.args
        self.one_forward = (
            trainer.num_iterations == 1
            and args.steps_per_generation == 1
            and trainer.accelerator.num_processes == 1
            and not args.gradient_checkpointing
            and not trainer.aux_loss_enabled
            and not self.scorer.head_of_peft
        )
        return self.one_forward

    @property
    def in_loss(self) -> bool:
        return self.penalty is not None and self.penalty.in_loss

    @property
    def is_stock(self) -> bool:
        """Whether TRL makes the penalty of its own log-probabilities, every number the same bit for bit."""
        return self.penalty is None or (self.penalty.is_stock and not self.scorer.own_head)

    def generate_and_score(self, inputs):
        beta, self.batch, self.loss_pass = self.beta, (batch := Batch()), None
        output = self.stock.generate_and_score(inputs)
        if len(batch.scored) != (expected := 1 if beta == 0 else 2):
            raise unknown_order(
                f"asked for log-probabilities {len(batch.scored)} times in a generation batch, expected {expected}"
            )
        batch.under_way, batch.scored, rollout = False, [], batch.rollout
        if not self.baseline:
            output["advantages"] = without_baseline(self, output["advantages"])
        if batch.graph is not None:
            output["kl_row"] = torch.arange(len(output["old_logps"]), device=output["old_logps"].device)
        if rollout is not None:
            if not self.is_stock and beta != 0:
                # TRL logged the penalty under `kl`, which means the mean log-ratio in nats per token.
                self.metrics["kl"][-1] = self.mean_per_token(rollout.ref_log_ratio, rollout.completion_mask)
            if self.in_loss:
                output["kl_ref_logps"] = rollout.ref_logps
                if rollout.hidden is not None:
                    output["kl_ref_hidden"] = rollout.hidden.reference
        self.tell(rollout)
        return output

    def calculate_rewards(self, *args, **kwargs):
        rewards = self.stock.calculate_rewards(*args, **kwargs)
        if self.batch is not None:
            self.batch.rewards = rewards
        return rewards

    def get_logps(self, model, *asked, **kwargs):
        """TRL's method, its results recorded. A generation batch's second call is the reference's, or replaces it."""
        if self.loss_pass is not None:
            self.loss_pass.scored = self._score_for_loss(model, *asked, **kwargs)
            return self.loss_pass.scored.results
        batch = self.batch
        if batch is None or not batch.under_way:
            return self.scorer.score(model, *asked, **kwargs).results
        if batch.scored:
            return self._score_reference(model, *asked, **kwargs)
        keep_graph = self.one_forward and self.trainer.model.training
        with torch.enable_grad() if keep_graph else nullcontext():
            extra = {"compute_entropy": True} if keep_graph else {}  # for the loss; a reference's head has none
            scored = self.scorer.score_checked(model, *asked, **kwargs | extra)
        if keep_graph:
            results = scored.results[0].detach(), *scored.results[1:]
            batch.graph, scored = scored, replace(scored, logps=scored.logps.detach(), results=results)
        batch.scored.append(scored)
        if self.beta == 0 and self.scorer.at_beta_zero:
            self._make_rollout(self.scorer.score_reference(model, *asked, **kwargs), model, *asked, **kwargs)
        return scored.results

    def _score_reference(self, model, *asked, **kwargs):
        own = self.scorer.own_reference is not None
        scored = (self.scorer.score_reference if own else self.scorer.score)(model, *asked, **kwargs)
        batch, logps = self.batch, scored.results[0]
        batch.scored.append(scored)
        self._make_rollout(scored, model, *asked, **kwargs)
        rollout = batch.rollout
        if self.is_stock:
            batch.penalty = kl.reduce_per_sequence(rollout.ref_log_ratio, rollout.completion_mask, "sum")
        else:
            batch.penalty = self.penalty(rollout)
            if not self.penalty.in_reward:
                batch.penalty = torch.zeros_like(batch.penalty)
            # Log-probabilities whose masked difference to the policy's is the penalty: all of it on one token.
            logps = batch.scored[0].results[0].clone()
            logps[:, 0] -= batch.penalty
        return logps, *scored.results[1:]

    def _make_rollout(self, reference: Scored, model, *asked, **kwargs) -> None:
        batch, base_logps = self.batch, self.scorer.base_logps(model, *asked, **kwargs)
        batch.ref_head = reference.head
        batch.rollout = self.scorer.rollout(batch.scored[0], reference, *asked[:2], base_logps)
        if batch.graph is not None and self.in_loss:
            batch.rollout = replace(batch.rollout, graphs=batch.estimates)

    def _score_for_loss(self, model, *asked, **kwargs) -> Scored:
        """The generation batch's own score with its graph, where it was kept, in the loss's shuffled order."""
        rows, batch = self.loss_pass.rows, self.batch
        if rows is None or batch.graph is None:
            return self.scorer.score(model, *asked, **kwargs)
        kept, batch.graph = batch.graph, None
        states = None if kept.states is None else kept.states[rows]
        results = kept.results[0][rows], kept.results[1][rows], None
        return Scored(kept.logps[rows] if self.scorer.own_head else results[0], results, states, kept.head)

    def compute_loss(self, model, inputs):
        self.loss_pass = loss_pass = LossPass(inputs.get("kl_row"))
        loss = self.stock.compute_loss(model, inputs)
        self.check_loss(loss)
        scored, self.loss_pass = loss_pass.scored, None
        if scored is not None:
            self.log_rollout_kl(scored.results[0], inputs)
        if not self.in_loss or self.beta == 0:
            return loss
        if scored is None or "kl_ref_logps" not in inputs:
            raise unknown_order("computed a loss without log-probabilities of its batch")
        mask, ref_hidden = inputs["completion_mask"], inputs.get("kl_ref_hidden")
        estimates, self.batch.estimates = self.batch.estimates, {}
        known = {key: values[loss_pass.rows] for key, values in estimates.items()}
        hidden = scored.with_reference(ref_hidden, self.batch.ref_head)
        logps = scored.logps, inputs["kl_ref_logps"]
        penalty = self.penalty(kl.Rollout(*logps, inputs["completion_ids"], mask, hidden, known))
        # Completions of an earlier policy (num_iterations > 1) are weighted to the present one, within the clip range.
        ratio = ((scored.results[0].detach() * mask).sum(1) - inputs["old_logps"]).exp()
        weight = ratio.clamp(1 - self.trainer.epsilon_low, 1 + self.trainer.epsilon_high)
        return loss + self.beta * (weight * penalty).mean()
