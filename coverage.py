"""Coverage: why DPO needs the data to cover every policy, and RLHF and HyPO only those near pi_ref.

    python coverage.py              # a guided tour of the theory, with pictures in runs/coverage (15 seconds)
    python coverage.py runs/hypo    # the quantities of the theory, measured on a trained policy

The theory of Song, Swamy, Singh, Bagnell, Sun 2024, "The Importance of Online Data: Understanding Preference
Fine-tuning via Coverage" (arXiv 2406.01462), on finite sets of prompts X and responses Y, where nothing needs
to be sampled. Every definition is a function, and so is every statement: it returns its sides, smallest first,
so that `lhs <= rhs` can be looked at, and tested on random instances. Where the paper writes O(...) a constant
is given and proved; the numbers T0 to T11 are ours, "Theorem 4.2" and the like the paper's.

The smallest case that shows it all has three responses. Preference pairs hold y1 and y2 only, P(y1 beats y2)
= 0.8, beta = 0.5, r* = (log 4, 0, 0). DPO's loss cannot tell its minimisers apart, with any mass m on y3; HyPO's can:

                       y1     y2     y3  DPO loss  KL(pi||pi_ref)   J(pi)  J(pi*) - J(pi)
    pi_ref          0.500  0.250  0.250    0.6931          0.0000  0.6931          0.3769
    pi*             0.941  0.029  0.029    0.5968          0.4694  1.0700          0.0000
    DPO, m = 0.5    0.485  0.015  0.500    0.5968          0.2892  0.5276          0.5425
    DPO, m = 0.99   0.010  0.000  0.990    0.5968          1.3222 -0.6477          1.7177
    HyPO, lam -> 0  0.671  0.021  0.308    0.5968          0.2097  0.8249          0.2451

    largest pi / pi_ref of any policy (global coverage): 4.0000; within KL <= 0.1 (local coverage): 1.8267

Conventions. Policies `pi`, `ref`, `mu` are tables of log-probabilities (X, Y), float64, with -inf for a response
that never comes. A reward is a table (X, Y), and only its differences between responses of one prompt matter.
KL without a word is KL(pi || pi_ref) in nats, the mean over prompts. A ratio 0/0 is 0.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch

INF = math.inf


class Bandit(NamedTuple):
    """A contextual bandit: a prompt x ~ rho, then a single action, the whole response y ~ pi(.|x)."""
    rho: torch.Tensor  # (X,) probabilities of the prompts
    ref: torch.Tensor  # (X, Y) log pi_ref
    mu: torch.Tensor  # (X, Y) log-probabilities of the responses in preference pairs; the paper has mu = pi_ref
    reward: torch.Tensor  # (X, Y) the true reward r*; labels are Bradley-Terry, P(y beats z) = sigmoid(r*(y) - r*(z))
    beta: float


# ---------------------------------------------------------------------------------------------------
# policies, values, rewards

def inner(pi, values):
    """(X,) sum over y of pi(y|x) values(x, y); a response of probability 0 does not count, be its value infinite."""
    return (pi.exp() * values.masked_fill(pi == -INF, 0)).sum(-1)


def average(rho, values):
    """Sum over x of rho(x) values(x), where a prompt that never comes does not count."""
    return (rho * values.masked_fill(rho == 0, 0)).sum(-1)


def mean(rho, pi, values):
    """E_{x ~ rho, y ~ pi} values(x, y)."""
    return average(rho, inner(pi, values))


def mean_pairs(rho, mu, values):
    """E_{x ~ rho; y, z ~ mu} values(x, y, z), two independent responses to one prompt."""
    return average(rho, inner(mu, inner(mu[:, None, :].expand_as(values), values)))


def differences(table):
    """(X, Y, Y) table(x, y) - table(x, z)."""
    return table[:, :, None] - table[:, None, :]


def kl(rho, pi, other):
    """E_rho KL(pi(.|x) || other(.|x)) in nats; inf where pi says what `other` never does."""
    return mean(rho, pi, pi - other)


def V(b, pi):
    """Expected true reward. Never -inf."""
    return mean(b.rho, pi, b.reward)


def J(b, pi):
    """The objective of RLHF: V(pi) - beta KL(pi || pi_ref)."""
    return V(b, pi) - b.beta * kl(b.rho, pi, b.ref)


def log_partition(ref, reward, beta):
    """(X,) log Z(x) = log E_{y ~ pi_ref} exp(reward / beta); beta times its mean is the best value of J."""
    return (ref + reward / beta).logsumexp(-1)


def tilt(ref, reward, beta):
    """The Gibbs policy pi_ref exp(reward / beta) / Z, which maximises E reward - beta KL(pi || pi_ref)."""
    return (ref + reward / beta).log_softmax(-1)


def optimal_policy(b):
    """pi* = argmax J."""
    return tilt(b.ref, b.reward, b.beta)


def gap(b, pi):
    """J(pi*) - J(pi), what pi falls short of the best policy."""
    return J(b, optimal_policy(b)) - J(b, pi)


def implicit_reward(pi, ref, beta):
    """beta log pi / pi_ref, the reward that pi is the optimal policy of: tilt(ref, implicit_reward) = pi."""
    return torch.where((pi == -INF) & (ref == -INF), 0.0, beta * (pi - ref))


def spread(reward, ref):
    """(X,) largest difference of the reward between two responses that pi_ref covers."""
    return reward.masked_fill(ref == -INF, -INF).amax(-1) - reward.masked_fill(ref == -INF, INF).amin(-1)


# ---------------------------------------------------------------------------------------------------
# coverage (Assumptions 4.1 and 4.2) and in-distribution error (Assumption 4.3)

def policy_coverage(rho, pi, mu):
    """C(pi) = largest pi(y|x) / mu(y|x) over prompts with rho(x) > 0. At least 1."""
    return torch.where(pi == -INF, 0.0, (pi - mu).exp())[rho > 0].max()


def global_coverage(rho, mu):
    """Assumption 4.1: the largest C(pi) of all policies, so max 1 / mu; inf if one response is not covered."""
    return (-mu[rho > 0]).exp().max()


def local_coverage(rho, ref, eps_kl, mu=None):
    """Assumption 4.2: the largest C(pi) of the policies with E_rho KL(pi || pi_ref) <= eps_kl. Exact.

    C(pi) is the largest pi(y|x) / mu(y|x), mu being pi_ref if it is not given, over what may come: rho(x) > 0 and
    pi_ref(y|x) > 0.
    To make y likelier at the least KL, a policy moves prompt x alone and there only the probability a of y
    against the rest; that costs rho(x) kl(a || pi_ref(y|x)), a binary KL. So the largest a solves
    kl(a || p) = eps_kl / rho(x); bisection finds log(a / p), which keeps its digits when p is tiny.
    """
    if eps_kl == INF:
        return global_coverage(rho, ref if mu is None else mu)
    covered = (ref > -INF) & (rho > 0)[:, None]
    p = ref.exp().clamp(max=1)
    radius = (eps_kl / rho)[:, None]
    low, high = torch.zeros_like(ref), -ref.masked_fill(~covered, 0)  # log(a / p), between a = p and a = 1
    for _ in range(60):
        middle = (low + high) / 2
        a = (p.log() + middle).exp().clamp(max=1)
        cost = a * middle + torch.special.xlog1py(1 - a, -a) - torch.special.xlog1py(1 - a, -p)
        low, high = torch.where(cost <= radius, middle, low), torch.where(cost <= radius, high, middle)
    return (ref + high - (ref if mu is None else mu))[covered].exp().max()


def pairwise_error(rho, mu, reward, r_hat):
    """eps = E_{x; y, z ~ mu} (r*(y) - r*(z) - r_hat(y) + r_hat(z))^2, Assumption 4.3 in the form that BT identifies.

    The slides print it pointwise, E (r* - r_hat)^2. That depends on a constant c(x) in the reward, which no
    preference shows; at the best c(x) it is pointwise_error, exactly eps / 2.
    """
    difference = differences(reward - r_hat).nan_to_num(nan=0.0, posinf=INF, neginf=-INF)  # inf - inf is y with itself
    return mean_pairs(rho, mu, difference.square())


def pointwise_error(rho, mu, reward, r_hat):
    """E_rho min_c E_mu (r* - r_hat - c)^2: the variance of the error under mu."""
    error = reward - r_hat
    return mean(rho, mu, (error - inner(mu, error)[:, None]).square())


def preference_loss(b, logratio, loss):
    """Population loss of an offline method: E loss(h) over pairs y, z ~ mu with Bradley-Terry labels.

    logratio: (X, Y) log pi / pi_ref, or a reward model over beta; h = logratio of the winner less the loser's.
    Only responses that mu has matter, and only differences: all that Proposition 4.1 needs to know of a loss.
    """
    h = differences(logratio.masked_fill(b.mu == -INF, 0))  # (X, Y, Y)
    wins = differences(b.reward).sigmoid()
    return mean_pairs(b.rho, b.mu, wins * loss(h, b.beta) + (1 - wins) * loss(-h, b.beta))


def dpo(h, beta):
    """DPO's loss of a labelled pair: -log sigmoid(beta h)."""
    return -torch.nn.functional.logsigmoid(beta * h)


