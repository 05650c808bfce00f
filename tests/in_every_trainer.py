"""A pytest plugin: every `GRPOTrainer` and `RLOOTrainer` that is made has this package's callbacks in it.

`KL_ALLITERATION_PENALTY` is `watched`, no penalty but TRL's; `own`, that penalty through `KLPenaltyCallback`; `exact`,
the exact KL in both; or `fast`, `own` with `use_fast_sampling` and `share_prompts`. Where a test leaves GRPO's beta at
TRL's 0, which is no penalty, it is 0.1, but for `watched`. `exact` is in the loss alone beside
`multi_objective_aggregation="normalize_then_sum"`, which has no place for it in the reward.
"""

import functools
import os

from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from kl_alliteration import (
    CollapseGuardCallback,
    KLHealthCallback,
    KLMonitorCallback,
    KLPenalty,
    KLPenaltyCallback,
    share_prompts,
    use_fast_sampling,
)

PENALTY = os.environ.get("KL_ALLITERATION_PENALTY", "own")


def with_beta(make):
    @functools.wraps(make)
    def made(config, *args, **kwargs):
        make(config, *args, **{"beta": 0.1} | kwargs)

    return made


def penalty_of(trainer) -> KLPenalty | None:
    if PENALTY != "exact":
        return None
    apart = getattr(trainer, "multi_objective_aggregation", "") == "normalize_then_sum"
    return KLPenalty("exact", "loss" if apart else "both")


def with_callbacks(make):
    @functools.wraps(make)
    def made(trainer, *args, **kwargs):
        make(trainer, *args, **kwargs)
        if PENALTY != "watched":
            trainer.add_callback(KLPenaltyCallback(trainer, penalty_of(trainer)))
        for callback in (KLMonitorCallback, KLHealthCallback):
            trainer.add_callback(callback(trainer))
        trainer.add_callback(CollapseGuardCallback(trainer, "warn"))
        if PENALTY == "fast":
            share_prompts(trainer)
            use_fast_sampling(trainer)

    made.with_callbacks = True
    return made


for trainer_class in (GRPOTrainer, RLOOTrainer):
    trainer_class.__init__ = with_callbacks(trainer_class.__init__)
if PENALTY != "watched":
    GRPOConfig.__init__ = with_beta(GRPOConfig.__init__)
