"""The studies: a job is the algorithm's own command, replay gives the online run again, jobs come in order, the
statistics are what they say, and results/ is what its JSON files say, which in turn follow from their evaluations."""

import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from argparse import Namespace
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from test_run import not_in_the_glossary

import data
import dpo
import eval
import hypo
import rlhf
import world
from eval import read_metrics, table
from experiments import __main__ as command
from experiments import draw, jobs, pages, setting, stats, studies
from experiments.jobs import with_needs
from experiments.setting import (
    CLASSIFY,
    EARLY,
    FINAL,
    OFFLINE,
    Run,
    needs,
    read_stream,
    recorded,
    replay,
    setting_of,
)
from experiments.stats import Results
from experiments.studies import REPLAYS, STUDIES
from judges import implicit_rewards, judged_samples, load_judge
from lm import LM, Encoded
from models import random_gpt2
from run import UserError, alone, read_rows

ROOT = Path(__file__).parent.parent
RUNS = list(dict.fromkeys(job for study in STUDIES.values() for job in study.runs))
REPORTS = {name: ROOT / "results" / f"{name}.json" for name in STUDIES}
law = pytest.mark.law
seeds = st.integers(0, 10**6).map(random.Random)


def step(number: int) -> Namespace:
    return Namespace(number=number)


# ---------------------------------------------------------------------------------------------------
# the saved stream

def pair(*number: int) -> Encoded:
    return Encoded(list(number), [1], [2], -1.25, -2.5)


streams = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(
    lambda sizes: [[pair(step, i) for i in range(size)] for step, size in enumerate(sizes)])