def ipo(h, beta):
    """IPO's: (h - 1 / (2 beta))^2. (The slides print beta / 2 as the target; dpo.py says why it is this.)"""
    return (h - 1 / (2 * beta)).square()


# ---------------------------------------------------------------------------------------------------
# The statements. Each returns its sides in ascending order; those with " = " in their first line, equal sides.
# r_hat: any reward table, pi_hat = tilt(ref, r_hat) its RLHF policy, D = r* - r_hat, eps = pairwise_error under mu,
# C = max(C(pi*), C(pi_hat)) with C(pi) = max pi / mu.

def times(coverage, error):
    """A bound coverage * error. Without coverage there is none, even if the error in distribution is 0."""
    return torch.where(coverage == INF, coverage, coverage * error)


def solve(b, r_hat):
    """(pi*, pi_hat, D, eps) of a reward table."""
    return (optimal_policy(b), tilt(b.ref, r_hat, b.beta), b.reward - r_hat,
            pairwise_error(b.rho, b.mu, b.reward, r_hat))


def larger_coverage(b, pi, other):
    """max(C(pi), C(other))."""
    return torch.maximum(policy_coverage(b.rho, pi, b.mu), policy_coverage(b.rho, other, b.mu))


def reward_range(b):
    """R, the largest spread of r* at a prompt."""
    return spread(b.reward, b.ref)[b.rho > 0].max()


def t0a_gap_is_kl(b, pi):
    """T0a. J(pi*) - J(pi) = beta KL(pi || pi*), for every policy

    Put log pi* = log pi_ref + r*/beta - log Z into the KL.
    """
    return gap(b, pi), b.beta * kl(b.rho, pi, optimal_policy(b))


def t0b_gap_is_variance(b, r_hat, nodes=200):
    """T0b. J(pi*) - J(pi_hat) = 1/beta E_rho integral_0^1 t Var_{pi_t}(D) dt, pi_t = tilt(r* - t D)

    d/dt log pi_t = -(D - E_{pi_t} D) / beta, so d/dt of beta KL(pi_t || pi*) is t Var / beta. The integral is
    taken by Gauss-Legendre, to machine precision while the spread of D is below some 100 beta.
    """
    k = torch.arange(1, nodes, dtype=b.ref.dtype)
    off_diagonal = k / (4 * k * k - 1).sqrt()
    roots, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    t, weight = (roots + 1) / 2, vectors[0].square()  # on [0, 1]
    error = b.reward - r_hat
    pi_t = tilt(b.ref, b.reward - t[:, None, None] * error, b.beta)  # (T, X, Y)
    variance = inner(pi_t, (error - inner(pi_t, error)[..., None]).square())  # (T, X)
    return gap(b, tilt(b.ref, r_hat, b.beta)), (weight * t) @ variance @ b.rho / b.beta


def t1a_reward_error(b, r_hat):
    """T1a. J(pi*) - J(pi_hat) <= E_{pi*} D - E_{pi_hat} D

    pi_hat maximises J with r_hat in place of r*, and the KL terms cancel. Slack: beta KL(pi* || pi_hat).
    """
    pi_star, pi_hat, error, _ = solve(b, r_hat)
    return gap(b, pi_hat), mean(b.rho, pi_star, error) - mean(b.rho, pi_hat, error)


def t1b_cauchy_schwarz(b, r_hat):
    """T1b. E_{pi*} D - E_{pi_hat} D <= sqrt(E_rho sum_y (pi* - pi_hat)^2 / mu) sqrt(eps / 2)

    D may be centred under mu, for pi* - pi_hat sums to 0; then Cauchy-Schwarz. Equal if |X| = 1, |Y| = 2.
    """
    pi_star, pi_hat, _, eps = solve(b, r_hat)
    change = (pi_star.exp() - pi_hat.exp()).square()  # (X, Y)
    chi = torch.where(change == 0, 0.0, change / b.mu.exp()).sum(-1)  # (X,)
    return t1a_reward_error(b, r_hat)[1], times(average(b.rho, chi), eps / 2).sqrt()


def t1c_coverage(b, r_hat):
    """T1c. that <= sqrt(C L1 eps / 2) <= sqrt(C eps), L1 = E_rho ||pi* - pi_hat||_1

    |pi* - pi_hat| <= max(pi*, pi_hat) <= C mu, and L1 <= 2.
    """
    pi_star, pi_hat, _, eps = solve(b, r_hat)
    c, l1 = larger_coverage(b, pi_star, pi_hat), average(b.rho, (pi_star.exp() - pi_hat.exp()).abs().sum(-1))
    return t1b_cauchy_schwarz(b, r_hat)[1], times(c, l1 * eps / 2).sqrt(), times(c, eps).sqrt()


