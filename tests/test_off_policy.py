"""The contract where a batch serves a second pass (`num_iterations` > 1): sampled by one policy, trained as another.

Every completion of the 2-step, 5-token model is weighted by the probability that the policy gave it when it sampled;
then the policy moves, and the loss of the same batch is taken as training takes it. What it is compared with is
autograd through the definitions, of both policies' full tables. docs/kl.md quotes the numbers that this prints.
"""

import pytest
import torch
from enumeration import FIXED, STEPS, Tables, kl_forward, kl_reverse, move, per_state, reverse_kl
from test_algorithms import float64_head, log_probability, make_grpo  # noqa: F401  (fixtures)
from test_algorithms import gradient as gradient_of_loss
from test_contract import BETA, ROWS, K, enumerated, half_square, likeliest, textbook_k3, trained_gradient  # noqa: F401

from kl_alliteration import KLPenalty, KLPenaltyCallback

FAR = 0.1  # how far the policy moves between the passes; the reference is 0.3 away
UNCLIPPED = {"num_iterations": 2, "epsilon": 1 - 1e-12, "epsilon_high": 1e12}
SAMPLED = {"k1": lambda x: x, "k2": half_square, "k3": textbook_k3, "abs": torch.abs}
pytestmark = pytest.mark.filterwarnings("ignore:the KL penalty")


def estimates(t: Tables, estimator: str) -> torch.Tensor:
    """(25,) what each completion's penalty is by definition, with the policy's gradient."""

    def of(p, q, token):
        if estimator in SAMPLED:
            return SAMPLED[estimator](p[token] - q[token])
        if estimator == "exact":
            return kl_reverse(p, q)
        top = likeliest(p)
        return (p.exp() * (p - q))[top].sum() + (p[token] - q[token]) * (~top[token])

    return torch.stack([of(t.p1, t.q1, a) + of(t.p2[a], t.q2[a], b) for a, b in FIXED])


def probabilities(t: Tables) -> torch.Tensor:
    return torch.stack([log_probability(t, ids) for ids in FIXED]).exp()


def by_definition(now: Tables, then: torch.Tensor, choice) -> torch.Tensor:
    """E[gradient]: what was charged when it was sampled, (25,), and what the loss charges now, by the policy now."""
    estimator, placement = choice
    p = probabilities(now)
    in_reward = (p * then).sum() if placement != "loss" else 0
    in_loss = (p.detach() * estimates(now, estimator)).sum() if placement != "reward" else 0
    return now.gradient(in_reward + in_loss)


def second_pass(trainer, estimator: str, with_ratio: bool = True):
    """(the gradient of the second pass, the policy then: its probabilities and its penalties)."""
    then = Tables(trainer)
    kept = probabilities(then).detach(), estimates(then, estimator).detach()

    def between(batch):
        move(trainer, seed=2, far=FAR)
        if not with_ratio:  # as if the completions were the present policy's own
            batch["old_logps"] = probabilities(Tables(trainer)).detach().log()

    return trained_gradient(trainer, sampled=kept[0], between=between), *kept


def off_by(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def gradient_now(trainer, objective) -> torch.Tensor:
    t = Tables(trainer)
    return t.gradient(objective(t))


@pytest.mark.parametrize("choice", ROWS, ids="-in-".join)
def test_each_row_of_the_second_pass(enumerated, choice):  # noqa: F811
    """In the reward the penalty is the sampling policy's; in the loss it is the present one's, weighted by a ratio."""
    trainer = enumerated(**UNCLIPPED)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty(*choice, top_k=K)))
    found, _, then = second_pass(trainer, choice[0])
    torch.testing.assert_close(found, by_definition(Tables(trainer), then, choice), atol=1e-10, rtol=0)
    on_policy = torch.zeros_like(found) if ROWS[choice] is None else gradient_now(trainer, ROWS[choice])
    same = torch.allclose(found, on_policy, atol=1e-10, rtol=0)
    assert same == (choice[1] == "loss")  # only there the contract's row holds off policy too
    scale = gradient_now(trainer, reverse_kl) if ROWS[choice] is None else on_policy
    off = [((found - on_policy).norm() / scale.norm()).item()]
    for epsilon, with_ratio in ((0.2, True), (1e12, False)):  # as TRL clips, and without the ratio
        move(trainer, seed=2, far=-FAR)  # back to where it sampled
        trainer.epsilon_low, trainer.epsilon_high = min(epsilon, 1.0), epsilon
        found, _, _ = second_pass(trainer, choice[0], with_ratio)
        off.append(((found - on_policy).norm() / scale.norm()).item())
    print(f"\n{choice}: off by {off[0]:.3f}, clipped {off[1]:.3f}, without the ratio {off[2]:.3f}")
    if choice[1] == "loss":
        assert off[0] < 1e-9 < 0.005 < off[2]