def batches_of(path, stream, window, seed=0):
    path.write_text("".join(json.dumps(pairs) + "\n" for pairs in stream))
    source = replay(path, window, None, Namespace(seed=seed))
    return [source(step(number)) for number in range(1, len(stream) + 1)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("stream") / "stream.jsonl"


@law
@given(streams, st.integers(0, 15), st.integers(0, 3))
def test_a_replay_uses_every_pair_once_at_its_step_size_and_within_its_window(file, stream, window, seed):
    batches = batches_of(file, stream, window, seed)
    assert [len(batch) for batch in batches] == [len(pairs) for pairs in stream]
    pairs = [pair for batch in batches for pair in batch]
    assert sorted(pairs) == sorted(pair for pairs in stream for pair in pairs)
    width = window or len(stream)
    assert all(number // width == pair.prompt[0] // width for number, batch in enumerate(batches) for pair in batch)
    if window == 1:
        assert batches == stream


@law
def test_a_replay_shuffles(file):
    stream = [[pair(number, i) for i in range(8)] for number in range(8)]
    for window in (2, 4, 0):
        assert batches_of(file, stream, window) != stream


def test_the_stream_of_a_resumed_run_has_every_step_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "online", lambda start, args: lambda step: [pair(step.number)])
    args = Namespace(out=tmp_path)
    source = recorded(None, args)
    for number in range(1, 6):  # interrupted in step 6; the last checkpoint is of step 3
        source(step(number))
    with open(tmp_path / "stream.jsonl", "a") as file:
        file.write('[{"step": 6')
    source = recorded(None, args)
    for number in range(4, 9):
        source(step(number))
    assert read_stream(tmp_path / "stream.jsonl") == [[pair(number)] for number in range(1, 9)]


# ---------------------------------------------------------------------------------------------------
# real runs, on a small random model

@pytest.fixture(scope="module")
def options(model_dir, tmp_path_factory):
    return Namespace(model=str(model_dir), work=tmp_path_factory.mktemp("study"), steps=6, batch_size=16, eval_every=3,
                     eval_samples=16, pairs=64, lr=5e-4, device="cpu", threads=1, jobs=1, seeds=range(1))


@pytest.fixture(scope="module")
def folder(options):
    """Of the seed."""
    return options.work / "0"


def execute(options, *todo):
    for job in with_needs([(0, job) for job in todo]):
        if not jobs.finished(options, *job):
            jobs.execute(options, *job)


def weights(run_directory) -> bytes:
    return (run_directory / "policy" / "model.safetensors").read_bytes()


PLAIN = {"online": (FINAL, dpo.main), "offline": (OFFLINE, dpo.main),
         "hypo": (Run("hypo", lam=0.004), hypo.main), "ppo": (Run("ppo"), rlhf.main)}


@pytest.mark.parametrize("job, main", PLAIN.values(), ids=PLAIN)
def test_a_job_is_the_plain_command_to_the_byte(job, main, options, folder, tmp_path):
    noisy = dataclasses.replace(job, labels="bradley-terry")  # as the commands draw them
    execute(options, noisy)
    job = noisy
    argv = [word for flag in jobs.flags_of(options, 0, job).items() for word in flag]
    main([*argv, "--out", str(tmp_path / "plain")])
    assert weights(tmp_path / "plain") == weights(folder / job.name)
    if job.label == "ipo":
        main([*argv, "--out", str(tmp_path / "other"), "--lr", "0.00051"])
        assert weights(tmp_path / "other") != weights(folder / job.name)


def test_the_replayed_stream_gives_the_online_run_to_the_byte_and_a_shuffled_one_does_not(options, folder):
    execute(options, FINAL, REPLAYS[1], REPLAYS[0])
    assert weights(folder / FINAL.name) == weights(folder / REPLAYS[1].name)
    assert weights(folder / FINAL.name) != weights(folder / REPLAYS[0].name)


def test_the_early_policy_is_the_online_run_stopped_early(options, folder):
    execute(options, FINAL, EARLY)
    early, whole = (read_metrics(folder / job.name) for job in (EARLY, FINAL))
    name = "train_chosen_logratio"
    assert len(early) == 2 and early[1][name] == whole[1][name]


@law
def test_win_rates_are_against_the_optimum_of_the_golden_reward_and_against_pi_ref():
    """By enumeration: two prompts, four responses each, of which pi_ref says some more often."""
    said = [[(-1, 3), (0, 4), (2, 1)], [(1, 2), (2, 2), (3, 4)]]  # (reward, how often), prompt by prompt
    columns = [[reward for reward, n in of_prompt for _ in range(n)] for of_prompt in said]
    samples = [{"reward": float(reward), "logp": -1.0} for row in zip(*columns) for reward in row]
    theirs, weights = setting.golden_weights(samples, 2)
    assert theirs.tolist() == columns
    for row, of_prompt in zip(weights, said):
        odds = [n * math.exp(reward) for reward, n in of_prompt]
        expected = [odd / n / sum(odds) for (_, n), odd in zip(of_prompt, odds) for _ in range(n)]
        assert row.tolist() == pytest.approx(expected), "pi_ref(y|x) exp(r) / Z(x), each prompt with its own Z"
    for (kl, rates), b in zip(setting.frontiers(samples), eval.OPTIMA):
        flat = [reward for of_prompt in columns for reward in of_prompt]
        odds, golden = ([math.exp(reward / temperature) for reward in flat] for temperature in (b, 1.0))
        for name, against in (("win_rate", [1.0] * len(flat)), ("golden_win_rate", golden)):
            wins = sum(a * c * ((x > y) + (x == y) / 2) for a, x in zip(odds, flat) for c, y in zip(against, flat))
            assert rates[name] == pytest.approx(wins / sum(odds) / sum(against)), (b, name)
        share = [odd / sum(odds) for odd in odds]
        assert kl == pytest.approx(sum(p * math.log(p * len(flat)) for p in share), abs=1e-9)


def test_a_run_is_an_ordinary_run_and_every_metric_is_in_the_glossary(options, folder):
    execute(options, OFFLINE)
    assert not not_in_the_glossary(folder / OFFLINE.name)
    left = {path.name for path in (folder / OFFLINE.name).iterdir()}
    assert {"metrics.jsonl", "summary.json", "curve.png", "policy", "responses.jsonl"} <= left
    assert "checkpoint.pt" not in left


def test_step_0_is_pi_ref(options, folder):
    execute(options, OFFLINE)
    line = read_metrics(folder / OFFLINE.name)[0]
    assert line["best_logratio"] == line["data_chosen_logratio"] == line["reverse_kl"] == 0
    assert line["data_accuracy"] == 0.5


def test_what_studies_add_is_of_the_evaluated_responses(options, folder):
    execute(options, OFFLINE)
    rows = read_rows(folder / OFFLINE.name / "responses.jsonl")
    line = read_metrics(folder / OFFLINE.name)[-1]
    proxy = load_judge(str(folder / setting_of(OFFLINE).name / "reward" / "model"))
    rewards = proxy([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert line["sampled_proxy_reward"] == pytest.approx(statistics.mean(rewards))
    assert line["good"] == statistics.mean(row["reward"] >= 4 for row in rows)
    logps = [row["ref_logp"] for row in rows]
    samples, = (read_rows(path) for path in Path(os.environ["HYPO_CACHE"]).glob("samples-*[!k]")
                if len(read_rows(path)) == 256)  # 16 for each of 16
    own = sorted(row["logp"] for row in samples)
    assert line["unlikely"] == statistics.mean(logp < own[25] for logp in logps)
    assert line["off_support"] == statistics.mean(logp < own[0] for logp in logps)
    beats = [statistics.mean((row["reward"] > other["reward"]) + (row["reward"] == other["reward"]) / 2
                             for other in samples[i % 128::128]) for i, row in enumerate(rows)]
    assert line["win_rate"] == pytest.approx(statistics.mean(beats))


def test_each_online_run_is_labelled_by_its_own_judge(options, folder):
    implicit = dataclasses.replace(FINAL, judge="implicit")
    execute(options, FINAL, implicit)
    ref, offline = LM.load(options.model), LM.load(str(folder / OFFLINE.name / "policy"))
    judges = {FINAL: load_judge(str(folder / setting_of(FINAL).name / "reward" / "model")),
              implicit: world.Judge("implicit", implicit_rewards(offline, ref, 0.1, 24))}
    for job, judge in judges.items():
        pairs = [pair for pairs in read_stream(folder / job.name / "stream.jsonl") for pair in pairs]
        assert pairs and (setting.judged_gaps(judge, ref, pairs) > 0).all(), job.name
        others = [setting.judged_gaps(other, ref, pairs) for other in judges.values() if other is not judge]
        assert all((gaps < 0).any() for gaps in others), "another judge would have labelled otherwise"


def test_the_best_unseen_response_is_not_in_the_pairs_and_is_good(options, folder):
    execute(options, setting_of(FINAL))
    policy, made = LM.load(options.model), folder / setting_of(FINAL).name
    best, pairs = (data.read_pairs(setting.pairs_file(made, kind)) for kind in ("best", "pairs"))
    assert len(best) == 4 and len(pairs) == 64
    for row, pair in zip(best, pairs):
        assert row.prompt == pair.prompt and row.rejected == pair.chosen
        assert policy.decode(row.chosen) not in (policy.decode(pair.chosen), policy.decode(pair.rejected))
    gaps = setting.judged_gaps(world.golden_judge, policy, best)
    assert (gaps >= 0).float().mean() > 0.9 and gaps.mean() > 0.5, "the best of 32"


def test_a_finished_run_is_known_and_other_settings_are_refused(options):
    execute(options, OFFLINE)
    assert jobs.finished(options, 0, OFFLINE)
    other = Namespace(**{**vars(options), "batch_size": 4})
    with pytest.raises(UserError, match=r"other settings: --batch-size 16 \(now 4\)"):
        jobs.finished(other, 0, OFFLINE)


def test_classify_counts_against_the_golden_reward(options, folder, monkeypatch):
    execute(options, CLASSIFY)
    measured = json.loads((folder / CLASSIFY.name / "job.json").read_text())
    assert len(measured["steps"]) == len(measured["proxy"]) == 10
    prompts, held_out = world.world_prompts()
    monkeypatch.setattr(world, "world_prompts", lambda: (prompts, held_out[:16]))  # for speed
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        monkeypatch.setattr(data, "judge_named", lambda *a, sign=sign: lambda prompts, responses: [
            sign * reward for reward in world.golden_judge(prompts, responses)])
        assert set(setting.classify(folder)["proxy"]) == {expected}

    # policies whose log-ratios are the golden rewards rank everything rightly, the pairs of their own samples, too
    monkeypatch.setattr(setting, "implicit_gaps", lambda policy, pairs: setting.judged_gaps(
        world.golden_judge, policy, pairs))
    measured = setting.classify(folder)
    assert {*measured["online"], *measured["offline"], measured["online_self"], measured["offline_self"]} == {1.0}


@law
def test_implicit_gaps_are_the_log_ratio_of_chosen_less_rejected(model_dir):
    ref = LM.load(str(model_dir))
    policy = random_gpt2(ref.tokenizer, seed=5, dtype=torch.float32)
    pairs = data.add_ref_logps(ref, [Encoded([1, 2], [3, 0], [4, 5, 0]), Encoded([2], [5, 0], [0])])
    policy.batch_size = 1
    gaps = setting.implicit_gaps(policy, pairs)
    for gap, pair in zip(gaps, pairs):
        chosen, rejected = (policy.logps([pair.prompt], [side]) - ref.logps([pair.prompt], [side])
                            for side in (pair.chosen, pair.rejected))
        assert gap.item() == pytest.approx((chosen - rejected).item(), abs=1e-4)


@law
def test_likely_pairs_leave_out_what_pi_ref_is_least_likely_to_write(model_dir):
    policy = LM.load(str(model_dir))
    args = Namespace(pairs=100, seed=0, max_new_tokens=24, device="cpu")
    samples = judged_samples(policy, world.world_prompts()[1], 128, 24, 0, world.golden_judge, None)
    floor = sorted(row["logp"] for row in samples)[12]
    assert eval.quantile([row["logp"] for row in samples], 0.1) == floor

    def below(pairs):
        pairs = data.add_ref_logps(policy, pairs)
        return sum(logp < floor - 1e-3 for pair in pairs for logp in (pair.ref_chosen, pair.ref_rejected))

    likely = setting.make_pairs(Run("dpo", data="likely", labels="bradley-terry"), policy, samples, None, args)
    assert len(likely) == 100 and below(likely) == 0
    plain = data.collect(setting.responder(policy, args), world.world_prompts()[0], 100, 0, world.golden_judge)
    assert below(plain) > 5


@law
def test_labels_are_signs_or_drawn_and_of_the_settings_own_world(options, folder):
    for job in (FINAL, dataclasses.replace(FINAL, labels="bradley-terry"), dataclasses.replace(FINAL, world="fitting")):
        execute(options, setting_of(job))
        gaps = {name: setting.judged_gaps(judge, LM.load(options.model), data.read_pairs(setting.pairs_file(
            folder / setting_of(job).name))) for name, judge in setting.GOLDEN_JUDGES.items()}
        sure = (gaps[job.world] > 0).all().item()
        assert sure == (job.labels == "sign"), "the larger reward always wins, and ties are left out; or noise"
        assert job.world == "additive" or (gaps["additive"] < 0).any()


@law
@given(st.lists(st.sampled_from([*world.VALENCE, "not", "never", "and", "but", "the", "plot", ",", "."]), max_size=12))
def test_in_the_second_world_an_opinion_counts_by_the_one_before_it(words):
    text = " " + " ".join(words) + "."
    reward = setting.fitting_reward("The plot was", text)
    extra, before, joint = 0, 0, []
    for clause in re.split(r"\b(?=and\b|but\b)|(?=[.,])", text):  # a clause begins at its break
        joint, sign = clause.split()[:1] or joint, 1
        for word in clause.split():
            sign = -sign if word in world.NEGATIONS else sign
            if word in world.VALENCE:
                value = sign * world.VALENCE[word]
                extra += 0 if not before else 3 if (value * before < 0) == (joint == ["but"]) else -3
                before = value
    assert reward == max(-5, min(5, world.golden_reward("The plot was", text) + extra)), text


@law
@pytest.mark.parametrize("joint", [", and the music felt", ", but the music felt", ". The music felt", ". Overall I"])
def test_two_opinions_fit_if_they_agree_and_after_but_if_they_differ(joint):
    words = world.VALENCE.items()
    for (first, a), (second, b), negated in itertools.product(words, words, (False, True)):
        text = f" {first}{joint} {'never ' * negated}{second}."
        fits = (a * b > 0) != negated if "but" not in joint else (a * b < 0) != negated
        plain = world.golden_reward("The plot was", text)
        assert setting.fitting_reward("The plot was", text) == max(-5, min(5, plain + (3 if fits else -3))), text


@law
@pytest.mark.parametrize("kind, sides", [("final-final", {("final", "final")}), ("sft-early", {("early", "sft")}),
                                         ("early-final", {("early", "final")})])
def test_the_sides_of_a_pair_come_from_the_policies_that_it_names(kind, sides, monkeypatch):
    names = {EARLY.name: "early", FINAL.name: "final"}
    authors = ["sft", "early", "final"]  # a response's first token is its author
    monkeypatch.setattr(data, "load_policy", lambda args, path: names[Path(path).parent.name])
    monkeypatch.setattr(setting, "responder", lambda name, args: lambda prompts, seed: (
        [[0]] * len(prompts), [[authors.index(name), i] for i in range(len(prompts))],
        [f" {name} {seed} {i}." for i in range(len(prompts))]))
    args = Namespace(pairs=50, seed=0)
    job = Run("ipo", data=kind, labels="bradley-terry")  # the golden reward sees ties in these texts
    pairs = setting.make_pairs(job, "sft", [], Path("x"), args)
    found = {tuple(sorted(authors[side[0]] for side in (pair.chosen, pair.rejected))) for pair in pairs}
    assert len(pairs) == 50 and found == sides


# ---------------------------------------------------------------------------------------------------
# jobs

@law
def test_every_run_has_a_name_of_its_own():
    assert len({job.name for job in RUNS}) == len(RUNS)


@law
@given(st.lists(st.sampled_from(RUNS), max_size=8), seeds)
def test_needs_come_first_and_once(chosen, rng):
    todo = [(rng.randrange(3), job) for job in chosen]
    ordered = with_needs(todo)
    assert len(set(ordered)) == len(ordered) and set(todo) <= set(ordered)
    for i, job in enumerate(ordered):
        assert set(needs(*job)) <= set(ordered[:i])


@pytest.mark.parametrize("job, expected", [
    (Run("hypo", lam=0.016), {"--lam": "0.016", "--lr": "0.001", "--judge": "w/0/setting-lr-2/reward/model"}),
    (Run("ipo", lr=2.0, pairs=0.2), {"--loss": "ipo", "--sampling": "offline", "--lr": "0.002", "--pairs": "400",
                                     "--judge": "w/0/setting-lr-4-pairs-0.2/reward/model"}),
    (Run("ipo", "iterative", rounds=8), {"--sampling": "iterative", "--rounds": "8"}),
    (Run("dpo", "replay", window=0), {"--loss": "dpo", "--sampling": "online"}),
    (Run("ppo", beta=0.3, steps=0.6), {"--steps": "60", "--beta": "0.3"}),
    (Run("bo2"), {"--loss": "bo2", "--beta": None, "--rounds": None}),
    (setting_of(OFFLINE), {"--steps": None, "--beta": None, "--judge": None})],
    ids=lambda value: getattr(value, "name", ""))
def test_the_flags_of_a_job_say_what_sets_it_apart(job, expected):
    full = Namespace(**command.FULL, model="tiny", device="cpu", work=Path("w"))
    found = jobs.flags_of(full, 0, job)
    assert {flag: found.get(flag) for flag in expected} == expected
    assert ("--lam" in found) == (job.algorithm == "hypo") and ("--loss" in found) == (job.algorithm in "ipo dpo bo2")


@pytest.mark.parametrize("failure, sentence, others", [
    (ValueError("the gradient is nan"), "ipo-online: the gradient is nan", True),
    (BrokenProcessPool(), "a worker was ended from outside, .* --jobs 1", False)])
def test_a_failed_run_names_itself_and_stops_only_what_needs_it(failure, sentence, others, options, monkeypatch):
    class Pool:  # in this process, so that the failure can be planted
        def __init__(self, *_, **__): pass
        def __enter__(self): return self
        def __exit__(self, *_): pass

        def submit(self, function, *job):
            future = Future()
            if job[2] == FINAL:
                future.set_exception(failure)
            else:
                done.append(job[2])
                future.set_result(None)
            return future

    done = []
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Pool)
    elsewhere = Namespace(**{**vars(options), "work": options.work / "elsewhere"})
    with pytest.raises(UserError, match=sentence):
        jobs.run_jobs(elsewhere, [(0, FINAL), (0, REPLAYS[0]), (0, OFFLINE)])
    assert (OFFLINE in done) == others and REPLAYS[0] not in done


def test_a_bug_in_a_job_leaves_its_trace_in_the_log(options, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("planted")
    monkeypatch.setattr(setting, "make_setting", broken)
    elsewhere = Namespace(**{**vars(options), "work": options.work / "broken"})
    with pytest.raises(ZeroDivisionError):
        jobs.execute(elsewhere, 0, setting_of(FINAL))
    out = jobs.directory(elsewhere, 0, setting_of(FINAL))
    log = (out / "log.txt").read_text()
    assert "in broken" in log and "planted" in log and not (out / "job.json").exists()


# ---------------------------------------------------------------------------------------------------
# statistics

values = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


@law
@pytest.mark.parametrize("df", [*range(1, 12), 19, 20, 21, 30, 100])
def test_students_quantiles_hold_95_percent(df):
    steps, t = 4000, stats.student_95(df)
    norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    middles = ((i + 0.5) / steps * t for i in range(steps))
    inside = 2 * t / steps * sum(norm * (1 + x * x / df) ** (-(df + 1) / 2) for x in middles)
    assert inside == pytest.approx(0.95, abs=1e-5), f"P(|T| < {t}) with {df} degrees of freedom = {inside:.4f}"


@law
@pytest.mark.parametrize("df, t", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (19, 2.093), (20, 2.086),
                                   (1000, 1.962)])
def test_students_quantiles_are_those_of_the_tables(df, t):
    assert stats.student_95(df) == pytest.approx(t, abs=5e-4)


@law
@given(values)
def test_the_interval_is_students(xs):
    assume(max(xs) - min(xs) > 1e-3)
    mean, half, error = stats.estimate(xs)
    assert math.isclose(mean, statistics.mean(xs), abs_tol=1e-9)
    assert math.isclose(error, statistics.stdev(xs) / math.sqrt(len(xs)), rel_tol=1e-6)
    assert half / error == pytest.approx(stats.student_95(len(xs) - 1))


@law
def test_about_95_of_100_intervals_hold_the_truth():
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        mean, half, _ = stats.estimate([rng.gauss(1, 2) for _ in range(5)])
        held += abs(mean - 1) <= half
    assert 0.93 < held / 2000 < 0.97


@law
@given(values)
def test_a_verdict_turns_with_the_sign(xs):
    assume(max(xs) - min(xs) > 1e-3)
    up, down, turned = (stats.claim("", "", sign, expected) for sign, expected in (
        (xs, "above"), ([-x for x in xs], "below"), (xs, "below")))
    for line in (up, down, turned):
        stats.decide([line])
    assert up["verdict"] == down["verdict"] and up["p"] == pytest.approx(down["p"])
    assert {"holds": "reversed", "reversed": "holds"}.get(up["verdict"], up["verdict"]) == turned["verdict"]
    low, high = up["interval"]
    assert (up["verdict"] in ("holds", "reversed")) == (low > 0 or high < 0), "p < .05 as 0 is outside the interval"
    assert not low < 0 < high or up["verdict"].split()[0].strip(":") in ("open", "equal")


@law
@given(values, st.floats(0.01, 4))
def test_equal_is_an_interval_of_90_percent_within_the_margin(xs, margin):
    assume(max(xs) - min(xs) > 1e-3)
    line = stats.claim("", "", xs, "equal", margin)
    low, high = 0.0, 20.0
    for _ in range(60):  # the quantile of two tests at 5 %, one a side
        t = (low + high) / 2
        low, high = (t, high) if stats.student_within(t, len(xs) - 1) < 0.9 else (low, t)
    mean, _, error = stats.estimate(xs)
    room = margin - abs(mean) - t * error
    assume(abs(room) > 1e-6)
    assert (line["p_equal"] < 0.05) == (room > 0)
    stats.decide([line])
    assert (line["verdict"] == "holds") == (room > 0)


@law
def test_students_tests_reject_what_is_true_5_times_in_100():
    rng, found = random.Random(0), {"p": 0, "p_equal": 0}
    for _ in range(2000):
        line = stats.claim("", "", [rng.gauss(0, 1) for _ in range(6)], margin=1.0)
        found["p"] += line["p"] < 0.05
        edge = stats.claim("", "", [rng.gauss(1, 1) for _ in range(6)], margin=1.0)  # a mean at the margin
        found["p_equal"] += edge["p_equal"] < 0.05
    assert 70 < found["p"] < 130 and found["p_equal"] < 130, found


@law
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_steps_down(ps):
    adjusted = stats.holm(ps)
    order = sorted(range(len(ps)), key=ps.__getitem__)
    for alpha in (0.01, 0.05, 0.5):  # the textbook's procedure: stop at the first that fails
        rejected = set()
        for rank, i in enumerate(order):
            if ps[i] * (len(ps) - rank) >= alpha:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p < alpha} == rejected
    assert all(p <= q for p, q in zip(ps, adjusted))


@law
@pytest.mark.parametrize("claims", [1, 7])
def test_the_number_of_seeds_that_would_tell_tells(claims):
    values, rng = [0.0, 0.03, 0.06, 0.01, 0.05], random.Random(1)
    n = int(re.search(r"\d+", stats.seeds_needed(values, claims)).group())
    mean, sd = statistics.mean(values), statistics.stdev(values)
    found = sum(stats.claim("", "", [rng.gauss(mean, sd) for _ in range(n)])["p"] < 0.05 / claims for _ in range(1000))
    assert 700 < found < 930, f"power {found / 1000} with {n} seeds"
    assert "more than 200" in stats.seeds_needed([1.0, -0.99, 0.0], claims)
    assert stats.seeds_needed([1.0, -0.99], claims) == ""


@law
@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=8))
def test_the_interval_of_a_share_stays_inside_0_1(xs):
    low, high = stats.interval(xs, is_share=True)
    assert 0 <= low <= statistics.mean(xs) + 1e-9 and statistics.mean(xs) - 1e-9 <= high <= 1
    narrow = [0.5 + (x - 0.5) / 1e4 for x in xs]
    mean, half, _ = stats.estimate(narrow)
    assert stats.interval(narrow, True) == pytest.approx((mean - half, mean + half), abs=1e-7), "Student's"
    assert stats.interval([0.0, 0.0], True) == (0, 0) and stats.interval([0.9, 0.99, 0.999], True)[1] < 1