def t1d_paper_form(b, r_hat):
    """T1d. that <= sqrt(C(pi*) C(pi_hat) eps) <= C sqrt(eps), the form of the paper's theorems

    The paper changes measure for the pair (pi*, pi_hat) at once. Weaker than T1c because C >= 1.
    """
    pi_star, pi_hat, _, eps = solve(b, r_hat)
    c, product = larger_coverage(b, pi_star, pi_hat), policy_coverage(b.rho, pi_star, b.mu) * policy_coverage(
        b.rho, pi_hat, b.mu)
    return times(c, eps).sqrt(), times(product, eps).sqrt(), times(c, eps.sqrt())


def t2_dpo_global(b, pi):
    """T2. DPO under global coverage: J(pi*) - J(pi) <= sqrt(C_glo eps_dpo) <= C_glo sqrt(eps_dpo)

    For every policy with pi > 0 on mu's support: it is the tilt of its implicit reward, so T1c applies; eps_dpo is
    that reward's error, and no policy has a larger C than C_glo.
    """
    c = global_coverage(b.rho, b.mu)
    eps = pairwise_error(b.rho, b.mu, b.reward, implicit_reward(pi, b.ref, b.beta))
    return gap(b, pi), times(c, eps).sqrt(), times(c, eps.sqrt())


def t3a_kl_of_tilt(b, r_hat):
    """T3a. KL(pi_hat(.|x) || pi_ref(.|x)) <= min(S / beta, S^2 / (8 beta^2)), S(x) = spread of r_hat

    pi_hat is no worse than pi_ref for r_hat; and Hoeffding: a variable of spread S has variance at most S^2 / 4.
    """
    pi_hat, s = tilt(b.ref, r_hat, b.beta), spread(r_hat, b.ref) / b.beta
    return inner(pi_hat, pi_hat - b.ref), torch.minimum(s, s * s / 8)


def t3b_lemma_4_1(b, r_hat):
    """T3b. Lemma 4.1: KL(pi_rlhf || pi_ref) <= min(2R' / beta, R'^2 / (2 beta^2)) <= 2R' / beta, R' = max |r_hat|

    The mean of T3a with S <= 2R'. No preference data, no coverage: a bounded reward (Assumption 4.4) suffices.
    """
    bound = 2 * r_hat.abs().max() / b.beta
    return kl(b.rho, tilt(b.ref, r_hat, b.beta), b.ref), torch.minimum(bound, bound ** 2 / 8), bound


def t3c_ratio_of_tilt(b, r_hat):
    """T3c. max_y pi_hat(y|x) / pi_ref(y|x) <= exp(S / beta)

    Z >= exp(min r_hat / beta).
    """
    pi_hat = tilt(b.ref, r_hat, b.beta)
    return torch.where(pi_hat == -INF, 0.0, (pi_hat - b.ref).exp()).amax(-1), (spread(r_hat, b.ref) / b.beta).exp()


def t4_rlhf_local(b, r_hat):
    """T4. Theorem 4.2: J(pi*) - J(pi_rlhf) <= sqrt(C_eps eps) <= C_eps sqrt(eps), eps_kl = max(2R', R) / beta

    Both pi_rlhf (T3b) and pi* (the same lemma, R = spread of r*) lie in the KL ball; then T1c. The slides' radius
    2R' / beta takes for granted that R <= 2R': the comparator pi* must be covered too.
    """
    _, pi_hat, _, eps = solve(b, r_hat)
    c = local_coverage(b.rho, b.ref, torch.maximum(2 * r_hat.abs().max(), reward_range(b)) / b.beta, b.mu)
    return gap(b, pi_hat), times(c, eps).sqrt(), times(c, eps.sqrt())


def t5_hypo_constraint(b, pi):
    """T5. HyPO: J(pi*) - J(pi) <= sqrt(C_eps eps_hypo) <= C_eps sqrt(eps_hypo), eps_kl = max(KL(pi), KL(pi*))

    For every policy whose KL is held below eps_kl, which HyPO's online samples do. T2 with the coverage of a ball.
    """
    eps_kl = torch.maximum(kl(b.rho, pi, b.ref), kl(b.rho, optimal_policy(b), b.ref))
    c = local_coverage(b.rho, b.ref, eps_kl, b.mu)
    eps = pairwise_error(b.rho, b.mu, b.reward, implicit_reward(pi, b.ref, b.beta))
    return gap(b, pi), times(c, eps).sqrt(), times(c, eps.sqrt())


def t6_hypo_kl(b, pi_lam):
    """T6. HyPO, pi_lam = argmin DPO loss + lam KL: KL(pi_lam) <= KL(pi*) <= min(R / beta, R^2 / (8 beta^2))

    pi* minimises the DPO loss, so pi_lam can beat it only by its KL. No coverage needed.
    """
    r = reward_range(b) / b.beta
    return kl(b.rho, pi_lam, b.ref), kl(b.rho, optimal_policy(b), b.ref), torch.minimum(r, r * r / 8)


def t6_hypo_loss(b, pi_lam, lam):
    """T6. and its DPO loss: L(pi_lam) - L(pi*) <= lam (KL(pi*) - KL(pi_lam)) <= lam R / beta

    The same comparison, read the other way: what the penalty costs in fit.
    """
    pi_star = optimal_policy(b)
    excess = preference_loss(b, pi_lam - b.ref, dpo) - preference_loss(b, pi_star - b.ref, dpo)
    saved = kl(b.rho, pi_star, b.ref) - kl(b.rho, pi_lam, b.ref)
    return excess, lam * saved, lam * reward_range(b) / b.beta


def t7_fast_rate(b, r_hat):
    """T7. J(pi*) - J(pi_hat) <= C_int eps / (4 beta), C_int = largest C(pi_t), 0 <= t <= 1

    T0b with Var_{pi_t}(D) <= C(pi_t) eps / 2. log pi_t(y) is concave in t, so bisection finds its peak.
    """
    _, pi_hat, error, eps = solve(b, r_hat)
    low, high = torch.zeros_like(error), torch.ones_like(error)  # (X, Y): each response has a peak of its own
    for _ in range(60):
        t = (low + high) / 2
        pi_t = tilt(b.ref[:, None], b.reward[:, None] - t[:, :, None] * error[:, None], b.beta)  # (X, Y, Y)
        rising = error < inner(pi_t, error[:, None].expand_as(pi_t))  # (X, Y)
        low, high = torch.where(rising, t, low), torch.where(rising, high, t)
    at_peak = tilt(b.ref[:, None], b.reward[:, None] - high[:, :, None] * error[:, None], b.beta)
    c = policy_coverage(b.rho, at_peak.diagonal(dim1=1, dim2=2), b.mu)
    return gap(b, pi_hat), times(c, eps / (4 * b.beta))


def t8_value(b, r_hat, pi):
    """T8. value alone: V(pi) - V(pi_hat) <= sqrt(max(C(pi), C(pi_hat)) eps) + beta KL(pi) - beta KL(pi_hat)

    For any comparator pi. Without the KL in the objective its two terms no longer cancel.
    """
    _, pi_hat, _, eps = solve(b, r_hat)
    cost = b.beta * (kl(b.rho, pi, b.ref) - kl(b.rho, pi_hat, b.ref))
    return V(b, pi) - V(b, pi_hat), times(larger_coverage(b, pi, pi_hat), eps).sqrt() + cost


