"""Laws of lm.py for any decoder-only model and any tokenizer of transformers, on tiny random ones."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

import fast
import lm
from models import ARCHITECTURES, TOLERANCE, random_model

pytestmark = pytest.mark.usefixtures("both_forms")
EOS = 0
MODELS = {name: random_model(name, 11, seed=1) for name in ARCHITECTURES}
ids = st.lists(st.integers(0, 10), min_size=1, max_size=8)  # prompts may hold token 0, which is also the padding
batches = st.lists(st.tuples(ids, st.lists(st.integers(1, 10), max_size=7).map(lambda row: [*row, EOS])),
                   min_size=2, max_size=4)
# of many lengths, some longer than the sliding window; with and without EOS
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], [EOS]]
RESPONSES = [[8, EOS], [9, 7, 9, 3, 2, 3, EOS], [8, 4, 6, 2, 6], [EOS]]

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def plain_logits(model, text: list[int]) -> torch.Tensor:
    """(V,) next-token logits, the obvious way: one row, no padding, no cache, no masks."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(torch.tensor([text]), use_cache=False).logits[0, -1]


def short_responses(vocabulary: int, limit: int) -> list[list[int]]:
    """Every response of at most `limit` tokens: it ends at its first EOS or at the limit."""
    return [list(row) for n in range(1, limit + 1) for row in itertools.product(range(vocabulary), repeat=n)
            if EOS not in row[:-1] and (row[-1] == EOS or n == limit)]


# ---------------------------------------------------------------------------------------------------
# log-probabilities


@each_architecture
def test_log_probs_equal_the_plain_token_by_token_computation(architecture):
    model = MODELS[architecture]
    tokens, mask = lm.token_logps(model, PROMPTS, RESPONSES)
    assert mask.sum(1).tolist() == [len(response) for response in RESPONSES]
    for row, prompt, response in zip(tokens, PROMPTS, RESPONSES):
        for t, token in enumerate(response):
            plain = plain_logits(model, prompt + response[:t]).log_softmax(-1)
            assert row[t].item() == pytest.approx(plain[token].item(), abs=TOLERANCE[architecture])
            assert plain.std() > 0.3, "the model must be far from uniform"
        assert row[len(response):].eq(0).all()
    assert torch.equal(lm.logps(model, PROMPTS, RESPONSES), tokens.sum(1))


@each_architecture
@given(batches)
def test_padding_and_batch_mates_change_nothing(architecture, batch):
    model = MODELS[architecture]
    together = lm.logps(model, *(list(side) for side in zip(*batch)))
    alone = torch.cat([lm.logps(model, [prompt], [response]) for prompt, response in batch])
    assert torch.allclose(together, alone, rtol=0, atol=TOLERANCE[architecture])


@each_architecture
def test_negative_control_without_the_attention_mask_padding_is_read(architecture, monkeypatch):
    monkeypatch.setattr(fast, "knows", lambda model: False)  # its rows hold no padding to be read
    model = MODELS[architecture]
    forward, exact = model.forward, lm.logps(model, PROMPTS, RESPONSES)
    monkeypatch.setattr(model, "forward", lambda *args, attention_mask, **more: forward(
        *args, attention_mask=torch.ones_like(attention_mask), **more))
    change = lm.logps(model, PROMPTS, RESPONSES) - exact
    assert change[0] == 0 and change[1:3].abs().min() > 1e-2, "the longest prompt has no padding before it"


@each_architecture
def test_negative_control_a_mask_from_token_ids_would_drop_the_eos(architecture):
    """Where pad and EOS are one token, `ids != pad` loses log pi(EOS), with which every response ends."""
    tokens, mask = lm.token_logps(MODELS[architecture], PROMPTS, RESPONSES)
    from_ids, _ = lm.pad(RESPONSES, "right", "cpu")
    lost = tokens.sum(1) - torch.where(from_ids != EOS, tokens, 0).sum(1)
    assert lost[[0, 1, 3]].max() < -1e-3 and lost[2] == 0, "only the cut response has none"
    assert torch.allclose(lost, torch.where(mask & (from_ids == EOS), tokens, 0).sum(1))


# ---------------------------------------------------------------------------------------------------
# sampling and KL


@each_architecture
def test_greedy_sampling_with_a_cache_equals_scoring_without_one(architecture):
    """At a temperature near 0 each token is the argmax of the plain computation, however the prompts are padded."""
    model = MODELS[architecture]
    for prompt, row in zip(PROMPTS, lm.sample(model, PROMPTS, 10, EOS, torch.Generator().manual_seed(0), 1e-6)):
        assert row == row[:10] and (len(row) == 10 or row[-1] == EOS)
        assert row == [plain_logits(model, prompt + row[:t]).argmax().item() for t in range(len(row))]


