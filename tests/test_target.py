"""A target in nats per sequence: its price by hand, the rule that moves it, the wall, and a run that holds it."""

import json
import math

import pytest
import torch

from kl_alliteration import CollapseGuardCallback, KLPenalty, KLTargetCallback
from kl_alliteration._trl import seam_of
from kl_alliteration.kl import KLWarning
from kl_alliteration.lab.base_samples import base_samples, first_of_each
from kl_alliteration.target import START, PriceRule, price_of_target
from kl_alliteration.yardsticks import centred

COIN = torch.tensor([0.0, 1.0]).repeat(500)
# Tilted by exp(reward / price) a coin has heads with odds exp(1 / price): 3 at 1 / log 3, at a KL of log 2 - H(3 / 4).
THREE_QUARTERS = math.log(2) - (-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_the_price_of_a_coin_by_hand():
    price = price_of_target(COIN, THREE_QUARTERS)
    assert price.price == pytest.approx(1 / math.log(3))
    assert price.reward == pytest.approx(0.75) and price.kl_per_sequence == pytest.approx(THREE_QUARTERS)
    # Weights 3 : 1 of a thousand: (sum w)^2 / sum w^2 = (500 * 4)^2 / (500 * 10).
    assert price.effective_samples == pytest.approx(800) and not price.blind and "blind" not in price.in_words()


def test_prompts_of_different_difficulty_are_taken_together():
    """Pairs about two means: each prompt's curve by itself would end at log 2 nats."""
    rewards = torch.tensor([[0.0, 1.0], [5.0, 6.0]]).repeat(400, 1)
    # Less the mean of two, a half is left of the variance: half a reward either side becomes sqrt(1 / 2).
    assert centred(rewards).unique().tolist() == pytest.approx([3 - math.sqrt(0.5), 3 + math.sqrt(0.5)])
    assert price_of_target(rewards, THREE_QUARTERS).price == pytest.approx(math.sqrt(2) / math.log(3))
    assert centred(torch.tensor([[0.0, math.nan], [math.nan, 6.0]])).tolist() == pytest.approx([3, 3])


@pytest.mark.parametrize("target", [5.0, 50.0])  # too few samples carry it; more than log 2,000 nats
def test_where_the_samples_are_blind_it_says_so(target):
    rewards = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    price = price_of_target(rewards, target)
    assert price.blind and 9.9 < price.effective_samples < 11 and price.kl_per_sequence < target
    assert "further they are blind" in price.in_words()


def test_a_blind_target_warns(make_trainer):
    with pytest.warns(KLWarning, match=r"1000 samples show nothing beyond 0.69\d* nats: .* the wall has to hold"):
        KLTargetCallback(make_trainer(), 3.0, COIN)


def test_rewards_and_targets_that_name_no_price():
    constant = torch.full((1000,), 0.1, dtype=torch.float64)  # whose mean is not 0.1
    for rewards in (torch.ones(50), torch.full((50,), math.nan), constant):
        with pytest.raises(ValueError, match="rewards do not differ"):
            price_of_target(rewards, 1.0)
    with pytest.raises(ValueError, match="must be > 0 and finite, got 0"):
        price_of_target(COIN, 0)


def test_the_rule_by_hand():
    rule = PriceRule(1.0, target_kl_per_sequence=10.0, full=2.0, rate=0.5, smoothing=0.0)
    assert rule.update(13.5) == pytest.approx(math.exp(0.25))  # half above 9: exp(0.5 * 0.5)
    assert rule.update(4.5) == pytest.approx(1.0)  # half below
    assert rule.update(9.0) == pytest.approx(1.0)  # as it should be
    assert rule.update(100.0) == pytest.approx(math.exp(0.5))  # as if it were twice what is held
    assert [rule.update(kl) for kl in (100.0, 9.1, 10.9)] == [2.0, 2.0, 2.0]  # full, and at rest from 9 to 11
    assert rule.update(16.5) == pytest.approx(2 * math.exp(0.25))  # half above 11: it runs away
    assert rule.update(10.0) == pytest.approx(2 * math.exp(0.25 - 0.5 / 11))
    assert [rule.update(0.0) for _ in range(2)] == pytest.approx([2.0, 2 * math.exp(-0.5)])  # it stops on the way
    assert [rule.update(0.0) for _ in range(20)][-1] == START * 2
    assert PriceRule(1.0, 10.0, full=2.0, smoothing=0.5).update(9.0) == 1.0  # nothing is past: the first is smoothed
    smoothed = PriceRule(1.0, 10.0, full=2.0, rate=0.5, smoothing=0.5, smoothed_kl_per_sequence=18.0)
    assert smoothed.update(9.0) == pytest.approx(math.exp(0.25))  # (18 + 9) / 2
    with pytest.raises(ValueError, match="within 0.02 and 1000 times the full one, got 3"):
        PriceRule(3.0, 10.0, full=0.001)


def test_what_a_nat_costs_within_and_beyond(make_trainer):
    """1 / log 3 of a coin: a fiftieth of it within at the start, four of it beyond, at every length."""
    trainer = make_trainer()
    callback = KLTargetCallback(trainer, THREE_QUARTERS, COIN)
    within, beyond = 0.02 / math.log(3), 4 / math.log(3)
    assert trainer.beta == pytest.approx(beyond)
    penalty = seam_of(trainer).penalty
    assert (penalty.estimator, penalty.placement, penalty.budget_per_token) == ("exact", "both", THREE_QUARTERS / 6)
    assert penalty.within_budget == pytest.approx(within / beyond)
    callback.length, callback.rule.value = 3.0, 5.0  # texts grew shorter, and the price rose above what was read off
    callback.on_train_begin(None, trainer.state, None)
    assert trainer.beta == pytest.approx(20) and seam_of(trainer).penalty.within_budget == pytest.approx(1 / 4)
    assert seam_of(trainer).penalty.budget_per_token == pytest.approx(THREE_QUARTERS / 3)


@pytest.mark.parametrize(
    ("wall", "spent", "most", "moved"),
    [
        (1.0, 0.96, 3.0, math.exp(0.2 * 0.04)),  # texts lean on it, and the mean is a twenty-fifth short
        (1.2, 0.2, 3.0, 1.2 * math.exp(0.01)),  # out slowly
        (1.2, 0.2, 1.0, 1.1),  # no text is there: it runs a tenth ahead of them, and no more
        (1.2, 0.2, 0.5, 1.0),
        (1.2, 1.1, 3.0, 1.2 * math.exp(-0.2 * 0.1)),
        (1.2, 2.0, 3.0, 1.2 * math.exp(-0.04)),
        (1.01, 1.5, 3.0, 1.0),
        (1.49, 0.8, 3.0, 1.5),
    ],
)
def test_where_the_wall_goes_by_hand(make_trainer, wall, spent, most, moved):
    """Targets: where it stands, what the mean spends, and what the text does that spends most."""
    trainer = make_trainer()
    callback = KLTargetCallback(trainer, 0.5, COIN)
    callback.wall, callback.seen = wall, (0.5 * spent, 4.0, most)
    callback.on_step_end(None, trainer.state, None)
    assert callback.wall == pytest.approx(moved)
    assert seam_of(trainer).penalty.budget_per_token == pytest.approx(moved * 0.5 / 4)


def test_behind_the_full_price_the_wall_goes_out_before_texts_lean_on_it(make_trainer):
    trainer = make_trainer()
    callback = KLTargetCallback(trainer, 0.5, COIN)
    callback.rule.value, callback.wall, callback.seen = callback.rule.full, 1.2, (0.5 * 0.95, 4.0, 1.1)
    callback.on_step_end(None, trainer.state, None)
    assert callback.wall == pytest.approx(1.2 * math.exp(0.2 * 0.05))


def test_it_holds_what_runs_away_without(make_trainer):
    """A hundred times the rate at which a model learns: 40 steps go 5 targets far, and stay near one with it."""

    def last(target: float | None) -> float:
        spent = []
        trainer = make_trainer(max_steps=40, per_device_train_batch_size=32, num_generations=16, beta=1e-3)
        if target is not None:
            trainer.add_callback(KLTargetCallback(trainer, target, 3 * COIN))
        seam = seam_of(trainer)
        seam.scorer.need_hidden_states()
        seam.observers.append(
            lambda rollout: spent.append(
                seam.mean_per_sequence(rollout.per_token_kl("exact"), rollout.completion_mask)
            )
        )
        trainer.train()
        assert trainer.state.log_history[0].keys() >= {"kl/price", "kl/target_use", "kl/wall"} or target is None
        return sum(spent[-10:]) / 10

    assert last(None) > 5 * 0.5
    assert 0.8 * 0.5 < last(0.5) < 1.3 * 0.5


@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"steps_per_generation": 2}], ids=str)
def test_a_batch_has_one_price(make_trainer, options):
    """In its reward and in every loss of it, however many updates are made of it; the next one has another."""
    trainer = make_trainer(max_steps=6, learning_rate=0.3, num_generations=4, **options)
    callback = KLTargetCallback(trainer, 0.05, 3 * COIN)
    trainer.add_callback(callback)
    prices, score, loss = [], trainer._generate_and_score_completions, trainer._compute_loss

    def price():
        return trainer.beta, seam_of(trainer).penalty

    trainer._generate_and_score_completions = lambda inputs: (prices.append([price()]), score(inputs))[1]
    trainer._compute_loss = lambda *asked: (prices[-1].append(price()), loss(*asked))[1]
    trainer.train()
    assert [len(each) for each in prices] == [3, 3, 3]
    assert all(each.count(each[0]) == 3 for each in prices)
    assert len({each[0] for each in prices}) == 3


