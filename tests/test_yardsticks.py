"""The yardsticks: hand-worked numbers, and the enumerated tilt of references whose every text is known."""

import math

import pytest
import torch

from kl_alliteration.yardsticks import best_of_n, efficiency, least_kl, least_kl_at

SOME = {"enough": 1}


def known_reference(texts=50, seed=0):
    """`(log probabilities, rewards)` of every text of a reference."""
    generator = torch.Generator().manual_seed(seed)
    log_ref = (2 * torch.randn(texts, generator=generator, dtype=torch.float64)).log_softmax(0)
    return log_ref, torch.randn(texts, generator=generator, dtype=torch.float64), generator


def tilt(log_ref, rewards, price):
    """`(log probabilities, mean reward, KL)` of the true optimum, enumerated."""
    log_p = (log_ref + rewards / price).log_softmax(0)
    return log_p, (log_p.exp() * rewards).sum().item(), (log_p.exp() * (log_p - log_ref)).sum().item()


def test_best_of_n_by_hand():
    """Of 1, 2, 3, 4 the best of 2 is 2, 3, 3, 4, 4, 4 over the six pairs: 10 / 3; of 1, their mean."""
    first, second = best_of_n(torch.tensor([3.0, 1.0, 4.0, 2.0]), largest_n=2)
    assert first["n"] == 1 and first["kl_per_sequence"] == 0 and first["reward"] == pytest.approx(2.5)
    assert second["n"] == 2 and second["reward"] == pytest.approx(10 / 3)
    assert second["kl_per_sequence"] == pytest.approx(math.log(2) - 0.5)


def test_best_of_n_of_a_uniform_is_known():
    """E[max of n] of a uniform on [0, 1] is n / (n + 1), and lies within the band."""
    rewards = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for point in best_of_n(rewards, largest_n=1_000, bootstraps=50):
        assert point["reward"] == pytest.approx(point["n"] / (point["n"] + 1), abs=0.01)
        if point["n"] <= 20_000 / 40:
            assert point["low"] <= point["reward"] <= point["high"]
        else:
            assert point["low"] is point["high"] is None


def test_the_bands_of_best_of_n_hold_the_truth_as_often_as_they_say():
    """Of the exponential, whose mean of the largest of n is 1 + 1/2 + ... + 1/n, at the largest n that has a band."""
    held = 0
    for seed in range(200):
        rewards = torch.empty(400).exponential_(generator=torch.Generator().manual_seed(seed))
        last = best_of_n(rewards, largest_n=10, points=4, bootstraps=100, seed=seed)[-1]
        held += last["low"] <= sum(1 / i for i in range(1, 11)) <= last["high"]
    assert 0.88 <= held / 200 <= 0.99  # the percentile bootstrap's own 0.92


def test_best_of_n_leaves_out_what_has_no_reward_and_refuses_what_it_cannot_say():
    one = torch.tensor([3.0, math.nan, 1.0, 4.0, 2.0])
    assert best_of_n(one, 2)[-1]["reward"] == pytest.approx(10 / 3)
    for rewards, options, message in [
        (one, {"largest_n": 5}, "largest_n must be from 1 to the 4 samples that have a reward, got 5"),
        (one, {"largest_n": 0}, "got 0"),
        (one, {"largest_n": 2, "points": 1}, "points must be >= 2"),
        (torch.stack([one, one]), {"largest_n": 2}, "needs a reward of every sample"),
    ]:
        with pytest.raises(ValueError, match=message):
            best_of_n(rewards, **options)


def test_best_of_n_of_several_prompts_is_the_mean_of_theirs():
    rewards = torch.tensor([[3.0, 1.0, 4.0, 2.0], [13.0, 11.0, 14.0, 12.0]])
    _, second = best_of_n(rewards, largest_n=2)
    assert second["reward"] == pytest.approx(((4 * 3 + 3 * 2 + 2) / 6 + (14 * 3 + 13 * 2 + 12) / 6) / 2)


def test_least_kl_by_hand():
    """Two rewards, 0 and 1, at a price of 1 / log 3: weights 1/4 and 3/4, KL log 2 + 1/4 log 1/4 + 3/4 log 3/4."""
    (point,) = least_kl(torch.tensor([0.0, 1.0]), [1 / math.log(3)], enough=1)
    assert point["reward"] == pytest.approx(0.75) and point["effective_samples"] == pytest.approx(
        1 / (1 / 16 + 9 / 16)
    )
    assert point["kl_per_sequence"] == pytest.approx(math.log(2) - 0.25 * math.log(4) + 0.75 * math.log(0.75))
    (both,) = least_kl(
        torch.tensor([[0.0, 1.0], [5.0, 5.0]]), [1 / math.log(3)], enough=1
    )  # a prompt without a choice
    assert both["reward"] == pytest.approx((0.75 + 5) / 2)
    assert both["kl_per_sequence"] == pytest.approx(point["kl_per_sequence"] / 2)


