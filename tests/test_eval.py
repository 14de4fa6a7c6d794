"""Laws of eval.py: win rates and their intervals, accuracy, what an evaluation leaves, tables, pictures, runs asked."""

import copy
import io
import itertools
import json
import math
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import FAST, write_task

import coverage
import data
import dpo
import eval
import hypo
import lm
import rlhf
import rows
import run
import world
from eval import (
    Evaluator,
    against,
    finish,
    frontier,
    implicit_reward_metrics,
    main,
    off_support,
    plot_curve,
    plot_goodhart,
    read_metrics,
    table,
    wilson_interval,
    win_rate,
    win_rate_over,
)
from judges import load_judge
from lm import LM
from models import fitting
from run import UserError, read_rows, write_rows, write_text
from world import Judge, golden_reward

PNG = b"\x89PNG\r\n\x1a\n"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]

rewards = st.integers(-3, 3) | st.floats(-5, 5)  # small integers tie often
comparisons = st.lists(st.tuples(rewards, rewards), min_size=1, max_size=60)


# ---------------------------------------------------------------------------------------------------
# win rate and Wilson's interval

@pytest.mark.law
@given(comparisons)
def test_win_rates_of_both_sides_add_to_one(rows):
    ours, theirs = zip(*rows)
    rate, (low, high) = win_rate(ours, theirs)
    other_rate, (other_low, other_high) = win_rate(theirs, ours)
    assert rate + other_rate == pytest.approx(1, abs=1e-12), f"{rate} + {other_rate} = 1"
    assert (low, high) == pytest.approx((1 - other_high, 1 - other_low), abs=1e-12), "the interval is the mirror image"


@pytest.mark.law
def test_a_tie_counts_one_half():
    assert win_rate([1, 2, 3, 4], [1, 1, 4, 4])[0] == 0.5  # tie, win, loss, tie
    assert win_rate([1, 2, 3], [1, 1, 3])[0] == 2 / 3
    assert win_rate([0.0] * 7, [0.0] * 7)[0] == 0.5
    with pytest.raises(ValueError):
        win_rate([1, 2], [1])


@pytest.mark.law
def test_the_win_rate_comes_with_the_interval_of_its_wins():
    assert win_rate([1] * 8 + [0] * 2, [0] * 8 + [1] * 2) == (0.8, wilson_interval(8, 10))


@pytest.mark.law
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_the_interval_stays_inside_0_1_and_contains_the_estimate(case):
    wins, n = case[0] / 2, case[1]
    low, high = wilson_interval(wins, n)
    assert 0 <= low < high <= 1, f"{wins} of {n}: [{low}, {high}]"
    assert low - 1e-12 <= wins / n <= high + 1e-12, f"{wins} of {n}: {wins / n} in [{low}, {high}]"


@pytest.mark.law
@given(st.integers(0, 20), st.integers(1, 30))
def test_the_interval_shrinks_with_n(tenths, n):
    def width(n):
        low, high = wilson_interval(tenths / 20 * n, n)
        return high - low

    assert width(4 * n) < width(n), f"share {tenths / 20}: width {width(4 * n)} at {4 * n}, {width(n)} at {n}"


@pytest.mark.law
@pytest.mark.parametrize("wins, n, z, low, high", [
    # by hand, z = 2: (wins + 2 +- 2 sqrt(wins (n - wins) / n + 1)) / (n + 4)
    (6, 12, 2, (8 - 4) / 16, (8 + 4) / 16),
    (0, 12, 2, 0, 4 / 16),
    # by hand: (8 + 1.9208 +- 1.96 sqrt(1.6 + 0.9604)) / 13.8416, and z^2 / (n + z^2)
    (8, 10, 1.96, 0.490157, 0.943321),
    (0, 10, 1.96, 0, 3.8416 / 13.8416),
])
def test_the_interval_agrees_with_hand_computation(wins, n, z, low, high):
    assert wilson_interval(wins, n, z) == pytest.approx((low, high), abs=2e-6)


@pytest.mark.law
@given(st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), st.lists(rewards, min_size=1, max_size=9), st.lists(
    rewards, min_size=n, max_size=20))))
def test_against_a_distribution_each_response_meets_all_that_pi_ref_says_to_its_prompt(case):
    n_prompts, ours, theirs = case
    shares = [win_rate([reward] * len(theirs[i % n_prompts::n_prompts]), theirs[i % n_prompts::n_prompts])[0]
              for i, reward in enumerate(ours)]
    rate, interval = win_rate_over(ours, theirs, n_prompts)
    assert rate == pytest.approx(sum(shares) / len(shares))
    assert interval == pytest.approx(wilson_interval(sum(shares), len(shares)))
    if n_prompts == 1:  # one prompt: the probability that a draw of ours beats a draw of theirs
        wins = [(a > b) + (a == b) / 2 for a in ours for b in theirs]
        assert rate == pytest.approx(sum(wins) / len(wins))


@pytest.mark.law
@given(st.lists(st.floats(-50, 0), min_size=1, max_size=50), st.lists(st.floats(-50, 0), min_size=1, max_size=3000))
def test_off_support_is_under_the_thousandth_that_pi_ref_itself_is_least_likely_to_write(logps, own):
    floor = sorted(own)[len(own) // 1000]
    assert sum(logp < floor for logp in own) <= len(own) / 1000, "of pi_ref's own samples one in 1000 at most"
    assert off_support(logps, own) == sum(logp < floor for logp in logps) / len(logps)
    assert off_support(logps, [logp - 1 for logp in logps]) == 0 and off_support([min(own) - 1], own) == 1


@pytest.mark.law
@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1), st.booleans()), min_size=2, max_size=8))
def test_a_ball_around_pi_ref_bounds_what_is_off_support(responses):
    """docs/theory.md: KL(pi || pi_ref) >= a log(a/q) + (1 - a) log((1 - a)/(1 - q)), with a and q what is in A."""
    pi, ref, in_a = zip(*responses)
    pi, ref = ([x / sum(side) for x in side] for side in (pi, ref))
    a, q = (sum(x for x, there in zip(side, in_a) if there) for side in (pi, ref))
    kl = sum(x * math.log(x / y) for x, y in zip(pi, ref))
    bound = sum(x * math.log(x / y) for x, y in ((a, q), (1 - a, 1 - q)) if x > 1e-12)
    assert kl >= bound - 1e-12
    if len(responses) == 2 and in_a[0] != in_a[1]:
        assert kl == pytest.approx(bound, abs=1e-12), "two responses: tight"


