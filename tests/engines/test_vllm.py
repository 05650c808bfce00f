"""Stock RLOO sampled by a real vLLM in the trainer's process: penalties, instruments, LoRA, the sync of weights.

Needs `make engines`.
"""

import functools
import math
import os
import time
from contextlib import nullcontext

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest
import torch
from conftest import TINY_RUN, WORDS, reward, word_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed
from trl import RLOOConfig, RLOOTrainer
from trl.generation import vllm_generation

pytest.importorskip("vllm", reason="needs make engines")

from vllm import LLM
from vllm.model_executor.layers import utils

from kl_alliteration import (
    CollapseGuardCallback,
    KLControlCallback,
    KLHealthCallback,
    KLMonitorCallback,
    KLPenalty,
    KLPenaltyCallback,
    kl,
)
from kl_alliteration._trl import seam_of
from kl_alliteration.control import LogPIRule
from kl_alliteration.story_lm import MODEL_PATH

ENGINE = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3, "vllm_max_model_length": 64}
PENALTIES = {
    "k1 in reward": KLPenalty("k1", "reward"),
    "k2 in loss": KLPenalty("k2", "loss"),
    "k3 in both": KLPenalty("k3", "both"),
    "exact in reward": KLPenalty("exact", "reward"),
    "exact in loss": KLPenalty("exact", "loss"),
    "exact in both": KLPenalty("exact", "both"),
    "top_k in loss": KLPenalty("top_k", "loss", top_k=4),
    "exact with a budget": KLPenalty("exact", "both", budget_per_token=0.01),
}


@pytest.fixture(scope="module")
def engine_model(tmp_path_factory):
    """Folder of a random two-layer Llama with heads that vLLM's CPU attention takes: of 64."""
    folder = tmp_path_factory.mktemp("engine")
    word_tokenizer(WORDS, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make(engine_model, tmp_path, monkeypatch):
    """`make(lora=False, model=folder, dtype="float32", ...)`: a stock trainer whose engine is on the CPU."""

    def keep(layer, *args, **kwargs):
        layer.cpu_linear = torch.nn.functional.linear

    # On a CPU vLLM repacks linear weights, and TRL's sync of weights then fails: they stay as they are.
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep)

    def trainer(lora: bool = False, model=engine_model, dtype: str = "float32", reward_funcs=reward, **options):
        monkeypatch.setattr(vllm_generation, "LLM", functools.partial(LLM, dtype=dtype))  # TRL leaves it at "auto"
        args = TINY_RUN | ENGINE | {"output_dir": str(tmp_path), "seed": 3, "max_steps": 2} | options
        targets = ["q_proj", "v_proj", "o_proj"]
        return RLOOTrainer(
            model=str(model),
            reward_funcs=reward_funcs,
            args=RLOOConfig(**args),
            train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 16}),
            peft_config=LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM") if lora else None,
        )

    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Compared:
    """What the engine says of its tokens beside what the trainer scores: the largest difference of each batch."""

    def __init__(self, trainer):
        self.generate, self.said, self.off = trainer.vllm_generation.generate, [], []
        trainer.vllm_generation.generate = self.spy
        seam_of(trainer).observers.append(self.observe)

    def spy(self, *args, **kwargs):
        found = self.generate(*args, **kwargs)
        self.said = [[token[0] for token in row] for row in found[2]]
        return found

    def observe(self, rollout: kl.Rollout) -> None:
        pairs = [
            (said - scored).abs()
            for row, logps in zip(self.said, rollout.logps, strict=True)
            for said, scored in zip(torch.tensor(row), logps, strict=False)
        ]
        assert len(pairs) == rollout.completion_mask.sum()
        self.off.append(max(pairs).item())
        said = (rollout.sampler_logps - rollout.logps) * rollout.completion_mask
        assert said.abs().max().item() == pytest.approx(self.off[-1], abs=1e-9)  # what the monitor is told of it