def t9_approximate(b, r_hat, pi):
    """T9. pi within e of the best for r_hat: J(pi*) - J(pi) <= sqrt(C eps) + e <= sqrt(C_eps eps) + e

    The proofs of T1c and T4 with e carried along; the ball's radius is max(2R' + e, R) / beta.
    """
    pi_star, _, _, eps = solve(b, r_hat)
    e = gap(b._replace(reward=r_hat), pi)
    c = local_coverage(b.rho, b.ref, torch.maximum(2 * r_hat.abs().max() + e, reward_range(b)) / b.beta, b.mu)
    return gap(b, pi), times(larger_coverage(b, pi_star, pi), eps).sqrt() + e, times(c, eps).sqrt() + e


def t9_kl(b, r_hat, pi):
    """T9. and KL(pi || pi_ref) <= (2R' + e) / beta

    Lemma 4.1 for a policy that RLHF has not trained to the end.
    """
    return kl(b.rho, pi, b.ref), (2 * r_hat.abs().max() + gap(b._replace(reward=r_hat), pi)) / b.beta


def t10_log_loss(b, r_hat):
    """T10. eps <= (L(r_hat) - L(r*)) / (2 kappa^2), kappa = sigmoid(M) sigmoid(-M), M = largest margin

    L is the Bradley-Terry log-loss, so the excess is a KL between labels, at least twice the squared difference of
    their probabilities (Pinsker), and sigmoid is at least kappa steep on [-M, M]. kappa ~ exp(-M): this is why
    rewards are bounded.
    """
    m = torch.maximum(spread(b.reward, b.mu), spread(r_hat, b.mu))[b.rho > 0].max()
    kappa = m.sigmoid() * (-m).sigmoid()
    excess = preference_loss(b, r_hat / b.beta, dpo) - preference_loss(b, b.reward / b.beta, dpo)
    return pairwise_error(b.rho, b.mu, b.reward, r_hat), excess / (2 * kappa ** 2)


def t11_linear(b, phi, theta_star, theta):
    """T11. linear rewards <theta, phi>: J(pi*) - J(pi_hat) <= sqrt(eps) ||E_{pi*} phi - E_{pi_hat} phi||_{Sigma^+}

    Sigma = E (phi(y) - phi(z))(phi(y) - phi(z))^T over pairs of mu; T1a is <theta* - theta, v>, then Cauchy-Schwarz.
    Finite whenever that difference v lies in Sigma's range, even if mu misses responses and C = inf: features
    extrapolate. phi: (X, Y, D).
    """
    b = b._replace(reward=phi @ theta_star)
    pi_star, pi_hat, _, eps = solve(b, phi @ theta)
    v = torch.stack([mean(b.rho, pi_star, f) - mean(b.rho, pi_hat, f) for f in phi.unbind(-1)])
    outer = [[mean_pairs(b.rho, b.mu, differences(f) * differences(g)) for f in phi.unbind(-1)] for g in phi.unbind(-1)]
    sigma = torch.tensor(outer, dtype=phi.dtype)  # (D, D)
    inverse = torch.linalg.pinv(sigma, hermitian=True, rtol=1e-10)
    outside = (v - sigma @ inverse @ v).norm() > 1e-7 * v.norm()
    return gap(b, pi_hat), torch.where(outside, INF, (eps * (v @ inverse @ v)).sqrt())


def finite_sample_error(n, candidates, delta, margin):
    """With n labelled pairs, what eps the best of some candidate rewards exceeds with probability delta at most.

    2 log(candidates / delta) / (n kappa^2), kappa as in T10, if r* is one of them.
    """
    kappa = 1 / (2 + math.exp(margin) + math.exp(-margin))  # sigmoid(margin) sigmoid(-margin)
    return 2 * math.log(candidates / delta) / (n * kappa ** 2)


def finite_sample(q, margins, n, delta):
    """Finite sample. P(maximum likelihood reward has eps > finite_sample_error) <= delta

    Exact, for one prompt and two responses: mu = (q, 1 - q), n pairs, candidate rewards r(y1) - r(y2) = margins, the
    first of which is true. The likelihood depends on the pairs with y1 and y2 only through how many y1 wins.
    Reason: for one candidate E sqrt(likelihood ratio) <= exp(-n H^2 / 2), H^2 its squared Hellinger distance per pair;
    Markov, union over candidates; H^2 >= the squared difference of label probabilities >= kappa^2 eps.
    """
    u = torch.as_tensor(margins, dtype=torch.float64)  # (N,)
    mixed = 2 * q * (1 - q)  # how often a pair has both responses
    too_far = mixed * (u - u[0]).square() > finite_sample_error(n, len(u), delta, u.abs().max().item())
    log_binomial = lambda n, k: torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)  # noqa: E731
    j = torch.arange(n + 1, dtype=torch.float64)[:, None]  # (n + 1, 1) pairs with both responses
    k = torch.arange(n + 1, dtype=torch.float64)  # (n + 1,) of which y1 wins k
    likelihood = lambda u: -k * dpo(u, 1) - (j - k) * dpo(-u, 1)  # noqa: E731
    log_p = (log_binomial(j[-1], j) + j * math.log(mixed) + (n - j) * math.log1p(-mixed)
             + log_binomial(j, k.minimum(j)) + likelihood(u[0]))
    score = torch.stack([likelihood(m) for m in u])  # (N, n + 1, n + 1)
    fails = (too_far[:, None, None] & (score >= score.amax(0) - 1e-9)).any(0) & (k <= j)
    return log_p.exp()[fails].sum(), u.new_tensor(delta)


# ---------------------------------------------------------------------------------------------------
# exact trainers: the minimisers of the population losses

def minimize(loss, start):
    """The table at which L-BFGS, started at `start`, has brought loss(table) to rest."""
    table = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=600, tolerance_grad=1e-11, tolerance_change=1e-16,
                                  history_size=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach()


def hypo_loss(b, pi, lam):
    """HyPO's objective, the DPO loss + lam KL(pi || pi_ref).

    Two draws of mu may be equal and then teach nothing; hypo.py has no such pairs. So lam weighs 1 / P(y != z) times
    what it does there.
    """
    return preference_loss(b, pi - b.ref, dpo) + lam * kl(b.rho, pi, b.ref)


def train_offline(b, loss, start):
    """DPO's or IPO's tabular softmax policy, trained from the policy `start`.

    The loss is flat in some directions if mu misses responses: the start then decides which minimiser comes out.
    """
    return minimize(lambda logits: preference_loss(b, logits.log_softmax(-1) - b.ref, loss), start).log_softmax(-1)


def train_hypo(b, lam, start):
    """HyPO's policy among all tables. The penalty decides what DPO's loss leaves free; in every test, not the start."""
    policy = lambda logits: nearest_to_ref(b, logits)  # noqa: E731
    return policy(minimize(lambda logits: hypo_loss(b, policy(logits), lam), start))


