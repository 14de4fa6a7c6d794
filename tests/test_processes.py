"""torchrun: N processes do what one does, to rounding; whatever N, a run can be resumed; no process is left waiting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import COMMANDS, train

import data
import run
from run import read_rows


@pytest.fixture(scope="module", autouse=True)
def built_in_model():
    data.tiny_directory()


def torchrun(out: Path, *names: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         str(Path(__file__).with_name("two_processes.py")), str(out), *names], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def outs(built_in_model, tmp_path_factory):
    """{1: folder of the runs by one process, 2: by two}, and what was said by the two."""
    folders = {n: tmp_path_factory.mktemp(f"by-{n}") for n in (1, 2)}
    process = torchrun(folders[2], *COMMANDS)
    for name in COMMANDS:
        train(folders[1], name)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert said.count("s of training; see") == len(COMMANDS), "one of them is heard"
    return folders


def near(one: list[dict], other: list[dict], by: float = 1e-4) -> bool:
    """To 1e-4 of each number, or, of those near 0, of a nat."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(value == b[name] or value == pytest.approx(b[name], rel=by, abs=by)
                                     for name, value in a.items()) for a, b in zip(one, other))


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_do_what_one_does(outs, name):
    one, two = (folder / name for folder in outs.values())
    by = 1e-3 if name == "ppo" else 1e-4  # its ratios magnify what rounding leaves, from step to step
    assert near(read_rows(one / "metrics.jsonl"), read_rows(two / "metrics.jsonl"), by)
    samples = [[row["response"] for row in read_rows(out / "responses.jsonl")] for out in (one, two)]
    assert samples[0] == samples[1]
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}, "and no folder for another"


def test_negative_control_another_seed_is_not_near(outs, tmp_path):
    train(tmp_path, "dpo", "--seed", "1")
    assert not near(read_rows(tmp_path / "dpo" / "metrics.jsonl"), read_rows(outs[1] / "dpo" / "metrics.jsonl"), 1e-2)


@pytest.mark.law
@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_rows_are_shared_and_each_has_its_gradient_once(processes, n, monkeypatch):
    """Of process after process, what the others would have sent is put together here."""
    monkeypatch.setattr(run, "PROCESSES", processes)
    weight, rows = torch.ones(3, requires_grad=True), [[i + 1.0] * (i + 1) for i in range(n)]

    def scores(rows):  # rows of unequal width, as responses are
        wide = max(map(len, rows))
        padded = torch.tensor([row + [0.0] * (wide - len(row)) for row in rows])
        return padded * weight.sum(), padded > 0

    def send(parts, own):
        parts[:] = [scores([rows[i] for i in [*range(rank, n, processes)] or [0]])[isinstance(own[0][0], bool)].tolist()
                    for rank in range(processes)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", send)
    gradient = torch.zeros(3)
    for rank in range(processes):
        monkeypatch.setattr(run, "RANK", rank)
        together, mask = run.shared(scores, rows)
        assert torch.equal(together, scores(rows)[0]) and torch.equal(mask, scores(rows)[1])
        gradient += torch.autograd.grad((together ** 2).sum(), weight)[0]
    assert torch.allclose(gradient, torch.autograd.grad((scores(rows)[0] ** 2).sum(), weight)[0])


def test_when_one_process_dies_the_others_end_with_a_sentence_and_one_alone_goes_on(outs, tmp_path, monkeypatch):
    monkeypatch.setenv("DIE_AT", "15")
    process = torchrun(tmp_path, "hypo")
    said, _ = process.communicate(timeout=100)
    assert process.returncode != 0 and "error: another of the 2 processes has ended; the same command" in said, said
    assert 10 <= len(read_rows(tmp_path / "hypo" / "metrics.jsonl")) - 1 < 15
    train(tmp_path, "hypo", "--resume")
    assert near(*(read_rows(out / "hypo" / "metrics.jsonl") for out in (tmp_path, outs[1])))
