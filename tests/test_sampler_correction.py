"""A sampler that is not the policy: weights by hand, gradients by enumeration, and a vLLM that is asked.

Every completion of the 2-step, 5-token model is weighted by the *sampler's* probability here, as if it had sampled.
"""

from types import SimpleNamespace

import pytest
import torch
from enumeration import FIXED, Tables, V, reverse_kl
from test_contract import ROWS, enumerated, trained_gradient  # noqa: F401  (a fixture)
from test_grpo import make_grpo  # noqa: F401  (a fixture)

from kl_alliteration import (
    KLMonitorCallback,
    KLPenalty,
    KLPenaltyCallback,
    kl,
    use_fast_sampling,
    use_sampler_correction,
)
from kl_alliteration._trl import seam_of
from kl_alliteration.sampling.correction import CORRECTIONS, sampler_weights


def test_weights_by_hand():
    logps = torch.tensor([[0.5, 0.5, 0.9]]).log()
    sampler = torch.tensor([[0.25, 0.1, 0.1]]).log()  # ratios 2, 5, and 9 of a token that is not counted
    mask = torch.tensor([[1, 1, 0]])
    wanted = {
        "token_truncate": [2.0, 3.0, 1.0],
        "token_mask": [2.0, 0.0, 1.0],
        "sequence_truncate": [3.0, 3.0, 3.0],  # 10
        "sequence_mask": [0.0, 0.0, 0.0],
    }
    for correction, weights in wanted.items():
        found = sampler_weights(logps, sampler, mask, correction, cap=3.0)
        assert torch.allclose(found, torch.tensor([weights])), correction
    assert sampler_weights(logps, sampler, mask, "sequence_mask", cap=11.0)[0, 0] == pytest.approx(10)
    unknown = sampler_weights(logps, torch.full((1, 3), torch.nan), mask, "token_mask", cap=3.0)
    assert torch.equal(unknown, torch.ones(1, 3))  # what the engine does not say is no difference


def sampler_tables(t: Tables, far: float) -> torch.Tensor:
    """(25, 2) log-probabilities of every completion's tokens by a sampler near the policy."""
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) * far for shape in (V, (V, V))]
    s1, s2 = (p.detach() + n for p, n in zip((t.p1, t.p2), noise, strict=True))
    s1, s2 = s1.log_softmax(-1), s2.log_softmax(-1)
    return torch.stack([torch.stack([s1[a], s2[a, b]]) for a, b in FIXED])


def sampled_gradient(trainer, sampler: torch.Tensor, between=None) -> torch.Tensor:
    """The same where the sampler drew them, and said so."""
    generate = trainer._generate

    def said(prompts):
        seam_of(trainer).keep_sampled(sampler)
        return generate(prompts)

    trainer._generate = said
    return trained_gradient(trainer, sampled=sampler.sum(-1).exp(), between=between)


def off_by(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


@pytest.mark.filterwarnings("ignore:the KL penalty")
@pytest.mark.parametrize("choice", [key for key, row in ROWS.items() if row is not None], ids="-in-".join)
def test_where_nothing_is_capped_the_gradient_is_that_of_the_policy_s_own_samples(enumerated, choice):  # noqa: F811
    trainer = enumerated()
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty(*choice, top_k=2)))
    use_sampler_correction(trainer, "sequence_truncate", cap=1e9)
    t = Tables(trainer)
    found = sampled_gradient(trainer, sampler_tables(t, far=0.5))
    assert torch.allclose(found, t.gradient(ROWS[choice](t)), atol=1e-10, rtol=0)


def test_the_bias_of_each_correction(enumerated):  # noqa: F811
    """Relative to the reverse-KL gradient, k1 in the reward, at a cap of 1.5: docs/kl.md quotes these."""
    bias = {}
    for correction in CORRECTIONS:
        for far in (0.1, 0.5):
            trainer = enumerated()
            use_sampler_correction(trainer, correction, cap=1.5)
            t = Tables(trainer)
            found = sampled_gradient(trainer, sampler_tables(t, far))
            bias[correction, far] = off_by(found, t.gradient(reverse_kl(t)))
            print(f"\n{correction}, sampler {far} away: {bias[correction, far]:.4f}", end="")
    for correction in CORRECTIONS[1:]:
        assert bias[correction, 0.1] < bias["none", 0.1]
    for correction in ("sequence_truncate", "sequence_mask"):
        assert bias[correction, 0.1] < 1e-9 < bias[correction, 0.5]  # nothing is capped, and something is


def test_a_sampler_that_says_nothing_is_said(make_trainer):
    trainer = make_trainer(max_steps=1)
    use_sampler_correction(trainer)
    with pytest.warns(kl.KLWarning, match="sampler_correction 'sequence_truncate' does nothing"):
        trainer.train()


@pytest.mark.parametrize("lora", [False, True])
def test_with_fast_sampling_it_changes_nothing(make_trainer, lora):
    """There the sampler is the policy: every weight is 1 to rounding."""

    def run(correction: str):
        torch.manual_seed(0)
        trainer = make_trainer(lora)
        trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
        use_fast_sampling(trainer)
        use_sampler_correction(trainer, correction)
        trainer.train()
        return trainer.state.log_history

    plain, corrected = run("none"), run("sequence_mask")
    assert [log["kl/sampler_weight"] for log in corrected[:3]] == pytest.approx([1.0] * 3, abs=1e-5)
    assert all(log["kl/sampler_clipped_share"] == 0 for log in corrected[:3])
    norms = ([log["grad_norm"] for log in logs[:3]] for logs in (plain, corrected))
    assert next(norms) == pytest.approx(next(norms), rel=1e-3)


def test_rloo_s_vllm_is_asked_and_heard(make_trainer):
    """A stand-in that answers as TRL's `VLLMGeneration` does: lists (B, T, 1), `None` where it knows nothing."""
    trainer = make_trainer(max_steps=1)
    stock, asked = trainer._generate_single_turn, []
    engine = SimpleNamespace(logprobs=None)

    def generate(**kwargs):
        asked.append(engine.logprobs)
        return [[3]] * 8, kwargs["ids"], [[[-1.0]] * (len(row) - 1) + [[None]] for row in kwargs["ids"]], None

    engine.generate = generate
    trainer.vllm_generation = engine
    trainer.add_callback(KLMonitorCallback(trainer))
    seen = []
    seam_of(trainer).observers.append(lambda rollout: seen.append(rollout))

    def through_the_engine(*args, **kwargs):
        found = stock(*args, **kwargs)
        engine.generate(ids=found)
        return found

    trainer._generate_single_turn = through_the_engine
    trainer.train()
    assert asked == [0] and seen[0].sampler_logps.shape == seen[0].logps.shape
    logged = next(log for log in trainer.state.log_history if "reward" in log)
    mask, logps = seen[0].completion_mask, seen[0].logps
    said = torch.where(seen[0].sampler_logps.isnan(), logps, -1.0)
    by_hand = (((said - logps) * mask).sum() / mask.sum()).item()
    assert logged["kl/sampler_k1_per_token"] == pytest.approx(by_hand, rel=1e-5)


def test_what_is_refused(make_trainer, make_grpo):  # noqa: F811
    with pytest.raises(ValueError, match="sampler_correction"):
        use_sampler_correction(make_trainer(), "truncate")
    with pytest.raises(ValueError, match="cap must be > 0, got 0"):
        use_sampler_correction(make_trainer(), "token_mask", cap=0)
    with pytest.raises(ValueError, match="GRPOTrainer has its own"):
        use_sampler_correction(make_grpo(), "token_mask")