def train_rlhf(b, bound, start):
    """(pi_rlhf, r_hat): reward table by maximum likelihood from `start`, clipped to +-bound; then its tilt."""
    r_hat = minimize(lambda reward: preference_loss(b, reward / b.beta, dpo), start).clamp(-bound, bound)
    return tilt(b.ref, r_hat, b.beta), r_hat


def train_log_linear(b, phi, lam=0.0):
    """DPO, or HyPO if lam > 0, with shared features: pi = tilt(<theta, phi>), from theta = 0, which is pi_ref."""
    policy = lambda theta: tilt(b.ref, phi @ theta, b.beta)  # noqa: E731
    return policy(minimize(lambda theta: hypo_loss(b, policy(theta), lam), phi.new_zeros(phi.shape[-1])))


def gradient_path(b, policy, parameters, steps, lr=0.1):
    """(steps + 1, X, Y) the policies of plain gradient descent on the DPO loss; policy: parameters -> table."""
    path, parameters = [], parameters.clone().requires_grad_()
    for _ in range(steps + 1):
        pi = policy(parameters)
        path.append(pi.detach())
        gradient, = torch.autograd.grad(preference_loss(b, pi - b.ref, dpo), parameters)
        parameters = (parameters - lr * gradient).detach().requires_grad_()
    return torch.stack(path)


# ---------------------------------------------------------------------------------------------------
# the constructions of the proofs

def with_unseen_mass(b, pi, m):
    """(1 - m) pi among the responses that mu has, keeping their ratios, and m spread evenly over the others.

    No offline loss tells these policies apart, whatever m: Proposition 4.1's family, if pi minimises the loss.
    """
    seen = b.mu > -INF
    mass = torch.as_tensor(m, dtype=pi.dtype)
    return torch.where(seen, torch.log1p(-mass) + pi.masked_fill(~seen, -INF).log_softmax(-1),
                       (mass / (~seen).sum(-1, keepdim=True)).log())


def nearest_to_ref(b, pi):
    """Of the policies with pi's ratios among the responses that mu has, the one of least KL to pi_ref.

    The offline loss is the same for all of them, so HyPO's penalty picks this one, at any lam > 0. With q = pi among
    the seen responses and K = E_q log q / pi_ref it is proportional to q exp(-K) there, and to pi_ref elsewhere.
    """
    seen = b.mu > -INF
    q = pi.masked_fill(~seen, -INF).log_softmax(-1)
    return torch.where(seen, q - inner(q, q - b.ref)[:, None], b.ref).log_softmax(-1)


def tabular_limit(b):
    """Where gradient descent from pi_ref brings tabular DPO, one prompt: logits log pi_ref + a.

    Every gradient is along chosen - rejected: unseen logits never move, and seen logits keep their sum. So
    a = (r* - its plain mean over the seen) / beta there. Unseen responses gain if and only if the seen
    sum_y pi_ref(y) exp(a(y)) has become less than pi_ref(seen): if pi_ref favours the losers.
    """
    seen = b.mu > -INF
    a = (b.reward - b.reward[seen].mean()) / b.beta
    return (b.ref + a.masked_fill(~seen, 0)).log_softmax(-1)


def three_responses(reward, ref, mu=(0.5, 0.5, 0.0), beta=1.0):
    """The bandit of the paper's proofs: one prompt, three responses."""
    table = lambda row: torch.tensor([row], dtype=torch.float64)  # noqa: E731
    return Bandit(torch.ones(1, dtype=torch.float64), table(ref).log(), table(mu).log(), table(reward), beta)


def proposition_4_1(d):
    """Proposition 4.1's instance: r* = (1, 0, 0), pi_ref covers y3 with probability d only, no pair holds y3."""
    return three_responses((1.0, 0.0, 0.0), ((1 - d) / 2, (1 - d) / 2, d))


def worked_example():
    """The table in this file's docstring."""
    b = three_responses((math.log(4), 0.0, 0.0), (0.5, 0.25, 0.25), beta=0.5)
    pi_star = optimal_policy(b)
    lines = ["                       y1     y2     y3  DPO loss  KL(pi||pi_ref)   J(pi)  J(pi*) - J(pi)"]
    for name, pi in {"pi_ref": b.ref, "pi*": pi_star, "DPO, m = 0.5": with_unseen_mass(b, pi_star, 0.5),
                     "DPO, m = 0.99": with_unseen_mass(b, pi_star, 0.99),
                     "HyPO, lam -> 0": nearest_to_ref(b, pi_star)}.items():
        y1, y2, y3 = pi.exp()[0]
        lines.append(f"    {name:14}  {y1:.3f}  {y2:.3f}  {y3:.3f}    {preference_loss(b, pi - b.ref, dpo):.4f}"
                     f"          {kl(b.rho, pi, b.ref):.4f} {J(b, pi):7.4f}          {gap(b, pi):.4f}")
    return "\n".join(lines) + (f"\n\n    largest pi / pi_ref of any policy (global coverage): "
                               f"{global_coverage(b.rho, b.ref):.4f}; within KL <= 0.1 (local coverage): "
                               f"{local_coverage(b.rho, b.ref, 0.1):.4f}")


# ---------------------------------------------------------------------------------------------------
# the coverage of a trained policy

def estimate(log_pi, log_ref, reward, policy_kl, beta):
    """The theory's quantities from samples, as a dict of (X,) tensors, one value a prompt.

    log_pi, log_ref, reward: (2, X, K), of K samples of pi [0] and K of pi_ref [1]; policy_kl: (X, K) estimates of
    KL(pi || pi_ref), one a sample of pi. Unbiased: kl, eps, J_pi and Z. From below: J_star, for the log of a mean is
    on average too small; and the largest ratios, which a sample can only miss. Expectations under pi* weigh all
    2K samples by pi* over the mixture of pi and pi_ref; `effective` is how many equal weights they are worth.
    """
    logratio = log_pi - log_ref  # (2, X, K)
    found = {"log_C_pi": logratio.amax((0, 2)), "kl": policy_kl.mean(-1)}
    if reward is None:
        return found
    error = reward - beta * logratio  # D, the true less the implicit reward
    weight = log_ref - torch.logaddexp(log_pi, log_ref) + math.log(2) + reward / beta  # log of pi* Z over the mixture
    weight, both_errors = (table.transpose(0, 1).flatten(1) for table in (weight, error))  # (X, 2K)
    log_z = weight.logsumexp(-1) - math.log(weight.shape[1])
    return found | {
        "V_pi": reward[0].mean(-1), "J_pi": reward[0].mean(-1) - beta * policy_kl.mean(-1), "J_star": beta * log_z,
        "eps": 2 * error[1].var(-1), "log_C_star": (reward / beta).amax((0, 2)) - log_z,
        "t1a": (weight.softmax(-1) * both_errors).sum(-1) - error[0].mean(-1),
        "effective": (2 * weight.logsumexp(-1) - (2 * weight).logsumexp(-1)).exp()}


