"""Coverage: why DPO needs data that cover every policy, and RLHF and HyPO only those near pi_ref.

    python coverage.py              # a tour of the theory; pictures in runs/coverage (15 seconds)
    python coverage.py runs/hypo    # the quantities of the theory, measured on a trained policy

The theory is that of Song, Swamy, Singh, Bagnell and Sun 2024, "The Importance of Online Data:
Understanding Preference Fine-tuning via Coverage" (arXiv 2406.01462). Prompts and responses are
finite sets here, so every expectation is a sum. A statement is a function that returns its sides,
smallest first; its docstring has the idea of the proof. The paper's statements have its numbers;
T0 to T11 go beyond the slides. Where the paper writes O(...), a constant is given and proved.

The smallest case that shows it all has three responses. Preference pairs hold y1 and y2 only, with
P(y1 beats y2) = 0.8; beta = 0.5 and r* = (log 4, 0, 0). All policies with one ratio of y1 to y2
have one DPO loss, whatever mass m they put on y3. HyPO's KL term tells them apart:

                       y1     y2     y3  DPO loss  KL(pi||pi_ref)   J(pi)  J(pi*) - J(pi)
    pi_ref          0.500  0.250  0.250    0.6931          0.0000  0.6931          0.3769
    pi*             0.941  0.029  0.029    0.5968          0.4694  1.0700          0.0000
    DPO, m = 0.5    0.485  0.015  0.500    0.5968          0.2892  0.5276          0.5425
    DPO, m = 0.99   0.010  0.000  0.990    0.5968          1.3222 -0.6477          1.7177
    HyPO, lam -> 0  0.671  0.021  0.308    0.5968          0.2097  0.8249          0.2451

    largest pi / pi_ref of any policy (global coverage): 4.0000; within KL <= 0.1 (local coverage): 1.8267

Symbols, most of them the slides' (where pi_hat is pi_rlhf):

    pi_ref, mu       the policy before preference tuning; where the responses of a pair come from
    pi*, pi_hat      the best policies for the true reward r* and for any other, r_hat
    D, eps           r* - r_hat, and how large it is on the data: eps_reward or eps_dpo
    C_glo, C_eps_kl  global_coverage, local_coverage
    R, R'            reward_range, the spread of r*; reward_bound, the largest |r_hat|

Policies `pi`, `ref`, `mu` are tables (X, Y) of log-probabilities, float64, with -inf for what never
comes. A reward is a table (X, Y); only its differences between responses of one prompt matter. KL
without a word is KL(pi || pi_ref) in nats, the mean over prompts. A ratio 0/0 is 0.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

INF = math.inf
TINY = 5e-324  # the least float above 0, for a probability that rounds to 0: inf times it is inf


# ---- definitions: policies, rewards, values, losses

class Bandit(NamedTuple):
    """A prompt x ~ rho, then a single action: the whole response y ~ pi(.|x)."""
    rho: torch.Tensor  # (X,) probabilities of the prompts
    ref: torch.Tensor  # (X, Y) log pi_ref
    mu: torch.Tensor  # (X, Y) log-probs of the responses in the pairs; the paper has mu = pi_ref
    reward: torch.Tensor  # (X, Y) r*; Bradley-Terry labels: P(y beats z) = sigmoid(r*(y) - r*(z))
    beta: float  # price of a nat of KL


def inner(pi, values):
    """(X,) sum over y of pi(y|x) values(x, y), where what has probability 0 does not count."""
    return (pi.exp().clamp(min=TINY) * values.masked_fill(pi == -INF, 0)).sum(-1)


def average(rho, values):
    """Sum over x of rho(x) values(x), where a prompt that never comes does not count."""
    return (rho * values.masked_fill(rho == 0, 0)).sum(-1)


def mean(rho, pi, values):
    """E_{x ~ rho, y ~ pi} values(x, y)."""
    return average(rho, inner(pi, values))


def mean_pairs(rho, mu, values):
    """E_{x ~ rho; y, z ~ mu} values(x, y, z), two independent responses to one prompt."""
    return average(rho, inner(mu, inner(mu[:, None], values)))


def differences(table):
    """(X, Y, Y) table(x, y) - table(x, z); inf - inf, as of a response with itself, is 0."""
    y, z = table[:, :, None], table[:, None, :]
    return (y - z).masked_fill((y == z) & y.isinf(), 0)


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
    """(X,) log Z(x) = log E_{y ~ pi_ref} exp(reward / beta). J(pi*) is beta E_rho log Z."""
    return (ref + reward / beta).logsumexp(-1)


def tilt(ref, reward, beta):
    """pi_ref exp(reward / beta) / Z, the policy of the largest E reward - beta KL(pi || pi_ref)."""
    return (ref + reward / beta).log_softmax(-1)


def optimal_policy(b):
    """pi* = argmax J."""
    return tilt(b.ref, b.reward, b.beta)


def gap(b, pi):
    """J(pi*) - J(pi), what pi falls short of the best policy."""
    return J(b, optimal_policy(b)) - J(b, pi)


def implicit_reward(pi, ref, beta):
    """beta log pi / pi_ref, the reward that pi is the best policy for: its tilt is pi again."""
    return torch.where((pi == -INF) & (ref == -INF), 0.0, beta * (pi - ref))


def spread(reward, ref):
    """(X,) largest difference of the reward between two responses that pi_ref covers."""
    covered = ref > -INF
    return reward.masked_fill(~covered, -INF).amax(-1) - reward.masked_fill(~covered, INF).amin(-1)


def reward_range(b):
    """R, the largest spread of r* at a prompt."""
    return spread(b.reward, b.ref)[b.rho > 0].max()


# offline losses of a labelled pair; h is the winner's log pi / pi_ref less the loser's

def dpo(h, beta):
    """DPO's loss: -log sigmoid(beta h)."""
    return -torch.nn.functional.logsigmoid(beta * h)


