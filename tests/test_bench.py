"""The bench times the functions that ship, and takes the steps that a run takes."""

import json
import time
from functools import partial

import pytest
import torch

import data
import fast
import hypo
import lm
import run
import world
from experiments import bench

ALGORITHMS = ["DPO", "OnlineDPO", "HyPO", "Reward", "PPO", "RLOO"]


def real_metrics(monkeypatch, tmp_path, algorithm, path, args, pairs) -> list[dict]:
    """What the same training logs in run.loop."""
    args.out, args.eval_every, args.resume = tmp_path, args.steps, False
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", lambda *_: None)
        loop = run.loop
        patch.setattr(run, "loop", lambda args, trained, optimizer, _: loop(args, trained, optimizer, lambda _: {}))
        bench.train_ours(algorithm, fast.FastLM, path, pairs, args, None)
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[1:]]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_of_the_bench_is_a_step_of_a_run(algorithm, model_dir, tmp_path, monkeypatch):
    args, pairs = bench.arguments(steps=2, batch_size=4), bench.make_pairs(True, 8)
    side = bench.Side(partial(bench.train_ours, algorithm, fast.FastLM, str(model_dir), pairs, args))
    assert side.metrics == [], "it rests before its first step"
    side.step()
    assert len(side.metrics) == len(side.seconds) == 1
    side.step()
    expected = real_metrics(monkeypatch, tmp_path, algorithm, str(model_dir), args, pairs)
    assert [{"step": i + 1, **metrics} for i, metrics in enumerate(side.metrics)] == expected
    assert expected[0]["loss"] != expected[1]["loss"]
    with pytest.raises(RuntimeError, match="all of its steps"):
        side.step()


def test_sft_in_the_bench_shows_the_loss_that_it_shows_a_user(model_dir, monkeypatch):
    args, pairs = bench.arguments(steps=2, batch_size=4), bench.make_pairs(True, 8)
    side = bench.Side(partial(bench.train_ours, "SFT", fast.FastLM, str(model_dir), pairs, args))
    side.step()
    side.step()
    shown = []
    monkeypatch.setattr(lm.tqdm, "set_postfix_str", lambda bar, text, **_: shown.append(text))
    lm.sft(fast.FastLM.load(str(model_dir)), [(pair.prompt, pair.chosen) for pair in pairs], 2, 4, args.lr, args.seed)
    assert [f"loss {metrics['loss']:.3f} nats/token" for metrics in side.metrics] == shown
    assert all(metrics["grad_norm"] > 0 for metrics in side.metrics)