@pytest.mark.law
def test_the_frontier_is_the_optimum_and_no_policy_is_above_it():
    rewards = [-2.0, -2.0, 0.0, 1.0, 1.0, 1.0, 3.0, 4.5]  # of eight equally likely responses
    uniform, noise = torch.full((1, 8), 1 / 8, dtype=torch.float64), torch.Generator().manual_seed(0)
    reward = torch.tensor([rewards], dtype=torch.float64)
    points = frontier(rewards)
    for b, (kl, rate, value) in zip(eval.OPTIMA, points):
        best = coverage.tilt(uniform.log(), reward, b).exp()
        assert value == pytest.approx((best * reward).sum().item())
        assert kl == pytest.approx((best * (best * 8).log()).sum().item(), abs=1e-12)
        beats = [sum((x > y) + (x == y) / 2 for y in rewards) / 8 for x in rewards]
        assert rate == pytest.approx(sum(p * x for p, x in zip(best[0].tolist(), beats)))
        for _ in range(20):  # a policy of no more KL has no larger reward
            other = torch.rand(8, generator=noise, dtype=torch.float64).pow(4)
            other = other / other.sum()
            if torch.xlogy(other, other * 8).sum() <= kl:
                assert other @ reward[0] <= value + 1e-9
    kls, rates, values = zip(*points)
    assert list(kls) == sorted(kls) and list(values) == sorted(values) and rates[0] > 0.5
    assert kls[-1] < math.log(8) + 1e-9 and values[-1] > 4.4


def mean_coverage(interval, n: int) -> float:
    """P(p in interval(wins, n)) for wins ~ Binomial(n, p), summed exactly over wins, averaged over a grid of p."""
    grid = [(i + 0.5) / 200 for i in range(200)]
    log_choose = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    intervals = [interval(k, n) for k in range(n + 1)]
    return sum(math.exp(log_choose[k] + k * math.log(p) + (n - k) * math.log1p(-p))
               for p in grid for k in range(n + 1) if intervals[k][0] <= p <= intervals[k][1]) / len(grid)


@pytest.mark.law
@pytest.mark.parametrize("n", [10, 40, 200])
def test_the_interval_covers_the_truth_95_times_in_100(n):
    assert mean_coverage(wilson_interval, n) == pytest.approx(0.95, abs=0.007)


@pytest.mark.law
def test_the_coverage_law_has_teeth():
    def wald(wins, n):  # the interval of the first textbook: wins/n +- z sd
        half = 1.96 * math.sqrt(wins * (n - wins) / n) / n
        return wins / n - half, wins / n + half

    assert mean_coverage(wald, 10) < 0.85
    assert mean_coverage(lambda wins, n: wilson_interval(wins, n, z=1.64), 40) == pytest.approx(0.90, abs=0.007)


# ---------------------------------------------------------------------------------------------------
# a policy of vocabulary 12 with random weights, and labelled pairs

PROMPTS = ["The plot was", "The acting felt", "The plot felt"]
TEXTS = [" superb.", " dull.", " never dull.", " superb superb dull", " plot."]
PAIRS = [data.Pair(PROMPTS[i % 3], chosen, rejected, "here")
         for i, (chosen, rejected) in enumerate(itertools.combinations(TEXTS, 2))][:9]  # odd: accuracy is not 1/2


@pytest.fixture(scope="module")
def ref():
    """With weights far from 0, so that its outputs are far from uniform."""
    policy = LM.untrained([*PROMPTS, " superb never dull. plot"], layers=2, width=16, heads=2, positions=32, seed=0)
    for weight in policy.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return policy.frozen_copy()


@pytest.fixture(scope="module")
def policy(ref):
    """Near pi_ref, as a trained policy would be."""
    policy, noise = copy.deepcopy(ref).requires_grad_(True), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=noise)
    return policy


@pytest.fixture(scope="module")
def pairs(ref):
    return data.add_ref_logps(ref, rows.encode(ref, PAIRS, max_new_tokens=8))


def swapped(pairs: list[lm.Encoded]) -> list[lm.Encoded]:
    """The pairs with every label turned round."""
    return [lm.Encoded(pair.prompt, pair.rejected, pair.chosen, pair.ref_rejected, pair.ref_chosen) for pair in pairs]


@pytest.mark.law
def test_pi_ref_is_right_half_the_time_exactly(ref, pairs):
    trainable = copy.deepcopy(ref).train()  # dropout is configured, and must be off
    assert ref.model.config.resid_pdrop > 0
    assert implicit_reward_metrics(trainable, pairs) == {
        "accuracy": 0.5, "chosen_logratio": 0.0, "rejected_logratio": 0.0}


@pytest.mark.law
def test_accuracy_and_log_ratios_are_those_of_the_pairs_one_by_one(policy, ref, pairs):
    def logratio(pair, response):
        return (policy.logps([pair.prompt], [response]) - ref.logps([pair.prompt], [response])).item()

    chosen = [logratio(pair, pair.chosen) for pair in pairs]
    rejected = [logratio(pair, pair.rejected) for pair in pairs]
    n = len(pairs)
    expected = {"accuracy": sum(c > r for c, r in zip(chosen, rejected)) / n,
                "chosen_logratio": sum(chosen) / n, "rejected_logratio": sum(rejected) / n}
    assert implicit_reward_metrics(policy, pairs) == pytest.approx(expected, abs=1e-5)
    policy.batch_size = 4
    assert implicit_reward_metrics(policy, pairs) == pytest.approx(expected, abs=1e-5)


