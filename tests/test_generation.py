"""The fast sampler against transformers' own `generate` and its logits processors."""

import copy
import platform
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, GPT2Config, GPTNeoConfig, LlamaConfig, Qwen2Config
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kl_alliteration import KLPenalty, KLPenaltyCallback, kl, use_fast_sampling
from kl_alliteration._trl import seam_of
from kl_alliteration.sampling import generate
from kl_alliteration.sampling.decoder import Unsupported, read_decoder

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 48, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None}
NEO = {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "pad_token_id": 1}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, num_key_value_heads=4),
    "llama-gqa": LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**LLAMA, num_key_value_heads=2),
    "qwen2-sliding": Qwen2Config(
        **LLAMA,
        num_key_value_heads=4,
        use_sliding_window=True,
        sliding_window=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, pad_token_id=1),
    "gpt-neo": GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 1]], window_size=8),
}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "gpt-neo": ["q_proj", "v_proj", "c_fc"]}


def build(name: str, lora: bool = False):
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    if lora:
        targets = TARGETS.get(name, ["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).eval()
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
                parameter.normal_(std=0.3)
    return model


def prompts(padded: bool):
    ids = torch.randint(2, V, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        for row, gap in enumerate((0, 3, 6, 1, 5)):
            ids[row, :gap], mask[row, :gap] = 1, 0
    return ids, mask


def options(**given) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 40, "pad_token_id": 1, "eos_token_id": 0} | given)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_those_of_generate(name, padded, lora):
    """40 tokens, well beyond the windows of 2 and 8; rows end at different places."""
    model = build(name, lora)
    ids, mask = prompts(padded)
    config = options(do_sample=False, eos_token_id=[0, 17])
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    found = generate.sample(read_decoder(model), ids, mask, config)
    assert found.tolist() == expected.tolist()


def grouped(padded: bool, columns: int = 40):
    """Seven rows of three prompts, groups of 4, 2 and 1, in no order; beyond `SPLIT_FROM` columns."""
    ids = torch.randint(2, V, (3, columns), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        for row, gap in enumerate((0, 35, 7)):
            ids[row, :gap], mask[row, :gap] = 1, 0
    rows = torch.tensor([0, 1, 0, 2, 0, 1, 0])
    return ids[rows], mask[rows]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_of_rows_that_share_prompts_equal_those_of_generate(name, padded, lora):
    """The same keys for a group, until its rows part: each row begins with a token of its own, and ends on its own."""
    model = build(name, lora)
    ids, mask = grouped(padded)
    decoder = read_decoder(model)
    with torch.no_grad():
        decoder.start(ids, mask, 60)
        assert decoder.rows.split == 40 and decoder.cache[0].prompts[0].shape[0] == 3
        first = torch.arange(2, 9)
        seen = torch.cat([ids, first[:, None]], dim=1)
        logits, kept = decoder.step(first), torch.arange(7)
        for place in range(41, 60):
            told = torch.cat([mask[kept], torch.ones(len(kept), place - 40, dtype=torch.long)], dim=1)
            places = {} if "gpt" not in name else {"position_ids": kl.positions_of(told)}
            expected = model(input_ids=seen[kept], attention_mask=told, **places).logits[:, -1]
            torch.testing.assert_close(logits, expected.float(), atol=2e-4, rtol=1e-3)
            if place in (45, 50, 55):  # rows end: the third, then all of one prompt, then the first that is left
                going = kept != {45: 2, 50: 3, 55: 0}[place]
                decoder.keep(going)
                kept, logits = kept[going], logits[going]
            tokens = logits.argmax(-1)
            grown = torch.full((7, 1), 1)
            grown[kept] = tokens[:, None]
            seen = torch.cat([seen, grown], dim=1)
            logits = decoder.step(tokens)


def test_each_distinct_prompt_is_prefilled_once():
    model = build("llama")
    ids, mask = grouped(padded=False)
    decoder = read_decoder(model)
    seen, product = [], decoder.layers[0].qkv
    decoder.layers[0].qkv = lambda x: seen.append(len(x)) or product(x)
    generate.sample(decoder, ids, mask, options(max_new_tokens=2, eos_token_id=None))
    assert seen == [3 * 40, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["packed", "plain"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_the_model_s(name, dtype):
    model = build(name).to(dtype)
    ids, mask = prompts(padded=False)
    decoder = read_decoder(model)
    assert decoder.head.packed == (dtype == torch.float32)
    with torch.no_grad():
        decoder.start(ids[:, :4], mask[:, :4], 7)
        for place in (4, 5, 6):
            found = decoder.step(ids[:, place])
        torch.testing.assert_close(found, model(ids).logits[:, -1].float(), atol=1e-4, rtol=1e-4)


def test_the_base_is_not_touched_by_folding():
    model = build("llama", lora=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    ids, mask = prompts(padded=True)
    generate.sample(read_decoder(model), ids, mask, options(do_sample=True))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with model.disable_adapter():
        off = read_decoder(model)
        unit = torch.eye(32)
        projection = model.get_base_model().model.layers[0].self_attn.q_proj
        assert torch.equal(off.layers[0].qkv(unit)[:, :32], projection.base_layer.weight.t())
        on = projection.base_layer.weight + projection.get_delta_weight("default")
    torch.testing.assert_close(read_decoder(model).layers[0].qkv(unit)[:, :32], on.t())


WARPED = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 9}, [TopKLogitsWarper(9)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "all": (
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        [TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
    ),
}


@pytest.mark.parametrize("case", WARPED)
def test_100000_draws_are_of_transformers_distribution(case):
    """Chi-squared over the tokens that the logits processors leave, at p > 1e-4; others are never drawn."""
    given, warpers = WARPED[case]
    torch.manual_seed(1)
    logits = torch.randn(1, V) * 2
    warped = LogitsProcessorList(warpers)(None, logits.clone()) if warpers else logits
    expected = warped.softmax(-1)[0].double()
    config = options(do_sample=True, **{"top_k": 0, "top_p": 1.0} | given)
    counts = torch.bincount(generate.draw(logits.expand(100_000, -1), config)[0], minlength=V).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    wanted = expected[possible] / expected[possible].sum() * counts.sum()
    statistic = ((counts[possible] - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((possible.sum().item() - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-4  # the chi-squared distribution's upper tail


def test_a_draw_at_the_very_end_of_the_sums_is_a_token_that_may_be_drawn(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    assert generate.draw(logits, options(do_sample=True, top_k=0))[0].tolist() == [1]


def test_rows_end_at_any_end_of_text_and_are_padded():
    model = build("llama")
    ids, mask = prompts(padded=False)
    torch.manual_seed(0)
    ids, mask = ids.repeat(20, 1), mask.repeat(20, 1)
    out = generate.sample(read_decoder(model), ids, mask, options(do_sample=True, eos_token_id=[0, 5, 9], top_k=0))
    for row in out[:, 7:].tolist():
        ends = [i for i, token in enumerate(row) if token in (0, 5, 9)]
        assert not ends or set(row[ends[0] + 1 :]) <= {1}
    assert (out == 1).any()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_stock_trainer_samples_with_it(make_trainer, monkeypatch, lora):
    trainer = make_trainer(lora=lora)
    use_fast_sampling(trainer)
    calls = []
    sample = generate.sample
    monkeypatch.setattr(generate, "sample", lambda *args: calls.append(1) or sample(*args))
    trainer.train()
    assert len(calls) == 3 and trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"num_beams": 2}, "num_beams=2"), ({"repetition_penalty": 1.2}, "repetition_penalty=1.2")],
)
def test_what_is_not_supported_goes_to_generate_with_one_line(make_trainer, caplog, given, reason):
    trainer = make_trainer(max_steps=2, generation_kwargs=given)
    use_fast_sampling(trainer)
    trainer.train()
    lines = [r.getMessage() for r in caplog.records if "fast sampling is off" in r.getMessage()]
    assert len(lines) == 1 and reason in lines[0] and trainer.state.global_step == 2


def test_another_architecture_is_named():
    config = transformers.Gemma2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    with pytest.raises(Unsupported, match="Gemma2ForCausalLM is none of LlamaForCausalLM"):
        read_decoder(transformers.AutoModelForCausalLM.from_config(config))


def history(trainer) -> list[dict]:
    trainer.train()
    times = ("step_time", "train_runtime", "train_samples", "train_steps")
    return [{k: v for k, v in entry.items() if not k.startswith(times)} for entry in trainer.state.log_history]


def score_calls(trainer) -> list[bool]:
    """Forward passes of the policy, and whether they made a graph."""
    calls, forward = [], trainer.model.forward

    def spy(*args, **kwargs):
        out = forward(*args, **kwargs)
        if kwargs.get("fused_lm_head"):
            calls.append(out.log_probs.requires_grad)
        return out

    trainer.model.forward = spy
    return calls


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("penalty", [{}, {"estimator": "exact", "placement": "both"}], ids=["stock", "exact"])
def test_one_forward_gives_the_same_run_with_one_pass_less(make_trainer, lora, penalty):
    """The same completions (transformers samples here), rewards and losses; shuffled rows find their own graph."""
    runs = []
    for one_forward in (False, True):
        trainer = make_trainer(lora=lora, max_steps=4)
        if penalty:
            KLPenaltyCallback(trainer, KLPenalty(**penalty))
        if one_forward:
            assert seam_of(trainer).use_one_forward()
        calls = [] if lora else score_calls(trainer)
        runs.append(history(trainer))
        if not lora:
            assert calls == ([True] * 4 if one_forward else [False, True] * 4)
    for plain, reused in zip(*runs, strict=True):
        assert plain == pytest.approx(reused, rel=1e-4, abs=1e-6)


def test_one_forward_makes_a_full_vocabulary_estimate_once(make_trainer, monkeypatch):
    """In the reward and in the loss it is the same number, and its graph is kept with the forward pass's."""
    calls, estimate = [], kl.from_hidden_states
    monkeypatch.setattr(kl, "from_hidden_states", lambda *args: calls.append(True) or estimate(*args))
    for one_forward in (False, True):
        trainer = make_trainer(max_steps=3)
        KLPenaltyCallback(trainer, KLPenalty("exact", "both"))
        if one_forward:
            seam_of(trainer).use_one_forward()
        calls.clear()
        trainer.train()
        assert len(calls) == (3 if one_forward else 6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning")  # TRL calls it so
@pytest.mark.parametrize(
    "options", [{"num_iterations": 2}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}]
)
def test_one_forward_is_off_where_a_batch_is_not_one_update(make_trainer, options):
    trainer = make_trainer(**options)
    assert seam_of(trainer).use_one_forward() is False
    trainer.train()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_rotary_positions_that_depend_on_the_length_are_named(name):
    config = copy.deepcopy(CONFIGS[name])
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(Unsupported, match="rotary positions of type 'dynamic'"):
        read_decoder(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_memory_that_was_freed_stays_with_the_process():
    """A tensor made anew costs a page fault every 4 KB, and none once memory is kept: in a process of its own."""
    script = """if True:
        import resource, torch
        from kl_alliteration.sampling import keep_freed_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                torch.ones(2**22)  # 16 MB
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        given_back = faults()
        assert keep_freed_memory()
        faults()
        print(given_back, faults())
    """
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    given_back, kept = map(int, found.stdout.split())
    assert given_back > 1_000
    assert kept < 100