def ipo(h, beta):
    """IPO's loss: (h - 1 / (2 beta))^2.

    With this target the best policy maximises P(y beats mu) - beta KL(pi || pi_ref): a larger beta
    holds it nearer to pi_ref, as in DPO. The slides print beta / 2. There a larger beta holds less.
    """
    return (h - 1 / (2 * beta)).square()


def preference_loss(b, logratio, loss):
    """An offline loss on unlimited data: E loss(h) over y, z ~ mu with Bradley-Terry labels."""
    # logratio: (X, Y) log pi / pi_ref, or a reward model over beta. Only its differences count, and
    # only on responses that mu has. This is all that Proposition 4.1 uses of a loss
    h = differences(logratio.masked_fill(b.mu == -INF, 0))  # (X, Y, Y), as if y had won against z
    wins, loses = (differences(r).sigmoid().clamp(min=TINY) for r in (b.reward, -b.reward))
    return mean_pairs(b.rho, b.mu, wins * loss(h, b.beta) + loses * loss(-h, b.beta))


# ---- how a statement is written down

class Statement(NamedTuple):
    """What a statement says, and the function that computes its sides. Call it as that function."""
    text: str
    relation: str  # "=" or "<=", between each side and the next
    sides: Callable

    def __call__(self, *args):
        return self.sides(*args)


def equality(text):
    """Decorator of a function whose sides are equal."""
    return partial(Statement, text, "=")


def inequality(text):
    """Decorator of a function whose sides are in ascending order."""
    return partial(Statement, text, "<=")


def holds(statement, sides, tolerance=1e-9):
    """Are the sides equal, or in ascending order, up to rounding?"""
    if statement.relation == "=":
        return all(torch.allclose(a, c, tolerance, tolerance) for a, c in zip(sides, sides[1:]))
    # `a <= c` is not redundant: with c = -inf the other side is no number
    return all(((a <= c) | (a <= c + tolerance * (1 + c.abs()))).all()
               for a, c in zip(sides, sides[1:]))


def times(coverage, error):
    """A bound coverage * error. Without coverage there is none, even if the error is 0."""
    return torch.where(coverage == INF, coverage, coverage * error)


def bounds(c, eps):
    """(sqrt(c eps), c sqrt(eps)). The second is the paper's form, larger as c >= 1."""
    return times(c.sqrt(), eps.sqrt()), times(c, eps.sqrt())  # roots first: c eps may overflow


# ---- Assumptions 4.1 to 4.4: coverage, and the error of a reward on the data

def policy_coverage(rho, pi, mu):
    """C(pi) = largest pi(y|x) / mu(y|x) over prompts with rho(x) > 0. At least 1."""
    return torch.where(pi == -INF, 0.0, (pi - mu).exp())[rho > 0].max()


