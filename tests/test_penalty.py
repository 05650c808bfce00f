"""`KLPenalty`, the choice as one value: what it refuses, what it says, what it is on a rollout worked by hand."""

import dataclasses
import math

import pytest
import torch

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, kl
from kl_alliteration._trl import seam_of
from kl_alliteration.kl import KLWarning
from kl_alliteration.lab.options import OnlineArguments
from kl_alliteration.penalty import CONTRACT, FORWARD

REFUSED = [
    ({"estimator": "k4"}, "estimator must be one of k1, k2, k3, abs, exact, top_k, got 'k4'"),
    ({"estimator": None}, "estimator must be one of .*, got None"),
    ({"placement": "both ways"}, "placement must be one of reward, loss, both, got 'both ways'"),
    ({"reduction": "max"}, "reduction must be one of sum, mean, got 'max'"),
    ({"direction": "up"}, "direction must be one of reverse, forward, got 'up'"),
    ({"direction": "forward"}, "direction 'forward' needs the estimator 'exact', got 'k1'"),
    ({"estimator": "top_k", "direction": "forward"}, "direction 'forward' needs the estimator 'exact', got 'top_k'"),
    ({"estimator": "top_k", "top_k": 0}, "top_k must be >= 1, got 0"),
    ({"budget_per_token": -0.1}, "budget_per_token must be >= 0 and finite, got -0.1"),
    ({"budget_per_token": math.inf}, "budget_per_token must be >= 0 and finite, got inf"),
    ({"budget_per_token": math.nan}, "budget_per_token must be >= 0 and finite, got nan"),
    (
        {"placement": "loss", "budget_per_token": 0.1},
        "budget_per_token in the loss needs the estimator exact or top_k, got 'k1'; none takes the budget away",
    ),
    ({"estimator": "k3", "placement": "both", "budget_per_token": 0.0}, "budget_per_token in the loss needs"),
    ({"budget_per_token": 0.1, "within_budget": -0.1}, "within_budget must be from 0 to 1, got -0.1"),
    ({"budget_per_token": 0.1, "within_budget": 1.1}, "within_budget must be from 0 to 1, got 1.1"),
    ({"budget_per_token": 0.1, "within_budget": math.nan}, "within_budget must be from 0 to 1, got nan"),
    ({"within_budget": 0.5}, "within_budget 0.5 needs a budget: set budget_per_token"),
    ({"opening_tokens": -1, "opening_price": 1.0}, "opening_tokens must be >= 0, got -1"),
    ({"opening_tokens": 2, "opening_price": math.nan}, "opening_price must be >= 0 and finite, got nan"),
    ({"opening_tokens": 2}, "opening_tokens 2 and opening_price 0 need each other"),
    ({"opening_price": 2.0}, "opening_tokens 0 and opening_price 2 need each other"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_no_penalty_is_refused(options, message):
    """By the value itself, and by the recipes' options under their names."""
    with pytest.raises(ValueError, match=f"^{message}"):
        KLPenalty(**options)
    with pytest.raises(ValueError, match=f"^kl_{message}"):
        OnlineArguments(**{f"kl_{name}": value for name, value in options.items()})


def test_the_options_make_the_same_value():
    assert OnlineArguments().penalty == KLPenalty()
    fields = {"estimator": "exact", "placement": "both", "reduction": "mean", "direction": "forward"}
    fields |= {"budget_per_token": 0.5, "top_k": 7, "within_budget": 0.25, "opening_tokens": 3, "opening_price": 2.0}
    assert set(fields) == {field.name for field in dataclasses.fields(KLPenalty)}
    assert OnlineArguments(**{f"kl_{name}": value for name, value in fields.items()}).penalty == KLPenalty(**fields)


def test_it_is_a_value():
    penalty = KLPenalty("exact", "both", budget_per_token=0.5)
    assert (
        penalty == KLPenalty(estimator="exact", placement="both", budget_per_token=0.5) != KLPenalty("exact", "both")
    )
    assert len({penalty, KLPenalty("exact", "both", budget_per_token=0.5), KLPenalty()}) == 2
    for field in dataclasses.fields(KLPenalty):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(penalty, field.name, getattr(penalty, field.name))
    with pytest.raises(ValueError, match="^reduction must be one of sum, mean, got 'max'"):
        dataclasses.replace(penalty, reduction="max")  # a changed one is checked as a new one is


def test_only_trl_s_own_is_stock():
    assert KLPenalty().is_stock and KLPenalty("k1", "reward", "sum").is_stock
    others = {"estimator": "k2"}, {"placement": "loss"}, {"reduction": "mean"}, {"budget_per_token": 0.0}
    others += ({"opening_tokens": 1, "opening_price": 1.0},)
    assert [KLPenalty(**other).is_stock for other in others] == [False] * 5


@pytest.mark.parametrize(
    ("placement", "in_reward", "in_loss"), [("reward", True, False), ("loss", False, True), ("both", True, True)]
)
def test_where_it_goes(placement, in_reward, in_loss):
    penalty = KLPenalty("k3", placement)
    assert (penalty.in_reward, penalty.in_loss) == (in_reward, in_loss)


def test_which_need_hidden_states():
    needs = [name for name in kl.estimators() if KLPenalty(name, "both").full_vocabulary]
    assert needs == ["exact", "top_k"]


@pytest.fixture
def rollout():
    """Log-ratios 1, 2 and a token that is not counted; -1, 0.5, 0.25. Two counted tokens, and three."""
    ratio = torch.tensor([[1.0, 2.0, 50.0], [-1.0, 0.5, 0.25]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    return kl.Rollout(ratio - 3, torch.full_like(ratio, -3), torch.zeros_like(mask), mask)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3, -0.25]),
        ({"reduction": "mean"}, [1.5, -0.25 / 3]),
        ({"estimator": "k2"}, [0.5 + 2, 0.5 + 0.125 + 0.03125]),
        ({"estimator": "abs"}, [3, 1.75]),
        ({"budget_per_token": 0.0}, [3, 0]),
        ({"budget_per_token": 1.0}, [3 - 2, 0]),
        ({"budget_per_token": 1.0, "reduction": "mean"}, [1.5 - 1, 0]),
        ({"budget_per_token": 1.0, "within_budget": 0.25}, [0.25 * 2 + 1, 0.25 * -0.25]),
        ({"budget_per_token": 1.0, "within_budget": 1.0}, [3, -0.25]),
        ({"estimator": "abs", "budget_per_token": 0.5}, [3 - 1, 1.75 - 1.5]),
        ({"opening_tokens": 1, "opening_price": 2.0}, [3 + 2 * 1, -0.25 + 2 * -1]),
        ({"opening_tokens": 9, "opening_price": 2.0}, [3 + 2 * 3, -0.25 + 2 * -0.25]),
        ({"opening_tokens": 1, "opening_price": 2.0, "reduction": "mean"}, [1.5 + 1, -0.25 / 3 - 2 / 3]),
        ({"opening_tokens": 1, "opening_price": 2.0, "budget_per_token": 1.0}, [1 + 2 * 1, 0 + 2 * -1]),
        ({"estimator": "abs", "budget_per_token": 0.5, "reduction": "mean"}, [1.5 - 0.5, 1.75 / 3 - 0.5]),
    ],
)
def test_on_a_rollout_by_hand(rollout, options, expected):
    assert KLPenalty(**options)(rollout).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "beta", "words"),
    [
        ({}, None, "k1 in the reward, per nat of the sequence"),
        ({"reduction": "mean"}, 40, "k1 in the reward, beta 40 per nat of the token"),
        (
            {"estimator": "k3", "placement": "both"},
            0.05,
            "k3 in the reward and loss, beta 0.05 per nat of the sequence",
        ),
        (
            {"estimator": "exact", "placement": "loss", "direction": "forward"},
            1,
            "forward exact in the loss, beta 1 per nat of the sequence",
        ),
        (
            {"budget_per_token": 0.15},
            1,
            "k1 in the reward, beta 1 per nat of the sequence beyond a budget of 0.15 nats per token",
        ),
        (
            {"budget_per_token": 1, "within_budget": 0.25},
            4,
            "k1 in the reward, beta 4 per nat of the sequence beyond a budget of 1 nats per token, 0.25 of it within",
        ),
        (
            {"opening_tokens": 12, "opening_price": 3.0},
            1,
            "k1 in the reward, beta 1 per nat of the sequence, and 3 times beta per nat of the first 12 tokens",
        ),
        (
            {"budget_per_token": 0.0},
            None,
            "k1 in the reward, per nat of the sequence beyond a budget of 0 nats per token",
        ),
    ],
)
def test_in_words(options, beta, words):
    assert KLPenalty(**options).in_words(beta) == words


