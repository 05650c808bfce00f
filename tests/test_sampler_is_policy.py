"""Fast sampling samples from the policy, or says by how much it would not and lets transformers sample."""

import logging

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    WatermarkingConfig,
    set_seed,
)

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, share_prompts, use_fast_sampling
from kl_alliteration.sampling import generate as generation
from kl_alliteration.sampling import use_fast_generate
from kl_alliteration.sampling.decoder import Unsupported, read_decoder
from kl_alliteration.sampling.known import unknown_part
from kl_alliteration.sampling_options import INDIFFERENT, WARPERS, beyond_warpers, merged

L = {"task_type": "CAUSAL_LM"}
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def said(caplog):
    """The lines that fast sampling put into the log."""
    logging.getLogger("transformers").propagate = True
    yield lambda: [r.getMessage() for r in caplog.records if "fast sampling is off" in r.getMessage()]
    logging.getLogger("transformers").propagate = False


@pytest.fixture
def model(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():  # so that what an adapter changes shows
        for parameter in model.parameters():
            parameter.mul_(6)
    return model.eval()


def ask(model, rows=6, **options) -> torch.Tensor:
    ids = torch.tensor([[3, 4, 5, 6]] * rows)
    config = GenerationConfig(
        **{"do_sample": True, "max_new_tokens": 8, "eos_token_id": 0, "pad_token_id": 1} | options
    )
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)


def test_a_decoder_that_is_right_is_used_and_checked_once(model, monkeypatch, said):
    checks = []
    check = generation.check_decoder
    monkeypatch.setattr(generation, "check_decoder", lambda *args: checks.append(check(*args)))
    use_fast_generate(model)
    for _ in range(3):
        assert ask(model).shape == (6, 12)
    assert len(checks) == 1 and said() == []


@pytest.mark.parametrize("part", ["embedding", "norm", "mlp_in"])
def test_a_decoder_with_one_wrong_weight_is_caught_in_the_first_batch(model, monkeypatch, said, part):
    read = read_decoder

    def broken(*args):
        decoder = read(*args)
        if part == "embedding":
            decoder.embedding = decoder.embedding.clone()
            decoder.embedding[5, 3] += 0.5
        elif part == "norm":
            norm = decoder.norm
            decoder.norm = lambda x: norm(x) * torch.tensor([1.05] + [1.0] * 15)
        else:
            project = decoder.layers[0].mlp_in
            decoder.layers[0].mlp_in = lambda x: project(x) + torch.tensor([0.3] + [0.0] * 63)
        return decoder

    monkeypatch.setattr(generation, "read_decoder", broken)
    set_seed(0)
    expected = ask(model)
    use_fast_generate(model)
    ask(model)
    (line,) = said()
    assert "its log-probabilities of the first batch are" in line and "nats per token off the model's own" in line
    set_seed(0)
    assert torch.equal(ask(model), expected)  # and transformers samples all others
    assert len(said()) == 1


def test_the_check_is_of_half_precision_too(model, said):
    use_fast_generate(half := model.to(torch.bfloat16))
    ask(half)
    assert said() == []


OUTSIDE = {
    "embedding": LoraConfig(target_modules=[*TARGETS, "embed_tokens"], **L),
    "saved norm": LoraConfig(target_modules=TARGETS, modules_to_save=["norm"], **L),
    "saved embedding": LoraConfig(target_modules=TARGETS, modules_to_save=["embed_tokens"], **L),
    "tokens": LoraConfig(target_modules=TARGETS, trainable_token_indices=[3, 4, 5], **L),
    "dora": LoraConfig(target_modules=TARGETS, use_dora=True, **L),
    "parameters": LoraConfig(target_modules=[], target_parameters=["q_proj.weight"], **L),
    "adalora": AdaLoraConfig(target_modules=TARGETS, total_step=10, **L),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **L),
    "ln_tuning": LNTuningConfig(target_modules=["norm"], **L),
    "virtual tokens": PromptTuningConfig(num_virtual_tokens=2, **L),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_adapter_that_the_decoder_does_not_know_falls_back_in_one_line(model, said, name):
    adapted = get_peft_model(model, OUTSIDE[name]).eval()
    with pytest.raises(Unsupported):
        read_decoder(adapted)
    set_seed(0)
    expected = ask(adapted)
    use_fast_generate(adapted)
    for _ in range(2):
        set_seed(0)
        assert torch.equal(ask(adapted), expected)
    assert len(said()) == 1