@pytest.mark.law
def test_turning_labels_round_turns_accuracy_round(policy, pairs):
    straight, turned = implicit_reward_metrics(policy, pairs), implicit_reward_metrics(policy, swapped(pairs))
    assert turned["accuracy"] == pytest.approx(1 - straight["accuracy"], abs=1e-6)
    assert turned["chosen_logratio"] == pytest.approx(straight["rejected_logratio"], abs=1e-5)


# ---------------------------------------------------------------------------------------------------
# evaluator


def starting(policy, ref, pairs, judge=world.golden_judge, **more) -> data.Start:
    return data.Start(**{**dict(policy=policy, ref=ref, pairs=[], prompts=[], held_out=pairs, held_out_prompts=PROMPTS,
                                label=None, outcome=judge, second=None), **more})


def evaluation(out, ref, pairs, judge=world.golden_judge, device="cpu", **more) -> Evaluator:
    args = Namespace(eval_samples=40, max_new_tokens=6, out=out, device=device, seed=0)
    return Evaluator(starting(None, ref, pairs, judge, **more), args)


@pytest.mark.law
@pytest.mark.parametrize("device", DEVICES)
def test_at_step_0_every_kl_and_log_ratio_is_exactly_0(device, tmp_path, ref, pairs):
    ref = copy.deepcopy(ref).to(device)
    pairs = data.add_ref_logps(ref, pairs)
    metrics = evaluation(tmp_path, ref, pairs, device=device)(copy.deepcopy(ref).train())
    measured = {name: metrics[name] for name in ("reverse_kl", "accuracy", "chosen_logratio", "rejected_logratio")}
    assert measured == {"reverse_kl": 0.0, "accuracy": 0.5, "chosen_logratio": 0.0, "rejected_logratio": 0.0}
    low, high = metrics["win_rate_ci"]
    assert low < 0.5 < high, f"pi_ref against itself: 1/2 in [{low}, {high}]"
    rows = read_rows(tmp_path / "responses.jsonl")
    assert [row["response"] for row in rows] != [row["ref_response"] for row in rows], "samples of their own, not ties"


@pytest.mark.law
def test_metrics_are_those_of_the_file_that_an_evaluation_leaves(tmp_path, policy, ref, pairs):
    evaluate = evaluation(tmp_path, ref, pairs)
    metrics, rows = evaluate(policy), read_rows(tmp_path / "responses.jsonl")
    assert [row["prompt"] for row in rows] == [PROMPTS[i % 3] for i in range(40)], "prompts in turn to --eval-samples"
    for row in rows:
        assert row["reward"] == golden_reward(row["prompt"], row["response"])
        assert row["ref_reward"] == golden_reward(row["prompt"], row["ref_response"])
    mine, theirs = ([row[name] for row in rows] for name in ("reward", "ref_reward"))
    assert (metrics["win_rate"], metrics["win_rate_ci"]) == win_rate_over(mine, theirs, 3)
    asked, said, _ = policy.respond([row["prompt"] for row in rows], 6, torch.Generator().manual_seed(
        run.seed_of(0, "evaluation")))
    ref_logps = [ref.logps([x], [y]).item() for x, y in zip(asked, said)]
    assert [row["ref_logp"] for row in rows] == pytest.approx(ref_logps, abs=0.0051), "to two digits"
    assert metrics["off_support"] == off_support(ref_logps, [row["logp"] for row in evaluate.samples])
    assert len(set(mine)) > 1 and metrics["golden_reward"] == pytest.approx(sum(mine) / 40)
    assert metrics["reverse_kl"] > 0.1, "the policy was moved away from pi_ref"
    assert 1 <= metrics["response_length"] <= 6


def test_samples_are_shown_beside_the_references(tmp_path, policy, ref, pairs):
    evaluation(tmp_path, ref, pairs)(policy)
    rows = read_rows(tmp_path / "responses.jsonl")
    eval.write_samples(tmp_path / "samples.md", rows)
    lines = (tmp_path / "samples.md").read_text().splitlines()
    assert len(lines) == 2 + 12 and all(line.count("|") == 6 for line in lines)
    for line, row in zip(lines[2:], rows):
        assert [cell.strip() for cell in line.split("|")[1:-1]] == [
            row["prompt"], row["ref_response"].strip(), f"{row['ref_reward']:+.1f}",
            row["response"].strip(), f"{row['reward']:+.1f}"]


@pytest.mark.law
def test_an_evaluation_is_repeatable_and_leaves_the_policy_and_the_random_state_alone(tmp_path, policy, ref, pairs):
    evaluate, file = evaluation(tmp_path, ref, pairs), tmp_path / "responses.jsonl"
    policy = copy.deepcopy(policy)
    weights = copy.deepcopy(policy.state_dict())
    first, left = evaluate(policy), file.read_bytes()
    opponents = [row["ref_response"] for row in read_rows(file)]

    assert evaluate(ref) != first
    other = Evaluator(evaluate.start, Namespace(**{**vars(evaluate.args), "seed": 1}))
    assert other(policy)["win_rate"] != first["win_rate"], "another seed draws other responses of the policy"
    assert other.samples == evaluate.samples, "... which meet the same of pi_ref"
    assert [row["ref_response"] for row in read_rows(file)] == opponents, (
        "every policy of a run meets the same responses of pi_ref")
    torch.rand(3)  # the random state of others does not matter, and is not moved
    state = torch.get_rng_state()
    assert evaluate(policy) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert file.read_bytes() == left
    assert all(torch.equal(weights[name], now) for name, now in policy.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in policy.parameters())


@pytest.mark.law
def test_without_a_judge_there_is_no_win_rate_but_the_rest_is_the_same(tmp_path, policy, ref, pairs):
    judged = evaluation(tmp_path / "judged", ref, pairs)(policy)
    metrics = evaluation(tmp_path / "blind", ref, pairs, judge=None)(policy)
    assert metrics == {**judged, "win_rate": None, "win_rate_ci": None, "golden_reward": None}
    rows = read_rows(tmp_path / "blind" / "responses.jsonl")
    assert all(row["reward"] is row["ref_reward"] is None for row in rows)
    eval.write_samples(tmp_path / "samples.md", rows)
    assert "None" not in (tmp_path / "samples.md").read_text()