def test_where_no_seed_has_a_value_nothing_is_decided():
    line = stats.claim("P.", "q", [])
    stats.decide([line])
    assert line["verdict"] == "open" and "no seed has one" in line["here"]


@law
@given(st.lists(st.tuples(st.floats(0.1, 20), st.floats(0, 1)), min_size=2, max_size=6), st.floats(0.1, 20))
def test_at_a_fixed_kl_a_metric_lies_on_the_line_between_the_last_steps_on_either_side(ends, kl):
    arm = [Run("ipo", beta=i + 1.0) for i in range(len(ends))]
    wrong = {"reverse_kl": kl, "w": 7.0}  # a checkpoint on the way, right at the KL
    results = Results({"evaluations": {job.name: [[{"reverse_kl": 0.0, "w": 9.0}, wrong, {"reverse_kl": x, "w": y}]]
                                       for job, (x, y) in zip(arm, ends)}})
    found, = results.at_kl(arm, kl, "w")
    below, above = [end for end in ends if end[0] <= kl], [end for end in ends if end[0] >= kl]
    if not below or not above:
        assert found is None and results.change_at_kl(arm, arm, kl, "w") == []
        return
    left, right = max(below), min(above)
    assume(len({x for x, _ in ends}) == len(ends) and right[0] - left[0] > 1e-6)
    share = math.log(kl / left[0]) / math.log(right[0] / left[0])
    assert found == pytest.approx(left[1] + share * (right[1] - left[1]), abs=1e-6)
    assert results.change_at_kl(arm, arm, kl, "w") == [0]


