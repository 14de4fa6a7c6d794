"""What a run starts from: judges, task directories, supervised fine-tuning once, pairs once; and what it leaves."""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import coverage
import data
import dpo
import hypo
import lm
import rlhf
import run
import task
from eval import main as main_eval
from judges import bag_of_words_judge, load_judge
from models import random_gpt2

JUDGE = {"about": "made up", "pattern": r"\w+", "intercept": 0.5,
         "weights": {"good": [2.0, 3.0], "bad": [1.0, -4.0], "not good": [3.0, -5.0]}}
FAST = "--batch-size 4 --pairs 6 --eval-samples 4 --max-new-tokens 6 --steps 2 --eval-every 2 --device cpu".split()


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """A task directory in the words of the built-in world, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "runs" / "reviews"
    train, held_out = data.world_prompts()
    data.write_jsonl(directory / "prompts.jsonl", [{"prompt": prompt} for prompt in train[:20]])
    data.write_jsonl(directory / "held_out_prompts.jsonl", [{"prompt": prompt} for prompt in held_out[:5]])
    data.write_jsonl(directory / "sft.jsonl", [{"prompt": p, "response": y} for p, y in data.sft_corpus(200)])
    data.write_text(directory / "judge" / "judge.json", json.dumps(JUDGE))
    data.write_text(directory / "task.json", json.dumps({"label": "judge", "second": "golden"}))
    return directory


def settings(model_dir, *more) -> Namespace:
    return run.parse(run.parser("x"), ["--model", str(model_dir), *FAST, *map(str, more)])


# ---------------------------------------------------------------------------------------------------
# judges

def test_bag_of_words_by_hand(tmp_path):
    data.write_text(tmp_path / "judge.json", json.dumps(JUDGE))
    judge = load_judge(str(tmp_path))
    assert judge(["It was"], [" plain."]) == [0.5], "no known word: the intercept"
    assert judge(["It was"], [" GOOD."]) == [3.5], "one word, scaled to length 1"
    assert judge(["It was"], [" bad."]) == [-3.5]
    x = [2.0, 3.0]  # "good" and "not good", idf times count
    expected = 0.5 + (2.0 * 3.0 + 3.0 * -5.0) / math.hypot(*x)
    assert judge(["It was not"], [" good."]) == [pytest.approx(expected)], "a pair of words across the boundary counts"


@given(words=st.lists(st.sampled_from(["good", "bad", "not", "film"]), max_size=6))
def test_no_text_goes_beyond_the_length_of_the_weights(words, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "judge.json"
    path.write_text(json.dumps(JUDGE))
    [reward] = bag_of_words_judge(path)([""], [" ".join(words)])
    bound = math.sqrt(sum(weight * weight for _, weight in JUDGE["weights"].values()))
    assert abs(reward - 0.5) <= bound + 1e-9, "Cauchy-Schwarz: TF-IDF has length 1, however often a word is said"


def test_vader_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ValueError, match=r"vader is not installed; run: pip install vaderSentiment==3\.3\.2"):
        load_judge("vader")


def test_vader_is_monotone_in_its_compound_score():
    pytest.importorskip("vaderSentiment", reason="needs pip install vaderSentiment==3.3.2")
    judge = load_judge("vader")
    worst, bad, plain, good, best = judge([""] * 5, ["awful terrible worst horrible", "a bad film", "a film",
                                                     "a good film", "great wonderful superb excellent brilliant"])
    assert worst < bad < plain == 0 < good < best < 20


@pytest.fixture
def tokenizer():
    return lm.word_tokenizer([text for pair in data.sft_corpus(200) for text in pair])


def test_of_two_labels_the_log_odds_of_the_second(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, num_labels=2, initializer_range=0.4))
    lm.save(model, tokenizer, tmp_path / "two")
    texts = ["The plot was dull.", "The acting was superb, and the plot was fresh."]
    with torch.no_grad():
        logits = torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    expected = (logits.log_softmax(-1)[:, 1] - logits.log_softmax(-1)[:, 0]).tolist()
    judge = load_judge(str(tmp_path / "two"))
    assert judge([text[:8] for text in texts], [text[8:] for text in texts]) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_judges_too_padding_and_all(tmp_path, tokenizer):
    torch.manual_seed(0)
    padded = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<eos>",
                                     unk_token="<eos>", model_max_length=32)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=1, initializer_range=0.4, max_position_embeddings=32, pad_token_id=0))
    lm.save(model, padded, tmp_path / "bert")
    judge = load_judge(str(tmp_path / "bert"))
    prompts = ["The plot was", "I thought the acting"]
    responses = [" dull.", " seemed superb, and the plot was fresh. " * 9]
    together = judge(prompts, responses)
    alone = [judge([p], [y])[0] for p, y in zip(prompts, responses)]
    assert together == pytest.approx(alone, abs=1e-5) and together[0] != together[1]


def test_three_labels_are_no_reward(tmp_path, tokenizer):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, num_labels=3)
    lm.save(GPT2ForSequenceClassification(config), tokenizer, tmp_path / "three")
    with pytest.raises(ValueError, match="three: a reward is one number, but this .* has 3 labels"):
        load_judge(str(tmp_path / "three"))


def test_a_directory_without_a_judge_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds neither a judge.json nor a sequence-classification model"):
        load_judge(str(tmp_path))


# ---------------------------------------------------------------------------------------------------
# the task: who is asked, who judges, what is kept

def test_a_pretrained_model_takes_the_reviews_if_they_are_there(reviews, model_dir):
    assert settings(model_dir).data == str(run.REVIEWS) and settings(model_dir).judge == "task"
    assert settings(model_dir, "--data", "world").data is None
    assert run.parse(run.parser("x"), []).data is None, "the built-in model knows only its world"


def test_the_policy_of_a_run_is_not_fine_tuned_again(model_dir, tmp_path):
    assert settings(model_dir, "--data", "world").sft_steps == 200
    data.write_text(tmp_path / "r" / "summary.json", "{}")
    assert settings(tmp_path / "r" / "policy", "--data", "world").sft_steps is None


def test_without_reviews_the_world_serves_and_the_run_says_so(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task.set_up(settings(model_dir, "--sft-steps", "0"))
    assert "learns in the built-in world, for there is no task in runs/reviews/" in capsys.readouterr().out


def test_sft_and_pairs_are_made_once_and_decide_pi_ref(reviews, model_dir, monkeypatch, capsys):
    args = settings(model_dir, "--sft-steps", "3")
    first = task.set_up(args)
    assert args.pi_ref != str(model_dir) and "sft-" in args.pi_ref
    base = lm.load(str(model_dir))[0]
    moved = [not torch.equal(a, b) for a, b in zip(base.parameters(), first.policy.parameters())]
    assert any(moved), "supervised fine-tuning moved the weights"
    assert all(map(torch.equal, first.policy.parameters(), first.ref.parameters()))
    assert "kept in" in capsys.readouterr().out

    monkeypatch.setattr(lm, "sft", None)  # neither is made again
    monkeypatch.setattr(data, "collect_pairs", None)
    again = task.set_up(settings(model_dir, "--sft-steps", "3"))
    assert again.pairs == first.pairs and again.held_out == first.held_out and again.prompts == first.prompts
    with pytest.raises(TypeError):
        task.set_up(settings(model_dir, "--sft-steps", "4"))
    with pytest.raises(TypeError):
        task.set_up(settings(model_dir, "--sft-steps", "3", "--seed", "1"))


def test_the_tasks_judge_labels_and_measures_and_the_second_measures(reviews, model_dir):
    label, outcome, second = task.judges(settings(model_dir))
    assert label is outcome and outcome(["It was"], [" good."]) == [3.5] and second is data.golden_judge
    label, outcome, _ = task.judges(settings(model_dir, "--judge", "golden"))
    assert label is data.golden_judge and outcome(["It was"], [" good."]) == [3.5], "whoever labels, the task measures"
    assert task.judges(settings(model_dir, "--data", "world")) == (data.golden_judge, data.golden_judge, None)


def test_pairs_are_labelled_by_the_tasks_judge(reviews, model_dir, monkeypatch):
    words = {"label": "judge", "second": "golden"}
    loud = {**JUDGE, "intercept": 0.0, "weights": {"superb": [1.0, 50.0], "dull": [1.0, -50.0]}}
    data.write_text(reviews / "judge" / "judge.json", json.dumps(loud))
    data.write_text(reviews / "task.json", json.dumps(words))
    s = task.set_up(settings(model_dir, "--sft-steps", "0", "--pairs", "300"))
    judge, read = load_judge(str(reviews / "judge")), lambda ids: lm.decode(s.tokenizer, ids)
    gaps = [judge([""], [read(pair["chosen"])])[0] - judge([""], [read(pair["rejected"])])[0] for pair in s.pairs]
    decided = [gap for gap in gaps if gap]
    assert len(decided) > 5 and all(gap > 0 for gap in decided)


@pytest.mark.parametrize("name, text, says", [
    ("task.json", "{", r"task.json:1: not valid JSON"),
    ("task.json", "{}", "needs the strings label and second"),
    ("sft.jsonl", '{"prompt": "a"}\n', "sft.jsonl:1: expected an object with the strings prompt, response"),
    ("prompts.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "prompts.jsonl:2: expected an object with the strings"),
    ("prompts.jsonl", "", "prompts.jsonl: no rows"),
    ("held_out_prompts.jsonl", '{"prompt": "same"}\n', "1 prompts are in prompts.jsonl and in held_out"),
    ("held_out_prompts.jsonl", None, "held_out_prompts.jsonl is missing"),
])
def test_a_broken_task_is_named_by_file_and_line(reviews, model_dir, name, text, says):
    if name == "held_out_prompts.jsonl":
        data.write_jsonl(reviews / "prompts.jsonl", [{"prompt": "same"}, {"prompt": "The plot was"}])
    if text is None:
        (reviews / name).unlink()
    else:
        (reviews / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        task.set_up(settings(model_dir, "--sft-steps", "1"))


@pytest.mark.parametrize("more, says", [
    (["--model", "tiny", "--sft-steps", "3"], "tiny has learned its texts"),
    (["--model", "m", "--data", "pairs.jsonl", "--sft-steps", "3"], "--data pairs.jsonl has none"),
    (["--judge", "task"], "here there is none"), (["--micro-batch", "0"], "--micro-batch must be positive"),
    (["--train-layers", "-1"], "--train-layers must be positive")])
def test_flags_that_cannot_work_say_so(more, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run.parse(run.parser("x"), more)
    assert says in capsys.readouterr().err


def test_a_gpu_computes_in_bfloat16_unless_told_otherwise():
    dtype = lambda *more: run.parse(run.parser("x"), ["--data", "world", *more]).dtype  # noqa: E731
    assert dtype("--model", "gpt2", "--device", "cuda") == "bfloat16"
    assert dtype("--model", "gpt2", "--device", "cpu") == dtype("--device", "cuda") == "float32"
    assert dtype("--model", "gpt2", "--device", "cuda:1", "--dtype", "float32") == "float32"


def test_pairs_and_held_out_pairs_in_a_directory(tmp_path, model_dir):
    pair = lambda a, b: {"prompt": "", "chosen": a, "rejected": b}  # noqa: E731
    data.write_jsonl(tmp_path / "d" / "pairs.jsonl", [pair(" superb.", " dull."), pair(" good.", " flat.")])
    data.write_jsonl(tmp_path / "d" / "held_out_pairs.jsonl", [pair(" fresh.", " slow.")])
    s = task.set_up(settings(model_dir, "--data", tmp_path / "d"))
    assert [len(s.pairs), len(s.held_out)] == [2, 1] and s.prompts == s.held_out_prompts == [""]
    assert s.outcome is s.label is s.second is None
    assert all(pair["prompt"] == [s.tokenizer.eos_token_id] for pair in s.pairs), "something predicts the first token"


# ---------------------------------------------------------------------------------------------------
# whole runs, and what they leave for others

@pytest.mark.parametrize("main, more", [
    (hypo.main, []), (dpo.main, ["--loss", "ipo", "--sampling", "online"]), (rlhf.main, ["--reward-epochs", "1"])],
    ids=["hypo", "online ipo", "ppo"])
def test_a_run_reports_both_judges(main, more, reviews, model_dir, tmp_path, capsys):
    main(["--model", str(model_dir), *FAST, "--sft-steps", "2", "--train-layers", "1", "--micro-batch", "3",
          "--gradient-checkpointing", "--out", str(tmp_path / "r"), *more])
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert all(summary[name] is not None for name in ("win_rate", "judge_reward", "second_win_rate", "second_reward"))
    assert "second judge's win rate" in capsys.readouterr().out
    rows = data.read_rows(tmp_path / "r" / "responses.jsonl")
    rewards = load_judge(str(reviews / "judge"))([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert summary["judge_reward"] == pytest.approx(sum(rewards) / len(rewards))
    golden = data.golden_judge([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert summary["second_reward"] == pytest.approx(sum(golden) / len(golden))

    policy, ref, _, prompts, judge, _ = coverage.load_run(tmp_path / "r")
    assert torch.equal(next(ref.parameters()), next(lm.load(summary["settings"]["pi_ref"])[0].parameters()))
    assert prompts == data.read_prompts(reviews)[1] and judge([""], ["good"]) == [3.5]


def test_a_finished_run_is_measured_again_on_more_responses(reviews, model_dir, tmp_path, capsys):
    for name, main in dict(a=hypo.main, b=dpo.main).items():
        main(["--model", str(model_dir), *FAST, "--sft-steps", "2", "--out", name])
    main_eval(["a", "b", "--samples", "4"])
    before = [data.read_rows(Path(name) / "responses.jsonl") for name in "ab"]
    assert [data.read_rows(Path(name) / "again" / "responses.jsonl") for name in "ab"] == before, "the same 4: the same"
    main_eval(["a", "--samples", "10", "--against", "b"])
    assert len(data.read_rows("a/again/responses.jsonl")) == len(data.read_rows("b/again/responses.jsonl")) == 10
    assert [data.read_rows(Path(name) / "responses.jsonl") for name in "ab"] == before, "the runs stay as they were"
    assert "a against b: win rate" in capsys.readouterr().out
    (tmp_path / "a" / "summary.json").unlink()
    with pytest.raises(ValueError, match="--samples: a is not finished"):
        main_eval(["a", "--samples", "4"])


def test_saved_models_are_the_ecosystems(model_dir, tmp_path, monkeypatch):
    """transformers alone: the policy writes, the reward model gives our reward, both have a card."""
    monkeypatch.chdir(tmp_path)
    rlhf.main(["--model", str(model_dir), *FAST, "--data", "world", "--sft-steps", "0", "--out", "r"])
    write = pipeline("text-generation", model="r/policy")
    assert write("The plot was", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("The plot was")
    model = AutoModelForSequenceClassification.from_pretrained("r/reward/model")
    prompt, response = "The plot was", " dull."
    _, tokenizer = lm.load("r/policy")
    ids = torch.tensor([tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]])
    with torch.no_grad():
        reward = model(ids).logits.item() - model.config.reward_center
    assert load_judge("r/reward/model")([prompt], [response]) == [pytest.approx(reward, abs=1e-5)]
    for card in ("r/policy/README.md", "r/reward/model/README.md"):
        text = Path(card).read_text()
        assert text.startswith("---\nlibrary_name: transformers\n") and "| seed | 0 |" in text
    assert "read at that EOS" in text and "reward_accuracy" in text


def test_no_reward_model_where_transformers_has_none():
    model = GraniteForCausalLM(GraniteConfig(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                             num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(ValueError, match="no sequence classification for models of type granite"):
        lm.make_scorer(model)


def test_a_scorer_starts_as_the_network_of_its_model_with_score_zero():
    model = random_gpt2(11)
    scorer = lm.make_scorer(model)
    assert not lm.scores(scorer, [[1, 2]], [[3]])[0].any()
    assert all(map(torch.equal, model.base_model.state_dict().values(), scorer.base_model.state_dict().values()))
    assert model.config.num_labels != 1 or model.config is not scorer.config
