"""A pytest plugin: every `GRPOTrainer` and `RLOOTrainer` that is made has this package's callbacks in it.

`KL_ALLITERATION_PENALTY` is `own`, TRL's penalty as it is, or `exact`: the exact KL in both.
"""

import functools
import os

from trl import GRPOTrainer, RLOOTrainer

from kl_alliteration import CollapseGuardCallback, KLHealthCallback, KLMonitorCallback, KLPenalty, KLPenaltyCallback


def with_callbacks(make):
    @functools.wraps(make)
    def made(trainer, *args, **kwargs):
        make(trainer, *args, **kwargs)
        exact = os.environ.get("KL_ALLITERATION_PENALTY") == "exact"
        trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both") if exact else None))
        for callback in (KLMonitorCallback, KLHealthCallback):
            trainer.add_callback(callback(trainer))
        trainer.add_callback(CollapseGuardCallback(trainer, "warn"))

    made.with_callbacks = True
    return made


for trainer_class in (GRPOTrainer, RLOOTrainer):
    trainer_class.__init__ = with_callbacks(trainer_class.__init__)
