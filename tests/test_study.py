"""The studies: replay gives the online run again, jobs come in order, the statistics are what they say,
and the README's results are those of results/*.json, which in turn follow from the evaluations in them."""

import dataclasses
import json
import math
import random
import shutil
import statistics
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from test_run import not_in_the_glossary

import data
import experiments
import lm
import report
import study
from experiments import CLASSIFY, EARLY, FINAL, GOLDEN, OFFLINE, Run, needs, recorded, replay, setting_of, with_needs
from judges import load_judge
from models import random_gpt2

ROOT = Path(__file__).parent.parent
RUNS = list(dict.fromkeys(job for _, jobs, _ in study.STUDIES.values() for job in jobs))
seeds = st.integers(0, 10**6).map(random.Random)
REPORTS = sorted(set((ROOT / "results").glob("*.json")) - {ROOT / "results" / "bench.json"})  # of studies

# ---------------------------------------------------------------------------------------------------
# the saved stream

streams = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(
    lambda sizes: [[{"id": (step, i)} for i in range(size)] for step, size in enumerate(sizes)])


@given(streams, st.integers(0, 15), st.integers(0, 3))
def test_a_replay_uses_every_pair_once_at_its_step_size_and_within_its_window(stream, window, seed):
    source = replay(stream, window, Namespace(seed=seed))
    batches = [source(step) for step in range(1, len(stream) + 1)]
    assert [len(batch) for batch in batches] == [len(pairs) for pairs in stream]
    ids = [pair["id"] for batch in batches for pair in batch]
    assert sorted(ids) == sorted(pair["id"] for pairs in stream for pair in pairs)
    width = window or len(stream)
    assert all(step // width == pair["id"][0] // width for step, batch in enumerate(batches) for pair in batch)
    if window == 1:
        assert batches == stream


def test_a_replay_shuffles():
    stream = [[{"id": (step, i)} for i in range(8)] for step in range(8)]
    for window in (2, 4, 0):
        source = replay(stream, window, Namespace(seed=0))
        assert [source(step) for step in range(1, 9)] != stream


def test_the_stream_of_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "stream.jsonl"
    source = recorded(lambda step: [{"step": step}], path)
    for step in range(1, 6):  # interrupted in step 6; the last checkpoint is of step 3
        source(step)
    with open(path, "a") as file:
        file.write('[{"step": 6')
    source = recorded(lambda step: [{"step": step}], path)
    for step in range(4, 9):
        source(step)
    assert data.read_rows(path) == [[{"step": step}] for step in range(1, 9)]


# ---------------------------------------------------------------------------------------------------
# real runs, on a small random model

@pytest.fixture(scope="module")
def options(model_dir, tmp_path_factory):
    return Namespace(model=str(model_dir), work=tmp_path_factory.mktemp("study"), steps=6, batch_size=8, eval_every=3,
                     eval_samples=16, pairs=160, device="cpu", threads=1, jobs=1, seeds=range(1))


def execute(options, *jobs):
    for job in with_needs([(0, job) for job in jobs]):
        if not experiments.finished(options, *job):
            experiments.execute(options, *job)


def weights(options, job) -> bytes:
    return (options.work / "0" / job.name / "policy" / "model.safetensors").read_bytes()


def test_the_replayed_stream_gives_the_online_run_to_the_byte_and_a_shuffled_one_does_not(options):
    execute(options, FINAL, study.REPLAYS[1], study.REPLAYS[0])
    assert weights(options, FINAL) == weights(options, study.REPLAYS[1])
    assert weights(options, FINAL) != weights(options, study.REPLAYS[0])


def test_the_early_policy_is_the_online_run_stopped_early(options):
    execute(options, FINAL, EARLY)
    early, whole = (study.read_metrics(options.work / "0" / job.name) for job in (EARLY, FINAL))
    name = "train_chosen_logratio"
    assert len(early) == 2 and early[1][name] == whole[1][name]


def test_golden_win_rates_are_against_the_baseline_and_the_halves_make_the_whole(options):
    execute(options, OFFLINE)
    assert not any("golden_win_rate_judges" in line for line in study.read_metrics(options.work / "0" / GOLDEN.name))
    line = study.read_metrics(options.work / "0" / OFFLINE.name)[-1]
    assert line["win_rate"] == (line["win_rate_picks"] + line["win_rate_judges"]) / 2
    rewards = [row["reward"] for row in data.read_rows(options.work / "0" / OFFLINE.name / "responses.jsonl")]
    baseline = json.loads((options.work / "0" / GOLDEN.name / "baseline.json").read_text())
    wins = [(a > b) + (a == b) / 2 for a, b in zip(rewards, baseline, strict=True)]
    assert line["golden_win_rate_judges"] == statistics.mean(wins[1::2])
    assert line["golden_win_rate_picks"] == statistics.mean(wins[0::2])


def test_every_metric_is_in_the_glossary(options):
    execute(options, OFFLINE)
    assert not not_in_the_glossary(options.work / "0" / OFFLINE.name)


def test_step_0_is_pi_ref(options):
    execute(options, OFFLINE)
    line = study.read_metrics(options.work / "0" / OFFLINE.name)[0]
    assert line["best_logratio"] == line["data_chosen_logratio"] == line["reverse_kl"] == 0
    assert line["data_accuracy"] == 0.5


def test_proxy_reward_and_uncovered_share_are_of_the_evaluated_responses(options):
    execute(options, OFFLINE)
    folder = options.work / "0"
    rows = data.read_rows(folder / OFFLINE.name / "responses.jsonl")
    line = study.read_metrics(folder / OFFLINE.name)[-1]
    proxy = load_judge(str(folder / setting_of(OFFLINE).name / "reward" / "model"))
    rewards = proxy([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert line["sampled_proxy_reward"] == pytest.approx(statistics.mean(rewards))
    assert line["uncovered"] == statistics.mean(bool(experiments.UNCOVERED.search(row["response"])) for row in rows)


def test_each_online_run_is_labelled_by_its_own_judge(options):
    execute(options, GOLDEN, FINAL, study.IMPLICIT[1])
    folder = options.work / "0"
    ref, tokenizer = lm.load(options.model)
    offline, _ = lm.load(str(folder / OFFLINE.name / "policy"))
    judges = {GOLDEN: data.golden_judge, FINAL: load_judge(str(folder / setting_of(FINAL).name / "reward" / "model")),
              study.IMPLICIT[1]: experiments.implicit_judge(offline, ref, tokenizer, 24)}
    for job, judge in judges.items():
        pairs = [pair for step in data.read_rows(folder / job.name / "stream.jsonl") for pair in step]
        prompts = [lm.decode(tokenizer, pair["prompt"]) for pair in pairs]
        chosen, rejected = (judge(prompts, [lm.decode(tokenizer, pair[side]) for pair in pairs])
                            for side in ("chosen", "rejected"))
        assert pairs and all(a > b for a, b in zip(chosen, rejected)), job.name


def test_the_implicit_judge_is_the_log_ratio(model_dir):
    ref, tokenizer = lm.load(str(model_dir))
    policy = random_gpt2(len(tokenizer), seed=5, dtype=torch.float32)
    prompts, responses = ["The plot was"] * 3, [" superb.", " never dull, but slow.", " awful."]
    judged = experiments.implicit_judge(policy, ref, tokenizer, 24)(prompts, responses, batch_size=2)
    for prompt, response, reward in zip(prompts, responses, judged):
        row = [lm.encode_prompt(tokenizer, prompt)], [lm.encode_response(tokenizer, response, 24)]
        assert reward == pytest.approx((lm.logps(policy, *row) - lm.logps(ref, *row)).item(), abs=1e-4)
    assert min(map(abs, judged)) > 1e-3


def test_the_best_unseen_response_is_not_in_the_pairs(options):
    execute(options, setting_of(FINAL))
    folder = options.work / "0" / setting_of(FINAL).name
    for row, pair in zip(data.read_rows(folder / "best.jsonl"), data.read_rows(folder / "pairs.jsonl")):
        assert row["prompt"] == pair["prompt"] and row["chosen"] not in (pair["chosen"], pair["rejected"])
        assert row["reward"] == data.golden_reward(row["prompt"], row["chosen"])


def test_a_finished_run_is_known_and_other_settings_are_refused(options):
    execute(options, OFFLINE)
    assert experiments.finished(options, 0, OFFLINE)
    other = Namespace(**{**vars(options), "batch_size": 4})
    with pytest.raises(ValueError, match=r"other settings: batch_size 8 \(now 4\)"):
        experiments.finished(other, 0, OFFLINE)


def test_classify_counts_against_the_golden_reward(options, monkeypatch):
    execute(options, CLASSIFY)
    measured = json.loads((options.work / "0" / CLASSIFY.name / "summary.json").read_text())
    assert len(measured["steps"]) == len(measured["proxy"]) == 10
    args = experiments.run_args(options, 0, CLASSIFY)
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        monkeypatch.setattr(experiments, "load_judge", lambda *a, sign=sign: lambda prompts, responses: [
            sign * reward for reward in data.golden_judge(prompts, responses)])
        assert set(experiments.classify(args, options.work / "0")["proxy"]) == {expected}

    # policies whose log-ratios are the golden rewards rank everything rightly, the pairs of their own samples, too
    _, tokenizer = lm.load(options.model)
    monkeypatch.setattr(experiments, "logratios", lambda policy, pairs: tuple(
        torch.tensor([data.golden_reward(lm.decode(tokenizer, pair["prompt"]), lm.decode(tokenizer, pair[side]))
                      for pair in pairs]) for side in ("chosen", "rejected")))
    measured = experiments.classify(args, options.work / "0")
    assert {*measured["online"], *measured["offline"], measured["online_self"], measured["offline_self"]} == {1.0}


def test_partial_coverage_pairs_never_say_the_uncovered_words(model_dir):
    policy, tokenizer = lm.load(str(model_dir))
    args = Namespace(pairs=100, seed=0, max_new_tokens=24)
    respond = lm.responder(policy, tokenizer, args.max_new_tokens)

    def said(pairs):
        return sum(bool(experiments.UNCOVERED.search(pair[side])) for pair in pairs for side in ("chosen", "rejected"))

    covered = experiments.make_pairs(Run("dpo", data="covered"), respond, None, args)
    assert len(covered) == 100 and said(covered) == 0
    assert all(lm.decode(tokenizer, pair["chosen_ids"]) == pair["chosen"] for pair in covered)
    assert said(data.collect_pairs(respond, data.world_prompts()[0], 100, 0)) > 0


@pytest.mark.parametrize("kind, sides", [("final-final", {("final", "final")}), ("sft-early", {("sft", "early")}),
                                         ("early-final", {("early", "final")})])
def test_the_sides_of_a_pair_come_from_the_policies_that_it_names(kind, sides, monkeypatch):
    names = {EARLY.name: "early", FINAL.name: "final"}
    monkeypatch.setattr(lm, "load", lambda path, device: (names[Path(path).parent.name], None))
    monkeypatch.setattr(lm, "responder", lambda name, *_: lambda prompts, seed: (
        [f" {name} {seed} {i}." for i in range(len(prompts))], [[0]] * len(prompts)))
    sft = lambda prompts, seed: ([f" sft {seed} {i}." for i in range(len(prompts))], [[0]] * len(prompts))  # noqa: E731
    args = Namespace(pairs=50, seed=0, max_new_tokens=24, device="cpu")
    pairs = experiments.make_pairs(Run("ipo", data=kind), sft, Path("x"), args)
    found = {tuple(sorted((pair["chosen"].split()[0], pair["rejected"].split()[0]))) for pair in pairs}
    assert found == {tuple(sorted(pair)) for pair in sides}


# ---------------------------------------------------------------------------------------------------
# jobs

def test_every_run_has_a_name_of_its_own():
    assert len({job.name for job in RUNS}) == len(RUNS)


@given(st.lists(st.sampled_from(RUNS), max_size=8), seeds)
def test_needs_come_first_and_once(jobs, rng):
    jobs = [(rng.randrange(3), job) for job in jobs]
    ordered = with_needs(jobs)
    assert len(set(ordered)) == len(ordered) and set(jobs) <= set(ordered)
    for i, job in enumerate(ordered):
        assert set(needs(*job)) <= set(ordered[:i])


def test_a_failed_run_names_itself_and_stops_only_what_needs_it(options, monkeypatch):
    class Pool:  # in this process, so that the failure can be planted
        def __init__(self, *_, **__): pass
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def map(self, function, *rows): return [None for _ in zip(*rows)]
        def submit(self, function, *job):
            from concurrent.futures import Future
            future, done = Future(), jobs_done
            if job[2] == FINAL:
                future.set_exception(ValueError("the gradient is nan"))
            else:
                done.append(job[2])
                future.set_result(None)
            return future

    jobs_done = []
    monkeypatch.setattr(experiments, "ProcessPoolExecutor", Pool)
    elsewhere = Namespace(**{**vars(options), "work": options.work / "elsewhere"})
    with pytest.raises(ValueError, match="ipo-online: the gradient is nan"):
        experiments.run_jobs(elsewhere, [(0, FINAL), (0, study.REPLAYS[0]), (0, OFFLINE)])
    assert OFFLINE in jobs_done and study.REPLAYS[0] not in jobs_done


# ---------------------------------------------------------------------------------------------------
# statistics

values = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


@given(values)
def test_the_interval_is_students(xs):
    assume(max(xs) - min(xs) > 1e-3)
    mean, half, error = report.estimate(xs)
    assert math.isclose(mean, statistics.mean(xs), abs_tol=1e-9)
    assert math.isclose(error, statistics.stdev(xs) / math.sqrt(len(xs)), rel_tol=1e-6)
    assert 1.9 < half / error < 13


def test_about_95_of_100_intervals_hold_the_truth():
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        mean, half, _ = report.estimate([rng.gauss(1, 2) for _ in range(5)])
        held += abs(mean - 1) <= half
    assert 0.93 < held / 2000 < 0.97


@given(values)
def test_a_verdict_turns_with_the_sign(xs):
    assume(max(xs) - min(xs) > 1e-3)
    turned = {"holds": "reversed", "reversed": "holds", "not resolved": "not resolved"}
    up, down = (report.claim("", "", sign, "above 0")["verdict"] for sign in (xs, [-x for x in xs]))
    assert down == turned[up] and report.claim("", "", xs, "below 0")["verdict"] == down
    low, high = report.claim("", "", xs)["interval"]
    assert up == ("holds" if low > 0 else "reversed" if high < 0 else "not resolved")
    assert report.claim("", "", xs, "not above 0")["verdict"] == ("contradicted" if low > 0 else "not contradicted")


def lines_of(rng, n=6):
    return [{"step": 10 * i, "reverse_kl": rng.uniform(0.4, 60), **{
        f"{name}_{half}": rng.random() for name in ("win_rate", "golden_win_rate") for half in ("picks", "judges")}}
        for i in range(n)]


@given(seeds)
def test_the_half_that_picks_does_not_judge(rng):
    arm = [Run("ipo"), Run("dpo")]
    results = {run_: [lines_of(rng) for _ in range(3)] for run_ in arm}
    judged_anew = {run_: [[{**line, report.WIN: rng.random()} for line in lines] for lines in seeds]
                   for run_, seeds in results.items()}
    for best, other, *seeds in zip(report.peak(results, arm), report.peak(judged_anew, arm), *results.values()):
        assert best["step"] == other["step"] > 0
        picks = [line["golden_win_rate_picks"] for lines in seeds for line in lines[1:]]
        assert best["golden_win_rate_picks"] == max(picks)
        assert best["last"] in [lines[-1] for lines in seeds]


def test_picking_by_the_judges_would_flatter():
    """On pure noise a peak is worth 1/2; judged by the half that picked it, it would seem far better."""
    rng = random.Random(0)
    results = {Run("ipo"): [lines_of(rng, 20) for _ in range(400)]}
    best = report.peak(results, [Run("ipo")])
    assert abs(statistics.mean(line[report.WIN] for line in best) - 0.5) < 0.05
    assert statistics.mean(line["golden_win_rate_picks"] for line in best) > 0.9


@given(seeds)
def test_the_envelope_has_each_bins_best(rng):
    results = {Run("ipo"): [lines_of(rng, 30)]}
    bins, lines = report.envelope(results, [Run("ipo")])[0], results[Run("ipo")][0][1:]
    for i, value in bins.items():
        inside = [line for line in lines if report.EDGES[i - 1] <= line["reverse_kl"] < report.EDGES[i]]
        assert value == max(inside, key=lambda line: line["golden_win_rate_picks"])[report.WIN]
    assert sum(report.EDGES[0] <= line["reverse_kl"] for line in lines) >= len(bins) > 0


# ---------------------------------------------------------------------------------------------------
# the command, its files, the README

def test_the_command_writes_its_files_and_does_nothing_twice(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(study.STUDIES, "iterate", (lambda results, figure: (
        [report.peak_row("offline", results, [OFFLINE])], [report.claim("P.", "q", [1.0])]), [OFFLINE], "Title"))
    monkeypatch.setattr(study, "QUICK", dict(seeds=1, steps=2, batch_size=4, eval_every=1, eval_samples=8, pairs=160))
    command = ["iterate", "--quick", "--model", str(model_dir), "--device", "cpu", "--jobs", "2"]
    study.main(command)
    folder, = (tmp_path / "runs").iterdir()
    assert "Title (iterate)" in capsys.readouterr().out
    found = json.loads((folder / "results" / "iterate.json").read_text())
    assert found["command"].startswith("python study.py iterate --quick --model")
    assert (folder / "results" / "iterate.png").stat().st_size > 1000
    assert not (tmp_path / "results").exists(), "a quick run must not touch the repository's results"
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    study.main(command)
    assert made == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} and made


@pytest.mark.parametrize("argv, message", [
    (["nothing"], "invalid choice: 'nothing'"), (["loss", "--seeds", "0"], "must be at least 1"),
    (["scale", "--model", "gpt2"], "takes no --model")])
def test_errors_say_what_to_do(argv, message, capsys):
    with pytest.raises(SystemExit):
        study.main(argv)
    assert message in capsys.readouterr().err


def test_both_readmes_say_what_the_json_files_say(tmp_path):
    assert {path.stem for path in REPORTS} == set(study.STUDIES)
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.jsonl"))
    shutil.copy(ROOT / "README.md", tmp_path)
    report.write_readmes(tmp_path, list(study.STUDIES))
    for name in ("README.md", "results/README.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: run `python study.py all`"


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_tables_and_verdicts_follow_from_the_evaluations(path):
    found = json.loads(path.read_text())
    function, jobs, _ = study.STUDIES[found["study"]]
    assert len(found["seeds"]) >= 5
    results = {job: found["evaluations"][job.name] for job in jobs if job != CLASSIFY}
    rows, claims = function({**found, **results}, Figure())
    assert [claim["verdict"] for claim in claims] == [claim["verdict"] for claim in found["claims"]]
    for old, new in zip(found["claims"], claims):
        assert old["values"] == pytest.approx(new["values"], abs=2e-3)
    assert [list(row) for row in rows] == [list(row) for row in found["table"]]


def test_the_arms_of_a_comparison_have_the_same_sweep_or_the_offline_arm_a_wider_one():
    settings = lambda arm: {(run_.beta, run_.lr, run_.steps) for run_ in arm}  # noqa: E731
    assert settings(study.ONLINE_IPO) <= settings(study.OFFLINE_IPO)
    for arms in [*study.LOSSES.values(), *study.SCALE.values()]:
        assert settings(arms["online"]) == settings(arms["offline"])
    assert len({frozenset(settings(arm)) for arm in study.QUALITY.values()}) == 1
    assert {dataclasses.replace(run_, lam=0, algorithm="x", data="golden") for run_ in study.PARTIAL.values()} == {
        Run("x")}
