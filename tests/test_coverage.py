"""The theory's statements on random instances, their tightness, and controls that must fail."""

import ast
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coverage
from coverage import (
    INF,
    Bandit,
    J,
    Statement,
    V,
    dpo,
    dpo_global,
    eps_dpo,
    eps_reward,
    equality,
    finite_sample,
    finite_sample_error,
    gap,
    global_coverage,
    holds,
    hypo_local,
    implicit_reward,
    inequality,
    ipo,
    kl,
    lemma_4_1,
    local_coverage,
    log_partition,
    mean,
    nearest_to_ref,
    one_prompt,
    optimal_policy,
    pairwise_error,
    pointwise_error,
    policy_coverage,
    preference_loss,
    proposition_4_1,
    slides_construction,
    t0a_gap_is_kl,
    t0b_gap_is_variance,
    t1_chain,
    t3a_kl_of_tilt,
    t3c_ratio_of_tilt,
    t6_hypo_kl,
    t6_hypo_loss,
    t7_fast_rate,
    t8_value,
    t9_approximate,
    t9_kl,
    t10_log_loss,
    t11_linear,
    theorem_4_2,
    tilt,
    with_unseen_mass,
)
from experiments.coverage_pictures import (
    gradient_path,
    hypo_loss,
    linear_example,
    minimize,
    proof_bandit,
    tabular_limit,
    train_hypo,
    train_log_linear,
    train_offline,
    train_rlhf,
)

pytestmark = pytest.mark.law

