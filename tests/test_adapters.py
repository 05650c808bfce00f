"""Adapters: off is the base, on is the policy, bit for bit; merging; stacking."""

import json
import os
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    Qwen2Config,
    set_seed,
)

from kl_alliteration import KLPenalty, KLPenaltyCallback, adapters
from kl_alliteration.adapters import (
    check_trains,
    default_lora_config,
    load_adapter,
    merge,
    name_base,
    probe,
    save_stacked,
)
from kl_alliteration.kl import KLWarning
from kl_alliteration.story_lm import MODEL_PATH

IDS = torch.arange(24).view(2, 12)
SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE, intermediate_size=32),
    "qwen2": lambda: Qwen2Config(**SHAPE, intermediate_size=32, num_key_value_heads=1, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=40,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
}
# Linear layers a block: attention and MLP, and never the head.
TARGETS = {"llama": 7, "qwen2": 7, "gpt2": 4, "gpt_neo": 6, "embedded": 7}


def base_model(family: str, dtype=torch.float32):
    set_seed(0)
    if family == "embedded":
        return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=dtype)
    return AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype)


def randomized(model: PeftModel) -> PeftModel:
    """As after training: B is no longer zero."""
    set_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("family", TARGETS)
def test_default_config_finds_all_linear_layers_but_the_head(family, variant):
    options = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}[variant]
    model = get_peft_model(base_model(family), default_lora_config(**options))
    check_trains(model)
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(adapted) == TARGETS[family] * model.config.num_hidden_layers
    assert not any("lm_head" in name for name in adapted)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], "lm_head", ["model.embed_out"]])
def test_an_adapted_head_is_refused_with_the_reason(targets):
    """Trained whole, beside the adapter, it is seen: `tests/test_policy_that_is_scored.py`."""
    with pytest.raises(ValueError, match=r"must not hold \S*(lm_head|embed_out): TRL reads .* would train nothing"):
        default_lora_config(target_modules=targets)
    assert default_lora_config(modules_to_save=["lm_head"]).modules_to_save == ["lm_head"]


@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", TARGETS)
def test_off_is_the_base_and_on_again_the_policy_bit_for_bit(family, dtype, variant):
    base = base_model(family, dtype).eval()
    config = default_lora_config(lora_dropout=0.1, use_dora=variant == "dora")
    model = randomized(get_peft_model(base_model(family, dtype), config)).eval()
    with torch.no_grad():
        expected, on = base(IDS).logits, model(IDS).logits
        with model.disable_adapter():
            off = model(IDS).logits
        again = model(IDS).logits
    assert torch.equal(off, expected) and torch.equal(again, on) and not torch.equal(on, off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", TARGETS)
def test_the_reference_of_training_mode_is_the_base_too(family, dtype):
    """Under gradient checkpointing, with dropout in the adapter and in training mode, as TRL scores it."""
    base = base_model(family, dtype).eval()
    model = randomized(get_peft_model(base_model(family, dtype), default_lora_config(lora_dropout=0.5)))
    # The base's own dropout, where a family has some, is TRL's affair: it sets it to 0.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and "lora" not in str(type(module)):
            if not any(module in m.lora_dropout.values() for m in model.modules() if hasattr(m, "lora_dropout")):
                module.p = 0.0
    model.train()
    model.enable_input_require_grads()
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before 5.23
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    set_seed(2)
    on = model(IDS, use_cache=False).logits
    with torch.no_grad(), model.disable_adapter():
        off = model(IDS, use_cache=False).logits
    on.float().sum().backward()
    set_seed(2)
    again = model(IDS, use_cache=False).logits
    with torch.no_grad():
        expected = base(IDS).logits
    assert torch.equal(off, expected) and torch.equal(again, on)
    gradients = [p.grad for n, p in model.named_parameters() if "lora_A" in n]
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients)


def curves(trainer) -> list[tuple]:
    names = "reward", "kl", "loss", "grad_norm"
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "kl" in entry]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=["lora", "dora", "dropout"])
def test_curves_of_stock_trl_and_of_k1_sum_are_the_same(make_trainer, options):
    stock = make_trainer(lora=default_lora_config(**options), max_steps=4)
    stock.train()
    ours = make_trainer(lora=default_lora_config(**options), max_steps=4)
    ours.add_callback(KLPenaltyCallback(ours, KLPenalty("k1", reduction="sum")))
    ours.train()
    assert curves(ours) == curves(stock) and any(kl != 0 for _, kl, *_ in curves(ours))


