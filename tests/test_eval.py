"""Laws of eval.py: win rates and their intervals, accuracy, judges, what an evaluation leaves, tables and pictures."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import data
import lm
from eval import (
    STUDENT_95,
    against,
    evaluator,
    finish,
    implicit_reward_metrics,
    main,
    mean_over_seeds,
    plot_curve,
    plot_goodhart,
    read_metrics,
    table,
    wilson_interval,
    win_rate,
)
from judges import load_judge

PNG = b"\x89PNG\r\n\x1a\n"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]

rewards = st.integers(-3, 3) | st.floats(-5, 5)  # small integers tie often
comparisons = st.lists(st.tuples(rewards, rewards), min_size=1, max_size=60)


# ---------------------------------------------------------------------------------------------------
# win rate and Wilson's interval

@given(comparisons)
def test_win_rates_of_both_sides_add_to_one(rows):
    ours, theirs = zip(*rows)
    rate, (low, high) = win_rate(ours, theirs)
    other_rate, (other_low, other_high) = win_rate(theirs, ours)
    assert rate + other_rate == pytest.approx(1, abs=1e-12), f"{rate} + {other_rate} = 1"
    assert (low, high) == pytest.approx((1 - other_high, 1 - other_low), abs=1e-12), "the interval is the mirror image"


def test_a_tie_counts_one_half():
    assert win_rate([1, 2, 3, 4], [1, 1, 4, 4])[0] == 0.5  # tie, win, loss, tie
    assert win_rate([1, 2, 3], [1, 1, 3])[0] == 2 / 3
    assert win_rate([0.0] * 7, [0.0] * 7)[0] == 0.5
    with pytest.raises(ValueError):
        win_rate([1, 2], [1])


def test_the_win_rate_comes_with_the_interval_of_its_wins():
    assert win_rate([1] * 8 + [0] * 2, [0] * 8 + [1] * 2) == (0.8, wilson_interval(8, 10))


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_the_interval_stays_inside_0_1_and_contains_the_estimate(case):
    wins, n = case[0] / 2, case[1]
    low, high = wilson_interval(wins, n)
    assert 0 <= low < high <= 1, f"{wins} of {n}: [{low}, {high}]"
    assert low - 1e-12 <= wins / n <= high + 1e-12, f"{wins} of {n}: {wins / n} in [{low}, {high}]"


@given(st.integers(0, 20), st.integers(1, 30))
def test_the_interval_shrinks_with_n(tenths, n):
    width = lambda n: (lambda low, high: high - low)(*wilson_interval(tenths / 20 * n, n))  # noqa: E731
    assert width(4 * n) < width(n), f"share {tenths / 20}: width {width(4 * n)} at {4 * n}, {width(n)} at {n}"


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


def mean_coverage(interval, n: int) -> float:
    """P(p in interval(wins, n)) for wins ~ Binomial(n, p), summed exactly over wins, averaged over a grid of p."""
    grid = [(i + 0.5) / 200 for i in range(200)]
    log_choose = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    intervals = [interval(k, n) for k in range(n + 1)]
    return sum(math.exp(log_choose[k] + k * math.log(p) + (n - k) * math.log1p(-p))
               for p in grid for k in range(n + 1) if intervals[k][0] <= p <= intervals[k][1]) / len(grid)


@pytest.mark.parametrize("n", [10, 40, 200])
def test_the_interval_covers_the_truth_95_times_in_100(n):
    assert mean_coverage(wilson_interval, n) == pytest.approx(0.95, abs=0.007)


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
PAIRS = [{"prompt": PROMPTS[i % 3], "chosen": chosen, "rejected": rejected}
         for i, (chosen, rejected) in enumerate(itertools.combinations(TEXTS, 2))][:9]  # odd: accuracy is not 1/2


def random_model(kind, seed: int, vocab_size: int, **settings):
    """A GPT-2 with weights far from 0, so that its outputs are far from uniform."""
    torch.manual_seed(seed)
    model = kind(GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                            eos_token_id=0, **settings))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return lm.word_tokenizer([*PROMPTS, " superb never dull. plot"])


@pytest.fixture(scope="module")
def ref(tokenizer):
    return lm.frozen_copy(random_model(GPT2LMHeadModel, 0, len(tokenizer)))


@pytest.fixture(scope="module")
def policy(ref):
    """Near pi_ref, as a trained policy would be."""
    policy, noise = copy.deepcopy(ref).requires_grad_(True), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=noise)
    return policy


@pytest.fixture(scope="module")
def pairs(ref, tokenizer):
    return lm.add_ref_logps(ref, lm.encode_pairs(ref, tokenizer, PAIRS, max_new_tokens=8))


def swapped(pairs: list[dict]) -> list[dict]:
    """The pairs with every label turned round."""
    other = {"chosen": "rejected", "rejected": "chosen", "ref_chosen": "ref_rejected", "ref_rejected": "ref_chosen"}
    return [{other.get(name, name): value for name, value in pair.items()} for pair in pairs]


def test_pi_ref_is_right_half_the_time_exactly(ref, pairs):
    trainable = copy.deepcopy(ref).train()  # dropout is configured, and must be off
    assert ref.config.resid_pdrop > 0
    assert implicit_reward_metrics(trainable, pairs) == {
        "accuracy": 0.5, "chosen_logratio": 0.0, "rejected_logratio": 0.0}


def test_accuracy_and_log_ratios_are_those_of_the_pairs_one_by_one(policy, ref, pairs):
    def logratio(pair, field):
        row = [pair["prompt"]], [pair[field]]
        return (lm.logps(policy, *row) - lm.logps(ref, *row)).item()

    chosen, rejected = ([logratio(pair, field) for pair in pairs] for field in ("chosen", "rejected"))
    n = len(pairs)
    expected = {"accuracy": sum(c > r for c, r in zip(chosen, rejected)) / n,
                "chosen_logratio": sum(chosen) / n, "rejected_logratio": sum(rejected) / n}
    assert implicit_reward_metrics(policy, pairs) == pytest.approx(expected, abs=1e-5)


def test_turning_labels_round_turns_accuracy_round(policy, pairs):
    straight, turned = implicit_reward_metrics(policy, pairs), implicit_reward_metrics(policy, swapped(pairs))
    assert turned["accuracy"] == pytest.approx(1 - straight["accuracy"], abs=1e-6)
    assert turned["chosen_logratio"] == pytest.approx(straight["rejected_logratio"], abs=1e-5)


# ---------------------------------------------------------------------------------------------------
# evaluator

def settings(out, **changes):
    return SimpleNamespace(**{"eval_samples": 40, "max_new_tokens": 6, "out": out, **changes})


def evaluation(out, ref, tokenizer, pairs, judge=data.golden_judge, **changes):
    out.mkdir(exist_ok=True)
    return evaluator(settings(out, **changes), ref, tokenizer, PROMPTS, pairs, judge)


@pytest.mark.parametrize("device", DEVICES)
def test_at_step_0_every_kl_and_log_ratio_is_exactly_0(device, tmp_path, ref, tokenizer, pairs):
    ref = copy.deepcopy(ref).to(device)
    pairs = lm.add_ref_logps(ref, pairs)
    metrics = evaluation(tmp_path, ref, tokenizer, pairs)(copy.deepcopy(ref).train())
    measured = {name: metrics[name] for name in ("reverse_kl", "accuracy", "chosen_logratio", "rejected_logratio")}
    assert measured == {"reverse_kl": 0.0, "accuracy": 0.5, "chosen_logratio": 0.0, "rejected_logratio": 0.0}
    low, high = metrics["win_rate_ci"]
    assert low < 0.5 < high, f"pi_ref against itself: 1/2 in [{low}, {high}]"
    rows = data.read_rows(tmp_path / "responses.jsonl")
    assert [row["response"] for row in rows] != [row["ref_response"] for row in rows], "samples of their own, not ties"


def test_metrics_are_those_of_the_files_that_an_evaluation_leaves(tmp_path, policy, ref, tokenizer, pairs):
    metrics = evaluation(tmp_path, ref, tokenizer, pairs)(policy)
    rows = data.read_rows(tmp_path / "responses.jsonl")
    assert [row["prompt"] for row in rows] == [PROMPTS[i % 3] for i in range(40)], "prompts in turn to --eval-samples"
    for row in rows:
        assert row["reward"] == data.golden_reward(row["prompt"], row["response"])
        assert row["ref_reward"] == data.golden_reward(row["prompt"], row["ref_response"])
    mine, theirs = ([row[name] for row in rows] for name in ("reward", "ref_reward"))
    assert (metrics["win_rate"], metrics["win_rate_ci"]) == win_rate(mine, theirs)
    assert len(set(mine)) > 1 and metrics["golden_reward"] == pytest.approx(sum(mine) / 40)
    assert metrics["reverse_kl"] > 0.1, "the policy was moved away from pi_ref"
    assert 1 <= metrics["response_length"] <= 6

    lines = (tmp_path / "samples.md").read_text().splitlines()
    assert len(lines) == 2 + 12 and all(line.count("|") == 6 for line in lines)
    for line, row in zip(lines[2:], rows):
        assert [cell.strip() for cell in line.split("|")[1:-1]] == [
            row["prompt"], row["ref_response"].strip(), f"{row['ref_reward']:+.1f}",
            row["response"].strip(), f"{row['reward']:+.1f}"]


def test_an_evaluation_is_repeatable_and_leaves_the_policy_and_the_random_state_alone(
        tmp_path, policy, ref, tokenizer, pairs):
    evaluate = evaluation(tmp_path, ref, tokenizer, pairs)
    policy = copy.deepcopy(policy).train()
    weights = copy.deepcopy(policy.state_dict())
    first, files = evaluate(policy), [(tmp_path / name).read_bytes() for name in ("responses.jsonl", "samples.md")]
    opponents = [row["ref_response"] for row in data.read_rows(tmp_path / "responses.jsonl")]

    assert evaluate(ref) != first
    assert [row["ref_response"] for row in data.read_rows(tmp_path / "responses.jsonl")] == opponents, (
        "every policy of a run meets the same responses of pi_ref")
    torch.rand(3)  # the random state of others does not matter, and is not moved
    state = torch.get_rng_state()
    assert evaluate(policy) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert [(tmp_path / name).read_bytes() for name in ("responses.jsonl", "samples.md")] == files
    assert policy.training and all(torch.equal(weights[name], now) for name, now in policy.state_dict().items())


def test_without_a_judge_there_is_no_win_rate_but_the_rest_is_the_same(tmp_path, policy, ref, tokenizer, pairs):
    judged = evaluation(tmp_path / "judged", ref, tokenizer, pairs)(policy)
    metrics = evaluation(tmp_path / "plain", ref, tokenizer, pairs, judge=None)(policy)
    assert metrics == {**judged, "win_rate": None, "win_rate_ci": None, "golden_reward": None}
    assert all(row["reward"] is row["ref_reward"] is None
               for row in data.read_rows(tmp_path / "plain" / "responses.jsonl"))
    assert "None" not in (tmp_path / "plain" / "samples.md").read_text()


def test_another_judge_decides_and_its_reward_has_its_own_name(tmp_path, policy, ref, tokenizer, pairs):
    def judge(prompts, responses):  # of both texts, so that a response judged with another's prompt is noticed
        return [float(len(prompt) - len(response)) for prompt, response in zip(prompts, responses, strict=True)]

    metrics = evaluation(tmp_path, ref, tokenizer, pairs, judge=judge)(policy)
    rows = data.read_rows(tmp_path / "responses.jsonl")
    for row in rows:
        assert row["reward"] == len(row["prompt"]) - len(row["response"])
        assert row["ref_reward"] == len(row["prompt"]) - len(row["ref_response"])
    assert metrics["judge_reward"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows))
    assert "golden_reward" not in metrics


# ---------------------------------------------------------------------------------------------------
# judges

@pytest.fixture(scope="module")
def judge_dir(tokenizer, tmp_path_factory):
    """A reward model on disk whose pad token is its EOS, as people make one from GPT-2."""
    directory = tmp_path_factory.mktemp("judge") / "one-label"
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    lm.save(random_model(GPT2ForSequenceClassification, 5, len(own), num_labels=1, pad_token_id=0), own, directory)
    return directory


def direct_scores(judge_dir, tokenizer, prompt: str, response: str) -> torch.Tensor:
    """(T,) the model's score at each token of prompt + response + EOS, alone in its batch."""
    model = GPT2ForSequenceClassification.from_pretrained(judge_dir).eval()
    ids = torch.tensor([tokenizer.encode(prompt + response) + [tokenizer.eos_token_id]])[:, -32:]
    with torch.no_grad():
        return model.score(model.transformer(ids).last_hidden_state)[0, :, 0]