# ---------------------------------------------------------------------------------------------------
# means of any runs

def measured(rate, kl) -> dict:
    return {"step": 4, "win_rate": rate, "win_rate_ci": None if rate is None else [rate - 0.1, rate + 0.1],
            "golden_reward": rate and 4 * rate, "reverse_kl": kl}


@law
def test_the_mean_over_seeds_is_a_mean_with_students_interval():
    rates, kls = (0.6, 0.7, 0.8), (1.0, 2.0, 6.0)
    row = stats.mean_over_seeds([{"name": "dpo", **measured(rate, kl)} for rate, kl in zip(rates, kls)])
    assert row["run"] == "dpo, mean of 3 seeds" and row["step"] == 4
    assert (row["win_rate"], row["reverse_kl"], row["golden_reward"]) == pytest.approx((0.7, 3.0, 2.8))
    half = 4.3027 * 0.1 / math.sqrt(3)  # the sample's sd is 0.1
    assert row["win_rate_ci"] == pytest.approx((0.7 - half, 0.7 + half), abs=1e-5)


def test_runs_without_a_judge_have_a_mean_too():
    row = stats.mean_over_seeds([{"name": "dpo", **measured(None, kl)} for kl in (1.0, 2.0)])
    assert row["reverse_kl"] == 1.5 and "dpo, mean of 2 seeds  4     -" in table([row])