@torch.no_grad()
def sampled(policy, ref, tokenizer, prompts, k, longest, judge, beta, seed=0):
    """The estimates of two language models, k samples of each for each prompt; also log pi / pi_ref (2, X, K)."""
    import lm

    asked = [lm.encode_prompt(tokenizer, prompt) for prompt in prompts for _ in range(k)]
    tables = []
    for i, model in enumerate((policy, ref)):
        generator = torch.Generator(model.device).manual_seed(seed + i)
        responses = lm.sample(model, asked, longest, tokenizer.eos_token_id, generator)
        batches = [(asked[j:j + 256], responses[j:j + 256]) for j in range(0, len(asked), 256)]
        log_pi, log_ref = (torch.cat([lm.logps(scored, *batch) for batch in batches]) for scored in (policy, ref))
        if i == 0:
            policy_kl = lm.reverse_kl(policy, ref, asked, responses).double().cpu().view(-1, k)  # (X, K)
        texts = [lm.decode(tokenizer, ids) for ids in responses]
        reward = judge([prompt for prompt in prompts for _ in range(k)], texts) if judge else [math.nan] * len(texts)
        tables.append(torch.stack([log_pi.cpu(), log_ref.cpu(), torch.tensor(reward)]).double().view(3, -1, k))
    log_pi, log_ref, reward = torch.stack(tables, 1)  # (2, X, K) each
    return estimate(log_pi, log_ref, reward if judge else None, policy_kl, beta), log_pi - log_ref


def load_run(run):
    """(policy, ref, tokenizer, held-out prompts, judge, settings) of a directory that a training command wrote."""
    import data
    import lm
    import task

    if not (run / "summary.json").exists() or not (run / "policy").is_dir():
        raise ValueError(f"{run}: not a finished run, for it lacks summary.json or policy/; name a directory that "
                         "hypo.py, dpo.py or rlhf.py wrote, such as runs/hypo")
    settings = json.loads((run / "summary.json").read_text(encoding="utf-8"))["settings"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ref, tokenizer = lm.load(settings.get("pi_ref", settings["model"]), data.sft_corpus, device)
    policy, _ = lm.load(str(run / "policy"), device=device)
    _, judge, _ = task.judges(argparse.Namespace(**{**settings, "device": device}))
    if settings["data"] is None:
        prompts = data.world_prompts()[1]
    elif task.has_prompts(settings["data"]):
        prompts = data.read_prompts(settings["data"])[1]
    else:
        prompts = data.load_pairs(settings["data"], 0, None, tokenizer, settings["seed"])[3]
    return policy, ref, tokenizer, prompts, judge, settings


def measure(run, n_prompts, k):
    """Print the theory's quantities for a trained policy."""
    policy, ref, tokenizer, prompts, judge, settings = load_run(Path(run))
    prompts, beta, longest = prompts[:n_prompts], settings["beta"], settings["max_new_tokens"]
    found, logratio = sampled(policy, ref, tokenizer, prompts, k, longest, judge, beta)
    print(f"{run}: {settings['algorithm']}, beta {beta}; {len(prompts)} held-out prompts, {k} samples of pi and {k} of "
          f"pi_ref for each\n\nlog pi/pi_ref, nats        min     5 %    50 %    95 %     max")
    for name, values in zip(("samples of pi", "samples of pi_ref"), logratio):
        row = values.flatten().sort().values
        print(f"  on {name:18}" + "".join(f"{row[round(q * (len(row) - 1))]:8.2f}" for q in (0, 0.05, 0.5, 0.95, 1)))
    say = lambda name, value, how, error="": print(f"{name:24}{value:10.4g} {error:10} {how}")  # noqa: E731
    by_prompt = lambda name, key, how: say(  # noqa: E731
        name, found[key].mean(), how,
        f"+- {found[key].std() / math.sqrt(len(prompts)):.2g}" if len(prompts) > 1 else "")
    print("\n                             value (+- standard error over prompts)")
    by_prompt("KL(pi || pi_ref), nats", "kl", "unbiased")
    say("log C(pi), nats", found["log_C_pi"].max(), "from below: the largest ratio seen")
    if not judge:
        return print("no judge knows this run's true reward: its error, bound and gap stay unknown")
    by_prompt("eps, pairwise error", "eps", "unbiased: beta log pi/pi_ref against the true reward, on pi_ref's samples")
    by_prompt("V(pi), true reward", "V_pi", "unbiased")
    by_prompt("J(pi) = V - beta KL", "J_pi", "unbiased")
    by_prompt("J(pi*)", "J_star", f"from below: pi* is seen through {found['effective'].median():.1f} samples' worth a "
              "prompt (median)")
    say("log C(pi*), nats", found["log_C_star"].max(), "estimated on the best responses seen")
    say("gap = J(pi*) - J(pi)", (found["J_star"] - found["J_pi"]).mean(), "from below")
    say("  <= E_pi* D - E_pi D", found["t1a"].mean(), "T1a, estimated")
    log_c, eps = max(found["log_C_pi"].max().item(), found["log_C_star"].max().item()), found["eps"].mean()
    say("  <= sqrt(C eps)", math.exp(min(log_c / 2, 700)) * eps.sqrt(), "T1c, from the C and eps above")
    say("  <= C sqrt(eps)", math.exp(min(log_c, 700)) * eps.sqrt(), "T1d, the paper's form")


# ---------------------------------------------------------------------------------------------------
# pictures

COLORS = {"DPO": "#1d4ed8", "IPO": "#0e7490", "RLHF": "#15803d", "HyPO": "#c2410c", "unseen": "#c2410c",
          "chosen": "#1d4ed8", "rejected": "#6b7280"}


def figure_of(width, titles, labels):
    """(figure, axes): panels side by side, labels a list of (x, y) axis labels."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(titles), figsize=(width, 3.8), layout="constrained")
    for axis, title, (x, y) in zip(axes, titles, labels):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def note(axis, x, y, text, color, dx=5, dy=0):
    """A direct label at a point of a line."""
    axis.annotate(text, (x, y), color=color, fontsize=9, xytext=(dx, dy), textcoords="offset points", va="center")


def gap_against_coverage(coverages=(1e1, 1e2, 1e3, 1e4, 1e6, 1e8, 1e10, 1e12)):
    """{algorithm: gaps}, one for each C_glo: 8 prompts, 8 responses, 3 of them in no pair and of mass 1 / C_glo each.

    All start at the same random table, as a network does on what it was never taught, and are trained to the end on
    the population of labels. r* in [0, 1], beta 0.5.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda f: f(8, 8, generator=generator, dtype=torch.float64)  # noqa: E731
    reward, start, seen = draw(torch.rand), draw(torch.randn), draw(torch.randn)
    unseen = torch.arange(8) >= 5
    mu = seen.masked_fill(unseen, -INF).log_softmax(-1)
    gaps = {"C_glo": coverages}
    for c in coverages:
        ref = torch.where(unseen, -math.log(c), mu + math.log1p(-3 / c))
        b = Bandit(reward.new_full((8,), 1 / 8), ref, mu, reward, 0.5)
        for name, pi in {"DPO": train_offline(b, dpo, start), "IPO": train_offline(b, ipo, start),
                         "RLHF, |r| <= 2": train_rlhf(b, 2.0, start)[0],
                         "HyPO, lam 0.001": train_hypo(b, 1e-3, start),
                         "DPO if started\nat pi_ref": train_offline(b, dpo, ref)}.items():
            gaps.setdefault(name, []).append(gap(b, pi).item())
    return gaps


def plot_gap(path):
    """Local coverage against the KL radius; gap against coverage for each algorithm."""
    figure, (left, right) = figure_of(10.5, ["Coverage of a KL ball around pi_ref", "Whom uncovered responses hurt"],
                                      [("radius eps_kl of the ball, nats", "largest ratio pi / pi_ref in the ball"),
                                       ("C_glo = 1 / pi_ref(uncovered response)", "gap J(pi*) - J(pi)")])
    radii = [0.005 * 1.25 ** i for i in range(40)]
    for d, color in ((1e-2, "#94a3b8"), (1e-4, "#64748b"), (1e-8, "#1e293b")):
        b = proposition_4_1(d)
        left.loglog(radii, [local_coverage(b.rho, b.ref, eps) for eps in radii], color=color)
        left.axhline(1 / d, color=color, lw=0.8, ls=":")
        note(left, radii[0], 1 / d, f"C_glo = {1 / d:.0e}", color, dx=0, dy=7)
    gaps = gap_against_coverage()
    coverages = gaps.pop("C_glo")
    for name, values in gaps.items():
        color = COLORS[name[:4].strip(" ,")]
        right.loglog(coverages, values, color=color, ls="--" if "if" in name else "-")
        note(right, coverages[-1], values[-1], name, color, dy={"DPO": -5, "IPO": 5}.get(name, 0))
    figure.savefig(path, dpi=130)


def plot_family(path):
    """Proposition 4.1: the losses do not see m, J does."""
    titles = ["The offline losses do not see m ...", "... and J falls as -m beta log(1 / pi_ref(y3))"]
    figure, (left, right) = figure_of(10, titles, [("m, mass on y3, which no pair holds", "population loss"),
                                                   ("m, mass on y3, which no pair holds", "J(pi_m)")])
    masses = [i / 100 for i in range(100)]
    b = proposition_4_1(0.01)
    for name, loss in (("DPO", dpo), ("IPO", ipo)):
        best = train_offline(b, loss, b.ref)
        losses = [preference_loss(b, with_unseen_mass(b, best, m) - b.ref, loss) for m in masses]
        left.plot(masses, losses, color=COLORS[name])
        note(left, 0, losses[0], f"{name}: {losses[0]:.6f}", COLORS[name], dx=4, dy=8)
    left.set_ylim(0, 1)
    for d, color in ((1e-2, "#93c5fd"), (1e-4, "#60a5fa"), (1e-8, "#2563eb"), (1e-16, "#1e3a8a")):
        b = proposition_4_1(d)
        values = [J(b, with_unseen_mass(b, optimal_policy(b), m)) for m in masses]
        right.plot(masses, values, color=color)
        note(right, masses[-1], values[-1], f"pi_ref(y3) = {d:.0e}", color)
    right.plot([0], [J(b, optimal_policy(b))], "o", color=COLORS["HyPO"], clip_on=False)
    note(right, 0, J(b, optimal_policy(b)).item(), "pi*, RLHF and HyPO", COLORS["HyPO"], dx=10, dy=5)
    note(right, 0, -36, "pi_ref(y3) = 0: -inf for every m > 0", "black", dx=0)
    figure.savefig(path, dpi=130)


def plot_extrapolation(path):
    """DPO by gradient descent on pairs that never hold the best response: with shared features, and without."""
    figure, axes = figure_of(12.5, ["Log-linear DPO finds the unseen best", "Tabular DPO cannot",
                                  "Tabular DPO: mass of unseen responses"],
                             [("gradient step", "log pi(y), nats")] * 2 + [("gradient step", "pi(unseen response)")])
    b, phi, _ = linear_example()
    log_linear = gradient_path(b, lambda theta: tilt(b.ref, phi @ theta, 1.0), torch.zeros(2, dtype=phi.dtype), 2000)
    tabular = gradient_path(b, lambda logits: logits.log_softmax(-1), b.ref, 2000)
    for axis, path_ in zip(axes, (log_linear, tabular)):
        for y, (name, color) in enumerate((("unseen best", "unseen"), ("chosen", "chosen"), ("rejected", "rejected"))):
            axis.plot(path_[:, 0, y], color=COLORS[color])
            note(axis, 2000, path_[-1, 0, y], name, COLORS[color])
        axis.set_ylim(-8.5, 0.3)
    for ref, text in (((0.05, 0.75, 0.2), "pi_ref favours\nthe loser"), ((0.4, 0.4, 0.2), "pi_ref is\neven")):
        b = three_responses((2.0, 0.0, 0.0), ref)
        masses = gradient_path(b, lambda logits: logits.log_softmax(-1), b.ref, 600)[:, 0, 2].exp()
        axes[2].plot(masses, color=COLORS["unseen"])
        note(axes[2], 600, masses[-1], text, COLORS["unseen"])
    axes[2].set_ylim(0, 0.4)
    figure.savefig(path, dpi=130)


# ---------------------------------------------------------------------------------------------------
# the tour

def linear_example():
    """(bandit, phi, theta*): the best of three responses is in no pair, but shares its features with the others."""
    phi = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]], dtype=torch.float64)
    return three_responses((10.0, 5.5, 1.0), (1 / 3, 1 / 3, 1 / 3), (0.0, 0.5, 0.5)), phi, phi.new_tensor([10.0, 1.0])


