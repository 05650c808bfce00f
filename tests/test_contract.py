"""Every row of the gradient contract, by enumeration of all completions of a 2-step, 5-token model in float64.

What is summed up is what training runs: TRL's scoring and advantages with our penalty in them, TRL's loss with our
term on it, one completion at a time, each weighted by its probability. What it is compared with is autograd through
the definition of each objective, written here from the model's full logits.
"""

import itertools

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from enumeration import (
    ENDING,
    FIXED,
    PROMPT,
    STEPS,
    Float64Head,
    Tables,
    V,
    flat,
    kl_forward,
    kl_reverse,
    move,
    parameters,
    per_state,
    reverse_kl,
)
from peft import LoraConfig
from trl import RLOOConfig, RLOOTrainer

from kl_alliteration import KLPenalty, KLPenaltyCallback, kl, penalty

K, BETA = 2, 0.7


@pytest.fixture
def enumerated(enumerated_model, tmp_path, monkeypatch):
    """`enumerated(completions, lora=False, **RLOOConfig options)`: its batch is all completions there are."""

    def make(completions=FIXED, lora=False, **options):
        monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Float64Head)
        trainer = RLOOTrainer(
            model=str(enumerated_model),
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=RLOOConfig(
                output_dir=str(tmp_path),
                beta=BETA,
                per_device_train_batch_size=len(completions),
                num_generations=len(completions),
                max_completion_length=STEPS,
                model_init_kwargs={"dtype": torch.float64},
                gradient_checkpointing=False,
                report_to="none",
                use_cpu=True,
                bf16=False,
                **options,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["b c"] * len(completions)}),
            peft_config=LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM") if lora else None,
        )
        trainer._generate = lambda prompts: ([PROMPT] * len(prompts), completions, ["" for _ in prompts])
        move(trainer)
        return trainer

    return make


def trained_gradient(trainer, completions=FIXED, sampled: torch.Tensor | None = None, between=None) -> torch.Tensor:
    """E[gradient of the loss] / beta over all completions: with no reward but the penalty, that of E[penalty].

    Each completion has the probability (B,) of `sampled`, by default the policy's own. `between` is called with the
    batch between its making and its loss.
    """
    n = len(completions)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * n)
    if between is not None:
        between(batch)
    # Leave-one-out over n completions is n / (n - 1) times "less the mean", and a constant baseline adds nothing.
    batch["advantages"] = batch["advantages"] * (n - 1) / n
    total = 0
    for i in range(n):
        row = {name: value[i : i + 1] for name, value in batch.items()}
        loss = trainer._compute_loss(trainer.model, row)
        gradient = torch.autograd.grad(loss, parameters(trainer), allow_unused=True)
        gradient = [
            torch.zeros_like(p) if g is None else g for g, p in zip(gradient, parameters(trainer), strict=True)
        ]
        total = total + (batch["old_logps"].exp() if sampled is None else sampled)[i] * flat(gradient)
    return total / BETA


def expected(t: Tables, f):
    """E[sum of f(log-ratio)], states and all."""
    return sum(w * (p.exp() * f(p - q)).sum() for w, p, q in t.states())


def future_only(t: Tables, f):
    """The divergences held fixed, the probability of getting into their states not."""
    return sum(w * f(p, q).detach() for w, p, q in t.states())


def twice_tv(p, q):
    return (p.exp() - q.exp()).abs().sum()


def likeliest(p):
    return torch.zeros(V, dtype=torch.bool).scatter(0, p.detach().topk(K).indices, True)


def half_square(x):
    return x * x / 2


def textbook_k3(x):
    return torch.exp(-x) - 1 + x


class OpeningTables(Tables):
    """Of the first token alone."""

    def __init__(self, t: Tables):
        self.p1, self.q1 = t.p1, t.q1
        self.p2 = self.q2 = torch.zeros(V, 1, dtype=torch.float64)  # a second token that is certain

    def states(self):
        yield torch.ones((), dtype=torch.float64), self.p1, self.q1