def global_coverage(rho, mu):
    """Assumption 4.1, C_glo: the largest C(pi) of all policies, so max 1 / mu.

    It is inf if one response is not covered: a policy may say just this one.
    """
    return (-mu[rho > 0]).exp().max()


def local_coverage(rho, ref, eps_kl, mu=None):
    """Assumption 4.2, C_eps_kl: the largest C(pi) where E_rho KL(pi || pi_ref) <= eps_kl. Exact.

    C(pi) is the largest pi(y|x) / mu(y|x), mu being pi_ref if it is not given, over what may come:
    rho(x) > 0 and pi_ref(y|x) > 0. To raise p = pi_ref(y|x) to a at the least KL, a policy changes
    prompt x alone, and there only the share of y against the rest, as if it were a coin. This costs
    rho(x) kl(a || p), where kl(a || p) = a log(a / p) + (1 - a) log((1 - a) / (1 - p)), so the
    largest a has kl(a || p) = eps_kl / rho(x). Bisection finds log(a / p), exact for tiny p too.
    """
    if eps_kl == INF:
        return global_coverage(rho, ref if mu is None else mu)
    covered = (ref > -INF) & (rho > 0)[:, None]
    p = ref.exp().clamp(max=1)
    radius = (eps_kl / rho)[:, None]
    low, high = torch.zeros_like(ref), -ref.masked_fill(~covered, 0)  # log(a / p): a = p to a = 1
    for _ in range(60):
        middle = (low + high) / 2
        a = (ref + middle).exp().clamp(max=1)
        rise = -a * torch.expm1(-middle)  # a - p; as a difference it would lose its digits
        cost = a * middle + torch.special.xlog1py(1 - a, -(rise / (1 - p)).clamp(max=1))
        inside = cost <= radius
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (ref + high - (ref if mu is None else mu))[covered].exp().max()


def pointwise_error(rho, mu, reward, r_hat, c=None):
    """Assumption 4.3 as the slides print it: E_{x ~ rho, y ~ mu} (r_hat(x, y) + c(x) - r*(x, y))^2.

    For DPO r_hat is the implicit reward and c = beta log Z; the slides have Z in the denominator, so
    theirs is 1 / Z here. No preference shows c, so it is free.
    """
    error = r_hat - reward
    c = -inner(mu, error) if c is None else c  # (X,) the best c(x), if none is given
    return mean(rho, mu, (error + c[:, None]).square())


def pairwise_error(rho, mu, reward, r_hat):
    """Assumption 4.3 as labels identify it: E_{x; y, z ~ mu} (D(y) - D(z))^2. c(x) cancels."""
    # equals 2 E_x Var_mu(D); the pointwise error at the best c(x) is E_x Var_mu(D)
    return mean_pairs(rho, mu, differences(reward - r_hat).square())


def eps_reward(b, r_hat):
    """eps_reward: the pairwise error of a reward model."""
    return pairwise_error(b.rho, b.mu, b.reward, r_hat)


def eps_dpo(b, pi):
    """eps_dpo (for HyPO's policy eps_hypo): the pairwise error of a policy's implicit reward."""
    return eps_reward(b, implicit_reward(pi, b.ref, b.beta))


def reward_bound(r_hat):
    """Assumption 4.4: R', the largest |r_hat(x, y)|. A reward model can be clipped to it."""
    return r_hat.abs().max()


# ---- Proposition 4.1: DPO needs global coverage (and with it, DPO is fine)

def with_unseen_mass(b, pi, m):
    """(1 - m) pi in its ratios among the responses that mu has, m spread evenly over the others.

    No offline loss tells these policies apart, whatever m. If pi minimises it, all of them do.
    """
    seen = b.mu > -INF
    mass = torch.as_tensor(m, dtype=pi.dtype)
    return torch.where(seen, torch.log1p(-mass) + pi.masked_fill(~seen, -INF).log_softmax(-1),
                       (mass / (~seen).sum(-1, keepdim=True)).log())


def slides_construction(b, eps):
    """The slides' own policy: beta log(pi / pi_ref) = r* - sqrt(eps) on what mu has, y1 and y2.

    With Z = 1 (c = 0), as on the slides, its pointwise error is eps: Assumption 4.3 holds. Its mass on
    y1 and y2 is exp(-sqrt(eps) / beta), and the rest lies on y3. At the best c, and in the pairwise
    form, all policies of the family with_unseen_mass have error 0.
    """
    m = -math.expm1(-math.sqrt(eps) / b.beta)  # 1 - exp(-sqrt(eps) / beta), the rest
    return with_unseen_mass(b, optimal_policy(b), m)


