"""The tour with its pictures, and the measurement of a trained run: estimates against exact enumeration."""

import itertools
import json
import math
import re

import pytest
import torch

import coverage
import lm
from coverage import (
    Bandit,
    J,
    Statement,
    V,
    eps_dpo,
    eps_reward,
    gap,
    implicit_reward,
    inequality,
    kl,
    optimal_policy,
    policy_coverage,
    t1_chain,
)
from experiments import coverage_pictures
from experiments.coverage_of_run import estimate, sampled
from models import random_gpt2
from run import UserError


def table(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------
# the coverage of a trained policy

def every_response(vocabulary: int, longest: int) -> list[list[int]]:
    """All responses: to their first EOS (0), or to the length limit."""
    return [list(row) for length in range(1, longest + 1) for row in itertools.product(range(vocabulary), repeat=length)
            if 0 not in row[:-1] and (row[-1] == 0 or length == longest)]


def judge(prompts, texts):
    return [len(prompt) + 0.5 * text.count("a") - (" b b" in text) for prompt, text in zip(prompts, texts)]


@pytest.fixture(scope="module")
def language_bandit():
    """Two random GPT-2 of three tokens, all 15 responses to two prompts in a table: (models, exact bandit, log pi)."""
    tokenizer = lm.word_tokenizer(["a b"])
    policy, ref = random_gpt2(tokenizer, seed=3), random_gpt2(tokenizer, seed=4)
    policy.batch_size = ref.batch_size = 1000  # of three tokens each
    prompts, responses, beta = ["a", " b"], every_response(3, 3), 0.7
    asked = [policy.encode_prompt(prompt) for prompt in prompts]
    with torch.no_grad():
        log_pi, log_ref = (torch.stack([model.logps([x] * len(responses), responses) for x in asked])
                           for model in (policy, ref))
    texts = [policy.decode(ids) for ids in responses]
    reward = table([judge([prompt] * len(texts), texts) for prompt in prompts])
    return (policy, ref, prompts, beta), Bandit(table([0.5, 0.5]), log_ref, log_ref, reward, beta), log_pi


def test_the_estimate_agrees_with_enumeration(language_bandit):
    (policy, ref, prompts, beta), b, pi = language_bandit
    assert pi.exp().sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-9)
    found, logratio = sampled(policy, ref, prompts, 5000, 3, judge, beta)
    assert logratio.shape == (2, 2, 5000)
    r_hat = implicit_reward(pi, b.ref, beta)
    exact = {"kl": kl(b.rho, pi, b.ref), "V_pi": V(b, pi), "J_pi": J(b, pi), "J_star": J(b, optimal_policy(b)),
             "eps": eps_dpo(b, pi), "t1a": t1_chain(b, r_hat)[1]}
    assert exact["kl"] > 0.3 and exact["eps"] > 0.3, "the case must have something to measure"
    for name, value in exact.items():
        assert found[name].mean().item() == pytest.approx(value.item(), rel=0.02), name
    assert found["log_C_pi"].max().item() == pytest.approx(policy_coverage(b.rho, pi, b.ref).log().item(), abs=1e-6)
    assert found["log_C_star"].max() < policy_coverage(b.rho, optimal_policy(b), b.ref).log() + 0.05
    assert gap(b, pi) <= exact["t1a"] <= t1_chain(b, r_hat)[4], "T1 holds for language models too"


def test_the_estimate_is_unbiased_or_from_below_as_it_says(language_bandit):
    """Small samples, many times over: 8 responses a prompt."""
    (*_, beta), b, pi = language_bandit
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.multinomial(p.exp(), 8 * 4000, replacement=True, generator=generator).view(2, 4000, 8)
                       for p in (pi, b.ref)])  # (2, X, repetitions, K)

    def look_up(values):
        return torch.stack([values[x][ids[:, x]] for x in range(2)], 1).flatten(1, 2)

    log_pi, log_ref = look_up(pi), look_up(b.ref)
    found = estimate(log_pi, log_ref, look_up(b.reward), (log_pi - log_ref)[0], beta)
    r_hat = implicit_reward(pi, b.ref, beta)
    exact = {"kl": kl(b.rho, pi, b.ref), "V_pi": V(b, pi), "J_pi": J(b, pi), "eps": eps_reward(b, r_hat)}
    for name, value in exact.items():
        error = 5 * found[name].std() / math.sqrt(len(found[name]))
        assert abs(found[name].mean() - value) < error, f"{name} must be unbiased"
    best_seen = look_up(b.reward).amax((0, 2)) / beta
    assert torch.allclose(found["log_C_star"], best_seen - found["J_star"] / beta, 1e-9, 1e-9)
    assert found["J_star"].mean() < J(b, optimal_policy(b)) and found["effective"].max() <= 16 + 1e-9
    assert set(estimate(log_pi, log_ref, None, (log_pi - log_ref)[0], beta)) == {"log_C_pi", "kl"}


def write_run(directory, model_dir, **changes):
    """What a training command leaves, with pi_ref itself as the policy."""
    lm.LM.load(str(model_dir)).save(directory / "policy")
    run_settings = dict(model=str(model_dir), data=None, judge="golden", beta=0.1, seed=0, max_new_tokens=5,
                        algorithm="dpo", device="cpu", batch_size=4, micro_batch=None) | changes
    (directory / "summary.json").write_text(json.dumps({"settings": run_settings, "pi_ref": str(model_dir)}))
    prompts = ["The plot was", "The plot was", "The cast is", "I think the story"]
    (directory / "responses.jsonl").write_text("".join(json.dumps({"prompt": p, "reward": 0}) + "\n" for p in prompts))
    return directory


