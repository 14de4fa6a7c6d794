"""Judges: the golden reward, a bag of words, VADER, reward models and other classifiers, and what is none of these."""

import copy
import json
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import JUDGE
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedTokenizerFast,
)

import lm
import world
from judges import implicit_rewards, load_judge
from models import random_gpt2

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(scope="module")
def tokenizer():
    return lm.word_tokenizer([text for pair in world.sft_corpus(200) for text in pair])


def saved(model, tokenizer, directory) -> str:
    """The directory, with the model in it."""
    lm.Network(model, tokenizer).save(directory)
    return str(directory)


def test_golden_and_none_are_judges_too():
    assert load_judge("golden") is world.golden_judge and load_judge("none") is None


# ---------------------------------------------------------------------------------------------------
# words


@pytest.fixture(scope="module")
def bag_of_words(tmp_path_factory):
    directory = tmp_path_factory.mktemp("judge")
    (directory / "judge.json").write_text(json.dumps(JUDGE))
    return load_judge(str(directory))


@pytest.mark.law
def test_bag_of_words_by_hand(bag_of_words):
    assert bag_of_words(["It was"], [" plain."]) == [0.5], "no known word: the intercept"
    assert bag_of_words(["It was"], [" GOOD."]) == [3.5], "one word, scaled to length 1"
    assert bag_of_words(["It was"], [" bad."]) == [-3.5]
    x = [2.0, 3.0]  # "good" and "not good", idf times count
    expected = 0.5 + (2.0 * 3.0 + 3.0 * -5.0) / math.hypot(*x)
    assert bag_of_words(["It was not"], [" good."]) == [pytest.approx(expected)], (
        "a pair of words across the boundary counts")


@pytest.mark.law
@given(words=st.lists(st.sampled_from(["good", "bad", "not", "film"]), max_size=6))
def test_no_text_goes_beyond_the_length_of_the_weights(words, bag_of_words):
    [reward] = bag_of_words([""], [" ".join(words)])
    bound = math.sqrt(sum(weight * weight for _, weight in JUDGE["weights"].values()))
    assert abs(reward - 0.5) <= bound + 1e-9, "Cauchy-Schwarz: TF-IDF has length 1, however often a word is said"


def test_vader_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(lm.Refused, match=r"vader is not installed; run: pip install vaderSentiment==3\.3\.2"):
        load_judge("vader")


@pytest.mark.law
def test_vader_is_monotone_in_its_compound_score():
    pytest.importorskip("vaderSentiment", reason="needs pip install vaderSentiment==3.3.2")
    judge = load_judge("vader")
    worst, bad, plain, good, best = judge([""] * 5, ["awful terrible worst horrible", "a bad film", "a film",
                                                     "a good film", "great wonderful superb excellent brilliant"])
    assert worst < bad < plain == 0 < good < best < 20


# ---------------------------------------------------------------------------------------------------
# reward models


@pytest.mark.law
def test_a_scorer_starts_as_the_network_of_its_policy_with_score_zero():
    policy = random_gpt2(11)
    scorer = lm.Scorer.of(policy)
    assert not scorer.scores([[1, 2]], [[3]])[0].any()
    ours, theirs = (network.model.base_model.state_dict().values() for network in (scorer, policy))
    assert all(map(torch.equal, ours, theirs))
    assert not any(a is b for a, b in zip(scorer.parameters(), policy.parameters()))
    assert policy.model.config is not scorer.model.config and policy.model.config.num_labels != 1


