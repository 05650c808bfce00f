"""What `_trl` leans on in TRL, and that a stock trainer stays what it is."""

import inspect

import pytest
import torch
from trl import RLOOTrainer

from kl_alliteration import KLPenalty, KLPenaltyCallback, kl
from kl_alliteration._trl import leave_baseline_out, seam_of
from kl_alliteration._trl.seam import ATTRIBUTES, METHODS, check_trainer
from kl_alliteration.penalty import PLACEMENTS

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
@pytest.mark.parametrize("accumulation", [1, 3])
def test_k1_sum_equals_the_stock_trainer_bit_for_bit(make_trainer, lora, accumulation):
    stock = make_trainer(lora=lora, gradient_accumulation_steps=accumulation)
    expected = logged(stock)
    # made after the first has run: construction seeds the generators that training draws from
    ours = make_trainer(lora=lora, gradient_accumulation_steps=accumulation)
    ours.add_callback(KLPenaltyCallback(ours, KLPenalty("k1", reduction="sum")))
    assert any(e.get("kl") for e in expected), "the reference must have been used"
    assert logged(ours) == expected
    pairs = zip(stock.model.parameters(), ours.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore::kl_alliteration.kl.KLWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("estimator", "reduction"), [("k1", "mean"), ("k2", "sum"), ("k3", "sum"), ("k3", "mean")])
def test_advantages_come_from_the_chosen_penalty(make_trainer, lora, estimator, reduction):
    """Advantages against a leave-one-out worked from the rewards and the log-probabilities that TRL computed."""
    trainer = make_trainer(lora=lora, max_steps=4)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty(estimator, reduction=reduction)))
    seam = trainer._kl_alliteration_seam
    batches = []
    generate = trainer._generate_and_score_completions

    def spy(inputs):
        output = generate(inputs)
        batches.append((seam.batch.rollout, output, list(trainer._logs["rewards"]["reward"])))
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


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_without_a_baseline_the_weights_are_the_rewards_less_the_penalty(make_trainer, beta):
    """And what the others' mean is taken from gives RLOO's, which is the stock trainer's."""

    def some(completions, **kwargs):  # a reward that does not apply to every third
        return [None if i % 3 == 2 else float(len(set(text.split()))) for i, text in enumerate(completions)]

    found = {}
    for baseline in (True, False):
        trainer = make_trainer(beta=beta, max_steps=2, reward_clip_range=(0.0, 4.0))
        trainer.reward_funcs[0] = some
        seam = seam_of(trainer)
        if not baseline:
            leave_baseline_out(seam)
        generate = trainer._generate_and_score_completions
        batches = found[baseline] = []

        def spy(inputs, generate=generate, batches=batches, seam=seam, logs=trainer._logs):
            output = generate(inputs)
            raw = [0.0 if r is None or r != r else min(r, 4.0) for r in logs["rewards"]["reward"]]
            assert list(logs["advantages"]) == output["advantages"].tolist()
            batches.append((output, seam.batch.rollout, torch.tensor(raw)))
            return output

        trainer._generate_and_score_completions = spy
        trainer.train()
    applies = torch.tensor([i % 3 != 2 for i in range(8)])
    for output, rollout, raw in found[False]:
        penalty = 0.0 if beta == 0 else beta * (rollout.ref_log_ratio * output["completion_mask"]).sum(1)
        torch.testing.assert_close(output["advantages"], (raw - penalty) * applies, atol=1e-5, rtol=1e-5)
    assert beta == 0 or rollout.ref_log_ratio.abs().max() > 1e-3 and (raw == 4.0).any()
    (rloo, *_), (reinforce, *_) = found[True][0], found[False][0]
    assert torch.equal(rloo["completion_ids"], reinforce["completion_ids"])
    for group in (slice(0, 4), slice(4, 8)):
        weights, counts = reinforce["advantages"][group].tolist(), applies[group]
        for i in range(4):
            others = [w for j, w in enumerate(weights) if j != i and counts[j]]
            expected = weights[i] - sum(others) / len(others) if counts[i] else 0.0
            assert rloo["advantages"][group][i].item() == pytest.approx(expected, abs=1e-5)


def test_at_beta_zero_there_is_nothing_to_replace(make_trainer):
    trainer = make_trainer(beta=0.0, max_steps=2)
    with pytest.warns(kl.KLWarning, match="the penalty charges nothing"):
        trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("k3", "both")))
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
    KLPenaltyCallback(trainer, KLPenalty("k3", "both"))
    seam = trainer._kl_alliteration_seam
    generate = seam.stock.generate_and_score

    def twice(inputs):
        generate(inputs)
        return generate(inputs)

    seam.stock.generate_and_score = twice
    with pytest.raises(RuntimeError, match="log-probabilities 4 times in a generation batch, expected 2"):
        trainer.train()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("table", ["SAMPLED", "FULL_VOCABULARY"])