@inequality("Proposition 4.1: J(pi) <= max r* + beta log 2 - beta E_rho m log(1 / pi_ref(unseen))")
def proposition_4_1(b, pi):
    """m(x) is pi's mass on the responses in no pair. J falls to -inf as pi_ref(unseen) goes to 0.

    A KL does not grow when responses are merged into seen and unseen. The KL of these two coins is
    at least m log(1 / pi_ref(unseen)) - log 2.
    """
    seen = b.mu > -INF
    log_m, log_rare = (table.masked_fill(seen, -INF).logsumexp(-1, True) for table in (pi, b.ref))
    best = b.reward[b.rho > 0].max() + b.beta * math.log(2)
    return J(b, pi), best + b.beta * mean(b.rho, log_m, log_rare)


@inequality("DPO: J(pi*) - J(pi) <= sqrt(C_glo eps_dpo) <= C_glo sqrt(eps_dpo)")
def dpo_global(b, pi):
    """For every policy with pi > 0 where mu > 0. It is the tilt of its implicit reward; then T1."""
    return gap(b, pi), *bounds(global_coverage(b.rho, b.mu), eps_dpo(b, pi))


# ---- Lemma 4.1 and Theorem 4.2: online RLHF needs local coverage

@inequality("Lemma 4.1: KL(pi_rlhf || pi_ref) <= min(2R' / beta, R'^2 / (2 beta^2)) <= 2R' / beta")
def lemma_4_1(b, r_hat):
    """The mean of T3a, with S <= 2R'. No data, no coverage: a bounded reward suffices."""
    bound = 2 * reward_bound(r_hat) / b.beta  # S / beta of T3a at most
    return kl(b.rho, tilt(b.ref, r_hat, b.beta), b.ref), torch.minimum(bound, bound ** 2 / 8), bound


@inequality("Theorem 4.2: J(pi*) - J(pi_rlhf) <= sqrt(C eps_reward) <= C sqrt(eps_reward)")
def theorem_4_2(b, r_hat):
    """C = C_eps_kl at eps_kl = max(2R', R) / beta. By Lemma 4.1 pi_rlhf is in the ball; then T1."""
    # pi* must be in the ball too; the slides have 2R' / beta, as they take R <= 2R' for granted
    eps_kl = max(2 * reward_bound(r_hat), reward_range(b)) / b.beta
    c = local_coverage(b.rho, b.ref, eps_kl, b.mu)
    return gap(b, tilt(b.ref, r_hat, b.beta)), *bounds(c, eps_reward(b, r_hat))


# ---- HyPO: offline pairs, and online samples that keep the KL ball small

def nearest_to_ref(b, pi):
    """Of the policies with pi's ratios among the responses of mu, the one of least KL to pi_ref.

    The offline loss is the same for all of them, so HyPO's penalty picks this one, at any lam > 0.
    With q = pi among the seen responses and K = E_q log q / pi_ref it is proportional to q exp(-K)
    there, and to pi_ref elsewhere.
    """
    seen = b.mu > -INF
    q = pi.masked_fill(~seen, -INF).log_softmax(-1)
    return torch.where(seen, q - inner(q, q - b.ref)[:, None], b.ref).log_softmax(-1)


@inequality("HyPO: J(pi*) - J(pi) <= sqrt(C eps_hypo) <= C sqrt(eps_hypo)")
def hypo_local(b, pi):
    """DPO's bound, for every policy. C = C_eps_kl of the smallest ball that holds it and pi*."""
    eps_kl = max(kl(b.rho, policy, b.ref) for policy in (pi, optimal_policy(b)))
    c = local_coverage(b.rho, b.ref, eps_kl, b.mu)
    return gap(b, pi), *bounds(c, eps_dpo(b, pi))


@inequality("T6, HyPO's KL: KL(pi_lam) <= KL(pi*) <= min(R / beta, R^2 / (8 beta^2))")
def t6_hypo_kl(b, pi_lam):
    """pi_lam minimises DPO loss + lam KL. pi* minimises the loss, so pi_lam's gain is in its KL."""
    r = reward_range(b) / b.beta  # T3a for r_hat = r*
    of_lam, of_star = kl(b.rho, pi_lam, b.ref), kl(b.rho, optimal_policy(b), b.ref)
    return of_lam, of_star, torch.minimum(r, r * r / 8)