def test_a_frozen_adapter_stops_the_run(make_trainer, tmp_path, tiny_model):
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), default_lora_config()).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match="frozen, so nothing would train: load it with is_trainable=True"):
        check_trains(load_adapter(str(tmp_path / "a")))
    check_trains(load_adapter(str(tmp_path / "a"), is_trainable=True))


def test_an_adapter_knows_its_base(tmp_path, monkeypatch):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL_PATH), default_lora_config())
    name_base(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "kl_alliteration/story_lm/model"
    assert load_adapter(str(tmp_path)).get_base_model().config.name_or_path == str(MODEL_PATH)
    written |= {"base_model_name_or_path": "someone/base", "revision": "a" * 40}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="was trained on someone/base, not on another/base"):
        load_adapter(str(tmp_path), base="another/base")
    here = load_adapter(str(tmp_path), base=str(MODEL_PATH), revision="a" * 40)  # a copy of what is on the Hub
    assert here.peft_config["default"].base_model_name_or_path == "someone/base"
    monkeypatch.setattr("kl_alliteration.adapters.commit_of", lambda model: "b" * 40)
    with pytest.raises(ValueError, match=f"revision {'a' * 40} of someone/base, and revision v2 is {'b' * 40}"):
        load_adapter(str(tmp_path), base=str(MODEL_PATH), revision="v2")


@pytest.mark.parametrize("name", ["my models/tiny", "/home/someone/tiny"])
def test_a_base_that_is_neither_here_nor_on_the_hub_is_asked_for(tmp_path, name):
    get_peft_model(base_model("llama"), default_lora_config()).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": name}))
    with pytest.raises(ValueError, match=f"has the base '{name}', which is not here .*--base_model_name_or_path"):
        load_adapter(str(tmp_path))


def test_another_base_than_the_adapter_s_is_said(tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL_PATH), default_lora_config()).save_pretrained(tmp_path)
    for name, size in (("same_shape", 40), ("copy", 40), ("other_shape", 24)):
        AutoModelForCausalLM.from_config(
            LlamaConfig(**SHAPE | {"hidden_size": size}, intermediate_size=32)
        ).save_pretrained(tmp_path / name)
    with pytest.warns(KLWarning), pytest.raises(ValueError, match="does not fit .*same_shape: .*size mismatch"):
        load_adapter(str(tmp_path), base=str(tmp_path / "same_shape"))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    written["base_model_name_or_path"] = "kl_alliteration/story_lm/model"
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="was trained on kl_alliteration/story_lm/model, not on someone/else"):
        load_adapter(str(tmp_path), base="someone/else")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "same_shape")
    get_peft_model(base, default_lora_config()).save_pretrained(tmp_path / "adapter")
    with pytest.warns(KLWarning, match="names another folder as its base, .*same_shape, than .*copy: it is right if"):
        moved = load_adapter(str(tmp_path / "adapter"), base=str(tmp_path / "copy"))
    name_base(moved)
    moved.save_pretrained(tmp_path / "next")
    shutil.rmtree(tmp_path / "same_shape")  # and then the first is gone
    for adapter in ("adapter", "next"):
        found = load_adapter(str(tmp_path / adapter), base=str(tmp_path / "copy") if adapter == "adapter" else None)
        assert found.peft_config["default"].base_model_name_or_path == str(tmp_path / "copy")


def test_what_was_fetched_from_the_hub_is_known_without_it(tmp_path, monkeypatch):
    for name, file in (("adapter", "adapter_config.json"), ("whole", "config.json")):
        folder = tmp_path / f"models--ada--{name}"
        (folder / "snapshots/c").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("c")
        (folder / "snapshots/c" / file).write_text("{}")
    fetched = partial(adapters.try_to_load_from_cache, cache_dir=tmp_path)
    monkeypatch.setattr(adapters, "try_to_load_from_cache", fetched)
    assert adapters.is_adapter("ada/adapter") and not adapters.is_adapter("ada/whole")
    with pytest.raises(Exception):  # noqa: B017  (the client's own, of a network that is not there)
        adapters.is_adapter("ada/nothing")
    monkeypatch.setattr(adapters, "file_exists", lambda name, file: True)
    assert adapters.is_adapter("ada/whole")  # which has an adapter too by now