def test_the_command_adds_the_mean_of_runs_that_differ_in_their_seed_alone(tmp_path, capsys):
    directories = []
    for seed, rate, lr in ((0, 0.6, 1e-3), (1, 0.8, 1e-3), (2, 0.9, 2e-3)):
        directory = tmp_path / f"dpo-{seed}"
        directory.mkdir()
        (directory / "metrics.jsonl").write_text(json.dumps(measured(rate, 2.8)) + "\n")
        (directory / "summary.json").write_text(json.dumps({"settings": {"algorithm": "dpo", "seed": seed, "lr": lr}}))
        directories.append(str(directory))
    command.main(["mean", *directories])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == [*directories, "dpo, mean of 2 seeds"]
    assert "0.700 [-0.571, 1.971]" in rows[-1], "0.7 +- 12.71 sd / sqrt(2), sd = 0.1 sqrt(2)"


# ---------------------------------------------------------------------------------------------------
# pictures

@law
@settings(max_examples=10)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=7))
def test_labels_do_not_touch_keep_their_order_and_are_joined_to_their_points(ys):
    axis = Figure().subplots()
    for i, y in enumerate(ys):
        axis.plot([0, 1], [0, y])
        draw.label_at(axis, 1, y, f"line {i}", "black")
    axis.figure.draw_without_rendering()
    draw.write_labels(axis)
    labels = sorted(axis.texts, key=lambda text: text.get_position()[1])
    heights = [text.get_position()[1] for text in labels]
    assert all(b - a > 0.06 for a, b in zip(heights, heights[1:]))
    assert [text.xy[1] for text in labels] == sorted(ys) and {text.xy[0] for text in labels} == {1}
    middle = axis.transAxes.inverted().transform(axis.transData.transform([(1, y) for y in ys]))[:, 1].mean()
    assert abs(statistics.mean(heights) - middle) < 1e-6, "they are pushed apart, not away"


