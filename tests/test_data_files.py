"""Files of prompts and of pairs: what is taken, and what is refused by file and row before a model is loaded."""

import json
from types import SimpleNamespace

import pytest
from conftest import WORDS, word_tokenizer
from programs import run
from transformers import AutoModelForCausalLM

from kl_alliteration.lab.inputs import check_lengths, load_prompts
from kl_alliteration.lab.pairs import read_pairs

RECIPE = "rloo_tall_tree.py"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


FILES = {
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', "'broken.jsonl': row 2 is no JSON"),
    "broken.json": (b'[{"prompt": "a"},', "'broken.json': no JSON"),
    "bare.jsonl": (b"1\n2\n", "'bare.jsonl': row 1 is no object with a `prompt`: '1'"),
    "empty.jsonl": (b"", "'empty.jsonl' is empty"),
    "empty.csv": (b"\n", "'empty.csv' is empty"),
    "wide.jsonl": ('{"prompt": "a"}\n'.encode("utf-16"), "'wide.jsonl' is UTF-16, not UTF-8: save it as UTF-8"),
    "wide_le.csv": ("prompt\na\n".encode("utf-16-le"), "'wide_le.csv' is UTF-16"),
    "latin.jsonl": (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "'latin.jsonl', row 2: the byte 0xe9 is not UTF-8"),
    "numbers.jsonl": (b'{"prompt": 1}\n', "'numbers.jsonl', row 1: the prompt is a int, 1; it must be text"),
    "numbers.csv": (b"prompt\n1\n2\n", "'numbers.csv', row 1: the prompt is a int, 1; it must be text"),
    "mixed.jsonl": (b'{"prompt": "a"}\n{"prompt": 2}\n', "'mixed.jsonl', row 2: the prompt is a int, 2"),
    "none.jsonl": (b'{"prompt": "a"}\n{"prompt": null}\n', "'none.jsonl' holds an empty prompt, row 2"),
    "list.jsonl": (b'{"prompt": ["a"]}\n', "'list.jsonl', row 1: the prompt is a list, but not one of messages"),
    "mute.jsonl": (
        b'{"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]}\n',
        "'mute.jsonl', row 1: the prompt has a message without `role` or `content`: {'role': 'user'",
    ),
    "other.csv": (b"text\na\n", "'other.csv' has no column `prompt`, only text"),
    "broken.csv": (b'prompt\n"a\nb,c,d\n', "'broken.csv': ParserError"),
    "notes.txt": (b"a", "'notes.txt' must be one of .json, .jsonl, .csv, .parquet, a folder or a Hub id"),
    "bad.parquet": (b"PAR", "'bad.parquet': ArrowInvalid"),
}


def named(name: str) -> SimpleNamespace:
    return SimpleNamespace(dataset_name=name, dataset_config=None, dataset_train_split="train")


@pytest.mark.parametrize("name", FILES)
def test_files_of_prompts(tmp_path, name, capfd):
    content, says = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="^dataset_name: ") as caught:
        load_prompts(named(name), 1)
    assert str(caught.value).removeprefix("dataset_name: ").startswith(says) and "\n" not in str(caught.value)
    assert "Failed to" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["nowhere.csv", "./nowhere", "here/nowhere"])
def test_a_data_set_that_is_not_there(tmp_path, name):
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match=f"^dataset_name: there is no file( or folder)? '{name}'$"):
        load_prompts(named(name), 1)


def test_files_that_are_taken(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,target\nonce upon,x\nthere was,y\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b\xe2\x80\xa8c\xc2\x85d"}\n')
    assert load_prompts(named("a.csv"), 1).to_list() == [
        {"prompt": "once upon", "target": "x"},
        {"prompt": "there was", "target": "y"},
    ]
    assert load_prompts(named("b.jsonl"), 1)["prompt"][:] == ["a", "b\u2028c\x85d"]


def test_pairs_end_at_line_feeds_alone(tmp_path):
    rows = [{"prompt": "a\u2028b", "chosen": "c\x85d", "rejected": "", "target": "e"}] * 2
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "pairs.jsonl").write_text(f"\ufeff{lines}\r\n", encoding="utf-8", newline="")
    assert read_pairs(tmp_path / "pairs.jsonl").to_list() == rows
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="^pairs_from: .*KeyError: no 'chosen'; line 3"):
        read_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": 1, "rejected": "c"}\n')
    with pytest.raises(ValueError, match="must be text or messages; line 1"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_a_prompt_longer_than_the_context_and_a_tokenizer_of_another_model(tmp_path, monkeypatch):
    """The embedded model has 512 positions; both are said before `from_pretrained` of any model."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    rows = [{"prompt": "once"}, {"prompt": "once " * 600}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(RECIPE, "--dataset_name", "long.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "error: dataset_name: the prompt of row 2 has 6" in done.stderr
    assert "with --max_completion_length 100 it is longer than the 512 positions of" in done.stderr
    done = run(RECIPE, "--eval_dataset_name", "long.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "error: eval_dataset_name: the prompt of row 2 has 6" in done.stderr
    done = run(RECIPE, "--eval_dataset_name", "none.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "error: eval_dataset_name: there is no file 'none.jsonl'" in done.stderr
    word_tokenizer([*WORDS, *(f"w{i}" for i in range(5_000))]).save_pretrained(tmp_path / "other")
    done = run(RECIPE, "--tokenizer_name_or_path", "./other", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "error: tokenizer_name_or_path: the tokenizer has the id 50" in done.stderr
    assert "has 4608 embeddings" in done.stderr


def test_a_template_that_does_not_take_the_prompts(tiny_model):
    def tokenize(rows):
        raise RuntimeError("system role not supported")

    tokenizer = word_tokenizer(WORDS)
    model_args = SimpleNamespace(model_name_or_path=str(tiny_model), model_revision="main")
    with pytest.raises(ValueError, match="^dataset_name: the chat template does not take the prompts: system role"):
        check_lengths([{"prompt": "a"}], tokenize, tokenizer, model_args, SimpleNamespace(trust_remote_code=False), 5)
