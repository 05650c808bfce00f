"""Twenty families with shared prompts: a step against the model's own logits, full and LoRA, ragged prompts."""

import pytest
from families import build, move
from peft import LoraConfig
from runs import save, stock_trainer
from truth import Oracle

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, share_prompts
from kl_alliteration._trl import seam_of

pytestmark = pytest.mark.filterwarnings("ignore::kl_alliteration.kl.KLWarning")
OFF = 1e-3  # largest difference of a number, and of a gradient in relation to its norm
PENALTY = KLPenalty("exact", "both")
SHARED = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "cohere",
    "stablelm", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "deepseek_v3", "exaone4", "codegen",
)  # fmt: skip
ASIDE = {
    "mamba": "no cache", "rwkv": "no cache", "qwen3_next": "LinearAttentionLayer", "falcon_h1": "Error",
    "zaya": "Error", "roberta": "states are", "qwen3_moe": "output_router_logits", "cpmant": "Error",
}  # fmt: skip


def step(family: str, folder, lora: bool, **options) -> tuple[dict, list]:
    """The largest differences of a generation batch and its losses, and each scoring model's `SharedPrompts`."""
    save(build(family), folder)
    if lora:
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = stock_trainer(folder, num_generations=4, **options)
    move(trainer.model)
    trainer.add_callback(KLPenaltyCallback(trainer, PENALTY))
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    share_prompts(trainer)
    oracle = Oracle(trainer, PENALTY)
    trainer.train()
    assert oracle.exact_per_token > 1e-5
    return oracle.worst, list(seam_of(trainer).scorer._shared.values())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", SHARED)
def test_a_family_s_numbers_are_the_model_s_own(family, lora, tmp_path):
    """Two groups of four, each of them cut by the four micro-batches that TRL shuffles them into."""
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    worst, shared = step(family, tmp_path, lora, **cut)
    assert all(each.off is None and each.proven for each in shared)
    assert max(worst.values()) < OFF, worst


@pytest.mark.parametrize("family", ASIDE)
def test_a_family_whose_cache_cannot_steps_aside(family, tmp_path):
    worst, shared = step(family, tmp_path, lora=False, per_device_train_batch_size=8)
    assert ASIDE[family] in shared[0].off
    assert max(worst.values()) < OFF, worst
