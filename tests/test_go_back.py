"""Part of the way back to the base: the weights by hand, an adapter by PEFT's own scaling, a saved point loads."""

import json
import os

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from programs import ROOT, run
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from kl_alliteration.adapters import go_back

IDS = torch.arange(24).view(2, 12)
RECIPE = "rloo_tall_tree.py"
SMALL = "--max_steps 2 --num_generations 6 --per_device_train_batch_size 6 --max_completion_length 8 --eval_stories 8"


def tiny(seed: int):
    torch.manual_seed(seed)
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape, intermediate_size=32)).eval()


def with_adapter(config):
    model = get_peft_model(tiny(0), config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_whole_model_by_hand(fraction):
    base, model = tiny(0), tiny(1)
    expected = [(1 - fraction) * b + fraction * m for b, m in zip(base.parameters(), model.parameters(), strict=True)]
    go_back(model, fraction, base)
    for found, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
@torch.no_grad()
def test_an_adapter_as_peft_scales_it(fraction):
    targets = ["q_proj", "down_proj", "embed_tokens"]
    model = with_adapter(LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    with rescale_adapter_scale(model, fraction):
        expected = model(IDS).logits
    whole = model(IDS).logits
    go_back(model, fraction)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert fraction == 1 or not torch.allclose(whole, expected)


@pytest.mark.parametrize("other", ["ref", "default_2"])
@torch.no_grad()
def test_an_adapter_that_is_not_active_stays_as_it_is(other):
    """A run's frozen reference is one."""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = with_adapter(config)
    model.add_adapter(other, config)
    for name, parameter in model.named_parameters():
        if f".{other}." in name:
            parameter.fill_(1.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    go_back(model, 0.5)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all(name.endswith("lora_B.default.weight") for name in moved)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
    ids=["dora", "modules_to_save", "bias", "trainable tokens", "ia3"],
)
def test_what_is_no_product_is_refused(config):
    with pytest.raises(ValueError, match="only plain LoRA"):
        go_back(with_adapter(config), 0.5)


def test_an_adapter_with_a_part_of_the_base_in_it_is_refused():
    with pytest.raises(ValueError, match="whose off is its base can go part of the way back to it: init_lora_weights"):
        go_back(with_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")), 0.5)


def test_a_whole_model_needs_its_own_base():
    with pytest.raises(ValueError, match="a whole model goes back to a base: give it"):
        go_back(tiny(1), 0.5)
    other = tiny(0)
    other.resize_token_embeddings(other.config.vocab_size + 3)
    with pytest.raises(ValueError, match="the base has other parameters than the model"):
        go_back(tiny(1), 0.5, other)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_is_from_0_to_1(fraction):
    with pytest.raises(ValueError, match="fraction must be from 0 to 1"):
        go_back(tiny(1), fraction, tiny(0))


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_the_curve_and_the_point_that_is_kept(tmp_path, adapter):
    more = ["--use_peft", "--lora_r", "4"] if adapter else []
    run(RECIPE, "--output_dir", "out", "--learning_rate", "0.01", *SMALL.split(), *more, cwd=tmp_path)
    known = (ROOT / "kl_alliteration/story_lm/frontier.json").read_text()
    few = "--stories", 12, "--fractions", 1, 0, 0.5, "--frontier", "f.json"
    (tmp_path / "f.json").write_text(known)
    done = run("go_back.py", "--run", "out", *few, cwd=tmp_path, check=False)
    assert "f.json does not serve: the yardstick's max_new_tokens is 100, and out has 8" in done.stderr
    (tmp_path / "f.json").write_text(known.replace('"max_new_tokens":100', '"max_new_tokens":8'))
    told = run("go_back.py", "--run", "out", *few, cwd=tmp_path).stdout
    points = json.loads((tmp_path / "out/way.json").read_text())
    assert [point["fraction"] for point in points] == [0, 0.5, 1] and told.count("\n| ") == 1 + 3
    kls = [point["exact_kl_per_sequence"] for point in points]
    assert kls[0] == pytest.approx(0, abs=1e-5) and kls[0] < kls[1] < kls[2]
    assert (tmp_path / "out/way.png").stat().st_size > 5_000

    (tmp_path / "out/metrics.jsonl").write_text('{"loss": 0.5, "rewards/chosen": 0.1, "step": 5}\n')  # as DPO's
    alone = run("go_back.py", "--run", "out", "--stories", 4, "--fractions", 1, 0, cwd=tmp_path)
    assert "way.png" in alone.stdout

    run("go_back.py", "--run", "out", "--keep", "0.5", "--output_dir", "near", cwd=tmp_path)
    assert ("adapter_config.json" if adapter else "model.safetensors") in os.listdir(tmp_path / "near")
    if adapter:
        config = json.loads((tmp_path / "near/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "kl_alliteration/story_lm/model"  # on every machine
    assert AutoTokenizer.from_pretrained(tmp_path / "near").eos_token
    run("tell_stories.py", "--model_name_or_path", "near", "--stories", 1, cwd=tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--run", "nowhere"], "run: 'nowhere' has no recipe.yaml"),
        (["--run", "out", "--keep", "0.5"], "keep and output_dir go together"),
        (["--run", "out", "--frontier", "nowhere.json"], "nowhere.json"),
        (["--run", "out", "--keep", "1.5", "--output_dir", "new"], "fraction must be from 0 to 1, got 1.5"),
        (["--run", "out", "--keep", "0.5", "--output_dir", "out"], "output_dir: 'out' is not empty"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, options, says):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/recipe.yaml").write_text("{}\n")
    (tmp_path / "out/model.safetensors").write_bytes(b"")
    done = run("go_back.py", *options, cwd=tmp_path, check=False)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1]
