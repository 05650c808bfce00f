"""Which options change what is sampled: whatever TRL hands on, and does not score by."""

from types import SimpleNamespace

import pytest

from kl_alliteration import KLMonitorCallback, score_as_sampled
from kl_alliteration.kl import KLWarning
from kl_alliteration.sampling_options import changes_of_sampling


@pytest.mark.parametrize(
    ("asked", "changes"),
    [
        ({"temperature": 0.5}, {"generation_kwargs.temperature": 0.5}),
        ({"temperature": 1.0}, {}),
        ({"do_sample": False}, {"do_sample": False}),
        ({"eos_token_id": 5}, {"generation_kwargs.eos_token_id": [5]}),
        ({"eos_token_id": [5, 7]}, {"generation_kwargs.eos_token_id": [5, 7]}),
    ],
    ids=str,
)
def test_what_generation_kwargs_put_in_the_place_of_the_trainer_s_own(make_trainer, asked, changes):
    trainer = make_trainer(generation_kwargs=asked)
    assert changes_of_sampling(trainer) == changes
    if changes:
        with pytest.warns(KLWarning, match="completions are sampled from another distribution"):
            KLMonitorCallback(trainer)
        with pytest.raises(ValueError, match=f"knows top_k, top_p and min_p, got {next(iter(changes))}"):
            score_as_sampled(trainer)


def test_the_trainer_s_own_ends_are_no_change(make_trainer):
    ends = make_trainer().eos_token_ids
    assert changes_of_sampling(make_trainer(generation_kwargs={"eos_token_id": ends})) == {}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 1.0, "top_k": -1}, {}),
        ({"top_k": 5, "generation_kwargs": {"top_k": -1}}, {}),
        ({"generation_kwargs": {"temperature": 0.5, "seed": 3}}, {"generation_kwargs.temperature": 0.5, "seed": 3}),
    ],
    ids=str,
)
def test_of_an_engine_they_are_the_trainer_s_options(options, changes):
    args = SimpleNamespace(**{"temperature": 1.0, "generation_kwargs": None} | options)
    assert changes_of_sampling(SimpleNamespace(args=args)) == changes