NOTHING = None  # a gradient of zero
ROWS = {
    ("k1", "reward"): reverse_kl,
    ("k1", "loss"): NOTHING,
    ("k1", "both"): reverse_kl,
    ("k2", "reward"): lambda t: expected(t, half_square) - per_state(t, kl_reverse),
    ("k2", "loss"): lambda t: per_state(t, kl_reverse),
    ("k2", "both"): lambda t: expected(t, half_square),
    ("k3", "reward"): lambda t: reverse_kl(t) - per_state(t, kl_forward),
    ("k3", "loss"): lambda t: per_state(t, kl_forward),
    ("k3", "both"): reverse_kl,
    ("abs", "reward"): lambda t: expected(t, torch.abs) - per_state(t, twice_tv),
    ("abs", "loss"): lambda t: per_state(t, twice_tv),
    ("abs", "both"): lambda t: expected(t, torch.abs),
    ("exact", "reward"): lambda t: future_only(t, kl_reverse),
    ("exact", "loss"): lambda t: per_state(t, kl_reverse),
    ("exact", "both"): reverse_kl,
    ("top_k", "reward"): lambda t: (
        future_only(t, kl_reverse) + per_state(t, lambda p, q: (p.exp() * (p - q).detach())[~likeliest(p)].sum())
    ),
    ("top_k", "loss"): lambda t: per_state(t, lambda p, q: (p.exp() * (p - q).detach())[likeliest(p)].sum()),
    ("top_k", "both"): reverse_kl,
}
FORWARD_ROWS = {
    "reward": lambda t: future_only(t, kl_forward),
    "loss": lambda t: per_state(t, kl_forward),
    "both": lambda t: sum(w * kl_forward(p, q) for w, p, q in t.states()),
}


def assert_row(trainer, objective, scale=1.0):
    found = trained_gradient(trainer)
    t = Tables(trainer)
    wanted = torch.zeros_like(found) if objective is NOTHING else scale * t.gradient(objective(t))
    assert objective is NOTHING or wanted.abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


def test_the_contract_has_these_rows_and_no_others():
    assert set(penalty.CONTRACT) == set(ROWS) == set(itertools.product(kl.estimators(), penalty.PLACEMENTS))
    assert set(penalty.FORWARD) == set(FORWARD_ROWS)


@pytest.mark.filterwarnings("ignore::kl_alliteration.kl.KLWarning")
@pytest.mark.parametrize("reduction", kl.REDUCTIONS)
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_row(enumerated, row, reduction):
    trainer = enumerated()
    KLPenaltyCallback(trainer, KLPenalty(*row, reduction=reduction, top_k=K))
    assert_row(trainer, ROWS[row], scale=1.0 if reduction == "sum" else 1 / STEPS)


@pytest.mark.filterwarnings("ignore::kl_alliteration.kl.KLWarning")
@pytest.mark.parametrize("placement", penalty.PLACEMENTS)
def test_row_of_the_forward_kl(enumerated, placement):
    trainer = enumerated()
    KLPenaltyCallback(trainer, KLPenalty("exact", placement, direction="forward"))
    assert_row(trainer, FORWARD_ROWS[placement])


@pytest.mark.parametrize("row", [("k1", "reward"), ("k2", "loss"), ("exact", "both"), ("top_k", "both")], ids="-".join)
def test_row_with_lora(enumerated, row):
    trainer = enumerated(lora=True)
    KLPenaltyCallback(trainer, KLPenalty(*row, top_k=K))
    assert_row(trainer, ROWS[row])


def ending_terms(t: Tables):
    """(log-probability, sum of log-ratios, sum of exact KLs, length) of each completion where token 0 ends one."""
    for first, *rest in ENDING:
        log_p, ratio, exact = t.p1[first], t.p1[first] - t.q1[first], kl_reverse(t.p1, t.q1)
        for second in rest:
            log_p, ratio = log_p + t.p2[first, second], ratio + t.p2[first, second] - t.q2[first, second]
            exact = exact + kl_reverse(t.p2[first], t.q2[first])
        yield log_p, ratio, exact, 1 + len(rest)


@pytest.mark.parametrize(("estimator", "placement"), [("k1", "reward"), ("exact", "both")])
def test_mean_where_lengths_vary(enumerated, estimator, placement):
    """Each completion by its own length: the gradient of E[KL / length] for exact, and for k1 in the reward."""
    trainer = enumerated(ENDING)
    KLPenaltyCallback(trainer, KLPenalty(estimator, placement, reduction="mean"))
    t = Tables(trainer)
    if estimator == "k1":
        objective = sum(p.exp() * ratio.detach() / n for p, ratio, _, n in ending_terms(t))
    else:
        objective = sum(p.exp() * exact / n for p, _, exact, n in ending_terms(t))
    torch.testing.assert_close(trained_gradient(trainer, ENDING), t.gradient(objective), atol=1e-10, rtol=0)


