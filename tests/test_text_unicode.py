"""Texts of other scripts: a letter is one with its marks, and the study's own count is what it was."""

import re
import string
import unicodedata
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kl_alliteration.rewards import AlliterationReward, StartingLetterReward, alliteration_reward
from kl_alliteration.rewards.reward_model import AlliterationRewardModel
from kl_alliteration.text import alliterating_pairs, bare, count_alliterations, distinct_n, identical_share

KI, KII = "\u0915\u093f", "\u0915\u0940"  # Hindi: ka with the sign i, ka with the sign ii
BA, BI = "\u0628\u064e", "\u0628\u0650"  # Arabic: ba with fatha, ba with kasra


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (KI, KI),
        (f"\u201c{KII}\u0964\u201d", KII),  # in quotes, before a danda
        (f"({BA})", BA),
        ("\u0e17\u0e35\u0e48!", "\u0e17\u0e35\u0e48"),  # Thai: a vowel and a tone on one letter
        ("cafe\u0301,", "cafe\u0301"),
        ("tall\u2764\ufe0f", "tall"),  # a heart; its variation selector is a mark, of the heart
        ("\u2764\ufe0f", ""),
        ("\U0001f469\u200d\U0001f467tree\U0001f1eb\U0001f1ee", "tree"),
        ("\u200btall\ufeff", "tall"),
        ("'\"Tall,'", "Tall"),
        ("--", ""),
        ("", ""),
    ],
)
def test_a_word_without_what_is_around_it(word, expected):
    assert bare(word) == expected


def test_two_words_that_differ_in_a_vowel_sign_are_two_words():
    pairs = alliterating_pairs(f"{KI} {KII} {BA} {BI}".split())
    assert len(pairs) == 2 and identical_share(pairs) == 0
    assert AlliterationReward("mine", distinct=True).score(f"{KI} {KII}") == 1
    assert AlliterationReward("mine", distinct=True).score(f"{KI} {KI}\u0964") == 0
    composed = alliterating_pairs(["\u00e9t\u00e9", unicodedata.normalize("NFD", "\u00e9t\u00e9")])
    assert composed == [] or identical_share(composed) == 1
    (pair,) = alliterating_pairs(["caf\u00e9", "cafe\u0301"])
    assert pair.identical  # one word, however its accent is written


def test_distinct_2_of_three_different_pairs_is_1():
    """By hand: three texts of two words, no two pairs alike."""
    words = ["\u0915\u093f", "\u0915\u0940", "\u0915\u0941"]
    assert distinct_n([f"{a} {b}" for a, b in zip(words, words[1:] + words[:1], strict=True)], 2) == 1
    assert distinct_n([f"{BA} {BI}", f"{BI} {BA}"], 2) == 1
    assert distinct_n(["tall tree.", "Tall, tree", "a tree"], 2) == pytest.approx(2 / 3)


@given(st.text(alphabet=string.printable))
@settings(max_examples=100, deadline=None)
def test_ascii_is_as_it_was(text):
    def bare_before(word):
        return re.sub(r"^[^a-z0-9]+|[^a-z0-9]+$", "", word, flags=re.I)

    assert [bare(word) for word in text.split()] == [bare_before(word) for word in text.split()]
    runs = list(pairwise(re.findall(r"[\w'-]+", text.lower())))
    assert distinct_n([text], 2) == (len(set(runs)) / len(runs) if runs else 0.0)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_study_s_count_keeps_its_definition(text):
    """First characters of whitespace-separated words, lower-cased: marks and all."""
    initials = [word[0].lower() for word in text.split()]
    expected = sum(a == b for a, b in zip(initials, initials[1:], strict=False))
    assert count_alliterations(text) == expected == alliteration_reward(prompts=[""], completions=[text])[0]


def test_a_dotted_capital_i_is_no_i():
    assert AlliterationReward("mine", letters="\u0130").score("it is in \u0130zmir \u0130stanbul") == 1
    assert AlliterationReward("mine", letters="i").score("it is \u0130zmir \u0130stanbul") == 1
    assert StartingLetterReward("i")(prompts=[""], completions=["it \u0130zmir"]) == [1]
    assert StartingLetterReward("\u0130")(prompts=[""], completions=["it \u0130zmir"]) == [1]


def piece_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "</s>", "\u2581tall", "\u2581tree", "\u2581", "x"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "</s>", "\u0120tall", "\u0120tree", "\u0120", "x"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("make", [piece_tokenizer, byte_tokenizer])
def test_tokens_that_were_added_are_scored_as_they_are_decoded(make):
    """Every row of three tokens with an added one, or an id that the tokenizer does not have, in the middle."""
    tokenizer = make()
    tokenizer.add_tokens(
        [AddedToken(t, special=False) for t in ("\u2581\u2581", "\u0120t", " t", "\u2581\u2581tip", "t")]
    )
    tokenizer.add_tokens([AddedToken("<mark>", special=True)], special_tokens=True)
    model = AlliterationRewardModel.from_tokenizer(tokenizer)
    ids = [[a, b, c] for a in (2, 5) for b in range(2, len(tokenizer)) for c in (2, 3, 5)]
    found = model(torch.tensor(ids)).logits.squeeze(1).tolist()
    assert found == [count_alliterations(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]


def test_an_id_that_the_tokenizer_does_not_have_is_no_text():
    tokenizer = piece_tokenizer()
    model = AlliterationRewardModel.from_tokenizer(tokenizer)
    beyond = len(tokenizer) + 58
    assert model(torch.tensor([[2, beyond, 3], [2, -100, 3], [2, 1, 3]])).logits.flatten().tolist() == [1, 1, 1]
