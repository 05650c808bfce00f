"""RLOO's options and adapters: three steps each, every batch and every loss held against the model's own logits."""

import copy
import warnings

import peft
import pytest
from datasets import Dataset
from families import build, move
from peft import LoraConfig
from runs import PROMPTS, now_and_then, reward, save, stock_trainer
from trl import RLOOConfig, RLOOTrainer
from truth import Oracle

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, kl, use_fast_sampling
from kl_alliteration._trl.scoring import Scorer
from kl_alliteration.kl import KLWarning

OFF, GRADIENT_OFF = 2e-4, 1e-3
EXACT = KLPenalty("exact", "both")
TWO_REWARDS = {"reward_funcs": [reward, now_and_then], "reward_weights": [0.7, 1.3]}
QV, LM = ["q_proj", "v_proj"], {"task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(family)`: where a random model of it lies."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = save(build(family), tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def worst_of(folder, penalty=EXACT, fast=True, scale=0.3, kind=(RLOOTrainer, RLOOConfig, Oracle), **options) -> dict:
    """The largest differences of a run of three steps, its counts among them."""
    trainer_class, config, oracle_class = kind
    trainer = stock_trainer(folder, trainer=trainer_class, config=config, **{"max_steps": 3} | options)
    move(trainer.model, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KLWarning)
        trainer.add_callback(KLPenaltyCallback(trainer, penalty))
        trainer.add_callback(KLMonitorCallback(trainer, exact=True))
        if fast:
            use_fast_sampling(trainer, keep_memory=False)
        oracle = oracle_class(trainer, penalty)
        trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    assert oracle.exact_per_token > 1e-5
    return oracle.worst | oracle.counts


def check(worst: dict, batches: int = 3, losses: int = 3) -> None:
    assert (worst.pop("batches"), worst.pop("losses")) == (batches, losses), worst
    assert worst.pop("gradient") < GRADIENT_OFF and max(worst.values()) < OFF, worst


PENALTIES = [
    KLPenalty(estimator, placement, reduction, direction, budget, 8)
    for estimator in ("k1", "k2", "k3", "abs", "exact", "top_k")
    for placement in ("reward", "loss", "both")
    for reduction in ("sum", "mean")
    for direction in ("reverse", "forward")
    for budget in (None, 0.2)
    if (direction == "reverse" or estimator == "exact")
    and (budget is None or placement == "reward" or estimator in ("exact", "top_k"))
]
A_FEW = {
    KLPenalty("k1"),
    KLPenalty("k3", "loss", "mean", top_k=8),
    KLPenalty("exact", "both", budget_per_token=0.2, top_k=8),
    KLPenalty("exact", "both", "mean", "forward", top_k=8),
    KLPenalty("top_k", "both", top_k=8),
}


def later(case, few):
    """A case that `make long` looks at, unless it is among the few."""
    return pytest.param(case, marks=() if case in few else pytest.mark.long)


def words(case) -> str:
    return case.in_words() + (f" by {case.reduction}" if case.budget_per_token else "")


@pytest.mark.parametrize("penalty", [later(p, A_FEW) for p in PENALTIES], ids=lambda p: words(p).replace(" ", "-"))
def test_a_penalty_is_right(folders, penalty):
    check(worst_of(folders("llama"), penalty))


OPTIONS = {
    "num_iterations": ({"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2}, (2, 4)),
    "accumulation": ({"gradient_accumulation_steps": 2, "max_steps": 2}, (2, 4)),
    "accumulation without generation": (
        {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 2}, (4, 4)
    ),
    "steps_per_generation": ({"steps_per_generation": 3}, (1, 3)),
    "two rewards, one not always": (TWO_REWARDS, (3, 3)),
    "clipped rewards": ({"reward_clip_range": (0.2, 0.6)}, (3, 3)),
    "normalised advantages": ({"normalize_advantages": True}, (3, 3)),
    "narrow clipping": ({"num_iterations": 3, "epsilon": 0.01, "learning_rate": 1e-2}, (1, 3)),
    "wide above": ({"num_iterations": 3, "epsilon": 0.05, "epsilon_high": 2.0, "learning_rate": 1e-2}, (1, 3)),
    "four in a group": ({"num_generations": 4, "per_device_train_batch_size": 8}, (3, 3)),
    "truncated completions masked": ({"mask_truncated_completions": True}, (3, 3)),
    "temperature 1": ({"temperature": 1.0}, (3, 3)),
    "gradient checkpointing": ({"gradient_checkpointing": True}, (3, 3)),
    "transformers samples": ({"fast": False}, (3, 3)),
    "evaluation": (
        {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS}), "per_device_eval_batch_size": 4}, (5, 5)
    ),
}  # fmt: skip
FEW_OPTIONS = {"num_iterations", "accumulation", "two rewards, one not always", "clipped rewards", "evaluation"}


@pytest.mark.parametrize("option", [later(o, FEW_OPTIONS) for o in OPTIONS])
def test_an_option_is_right(folders, option):
    options, counts = OPTIONS[option]
    check(worst_of(folders("llama"), **copy.copy(options)), *counts)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral", "gemma2"])
@pytest.mark.parametrize("option", ["num_iterations", "accumulation"])
def test_an_option_is_right_in_another_family(folders, family, option):
    options, counts = OPTIONS[option]
    check(worst_of(folders(family), **options), *counts)


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": QV} | options | LM)


ADAPTERS = {
    "lora": lambda: lora(),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "lora_bias": lambda: lora(lora_bias=True),
    "modules_to_save norms": lambda: lora(modules_to_save=["norm", "input_layernorm"]),
    "modules_to_save embed_tokens": lambda: lora(modules_to_save=["embed_tokens"]),
    "modules_to_save lm_head": lambda: lora(modules_to_save=["lm_head"]),
    "target embed_tokens": lambda: lora(target_modules=[*QV, "embed_tokens"]),
    "trainable tokens too": lambda: lora(trainable_token_indices=[3, 4, 5, 6, 7, 8, 9, 10]),
    "target_parameters": lambda: lora(target_modules=[], target_parameters=["q_proj.weight", "v_proj.weight"]),
    "all-linear": lambda: lora(target_modules="all-linear"),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "random": lambda: lora(init_lora_weights=False),
    "one layer": lambda: lora(layers_to_transform=[1]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **LM
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], **LM),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=QV, **LM),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=QV, **LM),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=QV, **LM),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=QV, **LM),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=QV, total_step=10, **LM),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=QV, **LM),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=QV, **LM),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **LM),
    "miss": lambda: peft.MissConfig(r=4, target_modules=QV, **LM),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=QV, **LM),
    "c3a": lambda: peft.C3AConfig(block_size=8, target_modules=["q_proj"], **LM),
    "trainable tokens": lambda: peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[3, 4, 5, 6, 7, 8], **LM
    ),
}
FEW_ADAPTERS = {"lora", "dora", "modules_to_save lm_head", "target embed_tokens"}


