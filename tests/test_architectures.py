"""Laws of lm.py for any decoder-only model and any tokenizer of transformers, on tiny random ones."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

import data
import lm
import rows
from models import ARCHITECTURES, TOLERANCE, letters, random_model

law = pytest.mark.law
EOS = 0
made = functools.cache(random_model)
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
        return model(torch.tensor([text]), use_cache=False).logits[0, -1]


def short_responses(vocabulary: int, limit: int) -> list[list[int]]:
    """Every response of at most `limit` tokens: it ends at its first EOS or at the limit."""
    return [list(row) for n in range(1, limit + 1) for row in itertools.product(range(vocabulary), repeat=n)
            if EOS not in row[:-1] and (row[-1] == EOS or n == limit)]


# ---- log-probabilities


@law
@each_architecture
def test_log_probs_equal_the_plain_token_by_token_computation(architecture, kind):
    policy = made(architecture, 11, seed=1, kind=kind)
    tokens, mask = policy.token_logps(PROMPTS, RESPONSES)
    assert mask.sum(1).tolist() == [len(response) for response in RESPONSES]
    for row, prompt, response in zip(tokens, PROMPTS, RESPONSES):
        for t, token in enumerate(response):
            plain = plain_logits(policy.model, prompt + response[:t]).log_softmax(-1)
            assert row[t].item() == pytest.approx(plain[token].item(), abs=TOLERANCE[architecture])
            assert plain.std() > 0.3, "the model must be far from uniform"
        assert row[len(response):].eq(0).all()
    assert torch.equal(policy.logps(PROMPTS, RESPONSES), tokens.sum(1))


@law
@each_architecture
@settings(max_examples=settings.default.max_examples // 3)  # for it is repeated twelve times
@given(batches)
def test_padding_and_batch_mates_change_nothing(architecture, kind, batch):
    policy = made(architecture, 11, seed=1, kind=kind)
    together = policy.logps(*(list(side) for side in zip(*batch)))
    alone = torch.cat([policy.logps([prompt], [response]) for prompt, response in batch])
    assert torch.allclose(together, alone, rtol=0, atol=TOLERANCE[architecture])


@law
@each_architecture
def test_negative_control_without_the_attention_mask_padding_is_read(architecture, monkeypatch):
    policy = made(architecture, 11, seed=1, kind=lm.LM)  # a row of FastLM has no padding before it
    forward, exact = policy.model.forward, policy.logps(PROMPTS, RESPONSES)
    monkeypatch.setattr(policy.model, "forward", lambda *args, attention_mask, **more: forward(
        *args, attention_mask=torch.ones_like(attention_mask), **more))
    change = policy.logps(PROMPTS, RESPONSES) - exact
    assert abs(change[0]) < TOLERANCE[architecture], "the longest prompt has no padding before it"
    assert change[1:3].abs().min() > 1e-2


@law
@each_architecture
def test_negative_control_a_mask_from_token_ids_would_drop_the_eos(architecture, kind):
    """Where pad and EOS are one token, `ids != pad` loses log pi(EOS), with which every response ends."""
    tokens, mask = made(architecture, 11, seed=1, kind=kind).token_logps(PROMPTS, RESPONSES)
    from_ids, _ = lm.pad(RESPONSES, "right", "cpu")
    lost = tokens.sum(1) - torch.where(from_ids != EOS, tokens, 0).sum(1)
    assert lost[[0, 1, 3]].max() < -1e-3 and lost[2] == 0, "only the cut response has none"
    assert torch.allclose(lost, torch.where(mask & (from_ids == EOS), tokens, 0).sum(1))


# ---- the self-check of a model from outside


@law
@each_architecture
def test_the_self_check_takes_what_is_right(architecture, kind):
    made(architecture, 11, seed=1, kind=kind).check()


def without_the_mask(forward):
    return lambda *args, attention_mask, **more: forward(
        *args, attention_mask=torch.ones_like(attention_mask), **more)


def with_other_positions_in_sampling(forward):
    return lambda *args, position_ids, use_cache, **more: forward(
        *args, position_ids=position_ids + use_cache, use_cache=use_cache, **more)


def that_sees_what_follows(forward):
    def full(ids, attention_mask, **more):
        n = ids.shape[1]
        mask = torch.zeros(1, 1, n, n, dtype=torch.float64) if n > 1 else attention_mask
        return forward(ids, attention_mask=mask, **more)
    return full


@law
@pytest.mark.parametrize("fault, why", [
    (without_the_mask, "padding, other rows or later tokens move"), (that_sees_what_follows, "later tokens move"),
    (with_other_positions_in_sampling, "the sampler draws from another")])
def test_the_self_check_refuses(fault, why, monkeypatch):
    policy = random_model("gpt2", 11, seed=1, kind=lm.LM)
    policy.check()
    monkeypatch.setattr(policy.model, "forward", fault(policy.model.forward))
    with pytest.raises(lm.Refused, match=f"models of type gpt2 cannot be used here: .*{why}"):
        policy.check()


@law
@pytest.mark.parametrize("architecture", ["mamba", "falcon_mamba"])
def test_mamba_samples_from_what_it_scores(architecture, monkeypatch):
    """Given the mask of all tokens so far, as other models are, its state fills with copies of the last."""
    config = AutoConfig.for_model(architecture, vocab_size=11, hidden_size=16, num_hidden_layers=2, state_size=4,
                                  initializer_range=0.4, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    torch.manual_seed(0)
    policy = lm.LM(AutoModelForCausalLM.from_config(config), letters(11))
    policy.check()
    monkeypatch.setattr(policy.model.config, "model_type", "another")  # so it gets the whole mask
    with pytest.raises(lm.Refused, match="the sampler draws from another distribution"):
        policy.check()


@pytest.mark.parametrize("architecture", ["bert", "rwkv"])
def test_what_is_no_policy_is_refused(architecture):
    """One sees later tokens; into the other's state goes padding."""
    config = AutoConfig.for_model(architecture, vocab_size=11, hidden_size=16, num_hidden_layers=2, bos_token_id=0,
                                  eos_token_id=0, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(lm.Refused, match=f"models of type {architecture} cannot be used here"):
        lm.LM(AutoModelForCausalLM.from_config(config), letters(11)).check()


# ---- sampling and KL


@law
@each_architecture
def test_greedy_sampling_with_a_cache_equals_scoring_without_one(architecture, kind):
    """At a temperature near 0 each token is the argmax of the plain computation, however the prompts are padded."""
    policy = made(architecture, 11, seed=1, kind=kind)
    for prompt, row in zip(PROMPTS, policy.sample(PROMPTS, 10, torch.Generator().manual_seed(0), 1e-6)):
        assert row == row[:10] and (len(row) == 10 or row[-1] == EOS)
        assert row == [plain_logits(policy.model, prompt + row[:t]).argmax().item() for t in range(len(row))]


@law
@each_architecture
def test_samples_have_the_probabilities_that_scoring_gives_them(architecture, kind):
    """Frequencies of all 15 responses of at most 3 tokens, to a prompt that its batch-mates pad."""
    policy, n, responses = made(architecture, 3, seed=2, kind=kind), 2000, short_responses(3, 3)
    rows = policy.sample([[1], [2, 1, 2, 2, 1, 1]] * n, 3, torch.Generator().manual_seed(0))
    frequencies = torch.tensor([rows[::2].count(response) / n for response in responses])
    assert frequencies.sum().item() == pytest.approx(1), "every sample is one of the possible responses"

    def distance(prompt):  # total variation; n exact samples of 15 outcomes are 0.035 away at most on average
        probabilities = policy.logps([prompt] * 15, responses).exp()
        assert probabilities.sum().item() == pytest.approx(1)
        return (frequencies - probabilities).abs().sum().item() / 2

    assert distance([1]) < 0.06 and distance([2]) > 0.15, "and they are not samples for another prompt"


@law
@each_architecture
def test_reverse_kl_is_0_of_equal_models_and_else_the_enumerated_one(architecture, kind):
    """Averaged over all responses with their probabilities, the estimate is sum pi (log pi - log pi_ref)."""
    policy, ref = (made(architecture, 3, seed=seed, kind=kind) for seed in (2, 3))
    responses = short_responses(3, 3)
    for prompt in [1], [2, 1, 2, 2, 1, 1]:
        rows = [prompt] * len(responses), responses
        log_pi, log_ref = policy.logps(*rows), ref.logps(*rows)
        assert policy.reverse_kl(policy, *rows).eq(0).all()
        assert policy.reverse_kl(policy.frozen_copy(), *rows).abs().max() < TOLERANCE[architecture]
        estimates = policy.reverse_kl(ref, *rows)
        exact = (log_pi.exp() * (log_pi - log_ref)).sum().item()
        assert (log_pi.exp() * estimates).sum().item() == pytest.approx(exact, abs=TOLERANCE[architecture])
        assert exact > 0.05 and estimates.min() >= 0
        ref.micro_batch = policy.micro_batch = 4
        assert torch.allclose(policy.reverse_kl(ref, *rows), estimates, rtol=0, atol=TOLERANCE[architecture])
        ref.micro_batch = policy.micro_batch = None


# ---- saved directories: the policy, and the scorer on top of it

TEXTS = ["The plot was", " dull, and slow.", " never fresh"]


# transformers gives a directory of a Qwen2 its own tokenizer class, whatever was saved there: ours cannot be in it
@pytest.fixture(scope="module", params=[name for name in ARCHITECTURES if name != "qwen2"])
def saved(request, tmp_path_factory):
    """(policy, directory, prompts, responses)"""
    tokenizer = lm.word_tokenizer(TEXTS)
    policy = random_model(request.param, tokenizer, seed=4, dtype=torch.float32)
    directory = tmp_path_factory.mktemp(request.param) / "policy"
    policy.save(directory)
    rows = ([[i % len(tokenizer) for i in row] for row in side] for side in (PROMPTS, RESPONSES))
    return policy, str(directory), *rows


def test_a_saved_model_loads_with_the_same_log_probs_and_in_a_pipeline(saved, kind):
    policy, directory, prompts, responses = saved
    again = kind.load(directory)
    assert torch.allclose(again.logps(prompts, responses), policy.logps(prompts, responses), rtol=1e-5)
    write = pipeline("text-generation", model=directory, device="cpu")
    prompt = policy.encode_prompt("The plot was never")
    greedy, = again.sample([prompt], 6, torch.Generator().manual_seed(0), 1e-6)
    written = write("The plot was never", max_new_tokens=6, do_sample=False, return_full_text=False)
    assert written[0]["generated_text"] == again.decode(greedy)


@law
def test_scores_are_those_of_the_unpadded_text_up_to_each_token(saved, tmp_path):
    policy, _, prompts, responses = saved
    scorer = lm.Scorer.of(policy)
    assert scorer.final_scores(prompts, responses).eq(0).all(), "zero before training"
    torch.nn.init.normal_(scorer.model.score.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        final, (scores, mask) = scorer.final_scores(prompts, responses), scorer.scores(prompts, responses)
        scorer.save(tmp_path / "scorer")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer")
        assert torch.allclose(lm.Scorer(again, scorer.tokenizer).final_scores(prompts, responses), final, atol=1e-4)
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            plain = [again(torch.tensor([prompt + response[:t]])).logits.item() for t in range(len(response) + 1)]
            assert scores[i, :len(plain)].tolist() == pytest.approx(plain, abs=1e-4)
            assert final[i].item() == pytest.approx(plain[-1], abs=1e-4)
            hidden = policy.model.base_model(torch.tensor([prompt + response])).last_hidden_state[0, -1]
            assert plain[-1] == pytest.approx(scorer.model.score(hidden).item(), abs=1e-4), "the policy's network"
    scorer.batch_size = 3
    assert torch.allclose(scorer.predict(prompts, responses), final, atol=1e-4)
    assert mask.sum(1).tolist() == [len(response) for response in responses]
    assert abs(scores[2, -1] - final[2]) > 1e-2, "negative control: the last column is the score of padding"


# ---- tokenizers

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
PAIR = data.Pair("ca", "bad", " bab", "f.jsonl:1")


def speaking(tokenizer):
    """A policy with this tokenizer."""
    return made("llama", tokenizer)


@law
@each_tokenizer
def test_prompt_and_response_are_encoded_apart_in_training_and_in_sampling(tokenizer, monkeypatch):
    policy, seen = speaking(tokenizer), []
    row, = rows.encode(policy, [PAIR], 9)
    of = tokenizer.convert_tokens_to_ids
    bos = [1] if tokenizer("a").input_ids[0] == 1 else []
    assert row[:3] == (bos + of(["c", "a"]), of(["ba", "d", "</s>"]), of([" b", "ab", "</s>"]))
    assert tokenizer.encode(PAIR.prompt + PAIR.chosen, add_special_tokens=False) == of(["c", "ab", "a", "d"]), (
        "negative control: encoded together, the two are other tokens")
    monkeypatch.setattr(policy, "sample", lambda prompts, *args: seen.extend(prompts) or [row.chosen])
    assert policy.respond([PAIR.prompt], 9, torch.Generator()) == ([row.prompt], [row.chosen], [PAIR.chosen])
    assert seen == [row.prompt]


@law
@each_tokenizer
def test_one_bos_if_the_tokenizer_uses_one_and_never_two(tokenizer):
    policy, bos = speaking(tokenizer), [1] if tokenizer("a").input_ids[0] == 1 else []
    assert policy.encode_prompt("ca")[:-2] == bos
    assert policy.encode_prompt("<s>ca").count(1) == len(bos), "who spells the BOS means the text"
    assert policy.encode_prompt("") == [1], "an empty prompt still needs a token to predict from"


@each_tokenizer
def test_a_saved_tokenizer_gives_the_same_ids_and_keeps_its_chat_template(tokenizer, tmp_path):
    policy = speaking(tokenizer)
    policy.save(tmp_path / "policy")
    again = lm.LM.load(str(tmp_path / "policy"))
    assert repr(rows.encode(again, [PAIR], 9)) == repr(rows.encode(policy, [PAIR], 9))  # not yet known: nan
    assert (again.eos_id, again.tokenizer.pad_token_id) == (EOS, tokenizer.pad_token_id)
    assert again.tokenizer.chat_template == tokenizer.chat_template


def test_a_chat_template_that_writes_the_bos_gives_one_bos_not_two():
    tokenizer = TOKENIZERS["chat template"]
    chat = [{"role": "user", "content": "ca"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>[user]ca[assistant]" and tokenizer(prompt).input_ids[:2] == [1, 1], "here are two"
    assert speaking(tokenizer).encode_prompt(chat) == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True)["input_ids"]


SENTENCEPIECE = {f"{what} before every text": byte_pairs(bos=True, before_every_text=what)
                 for what in ("one space", "a space")}


@law
@pytest.mark.parametrize("tokenizer", [*TOKENIZERS.values(), *SENTENCEPIECE.values()],
                         ids=[*TOKENIZERS, *SENTENCEPIECE])
@pytest.mark.parametrize("response", [" bad", "bad", " ba cab", " "])
def test_a_response_goes_on_where_its_prompt_ends(tokenizer, response):
    """Its tokens are those of the joint text where no merge crosses, and they are decoded to what was encoded."""
    policy = speaking(tokenizer)
    prompt_ids, ids = policy.encode_prompt("cc"), policy.encode_response(response, 99)
    assert prompt_ids + ids[:-1] == tokenizer("cc" + response).input_ids
    assert policy.decode(ids) == response
