"""What a reward is asked of prefixes, and what is made of its answers."""

import pytest
import torch
from test_contract import enumerated  # noqa: F401  (a fixture)
from test_reward_to_go import rewarded

from kl_alliteration._trl import partial_rewards, seam_of


class Words:
    """Rewards by text, `None` where it has none; remembers what it was asked."""

    __name__ = "words"

    def __init__(self, scores_prefixes=True):
        self.asked, self.scores_prefixes = [], scores_prefixes

    def __call__(self, completions, completion_ids, noun, log_metric, log_extra, **columns):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        assert (log_metric is None) == (log_extra is None) == bool(self.asked)  # of prefixes there is nothing to log
        self.asked.append(list(zip(texts, completion_ids, noun, strict=True)))
        return [None if text == "a" else float(len(text)) for text in texts]


def worth_of_prefixes(enumerated, completions, functions, step=1, **options):  # noqa: F811
    trainer = rewarded(enumerated(completions, **options), completions)
    trainer.reward_funcs, names = functions, [f.__name__ for f in functions]
    trainer.reward_func_names, trainer.reward_weights = names, torch.tensor([1.0, 10.0][: len(functions)])
    trainer.reward_processing_classes = [None] * len(functions)
    seam_of(trainer)
    trainer.model.train()
    rows = [{"prompt": "b c", "noun": f"n{i}"} for i in range(len(completions))]
    batch = trainer._generate_and_score_completions(rows)
    return partial_rewards(seam_of(trainer), batch["completion_ids"], batch["completion_mask"], step)


def test_rewards_of_prefixes(enumerated):  # noqa: F811
    words = Words()
    found, ends = worth_of_prefixes(enumerated, [[2, 3], [3, 2], [4]], [words])
    # "a" has none and counts as nothing; "a b", "b", "b a" are as long as they are; "c" is over after one token.
    assert found.tolist() == [[0, 3], [1, 3], [1, 1]]
    assert ends.tolist() == [[0, 1], [0, 1], [0, 0]]
    assert words.asked[1] == [("a", [2], "n0"), ("b", [3], "n1")]  # with the row's own columns


def test_prefixes_of_a_conversation_are_the_assistant_s_message(enumerated):  # noqa: F811
    trainer, words = rewarded(enumerated([[3, 2], [4, 4]]), [[3, 2], [4, 4]]), Words()
    ids, completions, texts = trainer._generate(["b c"] * 2)
    trainer._generate = lambda prompts: (ids, completions, [[{"role": "assistant", "content": t}] for t in texts])
    trainer.reward_funcs = [words]
    seam_of(trainer)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c", "noun": "n"}] * 2)
    found, _ = partial_rewards(seam_of(trainer), batch["completion_ids"], batch["completion_mask"], 1)
    assert found.tolist() == [[1, 3], [1, 3]] and [text for text, *_ in words.asked[1]] == ["b", "c"]
    seam_of(trainer).batch.rewarded[1][0].append({"role": "tool", "content": "c"})
    with pytest.raises(ValueError, match="a completion in which tools speak has no prefixes"):
        partial_rewards(seam_of(trainer), batch["completion_ids"], batch["completion_mask"], 1)


def test_a_completion_without_a_reward_has_none_by_token(enumerated):  # noqa: F811
    found, _ = worth_of_prefixes(enumerated, [[2], [3, 2]], [Words()])
    assert found[0].isnan().all() and found[1].tolist() == [1, 3]


def test_a_reward_of_whole_texts_is_not_asked_of_prefixes(enumerated):  # noqa: F811
    whole = Words(scores_prefixes=False)
    whole.__name__ = "whole"
    found, _ = worth_of_prefixes(enumerated, [[3, 2], [4, 4]], [Words(), whole])
    assert found.tolist() == [[1 + 30, 3 + 30], [1 + 30, 3 + 30]] and len(whole.asked) == 1


def test_rewards_are_clipped_as_the_trainer_clips_them(enumerated):  # noqa: F811
    found, _ = worth_of_prefixes(enumerated, [[3, 2], [4, 4]], [Words()], reward_clip_range=(0.0, 2.0))
    assert found.tolist() == [[1, 2], [1, 2]]
