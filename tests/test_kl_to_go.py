"""KL by token: the same gradient by enumeration through TRL's own loss, less noise, and its baseline by hand."""

from functools import partial

import pytest
import torch
from enumeration import ENDING, FIXED, Tables, flat, move, parameters, reverse_kl
from test_contract import BETA, enumerated  # noqa: F401  (a fixture)
from test_grpo_penalty import FACTOR
from test_grpo_penalty import enumerated as grpo_enumerated  # noqa: F401  (a fixture)
from test_grpo_penalty import trained_gradient as grpo_gradient
from test_off_policy import UNCLIPPED
from test_reward_to_go import make, rewarded, trained_gradient

from kl_alliteration import KLPenalty, KLPenaltyCallback, use_kl_to_go, use_reward_to_go
from kl_alliteration._trl import seam_of
from kl_alliteration.credit import charged_with_others_futures

PENALTIES = {  # budgets that about half of the texts are beyond
    "k1": KLPenalty("k1", "reward"),
    "k2": KLPenalty("k2", "reward"),
    "abs": KLPenalty("abs", "both"),
    "k3": KLPenalty("k3", "both"),
    "exact": KLPenalty("exact", "both"),
    "mean": KLPenalty("exact", "both", "mean"),
    "forward": KLPenalty("exact", "both", direction="forward"),
    "top_k": KLPenalty("top_k", "both", top_k=2),
    "budget": KLPenalty("exact", "both", budget_per_token=1.5),
    "budget_of_k1": KLPenalty("k1", "reward", budget_per_token=0.3, within_budget=0.25),
    "opening": KLPenalty("exact", "both", budget_per_token=1.6, opening_tokens=1, opening_price=2.0),
    "opening_mean": KLPenalty("k1", "reward", "mean", opening_tokens=1, opening_price=2.0),
}


@pytest.mark.filterwarnings("ignore::kl_alliteration.kl.KLWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("completions", [FIXED, ENDING], ids=["fixed", "ending"])
@pytest.mark.parametrize("name", PENALTIES)
def test_gradient_is_that_of_the_penalty(enumerated, name, completions, lora):  # noqa: F811
    found = []
    for to_go in (False, True):
        trainer = rewarded(enumerated(completions, lora=lora), completions)
        KLPenaltyCallback(trainer, PENALTIES[name])
        use_reward_to_go(trainer, 0.6)  # beside it, so that each has a part of the credit
        if to_go:
            use_kl_to_go(trainer)
        found.append(trained_gradient(trainer, completions))
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["k1", "budget", "opening"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_gradient_of_grpo(grpo_enumerated, loss_type, name):  # noqa: F811
    found = []
    for to_go in (False, True):
        trainer = rewarded(grpo_enumerated(loss_type=loss_type), FIXED)
        KLPenaltyCallback(trainer, PENALTIES[name])
        if to_go:
            use_kl_to_go(trainer)  # in either order
        use_reward_to_go(trainer, 0.6)
        found.append(grpo_gradient(trainer))
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)
    assert found[0].abs().max() > 1e-3 * FACTOR[loss_type]


def test_gradient_of_stock_rloo_is_the_kl_s(enumerated):  # noqa: F811
    """Where no penalty was chosen it is TRL's own that is charged by token; the objective is known by itself."""
    trainer = enumerated()
    use_kl_to_go(trainer)
    found, t = trained_gradient(trainer, FIXED), Tables(trainer)
    torch.testing.assert_close(found, BETA * t.gradient(reverse_kl(t)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["k1", "budget"])
def test_gradient_after_an_update(enumerated, name):  # noqa: F811
    found = []
    for to_go in (False, True):
        trainer = rewarded(enumerated(**UNCLIPPED), FIXED)
        KLPenaltyCallback(trainer, PENALTIES[name])
        use_reward_to_go(trainer, 0.6)
        if to_go:
            use_kl_to_go(trainer)
        found.append(trained_gradient(trainer, FIXED, between=partial(move, seed=3)))
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


def advantages(trainer, completions) -> torch.Tensor:
    """(B, T), each token's, of RLOO."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(completions))
    return batch["advantages"].unsqueeze(1) + batch["kl_credit"]


def test_nothing_follows_the_last_token(enumerated):  # noqa: F811
    """Of the exact KL it pays nothing in the reward, and of k1 its own log-ratio against the others' there."""
    trainer = enumerated()
    KLPenaltyCallback(trainer, KLPenalty("exact", "both"))
    use_kl_to_go(trainer)
    found = advantages(trainer, FIXED)
    assert found[:, 1].abs().max() < 1e-6 < found[:, 0].abs().max()
    trainer = enumerated()
    use_kl_to_go(trainer)
    found, ratio = advantages(trainer, FIXED), seam_of(trainer).batch.rollout.ref_log_ratio
    expected = BETA * (ratio.mean(0) - ratio) * len(FIXED) / (len(FIXED) - 1)
    torch.testing.assert_close(found[:, 1], expected[:, 1].to(found), atol=1e-6, rtol=0)
    whole = ratio.sum(1)
    expected = BETA * (whole.mean() - whole) * len(FIXED) / (len(FIXED) - 1)
    torch.testing.assert_close(found[:, 0], expected.to(found), atol=1e-6, rtol=0)


def test_a_completion_without_a_reward_pays_nothing_and_is_no_baseline(enumerated):  # noqa: F811
    found = []
    six = [[2, 3], [3, 2], [4, 4], [2, 2], [3, 4], [4, 3]]
    for completions in (six[:4], six):
        trainer = enumerated(completions)
        trainer.reward_funcs = [lambda completions, **columns: [0.0] * 4 + [None] * (len(completions) - 4)]
        use_kl_to_go(trainer)
        found.append(advantages(trainer, completions))
    own = [each[:4] - each[:4, :1] for each in found]  # what a token has on top of the first, which has it all
    torch.testing.assert_close(*own, atol=1e-6, rtol=0)
    assert (found[1][4:, 1] == found[1][4:, 0]).all()


def test_others_futures_by_hand():
    spent, every = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]), torch.ones(2, 3)
    penalty = KLPenalty("exact", "both", budget_per_token=0.5)
    # 1.5 nats are free. With the other's future the first has spent 1 + 1, 1 + 0 and 3; the second 2, 3 and 1.
    found = charged_with_others_futures(penalty, spent, every, 2)
    assert found.tolist() == [[[[1.5] * 3, [0.5, 0, 1.5]], [[0.5, 1.5, 0], [0, 0, 0]]]]
    # What a sampled token costs is not known before it: 1, 2 and 1 nats; 3, 2 and 3.
    found = charged_with_others_futures(KLPenalty("k1", "reward", budget_per_token=0.5), spent, every, 2)
    assert found.tolist() == [[[[1.5] * 3, [0, 0.5, 0]], [[1.5, 0.5, 1.5], [0, 0, 0]]]]
    # One that is over has no future, and the budget is that of as many tokens as there are.
    spent, mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 9.0, 9.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = charged_with_others_futures(penalty, spent, mask, 2)
    assert found.tolist() == [[[[1.5] * 3, [0.5, 1, 1.5]], [[1.5, 1, 0.5], [0.5, 0.5, 0.5]]]]
    opening = KLPenalty("exact", "both", opening_tokens=1, opening_price=10.0)
    spent = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.0, 1.0], [7.0, 0.0]])  # groups do not mix
    found = charged_with_others_futures(opening, spent, torch.ones(4, 2), 2)
    assert found[0].tolist() == [[[13, 13], [16, 13]], [[35, 38], [38, 38]]]
    assert found[1].tolist() == [[[1, 1], [0, 1]], [[78, 77], [77, 77]]]


