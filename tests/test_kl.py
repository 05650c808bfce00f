import math

import pytest
import torch

from kl_alliteration import kl


def test_estimators_at_log_two_by_hand():
    x = torch.tensor([[math.log(2.0), -math.log(2.0)]], dtype=torch.float64)
    assert kl.k1(x).tolist()[0] == pytest.approx([0.6931471805599453, -0.6931471805599453])
    assert kl.k2(x).tolist()[0] == pytest.approx([0.2402265069591007] * 2)
    # k3 = 1/2 - 1 + ln 2 and 2 - 1 - ln 2
    assert kl.k3(x).tolist()[0] == pytest.approx([0.1931471805599453, 0.3068528194400547])
    assert kl.absolute(x).tolist()[0] == pytest.approx([0.6931471805599453] * 2)


def test_expectations_by_enumeration():
    """E[k1] = E[k3] = KL(p || q) over all outcomes; k2 is biased."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    ratio = (p / q).log()
    exact = torch.distributions.kl_divergence(torch.distributions.Categorical(p), torch.distributions.Categorical(q))
    assert (p * kl.k1(ratio)).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    assert (p * kl.k3(ratio)).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    assert abs((p * kl.k2(ratio)).sum().item() - exact.item()) > 0.05


@pytest.mark.parametrize("name", kl.SAMPLED)
@pytest.mark.parametrize("value", [-100.0, -30.0, 0.0, 30.0, 100.0])
def test_far_from_the_reference_values_and_gradients_stay_finite(name, value):
    x = torch.tensor([value], requires_grad=True)
    estimate = kl.SAMPLED[name](x)
    estimate.sum().backward()
    assert torch.isfinite(estimate).all() and torch.isfinite(x.grad).all()
    if name != "k1" and value:
        assert x.grad.sign().item() == math.copysign(1, value)  # always pushes back towards the reference


def test_k3_is_continuous_where_its_tangent_takes_over():
    x = torch.tensor([-kl.LINEAR_BEYOND + 1e-3, -kl.LINEAR_BEYOND - 1e-3], dtype=torch.float64)
    inside, outside = kl.k3(x)
    assert outside / inside == pytest.approx(math.exp(2e-3), rel=1e-5)


def test_reductions_by_hand():
    per_token = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert kl.reduce_per_sequence(per_token, mask, "sum").tolist() == [3.0, 15.0, 0.0]
    assert kl.reduce_per_sequence(per_token, mask, "mean").tolist() == [1.5, 5.0, 0.0]


def test_a_wrong_reduction_names_field_value_and_choices():
    with pytest.raises(ValueError, match="^reduction must be one of sum, mean, got 'max'"):
        kl.reduce_per_sequence(torch.zeros(1, 1), torch.ones(1, 1), "max")


def test_what_is_over_budget_by_hand():
    length = torch.tensor([2, 3, 0])
    # 0.5 nats a token: 1.0, 1.5 and 0 nats for the sequences
    assert kl.over_budget(torch.tensor([3.0, 1.0, 0.0]), length, "sum", 0.5).tolist() == [2.0, 0.0, 0.0]
    assert kl.over_budget(torch.tensor([0.75, 0.25, 0.0]), length, "mean", 0.5).tolist() == [0.25, 0.0, 0.0]


def test_the_study_s_unit_by_hand():
    """40 on a mean over 99 positions is 40 / 99 on their sum."""
    assert kl.study_beta(40) == pytest.approx(0.40404, abs=1e-5)
    assert kl.study_beta(100, positions=50) == 2.0
    assert kl.to_study_beta(kl.study_beta(5.0)) == pytest.approx(5.0)
    ratios = torch.linspace(-1, 2, 99)
    assert kl.study_beta(40) * ratios.sum() == pytest.approx((40 * ratios.mean()).item())
