"""The trust region around the sampler: masks by hand, gradients by enumeration, on policy and in a second pass."""

import math

import pytest
import torch
from enumeration import FIXED, Tables, move, reverse_kl
from test_contract import BETA, enumerated, trained_gradient  # noqa: F401  (a fixture)
from test_off_policy import FAR, UNCLIPPED, gradient_now, off_by, probabilities
from test_sampler_correction import sampled_gradient, sampler_tables

from kl_alliteration import kl, use_fast_sampling, use_sampler_correction
from kl_alliteration._trl import seam_of
from kl_alliteration.sampling.correction import trusted

P = torch.tensor([[0.5, 0.6, 0.2, 0.6]])
SAMPLER = torch.tensor([[0.4, 0.3, 0.5, math.nan]])  # 0.1 and 0.3 up, 0.3 down, and one that is not known


def kept(advantage: float, divergence_type: str, threshold: float) -> list[float]:
    return trusted(P.log(), SAMPLER.log(), torch.tensor([[advantage]]), divergence_type, threshold)[0].tolist()


def test_masks_by_hand():
    assert kept(+1, "binary_tv", 0.15) == [1, 0, 1, 1]  # it would go up further
    assert kept(-1, "binary_tv", 0.15) == [1, 1, 0, 1]  # and it down
    assert kept(0, "binary_tv", 0.15) == [1, 1, 1, 1]
    assert kept(+1, "binary_tv", 0.05) == [0, 0, 1, 1]
    # 0.3 log(0.3 / 0.6) + 0.7 log(0.7 / 0.4) = 0.1838, and 0.5 log(0.5 / 0.2) + 0.5 log(0.5 / 0.8) = 0.2231
    assert kept(+1, "binary_kl", 0.183) == [1, 0, 1, 1] and kept(+1, "binary_kl", 0.184) == [1, 1, 1, 1]
    assert kept(-1, "binary_kl", 0.223) == [1, 1, 0, 1] and kept(-1, "binary_kl", 0.224) == [1, 1, 1, 1]


def test_masks_of_tokens_with_advantages_of_their_own():
    assert trusted(P.log(), SAMPLER.log(), torch.tensor([[1, -1, -1, 1.0]]), "binary_tv", 0.15)[0].tolist() == [
        1,
        1,
        0,
        1,
    ]
    assert trusted(P.log(), SAMPLER.log(), torch.tensor([[-1, 1, 1, 1.0]]), "binary_tv", 0.05)[0].tolist() == [
        1,
        0,
        1,
        1,
    ]


def test_a_token_that_is_certain_is_finite():
    certain, rare = torch.zeros(1, 1), torch.full((1, 1), -20.0)
    for p, sampler, advantage, is_kept in [
        (certain, certain, 1.0, 1),
        (certain, rare, 1.0, 0),
        (rare, certain, -1.0, 0),
    ]:
        assert trusted(p, sampler, torch.tensor([[advantage]]), "binary_kl", 0.05).item() == is_kept


THRESHOLDS = {"binary_tv": (100.0, 0.15, 0.05, 0.001), "binary_kl": (100.0, 0.05, 0.01, 0.0001)}