def by_length(prompts, responses):  # of both texts, so that a response judged with another's prompt is noticed
    return [float(len(prompt) - len(response)) for prompt, response in zip(prompts, responses, strict=True)]


@pytest.mark.law
def test_another_judge_decides_and_its_reward_has_its_own_name(tmp_path, policy, ref, pairs):
    metrics = evaluation(tmp_path, ref, pairs, judge=Judge("by length", by_length))(policy)
    rows = read_rows(tmp_path / "responses.jsonl")
    for row in rows:
        assert row["reward"] == len(row["prompt"]) - len(row["response"])
        assert row["ref_reward"] == len(row["prompt"]) - len(row["ref_response"])
    assert metrics["judge_reward"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows))
    assert "golden_reward" not in metrics or metrics["golden_reward"] is None


@pytest.mark.law
def test_a_second_judge_measures_the_same_responses_and_more_can_be_asked(tmp_path, policy, ref, pairs):
    alone = evaluation(tmp_path / "alone", ref, pairs)(policy)
    metrics = evaluation(tmp_path, ref, pairs, second=Judge("by length", by_length),
                         more=lambda policy, rows: {"rows": len(rows)})(policy)
    rows = read_rows(tmp_path / "responses.jsonl")
    mine, theirs = (by_length([row["prompt"] for row in rows], [row[name] for row in rows])
                    for name in ("response", "ref_response"))
    rate, interval = win_rate_over(mine, theirs, 3)
    assert metrics == {**alone, "second_win_rate": rate, "second_win_rate_ci": interval,
                       "second_reward": sum(mine) / 40, "rows": 40}


# ---------------------------------------------------------------------------------------------------
# runs on disk, as a training command leaves them

def measured(step: int, rate, kl: float) -> dict:
    """A line of metrics.jsonl; without a judge, `rate` is None."""
    interval, reward = (None, None) if rate is None else ([rate - 0.04, rate + 0.04], 4 * rate)
    return {"step": step, "loss": 0.5, "tokens": 100, "win_rate": rate, "win_rate_ci": interval,
            "golden_reward": reward, "reverse_kl": kl, "off_support": 0.25, "response_length": 6.5,
            "accuracy": 0.5 + kl / 100, "chosen_logratio": -kl, "rejected_logratio": -2 * kl}


def fake_run(directory, algorithm="dpo", rates=(0.5, 0.71, 0.66), rewards=(1.0, 0.0, 2.0), prompts=PROMPTS, **settings):
    """Three measured steps, 0, 2 and 4, each followed by one that was not."""
    lines = [line for i, rate in enumerate(rates)
             for line in (measured(2 * i, rate, 3.0 * i), {"step": 2 * i + 1, "loss": 0.4, "tokens": 100})][:-1]
    write_rows(directory / "metrics.jsonl", lines)
    write_rows(directory / "responses.jsonl", [
        dict(prompt=prompt, response=" good.", reward=reward, ref_response=" dull.", ref_reward=0.0)
        for prompt, reward in zip(prompts, rewards)])
    summary = {"algorithm": algorithm, "settings": {"algorithm": algorithm, "out": str(directory), **settings}}
    write_text(directory / "summary.json", json.dumps(summary))
    return directory


def is_png(path) -> bool:
    return path.read_bytes()[:8] == PNG and path.stat().st_size > 5000


def test_metrics_are_read_line_by_step_and_a_directory_that_is_no_run_is_named(tmp_path):
    assert [line["step"] for line in read_metrics(fake_run(tmp_path / "dpo"))] == [0, 1, 2, 3, 4]
    for other in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"^{other}: not a run, for it has no metrics.jsonl; name directories"):
            read_metrics(other)


def test_against_compares_two_runs_prompt_by_prompt(tmp_path):
    one = fake_run(tmp_path / "one", rewards=(1, 0, 2))
    two = fake_run(tmp_path / "two", rewards=(0, 0, 3))  # a win, a tie, a loss
    assert against(one, two) == (0.5, wilson_interval(1.5, 3))
    three = fake_run(tmp_path / "three", rewards=(0, -1, 3))
    assert against(one, three)[0] == pytest.approx(1 - against(three, one)[0]) == 2 / 3


def test_against_refuses_runs_on_other_prompts_or_without_a_judge(tmp_path):
    one = fake_run(tmp_path / "one")
    for prompts in (PROMPTS[::-1], PROMPTS[:2]):
        other = fake_run(tmp_path / "other", prompts=prompts)
        with pytest.raises(UserError, match="one and .*other were evaluated on different prompts; give both"):
            against(one, other)
    blind = fake_run(tmp_path / "blind", rewards=(1, None, 2))
    with pytest.raises(UserError, match="run without a judge"):
        against(one, blind)