def test_no_reward_model_where_transformers_has_none(tokenizer):
    model = GraniteForCausalLM(GraniteConfig(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                             num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(lm.Refused, match="no sequence classification for models of type granite"):
        lm.Scorer.of(lm.LM(model, tokenizer))


@pytest.fixture(scope="module")
def judge_dir(tokenizer, tmp_path_factory):
    """A reward model on disk whose pad token is its EOS, as people make one from GPT-2."""
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    torch.manual_seed(5)
    model = GPT2ForSequenceClassification(GPT2Config(
        vocab_size=len(own), n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        num_labels=1, pad_token_id=0))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return saved(model, own, tmp_path_factory.mktemp("judge") / "one-label")


def direct_scores(judge_dir, tokenizer, prompt: str, response: str) -> torch.Tensor:
    """(T,) the model's score at each token of prompt + response + EOS, alone in its batch."""
    model = GPT2ForSequenceClassification.from_pretrained(judge_dir).eval()
    ids = torch.tensor([tokenizer.encode(prompt + response) + [tokenizer.eos_token_id]])[:, -32:]
    with torch.no_grad():
        return model.score(model.transformer(ids).last_hidden_state)[0, :, 0]


JUDGED = [("The plot was", " superb."), ("The plot was", " never dull. The acting felt superb superb plot dull."),
         ("plot", "."), ("The acting felt", "")]


@pytest.mark.law
@pytest.mark.parametrize("device", DEVICES)
def test_a_judge_scores_a_text_at_its_last_token_whoever_shares_the_batch(device, judge_dir, tokenizer):
    judge = load_judge(judge_dir, device)
    together = judge(*zip(*JUDGED))
    for (prompt, response), score in zip(JUDGED, together):
        direct = direct_scores(judge_dir, tokenizer, prompt, response)
        assert score == pytest.approx(direct[-1].item(), abs=1e-4), f"{prompt + response!r}: last of {direct}"
        assert score == pytest.approx(judge([prompt], [response])[0], abs=1e-4), "alone and in company"
        assert abs(direct[-1] - direct[-2]) > 1e-2, "the law would not notice a score read one token early"
    assert judge(*zip(*JUDGED[::-1])) == pytest.approx(together[::-1], abs=1e-4)
    many = judge(*zip(*JUDGED * 20))  # more than one batch
    assert many == pytest.approx(together * 20, abs=1e-4)


@pytest.mark.law
def test_transformers_own_pooling_reads_the_wrong_token_when_pad_is_eos(judge_dir, tokenizer):
    """Why the judge finds the last token by length: a search by pad id stops before the EOS."""
    model = GPT2ForSequenceClassification.from_pretrained(judge_dir).eval()
    prompt, response = JUDGED[0]
    ids = torch.tensor([tokenizer.encode(prompt + response) + [tokenizer.eos_token_id]])
    scores = direct_scores(judge_dir, tokenizer, prompt, response)
    with torch.no_grad():
        assert model(ids).logits.item() == pytest.approx(scores[-2].item(), abs=1e-4)
    assert load_judge(judge_dir)([prompt], [response]) == pytest.approx([scores[-1].item()], abs=1e-4)


@pytest.mark.law
def test_a_judge_reads_the_end_of_a_text_longer_than_its_context(judge_dir, tokenizer):
    prompt, response = "The plot was superb" * 20, " never dull."
    score = load_judge(judge_dir)([prompt], [response])[0]
    assert score == pytest.approx(direct_scores(judge_dir, tokenizer, prompt, response)[-1].item(), abs=1e-4)


@pytest.mark.law
def test_a_judge_subtracts_its_center_and_clips_what_is_left(judge_dir, tokenizer, tmp_path):
    """rlhf.py writes both into the reward model's configuration, so that its rewards lie in [-bound, bound]."""
    plain = load_judge(judge_dir)(*zip(*JUDGED))
    model = GPT2ForSequenceClassification.from_pretrained(judge_dir)
    center, bound = sorted(plain)[1], (max(plain) - sorted(plain)[1]) / 2
    model.config.reward_center, model.config.reward_clip = center, bound
    expected = [max(-bound, min(bound, score - center)) for score in plain]
    assert load_judge(saved(model, tokenizer, tmp_path / "clipped"))(*zip(*JUDGED)) == pytest.approx(expected, abs=1e-4)
    assert bound in expected and 0 in expected, "one score is clipped, one is at the center"


# ---------------------------------------------------------------------------------------------------
# other classifiers


@pytest.mark.law
def test_of_two_labels_the_log_odds_of_the_second(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, num_labels=2, initializer_range=0.4))
    judge = load_judge(saved(model, tokenizer, tmp_path / "two"))
    texts = ["The plot was dull.", "The acting was superb, and the plot was fresh."]
    with torch.no_grad():
        logits = torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    expected = (logits.log_softmax(-1)[:, 1] - logits.log_softmax(-1)[:, 0]).tolist()
    assert judge([text[:8] for text in texts], [text[8:] for text in texts]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.law
def test_an_encoder_judges_too_padding_and_all(tmp_path, tokenizer):
    torch.manual_seed(0)
    padded = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<eos>",
                                     unk_token="<eos>", model_max_length=32)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=1, initializer_range=0.4, max_position_embeddings=32, pad_token_id=0))
    judge = load_judge(saved(model, padded, tmp_path / "bert"))
    prompts = ["The plot was", "I thought the acting"]
    responses = [" dull.", " seemed superb, and the plot was fresh. " * 9]
    together = judge(prompts, responses)
    alone = [judge([p], [y])[0] for p, y in zip(prompts, responses)]
    assert together == pytest.approx(alone, abs=1e-5) and together[0] != together[1]


