"""Laws of lm.py: padding, masks, EOS, sampling, loading and saving."""

import copy
import itertools
import math
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import data
import lm
import world
from models import random_gpt2

EOS = 0
law = pytest.mark.law


@law
def test_negative_control_positions_that_count_padding_differ(kind, monkeypatch):
    """Without position ids from the mask, GPT-2's learned positions shift by the padding."""
    policy = random_gpt2(11, seed=1, kind=kind)
    network = policy.model.base_model
    forward = network.forward

    def without_positions(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    prompt, response = [3, 1], [4, 1, EOS]
    alone = policy.logps([prompt], [response])[0].item()
    monkeypatch.setattr(network, "forward", without_positions)
    padded = policy.logps([prompt, [1] * 9], [response, [1]])[0].item()
    assert abs(padded - alone) > 1e-3


@law
def test_the_eos_is_trained(kind):
    policy = random_gpt2(11, seed=1, kind=kind)
    tokens, _ = policy.token_logps([[1, 2]], [[3, EOS]])
    (-tokens[0, 1]).backward()  # the EOS's own term
    assert policy.model.lm_head.weight.grad[EOS].norm() > 0


@law
def test_policy_equals_reference_gives_exactly_zero_with_dropout_configured(kind):
    policy = random_gpt2(11, dropout=0.5, dtype=torch.float32, kind=kind)
    ref, rows = policy.frozen_copy(), ([[1, 2], [3]], [[4, 5, EOS], [6, EOS]])
    for module in (policy, torch.nn.ModuleList([policy])):  # asked itself, or as a part of what trains
        module.train()
        assert torch.equal(policy.logps(*rows), policy.logps(*rows))
        assert policy.reverse_kl(policy, *rows).eq(0).all()
        # a copy has the same numbers, but its products may be computed in another order
        assert torch.allclose(policy.logps(*rows), ref.logps(*rows), rtol=0, atol=1e-5)
        assert policy.reverse_kl(ref, *rows).abs().max() < 1e-5
    policy.model.train()  # negative control: in the model's own mode for training, dropout is there
    assert (policy.logps(*rows) - ref.logps(*rows)).abs().max() > 0.1
    assert not torch.equal(policy.logps(*rows), policy.logps(*rows))


@law
def test_reference_is_frozen_and_shares_no_storage(policy):
    ref = policy.frozen_copy()
    assert not any(p.requires_grad for p in ref.parameters()) and all(p.requires_grad for p in policy.parameters())
    ours, theirs = ({p.data_ptr() for p in network.parameters()} for network in (policy, ref))
    assert not ours & theirs


@law
def test_stored_reference_log_probs_equal_live_ones(policy, ref):
    pairs = [lm.Encoded([1, 2], [3, EOS], [4, 5, 6, EOS]), lm.Encoded([7], [EOS], [2, EOS])]
    stored = data.add_ref_logps(ref, pairs)
    assert [pair[:3] for pair in stored] == [pair[:3] for pair in pairs]
    for got, ours, live in zip(policy.logratios(stored), policy.pair_logps(pairs), ref.pair_logps(pairs)):
        assert torch.allclose(got, ours - live, atol=1e-5)


@law
def test_log_softmax_is_taken_in_float32_when_the_model_computes_in_bfloat16(kind):
    policy = random_gpt2(11, dtype=torch.float32, kind=kind)
    rows = [[1, 2, 3]] * 2, [[4, 5, EOS], [6, EOS]]
    exact = copy.deepcopy(policy).double().logps(*rows)
    low = copy.deepcopy(policy).bfloat16().logps(*rows)
    assert low.dtype == torch.float32
    assert torch.allclose(low.double(), exact, atol=0.5)  # what bfloat16 weights cost here


# ---- sampling


@law
def test_samples_are_from_the_softmax_whatever_generation_config_says(kind):
    """Chi-square over all 15 responses of at most 3 tokens, at two temperatures."""
    policy = random_gpt2(3, seed=5, kind=kind)
    config = policy.model.generation_config
    config.top_k, config.top_p, config.temperature, config.repetition_penalty, config.do_sample = 1, 0.1, 0.3, 5.0, True
    responses = [list(row) for n in (1, 2, 3) for row in itertools.product(range(3), repeat=n)
                 if EOS not in row[:-1] and (row[-1] == EOS or n == 3)]
    n = 10_000
    for temperature in (1.0, 0.7):
        tempered = copy.deepcopy(policy)
        with torch.no_grad():  # the head is tied to the embeddings: scale the final layer norm instead
            tempered.model.transformer.ln_f.weight /= temperature
            tempered.model.transformer.ln_f.bias /= temperature
        expected = tempered.logps([[1, 2]] * len(responses), responses).exp() * n
        drawn = policy.sample([[1, 2]] * n, 3, torch.Generator().manual_seed(0), temperature)
        times = Counter(map(tuple, drawn))
        counts = torch.tensor([times[tuple(row)] for row in responses])
        assert counts.sum() == n, "every sample is one of the possible responses"
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        assert chi2 < 14 + 5 * math.sqrt(2 * 14), f"chi-square {chi2:.1f} for 14 degrees of freedom"
    # negative control: at the wrong temperature the same counts are impossible
    wrong = policy.logps([[1, 2]] * len(responses), responses).exp() * n
    assert ((counts - wrong) ** 2 / wrong).sum() > 14 + 5 * math.sqrt(2 * 14)


@law
def test_a_sample_is_cut_after_its_first_eos_or_at_the_limit(kind):
    policy = random_gpt2(11, seed=6, kind=kind)
    rows = policy.sample([[1], [2, 3, 4, 5], [6, 7]] * 50, 5, torch.Generator().manual_seed(0))
    assert all(EOS not in row[:-1] for row in rows)
    assert all(row[-1] == EOS or len(row) == 5 for row in rows)
    assert {len(row) for row in rows} >= {1, 5}, "both ways to end must occur in this test"


@law
def test_same_seed_same_samples_other_seed_others(kind):
    policy = random_gpt2(11, seed=1, kind=kind)
    first, again, other = (policy.sample([[1, 2]] * 20, 8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first == again != other


@law
def test_sampling_stops_when_all_rows_are_done(kind):
    policy, calls = random_gpt2(11, seed=8, kind=kind), []
    norm = policy.model.transformer.ln_f
    torch.nn.init.zeros_(norm.weight)
    torch.nn.init.zeros_(norm.bias)  # uniform: EOS comes with probability 1/11
    norm.register_forward_hook(lambda *call: calls.append(1))
    row, = policy.sample([[1]], 63, torch.Generator().manual_seed(0))
    assert len(calls) == len(row) < 63


@law
@given(st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 3.0]), min_size=1, max_size=9).filter(any),
       st.lists(st.floats(0, 1, exclude_max=True), max_size=9), st.sampled_from([0.7, 1.0]))