def cells(text: str) -> list[list[str]]:
    """The cells of a printed table, which two spaces or more keep apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_a_table_has_a_line_a_run_and_a_dash_for_what_was_not_measured():
    header, judged, blind = cells(table([{"run": "hypo", **measured(4, 0.75, 2.0)},
                                         {"run": "a-longer-name", **measured(400, None, 2.0)}]))
    assert header == ["run", "step", "win rate [95 % of sampling]", "reward", "reverse KL, nats", "off support",
                      "length", "accuracy", "log-ratio chosen / rejected"]
    assert judged == ["hypo", "4", "0.750 [0.710, 0.790]", "+3.00", "2.00", "0.250", "6.5", "0.520", "-2.0 / -4.0"]
    assert blind == ["a-longer-name", "400", "-", "-", "2.00", "0.250", "6.5", "0.520", "-2.0 / -4.0"]


def test_a_table_shows_the_reward_of_another_judge_and_a_second_win_rate():
    row = {"run": "hypo", **measured(4, 0.75, 2.0)}
    row["judge_reward"] = row.pop("golden_reward") - 10
    header, shown = cells(table([{**row, "second_win_rate": 0.25}]))
    assert dict(zip(header, shown))["judge's reward"] == "-7.00"
    assert dict(zip(header, shown))["second judge's win rate"] == "0.250"


@pytest.mark.parametrize("rates", [(0.5, 0.7, 0.6), (None, None, None)], ids=["judged", "without a judge"])
def test_a_curve_is_a_picture(tmp_path, rates):
    lines = read_metrics(fake_run(tmp_path / "dpo", rates=rates))
    summary = {"algorithm": "dpo", "model": "tiny", "beta": 0.1, "seed": 0, "win_rate": rates[-1]}
    plot_curve(tmp_path, summary, lines)
    assert is_png(tmp_path / "curve.png")


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, while it is drawn: lines (x, y, colour) and labels (text, position)."""
    from matplotlib.axes import Axes

    seen, plot, annotate = SimpleNamespace(lines=[], labels=[]), Axes.plot, Axes.annotate

    def spy_plot(axis, x, y, **how):
        seen.lines.append((x, y, how["color"]))
        return plot(axis, x, y, **how)

    def spy_annotate(axis, text, xy, *where, **how):
        if text:  # an arrow has none
            seen.labels.append((text, xy))
        return annotate(axis, text, xy, *where, **how)

    monkeypatch.setattr(Axes, "plot", spy_plot)
    monkeypatch.setattr(Axes, "annotate", spy_annotate)
    return seen


def test_the_curve_of_a_learned_reward_shows_it_beside_the_golden_one(tmp_path, drawn):
    lines = [measured(0, 0.5, 0.0), {"step": 1, "proxy_reward": 0.5}, {**measured(2, 0.7, 3.0), "proxy_reward": 0.9}]
    summary = {"algorithm": "ppo", "model": "tiny", "beta": 0.1, "seed": 0, "win_rate": 0.7, "golden_reward": 2.8}
    plot_curve(tmp_path, summary, lines)
    lines_of_the_third_axis = [(list(x), y) for x, y, _ in drawn.lines[-2:]]
    assert lines_of_the_third_axis == [([0, 2], [2.0, 2.8]), ([1, 2], [0.5, 0.9])]
    assert [text for text, _ in drawn.labels] == ["golden", "learned"] and is_png(tmp_path / "curve.png")


def test_goodharts_picture_has_a_labelled_line_a_run_in_its_algorithms_colour(tmp_path, drawn):
    runs = {"runs/hypo": [measured(0, 0.5, 0.0), {"step": 1}, measured(2, 0.8, 3.0)],
            "runs/mine": [measured(0, 0.5, 0.0), measured(2, 0.6, 9.0)]}
    plot_goodhart(runs, {"runs/hypo": "hypo", "runs/mine": "unheard of"}, tmp_path / "goodhart.png")
    assert drawn.lines == [([0.0, 3.0], [0.5, 0.8], "#c2410c"), ([0.0, 9.0], [0.5, 0.6], "black")]
    assert drawn.labels == [("hypo", (3.0, 0.8)), ("mine", (9.0, 0.6))]
    assert is_png(tmp_path / "goodhart.png")


def test_in_goodharts_picture_runs_of_one_algorithm_share_a_label(tmp_path, drawn):
    runs = {f"runs/seed-{seed}": [measured(0, 0.5, 0.0), measured(2, rate, 3.0 + seed)]
            for seed, rate in enumerate((0.6, 0.8, 0.7))}
    plot_goodhart({**runs, "runs/mine": [measured(0, 0.5, 0.0)]}, {**dict.fromkeys(runs, "dpo"), "runs/mine": "hypo"},
                  tmp_path / "goodhart.png")
    assert drawn.labels == [("dpo", (3.0, 0.6)), ("mine", (0.0, 0.5))]


def test_a_second_judge_has_a_line_in_the_curve_and_a_panel_in_goodharts_picture(tmp_path, drawn, monkeypatch):
    rows = [{**measured(step, rate, kl), "second_win_rate": 1 - rate}
            for step, rate, kl in ((0, 0.5, 0.0), (2, 0.8, 3.0))]
    summary = {"algorithm": "dpo", "model": "tiny", "beta": 0.1, "seed": 0, "win_rate": 0.8, "second_win_rate": 0.2}
    plot_curve(tmp_path, summary, rows)
    assert [(text, y) for text, (_, y) in drawn.labels] == [("first judge", 0.8), ("second judge", pytest.approx(0.2))]
    drawn.lines.clear()
    figures = []
    monkeypatch.setattr(eval, "save", lambda figure, path: figures.append(figure))
    plot_goodhart({"runs/dpo": rows}, {"runs/dpo": "dpo"}, tmp_path / "goodhart.png")
    assert [y for _, y, _ in drawn.lines] == [[0.5, 0.8], [0.5, pytest.approx(0.2)]]
    for axis in figures[0].axes:
        low, high = axis.get_ylim()
        assert low < 0.2 and 0.8 < high, f"both panels show both judges' rates: {low}, {high}"


def test_the_command_prints_one_table_and_draws_the_picture(tmp_path, capsys):
    hypo = fake_run(tmp_path / "hypo", "hypo", rates=(0.5, 0.75, 0.81), rewards=(1, 0, 2))
    dpo = fake_run(tmp_path / "dpo", "dpo", rewards=(0, 0, 3))
    main([str(hypo), str(dpo), "--against", str(dpo), "--out", str(tmp_path / "g.png")])
    printed = capsys.readouterr().out
    rows = cells(printed)[:4]
    assert [row[0] for row in rows] == ["run", "pi_ref", str(hypo), str(dpo)]
    assert [row[1] for row in rows] == ["step", "0", "4", "4"], "pi_ref is step 0; a run is shown as it ended"
    assert [row[2].split()[0] for row in rows[1:]] == ["0.500", "0.810", "0.660"]
    assert f"{hypo} against {dpo}: win rate 0.500 [" in printed and str(tmp_path / "g.png") in printed
    assert "seeds" not in printed, "runs of two algorithms have no common mean"
    assert is_png(tmp_path / "g.png")