few = settings(max_examples=max(10, settings().max_examples // 20))  # where an example trains a policy


def table(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(a, b, tolerance=1e-12) -> bool:
    return torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64),
                          tolerance, tolerance)


# ---------------------------------------------------------------------------------------------------
# random instances

class Case(NamedTuple):
    b: Bandit
    r_hat: torch.Tensor  # (X, Y)
    pi: torch.Tensor  # (X, Y) log-probabilities


@st.composite
def policies(draw, n_x, n_y, zeros=True):
    """A table of log-probabilities, down to e^-12 or to 0; each row has a positive entry."""
    weight = st.floats(-12, 0) | st.just(-INF) if zeros else st.floats(-12, 0)
    rows = [draw(st.lists(weight, min_size=n_y, max_size=n_y)) for _ in range(n_x)]
    for row in rows:
        if max(row) == -INF:
            row[draw(st.integers(0, n_y - 1))] = 0.0
    return table(rows).log_softmax(-1)


@st.composite
def rewards(draw, n_x, n_y, low, high):
    return table([draw(st.lists(st.floats(low, high), min_size=n_y, max_size=n_y)) for _ in range(n_x)])


@st.composite
def cases(draw, zeros=True, prompts=3):
    """A bandit with mu = pi_ref or another, r* in [0, R], r_hat of four kinds, and any policy."""
    n_x, n_y = draw(st.integers(1, prompts)), draw(st.integers(2, 5))
    rho = draw(policies(1, n_x, zeros))[0].exp()
    ref = draw(policies(n_x, n_y, zeros))
    mu = ref if draw(st.booleans()) else draw(policies(n_x, n_y, zeros))
    size, bound = 10 ** draw(st.floats(-1, 1)), 10 ** draw(st.floats(-1, 1))
    reward = draw(rewards(n_x, n_y, 0, size))
    kind = draw(st.sampled_from(["any", "noisy", "one entry", "extreme"]))
    noise = draw(rewards(n_x, n_y, -bound, bound))
    if kind == "one entry":
        r_hat = reward.clone()
        r_hat[draw(st.integers(0, n_x - 1)), draw(st.integers(0, n_y - 1))] = bound * draw(st.sampled_from([-1, 1]))
    else:
        r_hat = {"any": noise, "noisy": reward + 0.1 * noise, "extreme": bound * noise.sign()}[kind]
    beta = 10 ** draw(st.floats(-1.3, 1))
    return Case(Bandit(rho, ref, mu, reward, beta), r_hat, draw(policies(n_x, n_y, zeros)))


def t1(b, r_hat) -> dict:
    """The sides of t1_chain by name."""
    names = ("gap", "t1a", "t1b", "t1c", "sqrt(C eps)", "t1d", "C sqrt(eps)")
    return dict(zip(names, t1_chain(b, r_hat), strict=True))


def check(statement, *args):
    sides = statement(*args)
    assert not any(side.isnan().any() for side in sides), f"{statement.text}: {sides}"
    assert holds(statement, sides), f"{statement.text}\nis violated: {sides}"


OF_REWARD = [t1_chain, t3a_kl_of_tilt, lemma_4_1, t3c_ratio_of_tilt, theorem_4_2, t7_fast_rate, t10_log_loss]
OF_POLICY = [t0a_gap_is_kl, proposition_4_1, dpo_global, hypo_local]
OF_BOTH = [t8_value, t9_approximate, t9_kl]


@pytest.mark.parametrize("statement", OF_REWARD, ids=lambda s: s.sides.__name__)
@given(case=cases())
def test_statements_about_a_reward(statement, case):
    check(statement, case.b, case.r_hat)


@pytest.mark.parametrize("statement", OF_POLICY, ids=lambda s: s.sides.__name__)
@given(case=cases())
def test_statements_about_a_policy(statement, case):
    check(statement, case.b, case.pi)


@pytest.mark.parametrize("statement", OF_BOTH, ids=lambda s: s.sides.__name__)
@given(case=cases())
def test_statements_about_both(statement, case):
    check(statement, case.b, case.r_hat, case.pi)


@given(case=cases())
def test_statements_near_the_optimum(case):
    """A policy within a little of pi*, where the bounds of T2, T5 and T9 are not large for free."""
    near = torch.where(case.b.ref == -INF, case.b.ref, optimal_policy(case.b) + 0.1 * case.r_hat).log_softmax(-1)
    for statement in OF_POLICY:
        check(statement, case.b, near)
    for statement in OF_BOTH:
        check(statement, case.b, case.r_hat, near)


@few
@given(case=cases(zeros=False, prompts=2), lam=st.floats(0.01, 1), data=st.data())
def test_t6_hypo_with_a_penalty(case, lam, data):
    mu = data.draw(policies(*case.b.ref.shape))  # may miss responses
    b = case.b._replace(mu=mu, beta=max(case.b.beta, 0.2))
    pi_lam = train_hypo(b, lam, b.ref)
    for statement, args in ((t6_hypo_kl, ()), (t6_hypo_loss, (lam,))):
        sides = statement(b, pi_lam, *args)
        assert holds(statement, sides, 1e-6), (statement.text, sides)


@given(case=cases(), data=st.data(), dimension=st.integers(1, 3))
def test_t11_linear(case, data, dimension):
    n_x, n_y = case.b.ref.shape
    phi = torch.stack([data.draw(rewards(n_x, n_y, -1, 1)) for _ in range(dimension)], -1)
    theta_star, theta = data.draw(rewards(2, dimension, -5, 5))
    check(t11_linear, case.b, phi, theta_star, theta)


@given(q=st.floats(0.05, 0.5), margins=st.lists(st.floats(-4, 4), min_size=2, max_size=6), n=st.integers(1, 150),
       delta=st.floats(0.001, 0.999))
def test_finite_sample_bound_by_exact_enumeration(q, margins, n, delta):
    check(finite_sample, q, margins, n, delta)


# ---------------------------------------------------------------------------------------------------
# identities, to near machine precision

def scale(case) -> float:
    return 1 + case.b.reward.abs().max().item() + case.r_hat.abs().max().item() + 12 * case.b.beta


@given(case=cases())
def test_t0a_to_machine_precision(case):
    lhs, rhs = t0a_gap_is_kl(case.b, case.pi)
    assert lhs == rhs == INF or abs(lhs - rhs) < 1e-14 * scale(case)


@given(case=cases())
def test_t0b_to_machine_precision(case):
    b = case.b._replace(beta=max(case.b.beta, scale(case) / 40))
    lhs, rhs = t0b_gap_is_variance(b, case.r_hat)
    assert abs(lhs - rhs) < 1e-13 * scale(case)


@given(case=cases())
def test_t1a_slack_is_a_kl(case):
    """So T1a cannot be loosened by mistake: its slack is known exactly."""
    b, pi_hat = case.b, tilt(case.b.ref, case.r_hat, case.b.beta)
    lhs, rhs = t1_chain(b, case.r_hat)[:2]
    assert abs(rhs - lhs - b.beta * kl(b.rho, optimal_policy(b), pi_hat)) < 1e-13 * scale(case)


@given(case=cases())
def test_pairwise_error_is_twice_the_pointwise_and_sees_no_constant(case):
    b = case.b
    eps = eps_reward(b, case.r_hat)
    assert close(eps, pairwise_error(b.rho, b.mu, b.reward, case.r_hat), 0)
    assert close(eps, 2 * pointwise_error(b.rho, b.mu, b.reward, case.r_hat), 1e-11)
    assert close(eps, eps_reward(b, case.r_hat + 7.0), 1e-11)
    zero = torch.zeros_like(b.rho)  # with c = 0: Assumption 4.3 as Theorem 4.2 on the slides prints it
    printed = pointwise_error(b.rho, b.mu, b.reward, case.r_hat, zero)
    assert close(printed, mean(b.rho, b.mu, (b.reward - case.r_hat).square()), 1e-11)
    assert eps / 2 <= printed + 1e-11 * scale(case) ** 2


@given(case=cases())
def test_optimal_policy_and_implicit_reward(case):
    b = case.b
    assert close(J(b, optimal_policy(b)), b.beta * (b.rho @ log_partition(b.ref, b.reward, b.beta)), 1e-11)
    assert close(optimal_policy(b).exp(), tilt(b.ref, b.reward + 3.0, b.beta).exp(), 1e-11)
    pi = tilt(b.ref, case.r_hat, b.beta)  # any policy that pi_ref covers is the tilt of its implicit reward
    assert close(tilt(b.ref, implicit_reward(pi, b.ref, b.beta), b.beta).exp(), pi.exp(), 1e-11)
    assert gap(b, case.pi) >= -1e-12 * scale(case)


def test_extreme_beta():
    b = one_prompt((1.0, 0.5, 0.0), (0.2, 0.3, 0.5))
    assert close(J(b._replace(beta=1e6), optimal_policy(b._replace(beta=1e6))), V(b, b.ref), 1e-5)
    assert close(J(b._replace(beta=1e-4), optimal_policy(b._replace(beta=1e-4))), 1.0, 1e-3)


def test_infinities():
    b = one_prompt((1.0, 0.0, 0.0), (0.5, 0.5, 0.0))
    astray = table([[0.5, 0.4, 0.1]]).log()
    assert kl(b.rho, astray, b.ref) == INF and J(b, astray) == -INF and V(b, astray) == 0.5
    assert global_coverage(b.rho, b.mu) == policy_coverage(b.rho, astray, b.mu) == INF
    assert policy_coverage(b.rho, b.ref, b.mu) == 1, "0/0 is 0"


# ---------------------------------------------------------------------------------------------------
# local coverage: never exceeded, and attained

@given(case=cases())
def test_no_policy_in_the_ball_exceeds_local_coverage(case):
    b = case.b
    pi = torch.where(b.ref == -INF, b.ref, case.pi.clamp(min=-30)).log_softmax(-1)
    c = local_coverage(b.rho, b.ref, kl(b.rho, pi, b.ref))
    assert policy_coverage(b.rho, pi, b.ref) <= c * (1 + 1e-6)


def coin_kl(a: float, p: float) -> float:
    """KL between coins of probability a and p."""
    return sum(u * math.log(u / v) for u, v in ((a, p), (1 - a, 1 - p)) if u > 0)


@given(case=cases(), eps_kl=st.floats(1e-4, 20))
def test_local_coverage_is_attained_by_a_policy_in_the_ball(case, eps_kl):
    b, best = case.b, 0.0
    for x, y in itertools.product(*map(range, b.ref.shape)):
        p, rho = b.ref[x, y].exp().item(), b.rho[x].item()
        if rho == 0 or p == 0:
            continue
        low, high = min(p, 1.0), 1.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if p >= 1 or coin_kl(middle, p) * rho <= eps_kl else (low, middle)
        pi = b.ref.clone()  # a on y, the rest as pi_ref has it
        pi[x] = -INF if p >= 1 else b.ref[x] + math.log1p(-low) - math.log1p(-p) if low < 1 else -INF
        pi[x, y] = math.log(low)
        assert kl(b.rho, pi, b.ref) <= eps_kl * (1 + 1e-9) + 1e-12
        best = max(best, policy_coverage(b.rho, pi, b.ref).item())
    assert close(local_coverage(b.rho, b.ref, eps_kl), best, 1e-6)


@given(case=cases())
def test_local_coverage_grows_from_1_to_the_global_one(case):
    b = case.b

    def at(eps_kl):
        return local_coverage(b.rho, b.ref, eps_kl)

    assert close(at(0.0), 1, 1e-15) and at(INF) == global_coverage(b.rho, b.ref)
    radii = [0.0, 1e-3, 0.1, 1.0, 30 / b.rho[b.rho > 0].min().item()]
    values = [at(eps_kl).item() for eps_kl in radii]
    assert values == sorted(values)
    covered = (-b.ref[b.rho > 0]).exp()
    assert close(values[-1], covered[covered < INF].max(), 1e-9), "a ball this large holds every covered policy"


@pytest.mark.parametrize("eps_kl", [1e-24, 1e-20, 1e-16, 1e-12, 1e-8])
def test_local_coverage_of_tiny_balls(eps_kl):
    """To second order the KL of a coin moved from p to p (1 + d) is d^2 p / (2 (1 - p)); the rarest p goes furthest."""
    b = one_prompt((0.0, 0.0, 0.0), (0.3, 0.3, 0.4))
    further = local_coverage(b.rho, b.ref, eps_kl).item() - 1
    assert further == pytest.approx((2 * eps_kl * 0.7 / 0.3) ** 0.5, rel=1e-3, abs=0)


# ---------------------------------------------------------------------------------------------------
# tightness: a bound loosened by mistake fails here

def tightness(statement, *args, side=1) -> float:
    sides = statement(*args)
    return (sides[0] / sides[side]).max().item()


def test_cauchy_schwarz_is_an_equality_for_two_responses():
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        ref, mu, reward, r_hat = torch.randn(4, 1, 2, generator=draw, dtype=torch.float64)
        b = Bandit(torch.ones(1).double(), ref.log_softmax(-1), mu.log_softmax(-1), reward, 0.7)
        found = t1(b, r_hat)
        assert (found["t1a"] / found["t1b"]).item() == pytest.approx(1, abs=1e-10)


def test_one_dimensional_linear_rewards_make_t11_the_slack_of_t1a():
    b = one_prompt((0.0, 0.0, 0.0), (0.2, 0.3, 0.5), mu=(0.4, 0.3, 0.3))
    phi, star, theta = table([[[0.3], [-1.0], [0.7]]]), table([2.0]), table([-1.0])
    a = t1(b._replace(reward=phi @ star), phi @ theta)["t1a"]
    assert t11_linear(b, phi, star, theta)[1].item() == pytest.approx(a.item(), rel=1e-12)
    assert t11_linear(b._replace(mu=table([[1.0, 0.0, 0.0]]).log()), phi, star, theta)[1] == INF, "no pair shows phi"


def test_the_coverage_bounds_are_nearly_attained():
    """r* = (10000, 0), pi_hat = (1/1000, 999/1000): the gap is nearly sqrt(C eps), and C = 2."""
    b = one_prompt((1e4, 0.0), (0.5, 0.5), mu=(0.5, 0.5))
    r_hat = table([[-math.log(999), 0.0]])
    pi_hat = tilt(b.ref, r_hat, b.beta)
    assert tightness(t1_chain, b, r_hat) > 0.99
    for statement, args in ((theorem_4_2, (r_hat,)), (dpo_global, (pi_hat,)), (hypo_local, (pi_hat,)),
                            (t8_value, (r_hat, optimal_policy(b))), (t9_approximate, (r_hat, pi_hat))):
        assert 0.99 < tightness(statement, b, *args) <= 1, statement.text
    found = t1(b, r_hat)
    assert 0.99 < found["t1b"] / found["sqrt(C eps)"] <= found["t1b"] / found["t1c"] <= 1
    assert (found["sqrt(C eps)"] / found["C sqrt(eps)"]).item() == pytest.approx(2 ** -0.5, rel=0.01)
    for statement, args in ((theorem_4_2, (r_hat,)), (dpo_global, (pi_hat,)), (hypo_local, (pi_hat,))):
        assert tightness(statement, b, *args, side=2) == pytest.approx(2 ** -0.5, rel=0.01), statement.text
    c_star, c_hat, eps = 2.0, 2 * 0.999, (1e4 + math.log(999)) ** 2 / 2
    assert close(found["t1d"], math.sqrt(c_star * c_hat * eps), 1e-9)


def test_coverage_is_by_the_pairs():
    """Where mu misses a response there is no bound, whatever pi_ref covers; and C has 1 / mu, not 1 / pi_ref."""
    b, r_hat = one_prompt((1.0, 0.0, 0.0), (0.5, 0.3, 0.2)), table([[0.0, 1.0, 0.0]])
    for mu, c in (((0.5, 0.5, 0.0), INF), ((0.45, 0.45, 0.1), 10.0)):
        b = b._replace(mu=table([mu]).log(), beta=0.1)
        pi_hat = tilt(b.ref, r_hat, b.beta)  # radius 20 nats: the ball holds every policy
        for statement, arg in ((dpo_global, pi_hat), (theorem_4_2, r_hat)):
            eps = pairwise_error(b.rho, b.mu, b.reward, r_hat)
            assert close(statement(b, arg)[1], (c * eps) ** 0.5, 1e-9), statement.text
            assert close(statement(b, arg)[2], c * eps ** 0.5, 1e-9), statement.text
        radius = torch.maximum(kl(b.rho, pi_hat, b.ref), kl(b.rho, optimal_policy(b), b.ref))
        local = local_coverage(b.rho, b.ref, radius, b.mu)
        assert close(hypo_local(b, pi_hat)[1], (local * eps) ** 0.5, 1e-9) and (local == INF) == (c == INF)


@pytest.mark.parametrize("size", [0.2, 3.0])
def test_radii_of_the_balls(size):
    """max(2R', R) / beta in T4, with e in T9; the larger of KL(pi) and KL(pi*) in T5: either may be the larger."""
    b = one_prompt((1.0, 0.0, 0.3), (0.5, 0.3, 0.2), mu=(0.5, 0.3, 0.2), beta=10.0)
    r_hat = size * table([[0.0, 1.0, -0.5]])
    pi = tilt(b.ref, 1.1 * r_hat, b.beta)

    def bound(r, radius):
        return (local_coverage(b.rho, b.ref, radius) * error_of(b, r)).sqrt()

    assert close(theorem_4_2(b, r_hat)[1], bound(r_hat, max(2 * size, 1) / 10))
    e = J(b._replace(reward=r_hat), tilt(b.ref, r_hat, b.beta)) - J(b._replace(reward=r_hat), pi)
    assert close(t9_approximate(b, r_hat, pi)[2], bound(r_hat, max(2 * size + e.item(), 1) / 10) + e, 1e-9)
    radius = max(kl(b.rho, pi, b.ref).item(), kl(b.rho, optimal_policy(b), b.ref).item())
    assert close(hypo_local(b, pi)[1], bound(implicit_reward(pi, b.ref, b.beta), radius), 1e-9)


def test_l1_in_t1c():
    b, r_hat = one_prompt((1.0, 0.2, 0.0), (0.2, 0.3, 0.5), mu=(0.2, 0.3, 0.5)), table([[0.0, 0.5, 0.1]])
    pi_star, pi_hat = optimal_policy(b).exp(), tilt(b.ref, r_hat, b.beta).exp()
    c, l1 = max((pi_star / b.mu.exp()).max(), (pi_hat / b.mu.exp()).max()), (pi_star - pi_hat).abs().sum()
    assert close(t1(b, r_hat)["t1c"], (c * l1 * pairwise_error(b.rho, b.mu, b.reward, r_hat) / 2).sqrt())


def test_lemma_4_1_is_tight():
    rare = one_prompt((0.0, 0.0), (1e-300, 1.0), mu=(0.5, 0.5))
    r_hat = table([[350.0, -350.0]])
    assert tightness(t3a_kl_of_tilt, rare, r_hat) > 0.98, "S / beta"
    assert tightness(lemma_4_1, rare, r_hat, side=2) > 0.98, "2R' / beta"
    assert tightness(t3c_ratio_of_tilt, rare, table([[5.0, -5.0]])) > 0.9999
    even, small = one_prompt((0.0, 0.0), (0.5, 0.5), mu=(0.5, 0.5)), table([[1e-3, -1e-3]])
    assert tightness(t3a_kl_of_tilt, even, small) > 0.9999, "S^2 / (8 beta^2)"
    assert tightness(lemma_4_1, even, small) > 0.9999, "R'^2 / (2 beta^2)"
    for beta in (0.1, 3.0):  # and beta is where it should be
        assert tightness(t3a_kl_of_tilt, even._replace(beta=beta), beta * small) > 0.9999
        assert tightness(lemma_4_1, rare._replace(beta=beta), beta * r_hat, side=2) > 0.98


def test_fast_rate_is_tight_for_small_errors():
    b = one_prompt((1e-3, 0.0, -1e-3), (0.2, 0.3, 0.5), mu=(0.2, 0.3, 0.5), beta=2.0)
    assert tightness(t7_fast_rate, b, table([[0.0, 1e-3, 0.0]])) > 0.999


def test_fast_rate_covers_the_policies_between():
    """A response that neither pi* nor pi_hat favours, but the policies between them do: C_int is the larger."""
    b = one_prompt((2.0, 0.9, -1.0), (1 / 3,) * 3, mu=(1 / 3,) * 3, beta=0.2)
    r_hat = table([[-1.0, 0.9, 2.0]])
    eps = pairwise_error(b.rho, b.mu, b.reward, r_hat)
    ends = torch.maximum(policy_coverage(b.rho, optimal_policy(b), b.mu),
                         policy_coverage(b.rho, tilt(b.ref, r_hat, b.beta), b.mu))
    b, r_hat = b._replace(mu=table([[0.45, 0.1, 0.45]]).log()), r_hat
    on_grid = max(policy_coverage(b.rho, tilt(b.ref, b.reward + t * (r_hat - b.reward), b.beta), b.mu)
                  for t in torch.linspace(0, 1, 1001, dtype=torch.float64))
    eps = pairwise_error(b.rho, b.mu, b.reward, r_hat)
    c_int = t7_fast_rate(b, r_hat)[1] * 4 * b.beta / eps
    assert c_int > 1.5 * ends and c_int.item() == pytest.approx(on_grid.item(), rel=1e-4)


@given(case=cases(zeros=False))
def test_t8_and_t9_are_equalities_where_the_reward_is_right(case):
    b = case.b
    lhs, rhs = t8_value(b, b.reward, case.pi)
    assert abs(rhs - lhs - b.beta * kl(b.rho, case.pi, optimal_policy(b))) < 1e-12 * scale(case)
    lhs, rhs, _ = t9_approximate(b, b.reward, case.pi)
    assert abs(rhs - lhs) < 1e-12 * scale(case)
    lhs, rhs = t9_kl(b, torch.zeros_like(b.reward), case.pi)
    assert abs(rhs - lhs) < 1e-11 * scale(case)


def test_log_loss_bound_is_tight_for_small_margins():
    b = one_prompt((1e-2, 0.0, -1e-2), (0.2, 0.3, 0.5), mu=(0.2, 0.3, 0.5), beta=3.0)
    assert tightness(t10_log_loss, b, table([[0.0, 1e-2, 0.0]])) > 0.999


def test_hypo_bounds_are_tight_as_lam_vanishes():
    b = one_prompt((1.0, 0.0, 0.4), (0.2, 0.3, 0.5), mu=(0.3, 0.3, 0.4))
    assert tightness(t6_hypo_kl, b, train_hypo(b, 1e-3, b.ref)) > 0.95
    assert tightness(t6_hypo_loss, b, train_hypo(b, 1e-3, b.ref), 1e-3) == pytest.approx(0.5, abs=0.02), "half, exactly"
    small = b._replace(reward=table([[1e-3, 0.0, 0.0]]), ref=table([[0.5, 0.25, 0.25]]).log())
    sides = t6_hypo_kl(small, small.ref)
    assert (sides[1] / sides[2]).item() == pytest.approx(1, rel=1e-3), "R^2 / (8 beta^2)"
    excess, cost, bound = t6_hypo_loss(b, b.ref, 0.3)
    assert close(bound, 0.3 * 1.0 / b.beta) and close(cost, 0.3 * kl(b.rho, optimal_policy(b), b.ref))
    assert t6_hypo_kl(b._replace(reward=b.reward * 100), b.ref)[2] == 100, "R / beta"


def test_finite_sample_error_in_numbers():
    """2 log(N / delta) / (n kappa^2) with kappa = sigmoid(M) sigmoid(-M), by hand."""
    kappa = 1 / (1 + math.exp(-2.0)) * (1 / (1 + math.exp(2.0)))
    assert finite_sample_error(50, 4, 0.1, 2.0) == pytest.approx(2 * math.log(40) / (50 * kappa ** 2), rel=1e-12)


def test_finite_sample_failures_are_counted(monkeypatch):
    """With one pair, y1 wins with probability 1/2 sigmoid(1) and then another candidate is likelier than the true."""
    monkeypatch.setattr(coverage, "finite_sample_error", lambda *_: 1e-9)
    wins = 0.5 / (1 + math.exp(-1.0))
    assert finite_sample(0.5, [1.0, 3.0], 1, 0.5)[0].item() == pytest.approx(
        wins + 0.5, rel=1e-12), "and a pair of equal responses leaves a tie, which counts as a failure"
    monkeypatch.setattr(coverage, "finite_sample_error", lambda *_: -1.0)
    assert close(finite_sample(0.3, [1.0, 3.0], 150, 0.5)[0], 1.0, 1e-10), "the probabilities must sum to 1"


# ---------------------------------------------------------------------------------------------------
# Proposition 4.1: the slides' own policy beside ours

@pytest.mark.parametrize("d", [0.0, 1e-8, 0.1])
@pytest.mark.parametrize("eps", [1e-4, 0.01, 2.0])
def test_the_slides_construction_satisfies_assumption_4_3_with_its_eps_exactly(eps, d):
    b = proof_bandit(d)._replace(beta=0.7)
    pi, m = slides_construction(b, eps), 1 - math.exp(-math.sqrt(eps) / 0.7)
    assert close(pi.exp().sum(), 1) and close(pi.exp()[0, 2], m)
    assert close(pi.exp(), with_unseen_mass(b, optimal_policy(b), m).exp()), "a member of our family"
    two = one_prompt((1.0, 0.3, 0.0, 0.0), (0.3, 0.3, 0.3, 0.1), mu=(0.5, 0.5, 0.0, 0.0))
    assert close(slides_construction(two, eps).exp()[0, 2:], [(1 - math.exp(-math.sqrt(eps))) / 2] * 2), "m is shared"
    # the slides' formula, where Z* = sum over y1, y2 of pi_ref exp(r* / beta) need not be 1
    log_z = b.beta * (b.ref[:, :2].exp() * (b.reward[:, :2] / b.beta).exp()).sum(-1).log()
    implicit = implicit_reward(pi, b.ref, b.beta)
    assert close(pointwise_error(b.rho, b.mu, b.reward, implicit, log_z), eps, 1e-10)
    assert close((b.reward - implicit - log_z)[0, :2], [math.sqrt(eps)] * 2, 1e-10), "on y1 and on y2 alike"
    assert close(eps_dpo(b, pi), 0), "no preference shows the constant"


def test_j_of_the_slides_construction_falls_without_bound():
    values = [J(proof_bandit(d), slides_construction(proof_bandit(d), 0.01)).item()
              for d in (1e-2, 1e-4, 1e-8, 1e-16, 1e-300)]
    assert values == sorted(values, reverse=True)
    m = 1 - math.exp(-0.1)
    assert values[-1] - values[-2] == pytest.approx(m * math.log(1e-300 / 1e-16), rel=1e-6), "beta m log pi_ref(y3)"
    b = proof_bandit(0.0)
    assert J(b, slides_construction(b, 1e-12)) == -INF and V(b, slides_construction(b, 0.01)) > 0


@given(case=cases(zeros=False), m=st.floats(0.001, 0.999))
def test_no_offline_loss_sees_m(case, m):
    n_x, n_y = case.b.ref.shape
    b = case.b._replace(mu=case.b.mu.masked_fill(torch.arange(n_y) == n_y - 1, -INF).log_softmax(-1), beta=1.0)
    pi_m = with_unseen_mass(b, case.pi, m)
    assert close(pi_m.exp().sum(-1), torch.ones(n_x))
    for loss in (dpo, ipo):
        assert close(preference_loss(b, pi_m - b.ref, loss), preference_loss(b, case.pi - b.ref, loss), 1e-10)
    check(proposition_4_1, b, pi_m)


def test_the_bound_of_proposition_4_1_is_tight():
    """Equal rewards, m = 1/2 and a rare y3: all is lost that the bound says."""
    b = one_prompt((1.0, 1.0, 1.0), (0.5, 0.5, 1e-12))
    lhs, rhs = proposition_4_1(b, with_unseen_mass(b, b.ref, 0.5))
    assert abs(rhs - lhs) < 1e-10 and rhs < -12
    assert proposition_4_1(proof_bandit(0.0), table([[0.5, 0.4, 0.1]]).log())[1] == -INF


# ---------------------------------------------------------------------------------------------------
# sizes at which rounding once broke a statement

def ascending(sides) -> bool:
    """Up to the last digits: two responses make T1a and T1b equal."""
    return all(a <= c * (1 + 1e-14) for a, c in zip(sides, sides[1:]))


@st.composite
def extreme_cases(draw):
    """Probabilities that are 0 or round to it, margins from 1e-12 to 1e4, and any of both in one table."""
    log_p, reward = st.sampled_from([-INF, 0.0, -1.0, -36.0, -345.0, -690.0, -740.0, -800.0]), st.sampled_from(
        [0.0, 1.0, -1.0, 1e-12, 1e-8, 38.0, 380.0, 710.0, -1e3, 1e4])
    n_x, n_y = draw(st.integers(1, 2)), draw(st.integers(2, 3))

    def log_probs(n, size):
        rows = [draw(st.lists(log_p, min_size=size, max_size=size)) for _ in range(n)]
        return table([row if max(row) > -INF else [0.0] * size for row in rows]).log_softmax(-1)

    r_star, r_hat = table([[draw(st.lists(reward, min_size=n_y, max_size=n_y)) for _ in range(n_x)] for _ in range(2)])
    r_hat = draw(st.sampled_from([r_hat, r_star + 1e-8 * r_hat, r_star]))
    rho, ref, mu, pi = (log_probs(n, size) for n, size in ((1, n_x), (n_x, n_y), (n_x, n_y), (n_x, n_y)))
    return Case(Bandit(rho[0].exp(), ref, mu, r_star, draw(st.sampled_from([0.1, 0.5, 1.0, 1e3]))), r_hat, pi)


def check_all(case):
    """Every true statement, of the case's reward estimate, of its policy, and of both."""
    for statement in OF_REWARD:
        check(statement, case.b, case.r_hat)
    for statement in OF_POLICY:
        check(statement, case.b, case.pi)
    for statement in OF_BOTH:
        check(statement, case.b, case.r_hat, case.pi)


@given(case=extreme_cases())
def test_statements_at_extremes(case):
    check_all(case)
    assert not preference_loss(case.b, implicit_reward(case.pi, case.b.ref, 1.0), dpo).isnan()


def test_a_probability_that_rounds_to_zero_is_not_zero():
    b = one_prompt((1.0, 0.0, 0.0), (0.5, 0.5, 0.0))
    hardly = table([[0.0, -1.0, -800.0]]).log_softmax(-1)  # e^-800 is 0 in float64
    assert kl(b.rho, hardly, b.ref) == INF and J(b, hardly) == -INF
    rare = b._replace(ref=hardly)
    j, bound = proposition_4_1(rare, with_unseen_mass(rare, optimal_policy(rare), 0.5))
    assert j <= bound and bound.item() == pytest.approx(1 + math.log(2) - 0.5 * 800.3, abs=0.1)
    skewed = b._replace(ref=table([[0.0, -99.0, -799.0]]), mu=table([[-98.0, -798.0, 0.0]]), beta=10.0)
    found = t1(skewed, table([[5.0, 2.0, 3.0]]))
    assert 0 < found["t1b"] <= found["t1c"] < INF


@pytest.mark.parametrize("size", [1.0, 40.0, 800.0])
def test_a_policy_that_never_says_a_winner_has_an_infinite_loss(size):
    b = one_prompt((size, 0.0, 0.0), (0.4, 0.4, 0.2))
    pi = table([[0.0, 0.5, 0.5]]).log()
    assert preference_loss(b, pi - b.ref, dpo) == eps_dpo(b, pi) == INF


def test_a_reward_that_is_no_number_has_no_error():
    b = one_prompt((1.0, 0.0, 0.0), (0.4, 0.4, 0.2))
    assert eps_reward(b, table([[math.nan, 0.0, 0.0]])).isnan() and eps_reward(b, table([[1.0, 0.0, math.nan]])) == 0


@pytest.mark.parametrize("size", [38, 39, 40, 60, 100, 200, 340])
def test_t10_at_large_margins(size):
    b = one_prompt((float(size), 0.0, 0.0), (0.3, 0.3, 0.4), mu=(0.3, 0.3, 0.4))
    for r1 in (size - 1.0, size + 1.0, size / 2):
        eps, bound = t10_log_loss(b, table([[r1, 0.0, 0.0]]))
        assert eps <= bound < INF, "below 340 the bound is still a number"


@pytest.mark.parametrize("size", [380.0, 800.0])
def test_t10_where_kappa_underflows(size):
    b = one_prompt((size, 0.0, 0.0), (0.3, 0.3, 0.4), mu=(0.3, 0.3, 0.4))
    for r_hat in (b.reward, b.reward - 1, b.reward / 2, -b.reward, 0 * b.reward, table([[size + 1, 0.0, 0.0]])):
        eps, bound = t10_log_loss(b, r_hat)
        assert eps <= bound == INF


@pytest.mark.parametrize("step", [1e-12, 1e-8, 1e-4])
@pytest.mark.parametrize("size", [0.0, 1.0, 5.0, 30.0])
def test_t10_at_tiny_errors(size, step):
    b = one_prompt((size, 0.0, 0.0), (0.3, 0.3, 0.4), mu=(0.3, 0.3, 0.4))
    for sign in (-1, 1):
        eps, bound = t10_log_loss(b, b.reward + table([[sign * step, 0.0, 0.0]]))
        assert 0 < eps <= bound * (1 + 1e-3 * (size == 0)), "at size 0 both are equal up to step"
    assert close(t10_log_loss(b, b.reward), (0, 0), 0)


@given(u_star=st.floats(-30, 30), u=st.floats(-30, 30))
def test_label_kl_is_the_kl_of_two_coins(u_star, u):
    p, q = 1 / (1 + math.exp(-u_star)), 1 / (1 + math.exp(-u))
    one_less = 1 / (1 + math.exp(u_star)), 1 / (1 + math.exp(u))
    by_hand = p * math.log(p / q) + one_less[0] * math.log(one_less[0] / one_less[1])
    assert coverage.label_kl(table(u_star), table(u)).item() == pytest.approx(by_hand, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("rare", [1e-150, 1e-200, 1e-300])
def test_t1_with_coverages_whose_product_overflows(rare):
    """On y2, which mu hardly has, pi* and pi_hat have mass: both C are about 1 / rare."""
    for mu, ref in (((1.0, rare, 0.0), (0.5, 0.5, 0.0)), ((1 - rare, rare, 0.0), (0.4, 0.6, 0.0))):
        b = one_prompt((1.0, 0.2, 0.0), ref, mu=mu)
        for r_hat in (table([[0.3, 0.9, 0.0]]), table([[0.0, 1e8, 0.0]])):
            sides = t1_chain(b, r_hat)
            assert ascending(sides) and sides[5] < INF, sides
            assert ascending(dpo_global(b, tilt(b.ref, r_hat, b.beta))) and ascending(theorem_4_2(b, r_hat))


def test_t1_where_coverage_times_error_overflows():
    """A rare y3 makes C 4e299, and a large error between y1 and y2 makes C eps more than 1e308."""
    b = one_prompt((0.0, 0.0, 1.0), (0.3, 0.3, 0.4), mu=(0.5, 0.5, 1e-300))
    r_hat = table([[0.0, 1e6, 1.0]])
    sides = t1_chain(b, r_hat)
    assert eps_reward(b, r_hat) * sides[6] == INF and ascending(sides) and sides[5] < INF, sides
    assert ascending(theorem_4_2(b, r_hat)) and theorem_4_2(b, r_hat)[1] < INF


@pytest.mark.parametrize("margin", [400.0, 700.0, 710.0, 1e6])
def test_finite_samples_at_huge_margins(margin):
    assert finite_sample_error(50, 4, 0.1, margin) == INF, "such labels say nothing"
    p, delta = finite_sample(0.5, (margin, 0.0), 20, 0.1)
    assert p == 0 and delta == 0.1


@pytest.mark.parametrize("q", [0.0, 1.0])
def test_finite_samples_where_no_pair_holds_both_responses(q):
    assert finite_sample(q, (1.0, -1.0, 0.5), 30, 0.1)[0] == 0, "then every reward has eps = 0"


@pytest.mark.parametrize("q", [1e-300, 1e-9, 1 - 1e-9])
def test_finite_samples_where_hardly_any_does(q):
    check(finite_sample, q, (1.0, -1.0, 0.5), 30, 0.1)


# ---------------------------------------------------------------------------------------------------
# negative controls: false statements near the true ones; a violation must be found

def hard_case(seed) -> Case:
    """mu = pi_ref; a rare response on which r_hat is wrong; rewards in [-1/2, 1/2]; pi = pi* but for its mass there."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    ref = table([[uniform(-18, -3).item(), -1.0, -1.0]]).log_softmax(-1)
    reward, beta = uniform(-0.5, 0.5, 1, 3), 10 ** uniform(-2, 0).item()
    r_hat = (reward + uniform(-0.1, 0.1, 1, 3)).clamp(-0.5, 0.5)
    r_hat[0, 0] = seed % 2 - 0.5  # over- or underrated
    b = Bandit(table([1.0]), ref, ref, reward, beta)
    seen = b._replace(mu=table([[0.0, 0.5, 0.5]]).log())
    return Case(b, r_hat, with_unseen_mass(seen, optimal_policy(b), uniform(0, 1)))


def two_case(seed) -> Case:
    """Two responses, equally likely, and a reward with the sign wrong."""
    size = 1.0 + seed
    b = one_prompt((size, 0.0), (0.5, 0.5), mu=(0.5, 0.5))
    return Case(b, -b.reward, b.ref)


def error_of(b, r_hat):
    return pairwise_error(b.rho, b.mu, b.reward, r_hat)


def rlhf(c, c_value, factor=1.0):
    """RLHF's gap, and sqrt(C eps) with another C or eps than the theorem's."""
    return gap(c.b, tilt(c.b.ref, c.r_hat, c.b.beta)), (c_value * factor * error_of(c.b, c.r_hat)).sqrt()


def dpo_of(c, c_value):
    """The same for DPO's policy."""
    return gap(c.b, c.pi), (c_value * error_of(c.b, implicit_reward(c.pi, c.b.ref, c.b.beta))).sqrt()


def coverage_of(c, pi):
    return policy_coverage(c.b.rho, pi, c.b.mu)


def ball(c, pi, share=1.0):
    """C_eps of the ball that just holds pi, or of a share of that radius."""
    return local_coverage(c.b.rho, c.b.ref, share * kl(c.b.rho, pi, c.b.ref), c.b.mu)


def pi_hat(c):
    return tilt(c.b.ref, c.r_hat, c.b.beta)


def in_ref_only(c):
    """DPO from pairs that lack the rare response, with the coverage of pi_ref instead of that of the pairs."""
    c = c._replace(b=c.b._replace(mu=table([[0.0, 0.5, 0.5]]).log()))
    return dpo_of(c, global_coverage(c.b.rho, c.b.ref))


CONTROLS = {
    "T4 with a ball of a tenth of the radius that pi_rlhf has": (
        hard_case, lambda c: rlhf(c, ball(c, pi_hat(c), 0.1))),
    "T4 with the slides' radius 2R'/beta, for R' < R/2 (r_hat = 0)": (
        hard_case, lambda c: rlhf(c._replace(r_hat=0 * c.r_hat), ball(c, c.b.ref))),
    "T2 with local instead of global coverage": (
        hard_case, lambda c: dpo_of(c, ball(c, optimal_policy(c.b)))),
    "T2 with coverage by pi_ref, but pairs that lack a response": (hard_case, in_ref_only),
    "T5 outside of the ball": (hard_case, lambda c: dpo_of(c, ball(c, c.pi, 0.01))),
    "T1c with C(pi_hat) alone": (hard_case, lambda c: rlhf(c, coverage_of(c, pi_hat(c)))),
    "T1c with the pointwise error": (
        two_case, lambda c: (t1(c.b, c.r_hat)["t1a"], rlhf(c, coverage_of(c, pi_hat(c)), 0.5)[1])),
    "T7 with C_int = 1": (hard_case, lambda c: (gap(c.b, pi_hat(c)), error_of(c.b, c.r_hat) / (4 * c.b.beta))),
    "T0a with the KL reversed": (
        hard_case, lambda c: (gap(c.b, c.pi), c.b.beta * kl(c.b.rho, optimal_policy(c.b), c.pi))),
    "Lemma 4.1 with R'/beta": (
        hard_case, lambda c: (kl(c.b.rho, pi_hat(c), c.b.ref), c.r_hat.abs().max() / c.b.beta)),
    "Lemma 4.1 for DPO": (hard_case, lambda c: (kl(c.b.rho, c.pi, c.b.ref), table(2 * 0.5 / c.b.beta))),
    "T8 without its KL terms (r_hat = r*, greedy comparator)": (hard_case, lambda c: (
        c.b.reward.max() - V(c.b, optimal_policy(c.b)), table(0.0))),
    "T6 with lam = 0": (
        hard_case, lambda c: (kl(c.b.rho, c.pi, c.b.ref), kl(c.b.rho, optimal_policy(c.b), c.b.ref))),
}


def violations(name, n) -> int:
    case, control = CONTROLS[name]
    sides = [control(case(seed)) for seed in range(n)]
    return sum(bool(lhs > rhs * 1.001 + 1e-6) for lhs, rhs in sides)


@pytest.mark.parametrize("name", CONTROLS)
def test_negative_controls_are_violated(name):
    assert violations(name, 100) > 0, f"{name}: this false statement must be caught"


def test_the_true_statements_hold_on_the_hard_cases():
    for seed in range(40):
        check_all(hard_case(seed))


def test_finite_sample_at_the_rate_of_n_squared_is_violated(monkeypatch):
    monkeypatch.setattr(coverage, "finite_sample_error", lambda n, *args: finite_sample_error(n, *args) / n)
    assert any(p > delta for p, delta in (finite_sample(0.5, (0.3, -0.3), n, 0.2) for n in (50, 100, 200)))


# ---------------------------------------------------------------------------------------------------
# the examples, in numbers

def test_worked_example_is_the_docstring_and_the_readme():
    text = coverage.worked_example()
    assert text in coverage.__doc__, "the table in coverage.py's docstring is not what the code computes"
    readme = Path(coverage.__file__).with_name("README.md")
    words = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if "HyPO, lam -> 0" in words:
        missing = [line for line in text.splitlines() if line.strip() not in words]
        assert not missing, "README's table of the three responses is not what the code computes"


def test_worked_example_by_hand():
    b = one_prompt((math.log(4), 0.0, 0.0), (0.5, 0.25, 0.25), beta=0.5)
    assert close(optimal_policy(b).exp(), [[16 / 17, 1 / 34, 1 / 34]])
    assert close(J(b, optimal_policy(b)), 0.5 * math.log(8.5))
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    for m in (0.0, 0.3, 0.5, 0.99):  # half of the pairs have equal responses and a loss of log 2
        pi = with_unseen_mass(b, optimal_policy(b), m)
        assert close(pi.exp(), [[(1 - m) * 32 / 33, (1 - m) / 33, m]])
        assert close(preference_loss(b, pi - b.ref, dpo), (entropy + math.log(2)) / 2)
        assert close(error_of(b, implicit_reward(pi.clamp(min=-50), b.ref, b.beta)), 0)
    k = 32 / 33 * math.log(32 / 33 / (2 / 3)) + 1 / 33 * math.log(1 / 33 / (1 / 3))
    m = 0.25 / (0.25 + 0.75 * math.exp(-k))
    assert close(nearest_to_ref(b, optimal_policy(b)).exp(), [[(1 - m) * 32 / 33, (1 - m) / 33, m]])
    for start in (b.ref, table([[0.0, 0.0, 4.0]])):
        assert close(train_hypo(b, 1e-4, start).exp(), nearest_to_ref(b, optimal_policy(b)).exp(), 1e-3)


@pytest.mark.parametrize("d, j_star, family, rlhf, hypo", [
    (1e-2, 0.615483, (0.4136, -1.3044, -4.4970), (5.31e-3, 4.33e-2, 1.646), 2.35e-3),
    (1e-4, 0.620068, (-0.0379, -3.6020, -9.0560), (5.38e-5, 4.51e-4, 3.17e-2), 2.37e-5),
    (1e-8, 0.620115, (-0.9589, -8.2071, -18.1743), (5.38e-9, 4.51e-8, 3.20e-6), 2.37e-9)])
def test_proposition_4_1_in_numbers(d, j_star, family, rlhf, hypo):
    b = proof_bandit(d)
    pi_star = optimal_policy(b)
    assert J(b, pi_star).item() == pytest.approx(j_star, abs=1e-6)
    for m, j in zip((0.1, 0.5, 0.99), family):
        assert J(b, with_unseen_mass(b, pi_star, m)).item() == pytest.approx(j, abs=1e-4)
    for bound, expected in zip((1.0, 2.0, 5.0), rlhf):
        assert gap(b, tilt(b.ref, table([[1.0, 0.0, bound]]), 1.0)).item() == pytest.approx(expected, rel=5e-3)
    assert gap(b, nearest_to_ref(b, optimal_policy(b))).item() == pytest.approx(hypo, rel=5e-3)


@pytest.mark.parametrize("loss", [dpo, ipo])
@pytest.mark.parametrize("d", [0.0, 1e-8, 1e-2])
def test_proposition_4_1_the_losses_do_not_see_m(loss, d):
    b = proof_bandit(d)
    minimiser = train_offline(b, loss, torch.zeros_like(b.reward))
    losses = torch.stack([preference_loss(b, with_unseen_mass(b, minimiser, m) - b.ref, loss)
                          for m in (0.0, 1e-6, 0.1, 0.5, 0.99)])
    assert (losses - losses[0]).abs().max() < 1e-12
    if loss is dpo:  # H(sigmoid(1)), for the half of the pairs whose responses differ
        assert (2 * losses[0] - math.log(2)).item() == pytest.approx(0.582203, abs=1e-6)
    if d == 0 and loss is dpo:
        assert J(b, with_unseen_mass(b, minimiser, 0)).item() == pytest.approx(0.620115, abs=1e-6)
        assert V(b, with_unseen_mass(b, minimiser, 0.5)).item() == pytest.approx(0.5 * 0.731059, abs=1e-6)
    assert d > 0 or J(b, with_unseen_mass(b, minimiser, 1e-6)) == -INF


def test_offline_losses_pick_the_papers_optima_where_pairs_cover_everything():
    b = one_prompt((1.0, 0.2, -0.5), (0.2, 0.3, 0.5), mu=(0.5, 0.2, 0.3), beta=0.4)
    start = torch.zeros_like(b.ref)
    assert close(train_offline(b, dpo, start).exp(), optimal_policy(b).exp(), 1e-6)
    assert close(train_rlhf(b, 10.0, start)[0].exp(), optimal_policy(b).exp(), 1e-6)
    beats_mu = (coverage.differences(b.reward).sigmoid() * b.mu.exp()[:, None]).sum(-1)  # (X, Y)
    assert close(train_offline(b, ipo, start).exp(), tilt(b.ref, beats_mu, b.beta).exp(), 1e-6)
    assert train_rlhf(b, 0.1, start)[1].abs().max() <= 0.1


def test_ipo_target_is_one_over_two_beta():
    assert ipo(torch.tensor(5.0), 0.1) == 0 and close(ipo(torch.tensor(0.0), 0.1), 1 / (4 * 0.1 ** 2), 1e-6)
    assert close(dpo(torch.tensor(0.0), 0.1), math.log(2), 1e-6)


@few
@given(case=cases(zeros=False, prompts=1), lam=st.floats(0.01, 1), data=st.data())
def test_hypo_depends_on_no_start_and_plain_descent_does_not_undercut_it(case, lam, data):
    mu = data.draw(policies(*case.b.ref.shape))
    b = case.b._replace(mu=torch.where(mu == -INF, mu, mu.clamp(min=-4)).log_softmax(-1),
                        beta=max(case.b.beta, case.b.reward.max().item() / 5, 0.2),
                        ref=case.b.ref.clamp(min=-8).log_softmax(-1))
    pi = train_hypo(b, lam, b.ref)
    for start in (b.ref, case.pi.clamp(min=-3)):
        plain = minimize(lambda logits: hypo_loss(b, logits.log_softmax(-1), lam), start).log_softmax(-1)
        assert hypo_loss(b, pi, lam) <= hypo_loss(b, plain, lam) + 1e-9
        assert close(train_hypo(b, lam, start).exp(), pi.exp(), 1e-3)


@few
@given(case=cases(zeros=False, prompts=1), data=st.data())
def test_tabular_limit_of_descent(case, data):
    b = case.b._replace(mu=data.draw(policies(*case.b.ref.shape)).clamp(min=-5), beta=1.0,
                        reward=case.b.reward / case.b.reward.max().clamp(min=1))
    b = b._replace(mu=torch.where(data.draw(policies(*b.ref.shape)) == -INF, -INF, b.mu).log_softmax(-1))
    limit = tabular_limit(b)
    assert close(train_offline(b, dpo, b.ref).exp(), limit.exp(), 1e-4)
    seen, ref = b.mu > -INF, b.ref.exp()
    a = (b.reward - b.reward[seen].mean()) / b.beta
    rises = (ref * a.exp())[seen].sum() < ref[seen].sum()
    if not seen.all() and (limit - b.ref)[~seen].abs().max() > 1e-9:
        assert ((limit - b.ref)[~seen] > 0).all() == rises, "unseen mass rises iff sum pi_ref e^a < pi_ref(seen)"


def test_what_descent_returns_depends_on_the_model():
    b = one_prompt((math.log(4), 0.0, 0.0), (0.5, 0.25, 0.25), beta=0.5)
    phi = table([[[1.0], [0.0], [2.0]]])

    def in_numbers(pi, expected):
        return close(pi.exp(), [expected], 6e-4)

    assert in_numbers(tabular_limit(b), (0.865, 0.027, 0.108))
    assert in_numbers(train_offline(b, dpo, b.ref + table([[0.0, 0.0, 4.0]])), (0.127, 0.004, 0.869))
    assert in_numbers(train_log_linear(b, phi), (0.111, 0.004, 0.886))  # the unseen y3 takes over
    for lam, expected in ((0.5, (0.469, 0.142, 0.389)), (0.3, (0.430, 0.098, 0.472)), (0.1, (0.241, 0.020, 0.740))):
        assert in_numbers(train_log_linear(b, phi, lam / 2), expected)  # half: see hypo_loss


def test_linear_example():
    b, phi, theta_star = linear_example()
    assert close(b.reward, phi @ theta_star) and policy_coverage(b.rho, optimal_policy(b), b.mu) == INF
    assert close(train_log_linear(b, phi).exp(), optimal_policy(b).exp(), 1e-5)
    assert close(optimal_policy(b).exp(), [[0.98889, 0.01099, 0.00012]], 1e-5)
    assert close(train_offline(b, dpo, b.ref).exp(), [[0.0944, 0.8956, 0.0099]], 1e-4)
    assert gap(b, tabular_limit(b)).item() == pytest.approx(3.764, abs=1e-3)
    path = gradient_path(b, lambda theta: tilt(b.ref, phi @ theta, 1.0), table([0.0, 0.0]), 1000, lr=0.2)
    for step, expected in ((100, (0.780, 0.179, 0.041)), (1000, (0.972, 0.027, 0.0007))):
        assert close(path[step].exp(), [expected], 1e-3)
    mild = one_prompt((2.0, 1.0, 0.0), (0.2, 0.05, 0.75), (0.0, 0.5, 0.5))
    assert close(train_log_linear(mild, phi).exp(), [[0.6252, 0.0575, 0.3173]], 1e-4)
    assert close(train_offline(mild, dpo, mild.ref).exp(), [[0.2712, 0.1118, 0.6169]], 1e-4)


# ---------------------------------------------------------------------------------------------------
# a statement says itself what it states, and the file is a leaf

STATEMENTS = [thing for thing in vars(coverage).values() if isinstance(thing, Statement)]


def test_statements_say_their_relation():
    assert set(STATEMENTS) == {*OF_REWARD, *OF_POLICY, *OF_BOTH, t0b_gap_is_variance, t6_hypo_kl, t6_hypo_loss,
                               t11_linear, finite_sample}, "a statement is not tested"
    for statement in STATEMENTS:
        assert (" <= " in statement.text) == (statement.relation == "<="), statement.text
        assert statement.sides.__doc__, f"{statement.text}: no proof"


def test_holds_sees_a_violation():
    one, two = table(1.0), table(2.0)
    false, wrong, fine = inequality("2 <= 1")(lambda: (two, one)), equality("1 = 2")(lambda: (one, two)), inequality(
        "1 <= 2")(lambda: (one, two))
    assert not holds(false, false()) and not holds(wrong, wrong()) and holds(fine, fine())
    assert not holds(false, (one, two, one)), "each side and the next"
    assert holds(fine, (table(-INF), table(-INF), table(INF), table(INF)))
    assert not holds(fine, (table(0.0), table(-INF))) and not holds(fine, (table(INF), one))
    assert not holds(fine, (table(math.nan), one)) and not holds(fine, (one, table(math.nan)))


def test_this_is_our_coverage_and_it_is_a_leaf():
    """The tool that measures line coverage has the same name; conftest.py sees to it that ours is found."""
    source = Path(coverage.__file__)
    assert source.resolve() == Path(__file__).resolve().parents[1] / "coverage.py" and not hasattr(coverage, "__path__")
    top = ast.parse(source.read_text(encoding="utf-8")).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert names <= {"argparse", "collections.abc", "functools", "math", "pathlib", "typing", "numpy", "torch"}
