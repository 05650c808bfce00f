"""The policy that is scored is the one that sampled, the head is what the model says, the reference is the base."""

import copy
import warnings
from functools import partial

import pytest
import torch
from conftest import TINY_RUN, WORDS, reward, word_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from kl_alliteration import KLControlCallback, KLMonitorCallback, KLPenalty, KLPenaltyCallback
from kl_alliteration._trl import leave_baseline_out, seam_of
from kl_alliteration.control import FixedBeta
from kl_alliteration.kl import KLWarning
from kl_alliteration.references import ReferenceCallback, ResetReferenceCallback, use_loaded_reference

V = len(WORDS)
ENDS = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1}
GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **ENDS}
MPT = {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2, **ENDS}
LLAMA = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "mpt": lambda: MptForCausalLM(MptConfig(logit_scale=0.5, **MPT)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, **ENDS, attention_bias=True)),
}
RAGGED = ["once", "there was a tall tree that", "once upon a time", "fox and"]


@pytest.fixture
def trainer_of(tmp_path):
    """`trainer_of(family, **options)`: a stock trainer on a random model of the family, with ragged prompts."""

    def make(family, trainer_class=RLOOTrainer, config_class=RLOOConfig, peft_config=None, shift=0.3, **options):
        set_seed(0)
        model = MODELS[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6)
        model.save_pretrained(tmp_path / "model")
        word_tokenizer(WORDS, unk_token="<unk>", pad_token="<pad>").save_pretrained(tmp_path / "model")
        extra = {"rollout_func": options.pop("rollout_func")} if "rollout_func" in options else {}
        defaults = TINY_RUN | {"output_dir": str(tmp_path / "out"), "max_steps": 1, "num_generations": 2}
        trainer = trainer_class(
            model=str(tmp_path / "model"),
            reward_funcs=reward,
            args=config_class(**defaults | options),
            train_dataset=Dataset.from_dict({"prompt": RAGGED * 4}),
            peft_config=copy.deepcopy(peft_config),
            **extra,
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # away from the reference
            for parameter in trainer.model.parameters():
                if parameter.requires_grad and shift:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * shift * 0.3)
        return trainer

    return make


def rollouts_of(trainer) -> list:
    seen = []
    seam_of(trainer).observers.append(seen.append)
    return seen


def log_probs(model, output, i, temperature=1.0) -> torch.Tensor:
    """(T, V) of one completion without its padding, from the model's logits."""
    prompt = output["prompt_ids"][i][output["prompt_mask"][i].bool()]
    completion = output["completion_ids"][i][output["completion_mask"][i].bool()]
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1)


def generated(trainer) -> dict:
    return trainer._generate_and_score_completions([{"prompt": p} for p in RAGGED for _ in range(2)])


@pytest.mark.parametrize("penalty", [KLPenalty("k1"), KLPenalty("exact", "both")], ids=["k1", "exact"])
def test_left_padded_prompts_are_scored_where_they_stand(trainer_of, penalty):
    """GPT-2's learned positions: TRL gives none, so padding moves them."""
    trainer = trainer_of("gpt2", disable_dropout=True)
    KLPenaltyCallback(trainer, penalty)
    seen = rollouts_of(trainer)
    with pytest.warns(KLWarning, match=r"padding moves the positions of GPT2LMHeadModel: .* nats per token off"):
        output = generated(trainer)
    for i in range(8):
        for model, found in ((trainer.model, seen[0].logps[i]), (trainer.ref_model, seen[0].ref_logps[i])):
            truth = log_probs(model, output, i)
            sampled = output["completion_ids"][i][: len(truth), None]
            torch.testing.assert_close(found[: len(truth)], truth.gather(-1, sampled)[:, 0], atol=1e-5, rtol=0)
    with warnings.catch_warnings():  # said once, and true of the loss too
        warnings.simplefilter("error", KLWarning)
        generated(trainer)
        trainer.model.train()
        assert trainer._compute_loss(trainer.model, output).isfinite()


def said_of(trainer, prompts) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(2)])
    return [str(each.message) for each in caught if each.category is KLWarning]


def test_it_asks_of_rows_that_are_padded_wherever_they_are(trainer_of):
    """The first rows have the longest prompt; then no row of the first batch is padded, and of the second one is."""
    moves = "padding moves the positions"
    trainer = trainer_of("gpt2", disable_dropout=True)
    KLMonitorCallback(trainer)
    (said,) = said_of(trainer, sorted(RAGGED, key=len, reverse=True))
    assert moves in said
    trainer = trainer_of("gpt2", disable_dropout=True)
    KLMonitorCallback(trainer)
    assert said_of(trainer, ["once upon"] * 4) == []
    (said,) = said_of(trainer, RAGGED)
    assert moves in said and said_of(trainer, RAGGED) == []