JUDGED = [("The plot was", " superb."), ("The plot was", " never dull. The acting felt superb superb plot dull."),
         ("plot", "."), ("The acting felt", "")]


@pytest.mark.parametrize("device", DEVICES)
def test_a_judge_scores_a_text_at_its_last_token_whoever_shares_the_batch(device, judge_dir, tokenizer):
    judge = load_judge(str(judge_dir), device)
    together = judge(*zip(*JUDGED))
    for (prompt, response), score in zip(JUDGED, together):
        direct = direct_scores(judge_dir, tokenizer, prompt, response)
        assert score == pytest.approx(direct[-1].item(), abs=1e-4), f"{prompt + response!r}: last of {direct}"
        assert score == pytest.approx(judge([prompt], [response])[0], abs=1e-4), "alone and in company"
        assert abs(direct[-1] - direct[-2]) > 1e-2, "the law would not notice a score read one token early"
    assert judge(*zip(*JUDGED[::-1])) == pytest.approx(together[::-1], abs=1e-4)
    many = judge(*zip(*JUDGED * 20))  # more than one batch
    assert many == pytest.approx(together * 20, abs=1e-4)


def test_transformers_own_pooling_reads_the_wrong_token_when_pad_is_eos(judge_dir, tokenizer):
    """Why the judge finds the last token by length: a search by pad id stops before the EOS."""
    model = GPT2ForSequenceClassification.from_pretrained(judge_dir).eval()
    prompt, response = JUDGED[0]
    ids = torch.tensor([tokenizer.encode(prompt + response) + [tokenizer.eos_token_id]])
    scores = direct_scores(judge_dir, tokenizer, prompt, response)
    with torch.no_grad():
        assert model(ids).logits.item() == pytest.approx(scores[-2].item(), abs=1e-4)
    assert load_judge(str(judge_dir))([prompt], [response]) == pytest.approx([scores[-1].item()], abs=1e-4)


