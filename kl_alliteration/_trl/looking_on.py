"""A generation batch of GRPO scored for those who watch, beside what TRL makes of it."""

import dataclasses
import inspect

import torch

from .. import kl


def look_on(seam, output: dict) -> kl.Rollout | None:
    """Its rollout; `None` where nobody watches. On policy TRL does not score the policy there, so this does.

    It scores without a gradient and restores the random state, so that training is the same as without observers.
    """
    trainer, scorer = seam.trainer, seam.scorer
    if not seam.observers or (seam.beta == 0 and not scorer.at_beta_zero):
        return None
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
    if "tool_mask" not in output:
        return rollout
    own = rollout.completion_mask * output["tool_mask"]  # what tools and environments wrote is not the policy's
    return dataclasses.replace(rollout, completion_mask=own)