@pytest.mark.parametrize("name", REPORTS)
def test_a_picture_has_a_caption_and_shares_its_scale(name):
    figure = STUDIES[name].draw(Results(json.loads(REPORTS[name].read_text())))
    figure.draw_without_rendering()
    assert len(STUDIES[name].caption) > 100
    for axis in figure.axes:
        if "square-root" in axis.get_ylabel():
            low, high = axis.get_ylim()
            assert low == 0 and high >= max(max(line.get_ydata()) for line in axis.lines)
    if name == "extrapolate":
        assert len({axis.get_ylim() for axis in figure.axes[1:]}) == 1


# ---------------------------------------------------------------------------------------------------
# the command, its files, the page of results

@pytest.fixture
def small_study(monkeypatch):
    """iterate, with one run, of one seed and two steps."""
    monkeypatch.setitem(STUDIES, "iterate", studies.Study(
        "Title", [OFFLINE], lambda results: (
            [studies.row(results, "offline", OFFLINE)], [stats.claim("P.", "q", [1.0])]),
        lambda results: Figure(), "A caption."))
    monkeypatch.setattr(command, "QUICK", dict(
        steps=2, lr=5e-4, eval_every=1, pairs=16))
    monkeypatch.setattr(command, "PRETRAINED", dict(batch_size=8, eval_samples=8))


