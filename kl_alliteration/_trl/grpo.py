"""The GRPO seam. Its penalty, k3, is in its own loss: what is here looks on, and changes no number of the run."""

import torch

from .seam import Seam


class GRPOSeam(Seam):
    """Wraps two bound methods of a stock `GRPOTrainer`, so that its completions can be watched."""

    def __init__(self, trainer):
        super().__init__(trainer)
        trainer._generate_and_score_completions = self.generate_and_observe
        trainer._compute_loss = self.compute_loss

    def use_penalty(self, penalty) -> None:
        raise ValueError(
            f"{type(self.trainer).__name__} has its own penalty, k3 in the loss, and no place for another: take "
            "RLOOTrainer, or watch and steer GRPO's beta with KLMonitorCallback and KLControlCallback"
        )

    def use_one_forward(self) -> bool:
        return False

    def generate_and_observe(self, inputs):
        """A generation batch, and its rollout: on policy TRL does not score the policy there, so it is done here.

        Without a gradient and with the random state put back: training is what it would be without anybody looking on.
        """
        output, rollout = self.stock.generate_and_score(inputs), None
        trainer, scorer = self.trainer, self.scorer
        if self.observers and (self.beta != 0 or scorer.at_beta_zero):
            ids, mask = (
                torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
            )
            length = output["completion_ids"].shape[1]
            asked = trainer.model, ids, mask, length, trainer.args.per_device_train_batch_size
            device = trainer.accelerator.device
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                policy, reference = scorer.score(*asked), scorer.score_reference(*asked)
                rollout = scorer.rollout(policy, reference, ids, mask, scorer.base_logps(*asked))
        self.tell(rollout)
        return output

    def compute_loss(self, model, inputs):
        loss = self.stock.compute_loss(model, inputs)
        self.check_loss(loss)
        return loss
