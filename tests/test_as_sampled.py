"""Truncated sampling scored as it is sampled: value and gradient by enumeration, and beside a real sampler."""

import pytest
import torch
from enumeration import FIXED, Tables, V
from test_contract import BETA, enumerated, half_square, textbook_k3, trained_gradient  # noqa: F401  (a fixture)
from test_grpo import make_grpo  # noqa: F401  (a fixture)
from test_off_policy import gradient_now, off_by

from kl_alliteration import (
    KLMonitorCallback,
    KLPenalty,
    KLPenaltyCallback,
    kl,
    score_as_sampled,
    share_prompts,
    use_fast_sampling,
)
from kl_alliteration._trl import seam_of

# Of five tokens; min_p 0.3 leaves those that are 0.3 times as likely as the likeliest.
OPTIONS = {"top_k": {"top_k": 3}, "top_p": {"top_p": 0.8}, "min_p": {"min_p": 0.3}, "two": {"top_k": 4, "top_p": 0.9}}


def less_certain(trainer):
    """Policy and reference with flatter logits, so that no state is nearly decided."""
    with torch.no_grad():
        for model in (trainer.model, trainer.ref_model):
            model.transformer.ln_f.weight.mul_(0.4)
            model.transformer.ln_f.bias.mul_(0.4)
    return trainer


def left(log_p: torch.Tensor, options: dict) -> list[int]:
    """Tokens that one state's sampling leaves, from the definitions, token by token."""
    ordered = sorted(range(V), key=lambda v: -log_p[v].item())[: options.get("top_k", V)]
    p = torch.stack([log_p[v] for v in ordered]).softmax(0).tolist()
    n = next(n for n in range(1, len(p) + 1) if sum(p[:n]) >= options.get("top_p", 1) - 1e-12)
    return [v for v, each in zip(ordered[:n], p[:n], strict=True) if each >= options.get("min_p", 0) * p[0]]


def sampled_tables(t: Tables, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(V,) and (V, V) log-probabilities as they are sampled, -inf where nothing is; with the policy's gradient."""

    def of(log_p):
        outside = torch.ones(V, dtype=torch.bool)
        outside[left(log_p, options)] = False
        return log_p.masked_fill(outside, -torch.inf).log_softmax(-1)

    return of(t.p1), torch.stack([of(row) for row in t.p2])


def kept_completions(t: Tables, options: dict):
    """(place among all, log-ratios of its two tokens, log-probability) of each completion that can be sampled."""
    s1, s2 = sampled_tables(t, options)
    for i, (a, b) in enumerate(FIXED):
        if torch.isfinite(s1[a] + s2[a, b]):
            yield i, (s1[a] - t.q1[a], s2[a, b] - t.q2[a, b]), s1[a] + s2[a, b]


def probabilities(t: Tables, options: dict) -> torch.Tensor:
    found = torch.zeros(len(FIXED), dtype=torch.float64)
    for i, _, log_p in kept_completions(t, options):
        found[i] = log_p.exp().detach()
    return found


def kl_as_sampled(t: Tables, options: dict) -> torch.Tensor:
    return sum(log_p.exp() * sum(ratios) for _, ratios, log_p in kept_completions(t, options))


def gradient_of_row(trainer, options, row) -> torch.Tensor:
    """E over what is sampled of the gradient of `row`: of k1 in the reward, or of an estimate in the loss, or both."""
    estimator, placement = row
    f = {"k1": lambda x: x, "k2": half_square, "k3": textbook_k3}[estimator]
    t, objective = Tables(trainer), 0
    for _, ratios, log_p in kept_completions(t, options):
        value = sum(f(x) for x in ratios)
        if placement != "loss":
            objective = objective + log_p.exp() * value.detach()
        if placement != "reward":
            objective = objective + log_p.exp().detach() * value
    return t.gradient(objective)


@pytest.mark.parametrize("row", [("k1", "reward"), ("k2", "loss"), ("k3", "both")], ids="-in-".join)
@pytest.mark.parametrize("name", OPTIONS)
def test_value_and_gradient_are_those_of_the_policy_as_it_is_sampled(enumerated, name, row):  # noqa: F811
    options = OPTIONS[name]
    trainer = less_certain(enumerated(**options))
    score_as_sampled(trainer)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty(*row)))
    sampled = probabilities(Tables(trainer), options)
    assert sampled.sum() == pytest.approx(1) and 3 < (sampled > 0).sum() < len(FIXED)
    found = trained_gradient(trainer, sampled=sampled)
    torch.testing.assert_close(found, gradient_of_row(trainer, options, row), atol=1e-10, rtol=0)
    if row == ("k1", "reward"):
        right = gradient_now(trainer, lambda t: kl_as_sampled(t, options))
        torch.testing.assert_close(found, right, atol=1e-10, rtol=0)
        value = (sampled * seam_of(trainer).last_penalty).sum().item()
        assert value == pytest.approx(kl_as_sampled(Tables(trainer), options).item(), abs=1e-10)