BUDGET = 1.6  # nats per token: some completions are within it, some beyond


@pytest.mark.parametrize("within", [0, 0.3])
@pytest.mark.parametrize("reduction", kl.REDUCTIONS)
@pytest.mark.parametrize("row", [("k1", "reward"), ("exact", "loss"), ("exact", "both")], ids="-".join)
def test_budget(enumerated, row, reduction, within):
    """Within the budget a share of the row's own gradient, or nothing; beyond it all, of the completions beyond it."""
    trainer = enumerated(ENDING)
    KLPenaltyCallback(trainer, KLPenalty(*row, reduction=reduction, budget_per_token=BUDGET, within_budget=within))
    t = Tables(trainer)
    objective, beyond = 0, 0
    for log_p, ratio, exact, n in ending_terms(t):
        value = (ratio if row[0] == "k1" else exact) / (n if reduction == "mean" else 1)
        excess = (value - BUDGET * (1 if reduction == "mean" else n)).clamp(min=0)
        beyond += excess.item() > 0
        probability, excess = log_p.exp(), within * value + (1 - within) * excess
        if row[1] == "reward":
            excess = excess.detach()
        if row[1] == "loss":
            probability = probability.detach()
        objective = objective + probability * excess
    assert 0 < beyond < len(ENDING)
    torch.testing.assert_close(trained_gradient(trainer, ENDING), t.gradient(objective), atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore::kl_alliteration.kl.KLWarning")
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_price_on_the_opening(enumerated, row):
    """The row's own gradient and, at its price, that of the same row of one-token texts: of the first token's KL."""
    trainer = enumerated()
    KLPenaltyCallback(trainer, KLPenalty(*row, top_k=K, opening_tokens=1, opening_price=3.0))
    first_alone = ROWS[row] and (lambda t: ROWS[row](OpeningTables(t)))
    assert_row(trainer, ROWS[row] and (lambda t: ROWS[row](t) + 3.0 * first_alone(t)))


def test_no_gradient_within_the_budget(enumerated):
    trainer = enumerated()
    KLPenaltyCallback(trainer, KLPenalty("exact", "both", budget_per_token=100.0))
    assert trained_gradient(trainer).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("k1", "loss"), "zero.*Use k2 in the loss"),
        (("k3", "reward"), "vanishes near the reference.*Use k1 in the reward"),
        (("exact", "reward"), "no own-token term.*Use exact in both"),
    ],
)
def test_a_null_or_wrong_gradient_warns_or_stops(enumerated, row, words):
    trainer = enumerated()
    with pytest.warns(kl.KLWarning, match=words):
        KLPenaltyCallback(trainer, KLPenalty(*row))
    with pytest.raises(ValueError, match=words):
        KLPenaltyCallback(trainer, KLPenalty(*row), strict=True)


@pytest.mark.parametrize("row", [("k1", "reward"), ("k2", "loss"), ("k3", "both"), ("exact", "both")], ids="-".join)
def test_a_good_choice_is_silent(enumerated, recwarn, row):
    trainer = enumerated()
    recwarn.clear()
    callback = KLPenaltyCallback(trainer, KLPenalty(*row), strict=True)
    assert (callback.penalty.estimator, callback.penalty.placement) == row and [str(w.message) for w in recwarn] == []


def test_the_halves_of_both_have_one_price(enumerated):
    """RLOO's `normalize_advantages` would divide one of them: 0.39 was the cosine to the KL's gradient."""
    trainer = enumerated(normalize_advantages=True)
    with pytest.raises(ValueError, match="normalize_advantages divides the half of a penalty that is in the reward"):
        KLPenaltyCallback(trainer, KLPenalty("exact", "both"))
    KLPenaltyCallback(trainer, KLPenalty("k1", "reward"))


def test_words_name_reduction_and_budget():
    shared = KLPenalty("exact", "both", budget_per_token=0.1, within_budget=0.2).contract.gradient
    assert "0.2 of it within the budget" in shared
    words = KLPenalty("exact", "both", "mean", budget_per_token=0.1).contract.gradient
    assert (
        "reverse KL" in words and "divided by the completion's length" in words and "none within the budget" in words
    )
    assert "forward KL" in KLPenalty("exact", "loss", direction="forward").contract.gradient
