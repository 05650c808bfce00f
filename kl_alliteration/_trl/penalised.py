"""What a seam that places a penalty shares, RLOO's and GRPO's: the batch under way, the loss's part, one forward."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from .. import kl
from .scoring import Scored
from .seam import Seam, unknown_order
from .truncated import as_sampled


@dataclass
class Batch:
    """A generation batch, while it is made, and what its loss needs of it."""

    under_way: bool = True
    scored: list[Scored] = field(default_factory=list)  # in the order in which TRL asked
    asked: tuple | None = None  # the arguments and the options of that, where they are needed again
    own_tokens: list | None = None  # masks of the completions' tokens: 0 where a tool wrote
    rollout: kl.Rollout | None = None
    rewards: torch.Tensor | None = None  # (B of all processes, functions)
    rewarded: tuple | None = None  # what they are of: B rows of the data set, completions as TRL has them, tokens
    penalty: torch.Tensor | None = None  # (B,), what beta is multiplied with in the reward
    ref_head: kl.LMHead | None = None
    graph: Scored | None = None  # the policy's score with its graph, for a loss that uses it
    estimates: dict = field(default_factory=dict)  # and the full-vocabulary estimates that were made of it
    sampled: list | None = field(default_factory=list)  # (B, T) log-probabilities by a sampler, until it is made
    trusted: Callable | None = None  # of (log-probabilities, inputs): (B, T), 1 where a token's gradient counts


@dataclass
class LossPass:
    """One micro-batch's loss under way: the policy, its rows of the batch, and its score."""

    model: torch.nn.Module
    ids: torch.Tensor  # (B, P + T)
    rows: torch.Tensor | None
    weigh: Callable | None = None  # (B, T) log-probabilities -> (B, T) weights of their gradients, or `None`
    scored: Scored | None = None
    logps: torch.Tensor | None = None  # (B, T), the policy's, the gradient of each token weighted

    def take(self, scored: Scored) -> tuple:
        """What TRL makes its loss of."""
        self.scored, (logps, *others) = scored, scored.results
        held = logps.detach()
        weights = None if self.weigh is None else self.weigh(held)
        self.logps = logps if weights is None else held + weights * (logps - held)
        return self.logps, *others