@each_architecture
def test_samples_have_the_probabilities_that_scoring_gives_them(architecture):
    """Frequencies of all 15 responses of at most 3 tokens, to a prompt that its batch-mates pad."""
    model, n, responses = random_model(architecture, 3, seed=2), 3000, short_responses(3, 3)
    rows = lm.sample(model, [[1], [2, 1, 2, 2, 1, 1]] * n, 3, EOS, torch.Generator().manual_seed(0))
    frequencies = torch.tensor([rows[::2].count(response) / n for response in responses])
    assert frequencies.sum().item() == pytest.approx(1), "every sample is one of the possible responses"

    def distance(prompt):  # total variation; n exact samples of 15 outcomes are 0.03 away at most on average
        probabilities = lm.logps(model, [prompt] * 15, responses).exp()
        assert probabilities.sum().item() == pytest.approx(1)
        return (frequencies - probabilities).abs().sum().item() / 2

    assert distance([1]) < 0.05 and distance([2]) > 0.15, "and they are not samples for another prompt"


@each_architecture
def test_reverse_kl_is_0_of_equal_models_and_else_the_enumerated_one(architecture):
    """Averaged over all responses with their probabilities, the estimate is sum pi (log pi - log pi_ref)."""
    policy, ref = (random_model(architecture, 3, seed=seed) for seed in (2, 3))
    responses = short_responses(3, 3)
    for prompt in [1], [2, 1, 2, 2, 1, 1]:
        rows = [prompt] * len(responses), responses
        log_pi, log_ref = lm.logps(policy, *rows), lm.logps(ref, *rows)
        assert lm.reverse_kl(policy, copy.deepcopy(policy), *rows).eq(0).all()
        estimates = lm.reverse_kl(policy, ref, *rows)
        exact = (log_pi.exp() * (log_pi - log_ref)).sum().item()
        assert (log_pi.exp() * estimates).sum().item() == pytest.approx(exact, abs=TOLERANCE[architecture])
        assert exact > 0.05 and estimates.min() >= 0


# ---------------------------------------------------------------------------------------------------
# saved directories: the policy, and the scorer on top of it

TEXTS = ["The plot was", " dull, and slow.", " never fresh"]


# transformers gives a directory of a Qwen2 its own tokenizer class, whatever was saved there: ours cannot be in it
@pytest.fixture(scope="module", params=[name for name in ARCHITECTURES if name != "qwen2"])
def saved(request, tmp_path_factory):
    """(model, tokenizer, directory)"""
    tokenizer = lm.word_tokenizer(TEXTS)
    model = random_model(request.param, len(tokenizer), seed=4, dtype=torch.float32)
    directory = tmp_path_factory.mktemp(request.param) / "policy"
    lm.save(model, tokenizer, directory)
    return model, tokenizer, str(directory)


def test_a_saved_model_loads_with_the_same_log_probs_and_in_a_pipeline(saved):
    model, tokenizer, directory = saved
    again, tokenizer_again = lm.load(directory)
    prompts = [[i % len(tokenizer) for i in prompt] for prompt in PROMPTS]
    responses = [[i % len(tokenizer) for i in response] for response in RESPONSES]
    before, after = (lm.logps(each, prompts, responses) for each in (model, again))
    # lm.load takes GPT-2's gelu in one kernel, which rounds differently
    assert torch.allclose(after, before, rtol=1e-6 if model.config.model_type == "gpt2" else 0, atol=0)
    write = pipeline("text-generation", model=directory, device="cpu")
    prompt = lm.encode_prompt(tokenizer, "The plot was never")
    greedy, = lm.sample(again, [prompt], 6, EOS, torch.Generator().manual_seed(0), 1e-6)
    written = write("The plot was never", max_new_tokens=6, do_sample=False, return_full_text=False)
    assert written[0]["generated_text"] == lm.decode(tokenizer_again, greedy)


def test_scores_are_those_of_the_unpadded_text_up_to_each_token(saved, tmp_path):
    model, tokenizer, _ = saved
    scorer = lm.make_scorer(model)
    prompts = [[i % len(tokenizer) for i in prompt] for prompt in PROMPTS]
    responses = [[i % len(tokenizer) for i in response] for response in RESPONSES]
    assert lm.final_scores(scorer, prompts, responses).eq(0).all(), "zero before training"
    torch.nn.init.normal_(scorer.score.weight)
    with torch.no_grad():
        final, (scores, mask) = (f(scorer, prompts, responses) for f in (lm.final_scores, lm.scores))
        lm.save(scorer, tokenizer, tmp_path / "scorer")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").eval()
        assert torch.equal(lm.final_scores(again, prompts, responses), final)
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            plain = [scorer(torch.tensor([prompt + response[:t]])).logits.item() for t in range(len(response) + 1)]
            assert scores[i, :len(plain)].tolist() == pytest.approx(plain, abs=1e-4)
            assert final[i].item() == pytest.approx(plain[-1], abs=1e-4)
    assert mask.sum(1).tolist() == [len(response) for response in responses]
    assert abs(scores[2, -1] - final[2]) > 1e-2, "negative control: the last column is the score of padding"