def holds(statement, sides, tolerance=1e-9):
    """Are the sides in ascending order, or equal if the statement's first line says so, up to rounding?"""
    if "<=" in statement.__doc__.splitlines()[0]:
        return all(bool(((a <= c + tolerance * (1 + c.abs())) | (c == INF)).all()) for a, c in zip(sides, sides[1:]))
    return all(torch.allclose(a, c, tolerance, tolerance) for a, c in zip(sides, sides[1:]))


def show(statement, *args):
    """Print a statement's first line and its sides; of a statement for every prompt, at the tightest prompt."""
    sides, first = statement(*args), statement.__doc__.splitlines()[0]
    tightest = (sides[0] / sides[1]).argmax()
    values = [f"{side.flatten()[tightest if side.dim() else 0]:.4g}" for side in sides]
    print(f"  {first}\n      {('  <=  ' if '<=' in first else '  =  ').join(values)}"
          f"   {'holds' if holds(statement, sides) else 'VIOLATED'}")


def row(pi):
    """The probabilities of a one-prompt policy, as text."""
    return "(" + ", ".join(f"{p:.4f}" for p in pi.exp()[0]) + ")"


def tour_of_proposition_4_1():
    """The instance, its numbers, and what gradient descent does to it."""
    print("  Proposition 4.1. r* = (1, 0, 0), beta = 1, pi_ref(y3) = d; pairs hold y1 and y2 only. The policies pi_m\n"
          "  with any mass m on y3 all have the least DPO loss, and eps = 0. RLHF has r_hat = (1, 0, 2).\n"
          "            d   J(pi*)   J(pi_m), m = 0.1      0.5      0.99   IPO, 0.5   gaps: RLHF   HyPO, lam -> 0")
    for d in (1e-2, 1e-4, 1e-8, 1e-16, 0.0):
        b = proposition_4_1(d)
        pi_star, of_ipo = optimal_policy(b), b.ref.new_tensor([[math.tanh(0.5) / 2, 0, -INF]])
        values = [J(b, with_unseen_mass(b, pi, m)) for pi, m in
                  ((pi_star, 0.1), (pi_star, 0.5), (pi_star, 0.99), (of_ipo, 0.5))]
        rlhf, hypo = tilt(b.ref, b.ref.new_tensor([[1.0, 0.0, 2.0]]), b.beta), nearest_to_ref(b, pi_star)
        print(f"    {d:9.0e} {J(b, pi_star):8.4f}   {values[0]:15.4f} {values[1]:8.4f}  {values[2]:8.4f}   "
              f"{values[3]:8.4f}     {gap(b, rlhf):8.1e}         {gap(b, hypo):8.1e}")
    b = three_responses((math.log(4), 0.0, 0.0), (0.5, 0.25, 0.25), beta=0.5)
    phi = b.ref.new_tensor([[[1.0], [0.0], [2.0]]])
    dpo_policy, hypo_policy = train_log_linear(b, phi), train_log_linear(b, phi, 0.25)
    print("  That is about the set of minimisers. Descent returns one of them; for the three responses of part 1\n"
          f"      DPO, tabular softmax from pi_ref   {row(train_offline(b, dpo, b.ref))}\n"
          f"      DPO, tabular softmax from uniform  {row(train_offline(b, dpo, torch.zeros_like(b.ref)))}\n"
          f"      DPO, shared feature (1, 0, 2)      {row(dpo_policy)}  the unseen y3 takes over\n"
          f"      HyPO, the same, lam 0.25           {row(hypo_policy)}")
    for word, r3 in (("best", 2 * math.log(4)), ("worst", 0.0)):
        b = b._replace(reward=b.ref.new_tensor([[math.log(4), 0.0, r3]]))
        print(f"      gap of the shared feature where y3 is {word:5}  DPO {gap(b, dpo_policy):.4f}, HyPO "
              f"{gap(b, hypo_policy):.4f}")


