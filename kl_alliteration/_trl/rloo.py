"""The RLOO seam: another penalty in the reward, in the loss, or in both, and one forward pass where TRL makes two."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from .. import kl
from .baseline import share_of_ties
from .penalised import Batch, LossPass, PenaltySeam
from .scoring import Scored
from .seam import unknown_order
from .truncated import as_sampled


class RLOOSeam(PenaltySeam):
    """Wraps three bound methods of a stock `RLOOTrainer`.

    In the reward: where TRL asks for the reference's log-probabilities, the second of two calls, it returns values
    whose difference to the policy's sums to `penalty(rollout)` under the mask. TRL does the rest: gathering, beta,
    baseline, advantages. In the loss: the reference is added to the batch that TRL shuffles and splits, and `beta`
    times the mean of `penalty(rollout)` is added to TRL's loss.
    """

    OWN = ("k1", "reward")  # TRL's own penalty: estimator and placement
    LEAVES_ONE_OUT = True  # the baseline is the mean of the others in the group

    def __init__(self, trainer):
        super().__init__(trainer)
        self.stock.calculate_rewards = trainer._calculate_rewards
        trainer._calculate_rewards = self.calculate_rewards
        trainer._generate_and_score_completions = self.generate_and_score
        trainer._get_per_token_logps_and_entropies = self.get_logps
        trainer._compute_loss = self.compute_loss

    def use_penalty(self, penalty) -> None:
        if penalty.placement == "both" and self.trainer.normalize_advantages:
            raise ValueError(
                "normalize_advantages divides the half of a penalty that is in the reward by the batch's spread, and "
                "not the half in the loss: leave it out, or take placement 'reward'"
            )
        super().use_penalty(penalty)

    @property
    def is_stock(self) -> bool:
        """Whether TRL makes the penalty of its own log-probabilities, every number the same bit for bit."""
        return self.penalty is None or (self.penalty.is_stock and not self.scorer.own_head)

    def score_as_sampled(self, truncate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """From here on the policy is scored over the tokens that `truncate` leaves of (N, V) logits."""
        self.scorer.need_hidden_states(with_gradient=True)
        self.scorer.truncate = truncate

    def generate_and_score(self, inputs):
        beta, self.batch, self.loss_pass = self.beta, (batch := Batch()), None
        output = self.stock.generate_and_score(inputs)
        if len(batch.scored) != (expected := 1 if beta == 0 else 2):
            raise unknown_order(
                f"asked for log-probabilities {len(batch.scored)} times in a generation batch, expected {expected}"
            )
        self._check_rows(output)
        for change in self.changes.values():
            change(output)
        batch.under_way, batch.scored, rollout = False, [], batch.rollout
        self._keep_for_loss(output)
        if rollout is not None and not self.is_stock and beta != 0:
            # TRL logged the penalty under `kl`, which means the mean log-ratio in nats per token, and counted the
            # groups whose rewards less the penalty tie, which few do.
            self.metrics["kl"][-1] = self.mean_per_token(rollout.ref_log_ratio, rollout.completion_mask)
            self.metrics["frac_reward_zero_std"][-1] = share_of_ties(self.trainer, batch.rewards)
        self.tell(rollout)
        return output

    def calculate_rewards(self, *args, **kwargs):
        rewards = self.stock.calculate_rewards(*args, **kwargs)
        self.keep_rewards(rewards, *args, **kwargs)
        return rewards

    def get_logps(self, model, *asked, **kwargs):
        """TRL's method, its results recorded. A generation batch's second call is the reference's, or replaces it."""
        if self._asks_for_loss(model, asked):
            return self.loss_pass.take(self._score_for_loss(model, *asked, **kwargs))
        batch = self.batch
        if batch is None or not batch.under_way:
            return self.scorer.score(model, *asked, **kwargs).results
        if batch.scored:
            return self._score_reference(model, *asked, **kwargs)
        keep_graph = self.one_forward and self.trainer.model.training
        with torch.enable_grad() if keep_graph else nullcontext():
            extra = {"compute_entropy": True} if keep_graph else {}  # for the loss; a reference's head has none
            scored = as_sampled(self.scorer, self.scorer.score_checked(model, *asked, **kwargs | extra), *asked)
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
        batch.ref_head = self._head_of(reference)
        batch.rollout = self.scorer.rollout(batch.scored[0], reference, *asked[:2], base_logps)
        if batch.graph is not None and self.in_loss:
            batch.rollout = replace(batch.rollout, graphs=batch.estimates)

    def credit_tokens(self, output: dict, credit: torch.Tensor) -> torch.Tensor:
        """Give tokens what (B, T) says on top of their completion's advantage; returns theirs in all, (B, T)."""
        output["kl_credit"] = output.get("kl_credit", 0.0) + credit
        return output["advantages"].unsqueeze(1) + output["kl_credit"]

    def token_weights(self, inputs, logps: torch.Tensor) -> torch.Tensor | None:
        """(B, T), what each token's gradient in TRL's loss is multiplied with; `None` where that is 1."""
        weights, trusted = inputs.get("kl_token_weights"), self.batch and self.batch.trusted
        if trusted is None or weights is None:
            return weights
        return weights * trusted(logps, inputs)

    def compute_loss(self, model, inputs):
        loss_pass = self._begin_loss(model, inputs, partial(self.token_weights, inputs))
        loss = self.stock.compute_loss(model, inputs)
        scored, self.loss_pass = loss_pass.scored, None
        if scored is not None:
            self.log_rollout_kl(scored.results[0], inputs["completion_mask"], inputs["old_logps"])
        if self.in_loss and self.beta != 0:
            penalty = self._penalty_of_loss(loss_pass, inputs, inputs["completion_mask"], inputs["old_logps"])
            loss = loss + self.beta * (penalty * inputs.get("kl_text_weights", 1.0)).mean()
        if "kl_credit" in inputs:
            loss = loss - self._credit_of_loss(loss_pass, inputs)
        return self.checked(loss)

    def _credit_of_loss(self, loss_pass: LossPass, inputs: dict) -> torch.Tensor:
        """A value of 0, and the gradient of each token's own advantage in place of its completion's.

        TRL's loss has the smaller of ratio times advantage and clipped ratio times advantage, so that a completion
        beyond the clip range has no gradient that would move it further: a token has none by its own advantage.
        """
        ratio, clipped = self.ratios(loss_pass.scored, inputs["completion_mask"], inputs["old_logps"])
        ratio, clipped, of_text = (each.unsqueeze(1) for each in (ratio, clipped, inputs["advantages"]))
        by_token, by_text = (
            torch.where(ratio * each <= clipped * each, ratio * each, 0.0)
            for each in (of_text + inputs["kl_credit"], of_text)
        )
        return ((by_token - by_text) * (loss_pass.logps - loss_pass.logps.detach())).sum(1).mean()
