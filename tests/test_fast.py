"""FastLM gives what LM gives: log-probs, gradients, and samples token by token."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import fast
import lm
from models import ARCHITECTURES, TOLERANCE, gradient, random_gpt2, random_model

pytestmark = pytest.mark.law
EOS = 0
FAST = {name: random_model(name, 11, seed=1) for name in ARCHITECTURES if name in fast.ARCHITECTURES}  # float64
PLAIN = {name: lm.LM(policy.model, policy.tokenizer) for name, policy in FAST.items()}  # of the same weights
each = pytest.mark.parametrize("architecture", FAST)
half = settings(max_examples=settings.default.max_examples // 2)  # for what is repeated for each architecture

tokens = st.integers(0, 10)  # 0 is the EOS and also the padding
prompts = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=4)
# some prompts, and up to 12 responses to any of them: pairs, k samples, the same prompt again later
batches = prompts.flatmap(lambda prompts: st.lists(st.tuples(
    st.sampled_from(prompts), st.lists(tokens, min_size=1, max_size=9)), min_size=1, max_size=12)).map(
    lambda batch: tuple(map(list, zip(*batch))))


# ---- log-probs


@each
@half
@given(batches, st.integers(0, 99), st.sampled_from([None, 1, 3]))
def test_log_probs_and_their_gradient_are_those_of_the_plain_form(architecture, batch, seed, micro_batch):
    plain, plain_mask = PLAIN[architecture].token_logps(*batch)
    policy = fast.FastLM(FAST[architecture].model, FAST[architecture].tokenizer, micro_batch)
    quick, mask = policy.token_logps(*batch)
    assert torch.equal(mask, plain_mask) and torch.allclose(quick, plain, rtol=0, atol=TOLERANCE[architecture])
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed), dtype=plain.dtype)
    difference = gradient((weights * (quick - plain)).sum(), policy)
    assert difference.abs().max() < 10 * TOLERANCE[architecture]


@given(batches, st.integers(1, 40))
def test_every_response_stands_once_behind_its_own_prompt_in_rows_of_the_width(batch, width):
    rows = fast.plant(*batch, width)
    placed = [(i, prompt) for row in rows for prompt, members in row for i in members]
    assert sorted(i for i, _ in placed) == list(range(len(batch[0])))
    assert all(prompt == batch[0][i] for i, prompt in placed)
    sizes = [[len(p) + sum(len(batch[1][i]) for i in members) for p, members in row] for row in rows]
    longest = max(len(prompt) + len(response) for prompt, response in zip(*batch))
    assert all(len(row) for row in rows) and max(map(max, sizes)) <= max(width, longest)
    # Graham 1969: no row is longer than the mean by more than one tree
    assert max(map(sum, sizes)) < sum(map(sum, sizes)) / len(rows) + max(map(max, sizes)) + 1
    packed = fast.pack(*batch, "cpu")
    assert len(set(packed.where.tolist())) <= len(packed.where) == sum(map(len, batch[1]))


@pytest.mark.parametrize("mistake", ["responses of a prompt see each other", "trees of a row see each other",
                                     "positions go on from the response before"])
def test_negative_controls_of_the_mask_and_the_positions(mistake, monkeypatch):
    pack = fast.pack

    def wrong(*args):
        packed = pack(*args)
        W = packed.ids.shape[1]
        causal = torch.ones(W, W, dtype=torch.bool).tril()
        same_tree = packed.mask.double() @ packed.mask.double().mT > 0  # two tokens that see a third
        return packed._replace(**{
            "responses of a prompt see each other": dict(mask=same_tree & causal),
            "trees of a row see each other": dict(mask=packed.mask | (~same_tree & causal)),
            "positions go on from the response before": dict(positions=torch.arange(W).expand_as(packed.ids)),
        }[mistake])

    policy = FAST["gpt2"]
    batch = [[1, 2], [1, 2], [3]], [[4, 5, EOS], [6, EOS], [8, EOS]]
    assert len(pack(*batch, "cpu").ids) == 1, "two trees in a row"
    right, _ = policy.token_logps(*batch)
    monkeypatch.setattr(fast, "pack", wrong)
    assert (policy.token_logps(*batch)[0] - right).abs().max() > 1e-2


def test_under_autocast_log_probs_are_float32_and_their_gradient_is_near_the_exact_one(kind):
    policy = random_gpt2(11, seed=1, dtype=torch.float32, kind=kind)
    batch = [[1, 2], [1, 2]], [[3, 4, EOS], [5, 6, 7, EOS]]
    exact = gradient(policy.logps(*batch).sum(), policy)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logps = policy.logps(*batch)
    assert logps.dtype == torch.float32
    assert 0 < (gradient(logps.sum(), policy) - exact).norm() < 0.05 * exact.norm()


def test_other_models_take_the_plain_forms():
    configs = {name: policy.model.config for name, policy in FAST.items()}
    assert all(map(fast.knows, configs.values())) and set(configs) == fast.ARCHITECTURES
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(configs["gpt2"]), attn_implementation="eager")
    windows = AutoModelForCausalLM.from_config(type(configs["qwen2"])(**{
        **configs["qwen2"].to_dict(), "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0,
        "layer_types": None}))
    for model in (eager, windows, random_model("gemma3_text", 11).model):
        assert not fast.knows(model.config)


# ---- sampling


@each
@half
@given(prompts, st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 99), st.sampled_from([0.7, 1.0]))
def test_samples_are_those_of_the_plain_form_token_by_token(architecture, prompts, which, seed, temperature):
    asked = [prompts[i % len(prompts)] for i in which]
    plain, quick = (forms[architecture].sample(asked, 7, torch.Generator().manual_seed(seed), temperature)
                    for forms in (PLAIN, FAST))
    assert quick == plain


@pytest.mark.parametrize("architecture", FAST)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])
def test_samples_of_a_replayed_token_are_those_of_the_plain_form(architecture, device, monkeypatch):
    """On a CPU its work is done again, where a GPU replays it."""
    if device == "cpu":
        monkeypatch.setattr(fast, "recorded", lambda work: work)
        monkeypatch.setattr(fast.FastLM, "write", fast.FastLM.replay)
    asked = [[1, 2], [3], [4, 5, 6, 7], [1, 2]] * 5
    plain, quick = (copy.deepcopy(forms[architecture]).to(device) for forms in (PLAIN, FAST))
    for longest, temperature in ((1, 1.0), (2, 1.0), (20, 0.7), (20, 1.0)):
        one, other = (policy.sample(asked, longest, torch.Generator(device).manual_seed(0), temperature)
                      for policy in (plain, quick))
        assert one == other
    assert 1 < len({len(row) for row in other}), "some end before the others"


def test_samples_do_not_depend_on_how_the_rows_are_batched(monkeypatch):
    """Responses end early here and there: neither form may give a later batch other numbers for that."""
    asked = [[1, 2], [3], [4, 5, 6]] * 40
    found = []
    for policy in (PLAIN["gpt2"], FAST["gpt2"]):
        for batch_size in (6, 64):
            monkeypatch.setattr(policy, "batch_size", batch_size)
            found.append(policy.sample(asked, 30, torch.Generator().manual_seed(0)))
    assert found == [found[0]] * 4 and len({len(row) for row in found[0]}) > 5


class Casts(TorchDispatchMode):
    """Counts how often each of some tensors is cast."""

    def __init__(self, tensors):
        super().__init__()
        self.times = {tensor.data_ptr(): 0 for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.times:
            self.times[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def test_under_autocast_sampling_casts_a_weight_once_and_forgets_it():
    policy = random_gpt2(11, seed=1, dtype=torch.float32)
    plain = lm.LM(policy.model, policy.tokenizer)
    weight = policy.model.transformer.h[0].mlp.c_fc.weight

    def draw(policy):
        return policy.sample([[1], [2]] * 20, 7, torch.Generator().manual_seed(0))

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with Casts([weight]) as casts:
            before = draw(policy)
        assert casts.times == {weight.data_ptr(): 1}
        assert before == draw(plain), "the same numbers, rounded once or in every step"
        with torch.no_grad():  # as a training step moves it
            weight.mul_(-1)
        assert draw(policy) == draw(plain) != before
        assert torch.autograd.grad(policy.logps([[1]], [[2]]).sum(), weight)[0].any(), "and it can still be trained"