def tour(out):
    """The slides in order: each statement with its sides."""
    ref = torch.tensor([[0.6, 0.3, 0.099, 0.001], [0.2, 0.2, 0.3, 0.3]], dtype=torch.float64).log()
    rho, reward = ref.new_tensor([0.7, 0.3]), ref.new_tensor([[0.3, 0.7, 0.1, 0.9], [0.0, 1.0, 0.5, 0.2]])
    b, r_hat = Bandit(rho, ref, ref, reward, 0.5), ref.new_tensor([[0.4, 0.5, 0.1, 0.0], [0.2, 0.9, 0.7, 0.2]])
    pi = (optimal_policy(b) + ref.new_tensor([-0.4, 0.2, 0.3, 0.5])).log_softmax(-1)
    print("1. The objective. Three responses, pairs of y1 and y2 only:\n\n" + worked_example() + "\n\n  From here on, "
          "unless another is named: 2 prompts, 4 responses, mu = pi_ref, beta = 0.5, r* and r_hat in [0, 1].")
    show(t0a_gap_is_kl, b, pi)
    show(t0b_gap_is_variance, b, r_hat)

    print("\n2. Global and local coverage (Assumptions 4.1 and 4.2)")
    print(f"  C_glo = {global_coverage(b.rho, b.mu):.1f};  C_eps at eps_kl = " + ", ".join(
        f"{eps_kl}: {local_coverage(b.rho, b.ref, eps_kl):.1f}" for eps_kl in (0.0, 0.01, 0.1, 1.0, 10.0)))

    print("\n3. Global coverage is enough for DPO, and necessary (Assumption 4.3, Proposition 4.1)")
    for statement in (t1a_reward_error, t1b_cauchy_schwarz, t1c_coverage, t1d_paper_form):
        show(statement, b, r_hat)
    show(t2_dpo_global, b, pi)
    tour_of_proposition_4_1()

    print("\n4. For online RLHF local coverage is enough (Assumption 4.4, Lemma 4.1, Theorem 4.2)")
    for statement in (t3a_kl_of_tilt, t3b_lemma_4_1, t3c_ratio_of_tilt, t4_rlhf_local, t7_fast_rate, t10_log_loss):
        show(statement, b, r_hat)
    for statement in (t8_value, t9_approximate, t9_kl):
        show(statement, b, r_hat, pi)
    show(finite_sample, 0.5, (1.0, 0.8, -1.0, 0.0), 200, 0.1)

    print("\n5. HyPO: local coverage is enough, for online samples hold its KL")
    show(t5_hypo_constraint, b, pi)
    show(t6_hypo_kl, b, pi_lam := train_hypo(b, 0.1, b.ref))
    show(t6_hypo_loss, b, pi_lam, 0.1)

    print("\n6. Function approximation: features may cover what responses do not")
    c, phi, theta_star = linear_example()
    show(t11_linear, c, phi, theta_star, theta_star + theta_star.new_tensor([-1.0, 1.0]))
    print(f"  Its instance: r* = (10, 5.5, 1), pairs of y2 and y3 only; pi* = {row(optimal_policy(c))}\n"
          f"      log-linear DPO {row(train_log_linear(c, phi))}  the unseen best rises, the chosen y2 falls\n"
          f"      tabular DPO    {row(tabular_limit(c))}  gap {gap(c, tabular_limit(c)):.4f}\n"
          "  Tabular DPO on pairs of y1 and y2, r* = (2, 0, 0), beta = 1:")
    for probabilities in ((0.05, 0.75, 0.2), (0.4, 0.4, 0.2)):
        c = three_responses((2.0, 0.0, 0.0), probabilities)
        print(f"      from pi_ref = {probabilities} to {row(tabular_limit(c))}")

    out.mkdir(parents=True, exist_ok=True)
    for name, plot in {"gap": plot_gap, "family": plot_family, "extrapolation": plot_extrapolation}.items():
        plot(out / f"coverage-{name}.png")
    print(f"\nPictures: {out}/coverage-gap.png, coverage-family.png, coverage-extrapolation.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="measure this run of hypo.py, dpo.py or rlhf.py; without it, the tour")
    add("--out", type=Path, default=Path("runs/coverage"), help="where the tour's pictures go (default runs/coverage)")
    add("--prompts", type=int, default=64, help="held-out prompts to measure a run on (default 64)")
    add("--samples", type=int, default=64, help="responses of pi and of pi_ref sampled for each (default 64)")
    args = parser.parse_args(argv)
    if args.prompts < 2 or args.samples < 2:
        parser.error("--prompts and --samples must be at least 2")
    if args.run is None:
        return tour(args.out)
    try:
        measure(args.run, args.prompts, args.samples)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