class PenaltySeam(Seam):
    """A seam with a place for a [`~penalty.KLPenalty`]."""

    def __init__(self, trainer):
        super().__init__(trainer)
        self.changes: dict[str, Callable[[dict], None]] = {}  # of what a generation batch returns, one a name
        self.one_forward = False  # the loss uses the policy's scoring pass and its graph
        self.batch: Batch | None = None
        self.loss_pass: LossPass | None = None

    def use_penalty(self, penalty) -> None:
        if self.price.with_penalty:
            owner = self.price.owner
            raise ValueError(f"{owner} has set the penalty: hand it this one, {owner}(penalty=...)")
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

    def keep_sampled(self, logps: torch.Tensor) -> None:
        """What a sampler says of the tokens that it has just drawn, (B, T); of no interest outside of a batch."""
        if self.batch is not None and self.batch.sampled is not None:
            beyond = -logps.shape[1] % (self.trainer.pad_to_multiple_of or 1)  # columns that TRL adds
            self.batch.sampled.append(torch.nn.functional.pad(logps, (0, beyond), value=torch.nan))

    def tell(self, rollout: kl.Rollout | None, sampler_logps: torch.Tensor | None = None) -> None:
        """All observers; with what the sampler said, where it was asked once for the whole batch."""
        kept, self.batch.sampled = self.batch.sampled, None
        if sampler_logps is None and len(kept) == 1:
            sampler_logps = kept[0]
        if rollout is not None and sampler_logps is not None and sampler_logps.shape == rollout.logps.shape:
            rollout = replace(rollout, sampler_logps=sampler_logps)
        super().tell(rollout)

    @property
    def in_loss(self) -> bool:
        return self.penalty is not None and self.penalty.in_loss

    def _asks_for_loss(self, model, asked: tuple) -> bool:
        """Whether this is TRL's own question, and not one that a subclass has beside it: of which model and texts."""
        loss, unwrap = self.loss_pass, self.trainer.accelerator.unwrap_model
        if loss is None or loss.scored is not None or unwrap(model) is not unwrap(loss.model):
            return False
        with_gradient = torch.is_grad_enabled() or not self.trainer.model.training
        return with_gradient and asked[0].shape == loss.ids.shape and torch.equal(asked[0], loss.ids)

    def _begin_loss(self, model, inputs: dict, weigh: Callable | None = None) -> LossPass:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        self.loss_pass = LossPass(model, ids, inputs.get("kl_row"), weigh)
        return self.loss_pass

    def keep_rewards(self, rewards: torch.Tensor, rows, prompts, completions, completion_ids) -> None:
        if self.batch is not None:
            self.batch.rewards, self.batch.rewarded = rewards, (rows, completions, completion_ids)

    def _check_rows(self, output: dict) -> None:
        """What is kept of a batch, for its loss and for its tokens' credit, is of the rows as they were rewarded."""
        if not (self.in_loss or self.changes):
            return
        found, rewarded = output["completion_ids"].tolist(), [list(ids) for ids in self.batch.rewarded[2]]
        if len(found) != len(rewarded) or any(a[: len(b)] != b for a, b in zip(found, rewarded, strict=True)):
            raise ValueError(
                f"{type(self.trainer).__name__} returns other rows of a batch than were rewarded, or another order: a "
                "penalty in the loss and credit by token are of those. Put the penalty into the reward, and give the "
                "texts that shall not count no reward"
            )

    def _keep_for_loss(self, output: dict) -> None:
        """What the loss needs of the batch goes among that which TRL shuffles and splits."""
        batch = self.batch
        if batch.graph is not None:
            ids = output["completion_ids"]
            output["kl_row"] = torch.arange(len(ids), device=ids.device)
        if batch.rollout is not None and self.in_loss:
            output["kl_ref_logps"] = batch.rollout.ref_logps
            if batch.rollout.hidden is not None:
                output["kl_ref_hidden"] = batch.rollout.hidden.reference

    def _score_for_loss(self, model, *asked, **kwargs) -> Scored:
        """The generation batch's own score with its graph, where it was kept, in the loss's shuffled order."""
        rows, batch = self.loss_pass.rows, self.batch
        if rows is None or batch.graph is None:
            return as_sampled(self.scorer, self.scorer.score(model, *asked, **kwargs), *asked)
        kept, batch.graph = batch.graph, None
        states = None if kept.states is None else kept.states[rows]
        results = kept.results[0][rows], kept.results[1][rows], None
        return Scored(kept.logps[rows] if self.scorer.own_head else results[0], results, states, kept.head)

    def _penalty_of_loss(self, loss_pass: LossPass, inputs, mask, old_logps: torch.Tensor | None) -> torch.Tensor:
        """(B,) penalties of a micro-batch, with their gradient.

        Completions of an earlier policy (`num_iterations` > 1), whose log-probabilities (B,) were `old_logps`, are
        weighted to the present one, within the clip range.
        """
        scored, rows = loss_pass.scored, loss_pass.rows
        if scored is None or "kl_ref_logps" not in inputs:
            raise unknown_order("computed a loss without log-probabilities of its batch")
        estimates, self.batch.estimates = self.batch.estimates, {}
        known = {key: values[rows] for key, values in estimates.items()}
        hidden = scored.with_reference(inputs.get("kl_ref_hidden"), self.batch.ref_head)
        logps = scored.logps, inputs["kl_ref_logps"]
        penalty = self.penalty(kl.Rollout(*logps, inputs["completion_ids"], mask, hidden, known))
        return penalty if old_logps is None else self.ratios(scored, mask, old_logps)[1] * penalty

    def ratios(self, scored: Scored, mask: torch.Tensor, old_logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) of the policy over the one that sampled, and the same within the clip range."""
        ratio = ((scored.results[0].detach() * mask).sum(1) - old_logps).exp()
        return ratio, ratio.clamp(1 - self.trainer.epsilon_low, 1 + self.trainer.epsilon_high)

    def _head_of(self, reference: Scored) -> kl.LMHead | None:
        """The reference's head for a loss: a copy where it moves, or PEFT exchanges it, between a batch's updates."""
        head, moves = reference.head, self.trainer.args.sync_ref_model or self.scorer.head_of_peft
        if head is None or not (moves and self.in_loss) or self.is_one_update:
            return head
        return replace(head, weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())
