"""The KL penalty as an instrument, for TRL's stock RLOO trainer."""

from .adapters import (
    MovingAverageReferenceCallback,
    ReferenceCallback,
    ResetReferenceCallback,
    default_lora_config,
    load_adapter,
)
from .callbacks import (
    KLControlCallback,
    KLMonitorCallback,
    KLPenaltyCallback,
    MetricsFileCallback,
    StoryProgressCallback,
    StoryTableCallback,
)
from .evaluation import Judgement, judge
from .figures import plot_curves
from .generation import use_fast_sampling
from .guard import CollapseGuardCallback, CollapseLimits
from .rewards import alliteration_reward

__version__ = "0.1.0"
__all__ = [
    "CollapseGuardCallback",
    "CollapseLimits",
    "Judgement",
    "KLControlCallback",
    "KLMonitorCallback",
    "KLPenaltyCallback",
    "MetricsFileCallback",
    "MovingAverageReferenceCallback",
    "ReferenceCallback",
    "ResetReferenceCallback",
    "StoryProgressCallback",
    "StoryTableCallback",
    "alliteration_reward",
    "default_lora_config",
    "judge",
    "load_adapter",
    "plot_curves",
    "use_fast_sampling",
]