def test_a_judge_reads_the_end_of_a_text_longer_than_its_context(judge_dir, tokenizer):
    prompt, response = "The plot was superb" * 20, " never dull."
    score = load_judge(str(judge_dir))([prompt], [response])[0]
    assert score == pytest.approx(direct_scores(judge_dir, tokenizer, prompt, response)[-1].item(), abs=1e-4)


def test_a_judge_subtracts_its_center_and_clips_what_is_left(judge_dir, tokenizer, tmp_path):
    """rlhf.py writes both into the reward model's configuration, so that its rewards lie in [-bound, bound]."""
    plain = load_judge(str(judge_dir))(*zip(*JUDGED))
    model = GPT2ForSequenceClassification.from_pretrained(judge_dir)
    center, bound = sorted(plain)[1], (max(plain) - sorted(plain)[1]) / 2
    model.config.reward_center, model.config.reward_clip = center, bound
    lm.save(model, tokenizer, tmp_path / "clipped")
    expected = [max(-bound, min(bound, score - center)) for score in plain]
    assert load_judge(str(tmp_path / "clipped"))(*zip(*JUDGED)) == pytest.approx(expected, abs=1e-4)
    assert bound in expected and 0 in expected, "one score is clipped, one is at the center"


def test_golden_and_none_are_judges_too():
    assert load_judge("golden") is data.golden_judge and load_judge("none") is None




