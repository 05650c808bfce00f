"""The full-vocabulary estimators against torch.distributions on full logits, for the heads that TRL's users have."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, GPT2Config, GPTNeoConfig, LlamaConfig, Qwen2Config
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from kl_alliteration import KLPenalty, KLPenaltyCallback, kl
from kl_alliteration.penalty import DIRECTIONS

V = 97
SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE = SIZES | {"intermediate_size": 32, "num_key_value_heads": 2}
NEO = {"vocab_size": V, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA_LIKE),
    "qwen2": Qwen2Config(**LLAMA_LIKE),
    "gemma2": Gemma2Config(**LLAMA_LIKE, head_dim=8, final_logit_softcapping=3.0),
    "gpt2": GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2),
    "gpt_neo": GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 1]]),
}


def build(name: str, seed: int, spread: float = 0.5):
    """A random tiny model whose next-token distributions are not flat."""
    transformers.set_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=spread)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, V, (3, 11), generator=torch.Generator().manual_seed(0))


def compare(estimate, model, ref, ids, temperature=1.0, mask=None, **options):
    hidden, ref_hidden = (m.base_model(ids).last_hidden_state[:, :-1] for m in (model, ref))
    heads = (kl.LMHead.of(m, temperature) for m in (model, ref))
    mask = torch.ones_like(ids[:, 1:]) if mask is None else mask
    return kl.from_hidden_states(estimate, hidden, ref_hidden, *heads, ids[:, 1:], mask, **options)


def distribution(model, ids, temperature=1.0):
    return torch.distributions.Categorical(logits=model(ids).logits[:, :-1] / temperature)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_equals_the_full_logits(ids, name, temperature, direction):
    model, ref = build(name, 0), build(name, 1)
    with torch.no_grad():
        found = compare(kl.full_vocabulary_estimate("exact", direction), model, ref, ids, temperature, rows=4)
        p, q = (distribution(m, ids, temperature) for m in (model, ref))
    expected = torch.distributions.kl_divergence(*((p, q) if direction == "reverse" else (q, p)))
    assert expected.mean() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_scaled_logits_as_in_granite(ids):
    """`logits_scaling` divides: at 2 the head's log-probabilities are those at temperature 2."""
    model = build("llama", 0)
    hidden = model.base_model(ids).last_hidden_state[0]
    plain = kl.LMHead.of(model, temperature=2.0).log_probs(hidden)
    model.config.logits_scaling = 2.0
    torch.testing.assert_close(kl.LMHead.of(model).log_probs(hidden), plain)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_change_nothing_and_gradients_are_those_of_the_full_logits(ids, name, rows):
    model, ref = build(name, 0), build(name, 1)
    mask = torch.ones_like(ids[:, 1:])
    mask[0, 4:] = 0
    compare(kl.exact, model, ref, ids, mask=mask, rows=rows).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad is None for p in ref.parameters())
    model.zero_grad()
    full = torch.distributions.kl_divergence(distribution(model, ids), distribution(ref, ids))
    (full * mask).sum().backward()
    for parameter_name, p in model.named_parameters():
        torch.testing.assert_close(found[parameter_name], p.grad, atol=1e-5, rtol=1e-4)