@pytest.mark.parametrize(
    ("name", "lora", "dtype"),
    [(name, False, "float32") for name in PENALTIES]
    + [("k1 in reward", True, "float32"), ("exact in both", True, "float32"), ("exact in both", False, "auto")],
)
def test_every_penalty_on_what_vllm_sampled(make, name, lora, dtype):
    """Left to itself vLLM takes weights of float32 in bfloat16: that is what its tokens are off by."""
    began = time.monotonic()
    trainer = make(lora, dtype=dtype, max_steps=3)
    penalty = PENALTIES[name]
    with pytest.warns(kl.KLWarning) if penalty.complaint else nullcontext():
        trainer.add_callback(KLPenaltyCallback(trainer, penalty))
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    trainer.add_callback(KLControlCallback(trainer, LogPIRule(0.5, target_kl_per_token=0.05), "k1"))
    trainer.add_callback(CollapseGuardCallback(trainer, "warn"))
    trainer.add_callback(health := KLHealthCallback(trainer))
    compared = Compared(trainer)
    trainer.train()
    exact = logged(trainer, "kl/exact_per_token")
    assert len(exact) == 3 and abs(exact[0]) < 1e-6 < exact[1]  # policy and reference are one, then not
    assert all(map(math.isfinite, logged(trainer, "loss"))) and trainer.beta != 0.5  # the rule has moved it
    assert not [each for each in health.findings if each.symptom in ("dropout", "truncated_sampling", "not_finite")]
    if "budget" in name:
        assert len(logged(trainer, "kl/over_budget_share")) == 3
    sampler = [max(map(abs, logged(trainer, f"kl/sampler_{each}"))) for each in ("k1_per_token", "max_ratio")]
    assert len(logged(trainer, "kl/sampler_k1_per_token")) == 3
    print(
        f"\n{name}, {'LoRA' if lora else 'full'}, {dtype}: engine against trainer, largest of a token "
        f"{max(compared.off):.1e} nats, kl/sampler_k1_per_token {sampler[0]:.1e}, kl/sampler_max_ratio "
        f"{sampler[1]:.6f}, exact KL {exact[-1]:.4f} per token, {time.monotonic() - began:.0f} s"
    )
    bound = 1e-4 if dtype == "float32" else 0.02
    # A token of weights that were not synced is off by the KL's square root and more.
    assert len(compared.off) == 3 and max(compared.off) < bound < exact[-1] ** 0.5


def one_direction(model) -> None:
    """No token is likelier than another, as long as the first number of the states is 0; then it is tree or sky."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight.zero_()
        model.lm_head.weight[WORDS.index("tree"), 0] = 1e4
        model.lm_head.weight[WORDS.index("sky"), 0] = -1e4


class Turn(TrainerCallback):
    """After the first step that number is none: by the embedding, or by the adapter alone."""

    def __init__(self, trainer, lora: bool):
        self.model, self.lora = trainer.accelerator.unwrap_model(trainer.model), lora

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if self.lora:
            self.model.get_base_model().model.layers[1].self_attn.o_proj.lora_B["default"].weight[0] = 10.0
        else:
            self.model.model.embed_tokens.weight[:, 0] = 10.0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("synced", [True, False])
def test_changed_weights_are_in_the_next_sample(make, engine_model, tmp_path, lora, synced):
    """And without TRL's sync they are not."""
    folder, heard = tmp_path / "turning", []
    model = LlamaForCausalLM.from_pretrained(engine_model)
    one_direction(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(engine_model).save_pretrained(folder)

    def remembered(completions, **kwargs):
        heard.append(set(" ".join(completions).split()))
        return reward(completions)

    trainer = make(lora, folder, reward_funcs=remembered, learning_rate=0.0)
    trainer.add_callback(Turn(trainer, lora))
    trainer.add_callback(KLMonitorCallback(trainer))
    if not synced:
        trainer.vllm_generation.sync_weights = lambda: None
    trainer.train()
    assert len(heard[0]) > 5
    assert heard[1] <= {"tree", "sky"} if synced else len(heard[1]) > 5
    sampler = logged(trainer, "kl/sampler_k1_per_token")  # the log shows it in the step after
    print(f"\n{'LoRA' if lora else 'full'}, {'synced' if synced else 'not synced'}: kl/sampler_k1_per_token {sampler}")
    assert abs(sampler[0]) < 1e-4 and (abs(sampler[1]) < 1e-4 if synced else sampler[1] > 1)


def test_the_story_model_is_refused_by_vllm_too(make):
    """As the lab says in one line before the engine starts, `lab/refusals.py`."""
    with pytest.raises(AssertionError, match="Sliding window for some but all layers"):
        make(model=MODEL_PATH)