def test_measuring_a_run_that_has_not_moved(tmp_path, model_dir, capsys):
    coverage.main([str(write_run(tmp_path, model_dir)), "--prompts", "8", "--samples", "4"])
    said = capsys.readouterr().out
    assert "KL(pi || pi_ref), nats           0 +- 0" in said and "log C(pi), nats                  0 " in said
    assert "3 held-out prompts" in said, "the distinct ones"
    for name in ("eps_dpo, pairwise error", "J(pi*)", "gap = J(pi*) - J(pi)", "<= sqrt(C eps)", "unbiased",
                 "from below"):
        assert name in said


def test_measuring_a_run_without_a_judge(tmp_path, model_dir, capsys):
    rows = [{"prompt": p, "chosen": " superb.", "rejected": " dull."} for p in ("The plot was", "The plot felt")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = write_run(tmp_path, model_dir, data=str(tmp_path / "pairs.jsonl"), judge="none")
    coverage.main([str(run), "--prompts", "3", "--samples", "4"])
    assert "no judge knows this run's true reward" in capsys.readouterr().out


@pytest.mark.parametrize("argv, sentence", [
    (["nowhere", "--samples", "1"], "--samples: must be a whole number of at least 2"),
    (["nowhere", "--prompts", "nan"], "--prompts: must be a whole number of at least 2"),
    (["nowhere", "--out", "x"], "--out would have no effect with a RUN"),
    (["--prompts", "4"], "--prompts would have no effect without a RUN")])
def test_flags_that_cannot_be_are_refused(argv, sentence, capsys):
    with pytest.raises(SystemExit):
        coverage.main(argv)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name, content, sentence", [
    ("policy", None, "is not a finished run: it has no policy. Name a directory"),
    ("summary.json", "{", "summary.json: not valid JSON"),
    ("summary.json", "{}", "summary.json: field 'settings': expected a JSON object"),
    ("summary.json", '{"settings": {"beta": 1}}', "summary.json has no batch_size; was the run made"),
    ("responses.jsonl", '{"prompt": "x"', "responses.jsonl:1: not valid JSON"),
    ("responses.jsonl", "", "responses.jsonl does not hold a run's responses"),
    ("policy/model.safetensors", "cut", "policy/model.safetensors is damaged")])
def test_a_damaged_run_is_named(name, content, sentence, tmp_path, model_dir):
    write_run(tmp_path, model_dir)
    if content is None:
        (tmp_path / name).rename(tmp_path / "other")
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        coverage.main([str(tmp_path)])


def test_pictures_need_a_directory(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="--out .*mine: File exists"):
        coverage.main(["--out", str(tmp_path / "mine")])


# ---------------------------------------------------------------------------------------------------
# the tour and its pictures

def test_gap_against_coverage_separates_the_algorithms():
    gaps = coverage_pictures.gap_against_coverage((1e2, 1e4, 1e8))
    for name in ("DPO", "IPO"):
        assert gaps[name][0] > 0.1 and gaps[name] == sorted(gaps[name]), f"{name} must get worse"
    for name in ("RLHF", "HyPO", "DPO from pi_ref"):
        values = gaps.pop(name)
        assert values[-1] < 1e-4 and values == sorted(values, reverse=True), f"{name} must get better"
    assert set(gaps) == {"DPO", "IPO"}


def test_the_tour(tmp_path, capsys, monkeypatch):
    whole = coverage_pictures.gap_against_coverage
    monkeypatch.setattr(coverage_pictures, "gap_against_coverage",
                        lambda coverages: {name: [a, *[b] * (len(coverages) - 1)]
                                           for name, (a, b) in whole((1e4, 1e8)).items()})
    path = coverage_pictures.gradient_path  # a tenth of the steps is enough to draw
    monkeypatch.setattr(coverage_pictures, "gradient_path", lambda *args: path(*args[:-1], args[-1] // 10))
    coverage.main(["--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "VIOLATED" not in said and "nan" not in said and coverage.worked_example() in said
    for statement in vars(coverage).values():
        if isinstance(statement, Statement):
            assert statement.text in said, f"the tour leaves out {statement.text}"
    for name in ("gap", "family", "extrapolation"):
        assert (tmp_path / f"coverage-{name}.png").stat().st_size > 10_000


def test_the_tour_shows_at_a_glance_that_the_local_bounds_are_small_and_the_global_one_is_not():
    b, r_hat = coverage_pictures.tour_bandit()
    pi_hat = coverage.tilt(b.ref, r_hat, b.beta)
    for true, bound, paper in (coverage.theorem_4_2(b, r_hat), coverage.hypo_local(b, pi_hat)):
        assert bound < 3 * true and paper < 7 * true
    true, bound, _ = coverage.dpo_global(b, pi_hat)
    assert true < 0.5 and bound == math.inf


def test_the_tour_shows_a_violation(capsys):
    false = inequality("2 <= 1")(lambda: (table(2.0), table(1.0)))
    coverage_pictures.show(false)
    assert "2  <=  1   VIOLATED" in capsys.readouterr().out