def test_least_kl_is_the_enumerated_tilt_s_and_stops_where_samples_end():
    """A reference of 50 texts, tilted as a whole, against 200,000 samples of it."""
    generator = torch.Generator().manual_seed(0)
    log_ref = (2 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    rewards = torch.randn(50, generator=generator, dtype=torch.float64)
    samples = rewards[torch.multinomial(log_ref.exp(), 200_000, replacement=True, generator=generator)]
    points = least_kl(samples, [0.3, 1.0, 1e-4])
    assert [point["price"] for point in points][:2] == [1.0, 0.3]
    for point in points[:2]:
        log_tilt = (log_ref + rewards / point["price"]).log_softmax(0)
        assert point["reward"] == pytest.approx((log_tilt.exp() * rewards).sum().item(), abs=0.02)
        kl = (log_tilt.exp() * (log_tilt - log_ref)).sum().item()
        assert point["kl_per_sequence"] == pytest.approx(kl, rel=0.03)
    assert least_kl(samples[:20], [1e-4]) == []  # one sample has all the weight


def test_no_policy_of_one_reward_has_less_kl():
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(30, generator=generator, dtype=torch.float64)
    (least,) = least_kl(rewards, [0.5], enough=1)
    for _ in range(200):
        other = (rewards / 0.5 + 0.5 * torch.randn(30, generator=generator, dtype=torch.float64)).log_softmax(0)
        reward = (other.exp() * rewards).sum().item()
        kl = (other.exp() * (other + math.log(30))).sum().item()
        if reward >= least["reward"]:
            assert kl >= least["kl_per_sequence"] - 1e-12


def test_samples_of_a_policy_reach_where_the_reference_s_do_not():
    """At a price of 0.25 a few of 300 samples of the reference carry all; 300 of a policy near by show the truth."""
    log_ref, rewards, generator = known_reference(texts=2000)
    _, reward, kl = tilt(log_ref, rewards, 0.25)
    log_policy, *_ = tilt(log_ref, rewards, 0.3)
    blind = least_kl_at(rewards[torch.multinomial(log_ref.exp(), 300, True, generator=generator)], reward=1.5)
    drawn = torch.multinomial(log_policy.exp(), 300, True, generator=generator)
    ratio = (log_policy - log_ref)[drawn]
    (point,) = least_kl(rewards[drawn], [0.25], ref_log_ratio=ratio)
    assert point["reward"] == pytest.approx(reward, abs=0.05) and point["kl_per_sequence"] == pytest.approx(
        kl, rel=0.05
    )
    assert point["effective_samples"] > 100 > blind["effective_samples"] + 50
    assert least_kl_at(rewards[drawn], reward=reward, ref_log_ratio=ratio)["price"] == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("price", [0.5, 2.0])
def test_the_price_of_a_target_is_the_tilt_s(price):
    """Every text as often as its probability says: the samples are the reference."""
    counts = torch.tensor([1, 5, 2, 9, 3])
    rewards = torch.tensor([3.0, 0.0, 2.0, -1.0, 1.0], dtype=torch.float64)
    _, reward, kl = tilt((counts / 20).log().double(), rewards, price)
    samples = rewards.repeat_interleave(counts)
    for asked in ({"kl_per_sequence": kl}, {"reward": reward}):
        found = least_kl_at(samples, **asked)
        assert found["price"] == pytest.approx(price, rel=1e-5)
        assert (found["reward"], found["kl_per_sequence"]) == pytest.approx((reward, kl), rel=1e-5)


def test_what_no_sample_shows_is_refused_by_its_largest():
    """The best reward stands in a quarter of four samples: no more than log 4 nats can be spent on them."""
    rewards = torch.tensor([0.0, 1.0, 1.0, 2.0])
    assert least_kl_at(rewards, kl_per_sequence=1.38)["largest_weight"] == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match=r"kl_per_sequence 1.5 .* at most 1.386"):
        least_kl_at(rewards, kl_per_sequence=1.5)
    with pytest.raises(ValueError, match=r"reward 2.1 .* at most 2:"):
        least_kl_at(rewards, reward=2.1)
    for bad in ({}, {"reward": 1.0, "kl_per_sequence": 1.0}, {"kl_per_sequence": -1.0}, {"kl_per_sequence": math.nan}):
        with pytest.raises(ValueError):
            least_kl_at(rewards, **bad)


def test_a_reward_that_is_had_already_costs_nothing():
    point = least_kl_at(torch.tensor([0.0, 1.0, 2.0]), reward=1.0)
    assert point["kl_per_sequence"] == 0 and point["reward"] == 1 and point["effective_samples"] == pytest.approx(3)


def test_rewards_that_do_not_apply_are_left_out():
    rewards, nan = [0.0, 1.0, 3.0, 3.0], math.nan
    (point,) = least_kl(torch.tensor(rewards), [0.7], **SOME)
    assert least_kl(torch.tensor([nan, *rewards, nan]), [0.7], **SOME)[0] == pytest.approx(point)
    by_prompt = torch.tensor([[nan, *rewards], [nan] * 5])  # nothing applies to the second prompt
    assert least_kl(by_prompt, [0.7], **SOME)[0] == pytest.approx(point)
    with pytest.raises(ValueError, match="none of them applies"):
        least_kl(torch.tensor([nan, nan]), [0.7])