def test_a_run_is_not_compared_with_itself(tmp_path, capsys):
    one, two = (str(fake_run(tmp_path / name)) for name in ("one", "two"))
    main([one, two, "--against", two, "--out", str(tmp_path / "g.png")])
    printed = capsys.readouterr().out
    assert f"{one} against {two}: win rate" in printed and f"{two} against {two}" not in printed


def test_the_command_shows_a_run_that_was_interrupted_and_has_no_summary(tmp_path, capsys):
    run = fake_run(tmp_path / "dpo")
    (run / "summary.json").unlink()
    lines = read_rows(run / "metrics.jsonl")
    write_rows(run / "metrics.jsonl", lines[:4])  # stopped at step 3, measured last at step 2
    main([str(run), "--out", str(tmp_path / "g.png")])
    assert cells(capsys.readouterr().out)[2][:2] == [str(run), "2"] and is_png(tmp_path / "g.png")


def test_the_command_shows_runs_without_a_judge(tmp_path, capsys):
    blind = fake_run(tmp_path / "blind", rates=(None, None, None), judge="none")
    judged = fake_run(tmp_path / "judged")
    main([str(blind), str(judged), "--out", str(tmp_path / "g.png")])
    assert cells(capsys.readouterr().out)[2][2] == "-" and is_png(tmp_path / "g.png")


def test_a_finished_run_leaves_its_summary_its_curve_and_a_policy_that_loads(tmp_path, capsys, policy, ref):
    out = fake_run(tmp_path / "dpo")
    torch.save({"seconds": 2.0}, out / "checkpoint.pt")
    args = Namespace(algorithm="dpo", model="tiny", seed=3, steps=4, beta=0.1, out=out, resume=False)
    finish(starting(policy, ref, []), args)
    summary = eval.read_summary(out)
    expected = {"algorithm": "dpo", "model": "tiny", "seed": 3, "steps": 4, "beta": 0.1, "win_rate": 0.66,
                "golden_reward": 4 * 0.66, "reverse_kl": 6.0, "response_length": 6.5, "seconds": 2.0,
                "off_support": 0.25, "commit": run.commit(),
                "tokens_per_second": 250, "judge": "golden", "second_judge": None,
                "settings": {"algorithm": "dpo", "model": "tiny", "seed": 3, "steps": 4, "beta": 0.1}}
    assert {name: summary[name] for name in expected} == expected and len(summary["win_rate_ci"]) == 2
    assert is_png(out / "curve.png") and "| The plot was |" in (out / "samples.md").read_text()
    assert [row[0] for row in cells(capsys.readouterr().out)[:3]] == ["run", "pi_ref", "dpo"]
    loaded = LM.load(str(out / "policy"))
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in policy.state_dict().items())


# ---------------------------------------------------------------------------------------------------
# a finished run measured again, from its own files