def test_exact_equals_trl_s_own_fused_divergence(ids):
    """TRL 1.16 has a fused kernel of the same quantity for distillation: an independent implementation."""
    model, ref = build("gemma2", 0), build("gemma2", 1)
    with torch.no_grad():
        heads = [m.get_output_embeddings().weight for m in (model, ref)]
        states = [m.base_model(ids).last_hidden_state[:, :-1].flatten(0, 1) for m in (model, ref)]
        for beta, direction in ((1.0, "reverse"), (0.0, "forward")):
            sides = states[0], heads[0], None, states[1], heads[1], None
            theirs, _ = ChunkedDivergenceFunction.apply(*sides, beta, 0.7, 1.0, 3.0, 1.0, 3.0)
            ours = compare(kl.full_vocabulary_estimate("exact", direction), model, ref, ids, 0.7)
            torch.testing.assert_close(ours.flatten(), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("estimate", ["k1", "k3", "top_k"])
def test_the_mean_of_10000_samples_is_exact_within_3_standard_errors(ids, estimate):
    model, ref = build("qwen2", 0), build("qwen2", 1)
    with torch.no_grad():
        p, q = distribution(model, ids[:1]), distribution(ref, ids[:1])
        exact = compare(kl.exact, model, ref, ids[:1])[0]
    torch.manual_seed(0)
    tokens = p.sample((10_000,))[:, 0]  # (10000, T)
    if estimate == "top_k":
        rows = (x.logits[0].repeat(10_000, 1) for x in (p, q))
        samples = kl.top_k(*rows, tokens.flatten(), k=8).view(tokens.shape)
    else:
        log_p, log_q = (x.logits[0].expand(10_000, -1, -1).gather(-1, tokens[..., None])[..., 0] for x in (p, q))
        samples = kl.SAMPLED[estimate](log_p - log_q)
    standard_error = samples.std(0) / 100
    assert ((samples.mean(0) - exact).abs() < 3 * standard_error).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_mean_of_10000_sampled_sums_of_k1_is_the_sum_of_exact(ids, name):
    """Over the ten states of a text, for each family of models."""
    model, ref = build(name, 0), build(name, 1)
    with torch.no_grad():
        p, q = distribution(model, ids[:1]), distribution(ref, ids[:1])
        exact = compare(kl.exact, model, ref, ids[:1])[0].sum()
    torch.manual_seed(0)
    tokens = p.sample((10_000,))[:, 0]  # (10000, T)
    log_p, log_q = (x.logits[0].expand(10_000, -1, -1).gather(-1, tokens[..., None])[..., 0] for x in (p, q))
    samples = kl.k1(log_p - log_q).sum(-1)
    assert (samples.mean() - exact).abs() < 3 * samples.std() / 100


def test_top_k_by_hand():
    """p = 1/2, 1/4, 1/8, 1/8, q uniform; k = 2: ln 2 / 2 + 0 for the two, -ln 2 more where a third was sampled."""
    log_p = torch.tensor([[0.5, 0.25, 0.125, 0.125]] * 2, dtype=torch.float64).log()
    log_q = torch.full((2, 4), 0.25, dtype=torch.float64).log()
    found = kl.top_k(log_p, log_q, torch.tensor([0, 3]), k=2)
    assert found.tolist() == pytest.approx([0.34657359, 0.34657359 - 0.69314718])


def test_top_k_is_exact_at_k_v(ids):
    model, ref = build("gpt2", 0), build("gpt2", 1)
    with torch.no_grad():
        found = compare(kl.full_vocabulary_estimate("top_k", k=V), model, ref, ids)
        torch.testing.assert_close(found, compare(kl.exact, model, ref, ids), atol=1e-6, rtol=1e-5)


def test_positions_out_of_the_mask_are_zero_and_cost_nothing(ids):
    model, ref = build("llama", 0), build("llama", 1)
    seen = []

    def count(log_p, log_q, token_ids):
        seen.append(len(token_ids))
        return kl.exact(log_p, log_q)

    mask = torch.zeros_like(ids[:, 1:])
    mask[1, :3] = 1
    with torch.no_grad():
        found = compare(count, model, ref, ids, mask=mask)
    assert sum(seen) == 3 and (found[mask == 0] == 0).all() and (found[mask == 1] > 0).all()


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any operation inside gave back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        sizes = [t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("rows", [2, 8])
def test_nothing_larger_than_a_chunk_is_made_at_a_vocabulary_of_50257(rows):
    """Forward and backward; B x T x V would be 3.2 million elements. Peak memory itself: studies/estimators.py."""
    vocabulary, hidden_size, shape = 50_257, 4, (4, 16)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(vocabulary, hidden_size, generator=generator) for _ in range(2)]
    hidden, ref_hidden = (torch.randn(*shape, hidden_size, generator=generator) for _ in range(2))
    hidden.requires_grad_(), weights[0].requires_grad_()
    with LargestTensor() as largest:
        ids = torch.zeros(shape, dtype=torch.long)
        heads = (kl.LMHead(weight) for weight in weights)
        kl.from_hidden_states(kl.exact, hidden, ref_hidden, *heads, ids, ids + 1, rows=rows).sum().backward()
    assert largest.elements == max(rows, hidden_size) * vocabulary


def test_a_head_with_an_adapter_on_it_is_refused(make_trainer):
    """Its own weight would be the base's. TRL itself refuses `lm_head` as a target; beside an adapter it is seen."""
    model = get_peft_model(build("llama", 0), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="LM head carries an adapter.*use the estimator k1"):
        kl.LMHead.of(model.get_base_model())
    trainer = make_trainer(lora=LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    KLPenaltyCallback(trainer, KLPenalty("exact", "both"))
    KLPenaltyCallback(trainer, KLPenalty("k1"))