def test_it_asks_of_rows_that_count(trainer_of):
    """The first completions are cut off and masked: of nothing, nothing differs."""
    trainer = trainer_of("gpt2", disable_dropout=True)
    seam = seam_of(trainer)
    KLMonitorCallback(trainer)
    score = seam.scorer.score_checked

    def without_the_first(model, ids, mask, length, *asked, **kwargs):
        mask = mask.clone()
        mask[:4, -length:] = 0
        return score(model, ids, mask, length, *asked, **kwargs)

    seam.scorer.score_checked = without_the_first
    (said,) = said_of(trainer, RAGGED)
    assert "padding moves the positions" in said


def test_prompts_of_one_length_are_silent(trainer_of, recwarn):
    trainer = trainer_of("gpt2", disable_dropout=True)
    trainer.train_dataset = Dataset.from_dict({"prompt": ["once upon"] * 8})
    KLMonitorCallback(trainer)
    trainer.train()
    assert not [w for w in recwarn if w.category is KLWarning]


def test_dropout_that_is_on_is_told_in_nats(trainer_of):
    trainer = trainer_of("gpt2", shift=0)
    trainer.train_dataset = Dataset.from_dict({"prompt": ["once upon"] * 8})
    KLMonitorCallback(trainer)
    with pytest.warns(KLWarning, match=r"dropout is on .* nats per token.* Set disable_dropout=True"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:temperature")
def test_a_head_that_is_more_than_linear_is_the_model_s_own(trainer_of):
    """MPT's logit_scale: TRL and a linear head do not know it."""
    with pytest.warns(KLWarning, match="MptForCausalLM turns hidden states into logits by more than a linear head"):
        trainer = trainer_of("mpt", temperature=0.8)
        KLPenaltyCallback(trainer, KLPenalty("exact", "both"))
    KLMonitorCallback(trainer, exact=True)
    seen = rollouts_of(trainer)
    trainer.model.train()
    output = generated(trainer)
    for i in range(8):
        log_p, log_q = (log_probs(model, output, i, 0.8) for model in (trainer.model, trainer.ref_model))
        exact = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(seen[0].per_token_kl("exact")[i][: len(exact)], exact, atol=1e-4, rtol=1e-4)
        k1 = (log_p - log_q).gather(-1, output["completion_ids"][i][: len(exact), None])[:, 0]
        torch.testing.assert_close(seen[0].ref_log_ratio[i][: len(exact)], k1, atol=1e-4, rtol=1e-4)
    penalty = torch.stack([(seen[0].per_token_kl("exact")[i] * output["completion_mask"][i]).sum() for i in range(8)])
    torch.testing.assert_close(seam_of(trainer).last_penalty, penalty, atol=1e-4, rtol=1e-4)

    def loss(inputs):
        return trainer._compute_loss(trainer.model, inputs | {"advantages": torch.zeros(8)})

    parameters = list(trainer.model.parameters())
    found = torch.autograd.grad(loss(output), parameters, allow_unused=True)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)

    def table(model):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -output["completion_ids"].shape[1] - 1 : -1]
        return (logits / 0.8).log_softmax(-1)

    log_p, log_q = table(trainer.model), table(trainer.ref_model).detach()
    wanted = trainer.beta * ((log_p.exp() * (log_p - log_q)).sum(-1) * output["completion_mask"]).sum(-1).mean()
    expected = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_a_linear_head_is_silent(make_trainer, recwarn):
    KLPenaltyCallback(make_trainer(), KLPenalty("exact", "both"))
    assert not [w for w in recwarn if w.category is KLWarning]