# ---------------------------------------------------------------------------------------------------
# runs on disk, as a training command leaves them

def measured(step: int, rate, kl: float) -> dict:
    """A line of metrics.jsonl; without a judge, `rate` is None."""
    interval, reward = (None, None) if rate is None else ([rate - 0.04, rate + 0.04], 4 * rate)
    return {"step": step, "loss": 0.5, "tokens": 100, "win_rate": rate, "win_rate_ci": interval,
            "golden_reward": reward, "reverse_kl": kl, "response_length": 6.5, "accuracy": 0.5 + kl / 100,
            "chosen_logratio": -kl, "rejected_logratio": -2 * kl}


def fake_run(directory, algorithm="dpo", rates=(0.5, 0.71, 0.66), rewards=(1, 0, 2), prompts=PROMPTS, **settings):
    """Three measured steps, 0, 2 and 4, each followed by one that was not."""
    lines = [line for i, rate in enumerate(rates)
             for line in (measured(2 * i, rate, 3.0 * i), {"step": 2 * i + 1, "loss": 0.4, "tokens": 100})][:-1]
    data.write_jsonl(directory / "metrics.jsonl", lines)
    data.write_jsonl(directory / "responses.jsonl", [dict(prompt=prompt, response=" good.", reward=reward)
                                                     for prompt, reward in zip(prompts, rewards)])
    summary = {"algorithm": algorithm, "settings": {"algorithm": algorithm, "out": str(directory), **settings}}
    data.write_text(directory / "summary.json", json.dumps(summary))
    return directory


