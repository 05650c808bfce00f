"""KL(sampler || policy): what the engine that samples says of its tokens, beside what the trainer scores."""

import copy
import math

import pytest
import torch
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

KEYS = "k1_per_token", "k3_per_token", "k1_per_sequence", "max_ratio"


def sampler(log: dict) -> dict:
    return {name: log[f"kl/sampler_{name}"] for name in KEYS if f"kl/sampler_{name}" in log}


def watched(trainer) -> list:
    """Fast sampling and the monitor; the rollouts that it sees, with what the model's own logits were then."""
    use_fast_sampling(trainer)
    trainer.add_callback(KLMonitorCallback(trainer))
    rollouts, generate = [], trainer._generate_and_score_completions
    seam_of(trainer).observers.append(lambda rollout: rollouts.append([rollout]))

    def spy(inputs):
        output = generate(inputs)
        ids, mask = (torch.cat([output[f"prompt_{n}"], output[f"completion_{n}"]], 1) for n in ("ids", "mask"))
        length = output["completion_ids"].shape[1]
        with torch.no_grad():
            logits = trainer.model(ids, attention_mask=mask, position_ids=kl.positions_of(mask)).logits
        rollouts[-1].append((logits[:, -length - 1 : -1] / trainer.temperature).log_softmax(-1))
        return output

    trainer._generate_and_score_completions = spy
    return rollouts


@pytest.mark.filterwarnings("ignore:temperature")
@pytest.mark.parametrize("penalty", [None, KLPenalty("exact", "both")], ids=["own", "exact"])
@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_fast_sampling_is_the_policy_itself(make_trainer, make_grpo, kind, penalty):  # noqa: F811
    trainer = (make_trainer if kind == "rloo" else make_grpo)(temperature=0.8, max_steps=3)
    if penalty is not None:
        trainer.add_callback(KLPenaltyCallback(trainer, penalty))
    watched(trainer)
    trainer.train()
    found = [sampler(log) for log in trainer.state.log_history if sampler(log)]
    assert len(found) == 3
    for log in found:
        assert abs(log["k1_per_token"]) < 1e-5 and log["k3_per_token"] < 1e-6 and log["max_ratio"] < 1.001


def test_truncated_sampling_shows_the_mass_that_it_leaves_out(make_trainer):
    """Each token is likelier by one over the mass of the three likeliest: k1 is the mean of -log of that."""
    with pytest.warns(kl.KLWarning, match="top_k=3"):
        trainer = make_trainer(max_steps=1, top_k=3)
        rollouts = watched(trainer)
        trainer.train()
    (rollout, log_p), log = rollouts[0], sampler(trainer.state.log_history[0])
    lost = -log_p.exp().topk(3).values.sum(-1).log() * rollout.completion_mask  # (B, T)
    assert log["k1_per_token"] == pytest.approx((lost.sum() / rollout.completion_mask.sum()).item(), rel=1e-4)
    assert log["k1_per_sequence"] == pytest.approx(lost.sum(1).mean().item(), rel=1e-4)
    assert log["max_ratio"] == pytest.approx(math.exp(lost.max().item()), rel=1e-4) and log["k1_per_token"] > 0.5


def test_columns_that_trl_pads_to_a_multiple_hide_nothing(make_trainer):
    trainer = make_trainer(max_steps=2, pad_to_multiple_of=8)
    trainer.add_callback(KLMonitorCallback(trainer))
    use_fast_sampling(trainer)
    use_sampler_correction(trainer)
    trainer.train()
    log = trainer.state.log_history[0]
    assert abs(sampler(log)["k1_per_token"]) < 1e-5 and log["kl/sampler_weight"] == pytest.approx(1, abs=1e-5)


def test_weights_that_were_not_synced_are_seen_in_the_same_step(make_trainer):
    """The policy moves between sampling and scoring: k1 is the mean of what both say of the tokens."""
    trainer = make_trainer(max_steps=2)
    rollouts, generate, before = watched(trainer), trainer._generate, []

    def moved(prompts):
        generated = generate(prompts)
        before.append(copy.deepcopy(trainer.model).eval())
        if len(before) == 2:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return generated

    trainer._generate = moved
    trainer.train()
    logs = [sampler(log) for log in trainer.state.log_history if sampler(log)]
    assert abs(logs[0]["k1_per_token"]) < 1e-5
    rollout, log_p = rollouts[1]
    ids, mask = rollout.completion_ids[:, :, None], rollout.completion_mask
    ratio = (rollout.sampler_logps - log_p.gather(-1, ids)[..., 0]) * mask
    assert logs[1]["k1_per_token"] == pytest.approx((ratio.sum() / mask.sum()).item(), rel=1e-3)
    k3 = ((-ratio).exp() - 1 + ratio) * mask
    assert logs[1]["k3_per_token"] == pytest.approx((k3.sum() / mask.sum()).item(), rel=1e-3)
    assert logs[1]["k3_per_token"] > 1e-3 and logs[1]["max_ratio"] == pytest.approx(
        ratio.abs().max().exp().item(), rel=1e-3
    )


def test_what_an_engine_gives_to_grpo_is_taken(make_grpo):  # noqa: F811
    """A rollout function that claims to have been certain: k1 is the mean of -log p."""

    def rollout(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {
            "prompt_ids": ids,
            "completion_ids": [[5, 6, 7]] * len(prompts),
            "logprobs": [[0.0] * 3] * len(prompts),
        }

    trainer = make_grpo(max_steps=1)
    trainer.rollout_func = rollout
    trainer.add_callback(KLMonitorCallback(trainer))
    seen = []
    seam_of(trainer).observers.append(seen.append)
    trainer.train()
    log = sampler(trainer.state.log_history[0])
    assert log["k1_per_token"] == pytest.approx(-seen[0].logps.mean().item(), rel=1e-4)


def test_transformers_own_sampling_and_a_judge_in_between_say_nothing(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.add_callback(KLMonitorCallback(trainer))
    trainer.train()
    assert not sampler(trainer.state.log_history[0])
    fast = make_trainer(max_steps=1)
    use_fast_sampling(fast)
    model = fast.accelerator.unwrap_model(fast.model)
    config = copy.deepcopy(fast.generation_config)
    config.max_new_tokens = 4
    model.generate(input_ids=torch.tensor([[4, 5]]), attention_mask=torch.ones(1, 2).long(), generation_config=config)
    fast.train()
    assert seam_of(fast).batch.sampled is None
    model.generate(input_ids=torch.tensor([[4, 5]]), attention_mask=torch.ones(1, 2).long(), generation_config=config)
    assert seam_of(fast).batch.sampled is None