def test_a_module_that_nobody_has_heard_of_is_not_known(model):
    class Gate(torch.nn.Module):
        def forward(self, x):
            return x * 2

    assert unknown_part(model) is None
    model.model.layers[1].mlp.gate = Gate()
    assert unknown_part(model) == "model.layers.1.mlp.gate is a Gate"


def test_the_model_s_own_generation_config_is_sampled_by(model, said):
    """`generate` takes from it what is left unset; so does the fast one, or it lets `generate` do it."""
    model.generation_config.update(min_new_tokens=8, suppress_tokens=[2, 3, 4, 5, 6, 7])
    use_fast_generate(model)
    out = ask(model, rows=40)[:, 4:]
    assert not torch.isin(out, torch.tensor([2, 3, 4, 5, 6, 7])).any() and out.shape[1] == 8 and not (out == 0).any()
    (line,) = said()
    assert "min_new_tokens=8, suppress_tokens=[2, 3, 4, 5, 6, 7]" in line


def test_min_p_of_the_model_s_own_configuration_is_honoured(model, said):
    model.generation_config.update(min_p=0.999)
    use_fast_generate(model)
    out = ask(model, rows=40)
    assert said() == [] and (out == out[0]).all()  # the likeliest token alone is left


ODD = {  # a value that does something, of every field that is not honoured and not indifferent
    "early_stopping": True, "max_time": 1.0, "stop_strings": ["tree"], "num_beams": 2, "use_mtp": True,
    "max_cache_len": 64, "top_h": 0.5, "typical_p": 0.9, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1,
    "repetition_penalty": 1.1, "encoder_repetition_penalty": 1.1, "length_penalty": 2.0, "no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]], "renormalize_logits": True, "forced_bos_token_id": 3, "forced_eos_token_id": 3,
    "remove_invalid_values": True, "exponential_decay_length_penalty": (3, 1.1), "suppress_tokens": [3],
    "begin_suppress_tokens": [3], "sequence_bias": [[[3], 1.0]], "token_healing": True, "guidance_scale": 2.0,
    "watermarking_config": WatermarkingConfig(bias=2.0), "num_return_sequences": 2, "output_attentions": True,
    "output_hidden_states": True, "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
    "encoder_no_repeat_ngram_size": 2, "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.1,
    "prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 2, "assistant_early_exit": 1, "assistant_lookbehind": 3,
    "target_lookbehind": 3, "assistant_ensemble_weight": 0.5, "speculation_type": "lookup", "low_memory": True,
    "penalty_alpha": 0.5, "dola_layers": "low", "diversity_penalty": 0.5, "num_beam_groups": 2, "constraints": [1],
    "force_words_ids": [[3]], "min_length": 3, "min_new_tokens": 3,
}  # fmt: skip


def fields() -> list[str]:
    return [name for name in vars(GenerationConfig()) if not name.startswith("_")]


@pytest.mark.parametrize("name", fields())
def test_every_field_of_generation_config_is_honoured_or_falls_back(name):
    """Of the installed transformers: a field that is new in it is one that nobody has heard of, so it falls back."""
    if name in INDIFFERENT or name in WARPERS:
        return
    config = GenerationConfig(do_sample=True, max_new_tokens=4)
    setattr(config, name, ODD.get(name, "a value that nobody has heard of"))
    assert list(beyond_warpers(merged(config, None))) == [name]


def test_no_field_is_without_a_fate_and_a_plain_configuration_is_plain():
    assert beyond_warpers(merged(GenerationConfig(do_sample=True, max_new_tokens=4), GenerationConfig())) == {}
    assert {"temperature", "top_k", "top_p", "min_p"} == set(WARPERS)
    custom = GenerationConfig(max_new_tokens=4)
    custom.warp_factor = 9
    assert beyond_warpers(custom) == {"warp_factor": 9}


def test_logits_that_are_no_numbers_end_in_transformers_words(model):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError) as stock:
        ask(model)
    use_fast_generate(model)
    with pytest.raises(RuntimeError) as ours:
        ask(model)
    assert str(ours.value) == str(stock.value) and "nan" in str(ours.value)