def test_it_trains_and_is_less_noise(tiny_model, tmp_path):
    spreads = {}
    for estimator, placement in (("k1", "reward"), ("exact", "both")):
        trainer = make(tiny_model, tmp_path, ["once upon a time", "there was a"] * 8, gradient_accumulation_steps=2)
        trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty(estimator, placement)))
        use_kl_to_go(trainer)
        use_reward_to_go(trainer, 0.6)
        trainer.train()
        spreads[estimator] = [e["kl_to_go/spread"] for e in trainer.state.log_history if "reward" in e]
    assert all(0 < each < 1 for found in spreads.values() for each in found[1:]) and len(spreads["k1"]) > 2


def test_what_is_not_counted_pays_nothing(enumerated):  # noqa: F811
    trainer = enumerated(ENDING)
    use_kl_to_go(trainer)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(ENDING))
    assert batch["completion_mask"][0].tolist() == [1, 0] and batch["kl_credit"][0, 1] == 0
    assert (batch["kl_credit"][1:, 1] != 0).all()


@pytest.mark.parametrize("penalty", [("exact", "loss"), ("k2", "loss")], ids="-".join)
def test_a_penalty_of_the_loss_is_left_alone(enumerated, penalty):  # noqa: F811
    trainer = enumerated()
    KLPenaltyCallback(trainer, KLPenalty(*penalty))
    use_kl_to_go(trainer)
    trainer.model.train()
    assert "kl_credit" not in trainer._generate_and_score_completions([{"prompt": "b c"}] * len(FIXED))


def test_none_at_beta_0_and_in_evaluation(enumerated):  # noqa: F811
    trainer = enumerated()
    use_kl_to_go(trainer)
    trainer.model.eval()
    assert "kl_credit" not in trainer._generate_and_score_completions([{"prompt": "b c"}] * len(FIXED))
    trainer.model.train()
    seam_of(trainer).beta = 0.0
    assert "kl_credit" not in trainer._generate_and_score_completions([{"prompt": "b c"}] * len(FIXED))


def test_refusals(enumerated, grpo_enumerated):  # noqa: F811
    for trainer, words in [
        (enumerated(normalize_advantages=True), "normalize_advantages True .* text: with kl_to_go it is False"),
        (grpo_enumerated(importance_sampling_level="sequence"), "importance_sampling_level 'sequence' has one"),
    ]:
        with pytest.raises(ValueError, match=words):
            use_kl_to_go(trainer)


@pytest.mark.parametrize("name", ["k1", "exact", "budget", "opening"])
def test_it_is_less_noise(enumerated, name):  # noqa: F811
    """The variance of one completion's gradient, over all there are; printed for docs/kl.md."""
    found = []
    for to_go in (False, True):
        trainer = enumerated()
        KLPenaltyCallback(trainer, PENALTIES[name])
        if to_go:
            use_kl_to_go(trainer)
        trainer.model.train()
        batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(FIXED))
        shares = batch["old_logps"].exp()  # how likely each is
        gradients = []
        for i in range(len(FIXED)):
            loss = trainer._compute_loss(trainer.model, {key: value[i : i + 1] for key, value in batch.items()})
            gradients.append(flat(torch.autograd.grad(loss, parameters(trainer))))
        gradients = torch.stack(gradients)
        mean = (shares[:, None] * gradients).sum(0)
        found.append((shares * (gradients - mean).square().sum(1)).sum().item())
    print(f"{name}: {found[0]:.3g} -> {found[1]:.3g}, {found[1] / found[0]:.2f}")
    assert found[1] < found[0]