@inequality("T6, HyPO's fit: L(pi_lam) - L(pi*) <= lam (KL(pi*) - KL(pi_lam)) <= lam R / beta")
def t6_hypo_loss(b, pi_lam, lam):
    """The same comparison, read the other way. L is the DPO loss: what the penalty costs in fit."""
    pi_star = optimal_policy(b)
    excess = preference_loss(b, pi_lam - b.ref, dpo) - preference_loss(b, pi_star - b.ref, dpo)
    saved = kl(b.rho, pi_star, b.ref) - kl(b.rho, pi_lam, b.ref)
    return excess, lam * saved, lam * reward_range(b) / b.beta


# ---- beyond the slides: the steps of the proofs, other rates, values, finite samples

@equality("T0a: J(pi*) - J(pi) = beta KL(pi || pi*), for every policy")
def t0a_gap_is_kl(b, pi):
    """Put log pi* = log pi_ref + r* / beta - log Z into the KL."""
    return gap(b, pi), b.beta * kl(b.rho, pi, optimal_policy(b))


@equality("T0b: J(pi*) - J(pi_hat) = E_rho integral_0^1 t Var_{pi_t}(D) dt / beta")
def t0b_gap_is_variance(b, r_hat, nodes=200):
    """pi_t = tilt(r* - t D) goes from pi* at t = 0 to pi_hat at t = 1.

    By T0a the gap is beta KL(pi_1 || pi*). d/dt log pi_t = -(D - E_{pi_t} D) / beta, so the slope
    of beta KL(pi_t || pi*) in t is t Var_{pi_t}(D) / beta.
    """
    # a weighted sum over nodes, exact to rounding while the spread of D is below some 100 beta
    t, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(nodes))  # on [-1, 1]
    t, weight = (t + 1) / 2, weight / 2  # on [0, 1]
    error = b.reward - r_hat
    pi_t = tilt(b.ref, b.reward - t[:, None, None] * error, b.beta)  # (nodes, X, Y)
    variance = inner(pi_t, (error - inner(pi_t, error)[..., None]).square())  # (nodes, X)
    return gap(b, tilt(b.ref, r_hat, b.beta)), (weight * t) @ variance @ b.rho / b.beta


@inequality("T1: J(pi*) - J(pi_hat) <= T1a <= T1b <= T1c <= sqrt(C eps) <= T1d <= C sqrt(eps)")
def t1_chain(b, r_hat):
    """The common proof of DPO's bound, Theorem 4.2 and HyPO's: C is C_glo, or that of a ball.

    T1a = E_{pi*} D - E_{pi_hat} D. pi_hat maximises J with r_hat for r*, and the KL terms cancel.
    T1b = sqrt(E_rho sum_y (pi* - pi_hat)^2 / mu) sqrt(eps / 2). pi* - pi_hat sums to 0, so D may be
          centred under mu; then Cauchy-Schwarz. Equal for one prompt and two responses.
    T1c = sqrt(C L1 eps / 2), L1 = E_rho sum_y |pi* - pi_hat| <= 2, for |pi* - pi_hat| <= C mu.
    T1d = sqrt(C(pi*) C(pi_hat) eps): the paper's step, larger as C(pi) >= 1.
    """
    pi_star, pi_hat, eps = optimal_policy(b), tilt(b.ref, r_hat, b.beta), eps_reward(b, r_hat)
    c_star, c_hat = (policy_coverage(b.rho, pi, b.mu) for pi in (pi_star, pi_hat))
    c = max(c_star, c_hat)
    t1a = mean(b.rho, pi_star, b.reward - r_hat) - mean(b.rho, pi_hat, b.reward - r_hat)
    change = pi_star.exp() - pi_hat.exp()  # (X, Y)
    ratio = torch.where(change == 0, 0.0, change * (-b.mu / 2).exp())  # its square may overflow
    t1b = bounds(average(b.rho, ratio.square().sum(-1)), eps / 2)[0]
    t1c = bounds(c, average(b.rho, change.abs().sum(-1)) * eps / 2)[0]
    t1d = times(c_star.sqrt() * c_hat.sqrt(), eps.sqrt())  # the product c_star c_hat may overflow
    half, paper = bounds(c, eps)
    return gap(b, pi_hat), t1a, t1b, t1c, half, t1d, paper