# ---------------------------------------------------------------------------------------------------
# tokenizers

CHAT = ("{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")


def byte_pairs(bos: bool = False, before_every_text: str = "", **more) -> PreTrainedTokenizerFast:
    """Letters and a few merges, of which "ab" may cross from a prompt to its response; EOS is 0, BOS is 1.

    before_every_text: "one space" if the text has none, as Mistral does it, or "a space" more, as Llama 2.
    """
    space = "▁" if before_every_text else " "
    merges = [("a", "b"), (space, "b"), ("b", "a")]
    letters = ["</s>", "<s>", "<unk>", space, *"abcdefghijklmnopqrstuvwxyz[]", *map("".join, merges)]
    tokenizer = Tokenizer(token_models.BPE({token: i for i, token in enumerate(letters)}, merges, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    if before_every_text:
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if before_every_text == "one space":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    elif before_every_text == "a space":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   **more)


TOKENIZERS = {
    "no pad token": byte_pairs(),
    "pad token = EOS": byte_pairs(pad_token="</s>"),
    "pad token = unknown": byte_pairs(pad_token="<unk>", padding_side="left"),
    "BOS": byte_pairs(bos=True),
    "chat template": byte_pairs(bos=True, chat_template=CHAT),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
PAIR = {"prompt": "ca", "chosen": "bad", "rejected": " bab"}


@each_tokenizer
def test_prompt_and_response_are_encoded_apart_in_training_and_in_sampling(tokenizer, monkeypatch):
    model, seen = MODELS["llama"], []
    row, = lm.encode_pairs(model, tokenizer, [PAIR], 9)
    of = tokenizer.convert_tokens_to_ids
    bos = [1] if tokenizer("a").input_ids[0] == 1 else []
    assert row == {"prompt": bos + of(["c", "a"]), "chosen": of(["ba", "d", "</s>"]),
                   "rejected": of([" b", "ab", "</s>"])}
    assert tokenizer.encode(PAIR["prompt"] + PAIR["chosen"], add_special_tokens=False) == of(["c", "ab", "a", "d"]), (
        "negative control: encoded together, the two are other tokens")
    monkeypatch.setattr(lm, "sample", lambda model, prompts, *args, **more: seen.extend(prompts) or [row["chosen"]])
    assert lm.responder(model, tokenizer, 9)([PAIR["prompt"]], 0) == ([PAIR["chosen"]], [row["chosen"]])
    assert seen == [row["prompt"]]


@each_tokenizer
def test_a_saved_tokenizer_gives_the_same_ids_and_keeps_its_chat_template(tokenizer, tmp_path):
    model = random_model("llama", len(tokenizer))
    lm.save(model, tokenizer, tmp_path / "policy")
    _, again = lm.load(str(tmp_path / "policy"))
    assert lm.encode_pairs(model, again, [PAIR], 9) == lm.encode_pairs(model, tokenizer, [PAIR], 9)
    assert (again.eos_token_id, again.pad_token_id) == (EOS, tokenizer.pad_token_id)
    assert again.chat_template == tokenizer.chat_template


def test_a_chat_template_that_writes_the_bos_gives_one_bos_not_two():
    tokenizer = TOKENIZERS["chat template"]
    chat = [{"role": "user", "content": "ca"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>[user]ca[assistant]" and tokenizer(prompt).input_ids[:2] == [1, 1], "here are two"
    assert lm.encode_prompt(tokenizer, prompt) == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True)["input_ids"]


SENTENCEPIECE = {f"{what} before every text": byte_pairs(bos=True, before_every_text=what)
                 for what in ("one space", "a space")}


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS.values(), *SENTENCEPIECE.values()],
                         ids=[*TOKENIZERS, *SENTENCEPIECE])
@pytest.mark.parametrize("response", [" bad", "bad", " ba cab", " "])
def test_a_response_goes_on_where_its_prompt_ends(tokenizer, response):
    """Its tokens are those of the joint text where no merge crosses, and they are decoded to what was encoded."""
    prompt_ids, ids = lm.encode_prompt(tokenizer, "cc"), lm.encode_response(tokenizer, response, 99)
    assert prompt_ids + ids[:-1] == tokenizer("cc" + response).input_ids
    assert lm.decode(tokenizer, ids) == response
