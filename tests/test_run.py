"""The commands end to end on a random tiny model: determinism, exact resume after SIGKILL, errors, outputs."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo
import hypo
import run

ROOT = Path(__file__).parent.parent
SMALL = ("--steps 9 --eval-every 3 --batch-size 4 --pairs 10 --eval-samples 6 --max-new-tokens 8 --lr 1e-3 "
         "--device cpu --data world --sft-steps 0").split()


def flags(model_dir, out, *more) -> list[str]:
    return ["--model", str(model_dir), "--out", str(out), *SMALL, *map(str, more)]


def bytes_of(out) -> dict[str, bytes]:
    """What must be equal when two runs are the same: the policy's files and the metrics."""
    files = [*(Path(out) / "policy").iterdir(), Path(out) / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def uninterrupted(model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    hypo.main(flags(model_dir, out))
    return out


# ---------------------------------------------------------------------------------------------------
# determinism and resume


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(model_dir, uninterrupted, tmp_path):
    hypo.main(flags(model_dir, tmp_path / "again"))
    assert bytes_of(tmp_path / "again") == bytes_of(uninterrupted)
    hypo.main(flags(model_dir, tmp_path / "other", "--seed", 1))
    assert bytes_of(tmp_path / "other")["model.safetensors"] != bytes_of(uninterrupted)["model.safetensors"]


def test_hypo_with_lam_0_is_dpo_to_the_byte(model_dir, uninterrupted, tmp_path):
    hypo.main(flags(model_dir, tmp_path / "hypo", "--lam", 0))
    dpo.main(flags(model_dir, tmp_path / "dpo"))
    ours, theirs = (bytes_of(tmp_path / name)["model.safetensors"] for name in ("hypo", "dpo"))
    assert ours == theirs
    assert ours != bytes_of(uninterrupted)["model.safetensors"], "and with lam > 0 it is not"


# Runs hypo.py or dpo.py and kills itself, by SIGKILL, at the n-th call of one of its parts.
VICTIM = """
import os, signal, sys
import torch
import dpo, hypo, lm, rlhf, run

torch.set_num_threads(1)
program, where, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0


def die_at_call_n(function, last_words=lambda *args: None):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == n:
            last_words(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped


def half_a_file(state, file):
    import io
    whole = io.BytesIO()
    real_save(state, whole)
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()


real_save = torch.save
if where == "step":
    run.update = die_at_call_n(run.update)
elif where == "half-written checkpoint":
    torch.save = die_at_call_n(torch.save, half_a_file)
elif where == "just before the checkpoint's rename":
    run.os.fsync = die_at_call_n(os.fsync)
elif where == "half-written policy":
    lm.shutil.rmtree = die_at_call_n(lm.shutil.rmtree)
{"hypo": hypo, "dpo": dpo, "rlhf": rlhf}[program].main(sys.argv[4:])
"""

MOMENTS = {  # name -> (where, call, steps that survive)
    "in the first step": ("step", 1, 0),
    "between two checkpoints": ("step", 5, 3),
    "inside the save of the second checkpoint": ("half-written checkpoint", 2, 3),
    "just before the second checkpoint's rename": ("just before the checkpoint's rename", 2, 3),
    "inside the save of the policy": ("half-written policy", 2, 9),
}


def start_victim(program, where, call, arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", VICTIM, program, where, str(call), *arguments], cwd=ROOT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def victims(model_dir, tmp_path_factory):
    """All of them at once, for most of their time goes into importing torch."""
    folder = tmp_path_factory.mktemp("killed")
    started = {moment: start_victim("hypo", where, call, flags(model_dir, folder / str(i)))
               for i, (moment, (where, call, _)) in enumerate(MOMENTS.items())}
    outs = {}
    for i, (moment, process) in enumerate(started.items()):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, errors
        outs[moment] = folder / str(i)
    return outs


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_then_resumed_equals_uninterrupted(moment, victims, model_dir, uninterrupted):
    out, survived = victims[moment], MOMENTS[moment][2]
    checkpoint = out / "checkpoint.pt"
    assert (torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0) == survived
    assert not (out / "summary.json").exists(), "the victim must not have finished"
    hypo.main(flags(model_dir, out, "--resume"))
    assert bytes_of(out) == bytes_of(uninterrupted)
    assert not [path for path in out.rglob("*.tmp")], "no half-written file is left"


def test_iterative_training_resumes_inside_a_round(model_dir, tmp_path):
    more = ["--sampling", "iterative", "--rounds", "2", "--loss", "ipo", "--judge", "golden"]  # rounds of 5 steps
    dpo.main(flags(model_dir, tmp_path / "whole", *more))
    process = start_victim("dpo", "step", 8, flags(model_dir, tmp_path / "killed", *more))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    dpo.main(flags(model_dir, tmp_path / "killed", *more, "--resume"))
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_resume_with_other_settings_is_refused_with_a_sentence(model_dir, uninterrupted):
    before = bytes_of(uninterrupted)
    with pytest.raises(ValueError, match=r"other settings: --beta 0.1 \(now 0.3\), --lam [0-9.]+ \(now 0.5\)"):
        hypo.main(flags(model_dir, uninterrupted, "--resume", "--beta", 0.3, "--lam", 0.5))
    assert bytes_of(uninterrupted) == before


def test_resuming_a_finished_run_changes_nothing(model_dir, uninterrupted):
    before = bytes_of(uninterrupted)
    hypo.main(flags(model_dir, uninterrupted, "--resume"))
    assert bytes_of(uninterrupted) == before


def test_an_earlier_run_is_moved_aside_not_overwritten(model_dir, tmp_path, capsys):
    out = tmp_path / "run"
    dpo.main(flags(model_dir, out))
    first = bytes_of(out)
    dpo.main(flags(model_dir, out, "--seed", 1))
    assert bytes_of(tmp_path / "run.1") == first != bytes_of(out)
    assert f"the earlier run in {out} is now {tmp_path / 'run.1'}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------
# step 0, and what a run leaves


def test_step_0_identities_and_the_first_loss(uninterrupted):
    first, second, *_ = map(json.loads, (uninterrupted / "metrics.jsonl").read_text().splitlines())
    assert first["step"] == 0 and first["reverse_kl"] == 0 and first["accuracy"] == 0.5
    assert first["chosen_logratio"] == first["rejected_logratio"] == 0
    assert second["loss_dpo"] == pytest.approx(0.693147, abs=1e-5), "DPO's loss at pi_ref is log 2"
    assert second["online_kl"] == 0, "the policy is pi_ref before its first step"


def test_a_run_leaves_what_the_design_promises(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    for key in ("algorithm", "model", "seed", "steps", "beta", "win_rate", "win_rate_ci", "golden_reward", "reverse_kl",
                "response_length", "seconds", "tokens_per_second"):
        assert summary[key] is not None, key
    low, high = summary["win_rate_ci"]
    assert summary["algorithm"] == "hypo" and low <= summary["win_rate"] <= high
    assert [json.loads(line)["step"] for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()] \
        == list(range(10))
    assert (uninterrupted / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "pi_ref" in (uninterrupted / "samples.md").read_text()
    AutoModelForCausalLM.from_pretrained(uninterrupted / "policy")
    AutoTokenizer.from_pretrained(uninterrupted / "policy")


def not_in_the_glossary(out) -> set[str]:
    """Metrics of a run that the README does not explain."""
    glossary = (ROOT / "README.md").read_text(encoding="utf-8").split("## Glossary")[1].split("\n## ")[0]
    names = {name for line in (out / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    return {name for name in names - {"step"} if f"`{name}`" not in glossary}


def test_every_metric_is_in_the_glossary(uninterrupted):
    assert not not_in_the_glossary(uninterrupted)


@pytest.mark.parametrize("more", [
    ["--loss", "ipo"], ["--loss", "ipo", "--length-average"], ["--loss", "bo2"],
    ["--loss", "dpo", "--sampling", "online"], ["--loss", "ipo", "--sampling", "online"],
    ["--loss", "bo2", "--sampling", "iterative", "--rounds", "3"]], ids=" ".join)
def test_every_loss_and_sampling_trains(more, model_dir, tmp_path):
    dpo.main(flags(model_dir, tmp_path / "run", *more))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["reverse_kl"] > 0, "the policy has moved"
    assert not not_in_the_glossary(tmp_path / "run")


def test_k_1_and_k_3_train(model_dir, tmp_path):
    for k in (1, 3):
        hypo.main(flags(model_dir, tmp_path / str(k), "--k", k))


def test_online_labels_follow_the_judge_and_skip_ties(policy, ref):
    """A judge that likes long responses; equal lengths are ties."""
    args = argparse.Namespace(max_new_tokens=4)

    class Tokenizer:
        eos_token_id, bos_token_id = 0, None

        def encode(self, text, add_special_tokens):
            return [1, 2]

        def __call__(self, text):
            return type("Encoding", (), {"input_ids": [1]})

        def decode(self, ids, **kwargs):
            return "x" * len(ids)

    judge = lambda prompts, responses: list(map(len, responses))  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    pairs = dpo.online_pairs(policy, ref, Tokenizer(), ["a"] * 60, judge, generator, args)
    assert 0 < len(pairs) < 60, "some are ties, not all"
    assert all(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
    assert not dpo.online_pairs(policy, ref, Tokenizer(), ["a"] * 6, lambda p, r: [0] * len(r), generator, args)


def test_an_online_step_in_which_every_prompt_ties_is_skipped(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "online_pairs", lambda *args: [])
    dpo.main(flags(model_dir, tmp_path / "run", "--sampling", "online"))
    lines = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    assert lines[-1]["pairs"] == 0 and lines[-1]["reverse_kl"] == 0


def test_the_reference_never_moves_and_the_sampler_is_the_current_policy(model_dir, tmp_path, monkeypatch):
    """Spies on sampling: within training the sampled model has moved since the last step; pi_ref never."""
    weights, refs = [], []
    sample, logps = hypo.lm.sample, hypo.lm.logps

    def spy_sample(model, *args, **kwargs):
        if model.training is False and next(model.parameters()).requires_grad:
            weights.append(next(model.parameters()).sum().item())
        return sample(model, *args, **kwargs)

    def spy_logps(model, *args):
        if not next(model.parameters()).requires_grad:
            refs.append(next(model.parameters()).sum().item())
        return logps(model, *args)

    monkeypatch.setattr(hypo.lm, "sample", spy_sample)
    monkeypatch.setattr(hypo.lm, "logps", spy_logps)
    hypo.main(flags(model_dir, tmp_path / "run", "--eval-every", 100))
    assert len(set(weights)) == 10, "9 steps and the last evaluation see 10 different policies"
    assert len(refs) > 9 and len(set(refs)) == 1


# ---------------------------------------------------------------------------------------------------
# real data, and errors for people


@pytest.fixture
def pairs_file(tmp_path):
    rows = [{"prompt": f"The {aspect} was", "chosen": " superb.", "rejected": f" {word}."}
            for aspect in ("plot", "music", "script") for word in ("dull", "slow", "weak", "flat")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_preference_file_trains_without_a_judge(model_dir, pairs_file, tmp_path, capsys):
    hypo.main(flags(model_dir, tmp_path / "run", "--data", pairs_file))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["win_rate"] is None and summary["reverse_kl"] > 0
    assert "reverse KL" in capsys.readouterr().out


def last_line(out) -> dict:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("main, more", [(dpo.main, ["--loss", "dpo"]), (dpo.main, ["--loss", "ipo"]), (hypo.main, [])])
def test_training_widens_the_margin_of_its_pairs(main, more, model_dir, pairs_file, tmp_path):
    """A sign lost between the loss and the loop would widen it the other way."""
    main(flags(model_dir, tmp_path / "run", "--data", pairs_file, "--steps", 30, "--eval-every", 30, *more))
    last = last_line(tmp_path / "run")
    assert last["train_chosen_logratio"] - last["train_rejected_logratio"] > 1


def test_best_of_2_makes_the_chosen_likelier(model_dir, pairs_file, tmp_path):
    dpo.main(flags(model_dir, tmp_path / "run", "--data", pairs_file, "--steps", 30, "--loss", "bo2"))
    assert last_line(tmp_path / "run")["train_chosen_logratio"] > 1


def test_the_kl_term_holds_the_policy_near_pi_ref(model_dir, tmp_path):
    """Line 6's sign: with lam the KL ends lower than without."""
    kls = []
    for lam in (0, 1):
        hypo.main([*flags(model_dir, tmp_path / str(lam)), "--steps", "30", "--lam", str(lam), "--eval-samples", "64"])
        kls.append(last_line(tmp_path / str(lam))["reverse_kl"])
    assert kls[1] < 0.7 * kls[0], f"KL {kls[0]:.3f} without the term, {kls[1]:.3f} with it"


def fails(main, arguments, capsys) -> str:
    """The message of a command that must end with an error."""
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        main(list(map(str, arguments)))
    return str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize("main, more, message", [
    (hypo.main, ["--beta", "0"], "--beta must be positive, got 0.0"),
    (hypo.main, ["--steps", "0"], "--steps must be positive, got 0"),
    (hypo.main, ["--lr", "-1"], "--lr must be positive"),
    (hypo.main, ["--lam", "-1"], "--lam must not be negative"),
    (hypo.main, ["--k", "0"], "--k must be at least 1"),
    (dpo.main, ["--loss", "ip0"], "invalid choice: 'ip0'"),
    (dpo.main, ["--length-average"], "--length-average is an option of --loss ipo"),
    (dpo.main, ["--sampling", "iterative", "--rounds", "10"], "--rounds must be from 1 to --steps 9"),
    (dpo.main, ["--sampling", "online", "--judge", "no/such"], "--judge no/such: neither golden, vader or none, nor a"),
    (dpo.main, ["--sampling", "online", "--data", "x.jsonl"], "needs --judge"),
    (hypo.main, ["--data", "no-such.jsonl"], "no such file"),
])
def test_bad_arguments_end_in_a_sentence(main, more, message, model_dir, tmp_path, capsys):
    assert message in fails(main, flags(model_dir, tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run").exists(), "an error costs no earlier run its place"


def test_bad_rows_are_named_by_file_and_line(model_dir, pairs_file, tmp_path, capsys):
    with open(pairs_file, "a") as file:
        file.write('{"prompt": "The plot was", "chosen": "", "rejected": " dull."}\n')
    assert f"{pairs_file}:13: field 'chosen' is empty" in fails(
        hypo.main, flags(model_dir, tmp_path / "run", "--data", pairs_file), capsys)


def test_start_turns_our_errors_into_sentences_and_leaves_bugs_their_trace(tmp_path):
    def ours():
        run.load_checkpoint(argparse.Namespace(out=tmp_path, device="cpu", beta=1), None, None)

    torch.save({"settings": "{}", "step": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="error: --resume: .* was run with other settings"):
        run.start(ours)
    with pytest.raises(ValueError, match="could not convert"):
        run.start(lambda: float("a bug"))


# ---------------------------------------------------------------------------------------------------
# the stateless order of data


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 30), st.integers(0, 5))
def test_minibatches_walk_through_shuffled_epochs(n, batch_size, steps, seed):
    args = argparse.Namespace(batch_size=batch_size, seed=seed)
    rows = list(range(n))
    seen = [row for step in range(1, steps + 1) for row in run.minibatch(rows, args, step)]
    assert len(seen) == steps * batch_size
    for epoch in range(len(seen) // n):
        assert Counter(seen[epoch * n:(epoch + 1) * n]) == Counter(rows), "each row once an epoch"


def test_random_streams_of_different_uses_differ():
    args = argparse.Namespace(device="cpu", seed=0)
    draws = {torch.rand(1, generator=run.generator(args, use, step)).item()
             for use in ("online", "round") for step in range(50)}
    assert len(draws) == 100


def test_settings_hold_everything_that_decides_a_run(model_dir):
    args = run.parse(run.parser("x"), ["--model", str(model_dir)])
    missing = set(vars(args)) - set(run.settings(args))
    assert missing == {"out", "resume"}


def test_gradient_is_clipped_and_its_norm_reported():
    weight = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(weight.parameters(), lr=1.0)
    before = weight.weight.item()
    norm = run.update(weight, optimizer, weight(torch.tensor([[30.0]])).sum(), argparse.Namespace(max_grad_norm=1.0))
    assert norm.item() == pytest.approx(30) and weight.weight.item() == pytest.approx(before - 1, abs=1e-5)


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="a smoke run of the real command line, in CI")
def test_help_reads_as_part_of_the_tutorial():
    for program in ("hypo.py", "dpo.py", "eval.py", "data.py"):
        text = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        assert "usage:" in text and "python " + program in text
