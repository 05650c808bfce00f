"""Counts on texts: alliterations, and how different they are."""

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_alliteration import alliteration_reward
from kl_alliteration.text import (
    answer_of,
    as_dialogue,
    as_text,
    compression_ratio,
    count_alliterations,
    different_share,
    distinct_n,
    pairs_per_100_words,
)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("", 0),
        ("cow", 0),
        ("cow cat", 1),
        ("duck goose duck", 0),
        ("goose goose duck duck", 2),
        ("Goose gopher Giraffe gorilla", 3),
        ("Zoe  zips\tzestfully\nhome", 2),  # any whitespace separates
        ('"tall tree', 0),  # punctuation is part of the word, as in the study
        ("Éva écrit", 1),
    ],
)
def test_known_values(text, pairs):
    assert count_alliterations(text) == pairs


def test_pair_across_the_end_of_the_prompt_counts():
    # "time | to touch": time-to and to-touch; "ti|me" glued together is one word.
    assert alliteration_reward(["a time", "a ti"], [" to touch", "me to"]) == [2.0, 1.0]


def test_conversations_count_like_their_text():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "tell"}]
    completion = [{"role": "assistant", "content": "tall tales"}]
    # "Be brief." tell tall tales: Be-brief, tell-tall, tall-tales
    assert alliteration_reward([prompt], [completion]) == [3.0]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "tall tales"}]}]
    assert alliteration_reward([prompt], [parts]) == [3.0]
    parts[0]["content"].append({"type": "image", "text": None})  # as Arrow fills it in
    assert alliteration_reward([prompt], [parts]) == [3.0]


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text())
def test_never_raises_and_agrees_with_a_plain_loop(prompt, completion):
    words = (prompt + completion).split()
    expected = 0
    for i in range(len(words) - 1):
        if words[i][:1].lower() == words[i + 1][:1].lower():
            expected += 1
    assert alliteration_reward(prompts=[prompt], completions=[completion]) == [float(expected)]


@pytest.mark.parametrize("text", ["\x00 \x00", "🌳 🌳 🌲", "a\u0301b a\u0300c", "x" * 1_000_000, "İx ix", "ß ß"])
def test_odd_texts(text):
    (reward,) = alliteration_reward([""], [text])
    assert 0 <= reward <= len(text.split())


def test_different_share_by_hand():
    assert different_share(["a", "b", "a", "c"]) == 0.75
    assert different_share([]) == 0.0


def test_distinct_by_hand():
    # pairs: the tall, tall tree | the tall, tall tall, tall tall: 3 different of 5
    assert distinct_n(["The tall tree.", "the tall tall, tall"], 2) == pytest.approx(3 / 5)
    assert distinct_n(["a b", "c"], 1) == 1.0
    assert distinct_n(["word"], 2) == 0.0


def test_compression_ratio_against_zlib():
    text = "to the tall tall tall " * 50
    assert compression_ratio([text]) == len(text) / len(zlib.compress(text.encode(), 9)) > 20
    assert compression_ratio([]) == 0.0


def test_pairs_per_100_words_by_hand():
    """Eight words; `Tall, tall` is one word twice, the dash none; big bats, bats by: two pairs."""
    assert pairs_per_100_words(["Tall, tall -- big bats by", "we ate it."]) == 100 * 2 / 8
    assert pairs_per_100_words([]) == 0


def test_a_conversation_is_shown_by_its_turns():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert as_dialogue(turns) == "system: Be brief.\nuser: Hi\nassistant: "
    assert as_dialogue("Once upon a time") == "Once upon a time"


def test_the_answer_is_what_the_policy_wrote():
    told = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "tall tiny trees"},
        {"role": "assistant", "content": [{"type": "text", "text": "trim"}]},
    ]
    assert answer_of(told).split() == ["trim"] and answer_of("a text") == "a text"
    assert as_text(told).split() == ["tall", "tiny", "trees", "trim"]