def test_k1_in_the_reward_pulls_to_the_reference_less_than_from_the_sampling_policy(enumerated):  # noqa: F811
    """grad E[log(then / reference)] = grad KL(now || reference) - grad KL(now || then)."""
    trainer = enumerated(**UNCLIPPED)
    found, then, _ = second_pass(trainer, "k1")
    now = Tables(trainer)
    p = probabilities(now)
    moved = (p * (p / then).log()).sum()
    print(f"\nKL(now || then): {moved.item():.4f} nats, KL(now || reference): {reverse_kl(now).item():.4f}")
    torch.testing.assert_close(found, now.gradient(reverse_kl(now) - moved), atol=1e-10, rtol=0)
    assert off_by(found, gradient_now(trainer, reverse_kl)) > 0.02


def test_without_the_ratio_a_sampled_estimate_in_the_loss_is_wrong(enumerated):  # noqa: F811
    """And exact is not at the states that are visited: only how often those are is the sampling policy's."""
    trainer = enumerated(**UNCLIPPED)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "loss")))
    found, then, _ = second_pass(trainer, "exact", with_ratio=False)
    now, visits = Tables(trainer), then.view(5, 5).sum(1)
    states = kl_reverse(now.p1, now.q1) + sum(v * kl_reverse(now.p2[a], now.q2[a]) for a, v in enumerate(visits))
    torch.testing.assert_close(found, now.gradient(states), atol=1e-10, rtol=0)


def grpo_s_second_pass(trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Its gradient, times the two tokens that it divides by, and how often the second states were visited."""
    then = Tables(trainer)
    sampled, visits = probabilities(then).detach(), then.p1.detach().exp()
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(FIXED))
    move(trainer, seed=2, far=FAR)
    found = 0
    for i in range(len(FIXED)):
        row = {k: v[i : i + 1] if torch.is_tensor(v) and v.dim() else v for k, v in batch.items()}
        found = found + sampled[i] * gradient_of_loss(trainer, trainer._compute_loss(trainer.model, row))
    return found * STEPS / BETA, visits


@pytest.mark.parametrize("ratio", [True, False])
def test_grpo_s_own_k3(make_grpo, ratio):  # noqa: F811
    """With TRL's ratio, of each token, the reverse KL of each state, visited as the sampling policy visited it.

    Without it the gradient is that of no KL."""
    trainer = make_grpo(use_bias_correction_kl=ratio, **UNCLIPPED)
    found, visits = grpo_s_second_pass(trainer)
    now = Tables(trainer)
    states = kl_reverse(now.p1, now.q1) + sum(v * kl_reverse(now.p2[a], now.q2[a]) for a, v in enumerate(visits))
    assert torch.allclose(found, now.gradient(states), atol=1e-10, rtol=0) == ratio
    for name, divergence in (("reverse", kl_reverse), ("forward", kl_forward)):
        off = off_by(found, gradient_now(trainer, lambda t, f=divergence: per_state(t, f)))
        print(f"\nk3 {'with' if ratio else 'without'} its ratio, from the {name} KL's: {off:.3f}")
        assert off > 0.01


@pytest.mark.parametrize("choice", [("k2", "loss"), ("exact", "loss")], ids="-in-".join)
def test_ours_in_grpo_s_loss_holds_off_policy_too(make_grpo, choice):  # noqa: F811
    trainer = make_grpo(**UNCLIPPED)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty(*choice)))
    found, _ = grpo_s_second_pass(trainer)
    torch.testing.assert_close(found, gradient_now(trainer, ROWS[choice]), atol=1e-10, rtol=0)
