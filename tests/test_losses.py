"""Laws of the losses: functions of log-ratios, whatever the model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo import bo2_loss, dpo_loss, ipo_loss
from hypo import kl_loss

pytestmark = pytest.mark.law
logratio = st.floats(-50, 50).map(lambda x: torch.tensor([x], dtype=torch.float64))
betas = st.floats(0.01, 5)
ZERO = torch.zeros(1, dtype=torch.float64)


@given(betas)
def test_at_pi_ref_dpo_is_log_2_and_ipo_is_1_over_4_beta_squared(beta):
    assert dpo_loss(ZERO, ZERO, beta).item() == pytest.approx(math.log(2), abs=1e-15)
    assert ipo_loss(ZERO, ZERO, beta).item() == pytest.approx(1 / (4 * beta**2), rel=1e-12)


@given(logratio, logratio, betas)
def test_swapping_the_pair_swaps_the_label(chosen, rejected, beta):
    # P(chosen wins) + P(rejected wins) = 1 for exp(-loss); -log s(z) + log s(-z) = -z
    wins, loses = (torch.exp(-dpo_loss(*order, beta)).item() for order in ((chosen, rejected), (rejected, chosen)))
    assert wins + loses == pytest.approx(1)
    difference = dpo_loss(chosen, rejected, beta) - dpo_loss(rejected, chosen, beta)
    assert difference.item() == pytest.approx((-beta * (chosen - rejected)).item(), abs=1e-9)


@given(logratio, logratio, st.floats(-50, 50), betas)
def test_a_shift_that_depends_on_the_prompt_alone_changes_nothing(chosen, rejected, shift, beta):
    assert dpo_loss(chosen + shift, rejected + shift, beta).item() == pytest.approx(
        dpo_loss(chosen, rejected, beta).item(), abs=1e-9)
    assert ipo_loss(chosen + shift, rejected + shift, beta).item() == pytest.approx(
        ipo_loss(chosen, rejected, beta).item(), rel=1e-6, abs=1e-9)


@given(logratio, logratio, betas)
def test_dpo_is_reward_mle_of_the_implicit_reward(chosen, rejected, beta):
    reward_chosen, reward_rejected = (beta * chosen).item(), (beta * rejected).item()
    probability = 1 / (1 + math.exp(reward_rejected - reward_chosen)) if reward_rejected - reward_chosen < 700 else 0
    if probability > 1e-12:  # the plain formula, where it does not underflow
        assert dpo_loss(chosen, rejected, beta).item() == pytest.approx(-math.log(probability), abs=1e-9)


@given(logratio, logratio, betas)
def test_dpo_gradient_weight_is_beta_sigmoid_of_minus_beta_margin(chosen, rejected, beta):
    margin = (chosen - rejected).requires_grad_()
    slope, = torch.autograd.grad(dpo_loss(margin, ZERO, beta), margin)
    assert slope.item() == pytest.approx(-beta * torch.sigmoid(-beta * margin).item(), abs=1e-12)


@given(betas, st.floats(-20, 20))
def test_ipo_is_zero_with_zero_slope_only_at_a_margin_of_1_over_2_beta(beta, rejected):
    rejected = torch.tensor([rejected], dtype=torch.float64)
    chosen = (rejected + 1 / (2 * beta)).requires_grad_()
    loss = ipo_loss(chosen, rejected, beta)
    slope, = torch.autograd.grad(loss, chosen)
    assert loss.item() == pytest.approx(0, abs=1e-20) and slope.item() == pytest.approx(0, abs=1e-10)
    # negative control: the target beta/2 that some slides print differs unless beta is 1
    if abs(beta - 1) > 0.01:
        assert ipo_loss(rejected + beta / 2, rejected, beta).item() > 1e-6


@pytest.mark.parametrize("margin", [1e4, -1e4, 1e30, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_margins_stay_finite(margin, dtype):
    for loss_function in (dpo_loss, ipo_loss):
        if loss_function is ipo_loss and abs(margin) > 1e10:
            continue  # a square: it overflows by right
        chosen = torch.tensor([margin], dtype=dtype, requires_grad=True)
        loss = loss_function(chosen, torch.zeros(1, dtype=dtype), 0.1).sum()
        slope, = torch.autograd.grad(loss, chosen)
        assert loss.isfinite() and slope.isfinite()


def test_best_of_2_is_sft_on_the_winner():
    logps = torch.tensor([-3.0, -1.0], requires_grad=True)
    slope, = torch.autograd.grad(bo2_loss(logps).mean(), logps)
    assert slope.tolist() == [-0.5, -0.5]


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=5), st.floats(-30, 30))
def test_leave_one_out_weights_sum_to_zero_and_ignore_a_constant(logratios, constant):
    s = torch.tensor([logratios], dtype=torch.float64)
    logps = torch.zeros_like(s, requires_grad=True)
    weights, = torch.autograd.grad(kl_loss(logps, s).sum(), logps)
    shifted, = torch.autograd.grad(kl_loss(logps, s + constant).sum(), logps)
    k = s.shape[1]
    expected = [(s[0, i] - (s[0].sum() - s[0, i]) / (k - 1)).item() / k for i in range(k)]
    assert weights[0].tolist() == pytest.approx(expected, abs=1e-9), "weight i must be s_i - mean of the others"
    assert weights.sum().item() == pytest.approx(0, abs=1e-9)
    assert torch.allclose(weights, shifted, atol=1e-9)


def test_k_1_is_line_5_of_algorithm_1_word_for_word():
    logps = torch.tensor([[-2.0], [-5.0]], requires_grad=True)
    logratios = torch.tensor([[0.5], [-1.5]], requires_grad=True)
    loss = kl_loss(logps, logratios)
    assert loss.flatten().tolist() == [-2.0 * 0.5, -5.0 * -1.5]
    by_logps, by_logratios = torch.autograd.grad(loss.sum(), (logps, logratios), allow_unused=True)
    assert by_logps.flatten().tolist() == [0.5, -1.5]
    assert by_logratios is None, "sg(): the weight must not carry a gradient"