def test_its_contract_is_its_row_and_its_complaint_names_the_remedy():
    for (estimator, placement), row in CONTRACT.items():
        penalty = KLPenalty(estimator, placement)
        assert penalty.contract == row
        if row.use_instead is None:
            assert penalty.complaint is None
        else:
            assert penalty.complaint == (
                f"the KL penalty {estimator!r} in the {placement} gives a gradient that is {row.gradient}. "
                f"Use {row.use_instead}."
            )
    for placement, row in FORWARD.items():
        assert KLPenalty("exact", placement, direction="forward").contract == row


def test_an_estimator_of_one_s_own_has_no_row_and_no_complaint(monkeypatch):
    monkeypatch.setitem(kl.SAMPLED, "mine", lambda x: x)
    penalty = KLPenalty("mine", "loss")
    assert penalty.contract.gradient == "unknown: 'mine' has no row in the contract" and penalty.complaint is None


def test_a_warning_is_of_this_package_s_own_kind(make_trainer):
    with pytest.warns(
        kl.KLWarning, match="^the KL penalty 'k1' in the loss gives a gradient that is zero: only noise"
    ):
        callback = KLPenaltyCallback(make_trainer(), KLPenalty("k1", "loss"))
    assert callback.penalty == KLPenalty("k1", "loss") and issubclass(kl.KLWarning, UserWarning)