def test_an_adapter_without_a_tokenizer_has_its_base_s(tmp_path, tiny_model):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), default_lora_config())
    model.save_pretrained(tmp_path / "adapter")
    assert len(adapters.tokenizer_of(str(tmp_path / "adapter"), model)) == len(
        AutoTokenizer.from_pretrained(tiny_model)
    )
    with pytest.raises((OSError, ValueError)):
        adapters.tokenizer_of(str(tmp_path / "adapter"), model.get_base_model())


@pytest.mark.parametrize(("std", "lost"), [(0.005, False), (0.05, False), (0.05, True)])
def test_half_precision_is_held_to_its_own_rounding(monkeypatch, std, lost):
    """The largest logit of the embedded model is 15: a bfloat16 there is 0.06 wide, and 30 layers round."""
    model = get_peft_model(base_model("embedded", torch.bfloat16), default_lora_config())
    set_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    if lost:
        monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **kwargs: self.unload(), raising=False)
    with pytest.raises(ValueError, match="load the base in float32") if lost else nullcontext():
        merge(model)


def test_what_cannot_be_merged_is_one_line():
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="the adapter cannot be merged: "):
        merge(get_peft_model(base_model("llama"), config))


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_merged_logits_agree(family, variant):
    options = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}[variant]
    model = randomized(get_peft_model(base_model(family), default_lora_config(**options)))
    expected = probe(model.eval())
    merged = merge(model)
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(probe(merged), expected, atol=1e-4, rtol=0)


def test_a_merge_that_loses_the_adapter_is_refused(monkeypatch):
    model = randomized(get_peft_model(base_model("llama"), default_lora_config()))
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **kwargs: self.unload(), raising=False)
    with pytest.raises(ValueError, match="the merged model is .* nats off"):
        merge(model)


@pytest.mark.parametrize("rslora", [(), ("below",), ("above",), ("below", "above")], ids=str)
def test_a_stack_is_one_adapter_on_the_base(tmp_path, rslora):
    base_model("llama").save_pretrained(tmp_path / "base")

    def adapted(model, r, seed):
        scaled = {"use_rslora": ("above" if seed == 2 else "below") in rslora}
        config = LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM", **scaled)
        made = get_peft_model(model, config)
        set_seed(seed)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return made

    below = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), 3, 1)
    below.save_pretrained(tmp_path / "below")
    above = adapted(merge(below), 2, 2)
    above.save_pretrained(tmp_path / "above")
    base = str(tmp_path / "base")
    if rslora:  # it has moved since the lower one was trained, from where a path reads as a Hub id
        written = json.loads((tmp_path / "below/adapter_config.json").read_text())
        written["base_model_name_or_path"] = "models/base"
        (tmp_path / "below/adapter_config.json").write_text(json.dumps(written))
        (tmp_path / "base").rename(base := str(tmp_path / "moved"))
    save_stacked(str(tmp_path / "below"), str(tmp_path / "above"), str(tmp_path / "one"), base)
    one = load_adapter(str(tmp_path / "one"))
    assert one.peft_config["default"].r == 5
    torch.testing.assert_close(probe(one.eval()), probe(above.eval()), atol=1e-5, rtol=0)
    assert sorted(os.listdir(tmp_path / "one")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"trainable_token_indices": [1]},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["k_proj"]},
    ],
    ids=str,
)
def test_what_has_no_sum_is_no_stack(tmp_path, options):
    """Said before anything is trained, and where two are to be one."""
    base_model("llama").save_pretrained(tmp_path / "base")
    for name, more in (("plain", {}), ("other", options)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
        get_peft_model(model, config).save_pretrained(tmp_path / name)
    for below, above in (("plain", "other"), ("other", "plain")):
        with pytest.raises(ValueError, match=f"one adapter for plain LoRA alone, got LORA {next(iter(options))}"):
            save_stacked(str(tmp_path / below), str(tmp_path / above), str(tmp_path / "one"))