# ---------------------------------------------------------------------------------------------------
# what is no judge


def test_three_labels_are_no_reward(tmp_path, tokenizer):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, num_labels=3)
    directory = saved(GPT2ForSequenceClassification(config), tokenizer, tmp_path / "three")
    with pytest.raises(lm.Refused, match="three: a reward is one number, but this .* has 3 labels"):
        load_judge(directory)


# ---------------------------------------------------------------------------------------------------
# a run


@pytest.mark.law
def test_the_implicit_reward_is_beta_times_the_log_ratio(tokenizer):
    ref, policy = (random_gpt2(tokenizer, seed=seed, dtype=torch.float32) for seed in (4, 5))
    prompts, responses = ["The plot was"] * 3, [" superb.", " never dull, but slow.", " awful."]
    policy.batch_size = 2
    for beta, longest in ((0.1, 24), (0.5, 2)):
        judged = implicit_rewards(policy, ref, beta, longest)(prompts, responses)
        for prompt, response, reward in zip(prompts, responses, judged):
            ids = [*ref.encode_prompt(response)[:23], ref.eos_id][:longest]  # the words, and the EOS if it fits
            row = [ref.encode_prompt(prompt)], [ids]
            assert reward == pytest.approx(beta * (policy.logps(*row) - ref.logps(*row)).item(), abs=1e-5)
        assert min(map(abs, judged)) > 1e-3


def test_a_finished_run_judges_by_its_policy(tokenizer, tmp_path):
    ref, policy = (random_gpt2(tokenizer, seed=seed, dtype=torch.float32) for seed in (4, 5))
    ref.save(tmp_path / "ref")
    policy.save(tmp_path / "run" / "policy")
    with pytest.raises(lm.Refused, match="run is no finished run whose policy could judge: .*summary.json"):
        load_judge(str(tmp_path / "run"))
    summary = {"beta": 0.3, "pi_ref": str(tmp_path / "ref"), "settings": {"max_new_tokens": 9}}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    asked = ["The plot was", "The music felt"], [" superb.", " never dull, but slow."]
    judge = load_judge(str(tmp_path / "run"))
    assert judge.name == str(tmp_path / "run")
    assert judge(*asked) == pytest.approx(implicit_rewards(policy, ref, 0.3, 9)(*asked), abs=1e-5)
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, "pi_ref": str(tmp_path / "nowhere")}))
    with pytest.raises(lm.Refused, match="run is no finished run whose policy could judge: .*nowhere"):
        load_judge(str(tmp_path / "run"))


def test_a_directory_without_a_judge_is_a_sentence(tmp_path):
    with pytest.raises(lm.Refused, match="does not hold a judge.json or a sequence-classification model"):
        load_judge(str(tmp_path))
    with pytest.raises(lm.Refused, match="nowhere is neither golden, vader or none, nor a directory"):
        load_judge(str(tmp_path / "nowhere"))


def test_the_run_of_a_reward_model_is_no_judge_but_its_model_is(judge_dir, tmp_path):
    (tmp_path / "ppo" / "reward").mkdir(parents=True)
    (tmp_path / "ppo" / "reward" / "model").symlink_to(judge_dir)
    slip, meant = str(tmp_path / "ppo" / "reward"), str(tmp_path / "ppo" / "reward" / "model")
    with pytest.raises(lm.Refused, match=rf"^{slip} holds a run, not a model; did you mean {meant}\?$"):
        load_judge(slip)
    assert load_judge(meant).name == meant