def test_at_beta_zero_it_says_that_it_charges_nothing(make_trainer, recwarn):
    with pytest.warns(KLWarning, match="beta is 0, GRPO's default: the penalty charges nothing"):
        KLPenaltyCallback(make_trainer(beta=0.0), KLPenalty("exact", "both"))
    recwarn.clear()
    KLPenaltyCallback(make_trainer(beta=0.0))
    assert not [each for each in recwarn if each.category is KLWarning]


def test_by_default_it_is_trl_s_own(make_trainer):
    trainer = make_trainer()
    assert KLPenaltyCallback(trainer).penalty == KLPenalty() == seam_of(trainer).penalty


def test_a_budget_of_zero_is_a_budget(make_trainer):
    """The penalty is the positive part of a completion's log-ratio, and what is below the reference costs nothing."""
    penalty = KLPenalty("k1", budget_per_token=0.0)
    trainer = make_trainer(max_steps=4, beta=0.5)
    trainer.add_callback(KLPenaltyCallback(trainer, penalty))
    trainer.add_callback(KLMonitorCallback(trainer))
    seam, batches, generate = seam_of(trainer), [], trainer._generate_and_score_completions

    def spy(inputs):
        output = generate(inputs)
        rewards = torch.tensor(list(trainer._logs["rewards"]["reward"]))
        batches.append((seam.batch.rollout, seam.last_penalty, rewards, output["advantages"]))
        return output

    trainer._generate_and_score_completions = spy
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "kl" in entry]
    for entry, (rollout, found, rewards, advantages) in zip(entries, batches, strict=True):
        sums = (rollout.ref_log_ratio * rollout.completion_mask).sum(1)
        positive = torch.tensor([max(value, 0.0) for value in sums.tolist()])
        torch.testing.assert_close(found, positive)
        total = (rewards - 0.5 * positive).view(-1, 4)
        others = torch.stack([(row.sum() - row) / 3 for row in total])
        torch.testing.assert_close(advantages, (total - others).view(-1), atol=1e-4, rtol=1e-4)
        assert entry["kl/over_budget_share"] == (sums > 0).float().mean().item()
        assert "kl/budget_use" not in entry  # a share of nothing is no number
    assert 0 < entry["kl/over_budget_share"] < 1 and sums.min() < -1e-4 and sums.max() > 1e-4
    assert "beyond a budget of 0 nats per token" in penalty.in_words(trainer.beta)