def is_png(path) -> bool:
    return path.read_bytes()[:8] == PNG and path.stat().st_size > 5000


def test_metrics_are_read_line_by_step_and_a_directory_that_is_no_run_is_named(tmp_path):
    assert [line["step"] for line in read_metrics(fake_run(tmp_path / "dpo"))] == [0, 1, 2, 3, 4]
    for other in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"^{other}: not a run, for it has no metrics.jsonl; name directories"):
            read_metrics(other)


def test_against_compares_two_runs_prompt_by_prompt(tmp_path):
    one = fake_run(tmp_path / "one", rewards=(1, 0, 2))
    two = fake_run(tmp_path / "two", rewards=(0, 0, 3))  # a win, a tie, a loss
    assert against(one, two) == (0.5, *wilson_interval(1.5, 3))
    three = fake_run(tmp_path / "three", rewards=(0, -1, 3))
    assert against(one, three)[0] == pytest.approx(1 - against(three, one)[0]) == 2 / 3


def test_against_refuses_runs_on_other_prompts_or_without_a_judge(tmp_path):
    one = fake_run(tmp_path / "one")
    for prompts in (PROMPTS[::-1], PROMPTS[:2]):
        other = fake_run(tmp_path / "other", prompts=prompts)
        with pytest.raises(ValueError, match="one and .*other were evaluated on different prompts; give both"):
            against(one, other)
    blind = fake_run(tmp_path / "blind", rewards=(1, None, 2))
    with pytest.raises(ValueError, match="run without a judge"):
        against(one, blind)