def test_draw_inverts_the_distribution_function_and_never_says_what_has_probability_0(weights, numbers, temperature):
    weights = torch.tensor(weights, dtype=torch.float64)
    uniform = torch.tensor([0.0, 1 - 2**-24, *numbers], dtype=torch.float64)  # the ends of what torch.rand gives
    logits = temperature * weights.log().expand(len(uniform), -1)
    drawn, cdf = lm.draw(logits, uniform, temperature), (weights / weights.sum()).cumsum(0)
    assert (weights[drawn] > 0).all()
    assert (cdf[drawn] >= 1 - uniform - 1e-9).all()
    assert ((cdf - weights / weights.sum())[drawn] <= 1 - uniform + 1e-9).all()


@law
def test_every_token_of_a_vocabulary_of_152_000_can_be_drawn():
    """In float32 a third of them could not: their share of the distribution function is below its rounding."""
    logits = 3 * torch.randn(1, 151_936, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)[0]
    lost = (probabilities.cumsum(-1).diff() == 0).nonzero().squeeze(1) + 1
    assert len(lost) > 10_000, "negative control"
    probabilities = probabilities.double() / probabilities.double().sum()
    for token in lost[::len(lost) // 50]:
        middle = probabilities[:token].sum() + probabilities[token] / 2  # of its part of (0, 1]
        assert lm.draw(logits, (1 - middle)[None]) == token


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_stops_the_draw(bad):
    logits = torch.tensor([[0.0, 1.0], [0.0, bad]])
    with pytest.raises(FloatingPointError, match="a logit is NaN or infinite"):
        lm.draw(logits, torch.zeros(2, dtype=torch.float64))
    assert lm.draw(torch.tensor([[0.0, -math.inf]]), torch.zeros(1, dtype=torch.float64)) == 0, "of probability 0"


# ---- text


@pytest.fixture(scope="module")
def words():
    return lm.word_tokenizer(["The plot was", " dull, and slow.", " never fresh"])


@law
def test_prompt_and_response_are_tokenised_apart_and_join_to_the_text(words):
    policy = random_gpt2(words)
    prompt, response = policy.encode_prompt("The plot was"), policy.encode_response(" never dull.", 99)
    assert words.decode(prompt + response, skip_special_tokens=True) == "The plot was never dull."
    assert policy.decode(response) == " never dull."
    assert policy.encode_prompt("") == [EOS], "an empty prompt still needs a token to predict from"


@law
@given(st.integers(1, 9))
def test_exactly_one_eos_at_the_end_unless_cut(words, limit):
    policy = random_gpt2(words)
    whole = policy.encode_response(" dull, and slow.", 99)
    assert whole.count(EOS) == 1 and whole[-1] == EOS
    cut = policy.encode_response(" dull, and slow.", limit)
    assert cut == whole[:limit] and (limit >= len(whole)) == (EOS in cut)


# ---- load and save


def test_saved_policy_is_an_ordinary_transformers_directory(tmp_path, words, kind):
    policy, directory = random_gpt2(words, dtype=torch.float32, kind=kind), tmp_path / "policy"
    policy.save(directory, "# A card")
    again = kind.load(str(directory))
    assert type(again) is kind and again.source == str(directory)
    assert isinstance(AutoTokenizer.from_pretrained(directory), PreTrainedTokenizerFast)
    AutoModelForCausalLM.from_pretrained(directory)
    rows = [[1, 2]], [[3, EOS]]
    assert torch.allclose(policy.logps(*rows), again.logps(*rows), atol=1e-5)  # its gelu is one kernel now
    assert again.encode_prompt("The plot") == policy.encode_prompt("The plot")
    assert (directory / "README.md").read_text() == "# A card"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"], "no half-written directory is left"
    assert not [path for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_loaded_weights_are_copied_into_storage_of_our_own(tmp_path, words, kind, monkeypatch):
    """In a mapped file they may lie at an odd address, and products then round otherwise."""
    random_gpt2(words, dtype=torch.float32).save(tmp_path / "policy")
    from_pretrained, loaded = AutoModelForCausalLM.from_pretrained, []

    def watched(*args, **kwargs):
        loaded.append(from_pretrained(*args, **kwargs))
        return loaded[-1]  # the model, and what was found while it was loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    policy = kind.load(str(tmp_path / "policy"))
    ((as_loaded, _),), ours = loaded, policy.model
    assert all(torch.equal(a, b) for a, b in zip(as_loaded.parameters(), ours.parameters(), strict=True))
    theirs, own = ({p.untyped_storage().data_ptr() for p in model.parameters()} for model in (as_loaded, ours))
    assert not theirs & own


def test_a_model_that_is_not_here_is_one_clear_sentence(tmp_path, monkeypatch):
    def no_hub(self, name, repo_type, timeout):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(lm.HfApi, "repo_info", no_hub)
    with pytest.raises(lm.Refused, match=r"^no-such/model is not a directory here.*hub.*\(no route\); name a"):
        lm.LM.load("no-such/model")
    with pytest.raises(lm.Refused, match="does not hold a causal language model"):
        lm.LM.load(str(tmp_path))


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_policy_is_saved_in_its_sources_dtype_and_as_the_users_umask_says(tmp_path, words, umask, mode):
    random_gpt2(words, dtype=torch.float32).model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    words.save_pretrained(tmp_path / "source")
    policy, before = lm.LM.load(str(tmp_path / "source")), os.umask(umask)
    try:
        policy.save(tmp_path / "policy")
        assert os.umask(umask) == umask, "it is left as it was"
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "policy").iterdir()} == {mode}
    saved = load_file(tmp_path / "policy" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16} and "lm_head.weight" not in saved, "tied"
    assert policy.model.dtype == lm.LM.load(str(tmp_path / "policy")).model.dtype == torch.float32


