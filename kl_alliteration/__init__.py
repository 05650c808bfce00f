"""Choose, bound and monitor the KL penalty of TRL's stock trainers. `kl_alliteration.lab` makes whole runs of it."""

from .adapters import default_lora_config, load_adapter
from .control import KLControlCallback
from .credit import use_kl_to_go, use_reward_to_go
from .evaluation import Judgement, judge
from .guard import CollapseGuardCallback, CollapseLimits
from .health import KLHealthCallback
from .monitor import KLMonitorCallback
from .penalty import KLPenalty, KLPenaltyCallback
from .plots import PlotMonitorCallback, Plots
from .references import MovingAverageReferenceCallback, ReferenceCallback, ResetReferenceCallback
from .rewards import alliteration_reward
from .sampling import score_as_sampled, use_fast_sampling, use_sampler_correction
from .shared_prompts import share_prompts
from .target import KLTargetCallback

__version__ = "0.2.0"
__all__ = [
    "CollapseGuardCallback",
    "CollapseLimits",
    "Judgement",
    "KLControlCallback",
    "KLHealthCallback",
    "KLMonitorCallback",
    "KLPenalty",
    "KLPenaltyCallback",
    "KLTargetCallback",
    "MovingAverageReferenceCallback",
    "PlotMonitorCallback",
    "Plots",
    "ReferenceCallback",
    "ResetReferenceCallback",
    "alliteration_reward",
    "default_lora_config",
    "judge",
    "load_adapter",
    "score_as_sampled",
    "share_prompts",
    "use_fast_sampling",
    "use_kl_to_go",
    "use_reward_to_go",
    "use_sampler_correction",
]
