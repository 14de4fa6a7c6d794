"""fast.py computes what lm.py's plain forms compute: log-probs, gradients, scores, and samples draw by draw."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import fast
import lm
from models import ARCHITECTURES, TOLERANCE, random_gpt2, random_model

EOS = 0
KNOWN = [name for name in ARCHITECTURES if name in fast.ARCHITECTURES]
MODELS = {name: random_model(name, 11, seed=1).eval() for name in KNOWN}  # float64
each = pytest.mark.parametrize("architecture", KNOWN)

tokens = st.integers(0, 10)  # 0 is the EOS and also the padding
prompts = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=4)
# some prompts, and up to 12 responses to any of them: pairs, k samples, the same prompt again later
batches = prompts.flatmap(lambda prompts: st.lists(st.tuples(
    st.sampled_from(prompts), st.lists(tokens, min_size=1, max_size=9)), min_size=1, max_size=12)).map(
    lambda batch: tuple(map(list, zip(*batch))))


def gradient(model, value) -> torch.Tensor:
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for p, g in zip(model.parameters(), grads)])


# ---------------------------------------------------------------------------------------------------
# log-probs and scores


@each
@given(batches, st.integers(0, 99))
def test_log_probs_and_their_gradient_are_those_of_the_plain_form(architecture, batch, seed):
    model = MODELS[architecture]
    plain, plain_mask = lm._token_logps(model, *batch)
    quick, mask = fast.token_logps(model, *batch)
    assert torch.equal(mask, plain_mask) and torch.allclose(quick, plain, atol=TOLERANCE[architecture])
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed), dtype=plain.dtype)
    difference = gradient(model, (weights * quick).sum()) - gradient(model, (weights * plain).sum())
    assert difference.abs().max() < 10 * TOLERANCE[architecture]


@each
@given(batches)
def test_scores_are_those_of_the_plain_form(architecture, batch):
    scorer = lm.make_scorer(MODELS[architecture])
    torch.nn.init.ones_(scorer.score.weight)
    plain, plain_mask = lm._scores(scorer, *batch)
    quick, mask = fast.scores(scorer, *batch)
    assert torch.equal(mask, plain_mask) and quick.shape == plain.shape
    read = torch.arange(plain.shape[1]) <= mask.sum(1, keepdim=True)  # behind the last token they mean nothing
    assert torch.allclose(quick[read], plain[read], atol=1e-5)  # scores are float32


@given(batches, st.integers(1, 40), st.booleans())
def test_every_response_stands_once_behind_its_own_prompt_in_rows_of_the_width(batch, width, last):
    rows = fast.plant(*batch, width)
    placed = [(i, prompt) for row in rows for prompt, members in row for i in members]
    assert sorted(i for i, _ in placed) == list(range(len(batch[0])))
    assert all(prompt == batch[0][i] for i, prompt in placed)
    sizes = [[len(p) + sum(len(batch[1][i]) for i in members) for p, members in row] for row in rows]
    longest = max(len(prompt) + len(response) for prompt, response in zip(*batch))
    assert all(len(row) for row in rows) and max(map(max, sizes)) <= max(width, longest)
    # Graham 1969: no row is longer than the mean by more than one tree
    assert max(map(sum, sizes)) < sum(map(sum, sizes)) / len(rows) + max(map(max, sizes)) + 1
    packed = fast.pack(*batch, width, "cpu", last)
    assert len(packed.where) == sum(map(len, batch[1])) + last * len(batch[1])


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

    model = MODELS["gpt2"]
    batch = [[1, 2], [1, 2], [3]], [[4, 5, EOS], [6, 7, EOS], [8, 9, EOS]]
    right, _ = fast.token_logps(model, *batch)
    monkeypatch.setattr(fast, "pack", wrong)
    assert (fast.token_logps(model, *batch)[0] - right).abs().max() > 1e-2


def test_the_heads_gradient_is_that_of_log_softmax():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    ids = torch.tensor([0, 6, 2, 2, 5])
    assert torch.autograd.gradcheck(fast.TokenLogps.apply, (hidden, weight, ids))
    plain = (hidden @ weight.T).log_softmax(1).gather(1, ids[:, None]).squeeze(1)
    assert torch.allclose(fast.TokenLogps.apply(hidden, weight, ids), plain)
    far = fast.TokenLogps.apply(hidden * 1e3, weight * 1e3, ids)
    assert far.isfinite().all() and far.min() < -1e5, "nothing over- or underflows"
    frozen = fast.TokenLogps.apply(hidden, weight.detach(), ids).sum()
    assert torch.allclose(torch.autograd.grad(frozen, hidden)[0], torch.autograd.grad(plain.sum(), hidden)[0])


@pytest.mark.parametrize("form", [lm._token_logps, fast.token_logps])
def test_under_autocast_log_probs_are_float32_and_their_gradient_is_near_the_exact_one(form):
    model = random_gpt2(11, seed=1, dtype=torch.float32).eval()
    batch = [[1, 2], [1, 2]], [[3, 4, EOS], [5, 6, 7, EOS]]
    exact = gradient(model, form(model, *batch)[0].sum())
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logps, _ = form(model, *batch)
    assert logps.dtype == torch.float32
    assert 0 < (gradient(model, logps.sum()) - exact).norm() < 0.05 * exact.norm()


def test_other_models_take_the_plain_forms():
    assert all(map(fast.knows, MODELS.values()))
    eager = AutoModelForCausalLM.from_config(MODELS["gpt2"].config, attn_implementation="eager")
    windows = MODELS["qwen2"].config.__class__(**{
        **MODELS["qwen2"].config.to_dict(), "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0,
        "layer_types": None})
    for model in (eager, AutoModelForCausalLM.from_config(windows), random_model("gemma3_text", 11)):
        assert not fast.knows(model)


# ---------------------------------------------------------------------------------------------------
# sampling


@each
@given(prompts, st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 99), st.sampled_from([0.7, 1.0]))
def test_samples_are_those_of_the_plain_form_token_by_token(architecture, prompts, which, seed, temperature):
    asked = [prompts[i % len(prompts)] for i in which]
    plain, quick = (function(MODELS[architecture], asked, 7, EOS, torch.Generator().manual_seed(seed), temperature)
                    for function in (lm._sample_batch, fast.sample_batch))
    cut = lambda rows: [row[:row.index(EOS) + 1] if EOS in row else row for row in rows]  # noqa: E731
    assert cut(quick) == cut(plain)


@given(st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 3.0]), min_size=1, max_size=9).filter(any),
       st.lists(st.floats(2**-24, 1.0), min_size=1, max_size=9))
def test_draw_inverts_the_distribution_function_and_never_says_what_has_probability_0(weights, numbers):
    weights, u = torch.tensor(weights, dtype=torch.float64), torch.tensor([2**-24, 1.0, *numbers], dtype=torch.float64)
    drawn = fast.draw(weights.log().expand(len(u), -1), u[:, None])
    cdf = (weights / weights.sum()).cumsum(0)
    assert (weights[drawn] > 0).all()
    assert (cdf[drawn] >= u - 1e-9).all() and ((cdf - weights / weights.sum())[drawn] <= u + 1e-9).all()


def test_uniform_numbers_are_never_0():
    numbers = fast.uniform(100_000, torch.Generator().manual_seed(0), torch.zeros(1))
    assert numbers.min() > 0 and numbers.max() <= 1 and abs(numbers.mean() - 0.5) < 0.01


def test_weights_are_cast_once_under_autocast_and_put_back():
    model = random_gpt2(11, seed=1, dtype=torch.float32).eval()
    layer = model.transformer.h[0].mlp.c_fc
    before, draws = layer.weight.data, []
    for cast in (fast.weights_cast_once, contextlib.nullcontext):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), cast(model):
            if cast is fast.weights_cast_once:
                assert layer.weight.dtype == torch.bfloat16 and model.transformer.wte.weight.dtype == torch.float32
            draws.append(fast.sample_batch(model, [[1], [2]] * 20, 7, EOS, torch.Generator().manual_seed(0), 1.0))
    assert draws[0] == draws[1], "the same numbers, rounded once or in every step"
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16), fast.weights_cast_once(model):
        raise RuntimeError
    assert layer.weight.data_ptr() == before.data_ptr()