@pytest.mark.parametrize("what", ["bin", "adapter"])
def test_the_line_that_converts_or_merges_does_so(tmp_path, words, what, monkeypatch):
    policy = random_gpt2(words, dtype=torch.float32)
    policy.save(tmp_path / "policy")
    if what == "bin":
        torch.save(policy.model.state_dict(), tmp_path / "policy" / "pytorch_model.bin")
        (tmp_path / "policy" / "model.safetensors").unlink()
        refused, words_in_it = tmp_path / "policy", "may run code when it is read"
    else:
        peft = pytest.importorskip("peft")
        refused, words_in_it = tmp_path / "adapter", "holds a PEFT adapter"
        adapted = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "policy"), peft.LoraConfig(init_lora_weights=False))
        adapted.save_pretrained(refused)
        policy.tokenizer.save_pretrained(refused)
    with pytest.raises(lm.Refused, match=words_in_it) as error:
        lm.LM.load(str(refused))
    monkeypatch.chdir(tmp_path)
    exec(str(error.value).partition('python -c "')[2].rstrip('"'), {})
    new = lm.LM.load("NEW")
    same = torch.allclose(new.logps([[1, 2]], [[3, 4]]), policy.logps([[1, 2]], [[3, 4]]))
    assert same == (what == "bin"), "an adapter changes the model"