@inequality("T3a: KL(pi_hat(.|x) || pi_ref(.|x)) <= min(S / beta, S^2 / (8 beta^2))")
def t3a_kl_of_tilt(b, r_hat):
    """S(x) = spread of r_hat. pi_hat beats pi_ref on r_hat; Hoeffding: Var <= S^2 / 4 in T0b."""
    pi_hat, s = tilt(b.ref, r_hat, b.beta), spread(r_hat, b.ref) / b.beta
    return inner(pi_hat, pi_hat - b.ref), torch.minimum(s, s * s / 8)  # (X,) each


@inequality("T3c: max_y pi_hat(y|x) / pi_ref(y|x) <= exp(S / beta)")
def t3c_ratio_of_tilt(b, r_hat):
    """Z >= exp(min r_hat / beta)."""
    pi_hat = tilt(b.ref, r_hat, b.beta)
    ratio = torch.where(pi_hat == -INF, 0.0, (pi_hat - b.ref).exp())  # (X, Y)
    return ratio.amax(-1), (spread(r_hat, b.ref) / b.beta).exp()


@inequality("T7, fast rate: J(pi*) - J(pi_hat) <= C_int eps / (4 beta), C_int = max_t C(pi_t)")
def t7_fast_rate(b, r_hat):
    """T0b with Var_{pi_t}(D) <= C(pi_t) eps / 2. The integral of t is 1/2.

    pi_t(y) grows with t while D(y) < E_{pi_t} D (the slope in T0b), and this mean falls. So pi_t(y)
    has one peak over t in [0, 1]. Bisection finds it, for each y apart.
    """
    error = b.reward - r_hat
    low, high = torch.zeros_like(error), torch.ones_like(error)  # (X, Y), a t for each response
    for _ in range(60):
        t = (low + high) / 2
        pi_t = tilt(b.ref[:, None], b.reward[:, None] - t[:, :, None] * error[:, None], b.beta)
        rising = error < inner(pi_t, error[:, None])  # (X, Y)
        low, high = torch.where(rising, t, low), torch.where(rising, high, t)
    peaks = pi_t.diagonal(dim1=1, dim2=2)  # (X, Y) of (X, Y, Y): each response at its own t
    c = policy_coverage(b.rho, peaks, b.mu)
    return gap(b, tilt(b.ref, r_hat, b.beta)), times(c, eps_reward(b, r_hat) / (4 * b.beta))


@inequality("T8, value alone: V(pi) - V(pi_hat) <= sqrt(C eps) + beta KL(pi) - beta KL(pi_hat)")
def t8_value(b, r_hat, pi):
    """For any policy pi; C = max(C(pi), C(pi_hat)). As T1, but the KL terms do not cancel."""
    pi_hat, eps = tilt(b.ref, r_hat, b.beta), eps_reward(b, r_hat)
    cost = b.beta * (kl(b.rho, pi, b.ref) - kl(b.rho, pi_hat, b.ref))  # what V leaves out of J
    c = max(policy_coverage(b.rho, policy, b.mu) for policy in (pi, pi_hat))
    return V(b, pi) - V(b, pi_hat), bounds(c, eps)[0] + cost


@inequality("T9, approximate RLHF: J(pi*) - J(pi) <= sqrt(C eps) + e <= sqrt(C_eps_kl eps) + e")
def t9_approximate(b, r_hat, pi):
    """e is what pi falls short of the best policy for r_hat. T1, Theorem 4.2 carry it along."""
    e, eps = gap(b._replace(reward=r_hat), pi), eps_reward(b, r_hat)
    c = max(policy_coverage(b.rho, policy, b.mu) for policy in (pi, optimal_policy(b)))
    radius = max(2 * reward_bound(r_hat) + e, reward_range(b)) / b.beta  # of a ball that holds both
    of_ball = local_coverage(b.rho, b.ref, radius, b.mu)
    return gap(b, pi), bounds(c, eps)[0] + e, bounds(of_ball, eps)[0] + e


@inequality("T9, its KL: KL(pi || pi_ref) <= (2R' + e) / beta")
def t9_kl(b, r_hat, pi):
    """Lemma 4.1 for such a policy."""
    e = gap(b._replace(reward=r_hat), pi)
    return kl(b.rho, pi, b.ref), (2 * reward_bound(r_hat) + e) / b.beta