@pytest.fixture
def trained(model_dir, tmp_path, monkeypatch):
    """trained(main, name, *flags) trains in directory `name` of a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval, "plot_curve", lambda *args: None)  # it would take as long as the run

    def train(command, name, *flags):
        command.main(fitting(["--model", str(model_dir), *FAST, "--lr", "1e-2", "--out", name, *flags]))
        return responses(name)

    return train


def responses(directory) -> list[dict]:
    """The rows of responses.jsonl; log pi_ref is left out, for fast.py rounds it otherwise than lm.py."""
    return [{name: value for name, value in row.items() if name != "ref_logp"}
            for row in read_rows(Path(directory) / "responses.jsonl")]


def again(name, samples: int, *more) -> list[dict]:
    """The responses of run `name` measured again."""
    main([name, "--samples", str(samples), *more])
    return responses(Path(name) / "again")


def test_a_run_in_the_world_is_measured_again(trained, tmp_path, capsys):
    world_flags = "--data", "world", "--sft-steps", "0"
    a, b = trained(hypo, "a", *world_flags), trained(dpo, "b", *world_flags)
    assert [again(name, 4) for name in "ab"] == [a, b], "as many as before: the same"
    more = again("a", 10, "--against", "b")
    assert "a against b: win rate" in capsys.readouterr().out
    assert len(more) == len(read_rows("b/again/responses.jsonl")) == 10
    assert all(row["reward"] == golden_reward(row["prompt"], row["response"]) for row in more)
    assert [responses(name) for name in "ab"] == [a, b], "the runs stay as they were"
    line, = read_metrics("a/again")
    rewards, ref_rewards = zip(*((row["reward"], row["ref_reward"]) for row in more))
    assert line["step"] == 2 and line["win_rate"] == win_rate_over(
        rewards, ref_rewards, len({row["prompt"] for row in a}))[0]
    (tmp_path / "a" / "summary.json").unlink()
    with pytest.raises(UserError, match="--samples: a is not finished"):
        again("a", 4)


def test_a_run_on_a_task_is_measured_again_by_both_judges(trained, tmp_path, capsys):
    write_task(tmp_path / "task")
    rows = trained(hypo, "a", "--data", "task", "--sft-steps", "2")
    for name in ("sft", "prompts", "held_out_prompts"):
        (tmp_path / "task" / f"{name}.jsonl").unlink()
    assert again("a", 4) == rows
    (line,), last = read_metrics("a/again"), read_metrics("a")[-1]
    for name in ("judge_reward", "second_reward", "win_rate", "second_win_rate", "reverse_kl"):
        assert line[name] == pytest.approx(last[name], abs=1e-5)
    assert "second judge's win rate" in capsys.readouterr().out


def test_a_run_that_its_reward_model_judges_is_measured_again_wherever_it_is(trained, tmp_path):
    """Pairs from a file have no judge, so the reward model that the run left in its directory measures."""
    write_rows("pairs.jsonl", [{"prompt": prompt, "chosen": " superb.", "rejected": " dull."} for prompt in PROMPTS])
    rows = trained(rlhf, "a", "--data", "pairs.jsonl", "--reward-epochs", "1")
    (tmp_path / "pairs.jsonl").unlink()
    assert again("a", 4) == rows and all(row["reward"] is not None for row in rows)
    shutil.move("a", "b")
    assert again("b", 4) == rows, "as when a later run moved it aside"


def test_a_run_whose_pi_ref_or_judge_is_gone_is_named(trained, tmp_path):
    write_task(tmp_path / "task")
    trained(hypo, "a", "--data", "task", "--sft-steps", "0")
    summary = eval.read_summary("a")
    for role, other in (("pi_ref", "no/such"), ("judge", str(tmp_path))):
        write_text("a/summary.json", json.dumps({**summary, role: other}))
        with pytest.raises(UserError, match=f"a .*{other}"):
            again("a", 4)


# ---------------------------------------------------------------------------------------------------
# a finished run asked, or measured on prompts of one's own

PROMPT = "The plot was"


@pytest.fixture(scope="module")
def shop(model_dir, tmp_path_factory):
    """A directory with two runs on one task, whose two judges measure."""
    directory = tmp_path_factory.mktemp("shop")
    write_task(directory / "task")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval, "plot_curve", lambda *args: None)
        for command in (hypo, dpo):
            command.main(["--model", str(model_dir), *FAST, "--lr", "1e-2", "--sft-steps", "0", "--data",
                          str(directory / "task"), "--out", str(directory / command.__name__)])
    return directory


@pytest.fixture
def in_shop(shop, monkeypatch):
    monkeypatch.chdir(shop)


def policies(*runs) -> dict[str, LM]:
    """pi_ref and the policies of the runs, by the names that are printed."""
    return {"pi_ref": LM.load(eval.read_summary(runs[0])["pi_ref"]),
            **{name: LM.load(f"{name}/policy") for name in runs}}


def said(printed: str) -> tuple[dict[str, str], list[list[str]]]:
    """({whose: answer}, the table's cells) of what --ask prints."""
    *answers, shown = printed.strip("\n").split("\n\n")
    blocks = (answer.split("\n", 1) for answer in answers)
    return {name.rstrip(":").removesuffix(", cut"): text for name, text in blocks}, cells(shown)


def asked(capsys, *arguments):
    capsys.readouterr()
    main([*arguments])
    return said(capsys.readouterr().out)


def sampled(models: dict[str, LM], prompt=PROMPT, seed=0, number=0, **how) -> dict[str, list[int]]:
    """Each model's own sample for the question of that number."""
    return {name: model.sample([model.encode_prompt(prompt)], 6, torch.Generator().manual_seed(
        run.seed_of(seed, "ask", number)), **how)[0] for name, model in models.items()}


@pytest.mark.parametrize("runs", [["hypo"], ["hypo", "dpo"]], ids=["one run", "two runs"])
def test_an_answer_is_the_policys_sample_with_its_log_ratio_and_both_rewards(in_shop, capsys, runs):
    models = policies(*runs)
    ids = models["pi_ref"].encode_prompt(PROMPT)
    texts, (header, *rows) = asked(capsys, *runs, "--ask", PROMPT)
    assert header == [*(f"log-ratio of {name}, nats" for name in runs), "reward", "second judge's"]
    assert [*texts] == [row[0] for row in rows] == [*models]
    ratios = []
    for (name, response), row in zip(sampled(models).items(), rows):
        text = models["pi_ref"].decode(response)
        assert texts[name] == text.strip(), name
        logps = [model.logps([ids], [response]).item() for model in models.values()]
        numbers = [*(logp - logps[0] for logp in logps[1:]), load_judge("task/judge")([PROMPT], [text])[0],
                   golden_reward(PROMPT, text)]
        assert [float(cell) for cell in row[1:]] == pytest.approx(numbers, abs=0.0051), name
        ratios += numbers[:len(runs)]
    assert min(map(abs, ratios)) > 0.02, "training moved every log-prob, so that a wrong one would show"


def test_of_pi_ref_itself_every_log_ratio_is_0_and_the_answers_are_equal(in_shop, capsys, tmp_path, model_dir):
    shutil.copytree("hypo", tmp_path / "same")
    shutil.rmtree(tmp_path / "same" / "policy")
    shutil.copytree(model_dir, tmp_path / "same" / "policy")
    texts, (_, *rows) = asked(capsys, str(tmp_path / "same"), "--ask", PROMPT)
    assert [row[1] for row in rows] == ["+0.00", "+0.00"] and len({*texts.values()}) == 1
    assert len({*asked(capsys, "hypo", "--ask", PROMPT)[0].values()}) == 2


def greedy(model: LM, n: int) -> str:
    """The most likely token, n times or to the end."""
    ids, response = model.encode_prompt(PROMPT), []
    while len(response) < n and not model.ended(response):
        response.append(model.response_logits([ids], [[*response, 0]])[0][0, -1].argmax().item())
    return model.decode(response).strip()


def test_a_low_temperature_is_greedy_and_a_seed_draws_again(in_shop, capsys):
    models = policies("hypo")
    most_likely = {name: greedy(model, 4) for name, model in models.items()}
    for seed in "01":
        assert asked(capsys, "hypo", "--ask", PROMPT, "--temperature", "0.01", "--seed", seed,
                     "--max-new-tokens", "4")[0] == most_likely
    ones = [asked(capsys, "hypo", "--ask", PROMPT, "--seed", seed)[0] for seed in "011"]
    assert ones[0] != ones[1] == ones[2]
    warm = asked(capsys, "hypo", "--ask", PROMPT, "--temperature", "1.5")[0]
    assert warm == {name: models[name].decode(response).strip()
                    for name, response in sampled(models, temperature=1.5).items()}


@pytest.mark.parametrize("end", ["\n\nThe plot felt\n", ""], ids=["an empty line", "Ctrl-D"])
def test_the_prompt_loop_draws_afresh_goes_on_after_a_mistake_and_ends(in_shop, capsys, monkeypatch, end):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\nThe zebra was\n{PROMPT}{end}"))
    main(["hypo", "--ask"])
    _, first, mistake, again, *last = capsys.readouterr().out.split("prompt (an empty line ends)> ")
    assert [text.strip() for text in last] == [""], "what follows the end is not asked"
    assert "every word" in mistake and "zebra" not in "".join(said(first)[0].values())
    models = policies("hypo")
    for number, block in ((0, first), (2, again)):
        assert said(block)[0] == {name: models[name].decode(response).strip()
                                  for name, response in sampled(models, number=number).items()}
    assert said(first)[0] != said(again)[0]


def test_runs_of_another_pi_ref_are_not_asked_together(in_shop, tmp_path, model_dir):
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.copytree("dpo", tmp_path / "other")
    write_text(tmp_path / "other" / "summary.json", json.dumps(
        {**eval.read_summary("dpo"), "pi_ref": str(tmp_path / "model")}))
    with pytest.raises(UserError, match="no common pi_ref, but .*random and .*model"):
        main(["hypo", str(tmp_path / "other"), "--ask", PROMPT])


def test_prompts_of_ones_own_are_measured_from_both_kinds_of_file(in_shop, tmp_path, capsys):
    mine = [PROMPT, "The acting felt", "The plot felt"]
    (tmp_path / "mine.txt").write_bytes("\ufeffThe plot was\r\n\r\nThe acting felt\nThe plot felt".encode())
    write_rows(tmp_path / "mine.jsonl", [{"prompt": prompt} for prompt in mine])
    left = []
    for name in ("mine.txt", "mine.jsonl"):
        main(["hypo", "--prompts", str(tmp_path / name), "--out", str(tmp_path / "g.png")])
        left.append(read_rows("hypo/again/responses.jsonl"))
    assert left[0] == left[1] and [row["prompt"] for row in left[0]] == mine
    header, shown = cells(capsys.readouterr().out)[-4:-2]
    assert (header[:2], shown[:2]) == (["run", "step"], ["hypo", "2"]), "no row of pi_ref: it has met other prompts"
    line, = read_metrics("hypo/again")
    assert line["judge_reward"] == pytest.approx(sum(row["reward"] for row in left[0]) / 3)
    assert dict(zip(header, shown))["judge's reward"] == f"{line['judge_reward']:+.2f}"
    main(["hypo", "dpo", "--against", "dpo", "--prompts", str(tmp_path / "mine.txt"), "--samples", "7",
          "--out", str(tmp_path / "g.png")])
    assert [row["prompt"] for row in read_rows("dpo/again/responses.jsonl")] == (3 * mine)[:7]
    assert "hypo against dpo: win rate" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, words", [
    ("mine.txt", "The plot was\nThe zebra was", ":2: prompt: --model does not know every word"),
    ("mine.txt", "The plot was\n" + "The plot" + " was" * 70, ":2: the prompt .* has 72 tokens; .* leaves room for 58"),
    ("mine.txt", b"The plot was\nThe caf\xe9", ":2: field 'prompt' has half a character"),
    ("mine.txt", "\n \n", ": no prompts"),
    ("mine.jsonl", '{"prompt": "The plot was"}\n{"text": "The plot"}', ":2: field 'prompt' is missing"),
    ("mine.jsonl", '{"prompt": [{"role": "user"}]}', ":1: field 'prompt': field 'content' must be a string"),
    ("mine.jsonl", '{"prompt": []}', ":1: field 'prompt': expected messages, got"),
    ("mine.jsonl", '{"prompt": [{"role": "user", "content": "The plot was"}]}', ":1: messages need a chat template"),
    ("mine.jsonl", '{"prompt": "The plot \\ud800 was"}', ":1: field 'prompt' has half a character"),
    ("mine.jsonl", '["The plot was"]', ": row 0: expected a JSON object")])
