"""The GRPO seam, which only observes: GRPO has its own penalty, k3, in its loss. The run's numbers stay the same."""

import dataclasses
import inspect

import torch

from .seam import Seam


class GRPOSeam(Seam):
    """Wraps two bound methods of a stock `GRPOTrainer`, so that its completions can be watched."""

    def __init__(self, trainer):
        super().__init__(trainer)
        self.scorer.places = False  # but while it looks on
        trainer._generate_and_score_completions = self.generate_and_observe
        trainer._compute_loss = self.compute_loss

    def use_penalty(self, penalty) -> None:
        raise ValueError(
            f"{type(self.trainer).__name__} has its own penalty, k3 in the loss, and no place for another: take "
            "RLOOTrainer, or watch and steer GRPO's beta with KLMonitorCallback and KLControlCallback"
        )

    def use_loaded_reference(self) -> None:
        raise ValueError(
            f"{type(self.trainer).__name__} takes its own penalty from the model with the adapter off: take "
            "RLOOTrainer, or an adapter that leaves its base as it is"
        )

    def use_one_forward(self) -> bool:
        return False

    def generate_and_observe(self, inputs):
        """Make a generation batch and its rollout. On policy TRL does not score the policy there, so this does.

        It scores without a gradient and restores the random state, so that training is the same as without observers.
        """
        output, rollout = self.stock.generate_and_score(inputs), None
        trainer, scorer = self.trainer, self.scorer
        if self.observers and (self.beta != 0 or scorer.at_beta_zero):
            ids, mask = (
                torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
            )
            length, accepted = output["completion_ids"].shape[1], inspect.signature(scorer.get_logps).parameters
            seen = {name: output[name] for name in accepted if name in output}  # images and what goes with them
            asked = trainer.model, ids, mask, length, trainer.args.per_device_train_batch_size
            device = trainer.accelerator.device
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), scorer.placed():
                policy = scorer.score_checked(*asked, **seen)
                reference, base_logps = scorer.score_reference(*asked, **seen), scorer.base_logps(*asked, **seen)
                rollout = scorer.rollout(policy, reference, ids, mask, base_logps)
                if "tool_mask" in output:  # what tools and environments wrote is not the policy's
                    own = rollout.completion_mask * output["tool_mask"]
                    rollout = dataclasses.replace(rollout, completion_mask=own)
        self.tell(rollout)
        return output

    def compute_loss(self, model, inputs):
        loss = self.stock.compute_loss(model, inputs)
        self.check_loss(loss)
        return loss
