"""HyPO's KL gradient against exact enumeration of a real GPT-2, float64, with the wrong forms as controls.

Vocabulary {EOS, 1, 2}, responses of at most 3 tokens: 15 responses, whose probabilities sum to 1.
"""

import itertools

import pytest
import torch

from hypo import kl_loss
from models import gradient, random_gpt2

pytestmark = pytest.mark.law
PROMPT = [1, 2]
EOS, LONGEST = 0, 3


def every_response() -> list[list[int]]:
    """All token sequences that end at their first EOS or at the length limit."""
    rows = []
    for length in range(1, LONGEST + 1):
        for row in itertools.product([0, 1, 2], repeat=length):
            if EOS not in row[:-1] and (row[-1] == EOS or length == LONGEST):
                rows.append(list(row))
    return rows


RESPONSES = every_response()


@pytest.fixture(scope="module")
def case():
    """(policy, ref, log pi (15,), log pi_ref (15,), exact gradient of KL(pi || pi_ref))."""
    policy, ref = random_gpt2(3, seed=3), random_gpt2(3, seed=4)
    prompts = [PROMPT] * len(RESPONSES)
    log_pi = policy.logps(prompts, RESPONSES)
    log_ref = ref.logps(prompts, RESPONSES).detach()
    kl = (log_pi.exp() * (log_pi - log_ref)).sum()
    return policy, ref, log_pi, log_ref, gradient(kl, policy)


def expected_gradient(case, loss, k: int) -> torch.Tensor:
    """Gradient of the expectation of loss(logps (N, k), logratios (N, k)) -> (N,) over k independent samples.

    The N = 15^k groups are enumerated; their probabilities are numbers, as they are for a sampler.
    """
    policy, _, log_pi, log_ref, _ = case
    groups = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=k)))  # (N, k)
    probability = log_pi.detach()[groups].sum(1).exp()
    return gradient((probability * loss(log_pi[groups], (log_pi - log_ref)[groups])).sum(), policy)


def test_the_responses_are_all_there_is(case):
    _, _, log_pi, log_ref, exact = case
    assert len(RESPONSES) == 15
    assert log_pi.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_ref.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert exact.norm() > 0.1, "the case must have a gradient to get wrong"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_expected_gradient_of_kl_loss_is_the_gradient_of_the_reverse_kl(case, k):
    exact = case[-1]
    got = expected_gradient(case, kl_loss, k)
    assert torch.allclose(got, exact, atol=1e-8), (
        f"E[grad kl_loss] must be grad KL(pi || pi_ref); largest difference {(got - exact).abs().max():.2e}")


WRONG = {
    "the sampled log-ratio, differentiated": (1, lambda logps, s: s.mean(1)),
    "k3, differentiated: the forward KL's gradient": (1, lambda logps, s: (torch.exp(-s) - 1 + s).mean(1)),
    "a baseline that includes the sample": (
        2, lambda logps, s: ((s - s.mean(1, keepdim=True)).detach() * logps).mean(1)),
    "no stop-gradient": (1, lambda logps, s: (s * logps).mean(1)),
    "the opposite sign": (1, lambda logps, s: -(s.detach() * logps).mean(1)),
}


@pytest.mark.parametrize("name", WRONG)
def test_negative_controls_are_caught(case, name):
    k, wrong = WRONG[name]
    exact = case[-1]
    difference = (expected_gradient(case, wrong, k) - exact).norm() / exact.norm()
    assert difference > 0.01, f"{name}: the enumeration must tell it from the right form"


def test_per_token_weights_miss_the_future(case):
    """Weighting each token by its own log-ratio is the fourth usual mistake: cosine near 1, yet wrong."""
    policy, ref, log_pi, _, exact = case
    prompts = [PROMPT] * len(RESPONSES)
    tokens, _ = policy.token_logps(prompts, RESPONSES)
    ref_tokens, _ = ref.token_logps(prompts, RESPONSES)
    s = (tokens - ref_tokens).detach()
    probability = log_pi.detach().exp()

    to_go = s.flip(1).cumsum(1).flip(1)  # this and later tokens: right
    right = gradient((probability * (to_go * tokens).sum(1)).sum(), policy)
    local = gradient((probability * (s * tokens).sum(1)).sum(), policy)
    assert torch.allclose(right, exact, atol=1e-8)
    assert (local - exact).norm() / exact.norm() > 0.01


def test_reported_kl_is_unbiased_with_less_variance_than_the_log_ratio(case):
    policy, ref, log_pi, log_ref, _ = case
    probability = log_pi.detach().exp()
    estimates = policy.reverse_kl(ref, [PROMPT] * len(RESPONSES), RESPONSES)  # (15,)
    logratios = (log_pi - log_ref).detach()
    kl = (probability * logratios).sum()
    assert (probability * estimates).sum().item() == pytest.approx(kl.item(), abs=1e-10)
    assert (estimates >= 0).all()
    variance, of_logratio = ((probability * (x - kl) ** 2).sum() for x in (estimates, logratios))
    assert variance < of_logratio


def test_descending_the_kl_loss_alone_brings_the_policy_to_pi_ref(case):
    policy = random_gpt2(3, seed=3)
    prompts = [PROMPT] * len(RESPONSES)
    log_ref = case[3]
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    for _ in range(150):
        log_pi = policy.logps(prompts, RESPONSES)
        loss = (log_pi.detach().exp() * kl_loss(log_pi[:, None], (log_pi - log_ref)[:, None])).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log_pi = policy.logps(prompts, RESPONSES).detach()
    assert (log_pi.exp() * (log_pi - log_ref)).sum() < 1e-3
