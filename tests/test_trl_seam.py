"""What `_trl.py` leans on in TRL, and that a stock trainer stays what it is."""

import inspect

import pytest
import torch
from trl import RLOOTrainer

from kl_alliteration import KLPenaltyCallback, kl
from kl_alliteration._trl import ATTRIBUTES, METHODS, check_trainer

TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "profiling")


def logged(trainer) -> list[dict]:
    trainer.train()
    return [{k: v for k, v in e.items() if not k.startswith(TIMES)} for e in trainer.state.log_history]


def test_the_signature_that_the_wrapper_repeats():
    names = list(inspect.signature(RLOOTrainer._get_per_token_logps_and_entropies).parameters)
    assert names[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]


@pytest.mark.parametrize(("beta", "expected"), [(0.0, ["policy"]), (0.5, ["policy", "reference"])])
def test_call_order_in_a_generation_batch(make_trainer, beta, expected):
    trainer = make_trainer(beta=beta, max_steps=1)
    calls, inside = [], []
    score, generate = trainer._get_per_token_logps_and_entropies, trainer._generate_and_score_completions

    def spy_score(model, *args, **kwargs):
        if inside:
            calls.append("reference" if model is trainer.ref_model else "policy")
        return score(model, *args, **kwargs)

    def spy_generate(inputs):
        inside.append(True)
        output = generate(inputs)
        inside.clear()
        return output

    trainer._get_per_token_logps_and_entropies, trainer._generate_and_score_completions = spy_score, spy_generate
    trainer.train()
    assert calls == expected


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_k1_sum_equals_the_stock_trainer_bit_for_bit(make_trainer, lora, accumulation):
    stock = make_trainer(lora=lora, gradient_accumulation_steps=accumulation)
    expected = logged(stock)
    # made after the first has run: construction seeds the generators that training draws from
    ours = make_trainer(lora=lora, gradient_accumulation_steps=accumulation)
    ours.add_callback(KLPenaltyCallback(ours, kl_estimator="k1", kl_reduction="sum"))
    assert any(e.get("kl") for e in expected), "the reference must have been used"
    assert logged(ours) == expected
    pairs = zip(stock.model.parameters(), ours.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("estimator", "reduction"), [("k1", "mean"), ("k2", "sum"), ("k3", "sum"), ("k3", "mean")])
def test_advantages_come_from_the_chosen_penalty(make_trainer, lora, estimator, reduction):
    """Advantages against a leave-one-out worked from the rewards and the log-probabilities that TRL computed."""
    trainer = make_trainer(lora=lora, max_steps=4)
    trainer.add_callback(KLPenaltyCallback(trainer, kl_estimator=estimator, kl_reduction=reduction))
    seam = trainer._kl_alliteration_seam
    batches = []
    generate = trainer._generate_and_score_completions

    def spy(inputs):
        output = generate(inputs)
        batches.append((seam._rollout, output, list(trainer._logs["rewards"]["reward"])))
        return output

    trainer._generate_and_score_completions = spy
    history = logged(trainer)
    for rollout, output, rewards in batches:
        x = rollout.logps - rollout.ref_logps
        per_token = {"k1": x, "k2": x * x / 2, "k3": torch.exp(-x) - 1 + x}[estimator] * output["completion_mask"]
        penalty = per_token.sum(1)
        if reduction == "mean":
            penalty = penalty / output["completion_mask"].sum(1)
        total = (torch.tensor(rewards) - 0.5 * penalty).view(-1, 4)
        others = torch.stack([(row.sum() - row) / 3 for row in total])
        torch.testing.assert_close(output["advantages"], (total - others).view(-1), atol=1e-4, rtol=1e-4)
    # the policy has moved by the last batch, so the estimators do differ
    assert batches[-1][0].ref_log_ratio.abs().max() > 1e-3
    # TRL's own metric keeps its meaning: the mean log-ratio in nats per token
    for entry, (rollout, output, _) in zip(history[:4], batches, strict=True):
        mask = output["completion_mask"]
        assert entry["kl"] == pytest.approx(((rollout.ref_log_ratio * mask).sum() / mask.sum()).item(), abs=1e-6)


def test_at_beta_zero_there_is_nothing_to_replace(make_trainer):
    trainer = make_trainer(beta=0.0, max_steps=2)
    trainer.add_callback(KLPenaltyCallback(trainer, kl_estimator="k3"))
    with_callback = logged(trainer)
    assert with_callback == logged(make_trainer(beta=0.0, max_steps=2))


@pytest.mark.parametrize("name", METHODS + ATTRIBUTES)
def test_a_trainer_without_a_private_name_is_refused_by_that_name(name):
    class Renamed:
        def __getattr__(self, asked):
            if asked == name:
                raise AttributeError(asked)
            return 0

    with pytest.raises(RuntimeError, match=f"has no {name}; .* trl 1.16.0"):
        check_trainer(Renamed())


def test_a_changed_call_order_is_refused(make_trainer):
    trainer = make_trainer(max_steps=1)
    KLPenaltyCallback(trainer, kl_estimator="k2")
    seam = trainer._kl_alliteration_seam
    generate = seam._generate_and_score

    def twice(inputs):
        generate(inputs)
        return generate(inputs)

    seam._generate_and_score = twice
    with pytest.raises(RuntimeError, match="log-probabilities 4 times in a generation batch, expected 2"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, got 'k4'"),
        ({"kl_reduction": "max"}, "kl_reduction must be one of sum, mean, got 'max'"),
    ],
)
def test_wrong_options_are_refused(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        KLPenaltyCallback(make_trainer(), **options)


def test_an_estimator_is_one_function(make_trainer, monkeypatch):
    monkeypatch.setitem(kl.ESTIMATORS, "zero", torch.zeros_like)
    trainer = make_trainer(beta=7.0, max_steps=1)
    KLPenaltyCallback(trainer, kl_estimator="zero")
    trainer.train()
    rollout = trainer._kl_alliteration_seam._rollout
    assert trainer._kl_alliteration_seam.penalty(rollout).abs().max() == 0