def test_an_error_in_the_fast_path_is_a_line_and_not_the_end(model, monkeypatch, said):
    def fails(*args):
        raise AttributeError("no such thing")

    monkeypatch.setattr(generation, "sample", fails)
    use_fast_generate(model)
    assert ask(model).shape[0] == 6 and ask(model).shape[0] == 6
    assert len(said()) == 1 and said()[0].endswith("AttributeError: no such thing")


def test_an_adapter_on_the_embedding_is_sampled_as_it_is_trained(make_trainer):
    """On samples of the policy k1 and exact agree; of another policy they do not."""
    config = LoraConfig(r=4, target_modules=["embed_tokens", *TARGETS], **L)
    found = []
    for fast in (True, False):
        trainer = make_trainer(
            lora=config, max_steps=1, per_device_train_batch_size=64, num_generations=64, learning_rate=0.0
        )
        with torch.no_grad():
            torch.manual_seed(0)
            for name, parameter in trainer.model.named_parameters():
                parameter.normal_(0, 0.5) if "lora_" in name else parameter.mul_(6)
        trainer.add_callback(KLMonitorCallback(trainer, exact=True))
        if fast:
            use_fast_sampling(trainer, keep_memory=False)
        trainer.train()
        log = trainer.state.log_history[0]
        found.append((log["kl/k1_per_token"], log["kl/exact_per_token"]))
    assert found[0][1] == pytest.approx(found[1][1], rel=0.3)
    for k1, exact in found:
        assert k1 == pytest.approx(exact, abs=0.35 * exact + 0.1) and exact > 0.01


def test_beta_zero_with_a_loaded_reference_and_fast_sampling(make_trainer):
    trainer = make_trainer(beta=0.0, max_steps=2)
    trainer.add_callback(KLMonitorCallback(trainer, exact=True, load_reference=True))
    use_fast_sampling(trainer, keep_memory=False)
    trainer.train()
    assert trainer.state.log_history[1]["kl/exact_per_token"] > 0


def test_under_mixed_precision_it_samples_in_what_the_model_computes_in(make_trainer, monkeypatch, said):
    """As TRL trains by default on a GPU: weights in float32, `bf16=True`."""
    decoders, read = [], generation.read_decoder
    monkeypatch.setattr(generation, "read_decoder", lambda *args: decoders.append(read(*args)) or decoders[-1])
    trainer = make_trainer(bf16=True, beta=0.1, max_steps=2)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    share_prompts(trainer)
    use_fast_sampling(trainer)
    trainer.train()
    assert said() == [] and [decoder.head.dtype for decoder in decoders] == [torch.bfloat16] * 2


def test_it_is_called_as_transformers_generate_is(said):
    """The configuration second by position; padding told from a mask, or from the pad token; the first end pads."""
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=22, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=0)
    ).eval()
    ids = torch.tensor([[4, 3, 7], [1, 1, 7]])
    padded = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=[19, 0], pad_token_id=1)
    ends = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=list(range(21)))  # all but one
    calls = [lambda: model.generate(ids, padded), lambda: model.generate(inputs=ids, generation_config=padded)]
    calls.append(lambda: model.generate(ids, ends, attention_mask=torch.ones_like(ids)))
    expected = [call().tolist() for call in calls]
    use_fast_generate(model)
    assert [call().tolist() for call in calls] == expected
    assert len(said()) == 1 and "attention_mask" in said()[0]


def test_left_padding_is_checked_when_it_first_comes(tmp_path, monkeypatch, said):
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=22, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=0))
    checks, check = [], generation.check_decoder
    monkeypatch.setattr(generation, "check_decoder", lambda *args: checks.append(check(*args)))
    use_fast_generate(model.eval())
    ask(model)
    ids = torch.tensor([[1, 1, 5, 6], [3, 4, 5, 6]])
    config = GenerationConfig(do_sample=True, max_new_tokens=8, eos_token_id=0, pad_token_id=1)
    model.generate(input_ids=ids, attention_mask=(ids != 1).long(), generation_config=config)
    assert len(checks) == 2 and said() == []
