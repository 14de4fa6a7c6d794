"""Laws of lm.py: padding, masks, EOS, sampling, loading and saving."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lm
from models import random_gpt2

pytestmark = pytest.mark.usefixtures("both_forms")
EOS = 0
ids = st.lists(st.integers(1, 10), min_size=1, max_size=8)
batches = st.lists(st.tuples(ids, ids.map(lambda row: [*row, EOS])), min_size=1, max_size=5)
MODEL = random_gpt2(11, seed=1)


def plain_logp(model, prompt, response) -> float:
    """log pi(y|x), the slow obvious way: one row, no padding, one token at a time."""
    model = copy.deepcopy(model).eval()
    total = 0.0
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
    return total


def test_negative_control_positions_that_count_padding_differ(monkeypatch):
    """Without position ids from the mask, GPT-2's learned positions shift by the padding."""
    forward = MODEL.base_model.forward

    def without_positions(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    prompt, response = [3, 1], [4, 1, EOS]
    alone = lm.logps(MODEL, [prompt], [response])[0].item()
    monkeypatch.setattr(MODEL.base_model, "forward", without_positions)
    padded = lm.logps(MODEL, [prompt, [1] * 9], [response, [1]])[0].item()
    assert abs(padded - alone) > 1e-3


def test_the_eos_is_trained():
    model = random_gpt2(11, seed=1)
    before = model.lm_head.weight.detach().clone()
    tokens, _ = lm.token_logps(model, [[1, 2]], [[3, EOS]])
    (-tokens[0, 1]).backward()  # the EOS's own term
    assert model.lm_head.weight.grad[EOS].norm() > 0
    assert torch.equal(before, model.lm_head.weight)


def test_policy_equals_reference_gives_exactly_zero_with_dropout_configured():
    model = random_gpt2(11, dropout=0.5, dtype=torch.float32)
    ref = lm.frozen_copy(model)
    assert model.training
    prompts, responses = [[1, 2], [3]], [[4, 5, EOS], [6, EOS]]
    assert torch.equal(lm.logps(model, prompts, responses), lm.logps(ref, prompts, responses))
    assert lm.reverse_kl(model, ref, prompts, responses).eq(0).all()
    assert model.training, "the model's mode is left as it was"


def test_mode_is_put_back_even_after_an_error():
    model = random_gpt2(11)
    with pytest.raises(RuntimeError), lm.eval_mode(model):
        assert not model.training
        raise RuntimeError
    assert model.training


def test_reference_is_frozen_and_shares_no_storage(policy):
    ref = lm.frozen_copy(policy)
    assert not any(p.requires_grad for p in ref.parameters()) and not ref.training
    ours, theirs = ({p.data_ptr() for p in model.parameters()} for model in (policy, ref))
    assert not ours & theirs


def test_stored_reference_log_probs_equal_live_ones(ref):
    pairs = [{"prompt": [1, 2], "chosen": [3, EOS], "rejected": [4, 5, 6, EOS]}, {"prompt": [7], "chosen": [EOS],
             "rejected": [2, EOS]}]
    stored = lm.ref_logps(lm.add_ref_logps(ref, pairs), "cpu")
    for got, live in zip(stored, lm.pair_logps(ref, pairs)):
        assert torch.allclose(got.double(), live, atol=1e-5)


def test_log_softmax_is_taken_in_float32_when_the_model_computes_in_bfloat16():
    model = random_gpt2(11, dtype=torch.float32)
    rows = [[1, 2, 3]] * 2, [[4, 5, EOS], [6, EOS]]
    exact = lm.logps(copy.deepcopy(model).double(), *rows)
    low = lm.logps(copy.deepcopy(model).bfloat16(), *rows)
    assert low.dtype == torch.float32
    assert torch.allclose(low.double(), exact, atol=0.5)  # what bfloat16 weights cost here


# ---------------------------------------------------------------------------------------------------
# sampling


def test_samples_are_from_the_softmax_whatever_generation_config_says():
    """Chi-square over all 15 responses of at most 3 tokens, at two temperatures."""
    model = random_gpt2(3, seed=5)
    config = model.generation_config
    config.top_k, config.top_p, config.temperature, config.repetition_penalty, config.do_sample = 1, 0.1, 0.3, 5.0, True
    responses = [list(row) for n in (1, 2, 3) for row in itertools.product(range(3), repeat=n)
                 if EOS not in row[:-1] and (row[-1] == EOS or n == 3)]
    n = 20_000
    for temperature in (1.0, 0.7):
        tempered = copy.deepcopy(model)
        with torch.no_grad():  # the head is tied to the embeddings: scale the final layer norm instead
            tempered.transformer.ln_f.weight /= temperature
            tempered.transformer.ln_f.bias /= temperature
        expected = lm.logps(tempered, [[1, 2]] * len(responses), responses).exp() * n
        drawn = lm.sample(model, [[1, 2]] * n, 3, EOS, torch.Generator().manual_seed(0), temperature)
        counts = torch.tensor([drawn.count(row) for row in responses])
        assert counts.sum() == n, "every sample is one of the possible responses"
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        assert chi2 < 14 + 5 * math.sqrt(2 * 14), f"chi-square {chi2:.1f} for 14 degrees of freedom"
    # negative control: at the wrong temperature the same counts are impossible
    wrong = lm.logps(model, [[1, 2]] * len(responses), responses).exp() * n
    assert ((counts - wrong) ** 2 / wrong).sum() > 14 + 5 * math.sqrt(2 * 14)


def test_a_sample_is_cut_after_its_first_eos_or_at_the_limit_and_ignores_its_batch_mates():
    model = random_gpt2(11, seed=6)
    prompts = [[1], [2, 3, 4, 5], [6, 7]] * 50
    rows = lm.sample(model, prompts, 5, EOS, torch.Generator().manual_seed(0))
    assert all(EOS not in row[:-1] for row in rows)
    assert all(row[-1] == EOS or len(row) == 5 for row in rows)
    assert {len(row) for row in rows} >= {1, 5}, "both ways to end must occur in this test"
    assert model.training


def test_same_seed_same_samples_other_seed_others():
    draw = lambda seed: lm.sample(MODEL, [[1, 2]] * 20, 8, EOS, torch.Generator().manual_seed(seed))  # noqa: E731
    assert draw(0) == draw(0) != draw(1)


def test_sampling_stops_when_all_rows_are_done():
    model, calls = random_gpt2(11, seed=8), []
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0
    model.lm_head.weight.requires_grad_(False)
    model.transformer.ln_f.bias.data[:] = 0
    model.transformer.ln_f.weight.data[:] = 0  # uniform: EOS comes with probability 1/11
    norm = model.transformer.ln_f.forward
    model.transformer.ln_f.forward = lambda *args: calls.append(1) or norm(*args)
    row, = lm.sample(model, [[1]], 1000 - 936, EOS, torch.Generator().manual_seed(0))
    assert len(calls) == len(row) < 64


# ---------------------------------------------------------------------------------------------------
# text


@pytest.fixture(scope="module")
def words():
    return lm.word_tokenizer(["The plot was", " dull, and slow.", " never fresh"])


def test_prompt_and_response_are_tokenised_apart_and_join_to_the_text(words):
    prompt, response = lm.encode_prompt(words, "The plot was"), lm.encode_response(words, " never dull.", 99)
    assert words.decode(prompt + response, skip_special_tokens=True) == "The plot was never dull."
    assert lm.decode(words, response) == " never dull."


@given(st.integers(1, 9))
def test_exactly_one_eos_at_the_end_unless_cut(limit):
    words = lm.word_tokenizer([" dull, and slow."])
    whole = lm.encode_response(words, " dull, and slow.", 99)
    assert whole.count(EOS) == 1 and whole[-1] == EOS
    assert lm.encode_response(words, " dull, and slow.<eos>", 99) == whole
    cut = lm.encode_response(words, " dull, and slow.", limit)
    assert cut == whole[:limit] and (limit >= len(whole)) == (EOS in cut)


def test_one_bos_if_the_tokenizer_uses_one_and_never_two(words):
    class WithBos:
        bos_token_id, eos_token_id = 7, 0

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return ([7] if text.startswith("<s>") else []) + [1, 2]

        def __call__(self, text):
            return type("Encoding", (), {"input_ids": [7, 1]})

    assert lm.encode_prompt(WithBos(), "a") == [7, 1, 2]
    assert lm.encode_prompt(WithBos(), "<s>a") == [7, 1, 2]
    assert lm.encode_prompt(words, "") == [EOS], "an empty prompt still needs a token to predict from"


def pair(prompt="The plot was", chosen=" dull.", rejected=" fresh.", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_encode_pairs_names_file_line_and_field(words):
    model = random_gpt2(len(words), positions=8)
    with pytest.raises(ValueError, match=r"f.jsonl:3: field 'prompt' has 9 tokens.*room for 4"):
        lm.encode_pairs(model, words, [pair(prompt="The" + " plot" * 8, where="f.jsonl:3")], 4)
    with pytest.raises(ValueError, match=r"f.jsonl:4: .*same in their first 1 tokens"):
        lm.encode_pairs(model, words, [pair("The", " dull, and", " dull.", where="f.jsonl:4")], 1)
    with pytest.raises(ValueError, match=r"f.jsonl:5: field 'chosen': .*does not know every word"):
        lm.encode_pairs(model, words, [pair(chosen=" splendid.", where="f.jsonl:5")], 4)
    row, = lm.encode_pairs(model, words, [pair(chosen_ids=[3, 4], rejected_ids=[5])], 4)
    assert row["chosen"] == [3, 4], "pairs that a policy sampled keep the tokens it wrote"


def test_the_fullest_prompt_that_is_accepted_also_trains_and_samples(words):
    model = random_gpt2(len(words), positions=8)
    row, = lm.encode_pairs(model, words, [pair(prompt="The" + " plot" * 3)], 4)
    assert len(row["prompt"]) == 4
    lm.pair_logps(model, [row])
    lm.sample(model, [row["prompt"]], 4, EOS, torch.Generator())


# ---------------------------------------------------------------------------------------------------
# load and save


def test_saved_policy_is_an_ordinary_transformers_directory(tmp_path, words):
    model = random_gpt2(len(words), dtype=torch.float32)
    lm.save(model, words, tmp_path / "policy")
    again, tokenizer = lm.load(str(tmp_path / "policy"))
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "policy"), PreTrainedTokenizerFast)
    AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    rows = [[1, 2]], [[3, EOS]]
    assert torch.allclose(lm.logps(model, *rows), lm.logps(again, *rows), rtol=1e-6)  # its gelu is one kernel now
    assert not again.training
    assert tokenizer.encode("The plot") == words.encode("The plot")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"], "no half-written directory is left"
    assert not [path for path in (tmp_path / "policy").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_model_that_is_not_here_is_one_clear_sentence(tmp_path, monkeypatch):
    def no_hub(name, timeout):
        raise ConnectionError("no route")

    monkeypatch.setattr(lm, "model_info", no_hub)
    with pytest.raises(ValueError, match="--model no-such/model: not a directory here.*--model DIR"):
        lm.load("no-such/model")
    with pytest.raises(ValueError, match="does not hold a causal language model"):
        lm.load(str(tmp_path))


def test_tiny_is_made_once_for_each_corpus_and_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPO_CACHE", str(tmp_path))
    monkeypatch.setitem(lm.TINY, "sft_steps", 3)
    corpus = [("The plot was", " dull."), ("The plot was", " fresh.")] * 20
    first = lm.tiny_directory(corpus)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert lm.tiny_directory(corpus) == first and (first / "model.safetensors").stat().st_mtime_ns == made
    assert lm.tiny_directory(corpus[:-1]) != first
    monkeypatch.setitem(lm.TINY, "sft_steps", 4)
    assert lm.tiny_directory(corpus) != first


def test_sft_teaches_a_text(words):
    model = random_gpt2(len(words), dtype=torch.float32)
    prompt, response = lm.encode_prompt(words, "The plot was"), lm.encode_response(words, " never dull.", 9)
    before = lm.logps(model, [prompt], [response]).item()
    lm.sft(model, words, [("The plot was", " never dull.")], steps=60, batch_size=2, lr=1e-2, seed=0)
    assert lm.logps(model, [prompt], [response]).item() > -0.1 > before


def test_a_text_may_hold_the_eos_though_it_is_the_unknown_word_too():
    """As a chat template writes it; the EOS at the end of a response stays one."""
    tokenizer = lm.word_tokenizer(["The plot was dull."])
    model = random_gpt2(len(tokenizer))
    pair = {"prompt": "The plot<eos> was", "chosen": " dull.<eos>", "rejected": "."}
    row, = lm.encode_pairs(model, tokenizer, [pair], 9)
    assert row["chosen"] == lm.encode_response(tokenizer, " dull.", 9) and row["chosen"].count(0) == 1
    with pytest.raises(ValueError, match="does not know every word"):
        lm.encode_pairs(model, tokenizer, [{"prompt": "The", "chosen": " soup.", "rejected": "."}], 9)