def test_the_command_writes_its_files_and_does_nothing_twice(small_study, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["iterate", "--quick", "--seeds", "1", "--model", str(model_dir), "--device", "cpu", "--jobs", "2"]
    command.main(argv)
    folder, = (tmp_path / "runs").iterdir()
    printed = capsys.readouterr().out
    assert "Title (iterate)" in printed and "2 of 2 runs done" in printed
    found = json.loads((folder / "results" / "iterate.json").read_text())
    assert found["command"].startswith("python -m experiments iterate --quick --model")
    assert found["command"].endswith("--seeds 1")
    assert found["claims"][0]["interval"] == [None, None], "one seed has no interval"
    assert found["commit"] and found["settings"]["steps"] == 2 and found["core-minutes"] > 0
    assert (folder / "results" / "iterate.png").stat().st_size > 1000
    page = (folder / "results" / "README.md").read_text()
    assert f"of commit {found['commit']}." in page and "A caption." in page
    assert not (tmp_path / "results").exists(), "a quick run must not touch the repository's results"
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    command.main(argv)
    assert made == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} and made


def in_group(group: int) -> list[int]:
    """The processes of a process group that run, if only with one thread."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, its_group, *more = path.read_text().rpartition(")")[2].split()
            if int(its_group) == group and (state != "Z" or int(more[14]) > 1):
                found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it looks for processes in /proc")
def test_a_study_that_is_ended_leaves_no_worker_and_goes_on_to_the_same_bytes(
        small_study, model_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # one thread in each process, as here
    argv = ["iterate", "--quick", "--seeds", "1", "--model", str(model_dir), "--device", "cpu", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["experiments", *argv])
    options, _ = command.parse(argv)
    first = setting_of(OFFLINE)

    def study(folder):
        os.setpgrp()
        os.chdir(folder)
        command.start()
    ends = {signal.SIGTERM: tmp_path / "terminated", signal.SIGKILL: tmp_path / "killed"}
    seen = {signal.SIGTERM: "log.txt", signal.SIGKILL: "reward/checkpoint.pt"}  # the worker works; it can go on
    processes = {}
    for end, folder in ends.items():
        folder.mkdir()
        processes[end] = multiprocessing.get_context("fork").Process(target=study, args=[folder])
        processes[end].start()
    for end, process in processes.items():
        work = ends[end] / options.work
        path = work / "10" / first.name / seen[end]
        wait_until(lambda process=process, path=path: path.exists() or not process.is_alive(), 90)
        with pytest.raises(UserError, match="another process is writing there"), alone(work):
            pass
        assert len(in_group(process.pid)) > 1
        os.kill(process.pid, end)
        wait_until(lambda process=process: not in_group(process.pid), 2)
        process.join()
        assert not (work / "10" / first.name / "job.json").exists(), "it was ended before"
    assert "interrupted; the same command goes on where it stopped" in capfd.readouterr().err
    made = []
    for folder in (ends[signal.SIGKILL], tmp_path):
        monkeypatch.chdir(folder)
        jobs.execute(options, 10, first)
        out = jobs.directory(options, 10, first)
        made.append([path.read_bytes() for path in (
            setting.pairs_file(out), out / "reward" / "metrics.jsonl", out / "reward" / "model" / "model.safetensors")])
    assert made[0] == made[1]


def test_a_report_of_more_seeds_stays_as_it_is(small_study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "run_jobs", lambda options, todo: None)
    results = tmp_path / "runs" / "study-quick" / "results"
    results.mkdir(parents=True)
    report = {**json.loads(REPORTS["main"].read_text()), "seeds": [0, 1]}
    (results / "iterate.json").write_text(json.dumps(report))
    command.main(["iterate", "--quick", "--seeds", "1"])
    assert "has 2 seeds, more than these 1: it stays as it is" in capsys.readouterr().out
    assert json.loads((results / "iterate.json").read_text()) == report


@pytest.mark.parametrize("argv, message", [
    (["nothing"], "invalid choice: 'nothing'"),
    (["loss", "--seeds", "0"], "--seeds: must be a whole number of at least 1"),
    (["loss", "--jobs", "nan"], "--jobs: must be a whole number"),
    (["loss", "--device", "cuda:99"], "argument --device: cuda:99 cannot"),
    (["mean", "runs/dpo", "--seeds", "2"], "it takes no --seeds"),
    (["scale", "--model", "gpt2"], "takes no --model"), (["mean"], "needs directories of runs"),
    (["loss", "runs/dpo"], "nothing else takes them")])
def test_errors_say_what_to_do(argv, message, capsys):
    with pytest.raises(SystemExit):
        command.main(argv)
    assert message in capsys.readouterr().err


def test_pages_without_a_report_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds no report of a study"):
        command.main(["pages"])
    with pytest.raises(UserError, match="results/main.json is missing"):
        pages.readme_table({})
    (tmp_path / "README.md").write_text("# no marks\n")
    with pytest.raises(UserError, match="README.md has no lines"):
        pages.between_marks(tmp_path / "README.md", "| table |")
    (tmp_path / "README.md").write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    pages.between_marks(tmp_path / "README.md", "new")
    assert (tmp_path / "README.md").read_text() == f"before\n{pages.BEGIN}\nnew\n{pages.END}\nafter\n"


def test_the_page_of_results_says_what_the_json_files_say(tmp_path):
    for path in REPORTS.values():
        shutil.copy(path, tmp_path)
    pages.write_pages(tmp_path, [])
    page = (ROOT / "results" / "README.md").read_text()
    assert (tmp_path / "README.md").read_text() == page, "run `python -m experiments pages`"
    assert pages.readme_table(pages.read_reports(ROOT / "results")) in (ROOT / "README.md").read_text()
    assert pages.readme_table(pages.read_reports(ROOT / "results")).count("\n") <= 13, "at most 12 rows"
    for name in REPORTS:
        assert f"## {name}\n" in page and f"({name}.png)" in page and (ROOT / "results" / f"{name}.png").exists()


@law
@pytest.mark.parametrize("name", REPORTS)
def test_tables_and_verdicts_follow_from_the_evaluations(name):
    found = json.loads(REPORTS[name].read_text())
    assert found["seeds"] == list(range(10, 10 + STUDIES[name].seeds)) and found["hardware"]
    assert re.fullmatch("[0-9a-f]{7,}", found["commit"]), "of files as they are in that commit"
    rows, claims = STUDIES[name].conclude(Results(found))
    stats.decide(claims)
    assert [claim["verdict"] for claim in claims] == [claim["verdict"] for claim in found["claims"]]
    for line in found["claims"]:  # it says so where an arm does not reach the KL in all seeds
        assert line["here"].endswith("seeds)") == (len(line["values"]) < len(found["seeds"]))
    for old, new in zip(found["claims"], claims):
        assert old["values"] == pytest.approx(new["values"], abs=2e-3) and old["paper"] == new["paper"]
    assert [list(row) for row in rows] == [list(row) for row in found["table"]]
    for a, b in zip(numbers_of(found["table"]), numbers_of(rows), strict=True):
        assert abs(float(a) - float(b)) < 1.01 * 10 ** -len(a.partition(".")[2]), "the evaluations have five digits"


def numbers_of(table: list[dict]) -> list[str]:
    """The numbers in the cells of a table, without the labels of its rows."""
    return [number for row in table for cell in list(row.values())[1:] for number in re.findall(r"[-+]?\d+\.\d+", cell)]


@law
def test_the_arms_of_a_comparison_have_the_same_sweep():
    def settings_of(arm):
        return {(job.beta, job.lr, job.steps) for job in arm}
    for arms in [studies.PRIMARY, studies.CLOUDS, studies.LABELS, studies.PROXIES, studies.FITTING, studies.QUALITY,
                 *studies.LOSSES.values(), *studies.SCALE.values()]:
        assert len({frozenset(settings_of(arm)) for arm in arms.values()}) == 1
    assert len(studies.BETAS) >= 7 and (min(studies.BETAS), max(studies.BETAS)) == (0.03, 0.3)


@law
def test_all_rounds_and_online_training_label_as_many_pairs(options, folder):
    execute(options, *(Run("ipo", "iterative", rounds=n) for n in (1, 3)))
    for n in (1, 3):
        rounds = sorted((folder / Run("ipo", "iterative", rounds=n).name).glob("round-*.jsonl"))
        assert len(rounds) == n
        asked = options.steps * options.batch_size
        assert 0.8 * asked < sum(len(data.read_pairs(path)) for path in rounds) <= asked, "ties are left out"