def test_a_prompt_that_cannot_be_used_is_named_with_its_line(in_shop, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"{name}{words}"):
        main(["hypo", "--prompts", str(tmp_path / name)])


@pytest.mark.parametrize("flags, words", [
    (["--ask", "x", "--samples", "3"], "--samples would have no effect with --ask"),
    (["--seed", "0"], "--seed would have no effect without --ask"),
    (["--ask", "x", "--temperature", "0"], "--temperature: must be a finite number of at least 0.01")])
def test_flags_of_another_command_are_refused(in_shop, capsys, flags, words):
    with pytest.raises(SystemExit):
        main(["hypo", *flags])
    assert words in capsys.readouterr().err


def test_a_run_of_conversations_reads_a_text_as_the_users_turn(in_shop, tmp_path, monkeypatch, capsys, model_dir):
    shutil.copytree(model_dir, tmp_path / "chat")
    shutil.copytree("hypo", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    tokenizer = LM.load("chat").tokenizer
    tokenizer.chat_template = "{% for turn in messages %} I{{ turn['content'] }}<eos>{% endfor %}"
    for directory in ("chat", "run/policy"):
        tokenizer.save_pretrained(directory)
    write_text("run/summary.json", json.dumps(
        {**eval.read_summary("run"), "pi_ref": "chat", "judge": "golden", "second_judge": None}))
    rows = read_rows("run/responses.jsonl")
    turn = [{"role": "user", "content": PROMPT}]
    write_rows("run/responses.jsonl", [{**row, "prompt": [{**turn[0], "content": row["prompt"]}]} for row in rows])
    models = policies("run")
    assert models["run"].encode_prompt(turn) != models["run"].encode_prompt(PROMPT)
    assert asked(capsys, "run", "--ask", PROMPT)[0] == {
        name: models[name].decode(response).strip() for name, response in sampled(models, turn).items()}
    write_text("mine.txt", PROMPT)
    main(["run", "--prompts", "mine.txt"])
    assert [row["prompt"] for row in read_rows("run/again/responses.jsonl")] == [turn]
    assert len(again("run", 4)) == 4, "its own prompts, which are no texts, are measured again, too"
