"""The study on film reviews: its commands, what it takes from runs, its table and its picture, on made-up runs."""

import json
import shutil
import types

import pytest
import torch

import dpo
import hypo
import rlhf
import run
from experiments import __main__ as command
from experiments import reviews, stats

PROGRAMS = {"dpo.py": dpo, "hypo.py": hypo, "rlhf.py": rlhf}


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Of the command in an empty folder, with a model and a task there."""
    monkeypatch.chdir(tmp_path)
    for path in (reviews.MODEL, reviews.TASK):
        path.mkdir(parents=True)
    (reviews.TASK / "task.json").write_text("{}")
    run.write_rows(reviews.TASK / "held_out_prompts.jsonl", [{"prompt": str(i)} for i in range(reviews.OPENINGS)])
    return types.SimpleNamespace(model=str(reviews.MODEL), device="cpu", steps=reviews.STEPS, quick=False, seeds=None,
                                 first_seed=10, work=tmp_path / "work", jobs=1, threads=1, flags="",
                                 results=tmp_path / "results")


def lines_of(seed: int, arm: str) -> list[dict]:
    """Made-up evaluations, other ones for each seed and arm."""
    generator = torch.Generator().manual_seed(100 * seed + list(reviews.ARMS).index(arm))
    noise = 0.01 * torch.randn(4, generator=generator)
    far = 3.0 if arm == "DPO" else 2.0
    return [{"step": 14 * i, "win_rate": 0.5 + 0.1 * i + x, "second_win_rate": 0.5 + 0.05 * i + x,
             "win_rate_ci": [0.4, 0.6], "reverse_kl": far * i / 3 + abs(x) * (i > 0), "off_support": 0.02 * i,
             "response_length": 15.0, "accuracy": 0.5 + 0.02 * i} for i, x in enumerate(noise.tolist())]


@pytest.fixture
def finished(options):
    """All runs, as their commands would have left them."""
    for arm in reviews.ARMS:
        for seed in reviews.seeds_of(options, arm):
            out, lines = reviews.directory(options, seed, arm), lines_of(seed, arm)
            run.write_rows(out / "metrics.jsonl", [*lines[:-1], {**lines[-1], "win_rate": 0.0, "second_win_rate": 0.0}])
            run.write_rows(out / "again" / "metrics.jsonl", [
                {key: x for key, x in lines[-1].items() if key != "accuracy"}])
            run.write_rows(out / "reward" / "metrics.jsonl", [{"reward_accuracy": 0.25}, {"reward_accuracy": 0.625}])
            run.write_rows(out / "again" / "responses.jsonl", [
                {"prompt": f"opening {i}", "response": f" {arm} | {i}\n", "reward": 0.0, "ref_response": " ref"}
                for i in range(6)])
            run.write_text(out / "summary.json", json.dumps({"seconds": 60, "commit": "abc1234"}))
            run.write_text(reviews.beside(out, "json"), json.dumps({"words": reviews.command(options, seed, arm)}))
    return options


@pytest.mark.parametrize("arm", reviews.ARMS)
def test_every_command_is_one_that_its_program_takes(options, arm, monkeypatch):
    program, *words = reviews.command(options, 11, arm)
    taken: dict = {}

    def working(args):
        taken.update(vars(args))
        raise run.UserError("enough")

    monkeypatch.setattr(run, "working", working)
    with pytest.raises(run.UserError, match="enough"):
        PROGRAMS[program].main(words)
    assert (taken["seed"], taken["batch_size"]) == (11, 8)
    assert taken["steps"] == reviews.STEPS == 3 * taken["eval_every"]
    assert taken["algorithm"] == {"DPO": "dpo", "offline IPO": "ipo", "online IPO": "online ipo", "PPO": "ppo"}.get(
        arm, "hypo")
    offline = str(options.work / "11" / "offline-ipo")
    assert taken["judge"] == {"online IPO": offline, "PPO": "reward"}.get(arm, "task")


@pytest.mark.parametrize(("seeds", "quick", "how_many"), [(None, False, [5, 5, 5, 4, 4, 2]), (3, False, [3] * 5 + [2]),
                                                          (99, False, [5, 5, 5, 4, 4, 2]), (None, True, [2] * 6)])
def test_an_arm_has_its_own_seeds_or_the_first_of_them(options, seeds, quick, how_many):
    options.seeds, options.quick = seeds, quick
    found = [reviews.seeds_of(options, arm) for arm in reviews.ARMS]
    assert [*map(len, found)] == how_many and {own[0] for own in found} == {options.first_seed}


def test_what_is_missing_is_asked_for_by_its_recipe(options):
    held_out = reviews.TASK / "held_out_prompts.jsonl"
    run.write_rows(held_out, [{"prompt": str(i)} for i in range(256)])  # the recipe's own number
    with pytest.raises(run.UserError, match="holds out 256 openings, and 512 are asked for; move .* --held-out 512$"):
        reviews.make_runs(options)
    shutil.rmtree(reviews.TASK)
    with pytest.raises(run.UserError, match=r"python recipes/movie_reviews\.py runs/reviews --held-out 512"):
        reviews.make_runs(options)
    reviews.MODEL.rmdir()
    with pytest.raises(run.UserError, match=r"python recipes/smollm2\.py runs/smollm2"):
        reviews.make_runs(options)


def test_finished_runs_are_not_done_again_and_others_are_refused(finished, monkeypatch):
    monkeypatch.setattr(reviews.subprocess, "Popen", lambda *_, **__: pytest.fail("it is done"))
    reviews.make_runs(finished)
    finished.steps = 41
    with pytest.raises(run.UserError, match=f"dpo was made by another command: .*--steps {reviews.STEPS} "):
        reviews.make_runs(finished)


def test_a_command_that_fails_is_named_and_what_needs_it_is_not_started(options, monkeypatch):
    started = []

    class Failing:
        def __init__(self, words, **_):
            started.append(words[1:])

        def wait(self):
            return 1

    monkeypatch.setattr(reviews.subprocess, "Popen", Failing)
    monkeypatch.setattr(reviews, "ARMS", {arm: (*reviews.ARMS[arm][:2], 1) for arm in ("offline IPO", "online IPO")})
    with pytest.raises(run.UserError, match="offline-ipo failed; .*offline-ipo.log says why.*\n.*online-ipo was not "
                                            "started, for .*offline-ipo failed"):
        reviews.make_runs(options)
    assert len(started) == 1 and started[0][-1] == "--resume"


def test_differences_are_within_a_seed_at_the_last_step_on_all_openings(finished):
    report = reviews.report_of(finished)
    claims = report["claims"]
    assert [len(line["values"]) for line in claims] == [5, 5, 5, 5, 4, 4, 4]
    for seed, value in zip(range(10, 15), claims[1]["values"]):
        mine, theirs = lines_of(seed, "HyPO"), lines_of(seed, "DPO")
        assert value == pytest.approx(mine[-1]["second_win_rate"] - theirs[-1]["second_win_rate"])
    assert report["reward_models"] == [0.625, 0.625]
    assert report["evaluations"]["PPO"][0][-1]["accuracy"] == pytest.approx(0.56)
    assert claims[0]["verdict"] == "holds" and claims[0]["mean"] == pytest.approx(-0.405, abs=0.02)  # log(2 / 3)
    assert report["commit"] == "abc1234" and report["hours"] == pytest.approx(25 / 60)


@pytest.mark.law
def test_at_a_fixed_kl_a_metric_is_on_the_line_between_two_checkpoints(monkeypatch):
    lines = [{"reverse_kl": kl, "x": x} for kl, x in ((0.0, 0.5), (0.5, 0.6), (2.5, 0.9), (3.0, 0.7))]
    for kl, expected in ((0.25, 0.55), (0.5, 0.6), (1.5, 0.75), (2.75, 0.8), (4.0, None)):
        monkeypatch.setattr(reviews, "KL_FIXED", kl)
        found = reviews.along(lines, "x")
        assert found is None if expected is None else found == pytest.approx(expected)
    monkeypatch.setattr(reviews, "KL_FIXED", 1.5)
    assert reviews.difference(lines, lines[:2], "x", "kl") is None, "one does not reach it"
    assert reviews.difference(lines, [{**line, "x": 0.0} for line in lines], "x", "kl") == pytest.approx(0.75)


def test_page_and_picture_say_what_the_report_holds(finished):
    report = json.loads(stats.as_json(reviews.report_of(finished)))
    page = reviews.page([report])
    assert page.count("| DPO | 5 | ") == 3 and page.count("| PPO | 2 | ") == 3 and "abc1234" in page
    assert all(f"{stats.cell(line['values'], '+.3f')}, {len(line['values'])} seeds: **{line['verdict']}** |" in page
               for line in report["claims"])
    assert page.count("opening ") >= 5 and "opening 5" not in page and r"DPO \| 0" in page
    figure = reviews.draw(report["evaluations"])
    left, right = figure.axes
    thin = [line for line in left.lines if line.get_linewidth() == 0.6]
    assert len(thin) == 25 and len(left.lines) == len(right.lines) == 25 + 6 + 1
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(reviews.ARMS)


def test_other_seeds_stand_beside_the_first_and_with_them(finished):
    report = reviews.report_of(finished)
    other = {**report, "seeds": {"DPO": [20, 24]}, "evaluations": {
        arm: [lines_of(seed, arm) for seed in range(20, 20 + n)] for arm, (_, _, n) in reviews.ARMS.items()}}
    other["claims"] = reviews.claims_of(other["evaluations"])
    for first, one in ((20, other), (10, report)):
        run.write_text(finished.results / f"reviews-{first}.json", stats.as_json(one))
    head, *rows = reviews.differences(reviews.reports_in(finished.results))
    assert head[2:] == ["seeds 10 to 14", "seeds 20 to 24", "all"]
    for row, line, again in zip(rows, report["claims"], other["claims"]):
        assert row[2].startswith(stats.cell(line["values"], "+.3f")) and str(line["verdict"]) in row[2]
        assert row[3].startswith(stats.cell(again["values"], "+.3f"))
        assert row[4].startswith(stats.cell(line["values"] + again["values"], "+.3f"))
    assert [row[4].split(", ")[-1].split()[0] for row in rows] == ["10"] * 4 + ["8"] * 3


def test_reviews_is_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(run.UserError, match="runs/smollm2 is not there"):
        command.main(["reviews"])
    with pytest.raises(SystemExit):
        command.main(["reviews", "--model", "tiny"])
    assert "reviews needs a pretrained --model" in capsys.readouterr().err
    options, _ = command.parse(["reviews", "--seeds", "2"])
    assert options.results != command.Path("results"), "a trial must not replace the published figures"
    assert command.parse(["reviews"])[0].results == command.Path("results")
    options, _ = command.parse(["reviews", "--first-seed", "20"])
    assert options.results == command.Path("results") and reviews.seeds_of(options, "PPO") == range(20, 22)
    assert options.flags == " --first-seed 20"
    options, _ = command.parse(["main", "--first-seed", "20"])
    assert options.results != command.Path("results") and command.seeds_of(options, "main") == range(20, 30)