def test_rewards_that_are_all_the_same_buy_nothing():
    (point,) = least_kl(torch.full((20,), 3.0), [0.1], bootstraps=10)
    assert point["reward"] == pytest.approx(3) == point["low"] == point["high"]
    assert point["kl_per_sequence"] == pytest.approx(0, abs=1e-9) and point["effective_samples"] == pytest.approx(20)


def test_the_bands_hold_the_truth_as_often_as_they_say():
    """A reference's own 400 samples, 40 times: the band at a KL has the true largest reward in it in most of them."""
    log_ref, rewards, generator = known_reference()
    inside = 0
    for seed in range(40):
        samples = rewards[torch.multinomial(log_ref.exp(), 400, True, generator=generator)]
        (*_, point) = least_kl(samples, [2.0, 1.5, 1.0, 0.8, 0.6], bootstraps=100, seed=seed)
        prices = torch.linspace(0.2, 4, 2000, dtype=torch.float64)
        log_z = (log_ref + rewards / prices[:, None]).logsumexp(-1)
        truth = (prices * (log_z + point["kl_per_sequence"])).min().item()
        inside += point["low"] <= truth <= point["high"]
    assert inside >= 32  # of 40 at 95 %


def test_efficiency_by_enumeration():
    """A policy of a known optimum has 1; one that spends half of its KL beside the reward has what the tilt says."""
    log_ref, rewards, generator = known_reference()

    def draw(log_p, size=20_000):
        return torch.multinomial(log_p.exp(), size, True, generator=generator)

    ref = draw(log_ref)
    log_p, reward, kl = tilt(log_ref, rewards, 0.8)
    drawn = draw(log_p)
    assert efficiency(rewards[ref], rewards[drawn], (log_p - log_ref)[drawn], kl) == pytest.approx(1, abs=0.05)
    noisy = (log_p + 0.7 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    reached, spent = (noisy.exp() * rewards).sum().item(), (noisy.exp() * (noisy - log_ref)).sum().item()
    prices = torch.linspace(0.05, 20, 40_000, dtype=torch.float64)
    tilted = (log_ref + rewards / prices[:, None]).log_softmax(-1)
    at = ((tilted.exp() * rewards).sum(-1) - reached).abs().argmin()
    least = (tilted[at].exp() * (tilted[at] - log_ref)).sum().item()
    drawn = draw(noisy)
    found = efficiency(rewards[ref], rewards[drawn], (noisy - log_ref)[drawn], spent)
    assert found == pytest.approx(least / spent, abs=0.05) and found < 0.9


def test_efficiency_is_none_where_nobody_knows():
    few = torch.tensor([0.0, 1.0, 2.0])
    assert efficiency(few, few + 5, torch.zeros(3), 4.0) is None  # beyond the reference, and too few of the policy
    assert efficiency(few, few, torch.zeros(3), 0.0) is None  # nothing was spent
    assert efficiency(few, few * math.nan, torch.zeros(3), 1.0) is None
    # 0.1 above the reference: with a standard error of 0.1 that is nothing, with one of 0.01 it is known.
    ref, reached = torch.tensor([0.0, 1.0]).repeat(500), torch.tensor([0.0, 1.0]).repeat(13) + 0.1
    assert efficiency(ref, reached, torch.zeros(26), 1e-5) is None
    assert efficiency(ref, reached.repeat(100), torch.zeros(2600), 0.05) is not None


@pytest.mark.parametrize(("reached", "known"), [(2.0, True), (2.7, False)])
def test_an_efficiency_is_known_to_a_fifth_of_a_nat(reached, known):
    """Of N(0, 1) a mean of r costs r ** 2 / 2 nats. Some 100 and 15 effective samples of 3,000 carry it."""
    generator = torch.Generator().manual_seed(0)
    off = []
    for _ in range(50):
        rewards, beside = torch.randn(2, 400, generator=generator, dtype=torch.float64)
        rewards = rewards - rewards.mean() + reached
        # Half of the policy's KL goes beside the reward, so that its own samples are worth few.
        ratio = (reached * rewards - reached**2 / 2) + (3 * (beside + 3) - 4.5)
        spent = reached**2 / 2 + 4.5
        ref = torch.randn(3000, generator=generator, dtype=torch.float64)
        found = efficiency(ref, rewards, ratio, spent)
        off.append(math.nan if found is None else found * spent - reached**2 / 2)
    off = torch.tensor(off)
    assert (~off.isnan()).double().mean() > 0.9 if known else off.isnan().double().mean() > 0.9
    if known:
        assert off.square().nanmean().sqrt() < 30**-0.5


def test_bands_where_a_prompt_has_hardly_a_reward():
    """A resample without any of its rewards leaves the prompt out."""
    nan = math.nan
    points = least_kl(torch.tensor([[0.0, 1.0] + [nan] * 8, [0.0, 1.0] * 5]), [2.0], enough=1, bootstraps=200)
    assert 0 < points[0]["low"] <= points[0]["reward"] <= points[0]["high"] < 1