@pytest.mark.parametrize("kind", [later(k, FEW_ADAPTERS) for k in ADAPTERS])
def test_an_adapter_is_right(folders, kind):
    check(worst_of(folders("llama"), scale=1.0, peft_config=ADAPTERS[kind]()))


REFUSED = {
    "target lm_head": (lambda: lora(target_modules=[*QV, "lm_head"]), "Applying a PEFT adapter to `lm_head`"),
    "pissa": (lambda: lora(init_lora_weights="pissa"), "with its adapter off this model is not its base"),
    "layer_replication": (lambda: lora(layer_replication=[(0, 2), (1, 2)]), "layer_replication repeats"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_is_refused(folders, kind):
    make, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=reason):
        worst_of(folders("llama"), peft_config=make())


@pytest.mark.parametrize("broken", ["estimate", "length", "reference"])
def test_the_oracle_sees_what_is_wrong(folders, monkeypatch, broken):
    """A KL of 1 % too much, a mean over the longest text's length, a reference that is the policy."""
    stock, rollout, parts = kl.exact, Scorer.rollout, KLPenalty.parts
    if broken == "estimate":
        monkeypatch.setitem(kl.FULL_VOCABULARY, "exact", lambda *a, **options: 1.01 * stock(*a, **options))
    elif broken == "length":
        longest = lambda self, values, mask: (*parts(self, values, mask)[:2], mask**0)  # noqa: E731
        monkeypatch.setattr(KLPenalty, "parts", longest)
    else:
        monkeypatch.setattr(Scorer, "rollout", lambda self, policy, reference, *a: rollout(self, policy, policy, *a))
    penalty = KLPenalty("exact", "both", "mean" if broken == "length" else "sum")
    worst = worst_of(folders("llama"), penalty, max_steps=1, max_completion_length=40)
    assert worst["advantages"] > 5 * OFF and worst["loss"] > 5 * OFF, worst