def test_a_copy_of_a_hub_model_loads_at_once_without_the_hub(tmp_path, words, monkeypatch):
    copied = tmp_path / "models--some--model" / "snapshots" / "abc"
    random_gpt2(words, dtype=torch.float32).save(copied)
    (copied.parent.parent / "refs").mkdir()
    (copied.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = []

    def no_hub(self, name, repo_type, timeout):
        asked.append(timeout)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(lm.HfApi, "repo_info", no_hub)
    assert lm.LM.load("some/model").source == "some/model"
    assert len(asked) == 1 and asked[0] <= 5, "the hub is asked once, and not for long"
    with pytest.raises(lm.Refused, match="the hub did not give the model"):
        lm.LM.load("some/other")


def test_a_tokenizer_without_an_eos_is_refused(tmp_path, words):
    random_gpt2(words).save(tmp_path / "policy")
    PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer).save_pretrained(tmp_path / "policy")
    with pytest.raises(lm.Refused, match="no EOS token, so a response could not end"):
        lm.LM.load(str(tmp_path / "policy"))


def test_tiny_is_made_once_for_each_world_and_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(data.TINY_SFT, "steps", 3)
    corpus = [("The plot was", " dull."), ("The plot was", " fresh.")] * 20
    monkeypatch.setattr(world, "sft_corpus", lambda: corpus)
    first = data.tiny_directory()
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert data.tiny_directory() == first and (first / "model.safetensors").stat().st_mtime_ns == made
    others = [data.tiny_directory(width=32)]
    with monkeypatch.context() as patch:
        patch.setitem(data.TINY_SFT, "steps", 4)
        others.append(data.tiny_directory())
    changed = tmp_path / "world.py"
    changed.write_text(Path(world.__file__).read_text(encoding="utf-8") + "# another world", encoding="utf-8")
    monkeypatch.setattr(world, "__file__", str(changed))
    others.append(data.tiny_directory())
    assert len({first, *others}) == 4


def test_sft_teaches_a_text(words, kind):
    policy = random_gpt2(words, dtype=torch.float32, kind=kind)
    row = [policy.encode_prompt("The plot was")], [policy.encode_response(" never dull.", 9)]
    before = policy.logps(*row).item()
    lm.sft(policy, [("The plot was", " never dull.")], steps=60, batch_size=2, lr=1e-2, seed=0)
    assert policy.logps(*row).item() > -0.1 > before
