"""What the RLOO and the GRPO seam share: the trainer's own methods, observers, metrics, the last generation batch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import trl

from .. import kl
from .scoring import Scorer

READ_FROM = "1.16.0"
METHODS = (
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_calculate_rewards",
    "_compute_loss",
    "_load_from_checkpoint",
)
ATTRIBUTES = ("beta", "ref_model", "temperature", "num_iterations", "aux_loss_enabled", "_metrics", "_logs", "_step")


class UnknownTRLError(RuntimeError):
    """The installed TRL is not one whose private names and call order this package knows."""


def unknown_order(what: str) -> UnknownTRLError:
    """The error for a trainer that has the private names but calls them in another order."""
    return UnknownTRLError(f"trl {trl.__version__} {what}: kl_alliteration was written against trl {READ_FROM}")


def check_trainer(trainer, needs: tuple[str, ...] = ()) -> None:
    """Refuse, by name, a trainer without the private names that this package was written against."""
    missing = [name for name in METHODS + ATTRIBUTES + needs if not hasattr(trainer, name)]
    if missing:
        raise UnknownTRLError(
            f"{type(trainer).__name__} of trl {trl.__version__} has no {', '.join(missing)}; kl_alliteration was "
            f"written against trl {READ_FROM}'s RLOOTrainer and GRPOTrainer: install that version or a newer "
            "kl_alliteration"
        )


@dataclass
class Price:
    """What beta is made of."""

    owner: str | None = None  # the callback that moves it
    with_penalty: bool = False  # and the penalty's budget
    asked: float | None = None  # by that; `None` is the trainer's own option
    stronger: float = 1.0  # times that, by rollbacks of a guard


class Seam:
    """Wraps bound methods of one stock trainer. Callbacks reach the trainer's private parts only through it."""

    NEEDS: tuple[str, ...] = ()  # what only this kind of trainer has

    def __init__(self, trainer):
        check_trainer(trainer, self.NEEDS)
        self.trainer, self.scorer = trainer, Scorer(trainer)
        self.penalty: Callable[[kl.Rollout], torch.Tensor] | None = None  # a `KLPenalty`; `None` is TRL's own
        self.price = Price()
        self.observers: list[Callable[[kl.Rollout], None]] = []  # called after every batch with a reference
        self.after_batch: list[Callable[[kl.Rollout | None], None]] = []  # and after every one
        self.watch_rollout_policy = False  # log, in the loss, how far the policy is from the one that sampled
        self.stock = SimpleNamespace(
            generate_and_score=trainer._generate_and_score_completions,
            compute_loss=trainer._compute_loss,
            load_from_checkpoint=trainer._load_from_checkpoint,
        )
        trainer._load_from_checkpoint = self.load_from_checkpoint

    def use_penalty(self, penalty) -> None:
        raise NotImplementedError

    def use_loaded_reference(self, path: str | None = None, on_cpu: bool = False) -> None:
        self.scorer.load_reference(path, on_cpu)

    def check_reference(self) -> None:
        """`ValueError` where there is a reference and it is not what it seems."""
        if self.beta != 0 or self.scorer.at_beta_zero:
            self.scorer.check_reference()

    @property
    def is_as_sampled(self) -> bool:
        """Whether the policy is scored over the tokens that truncated sampling leaves."""
        return self.scorer.truncate is not None

    @property
    def last_penalty(self) -> torch.Tensor | None:
        """(B,), what beta was last multiplied with in the reward; `None` where the penalty is not in the reward."""
        return None

    @property
    def beta(self) -> float:
        return self.trainer.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self.trainer.beta = value

    @property
    def batch_is_used_up(self) -> bool:
        """Whether a new generation batch comes next: a price that moved before would part its reward from its loss."""
        return self.trainer._step % self.passes == 0

    @property
    def passes(self) -> int:  # micro-batches that a generation batch comes to
        return self.trainer.args.steps_per_generation * self.trainer.num_iterations

    @property
    def is_one_update(self) -> bool:
        """Whether a generation batch is within one update: the policy that learns of it is the one that sampled it."""
        return self.trainer.args.gradient_accumulation_steps % self.passes == 0

    def own_price(self, owner: str, penalty=None) -> None:
        """Let one callback move beta, and with a `penalty` that too; `ValueError` where another does already."""
        if self.price.owner is not None:
            raise ValueError(f"beta is moved by {self.price.owner} already: {owner} wants a trainer of its own")
        if penalty is not None:
            self.use_penalty(penalty)
        self.price.owner, self.price.with_penalty = owner, penalty is not None

    def charge(self, beta: float | None) -> None:
        """Let beta be what is asked for, times what rollbacks have come to."""
        self.price.asked = beta
        self.beta = self.price.stronger * (self.trainer.args.beta if beta is None else beta)

    def strengthen(self, factor: float) -> None:
        """Raise beta by so much in all, whatever moves it, and until the run ends."""
        self.price.stronger = factor
        self.charge(self.price.asked)

    def load_from_checkpoint(self, checkpoint, *args, **kwargs):
        """Loads the trained adapter too: transformers before 5.23 skips it if `ref` is saved beside it."""
        self.stock.load_from_checkpoint(checkpoint, *args, **kwargs)
        if self.scorer.has_free_reference and Path(checkpoint, "adapter_model.safetensors").is_file():
            self.trainer.accelerator.unwrap_model(self.trainer.model).load_adapter(
                checkpoint, "default", is_trainable=True
            )

    def tell(self, rollout: kl.Rollout | None) -> None:
        if rollout is not None:
            with torch.no_grad():
                for observe in self.observers:
                    observe(rollout)
        for observe in self.after_batch:
            observe(rollout)

    def checked(self, loss: torch.Tensor) -> torch.Tensor:
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()}")
        return loss

    def log_rollout_kl(self, logps: torch.Tensor, mask: torch.Tensor, old_logps: torch.Tensor | None) -> None:
        """`kl/rollout_per_sequence` of a micro-batch: how far the policy is from the one that sampled it, (B,)."""
        if self.watch_rollout_policy and self.trainer.model.training and old_logps is not None:
            gather = self.trainer.accelerator.gather
            moved = gather(old_logps - (logps.detach() * mask).sum(1))[gather(mask.sum(1)) > 0]
            if len(moved):
                self.metrics["kl/rollout_per_sequence"].append(moved.mean().item())

    def mean_per_token(self, values: torch.Tensor, mask: torch.Tensor) -> float:
        """Mean of (B, T) values over the counted tokens of all processes: sums and counts are reduced, not means."""
        sums = torch.stack([(values * mask).sum(), mask.sum().float()])
        total, count = self.trainer.accelerator.reduce(sums, reduction="sum")
        return (total / count.clamp(min=1)).item()

    def mean_per_sequence(self, values: torch.Tensor, mask: torch.Tensor) -> float:
        """Mean over [`of_texts`]; 0 where none counts."""
        found = self.of_texts(values, mask)
        return found.mean().item() if len(found) else 0.0

    def of_texts(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N,), what (B, T) values sum to under the mask, of the completions of all processes of which a token counts.

        None does of a truncated one under `mask_truncated_completions`.
        """
        gather = self.trainer.accelerator.gather
        return gather((values * mask).sum(-1))[gather(mask.sum(-1)) > 0]

    @property
    def metrics(self) -> dict[str, list[float]]:
        """TRL's metrics of the mode that it is in, averaged and emptied at the next log."""
        return self.trainer._metrics["train" if self.trainer.model.training else "eval"]


def last_completions(trainer) -> tuple[list, list, dict[str, list[float]]]:
    """`(prompts, completions, rewards by function name)` of the last generation batch, over all processes."""
    logs = trainer._logs
    rewards = {name: list(values) for name, values in logs["rewards"].items()}
    return list(logs["prompt"]), list(logs["completion"]), rewards


def forget_batches(trainer) -> None:
    """Make `train` begin with a new generation batch, as a new trainer's would."""
    trainer._step, trainer._buffered_inputs = 0, None
