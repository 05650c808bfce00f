import math

import pytest
import torch
from conftest import WORDS
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl_alliteration import judge
from kl_alliteration.evaluation import best_of_n, least_kl

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


def test_best_of_n_by_hand():
    """Of 1, 2, 3, 4 the best of 2 is 2, 3, 3, 4, 4, 4 over the six pairs: 10 / 3; of 1, their mean."""
    first, second = best_of_n(torch.tensor([3.0, 1.0, 4.0, 2.0]), largest_n=2)
    assert first["n"] == 1 and first["kl_per_sequence"] == 0 and first["reward"] == pytest.approx(2.5)
    assert second["n"] == 2 and second["reward"] == pytest.approx(10 / 3)
    assert second["kl_per_sequence"] == pytest.approx(math.log(2) - 0.5)


def test_best_of_n_of_a_uniform_is_known():
    """E[max of n] of a uniform on [0, 1] is n / (n + 1), and lies within the band."""
    rewards = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for point in best_of_n(rewards, largest_n=1_000, bootstraps=50):
        assert point["reward"] == pytest.approx(point["n"] / (point["n"] + 1), abs=0.01)
        assert point["low"] <= point["reward"] <= point["high"]


def test_best_of_n_of_several_prompts_is_the_mean_of_theirs():
    rewards = torch.tensor([[3.0, 1.0, 4.0, 2.0], [13.0, 11.0, 14.0, 12.0]])
    _, second = best_of_n(rewards, largest_n=2)
    assert second["reward"] == pytest.approx(((4 * 3 + 3 * 2 + 2) / 6 + (14 * 3 + 13 * 2 + 12) / 6) / 2)


def test_least_kl_by_hand():
    """Two rewards, 0 and 1, at a price of 1 / log 3: weights 1/4 and 3/4, KL log 2 + 1/4 log 1/4 + 3/4 log 3/4."""
    (point,) = least_kl(torch.tensor([0.0, 1.0]), [1 / math.log(3)], enough=1)
    assert point["reward"] == pytest.approx(0.75) and point["effective_samples"] == pytest.approx(
        1 / (1 / 16 + 9 / 16)
    )
    assert point["kl_per_sequence"] == pytest.approx(math.log(2) - 0.25 * math.log(4) + 0.75 * math.log(0.75))
    (both,) = least_kl(
        torch.tensor([[0.0, 1.0], [5.0, 5.0]]), [1 / math.log(3)], enough=1
    )  # a prompt without a choice
    assert both["reward"] == pytest.approx((0.75 + 5) / 2)
    assert both["kl_per_sequence"] == pytest.approx(point["kl_per_sequence"] / 2)


def test_least_kl_is_the_enumerated_tilt_s_and_stops_where_samples_end():
    """A reference of 50 texts, tilted as a whole, against 200,000 samples of it."""
    generator = torch.Generator().manual_seed(0)
    log_ref = (2 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    rewards = torch.randn(50, generator=generator, dtype=torch.float64)
    samples = rewards[torch.multinomial(log_ref.exp(), 200_000, replacement=True, generator=generator)]
    points = least_kl(samples, [0.3, 1.0, 1e-4])
    assert [point["price"] for point in points][:2] == [1.0, 0.3]
    for point in points[:2]:
        log_tilt = (log_ref + rewards / point["price"]).log_softmax(0)
        assert point["reward"] == pytest.approx((log_tilt.exp() * rewards).sum().item(), abs=0.02)
        kl = (log_tilt.exp() * (log_tilt - log_ref)).sum().item()
        assert point["kl_per_sequence"] == pytest.approx(kl, rel=0.03)
    assert least_kl(samples[:20], [1e-4]) == []  # one sample has all the weight


def test_no_policy_of_one_reward_has_less_kl():
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(30, generator=generator, dtype=torch.float64)
    (least,) = least_kl(rewards, [0.5], enough=1)
    for _ in range(200):
        other = (rewards / 0.5 + 0.5 * torch.randn(30, generator=generator, dtype=torch.float64)).log_softmax(0)
        reward = (other.exp() * rewards).sum().item()
        kl = (other.exp() * (other + math.log(30))).sum().item()
        if reward >= least["reward"]:
            assert kl >= least["kl_per_sequence"] - 1e-12
