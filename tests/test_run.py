"""The commands end to end on a random tiny model: determinism, exact resume after SIGKILL, errors, outputs."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import FAST, write_task
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import coverage
import dpo
import eval
import fast
import hypo
import rlhf
import run
import world
from judges import load_judge
from lm import LM
from models import fitting
from run import UserError, read_rows, write_text

ROOT = Path(__file__).parent.parent
SMALL = ("--steps 9 --eval-every 3 --batch-size 4 --pairs 10 --eval-samples 6 --max-new-tokens 8 --lr 1e-3 "
         "--device cpu --data world --sft-steps 0").split()


def flags(model_dir, out, *more) -> list[str]:
    return ["--model", str(model_dir), "--out", str(out), *fitting([*SMALL, *map(str, more)])]


def bytes_of(out) -> dict[str, bytes]:
    """What must be equal when two runs are the same: the policy's files and the metrics."""
    files = [*(Path(out) / "policy").iterdir(), Path(out) / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def uninterrupted(model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    hypo.main(flags(model_dir, out))
    return out


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """curve.png takes as long as the rest of so small a run; only the run above draws it."""
    monkeypatch.setattr(eval, "plot_curve", lambda *args: None)


# ---------------------------------------------------------------------------------------------------
# determinism and resume


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(model_dir, uninterrupted, tmp_path):
    hypo.main(flags(model_dir, tmp_path / "again"))
    assert bytes_of(tmp_path / "again") == bytes_of(uninterrupted)
    hypo.main(flags(model_dir, tmp_path / "other", "--seed", 1))
    assert bytes_of(tmp_path / "other")["model.safetensors"] != bytes_of(uninterrupted)["model.safetensors"]


def test_hypo_with_lam_0_is_dpo_to_the_byte(model_dir, uninterrupted, tmp_path, monkeypatch):
    drawn, minibatch = {"hypo": [], "dpo": []}, run.Step.minibatch

    def spy(step, rows):
        drawn[step.args.algorithm].append(minibatch(step, rows))
        return drawn[step.args.algorithm][-1]

    monkeypatch.setattr(run.Step, "minibatch", spy)
    hypo.main(flags(model_dir, tmp_path / "hypo", "--lam", 0))
    dpo.main(flags(model_dir, tmp_path / "dpo"))
    ours, theirs = (bytes_of(tmp_path / name)["model.safetensors"] for name in ("hypo", "dpo"))
    assert ours == theirs
    assert len(drawn["hypo"]) == 9 and drawn["hypo"] == drawn["dpo"], "both draw the same minibatches"
    assert ours != bytes_of(uninterrupted)["model.safetensors"], "and with lam > 0 it is not"


def test_plain_forms_and_fast_ones_give_the_same_run(model_dir, tmp_path, monkeypatch):
    """The default run uses fast.py, --plain does not; samples are equal at step 0, all metrics to rounding."""
    runs, evaluated, evaluate = {"fast": [], "plain": ["--plain"]}, {}, eval.Evaluator.__call__

    def spy(evaluator, policy):
        metrics = evaluate(evaluator, policy)
        evaluated.setdefault(evaluator.args.out, []).append(
            (type(policy), (evaluator.args.out / "responses.jsonl").read_bytes()))
        return metrics

    monkeypatch.setattr(eval.Evaluator, "__call__", spy)
    for name, more in runs.items():
        hypo.main(flags(model_dir, tmp_path / name, "--steps", 3, *more))
    (fast_kind, fast_samples), (plain_kind, plain_samples) = (evaluated[tmp_path / name][0] for name in runs)
    assert (fast_kind, plain_kind) == (fast.FastLM, LM)
    assert fast_samples == plain_samples
    for ours, theirs in zip(*(read_rows(tmp_path / name / "metrics.jsonl") for name in runs), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), f"step {ours['step']}: {key}"


# Runs hypo.py, dpo.py or rlhf.py and kills itself, by SIGKILL, at the n-th call of one of its parts.
VICTIM = """
import io, json, os, signal, sys
import torch
import dpo, hypo, lm, rlhf, run

torch.set_num_threads(1)
calls, real_save = 0, torch.save


def die_at_call(n, function, last_words=lambda *args: None):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == n:
            last_words(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped


def half_a_file(state, file):
    whole = io.BytesIO()
    real_save(state, whole)
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()


def victim(program, where, n, arguments):
    if where == "step":  # an update of weights
        torch.optim.AdamW.step = die_at_call(n, torch.optim.AdamW.step)
    elif where == "half-written checkpoint":
        torch.save = die_at_call(n, torch.save, half_a_file)
    elif where == "just before the checkpoint's rename":
        run.os.fsync = die_at_call(n, os.fsync)
    elif where == "half-written policy":
        lm.shutil.rmtree = die_at_call(n, lm.shutil.rmtree)
    {"hypo": hypo, "dpo": dpo, "rlhf": rlhf}[program].main(arguments)


victims = json.loads(sys.argv[1])
for arguments in victims:
    if os.fork() == 0:
        victim(*arguments)
        os._exit(0)
if {os.waitstatus_to_exitcode(os.wait()[1]) for _ in victims} == {-signal.SIGKILL}:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start_victims(*victims) -> subprocess.Popen:
    """One process for several victims, for most of their time goes into importing torch. It ends as they do."""
    return subprocess.Popen([sys.executable, "-c", VICTIM, json.dumps(victims)], cwd=ROOT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def start_victim(program, where, call, arguments) -> subprocess.Popen:
    """A process that runs the program with the arguments, and dies at a call."""
    return start_victims((program, where, call, arguments))


MOMENTS = {  # name -> (where, call, steps that survive)
    "in the first step": ("step", 1, 0),
    "between two checkpoints": ("step", 5, 3),
    "inside the save of the second checkpoint": ("half-written checkpoint", 2, 3),
    "just before the second checkpoint's rename": ("just before the checkpoint's rename", 2, 3),
    "inside the save of the policy": ("half-written policy", 2, 9),
}


@pytest.fixture(scope="module")
def victims(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    outs = {moment: folder / str(i) for i, moment in enumerate(MOMENTS)}
    process = start_victims(*(("hypo", where, call, flags(model_dir, outs[moment]))
                              for moment, (where, call, _) in MOMENTS.items()))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
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
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["step"] == 6, "step 7 is inside a round"
    dpo.main(flags(model_dir, tmp_path / "killed", *more, "--resume"))
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_resume_with_other_settings_is_refused_with_a_sentence(model_dir, uninterrupted):
    before = bytes_of(uninterrupted)
    with pytest.raises(UserError, match=r"other settings: --beta 0.1 \(now 0.3\), --lam [0-9.]+ \(now 0.5\)"):
        hypo.main(flags(model_dir, uninterrupted, "--resume", "--beta", 0.3, "--lam", 0.5))
    with pytest.raises(UserError, match=r"the learning rate falls to 0 over --steps\): --steps 9 \(now 12\); give"):
        hypo.main(flags(model_dir, uninterrupted, "--resume", "--steps", 12))
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


@pytest.mark.parametrize("more", [["--eval-samples", 90], ["--micro-batch", 3], ["--plain"]], ids=str)
def test_implicit_rewards_at_step_0_are_exactly_0_whatever_the_batches_are(more, model_dir, tmp_path):
    """pi_ref's log-probs are stored with the pairs: they must be those of the same form and the same batches."""
    good = " superb, and the hero was really charming.", " flat."
    bad = " dull.", " never funny, but short. I hated it."
    for name in ("pairs", "held_out_pairs"):
        run.write_rows(tmp_path / "d" / f"{name}.jsonl", [
            {"prompt": prompt, "chosen": good[i % 2], "rejected": bad[i // 2 % 2]}
            for i, prompt in enumerate(world.world_prompts()[name == "held_out_pairs"][:100])])
    for source in (tmp_path / "d", "world"):
        for name, extra in (("kept", []), ("asked", more)):  # the first makes the pairs that are kept
            dpo.main(flags(model_dir, tmp_path / name, "--data", source, "--steps", 1, "--max-new-tokens", 12, *extra))
        first = read_rows(tmp_path / "asked" / "metrics.jsonl")[0]
        assert (first["accuracy"], first["chosen_logratio"], first["rejected_logratio"]) == (0.5, 0, 0), source


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
    """Metrics of a run that docs/glossary.md does not explain: its tables' rows begin with their names."""
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`[^|]*`) \|", glossary, re.MULTILINE)
    explained = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    return {name for line in read_rows(out / "metrics.jsonl") for name in line} - {"step"} - explained


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


def test_online_labels_follow_the_judge_and_skip_ties(model_dir):
    """A judge that likes long responses; equal lengths are ties."""
    policy = LM.load(str(model_dir))

    def length(prompts, texts):
        return [len(text) // 8 for text in texts]

    def pairs(n, label):
        start = SimpleNamespace(policy=policy, ref=policy, label=label)
        generator = torch.Generator().manual_seed(0)
        return dpo.online_pairs(start, ["The plot was"] * n, generator, argparse.Namespace(max_new_tokens=4))

    some = pairs(60, length)
    assert 0 < len(some) < 60, "some are ties, not all"
    for pair in some:
        chosen, rejected = length([], [policy.decode(ids) for ids in (pair.chosen, pair.rejected)])
        assert chosen > rejected
        assert (pair.ref_chosen, pair.ref_rejected) == pytest.approx(
            [side.item() for side in policy.pair_logps([pair])], abs=1e-4)
    assert not pairs(6, lambda prompts, texts: [0] * len(texts))


def test_an_online_step_in_which_every_prompt_ties_is_skipped(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "online_pairs", lambda *args: [])
    dpo.main(flags(model_dir, tmp_path / "run", "--sampling", "online"))
    lines = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    assert lines[-1]["pairs"] == 0 and lines[-1]["reverse_kl"] == 0


def test_the_reference_never_moves_and_the_sampler_is_the_current_policy(model_dir, tmp_path, monkeypatch):
    """Spies on sampling: within training the sampled model has moved since the last step; pi_ref never."""
    weights, refs, sample, logps = [], [], LM.sample, LM.logps

    def spy_sample(policy, *args, **kwargs):
        if next(policy.parameters()).requires_grad:
            weights.append(next(policy.parameters()).sum().item())
        return sample(policy, *args, **kwargs)

    def spy_logps(policy, *args):
        if not next(policy.parameters()).requires_grad:
            refs.append(next(policy.parameters()).sum().item())
        return logps(policy, *args)

    monkeypatch.setattr(LM, "sample", spy_sample)
    monkeypatch.setattr(LM, "logps", spy_logps)
    hypo.main(flags(model_dir, tmp_path / "run", "--eval-every", 100))
    assert len(set(weights)) == 10, "9 steps and the last evaluation see 10 different policies"
    assert len(refs) >= 9 and len(set(refs)) == 1


# ---------------------------------------------------------------------------------------------------
# tasks with two judges, and what a run leaves for others


@pytest.mark.parametrize("main, more", [
    (hypo.main, []), (dpo.main, ["--loss", "ipo", "--sampling", "online"]), (rlhf.main, ["--reward-epochs", "1"])],
    ids=["hypo", "online ipo", "ppo"])
def test_a_run_reports_both_judges(main, more, model_dir, tmp_path, capsys):
    write_task(tmp_path / "task")
    main(["--model", str(model_dir), "--data", str(tmp_path / "task"), *FAST, "--sft-steps", "2", "--train-layers", "1",
          "--micro-batch", "3", "--gradient-checkpointing", "--out", str(tmp_path / "r"), *more])
    summary = eval.read_summary(tmp_path / "r")
    assert all(summary[name] is not None for name in ("win_rate", "judge_reward", "second_win_rate", "second_reward"))
    assert "second judge's win rate" in capsys.readouterr().out
    rows = read_rows(tmp_path / "r" / "responses.jsonl")
    texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
    rewards, golden = load_judge(str(tmp_path / "task" / "judge"))(*texts), world.golden_judge(*texts)
    assert summary["judge_reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert summary["second_reward"] == pytest.approx(sum(golden) / len(golden))
    assert (summary["judge"], summary["second_judge"]) == (str(tmp_path / "task" / "judge"), "golden")
    assert "sft-" in summary["pi_ref"], "pi_ref is the model after fine-tuning, and can be loaded again"
    LM.load(summary["pi_ref"])
    assert {row["prompt"] for row in rows} <= {row["prompt"] for row in read_rows(
        tmp_path / "task" / "held_out_prompts.jsonl")}


def test_saved_models_are_the_ecosystems(model_dir, tmp_path, monkeypatch):
    """transformers alone: the policy writes, the reward model gives our reward, both have a card."""
    monkeypatch.chdir(tmp_path)
    rlhf.main(["--model", str(model_dir), *FAST, "--data", "world", "--sft-steps", "0", "--out", "r"])
    write = pipeline("text-generation", model="r/policy")
    assert write("The plot was", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("The plot was")
    model = AutoModelForSequenceClassification.from_pretrained("r/reward/model")
    tokenizer = AutoTokenizer.from_pretrained("r/policy")
    prompt, response = "The plot was", " dull."
    ids = torch.tensor([tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]])
    with torch.no_grad():
        reward = model(ids).logits.item() - model.config.reward_center
    assert load_judge("r/reward/model")([prompt], [response]) == [pytest.approx(reward, abs=1e-5)]
    for card in ("r/policy/README.md", "r/reward/model/README.md"):
        text = Path(card).read_text()
        assert text.startswith("---\nlibrary_name: transformers\n") and "| seed | 0 |" in text
    assert "read at that EOS" in text and "reward_accuracy" in text


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
    dpo.main(flags(model_dir, tmp_path / "run", "--data", pairs_file, "--steps", 30, "--eval-every", 30,
                   "--loss", "bo2"))
    assert last_line(tmp_path / "run")["train_chosen_logratio"] > 1


def test_the_kl_term_holds_the_policy_near_pi_ref(model_dir, tmp_path):
    """Line 6's sign: with lam the KL ends lower than without."""
    kls = []
    for lam in (0, 1):
        hypo.main(flags(model_dir, tmp_path / str(lam), "--steps", 30, "--lam", lam, "--eval-every", 30,
                        "--eval-samples", 64))
        kls.append(last_line(tmp_path / str(lam))["reverse_kl"])
    assert kls[1] < 0.7 * kls[0], f"KL {kls[0]:.3f} without the term, {kls[1]:.3f} with it"


def fails(main, arguments, capsys) -> str:
    """The message of a command that must end with an error."""
    with pytest.raises((SystemExit, UserError)) as error:
        main(list(map(str, arguments)))
    return str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize("main, more, message", [
    (hypo.main, ["--beta", "0"], "--beta: must be a finite number above 0, got 0"),
    (hypo.main, ["--steps", "0"], "--steps: must be a whole number of at least 1 and at most 10000000, got 0"),
    (hypo.main, ["--lr", "-1"], "--lr: must be a finite number above 0, got -1"),
    (hypo.main, ["--lam", "-1"], "--lam: must be a finite number of at least 0, got -1"),
    (hypo.main, ["--k", "0"], "--k: must be a whole number of at least 1"),
    (dpo.main, ["--loss", "ip0"], "invalid choice: 'ip0'"),
    (dpo.main, ["--length-average"], "--length-average would have no effect: it is for --loss ipo, not for --loss dpo"),
    (dpo.main, ["--sampling", "iterative", "--rounds", "10"], "--rounds must be from 1 to --steps 9"),
    (dpo.main, ["--sampling", "online", "--judge", "no/such"], "--judge no/such: no/such is neither golden, vader"),
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


class Planted:
    """A function of ours with a mistake in it."""

    def value_error(*args, **kwargs):
        raise ValueError("planted")

    def key_error(*args, **kwargs):
        return {}["planted"]

    def failed_unpacking(*args, **kwargs):
        prompt, chosen = ["planted"]
        return prompt, chosen

    def missing_file(*args, **kwargs):
        return open("planted")


MISTAKES = {"value_error": ValueError, "key_error": KeyError, "failed_unpacking": ValueError,
            "missing_file": FileNotFoundError}


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """A small finished run, for the commands that read one."""
    out = tmp_path_factory.mktemp("finished") / "run"
    dpo.main(flags(model_dir, out, "--steps", 1))
    return out


COMMANDS = {"hypo": hypo, "dpo": dpo, "rlhf": rlhf, "eval": eval, "coverage": coverage}
PLACES = [  # a command, and a function of ours that it calls
    *((command, place, mistake) for mistake in MISTAKES for command, place in (
        ("hypo", "hypo.kl_loss"), ("dpo", "dpo.dpo_loss"), ("rlhf", "rlhf.reward_loss"),
        ("eval", "eval.table"), ("coverage", "data.judges_of"))),
    *((command, place, "failed_unpacking") for command, place in (
        ("rlhf --judge golden", "rlhf.gae"), ("hypo", "fast.pack"), ("dpo --plain", "lm.lay_out"),
        ("dpo", "run.seed_of"), ("dpo", "world.golden_reward"), ("rlhf", "data.load_judge"),
        ("hypo --resume", "run.load_checkpoint")))]


@pytest.mark.parametrize("command, place, mistake", PLACES)
def test_a_mistake_in_any_of_our_files_keeps_its_trace(
        command, place, mistake, model_dir, finished, tmp_path, monkeypatch):
    program, *more = command.split()
    arguments = [str(finished)] if program in ("eval", "coverage") else flags(
        model_dir, tmp_path / "run", "--steps", 1, "--eval-samples", 2, *more)
    monkeypatch.setattr(place, getattr(Planted, mistake))
    with pytest.raises(MISTAKES[mistake]) as error:
        run.start(lambda: COMMANDS[program].main(arguments))
    assert error.traceback[-1].name == mistake, "the trace ends where the mistake is"


def test_a_mistake_is_printed_with_its_file_and_line(model_dir, tmp_path):
    """A student's copy of hypo.py, with a mistake before line 3 of the box."""
    before, after = (ROOT / "hypo.py").read_text(encoding="utf-8").split("        # 3:", 1)
    mine = tmp_path / "hypo.py"
    mine.write_text(before + "        prompt, chosen = [1]\n        # 3:" + after)
    ended = subprocess.run([sys.executable, mine, *flags(model_dir, tmp_path / "run")], capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    line = before.count("\n") + 1
    assert ended.returncode == 1 and f'File "{mine}", line {line}, in train' in ended.stderr
    assert ended.stderr.splitlines()[-1] == "ValueError: not enough values to unpack (expected 2, got 1)"


def test_a_users_error_is_printed_as_one_sentence(model_dir, tmp_path):
    def missing_file():
        hypo.main(flags(model_dir, tmp_path / "run", "--data", "no-such.jsonl"))

    def resume():
        write_text(tmp_path / "inputs.json", '{"settings": {}}')
        run.refuse_other_settings(argparse.Namespace(out=tmp_path, device="cpu", beta=1, max_new_tokens=3))

    def interrupt():
        raise KeyboardInterrupt

    # Python prints the text of a SystemExit alone, without a trace, and returns 1
    for main, sentence in ((missing_file, "error: --data no-such.jsonl: there is no such file"),
                           (resume, f"error: --resume: {tmp_path} was run with other settings: --beta None"),
                           (interrupt, "\ninterrupted; the same command with --resume goes on")):
        with pytest.raises(SystemExit) as error:
            run.start(main)
        assert isinstance(error.value.code, str) and error.value.code.startswith(sentence)


# ---------------------------------------------------------------------------------------------------
# the stateless order of data


def step(number, **args) -> run.Step:
    return run.Step(number, argparse.Namespace(**{"device": "cpu", "seed": 0, **args}))


@pytest.mark.law
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 30), st.integers(0, 5))
def test_minibatches_walk_through_shuffled_epochs(n, batch_size, steps, seed):
    rows = list(range(n))
    seen = [row for number in range(1, steps + 1)
            for row in step(number, batch_size=batch_size, seed=seed).minibatch(rows)]
    assert len(seen) == steps * batch_size
    for epoch in range(len(seen) // n):
        assert Counter(seen[epoch * n:(epoch + 1) * n]) == Counter(rows), "each row once an epoch"


@pytest.mark.law
def test_random_streams_of_different_uses_differ():
    draws = {torch.rand(1, generator=step(number).generator(use)).item()
             for use in ("online", "round") for number in range(50)}
    assert len(draws) == 100


def test_settings_hold_everything_that_decides_a_run(model_dir):
    args = run.parse(run.parser("x")[0], ["--model", str(model_dir)], lambda args: "x")
    missing = set(vars(args)) - set(run.settings(args))
    assert missing == {"out", "resume"}


@pytest.mark.law
def test_the_learning_rate_falls_in_a_line_to_0(tmp_path):
    """Each group's from its own; a run that goes on has the rates of an uninterrupted one."""
    def rates(steps: int, resume: bool = False):
        one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        optimizer = torch.optim.AdamW([{"params": [one], "lr": 1.0}, {"params": [two], "lr": 2.0}])
        trained = torch.nn.ParameterList([one, two])
        args = SimpleNamespace(out=tmp_path, steps=10, eval_every=4, device="cpu", resume=resume)
        for step in islice(run.loop(args, trained, optimizer, lambda _: {}), steps):
            yield step.number, *(group["lr"] for group in optimizer.param_groups)
            step.log(loss=0.0)
    whole = list(rates(10))
    assert whole == [(n, pytest.approx((11 - n) / 10), pytest.approx((11 - n) / 5)) for n in range(1, 11)]
    assert list(rates(6)) == whole[:6]
    assert list(rates(10, resume=True)) == whole[4:], "from the checkpoint of step 4"


@pytest.mark.law
def test_gradient_is_clipped_and_its_norm_reported():
    layer = torch.nn.Linear(1, 1, bias=False)
    for size, clipped in ((30.0, 1.0), (0.5, 0.5)):
        layer.zero_grad()
        layer(torch.tensor([[size]])).sum().backward()
        assert run.clip(layer, 1.0).item() == pytest.approx(size)
        assert layer.weight.grad.item() == pytest.approx(clipped, abs=1e-5)


@pytest.mark.parametrize("size", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_ends_the_run(size):
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.grad = torch.tensor([[size]])
    with pytest.raises(UserError, match=f"the gradient is {size}: training has diverged; lower --lr"):
        run.clip(layer, 1.0)


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="a smoke run of the real command line, in CI")
def test_help_reads_as_part_of_the_tutorial():
    for program in ("hypo.py", "dpo.py", "rlhf.py", "eval.py", "world.py"):
        text = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        assert "usage:" in text and "python " + program in text