PISSA = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
BIASES = LoraConfig(r=2, bias="all", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("config", [PISSA, BIASES], ids=["pissa", "biases"])
@pytest.mark.parametrize("instrument", ["penalty", "monitor", "rule"])
def test_an_adapter_whose_off_is_not_the_base_is_refused(trainer_of, config, instrument):
    trainer = trainer_of("llama with biases", peft_config=config, shift=0)
    with pytest.raises(ValueError, match=r"with its adapter off this model is not its base: .*use_loaded_reference"):
        {
            "penalty": lambda: KLPenaltyCallback(trainer, KLPenalty("exact", "both")),
            "monitor": lambda: KLMonitorCallback(trainer),
            "rule": lambda: KLControlCallback(trainer, FixedBeta(0.1)),
        }[instrument]()


def test_a_second_adapter_would_change_its_base_again(trainer_of):
    trainer = trainer_of("llama with biases", peft_config=PISSA, shift=0)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for kind in (ReferenceCallback, partial(ResetReferenceCallback, steps=1)):
        with pytest.raises(ValueError, match="'pissa' changes the base's weights. A reference that starts from the"):
            kind(trainer)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("config", [PISSA, BIASES], ids=["pissa", "biases"])
def test_or_gets_the_base_as_a_second_model(trainer_of, config, tmp_path):
    trainer = trainer_of("llama with biases", peft_config=config, shift=0, max_steps=3, learning_rate=0.1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    use_loaded_reference(trainer)
    KLPenaltyCallback(trainer, KLPenalty("k1"))
    KLMonitorCallback(trainer, exact=True)
    seen, kls = rollouts_of(trainer), []
    generate = trainer._generate_and_score_completions

    def spy(inputs):
        output = generate(inputs)
        log_p, log_q = (log_probs(model, output, 0) for model in (trainer.model, base))
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        torch.testing.assert_close(seen[-1].per_token_kl("exact")[0][: len(kls[-1])], kls[-1], atol=1e-4, rtol=1e-4)
        return output

    trainer._generate_and_score_completions = spy
    trainer.train()
    log = trainer.state.log_history
    assert log[0]["kl/exact_per_token"] == pytest.approx(0, abs=1e-5) and kls[-1].mean() > 1e-2
    assert log[2]["kl"] == pytest.approx(log[2]["kl/k1_per_token"], abs=1e-5)


def test_an_lm_head_beside_an_adapter_is_seen_as_it_is(trainer_of):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = trainer_of("llama with biases", peft_config=config)
    KLPenaltyCallback(trainer, KLPenalty("exact", "both"))
    seen = rollouts_of(trainer)
    output = generated(trainer)
    log_p = log_probs(trainer.model, output, 0)
    with trainer.model.disable_adapter():
        log_q = log_probs(trainer.model, output, 0)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(seen[0].per_token_kl("exact")[0][: len(exact)], exact, atol=1e-4, rtol=1e-4)
    assert exact.mean() > 1e-2


@pytest.mark.parametrize("penalty", [None, KLPenalty("k1"), KLPenalty("exact", "both")], ids=["own", "k1", "exact"])
def test_grpo_leaves_out_what_tools_wrote(trainer_of, penalty):
    """Of eight tokens the policy wrote the first and the last two; TRL's own k3 counts these alone."""

    def rollout(prompts, trainer):
        generator = torch.Generator().manual_seed(trainer.state.global_step)
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [torch.randint(3, V, (8,), generator=generator).tolist() for _ in prompts]
        mask = [[1, 1, 0, 0, 0, 0, 1, 1] for _ in prompts]
        logps = [[0.0] * 8 for _ in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logps, "env_mask": mask}

    trainer = trainer_of("llama with biases", GRPOTrainer, GRPOConfig, rollout_func=rollout, max_completion_length=8)
    if penalty is not None:
        trainer.add_callback(KLPenaltyCallback(trainer, penalty))
    trainer.add_callback(KLMonitorCallback(trainer))
    seen = rollouts_of(trainer)
    trainer.train()
    assert seen[0].completion_mask.sum(1).tolist() == [4] * 8
    if penalty is not None:
        spent = seen[-1].per_token_kl(penalty.estimator)[:, [0, 1, 6, 7]].sum(1)
        torch.testing.assert_close(seam_of(trainer).last_penalty, spent, atol=1e-5, rtol=1e-5)
    log = trainer.state.log_history[0]
    assert log["kl/k3_per_token"] == pytest.approx(log["kl"], rel=1e-5) and log["kl"] > 1e-2


def test_the_spread_of_rewards_is_that_of_the_rewards_as_they_are_clipped(make_trainer):
    def far(completions, **kwargs):
        return [100.0 * (i % 2) for i in range(len(completions))]

    trainer = make_trainer(max_steps=2, reward_funcs=far, reward_clip_range=(0.0, 1.0), learning_rate=0.1)
    trainer.add_callback(KLMonitorCallback(trainer))
    trainer.train()
    groups = seam_of(trainer).last_penalty.view(-1, 4)
    penalty = 0.5 * (groups - groups.mean(1, keepdim=True)).std(correction=0).item()
    log = trainer.state.log_history[1]
    assert log["kl/share_of_spread"] == pytest.approx(penalty / (penalty + 0.5), rel=1e-4) and penalty > 1e-3


def test_without_a_baseline_an_evaluation_batch_may_be_larger(make_trainer):
    trainer = make_trainer(max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=8, num_generations=4)
    trainer.eval_dataset = Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 2})
    leave_baseline_out(seam_of(trainer))
    trainer.train()
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"generation_kwargs": {"top_k": 5}}, "top_k=5: completions are sampled from another distribution"),
        ({"top_p": 0.9}, "top_p=0.9: completions"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2: completions"),
        ({"generation_kwargs": {"typical_p": 0.5}}, "typical_p=0.5: completions"),
    ],
)
def test_truncated_sampling_is_told_wherever_it_was_asked_for(make_trainer, options, says):
    trainer = make_trainer(**options)
    with pytest.warns(KLWarning, match=says):
        KLPenaltyCallback(trainer)


def test_truncated_sampling_of_the_model_s_own_configuration_is_told(make_trainer):
    trainer = make_trainer()
    trainer.model.generation_config.suppress_tokens = [3]
    with pytest.warns(KLWarning, match=r"suppress_tokens=\[3\]: completions"):
        KLPenaltyCallback(trainer)