@pytest.mark.filterwarnings("ignore:.*completions are sampled from another distribution")
@pytest.mark.parametrize("name", OPTIONS)
def test_otherwise_both_are_off(enumerated, name):  # noqa: F811
    """And the engine's own log-probabilities make the value right, not the gradient. docs/kl.md quotes this."""
    options = OPTIONS[name]
    trainer = less_certain(enumerated(**options))
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty()))
    t = Tables(trainer)
    sampled, right = probabilities(t, options), kl_as_sampled(t, options).item()
    found = trained_gradient(trainer, sampled=sampled)
    # The mean under the sampler of the log-ratio as it is scored, less its mean as the baseline.
    value = (sampled * seam_of(trainer).batch.penalty).sum().item()
    wanted = gradient_now(trainer, lambda t: kl_as_sampled(t, options))
    t, by_engine = Tables(trainer), 0
    for i, ratios, log_p in kept_completions(t, options):
        a, b = FIXED[i]
        by_engine = by_engine + log_p.exp().detach() * (sum(ratios).item() - right) * (t.p1[a] + t.p2[a, b])
    engine = off_by(t.gradient(by_engine), wanted)
    print(
        f"\n{name} {options}: KL {right:.3f}, k1 reads {value:.3f}; gradient off by {off_by(found, wanted):.3f}, "
        f"with the engine's log-probabilities in the reward by {engine:.3f}"
    )
    assert abs(value - right) > 0.01 and off_by(found, wanted) > 0.01 and engine > 0.01


@pytest.mark.parametrize(("lora", "shared", "passes"), [(False, False, 1), (True, True, 1), (False, True, 2)])
def test_the_sampler_is_the_policy_again_and_nothing_warns(make_trainer, recwarn, lora, shared, passes):
    """Trained with fast sampling, in one forward pass and in two, prompts shared and not."""
    trainer = make_trainer(lora, max_steps=3 * passes, top_k=5, top_p=0.9, num_iterations=passes)
    if shared:
        share_prompts(trainer)
    score_as_sampled(trainer)
    recwarn.clear()
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty()))
    trainer.add_callback(KLMonitorCallback(trainer))
    use_fast_sampling(trainer)
    trainer.train()
    assert not [w for w in recwarn if issubclass(w.category, kl.KLWarning)]
    logs = [log for log in trainer.state.log_history if "kl/sampler_k1_per_token" in log]
    assert len(logs) == 3 and all(abs(log["kl/sampler_k1_per_token"]) < 1e-5 for log in logs)
    assert all(log["kl/sampler_max_ratio"] < 1.001 for log in logs) and logs[0]["kl/k1_per_token"] > 0.3


@pytest.mark.parametrize("lora", [False, True])
def test_without_truncation_it_changes_nothing(make_trainer, lora):
    def run(asked):
        torch.manual_seed(0)
        trainer = make_trainer(lora)
        if asked:
            score_as_sampled(trainer)
        trainer.train()
        return [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]

    assert run(True) == run(False)


def test_what_is_refused_and_what_warns(make_trainer, make_grpo):  # noqa: F811
    with pytest.raises(ValueError, match="score_as_sampled is RLOO's"):
        score_as_sampled(make_grpo(top_k=3))
    with pytest.raises(ValueError, match="knows top_k, top_p and min_p, got repetition_penalty=1.2"):
        score_as_sampled(make_trainer(repetition_penalty=1.2))
    trainer = make_trainer(top_k=3)
    score_as_sampled(trainer)
    with pytest.warns(kl.KLWarning, match="estimator 'exact' is of all tokens"):
        KLPenaltyCallback(trainer, KLPenalty("exact", "both"))
