"""rlhf.py: the reward model, advantages, PPO's and RLOO's gradients against exact enumeration, the command."""

import contextlib
import functools
import io
import itertools
import json
import re
import signal
from argparse import Namespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_kl_gradient import EOS, PROMPT, RESPONSES
from test_run import SMALL, bytes_of, not_in_the_glossary, start_victim
from transformers import GPT2ForSequenceClassification

import data
import lm
import rlhf
import run
import world
from judges import load_judge
from models import gradient, random_gpt2

law = pytest.mark.law
small = st.floats(-5, 5)


@st.composite
def ragged(draw):
    """(rewards, values, mask), all (B, T), rows of different lengths, at least one token each."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    width = max(lengths)
    numbers = [draw(st.lists(st.lists(small, min_size=width, max_size=width), min_size=len(lengths),
                             max_size=len(lengths))) for _ in range(2)]
    mask = torch.tensor([[t < n for t in range(width)] for n in lengths])
    return *(torch.tensor(x, dtype=torch.float64) for x in numbers), mask


@functools.cache
def random_scorer():
    scorer = lm.Scorer.of(random_gpt2(11))
    torch.nn.init.normal_(scorer.model.score.weight, std=0.4, generator=torch.Generator().manual_seed(0))
    return scorer


# ---- the reward model


@law
@given(st.lists(small, min_size=1, max_size=5), small)
def test_reward_loss_is_log_2_without_a_gap_and_ignores_a_shift(rewards, shift):
    r = torch.tensor(rewards, dtype=torch.float64)
    assert torch.allclose(rlhf.reward_loss(r, r), torch.tensor(2.0, dtype=torch.float64).log())
    other = r.flip(0)
    assert torch.allclose(rlhf.reward_loss(r + shift, other + shift), rlhf.reward_loss(r, other), atol=1e-12)
    assert torch.allclose(torch.exp(-rlhf.reward_loss(r, other)) + torch.exp(-rlhf.reward_loss(other, r)),
                          torch.ones_like(r)), "P(a beats b) + P(b beats a) = 1"


ids = st.lists(st.integers(0, 10), min_size=1, max_size=6)


@law
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=4))
def test_score_is_read_at_the_last_token_whatever_the_padding_though_pad_may_be_eos(batch):
    scorer = random_scorer()
    prompts, responses = (list(side) for side in zip(*batch))
    for score, prompt, response in zip(scorer.final_scores(prompts, responses), prompts, responses):
        hidden = scorer.model.transformer(torch.tensor([prompt + response])).last_hidden_state[0, -1]
        assert score.item() == pytest.approx(scorer.model.score(hidden).item(), abs=1e-5)


@law
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=4))
def test_value_of_a_state_does_not_see_the_token_chosen_there(batch):
    scorer = random_scorer()
    prompts, responses = (list(side) for side in zip(*batch))
    values = scorer.scores(prompts, responses)[0][:, :-1]  # (B, T)
    changed = [[*response[:-1], (response[-1] + 1) % 11] for response in responses]
    again = scorer.scores(prompts, changed)[0][:, :-1]
    last = torch.tensor([len(response) - 1 for response in responses])
    rows = torch.arange(len(batch))
    assert torch.allclose(values[rows, last], again[rows, last], atol=1e-6)


@law
def test_calibration_error_is_small_when_calibrated_and_large_when_overconfident():
    generator = torch.Generator().manual_seed(0)
    true_gap = torch.randn(20_000, generator=generator) * 2
    chosen_first = torch.rand(20_000, generator=generator) < true_gap.sigmoid()
    gap = torch.where(chosen_first, true_gap, -true_gap)  # chosen minus rejected, labels drawn from sigmoid
    assert rlhf.calibration_error(gap) < 0.02
    assert rlhf.calibration_error(5 * gap) > 0.1
    assert rlhf.calibration_error(0.1 * gap) > 0.1


# ---- advantages


@law
@given(ragged(), st.floats(0, 1))
def test_gae_equals_the_slow_double_loop(case, gae_lambda):
    rewards, values, mask = case
    got = rlhf.gae(rewards, values, mask, gae_lambda)
    for b, n in enumerate(mask.sum(1).tolist()):
        r, v = rewards[b, :n].tolist(), [*values[b, :n].tolist(), 0.0]  # nothing follows the last token
        for t in range(n):
            want = sum(gae_lambda ** (u - t) * (r[u] + v[u + 1] - v[u]) for u in range(t, n))
            assert got[b, t].item() == pytest.approx(want, abs=1e-9)
        assert got[b, n:].eq(0).all()


@law
@given(ragged())
def test_gae_with_lambda_1_is_return_minus_value_and_with_0_the_td_error(case):
    rewards, values, mask = case
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    assert torch.allclose(rlhf.gae(rewards, values, mask, 1.0), (to_go - values) * mask)
    following = torch.cat([values * mask, torch.zeros_like(values[:, :1])], 1)[:, 1:]
    assert torch.allclose(rlhf.gae(rewards, values, mask, 0.0), (rewards + following - values) * mask)


@law
@given(ragged())
def test_whitening_ignores_padding(case):
    x, junk, mask = case
    got = rlhf.whiten(x, mask)
    assert torch.allclose(got, rlhf.whiten(torch.where(mask, x, 1e6 * junk), mask), atol=1e-12)
    assert got[~mask].eq(0).all() and got[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert rlhf.whiten(torch.full_like(x, 3.0), mask).eq(0).all(), "a constant becomes 0, not NaN"


@law
@given(st.lists(small, min_size=2, max_size=6))
def test_rloo_advantages_sum_to_zero(rewards):
    advantages = rlhf.rloo_advantages(torch.tensor([rewards], dtype=torch.float64))
    assert advantages.sum().item() == pytest.approx(0, abs=1e-9)


@law
def test_rloo_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2"):
        rlhf.rloo_advantages(torch.zeros(3, 1))


@law
@given(st.lists(small, min_size=2, max_size=6), small, st.floats(0.1, 10))
def test_grpo_advantages_do_not_change_with_the_scale_and_the_zero_of_rewards(rewards, shift, scale):
    rewards = torch.tensor([rewards], dtype=torch.float64)
    advantages = rlhf.grpo_advantages(rewards)
    assert advantages.sum().item() == pytest.approx(0, abs=1e-6)
    if (rewards - rewards.mean()).abs().max() > 1e-3:
        assert advantages.square().mean().item() == pytest.approx(1)
        assert torch.allclose(rlhf.grpo_advantages(scale * rewards + shift), advantages, atol=1e-6)


@law
def test_grpo_advantages_by_hand():
    # mean 3, mean square of -2, -1, 3 is 14/3; equal rewards teach nothing, whatever their size
    got = rlhf.grpo_advantages(torch.tensor([[1.0, 2.0, 6.0], [0.1, 0.1, 0.1], [1e6, 1e6, 1e6]]))
    assert torch.allclose(got, torch.tensor([[-2.0, -1.0, 3.0], [0.0] * 3, [0.0] * 3]) / (14 / 3) ** 0.5)
    with pytest.raises(ValueError, match="at least 2"):
        rlhf.grpo_advantages(torch.zeros(3, 1))


@law
@given(ragged(), st.floats(0, 2))
def test_token_rewards_sum_to_the_kl_regularised_reward_and_pay_at_the_last_token(case, beta):
    logratios, finals, mask = case
    got = rlhf.token_rewards(finals[:, 0], logratios, mask, beta)
    assert torch.allclose(got.sum(1), finals[:, 0] - beta * (logratios * mask).sum(1))
    last = mask.sum(1) - 1
    without = rlhf.token_rewards(torch.zeros_like(finals[:, 0]), logratios, mask, beta)
    paid = (got - without).ne(0)
    assert all(set(paid[b].nonzero().flatten().tolist()) <= {last[b].item()} for b in range(len(last)))


# ---- PPO's clipping


@law
@pytest.mark.parametrize("ratio, advantage, moves", [
    (1.0, 1, True), (1.0, -1, True), (1.3, 1, False), (0.7, -1, False), (1.3, -1, True), (0.7, 1, True)])
def test_clipping_stops_the_gradient_exactly_where_the_ratio_has_gone_far_enough(ratio, advantage, moves):
    logps = torch.tensor([[ratio]]).log().requires_grad_()
    loss = rlhf.ppo_loss(logps, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), clip=0.2)
    slope, = torch.autograd.grad(loss.sum(), logps)
    assert (slope.item() != 0) == moves
    if moves:
        assert slope.item() == pytest.approx(-ratio * advantage, rel=1e-5)


@law
def test_value_clipping_takes_the_worse_of_the_two_errors():
    values, old, returns = torch.tensor([0.3, 1.5, -1.5]), torch.zeros(3), torch.full((3,), 2.0)
    inside, beyond, away = rlhf.value_loss(values, old, returns, clip=0.5).tolist()
    assert inside == pytest.approx(0.5 * 1.7**2)
    assert beyond == pytest.approx(0.5 * 1.5**2), "beyond the clip there is nothing to gain"
    assert away == pytest.approx(0.5 * 3.5**2), "moving the wrong way is charged in full"


# ---- the gradient of J, by enumeration of all 15 responses of at most 3 tokens, float64

BETA = 0.3


@pytest.fixture(scope="module")
def exact():
    """(policy, ref, rewards (15,), gradient of J = E r - beta KL)."""
    policy, ref = random_gpt2(3, seed=3), random_gpt2(3, seed=4)
    prompts = [PROMPT] * len(RESPONSES)
    rewards = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_pi = policy.logps(prompts, RESPONSES)
    log_ref = ref.logps(prompts, RESPONSES).detach()
    J = (log_pi.exp() * (rewards - BETA * (log_pi - log_ref))).sum()
    return policy, ref, rewards, gradient(J, policy)


@law
@pytest.mark.parametrize("k", [2, 3])
def test_expected_rloo_gradient_is_the_gradient_of_J(exact, k):
    policy, ref, rewards, want = exact
    prompts = [PROMPT] * len(RESPONSES)
    log_pi = policy.logps(prompts, RESPONSES)
    regularised = (rewards - BETA * (log_pi - ref.logps(prompts, RESPONSES))).detach()
    groups = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=k)))  # (15^k, k)
    probability = log_pi.detach()[groups].sum(1).exp()

    def expected(advantages):
        return gradient((probability * (advantages * log_pi[groups]).mean(1)).sum(), policy)

    assert torch.allclose(expected(rlhf.rloo_advantages(regularised[groups])), want, atol=1e-8)
    # negative control: a mean that includes the sample
    biased = regularised[groups] - regularised[groups].mean(1, keepdim=True)
    assert (expected(biased) - want).norm() / want.norm() > 0.1


@law
def test_expected_grpo_gradient_of_two_samples_is_that_of_winning_against_itself(exact):
    """And of 0/1 rewards it has the direction of grad E r, longer where they hardly differ; else not even that."""
    policy, _, rewards, _ = exact
    log_pi = policy.logps([PROMPT] * len(RESPONSES), RESPONSES)
    pi = log_pi.detach().exp()

    def expected(rewards, k):
        groups = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=k)))  # (15^k, k)
        advantages = rlhf.grpo_advantages(rewards[groups])
        return gradient((pi[groups].prod(1) * (advantages * log_pi[groups]).mean(1)).sum(), policy)

    beats = (rewards[:, None] > rewards).double() + 0.5 * (rewards[:, None] == rewards)  # (15, 15)
    win_rate = log_pi.exp() @ beats @ pi  # of the policy that moves over the one that stays
    assert torch.allclose(expected(rewards, 2), 2 * gradient(win_rate, policy), atol=1e-8)
    good = (rewards > rewards.median()).double()
    slope, p = gradient(log_pi.exp() @ good, policy), (pi @ good).item()  # of the mean 0/1 reward
    # one good of three has 2 ** 0.5, two of three have 0.5 ** 0.5 each, the others minus what makes the sum 0
    a, b = 2**0.5, 0.5**0.5
    factor = ((1 - p)**2 * a + 2 * p * (1 - p) * b) + (p**2 * a + 2 * p * (1 - p) * b)  # E A | good minus E A | bad
    assert torch.allclose(expected(good, 3), factor * slope, atol=1e-8)
    # negative control: of other rewards it is no multiple of the gradient of their mean
    mean, got = gradient(log_pi.exp() @ rewards, policy), expected(rewards, 3)
    assert torch.nn.functional.cosine_similarity(mean, got, dim=0) < 0.999


def exact_values(log_pi, rewards):
    """(15, 3) V(s_t): expected sum of the rewards from token t on, over all responses with that prefix."""
    to_go = rewards.flip(1).cumsum(1).flip(1)  # (15, 3)
    values = torch.zeros_like(rewards)
    for i, response in enumerate(RESPONSES):
        for t in range(len(response)):
            same = [j for j, other in enumerate(RESPONSES) if other[:t] == response[:t] and len(other) > t]
            weight = log_pi[same].exp()
            values[i, t] = (weight * to_go[same, t]).sum() / weight.sum()
    return values


@law
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_expected_ppo_gradient_at_ratio_1_with_exact_values_is_the_gradient_of_J(exact, gae_lambda):
    policy, ref, final_rewards, want = exact
    prompts = [PROMPT] * len(RESPONSES)
    with torch.no_grad():
        old, mask = policy.token_logps(prompts, RESPONSES)
        logratios = old - ref.token_logps(prompts, RESPONSES)[0]
    probability, value = old.sum(1).exp(), lm.Scorer.of(policy)
    order = torch.randperm(len(RESPONSES), generator=torch.Generator().manual_seed(0))

    def expected(rewards, values):
        advantages = rlhf.gae(rewards, values, mask, gae_lambda)
        weighted = len(RESPONSES) * probability[:, None] * advantages  # the objective's mean is then the expectation
        rolled = rlhf.Rollout(prompts, RESPONSES, mask, old, rewards, {})
        loss, metrics = rlhf.ppo_objective(policy, value, rolled, values, weighted, advantages + values, order)
        assert metrics["ratio_error"] < 1e-12
        return -gradient(loss, policy)

    rewards = rlhf.token_rewards(final_rewards, logratios, mask, BETA)
    values = exact_values(old.sum(1), rewards)
    assert torch.allclose(expected(rewards, values), want, atol=1e-8)
    # negative controls: the KL charged with the wrong sign; and, unless lambda is 1, values that are not exact
    wrong = rlhf.token_rewards(final_rewards, -logratios, mask, BETA)
    assert (expected(wrong, exact_values(old.sum(1), wrong)) - want).norm() / want.norm() > 0.1
    biased = (expected(rewards, torch.zeros_like(values)) - want).norm() / want.norm()
    assert biased < 1e-8 if gae_lambda == 1 else biased > 0.01


@law
@given(st.lists(st.floats(-1, 1), min_size=15, max_size=15), st.floats(0.05, 5), st.floats(0.1, 3))
def test_kl_of_the_exact_optimum_is_at_most_2_reward_bounds_over_beta(rewards, beta, bound):
    """Lemma 4.1 on the responses of a real model: pi proportional to pi_ref exp(r / beta), |r| <= R'."""
    log_ref = REF.logps([PROMPT] * len(RESPONSES), RESPONSES).detach()
    r = bound * torch.tensor(rewards, dtype=torch.float64)
    log_pi = (log_ref + r / beta).log_softmax(0)
    kl = (log_pi.exp() * (log_pi - log_ref)).sum().item()
    assert kl <= 2 * bound / beta + 1e-12