def label_kl(u_star, u):
    """KL of coins sigmoid(u*), sigmoid(u): softplus(u) - softplus(u*) - sigmoid(u*) (u - u*)."""
    v = torch.where(u_star > 0, u_star - u, u - u_star)  # the step from u*
    u_star = -u_star.abs()  # both signs are turned where u* > 0: its coin is tiny, not nearly 1
    p, softplus = u_star.sigmoid(), torch.nn.functional.softplus
    small = torch.log1p(p * torch.expm1(v.clamp(max=1)))  # keeps the digits that cancel below
    return torch.where(v < 1, small, softplus(u_star + v) - softplus(u_star)) - p * v


@inequality("T10, from log-loss to error: eps <= (L(r_hat) - L(r*)) / (2 kappa^2)")
def t10_log_loss(b, r_hat):
    """L is the Bradley-Terry log-loss, M the largest margin of r* or r_hat between seen responses.

    The excess of L is a KL between labels, at least twice the squared difference of their
    probabilities (Pinsker). On [-M, M] the slope of sigmoid is at least kappa = sigmoid(M)
    sigmoid(-M), about exp(-M). Labels say little of large margins: this is why rewards are bounded.
    """
    m = torch.maximum(spread(b.reward, b.mu), spread(r_hat, b.mu))[b.rho > 0].max()
    kappa = m.sigmoid() * (-m).sigmoid()  # sigmoid'(M)
    excess = mean_pairs(b.rho, b.mu, label_kl(differences(b.reward), differences(r_hat)))
    # where kappa^2 underflows to 0, there is no bound
    return eps_reward(b, r_hat), torch.where(kappa ** 2 == 0, INF, excess / (2 * kappa ** 2))


@inequality("T11, linear rewards: J(pi*) - J(pi_hat) <= sqrt(eps v^T Sigma^+ v)")
def t11_linear(b, phi, theta_star, theta):
    """r* = <theta*, phi> and r_hat = <theta, phi>; phi: (X, Y, D) features.

    With v = E_{pi*} phi - E_{pi_hat} phi, T1a is <theta* - theta, v>; then Cauchy-Schwarz, with
    Sigma = E (phi(y) - phi(z)) (phi(y) - phi(z))^T over pairs of mu. It is finite if v lies in
    Sigma's range, even if mu misses responses and C = inf: features extrapolate.
    """
    b, r_hat = b._replace(reward=phi @ theta_star), phi @ theta
    pi_star, pi_hat, features = optimal_policy(b), tilt(b.ref, r_hat, b.beta), phi.unbind(-1)
    v = torch.stack([mean(b.rho, pi_star, f) - mean(b.rho, pi_hat, f) for f in features])  # (D,)
    sigma = torch.stack([mean_pairs(b.rho, b.mu, differences(f) * differences(g))
                         for f in features for g in features]).view(len(v), -1)  # (D, D)
    inverse = torch.linalg.pinv(sigma, hermitian=True, rtol=1e-10)  # Sigma^+
    outside = (v - sigma @ inverse @ v).norm() > 1e-7 * v.norm()  # the pairs do not show v
    bound = (eps_reward(b, r_hat) * (v @ inverse @ v)).sqrt()
    return gap(b, pi_hat), torch.where(outside, INF, bound)


def finite_sample_error(n, candidates, delta, margin):
    """The eps that the likeliest of some rewards, r* among them, exceeds with P <= delta."""
    # 2 log(candidates / delta) / (n kappa^2): n pairs, and kappa as in T10 for the largest margin;
    # inverse = 1 / kappa. From margin 355 on its square is inf, which says that nothing is learned
    inverse = 2 + math.exp(min(margin, 700)) + math.exp(-margin)
    return 2 * math.log(candidates / delta) / n * inverse * inverse