def test_a_rollback_of_the_guard_raises_what_a_nat_costs(make_trainer):
    """Within and beyond, for the rest of the run."""
    betas = []
    trainer = make_trainer(max_steps=3)
    callback = KLTargetCallback(trainer, 0.5, 3 * COIN)
    trainer.add_callback(callback)
    guard = CollapseGuardCallback(trainer, "warn")
    guard.factor = 3.0  # as after a rollback
    trainer.add_callback(guard)
    seam_of(trainer).observers.append(lambda rollout: betas.append((trainer.beta, seam_of(trainer).penalty)))
    trainer.train()
    assert [beta for beta, _ in betas] == pytest.approx([3 * 4 * callback.rule.full] * 3)
    assert betas[-1][1].within_budget == pytest.approx(callback.seam.penalty.within_budget, rel=0.7)
    trainer.train()
    assert trainer.beta == pytest.approx(3 * 4 * callback.rule.full)  # not nine times


def test_what_is_truncated_away_spends_nothing_and_counts_for_nothing(make_trainer):
    trainer = make_trainer(max_steps=1, mask_truncated_completions=True, learning_rate=0.1, temperature=3.0)
    callback, told = KLTargetCallback(trainer, 0.5, 3 * COIN), []
    seam_of(trainer).observers.append(
        lambda rollout: told.append((rollout.per_token_kl("exact"), rollout.completion_mask))
    )
    score = trainer._generate_and_score_completions
    for _ in range(20):
        score([{"prompt": "once upon a time"}] * 8)
    assert callback.seen is None  # not in evaluation
    trainer.model.train()
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.mul_(1.5)  # away from the reference
    for _ in range(20):
        told.clear()
        score([{"prompt": "once upon a time"}] * 8)
        (nats, mask), counted = told[0], told[0][1].sum(-1) > 0
        if 0 < counted.sum() < 8:
            break
    spent, length, _ = callback.seen
    assert spent == pytest.approx((nats * mask).sum(-1)[counted].mean().item(), rel=1e-5) and spent > 0
    assert length == pytest.approx(mask.sum(-1)[counted].double().mean().item())
    assert seam_of(trainer).mean_per_sequence(nats, mask) == pytest.approx(spent, rel=1e-5)


