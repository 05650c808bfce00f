"""Pairs for DPO: who is ranked with whom, what is written, and what comes back."""

from datetime import datetime

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl_alliteration.lab.pairs import ranked, read_pairs, sample_pairs, without_added_ends, write_pairs

RANKED = [(3.0, "c"), (1.0, "a"), (2.0, "b"), (2.0, "B"), (9.0, "d")]


def test_the_best_stands_beside_the_worst_and_equals_are_no_pair():
    """By hand: a 1, b 2, B 2, c 3, d 9. First d over a, then c over b, then B with itself."""
    rows = ranked("once", RANKED, 3)
    assert [(r["chosen"], r["rejected"], r["chosen_reward"], r["rejected_reward"]) for r in rows] == [
        ("d", "a", 9.0, 1.0),
        ("c", "b", 3.0, 2.0),
    ]
    assert len(ranked("once", RANKED, 1)) == 1
    assert ranked("once", [(2.0, "a"), (2.0, "b")], 1) == []


def test_a_conversational_prompt_gets_answers_as_messages():
    prompt = [{"role": "user", "content": "a story"}]
    (row,) = ranked(prompt, [(1.0, "a"), (2.0, "b")], 1)
    assert row["prompt"] == prompt and row["chosen"] == [{"role": "assistant", "content": "b"}]


def test_pairs_of_a_model(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    asked = []

    def reward(prompts, completions):
        asked.extend(prompts)
        return [float(len(text)) for text in completions]

    options = {"group_size": 4, "pairs_per_group": 2, "max_completion_length": 6, "batch_size": 10}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    prompts = ["once upon a time", "there was a", "once"]
    pairs = sample_pairs(model, tokenizer, prompts, reward, **options)
    assert torch.equal(torch.rand(2), expected)
    assert asked == [prompt for prompt in prompts for _ in range(4)]
    assert all(len(pair["chosen"]) == pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    assert 0 < len(pairs) <= 6
    assert pairs == sample_pairs(model, tokenizer, prompts, reward, **options)
    assert pairs != sample_pairs(model, tokenizer, prompts, reward, seed=1, **options)

    path = write_pairs(pairs, tmp_path / "new")
    assert path.name == "pairs.jsonl" and [p.name for p in path.parent.iterdir()] == ["pairs.jsonl"]
    assert read_pairs(path).to_list() == [{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in pairs]


def test_columns_that_json_does_not_know_are_text(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "date": datetime(2024, 5, 1)}
    (back,) = read_pairs(write_pairs([pair], tmp_path)).to_list()
    assert back["date"] == "2024-05-01 00:00:00"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no pairs"),
        ("{", "no file of pairs.* .JSONDecodeError"),
        ('{"prompt": "a"}', "no file of pairs.* .KeyError"),
    ],
)
def test_what_is_no_file_of_pairs(tmp_path, text, says):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"pairs_from: .*{says}"):
        read_pairs(path)


def test_completions_that_would_be_cut_are_refused_but_for_their_added_end():
    def tokenized(*lengths):
        return Dataset.from_dict({"chosen_ids": [[5] * n for n in lengths], "rejected_ids": [[6] * 2] * len(lengths)})

    for lengths, sampled in (((3, 5), False), ((3, 7), True)):  # a word that was cut is spelt in more tokens
        found = without_added_ends(tokenized(*lengths), 4, sampled)
        assert [len(ids) for ids in found["chosen_ids"]] == [3, 4]
    with pytest.raises(ValueError, match="max_completion_length 4: a completion of the pairs has 9 tokens"):
        without_added_ends(tokenized(3, 9), 4, sampled=False)