@inequality("Finite samples: P(the likeliest reward has eps > finite_sample_error) <= delta")
def finite_sample(q, margins, n, delta):
    """Exact, for one prompt and two responses, y1 with probability q in each place of n pairs.

    A candidate reward is its margin r(y1) - r(y2); the first of `margins` is true. P is summed over
    the (j, k) at which a candidate that is too far off is the likeliest.
    Proof: for one candidate E sqrt(likelihood ratio) <= exp(-n H^2 / 2), H^2 the squared Hellinger
    distance of a pair's label; Markov; a union over candidates; H^2 >= kappa^2 eps.
    """
    u = torch.as_tensor(margins, dtype=torch.float64)  # (N,)
    mixed = u.new_tensor(2 * q * (1 - q))  # how often a pair holds both responses
    error = mixed * (u - u[0]).square()  # (N,) eps of each candidate
    too_far = error > finite_sample_error(n, len(u), delta, u.abs().max().item())
    k = torch.arange(n + 1, dtype=u.dtype)  # how often y1 wins in the j pairs that hold both
    j, u = k[:, None], u[:, None, None]  # (n + 1, 1) and (N, 1, 1)
    binomial = partial(torch.distributions.Binomial, validate_args=False)  # k > j has p = 0
    log_p = binomial(n, mixed).log_prob(j) + binomial(j, logits=u[0]).log_prob(k)  # of (j, k)
    likelihood = -k * dpo(u, 1) - (j - k) * dpo(-u, 1)  # (N, n + 1, n + 1) log of it
    likeliest = likelihood >= likelihood.amax(0) - 1e-9  # ties count as failures
    fails = (too_far[:, None, None] & likeliest).any(0)
    return log_p.exp()[fails].sum(), u.new_tensor(delta)


# ---- examples, and the commands

def one_prompt(reward, ref, mu=(0.5, 0.5, 0.0), beta=1.0):  # y3 is in no pair
    """A bandit with one prompt, as in the paper's proofs."""
    rows = torch.tensor([reward, ref, mu], dtype=torch.float64)[:, None]  # (3, 1, Y)
    return Bandit(torch.ones(1, dtype=rows.dtype), rows[1].log(), rows[2].log(), rows[0], beta)


def worked_example():
    """The table in this file's docstring."""
    b = one_prompt((math.log(4), 0.0, 0.0), (0.5, 0.25, 0.25), beta=0.5)
    pi_star = optimal_policy(b)
    lines = ["                       y1     y2     y3  DPO loss  KL(pi||pi_ref)   J(pi)  J(pi*) - J(pi)"]
    for name, pi in {"pi_ref": b.ref, "pi*": pi_star,
                     "DPO, m = 0.5": with_unseen_mass(b, pi_star, 0.5),
                     "DPO, m = 0.99": with_unseen_mass(b, pi_star, 0.99),
                     "HyPO, lam -> 0": nearest_to_ref(b, pi_star)}.items():
        y1, y2, y3 = pi.exp()[0]
        lines.append(f"    {name:14}  {y1:.3f}  {y2:.3f}  {y3:.3f}    "
                     f"{preference_loss(b, pi - b.ref, dpo):.4f}          {kl(b.rho, pi, b.ref):.4f} "
                     f"{J(b, pi):7.4f}          {gap(b, pi):.4f}")
    c_glo, c_eps_kl = global_coverage(b.rho, b.ref), local_coverage(b.rho, b.ref, 0.1)
    return "\n".join(lines) + (
        f"\n\n    largest pi / pi_ref of any policy (global coverage): {c_glo:.4f}; "
        f"within KL <= 0.1 (local coverage): {c_eps_kl:.4f}")


def main(argv=None):
    """The tour, or the measurement of a trained run."""
    import run as runs  # a command needs some of the project's other files; the theory needs none
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add, several = parser.add_argument, runs.number(int, 2, 10**7)  # a spread needs two
    add("run", nargs="?", metavar="RUN", help="a run to measure; without it, the tour")
    add("--out", type=Path, help="where the tour's pictures go (default runs/coverage)")
    add("--prompts", type=several, help="held-out prompts of RUN (default 64)")
    add("--samples", type=several, help="samples of pi and of pi_ref for each (default 64)")
    args = parser.parse_args(argv)
    for flag in ("out",) if args.run else ("prompts", "samples"):
        if getattr(args, flag):
            parser.error(f"--{flag} would have no effect {'with' if args.run else 'without'} a RUN")
    if args.run:
        from experiments import coverage_of_run
        coverage_of_run.measure(args.run, args.prompts or 64, args.samples or 64)
    else:
        from experiments import coverage_pictures
        coverage_pictures.tour(args.out or Path("runs/coverage"))


if __name__ == "__main__":
    from run import start
    start(main, again="nothing of it is kept")