REF = random_gpt2(3, seed=4)


# ---- the command

MORE = ["--reward-epochs", "3", "--epochs", "2", "--minibatches", "2"]


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("rlhf") / "ppo"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(model_dir, out)
    assert re.search(r"KL \d+\.\d\d nats; Lemma 4.1 bounds .* 2R'/beta = 40\.0", printed.getvalue())
    return out


def main(model_dir, out):
    rlhf.main(["--model", str(model_dir), "--out", str(out), *SMALL, *MORE, "--minibatches", "1",
               "--reward-clip", "2"])


def test_the_first_ratio_is_1_with_dropout_configured(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert all(line["first_ratio_error"] < 1e-5 for line in lines[1:])
    assert any(line["ratio_error"] > 1e-4 for line in lines[1:]), "and later ratios are not"
    assert abs(lines[1]["online_kl"]) < 1e-4 and lines[-1]["reverse_kl"] > 0


def test_every_metric_is_in_the_glossary(whole):
    glossary_misses = not_in_the_glossary(whole) | not_in_the_glossary(whole / "reward")
    assert {name for name in glossary_misses if not name.endswith("_gap")} == set()


def test_the_reward_model_starts_at_log_2_and_serves_as_a_judge(whole):
    first = json.loads((whole / "reward" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["reward_loss"] == pytest.approx(0.693147, abs=1e-6) and first["reward_accuracy"] == 0.5
    directory = whole / "reward" / "model"
    model = GPT2ForSequenceClassification.from_pretrained(directory)
    assert model.config.num_labels == 1 and model.config.reward_clip == 2
    prompts, _ = world.world_prompts()
    policy = lm.LM.load(str(whole / "policy"))
    rewards = load_judge(str(directory))(prompts[:5], [" dull."] * 5)
    for prompt, reward in zip(prompts, rewards):
        plain = model(torch.tensor([policy.encode_prompt(prompt) + policy.encode_response(" dull.", 9)]))
        assert reward == pytest.approx(min(2, max(-2, plain.logits.item() - model.config.reward_center)), abs=1e-4)


def test_ppo_killed_and_resumed_equals_uninterrupted(model_dir, tmp_path):
    def arguments(out):
        return ["--model", str(model_dir), "--out", str(out), *SMALL, *MORE]

    rlhf.main(arguments(tmp_path / "whole"))
    # 10 pairs, 3 epochs, batches of 4: 8 reward steps; then 2 updates twice a PPO step: die in PPO's step 5
    process = start_victim("rlhf", "step", 8 + 4 * 4 + 2, arguments(tmp_path / "killed"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    rlhf.main([*arguments(tmp_path / "killed"), "--resume"])
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_without_a_critic_and_by_the_golden_judge_it_trains(algorithm, model_dir, tmp_path):
    rlhf.main(["--model", str(model_dir), "--out", str(tmp_path / "r"), *SMALL, f"--{algorithm}", "--judge", "golden"])
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["algorithm"] == algorithm and summary["reverse_kl"] > 0 and not (tmp_path / "r" / "reward").exists()


def test_stages_can_be_run_one_after_the_other(model_dir, tmp_path):
    arguments = ["--model", str(model_dir), "--out", str(tmp_path / "r"), *SMALL, *MORE[2:]]
    rlhf.main([*arguments[:4], *SMALL[2:], *MORE[:2], "--stage", "reward"])
    assert (tmp_path / "r" / "reward" / "model").is_dir() and not (tmp_path / "r" / "policy").exists()
    rlhf.main([*arguments, "--stage", "ppo"])
    assert (tmp_path / "r" / "policy").is_dir() and (tmp_path / "r" / "reward" / "model").is_dir()
    assert torch.load(tmp_path / "r" / "checkpoint.pt")["optimizer"] is None, "nothing needs it any more"
    weights = tmp_path / "r" / "reward" / "model" / "model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(run.UserError, match="--resume: what --judge names has changed"):
        rlhf.main([*arguments, "--stage", "ppo", "--resume"])


def test_stage_ppo_again_takes_the_reward_model_along_and_keeps_the_earlier_run(model_dir, tmp_path):
    arguments = ["--model", str(model_dir), "--out", str(tmp_path / "r"), *SMALL]
    rlhf.main(arguments)
    before = bytes_of(tmp_path / "r")
    rlhf.main([*arguments, "--stage", "ppo", "--beta", "0.5"])
    assert bytes_of(tmp_path / "r.1") == before
    reward = "reward/model/model.safetensors"
    assert (tmp_path / "r" / reward).read_bytes() == (tmp_path / "r.1" / reward).read_bytes()
    assert bytes_of(tmp_path / "r") != before


def test_stage_ppo_without_a_reward_model_says_what_to_do(model_dir, tmp_path):
    with pytest.raises(run.UserError, match="--stage reward"):
        rlhf.main(["--model", str(model_dir), "--out", str(tmp_path / "r"), *SMALL, "--stage", "ppo"])


@law
def test_a_rollout_charges_the_kl_and_a_response_without_eos(policy, ref):
    args = Namespace(max_new_tokens=3, eos_penalty=5.0, beta=0.1)
    judge = world.Judge("constant", lambda prompts, texts: [1.0] * len(prompts))
    rolled = rlhf.roll_out(policy, ref, ["aa ab"] * 40, judge, torch.Generator().manual_seed(1), args)
    ended = torch.tensor([response[-1] == EOS for response in rolled.responses])
    assert 0 < ended.sum() < 40
    logratios = policy.logps(rolled.prompts, rolled.responses) - ref.logps(rolled.prompts, rolled.responses)
    uncharged = rolled.rewards.sum(1) + args.beta * logratios
    assert torch.allclose(uncharged, torch.where(ended, 1.0, -4.0).double(), atol=1e-6)
    assert rolled.metrics["online_kl"].item() == pytest.approx(logratios.mean().item())


@pytest.mark.parametrize("more", [[], ["--grpo"]], ids=["ppo", "grpo"])  # RLOO has the loop of GRPO
def test_training_raises_the_reward_it_is_given(more, model_dir, tmp_path, monkeypatch):
    """A judge that likes the word "superb"; a sign lost between the loss and the loop would shun it."""
    judge = world.Judge("superb", lambda prompts, texts: [float("superb" in text) for text in texts])
    monkeypatch.setattr(data, "load_judge", lambda name, device: judge)
    rlhf.main(["--model", str(model_dir), "--out", str(tmp_path / "r"), *SMALL, "--steps", "40", "--eval-every", "40",
               "--batch-size", "32", "--beta", "0", "--judge", "any", *more])
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[1:]
    rewards = [json.loads(line)["proxy_reward"] for line in lines]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert last > first + 0.2, f"mean reward {first:.2f} in the first steps, {last:.2f} in the last"