def cells(text: str) -> list[list[str]]:
    """The cells of a printed table, which two spaces or more keep apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_a_table_has_a_line_a_run_and_a_dash_for_what_was_not_measured():
    header, judged, blind = cells(table([{"run": "hypo", **measured(4, 0.75, 2.0)},
                                         {"run": "a-longer-name", **measured(400, None, 2.0)}]))
    assert header == ["run", "step", "win rate [95 %]", "reward", "reverse KL, nats", "length", "accuracy",
                      "log-ratio chosen / rejected"]
    assert judged == ["hypo", "4", "0.750 [0.710, 0.790]", "+3.00", "2.00", "6.5", "0.520", "-2.0 / -4.0"]
    assert blind == ["a-longer-name", "400", "-", "-", "2.00", "6.5", "0.520", "-2.0 / -4.0"]


def test_a_table_shows_the_reward_of_another_judge():
    row = {"run": "hypo", **measured(4, 0.75, 2.0)}
    row["judge_reward"] = row.pop("golden_reward") - 10
    assert cells(table([row]))[1][3] == "-7.00"


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

    def spy_annotate(axis, text, xy, **how):
        seen.labels.append((text, xy))
        return annotate(axis, text, xy, **how)

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
    assert drawn.labels == [("dpo", (4.0, 0.8)), ("mine", (0.0, 0.5))], "at the highest of the algorithm's ends"


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


def test_the_command_adds_the_mean_of_runs_that_differ_in_their_seed_alone(tmp_path, capsys):
    runs = [fake_run(tmp_path / f"dpo-{seed}", rates=(0.5, 0.7, rate), seed=seed, lr=lr)
            for seed, rate, lr in ((0, 0.6, 1e-3), (1, 0.8, 1e-3), (2, 0.9, 2e-3))]
    main([*map(str, runs), "--out", str(tmp_path / "g.png")])
    rows = cells(capsys.readouterr().out)[2:6]
    assert [row[0] for row in rows] == [*map(str, runs), "dpo, mean of 2 seeds"]
    assert rows[-1][1:4] == ["4", "0.700 [-0.571, 1.971]", "+2.80"], "0.7 +- 12.71 sd / sqrt(2), sd = 0.1 sqrt(2)"


def test_the_mean_over_seeds_is_a_mean_with_students_interval():
    rates, kls = (0.6, 0.7, 0.8), (1.0, 2.0, 6.0)
    row = mean_over_seeds([{"name": "dpo", **measured(4, rate, kl)} for rate, kl in zip(rates, kls)])
    assert row["run"] == "dpo, mean of 3 seeds" and row["step"] == 4
    assert (row["win_rate"], row["reverse_kl"], row["golden_reward"]) == pytest.approx((0.7, 3.0, 2.8))
    half = 4.30 * 0.1 / math.sqrt(3)  # the sample's sd is 0.1
    assert row["win_rate_ci"] == pytest.approx((0.7 - half, 0.7 + half))


@pytest.mark.parametrize("df", STUDENT_95)
def test_students_quantiles_hold_95_percent(df):
    steps, t = 4000, STUDENT_95[df]
    norm = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    middles = ((i + 0.5) / steps * t for i in range(steps))
    inside = 2 * t / steps * sum(norm * (1 + x * x / df) ** (-(df + 1) / 2) for x in middles)
    assert inside == pytest.approx(0.95, abs=1e-3), f"P(|T| < {t}) with {df} degrees of freedom = {inside:.4f}"


def test_the_command_shows_a_run_that_was_interrupted_and_has_no_summary(tmp_path, capsys):
    run = fake_run(tmp_path / "dpo")
    (run / "summary.json").unlink()
    lines = data.read_rows(run / "metrics.jsonl")
    data.write_jsonl(run / "metrics.jsonl", lines[:4])  # stopped at step 3, measured last at step 2
    main([str(run), "--out", str(tmp_path / "g.png")])
    assert cells(capsys.readouterr().out)[2][:2] == [str(run), "2"] and is_png(tmp_path / "g.png")


def test_the_command_shows_runs_without_a_judge(tmp_path, capsys):
    blind = fake_run(tmp_path / "blind", rates=(None, None, None), judge="none")
    judged = fake_run(tmp_path / "judged")
    main([str(blind), str(judged), "--out", str(tmp_path / "g.png")])
    assert cells(capsys.readouterr().out)[2][2] == "-" and is_png(tmp_path / "g.png")


def test_runs_without_a_judge_have_a_mean_too():
    rows = [{"name": "dpo", **measured(4, None, kl)} for kl in (1.0, 2.0)]
    assert cells(table([mean_over_seeds(rows)]))[1][:5] == ["dpo, mean of 2 seeds", "4", "-", "-", "1.50"]


def test_a_finished_run_leaves_its_summary_its_curve_and_a_policy_that_loads(tmp_path, capsys, policy, tokenizer):
    out = fake_run(tmp_path / "dpo")
    args = SimpleNamespace(algorithm="dpo", model="tiny", seed=3, steps=4, beta=0.1, out=out)
    finish(args, policy, tokenizer, seconds=2.0)
    summary = json.loads((out / "summary.json").read_text())
    expected = {"algorithm": "dpo", "model": "tiny", "seed": 3, "steps": 4, "beta": 0.1, "win_rate": 0.66,
                "golden_reward": 4 * 0.66, "reverse_kl": 6.0, "response_length": 6.5, "seconds": 2.0,
                "tokens_per_second": 250}
    assert {name: summary[name] for name in expected} == expected and len(summary["win_rate_ci"]) == 2
    assert is_png(out / "curve.png")
    assert [row[0] for row in cells(capsys.readouterr().out)[:3]] == ["run", "pi_ref", "dpo"]
    loaded, _ = lm.load(str(out / "policy"))
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in policy.state_dict().items())