@pytest.mark.parametrize("stop", [2, 5])
def test_interrupted_and_resumed_equals_uninterrupted(make_trainer, tmp_path, stop):
    def make(**options):
        trainer = make_trainer(max_steps=6, **options)
        callback = KLTargetCallback(trainer, 0.05, COIN)
        trainer.add_callback(callback)
        return trainer, callback

    whole, expected = make(save_strategy="steps", save_steps=stop, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed, callback = make(output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert callback.rule == expected.rule
    assert (callback.wall, callback.length) == (expected.wall, expected.length)
    assert resumed.beta == whole.beta and seam_of(resumed).penalty == seam_of(whole).penalty
    assert expected.rule.value != START / math.log(3)


@pytest.mark.parametrize(
    "options, penalty, message",
    [
        ({"beta": 0.0}, None, "beta must not be 0 with a target"),
        ({}, KLPenalty(budget_per_token=0.1), "no budget"),
        ({}, KLPenalty(reduction="mean"), "reduction 'sum'"),
        ({}, KLPenalty("exact", "both", direction="forward"), "direction 'reverse'"),
    ],
)
def test_what_a_target_does_not_go_with(make_trainer, options, penalty, message):
    with pytest.raises(ValueError, match=message):
        KLTargetCallback(make_trainer(**options), 1.0, COIN, penalty)


def test_samples_of_the_base_are_rewarded_as_in_training_and_read_again(make_trainer, tmp_path):
    facts = {"reward_funcs": ["trees"]}
    clipped, _ = base_samples(make_trainer(reward_clip_range=(0.0, 0.5)), 40, facts)
    assert clipped.max().item() == 0.5  # as the run pays
    trainer = make_trainer(reward_weights=[2.0])
    before = torch.random.get_rng_state()
    rewards, texts = base_samples(trainer, 40, facts)
    assert torch.equal(torch.random.get_rng_state(), before) and rewards.shape == (2, 20)
    rows = [json.loads(line) for line in (tmp_path / "base_samples.jsonl").read_text().splitlines()]
    for row, reward in zip(rows, rewards.flatten().tolist(), strict=True):
        words = row["completion"].split()
        assert row["completion"] in texts
        assert reward == pytest.approx(2 * (words.count("tree") + len(words) / 10))
    rows[0]["reward"] = 9.0  # by which it is known that the file was read
    (tmp_path / "base_samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    again = base_samples(make_trainer(reward_weights=[2.0], resume_from_checkpoint="latest"), 40, facts).rewards
    assert again[0, 0] == 9 and torch.equal(again.flatten()[1:], rewards.flatten()[1:])


@pytest.mark.parametrize(
    ("options", "samples", "facts"),
    [
        ({"resume_from_checkpoint": None}, 16, {"model": "a"}),
        ({"reward_weights": [5.0]}, 16, {"model": "a"}),
        ({"temperature": 0.5}, 16, {"model": "a"}),
        ({}, 32, {"model": "a"}),
        ({}, 16, {"model": "b"}),
    ],
    ids=str,
)
def test_samples_of_another_run_are_not_read(make_trainer, tmp_path, options, samples, facts):
    """Of the folder's run before, whatever it was of: a run that found no checkpoint began anew."""
    base_samples(make_trainer(), 16, {"model": "a"})
    with (tmp_path / "base_samples.jsonl").open("w") as file:
        file.write(json.dumps({"place": 0, "completion": "old", "reward": 0.0}) + "\n")
    found = base_samples(make_trainer(**{"resume_from_checkpoint": "latest"} | options), samples, facts)
    assert found.rewards.numel() == samples and "old" not in found.texts


def test_the_first_of_each_prompt():
    messages = [{"role": "user", "content": "b"}]
    assert first_of_each(["a", "a", messages, "c", messages], 9) == [0, 2, 3]
    assert first_of_each(["a", "a", messages, "c"], 2) == [0, 2]
