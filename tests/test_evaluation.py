import copy
import math

import pytest
import torch
from conftest import WORDS, reward
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kl_alliteration import judge
from kl_alliteration.evaluation import ask_reward

PROMPTS = ["once upon a time", "there was"] * 20


def no_reward(prompts, completions):
    return [float(i) for i in range(len(completions))]


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def test_a_uniform_policy_by_hand(model, tokenizer):
    """Zero logits: entropy log V, and a text of at most 5 tokens ends early with probability 1 - (1 - 1/V)^5."""
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    judged = judge(model, tokenizer, PROMPTS * 10, no_reward, max_new_tokens=5, ref_model=model)
    assert judged.stories == 400
    assert judged.entropy_per_token == pytest.approx(math.log(len(WORDS)), abs=1e-5)
    assert judged.kl_per_sequence == 0 == judged.kl_per_token
    assert judged.ended_share == pytest.approx(1 - (1 - 1 / len(WORDS)) ** 5, abs=0.08)
    # rewards 0..49 in each batch of 50
    assert judged.reward_mean == 24.5 and judged.reward_std == pytest.approx(math.sqrt((50**2 - 1) / 12))


def test_kl_of_a_sharper_policy_against_its_closed_form(model, tokenizer):
    """Logits that do not depend on the context: the KL per token is that of two fixed distributions."""
    ref = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    torch.nn.init.zeros_(ref.get_output_embeddings().weight)
    torch.manual_seed(0)
    wanted = torch.randn(len(WORDS))
    head = torch.nn.Linear(model.config.hidden_size, len(WORDS), bias=True)
    head.weight.data.zero_()
    head.bias.data.copy_(wanted)
    model.set_output_embeddings(head)
    judged = judge(model, tokenizer, PROMPTS * 50, no_reward, max_new_tokens=4, ref_model=ref, batch_size=500)
    p = wanted.softmax(-1)
    exact = (p * (p.log() + math.log(len(WORDS)))).sum().item()
    assert judged.kl_per_token == pytest.approx(exact, abs=0.05)
    assert judged.kl_per_sequence == pytest.approx(judged.kl_per_token * judged.mean_length)
    assert judged.exact_kl_per_sequence == pytest.approx(exact * judged.mean_length, rel=1e-5)


def test_the_seed_decides_and_the_random_state_stays(model, tokenizer):
    model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = judge(model, tokenizer, PROMPTS, no_reward, max_new_tokens=6, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert judge(model, tokenizer, PROMPTS, no_reward, max_new_tokens=6, seed=1) == first
    assert judge(model, tokenizer, PROMPTS, no_reward, max_new_tokens=6, seed=2) != first
    assert first.kl_per_token is None


def test_with_an_adapter_the_base_is_the_reference(model, tokenizer):
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    options = {"max_new_tokens": 6, "adapter_off_is_reference": True}
    assert judge(peft, tokenizer, PROMPTS, no_reward, **options).kl_per_sequence == 0
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert abs(judge(peft, tokenizer, PROMPTS, no_reward, **options).kl_per_sequence) > 1e-4


@pytest.mark.parametrize(
    "own", [{"repetition_penalty": 1.3}, {"min_p": 0.9}, {"suppress_tokens": [3]}, {"min_new_tokens": 5}], ids=str
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_samples_by_temperature_whatever_the_model_says(model, tokenizer, own, lora):
    """transformers fills what options leave unset from the model's own. It writes what a model without them does."""
    judged = []
    for options in ({}, own):
        each = copy.deepcopy(model)
        each.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0, **options)
        before = copy.deepcopy(each.generation_config)
        each = get_peft_model(each, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")) if lora else each
        judged.append(judge(each, tokenizer, PROMPTS, reward, max_new_tokens=8))
        assert each.generation_config.to_dict() == before.to_dict()
    assert judged[0].completions == judged[1].completions


def test_a_reward_that_is_infinite_has_no_spread(model, tokenizer):
    def endless(completions, **columns):
        return [-math.inf] + [1.0] * (len(completions) - 1)

    judged = judge(model, tokenizer, PROMPTS, endless, max_new_tokens=3)
    assert judged.reward_mean == -math.inf and math.isnan(judged.reward_std)


def test_no_column_takes_the_place_of_what_was_sampled():
    def length(prompts, completions, **columns):
        return [float(len(completion)) for completion in completions]

    rows = [{"prompt": "a", "completions": "a column of that name", "prompts": "b"}]
    assert ask_reward(length, rows, ["four"], [[1]]) == [4.0]


def test_what_nobody_can_judge_is_said(model, tokenizer):
    async def slowly(completions, **columns):
        return [0.0] * len(completions)

    for prompts, how, options, words in [
        ([], reward, {}, "prompts: there is none"),
        (PROMPTS, lambda completions, **columns: [1.0], {}, "reward: 1 answers for .* return one for each"),
        (PROMPTS, slowly, {}, "reward: an asynchronous one"),
        (PROMPTS, reward, {"adapter_off_is_reference": True}, "the model has no adapter"),
        (PROMPTS, reward, {"temperature": -1.0}, "temperature must be above 0 and finite, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            judge(model, tokenizer, prompts, how, max_new_tokens=3, **options)