def test_the_clock_runs_in_the_function_that_ships_and_nowhere_else(model_dir, monkeypatch):
    def busy(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    args, pairs = bench.arguments(steps=3, batch_size=4), bench.make_pairs(True, 12)
    side = bench.Side(partial(bench.train_ours, "HyPO", fast.FastLM, str(model_dir), pairs, args))
    side.step()
    busy(0.3)  # between two steps
    side.step()
    kl_loss = hypo.kl_loss

    def slow_kl_loss(*samples):
        busy(0.3)
        return kl_loss(*samples)
    monkeypatch.setattr(hypo, "kl_loss", slow_kl_loss)
    side.step()
    assert side.seconds[1] < 0.3 < side.seconds[2]


def side_that_logs(losses, side):
    for loss in side.steps(losses):
        side.metrics.append({"loss": loss, "grad_norm": 1.0})


def test_a_row_whose_loss_is_not_that_of_trl_fails():
    sides = {"TRL": partial(side_that_logs, [1.0, 2.0]), "ours": partial(side_that_logs, [1.0, 2.00019])}
    row = bench.measure(sides, 2, check=1e-4)
    assert row["loss_and_gradient_norm"] == {"TRL": [1.0, 1.0], "ours": [1.0, 1.0]}
    assert row["n"] == 1 and set(row["ratio"]) == {"ours"}
    with pytest.raises(AssertionError, match="loss of step 2: ours 2.00019, TRL 2.0"):
        bench.measure(sides, 2, check=0.9e-4)
    sides["ours"] = partial(side_that_logs, [1.0, float("nan")])
    with pytest.raises(AssertionError, match="loss of step 2: ours nan"):
        bench.measure(sides, 2, check=1e-4)


def test_sides_take_their_steps_by_turns():
    order = []

    def train(name, side):
        order.extend((name, number) for number in side.steps(range(3)))
    bench.measure({name: partial(train, name) for name in ("generate", "ours", "plain")}, 3)
    assert order == [(name, number) for number in range(3) for name in ("generate", "ours", "plain")]


def test_an_error_in_a_side_is_an_error_of_the_bench():
    def train(side):
        for _ in side.steps(range(2)):
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        bench.measure({"ours": train}, 2)


def test_without_a_piece_of_fast_py_the_results_are_the_same_and_more_is_computed(monkeypatch):
    path, tokens = str(data.tiny_directory()), []
    network = type(lm.LM.load(path).model.base_model)
    forward = network.forward

    def spy(self, ids, *args, **more):
        tokens.append(ids.numel())
        return forward(self, ids, *args, **more)

    prompts = [*map(lm.LM.load(path).encode_prompt, world.world_prompts()[0][:8])] * 2
    monkeypatch.setattr(network, "forward", spy)
    results, counts = {}, {}
    for name, kind in bench.PIECES.items():
        policy = kind.load(path, batch_size=16)
        tokens.clear()
        responses = policy.sample(prompts, 20, torch.Generator().manual_seed(0))
        counts[name], start = [sum(tokens)], len(tokens)
        results[name] = responses, policy.logps(prompts, responses).tolist()
        counts[name].append(sum(tokens[start:]))
    for name, (responses, logps) in results.items():
        assert responses == results["ours"][0] and logps == pytest.approx(results["ours"][1], abs=1e-4), name
    sampled, scored = ({name: count[i] > counts["ours"][i] for name, count in counts.items()} for i in (0, 1))
    assert {name for name in counts if scored[name]} == {
        "packed log-probs", "several prompts in a row", "a prompt read once"}
    assert {name for name in counts if sampled[name]} == {
        "the sampler", "a prompt read once", "ended responses left behind"}


@pytest.mark.parametrize("argv, sentence", [
    (["--only", "zebra"], "--only: no row's name matches 'zebra'"), (["--only", "("], "--only: '(' is no regular"),
    (["--pieces", "--only", "tiny"], "--only would have no effect"),
    (["--n", "0"], "--n: must be a whole number of at least 1")])
def test_flags_that_cannot_be_are_refused(argv, sentence, capsys):
    with pytest.raises(SystemExit):
        bench.main(argv)
    assert sentence in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_known_before_the_hour(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "make_model", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(run.UserError, match="--out"):
        bench.main(["--out", str(tmp_path)])


def test_the_table_has_a_line_for_each_published_row_and_every_one_can_be_measured_again():
    report = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    lines = bench.table(report).splitlines()[4:]
    timed = {name for name, row in report["rows"].items() if "seconds" in row}
    assert {line.split(" | ")[0].removeprefix("| ") for line in lines} == timed
    assert "| DPO step, tiny | TRL | 0.0488 | 3.03 [2.88, 3.37] | 1.71 | 30 |" in lines
    assert "| DPO step, gpt2-small | TRL | 9.17 | 3.41 [3.07, 3.51], under the goal of 4 | 1.34 | 4 |" in lines
    assert timed <= set(bench.ROWS)


def test_the_figures_of_a_gpu_are_in_the_documentation():
    report = json.loads(bench.RESULTS.with_name("bench_gpu.json").read_text(encoding="utf-8"))
    table = bench.table(report)
    assert table in (bench.RESULTS.parent.parent / "docs" / "speed.md").read_text(encoding="utf-8")
    assert "goal" not in table and set(report["rows"]) <= set(bench.ROWS)