def test_an_estimator_is_one_function(make_trainer, monkeypatch, table, placement):
    """A new name in a table is all it takes; here one that is 2 for each token of either kind."""
    functions = {"SAMPLED": lambda x: 0 * x + 2, "FULL_VOCABULARY": lambda log_p, log_q, ids: 0 * log_p.sum(-1) + 2}
    monkeypatch.setitem(getattr(kl, table), "two", functions[table])
    trainer = make_trainer(max_steps=1, warmup_steps=0)
    KLPenaltyCallback(trainer, KLPenalty("two", placement, reduction="mean"))
    seam = trainer._kl_alliteration_seam
    trainer.train()
    assert seam.last_penalty.tolist() == [0.0 if placement == "loss" else 2.0] * 8


def test_a_wrong_option_is_refused(make_trainer):
    with pytest.raises(ValueError, match="^estimator must be one of k1, k2, k3, abs, exact, top_k, got 'k4'"):
        KLPenaltyCallback(make_trainer(), KLPenalty("k4"))
    with pytest.raises(ValueError, match="^top_k must be >= 1, got 0"):
        KLPenaltyCallback(make_trainer(), KLPenalty("top_k", "both", top_k=0))


def losses(trainer) -> list[tuple]:
    """Trains, and says for each micro-batch what went into `_compute_loss` and what TRL's and our loss were."""
    seam, seen = trainer._kl_alliteration_seam, []
    ours, stock = trainer._compute_loss, seam.stock.compute_loss

    def spy_stock(model, inputs):
        seen.append([inputs, stock(model, inputs)])
        return seen[-1][1]

    def spy_ours(model, inputs):
        loss = ours(model, inputs)
        seen[-1].append(loss.item())
        return loss

    seam.stock.compute_loss, trainer._compute_loss = spy_stock, spy_ours
    trainer.train()
    return seen


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("estimator", ["k2", "exact"])
def test_the_loss_s_term_follows_shuffling_accumulation_and_iterations(make_trainer, estimator, lora):
    """Reference values stay with their completions, the term is new at each pass, and earlier samples are weighted."""
    options = {"gradient_accumulation_steps": 2, "num_iterations": 2, "per_device_train_batch_size": 4, "beta": 0.3}
    trainer = make_trainer(lora=lora, max_steps=4, learning_rate=5e-2 if lora else 1e-2, **options)
    KLPenaltyCallback(trainer, KLPenalty(estimator, "loss"))

    def logps_of(model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        return model(ids, attention_mask=mask).logits[:, inputs["prompt_ids"].shape[1] - 1 : -1].log_softmax(-1)

    terms = []
    stock = trainer._kl_alliteration_seam.stock.compute_loss

    def expected(model, inputs):
        with torch.no_grad():
            log_p = logps_of(model, inputs)
            if lora:
                with model.disable_adapter():
                    log_q = logps_of(model, inputs)
            else:
                log_q = logps_of(trainer.ref_model, inputs)
            mask, ids = inputs["completion_mask"], inputs["completion_ids"].unsqueeze(-1)
            logps, ref_logps = log_p.gather(-1, ids)[..., 0], log_q.gather(-1, ids)[..., 0]
            exact = (log_p.exp() * (log_p - log_q)).sum(-1)
            per_token = exact if estimator == "exact" else (logps - ref_logps) ** 2 / 2
            ratio = ((logps * mask).sum(1) - inputs["old_logps"]).exp().clamp(0.8, 1.2)
            terms.append((0.3 * (ratio * (per_token * mask).sum(1)).mean().item(), ratio))
        return stock(model, inputs)

    trainer._kl_alliteration_seam.stock.compute_loss = expected
    seen = losses(trainer)
    assert len(seen) == 8
    for (_, stock_loss, loss), (term, _) in zip(seen, terms, strict=True):
        assert loss - stock_loss.item() == pytest.approx(term, rel=1e-3, abs=1e-5)
    assert terms[-1][0] > 1e-3  # the policy has moved
    assert max((ratio - 1).abs().max() for _, ratio in terms) > 1e-3  # and second passes are off-policy


def test_accumulation_adds_the_same_term(make_trainer):
    """Two micro-batches of 4 give the gradient of one batch of 8."""
    gradients = []
    for batch, accumulation in ((8, 1), (4, 2)):
        trainer = make_trainer(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            max_grad_norm=0,
        )
        KLPenaltyCallback(trainer, KLPenalty("exact", "both"))
        trainer.train()
        gradients.append([p.detach() for p in trainer.model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_stock_plus_loss_term_needs_the_penalty_out_of_the_reward(make_trainer):
    """`loss` alone leaves the rewards as they are: advantages of the plain rewards."""
    trainer = make_trainer(max_steps=2, beta=5.0)
    KLPenaltyCallback(trainer, KLPenalty("k2", "loss"))
    for inputs, _, _ in losses(trainer):
        rewards = torch.tensor(list(trainer._logs["rewards"]["reward"])).view(-1, 4)
        expected = (rewards - (rewards.sum(1, keepdim=True) - rewards) / 3).flatten()
        if inputs is not None:
            last = inputs["advantages"]
    torch.testing.assert_close(last.sort().values, expected.sort().values)
