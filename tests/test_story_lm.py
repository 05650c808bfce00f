import random
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kl_alliteration import alliteration_reward, judge
from kl_alliteration.lab.story_model import corpus
from kl_alliteration.story_lm import MODEL_PATH, PROMPT

ADJECTIVES = ("look", "trait", "scene")
NOUNS = ("animal", "toy", "food", "place", "person")
VERBS = ("move", "say", "play", "hold", "mend")


@pytest.fixture(scope="module")
def lexicon():
    return corpus.load_lexicon()


def test_the_corpus_is_as_large_as_it_says(lexicon):
    skeletons = corpus.load_skeletons()
    assert len(skeletons) >= 150 and len({s.slug for s in skeletons}) == len(skeletons)
    words = {w for text in corpus.stories(1, 3_000) for w in corpus.split_words(text)}
    assert len(words) >= 1_500


@pytest.mark.parametrize("categories", [ADJECTIVES, NOUNS, VERBS], ids=["adjectives", "nouns", "verbs"])
def test_every_letter_can_alliterate(lexicon, categories):
    letters = {}
    for category in categories:
        for word in lexicon[category]:
            letters.setdefault(word.text[0], set()).add(word.text)
    few = {letter: words for letter in map(chr, range(97, 123)) if len(words := letters.get(letter, set())) < 3}
    # English has hardly any adjective or verb that starts with x, and the lexicon invents none.
    assert set(few) <= {"x"}, few


def test_no_skeleton_has_a_fault():
    assert corpus.lint(draws=20) == []


def test_the_same_seed_tells_the_same_stories():
    assert list(corpus.stories(7, 20)) == list(corpus.stories(7, 20))
    assert list(corpus.stories(7, 20)) != list(corpus.stories(8, 20))


def test_slots_pronouns_and_alternatives_by_hand(lexicon):
    skeleton = corpus.Skeleton(
        "s",
        {"hero": ["elder"], "thing": ["toy"]},
        "once {hero} lost a {thing}. {hero.he} (cried|cried), and {hero.his} {thing+s} too.",
    )
    small = {"elder": [corpus.Word("mother", "elder", gender="f", name="Mom")], "toy": [corpus.Word("owl", "toy")]}
    assert corpus.Story(skeleton, small, random.Random(0)).text == "Once Mom lost an owl. She cried, and her owls too."


@pytest.mark.parametrize(
    ("word", "form", "expected"),
    [
        (corpus.Word("fox", "animal"), "s", "foxes"),
        (corpus.Word("berry", "food"), "s", "berries"),
        (corpus.Word("toy", "toy"), "s", "toys"),
        (corpus.Word("goose", "animal", ("geese",)), "s", "geese"),
        (corpus.Word("race", "move"), "ed", "raced"),
        (corpus.Word("race", "move"), "ing", "racing"),
        (corpus.Word("hurry", "move"), "ed", "hurried"),
        (corpus.Word("run", "move", ("ran", "running")), "ed", "ran"),
        (corpus.Word("run", "move", ("ran", "running")), "ing", "running"),
    ],
)
def test_inflection(word, form, expected):
    assert corpus.inflect(word, form) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a owl met a unicorn.", "An owl met a unicorn."),
        ('"go," said Mia, "and run." she ran!', '"Go," said Mia, "and run." She ran!'),
        ("he ran .  then he hid", "He ran. Then he hid"),
    ],
)
def test_articles_and_capitals(text, expected):
    assert corpus.tidy(text) == expected


@pytest.mark.parametrize("body", ["once {nobody}", "once (a|b", "once {hero.face}", "once a|b"])
def test_a_broken_skeleton_is_a_clear_error(lexicon, body):
    skeleton = corpus.Skeleton("s", {"hero": ["animal"]}, body)
    with pytest.raises(ValueError, match="unknown|unbalanced"):
        corpus.Story(skeleton, lexicon, random.Random(0))


def test_the_model_folder_is_small_and_plain():
    files = {p.name: p.stat().st_size for p in Path(MODEL_PATH).iterdir()}
    assert sum(files.values()) <= 4_000_000
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)


@pytest.fixture(scope="module")
def shown():
    """200 samples of 100 tokens, as the bounds below ask for; the card has the figures."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    assert str(model.dtype) == "torch.float32"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    return judge(model, tokenizer, [PROMPT] * 200, alliteration_reward, seed=11)


def test_the_model_tells_different_stories_that_leave_something_to_choose(shown):
    assert shown.different_share >= 199 / 200
    assert 3 <= shown.reward_mean <= 9
    assert 1.2 <= shown.entropy_per_token <= 3


def test_hardly_any_word_is_made_up(shown):
    known = corpus.known_words()
    words = [w for text in shown.completions for w in corpus.split_words(text.rpartition(" ")[0])]
    assert sum(w not in known for w in words) / len(words) < 0.005