def mask_by_definition(p: float, sampler: float, advantage: float, divergence_type: str, threshold: float) -> float:
    tv = abs(p - sampler)
    binary_kl = sampler * math.log(sampler / p) + (1 - sampler) * math.log((1 - sampler) / (1 - p))
    further = (p - sampler) * advantage > 0
    return 0.0 if further and (tv if divergence_type == "binary_tv" else binary_kl) > threshold else 1.0


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("divergence_type", THRESHOLDS)
def test_its_gradient_is_that_of_the_tokens_within(enumerated, divergence_type, passes):  # noqa: F811
    """k1 in the reward; where nothing is beyond, that of the policy's own samples: quoted in docs/kl.md."""
    for threshold in THRESHOLDS[divergence_type]:
        trainer = enumerated(**UNCLIPPED)
        use_sampler_correction(trainer, "sequence_truncate", 1e9, divergence_type, threshold)
        then = Tables(trainer)
        sampler, p_then = sampler_tables(then, far=0.5), probabilities(then).detach()
        advantages = []

        def between(batch, trainer=trainer, advantages=advantages):
            advantages.extend((batch["advantages"] * (len(FIXED) - 1) / len(FIXED)).tolist())
            if passes == 2:
                move(trainer, seed=2, far=FAR)

        found = sampled_gradient(trainer, sampler, between)
        now, objective, dropped = Tables(trainer), 0, 0
        for (a, b), said, advantage, old in zip(FIXED, sampler.exp(), advantages, p_then, strict=True):
            logps = now.p1[a], now.p2[a, b]
            masks = [
                mask_by_definition(logp.exp().item(), s.item(), advantage, divergence_type, threshold)
                for logp, s in zip(logps, said, strict=True)
            ]
            weight = (
                said.prod() * (old / said.prod()) * (sum(logps).exp().detach() / old)
            )  # sampler's, policy's, now's
            objective = objective - weight * advantage / BETA * sum(m * lp for m, lp in zip(masks, logps, strict=True))
            dropped += 2 - sum(masks)
        torch.testing.assert_close(found, now.gradient(objective), atol=1e-10, rtol=0)
        logged = trainer._metrics["train"]["kl/sampler_dropped_share"]
        assert sum(logged) / len(logged) == pytest.approx(dropped / 50) and (dropped == 0) == (threshold == 100.0)
        off = off_by(found, gradient_now(trainer, reverse_kl))
        print(f"\npass {passes}, {divergence_type} {threshold}: {int(dropped)} of 50 tokens dropped, off by {off:.4f}")
        assert (off < 1e-9) == (threshold == 100.0 and passes == 1)


def test_by_itself_it_weights_nothing(enumerated):  # noqa: F811
    """Without a correction the weights are 1: only the region is left."""
    found = {}
    for correction in ("none", "token_truncate"):
        trainer = enumerated()
        use_sampler_correction(trainer, correction, 1e9, "binary_tv", 0.05)
        sampled_gradient(trainer, sampler_tables(Tables(trainer), far=0.5))
        found[correction] = trainer._metrics["train"]["kl/sampler_weight"][-1]
    assert found["none"] == 1 and abs(found["token_truncate"] - 1) > 0.01


def test_in_training_with_fast_sampling(make_trainer):
    """Two passes over a batch: in the first nothing has moved from the sampler, in the second something has."""
    trainer = make_trainer(num_iterations=2, learning_rate=0.1, epsilon=0.9, max_steps=4)
    use_fast_sampling(trainer)
    use_sampler_correction(trainer, "none", divergence_type="binary_tv", divergence_threshold=0.01)
    trainer.train()
    shares = [log["kl/sampler_dropped_share"] for log in trainer.state.log_history if "reward" in log or "loss" in log]
    assert shares[0] == 0 < max(shares[1::2])
    assert seam_of(trainer).batch.trusted is not None


def test_a_sampler_that_says_nothing_is_said(make_trainer):
    trainer = make_trainer(max_steps=1)
    use_sampler_correction(trainer, "none", divergence_type="binary_kl")
    with pytest.warns(kl.KLWarning, match="sampler_divergence_type 'binary_kl' does nothing"):
        trainer.train()
    assert not [log for log in trainer.state.log_history if "kl/sampler_dropped_share" in log]


def test_what_is_refused(make_trainer):
    with pytest.raises(ValueError, match="sampler_divergence_type must be one of binary_tv, binary_kl"):
        use_sampler_correction(make_trainer(), divergence_type="tv")
    with pytest.raises(ValueError, match="sampler_divergence_threshold must be > 0, got 0"):
        use_sampler_correction(make_trainer(), divergence_type="binary_tv", divergence_threshold=0)
    with pytest.raises(ValueError, match="sampler_divergence_threshold 0.1 needs a sampler_divergence_type"):
        use_sampler_correction(make_trainer(), divergence_threshold=0.1)
