"""GRPO's options under penalties that are not its own: every batch and every loss against the model's own logits."""

import pytest
import test_options
from runs import now_and_then, reward
from test_options import ADAPTERS, GRADIENT_OFF, OFF, PENALTIES, check, folders, later, words  # noqa: F401
from trl import GRPOConfig, GRPOTrainer
from truth import GRPOOracle

from kl_alliteration import KLPenalty
from kl_alliteration._trl.grpo import GRPOSeam

EXACT = KLPenalty("exact", "both", budget_per_token=0.05)
NOT_ITS_OWN = [p for p in PENALTIES if (p.estimator, p.placement, p.reduction) != ("k3", "loss", "sum")]
A_FEW = {
    KLPenalty("k1", top_k=8),
    KLPenalty("k2", "loss", "mean", top_k=8),
    KLPenalty("exact", "both", budget_per_token=0.2, top_k=8),
    KLPenalty("top_k", "both", top_k=8),
}


def worst_of(folder, penalty=EXACT, **options) -> dict:
    return test_options.worst_of(folder, penalty, kind=(GRPOTrainer, GRPOConfig, GRPOOracle), **options)


@pytest.mark.parametrize("penalty", [later(p, A_FEW) for p in NOT_ITS_OWN], ids=lambda p: words(p).replace(" ", "-"))
def test_a_penalty_is_right(folders, penalty):  # noqa: F811
    check(worst_of(folders("llama"), penalty))


OPTIONS = {
    "num_iterations": ({"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2}, (2, 4)),
    "accumulation": ({"gradient_accumulation_steps": 2, "max_steps": 2}, (2, 4)),
    "steps_per_generation": ({"steps_per_generation": 3}, (1, 3)),
    "narrow clipping": ({"num_iterations": 3, "epsilon": 0.01, "learning_rate": 1e-2}, (1, 3)),
    "ratio of the sequence": ({"num_iterations": 2, "importance_sampling_level": "sequence", "max_steps": 2}, (1, 2)),
    "two rewards, one not always": (
        {"reward_funcs": [reward, now_and_then], "reward_weights": [0.7, 1.3]}, (3, 3)
    ),
    "a reward that is not always there": ({"reward_funcs": now_and_then, "num_generations": 4}, (3, 3)),
    "rewards not scaled": ({"scale_rewards": "none"}, (3, 3)),
    "scaled by the batch": ({"scale_rewards": "batch"}, (3, 3)),
    "truncated completions masked": ({"mask_truncated_completions": True}, (3, 3)),
    "loss grpo": ({"loss_type": "grpo"}, (3, 3)),
    "loss bnpo": ({"loss_type": "bnpo"}, (3, 3)),
    "loss dr_grpo": ({"loss_type": "dr_grpo"}, (3, 3)),
    "loss luspo": ({"loss_type": "luspo"}, (3, 3)),
    "loss grpo, accumulation": (
        {"loss_type": "grpo", "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 2}, (1, 4)
    ),
    "gradient checkpointing": ({"gradient_checkpointing": True}, (3, 3)),
    "transformers samples": ({"fast": False}, (3, 3)),
}  # fmt: skip
FEW_OPTIONS = {"num_iterations", "accumulation", "two rewards, one not always", "loss grpo", "steps_per_generation"}


@pytest.mark.parametrize("option", [later(o, FEW_OPTIONS) for o in OPTIONS])
def test_an_option_is_right(folders, option):  # noqa: F811
    options, counts = OPTIONS[option]
    check(worst_of(folders("llama"), **options), *counts)


@pytest.mark.parametrize(
    "kind", [later(k, {"lora", "dora"}) for k in ("lora", "dora", "modules_to_save norms", "ia3")]
)
def test_an_adapter_is_right(folders, kind):  # noqa: F811
    check(worst_of(folders("llama"), scale=1.0, peft_config=ADAPTERS[kind]()))


@pytest.mark.parametrize("broken", ["scale", "divisor"])
def test_the_oracle_sees_what_is_wrong(folders, monkeypatch, broken):  # noqa: F811
    """The loss's half at another price than the reward's; a completion divided by another's length."""
    if broken == "scale":
        stock = GRPOSeam._put_right
        monkeypatch.setattr(GRPOSeam, "_put_right", lambda self, out: stock(self, out) or out.pop("kl_scale"))
    else:
        monkeypatch.setattr("kl_alliteration._trl.grpo.divisor_of_completions", lambda trainer, inputs, mask: 1.0)
    worst = worst_of(folders("llama"), KLPenalty("exact", "both"), max_steps=1)
    assert worst["loss"] > 5 * OFF or worst["gradient"] > 5 * GRADIENT_OFF, worst
