"""What saves memory changes no gradient: parts of a batch, recomputed layers, frozen lower layers."""

import itertools
import warnings
from argparse import Namespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import OPTConfig, OPTForCausalLM

import dpo
import lm
from models import ARCHITECTURES, TOLERANCE, random_gpt2, random_model

EOS = 0
tokens = st.lists(st.integers(1, 10), min_size=1, max_size=6)
rows = st.lists(st.tuples(tokens, tokens, tokens), min_size=2, max_size=5)


def flags(**changes):
    return Namespace(**{**dict(train_layers=None, micro_batch=None, gradient_checkpointing=None), **changes})


def gradient(model, loss) -> torch.Tensor:
    """All gradients in one vector, zeros where there is none."""
    model.zero_grad()
    loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def preference_loss(model, triples):
    """A DPO loss: it couples the rows of a pair, which may be in different parts."""
    pairs = [dict(zip(("prompt", "chosen", "rejected"), triple)) for triple in triples]
    return dpo.dpo_loss(*lm.pair_logps(model, pairs), beta=0.3).mean()


def kept_bytes(compute) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, each storage once, parameters included."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}), x)[1],
            lambda x: x):
        compute()
    return sum(kept.values())


# ---------------------------------------------------------------------------------------------------
# --micro-batch

@given(rows, st.integers(1, 7))
def test_parts_give_the_values_and_the_gradient_of_the_whole_batch(triples, n):
    model = random_gpt2(11, seed=1)
    whole, whole_gradient = preference_loss(model, triples), gradient(model, preference_loss(model, triples))
    lm.fit_in_memory(model, flags(micro_batch=n))
    parts = preference_loss(model, triples)
    assert torch.allclose(parts, whole, atol=1e-12)
    assert torch.allclose(gradient(model, parts), whole_gradient, atol=1e-10)


def test_averaging_the_parts_own_means_is_another_gradient():
    """The usual mistake: parts of 3 and of 1 pairs count the same, and so do their tokens."""
    model = random_gpt2(11, seed=1)
    triples = [([1, 2], [3], [4, 5]), ([2], [6, 1], [3]), ([5], [1], [2, 2]), ([7], [8], [9])]
    whole = gradient(model, preference_loss(model, triples))
    naive = gradient(model, (preference_loss(model, triples[:3]) + preference_loss(model, triples[3:])) / 2)
    assert (naive - whole).norm() > 0.05 * whole.norm()


@given(rows, st.integers(1, 4))
def test_scores_come_back_in_order_too(triples, n):
    scorer = lm.make_scorer(random_gpt2(11, seed=1))
    torch.nn.init.normal_(scorer.score.weight)
    prompts, responses, _ = map(list, zip(*triples))
    whole, mask = lm.scores(scorer, prompts, responses)
    again, again_mask = lm.scores(lm.fit_in_memory(scorer, flags(micro_batch=n)), prompts, responses)
    assert torch.equal(mask, again_mask)
    used = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)  # after the prompt and after each token
    assert torch.allclose(whole[used], again[used], atol=1e-12)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "bo2"])
def test_training_in_parts_ends_at_the_same_policy(loss, tmp_path):
    """Five steps of AdamW as with one large batch. In float64: some gradients are 0, as that of the keys' bias, and
    AdamW makes whole steps of their rounding errors if these are not far below its eps."""
    pairs = [dict(prompt=[1] * (1 + i % 3), chosen=[2 + i % 7] * (1 + i % 5), rejected=[9 - i % 7] * (1 + i % 4))
             for i in range(8)]
    ends = []
    for n in (None, 3):
        args = flags(micro_batch=n)
        for name, value in dict(lr=1e-4, steps=5, eval_every=5, beta=0.3, loss=loss, length_average=False, resume=False,
                                max_grad_norm=1.0, out=tmp_path / str(n), device="cpu").items():
            setattr(args, name, value)
        args.out.mkdir()
        policy = lm.fit_in_memory(random_gpt2(11, seed=1), args)
        ready = lm.add_ref_logps(lm.frozen_copy(policy), pairs)
        dpo.train(policy, lambda step, ready=ready: ready, lambda policy: {}, args)
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    start = torch.cat([p.detach().flatten() for p in random_gpt2(11, seed=1).parameters()])
    assert (ends[0] - start).abs().max() > 1e-4, "five steps move the weights"
    assert (ends[0] - ends[1]).abs().max() < 1e-8


def test_parts_and_checkpointing_keep_less():
    triples = [([1, 2, 3], [4, 5, 6, 7, 8], [9, 8, 7, 6])] * 16
    kept = {}
    for name, change in dict(whole={}, parts=dict(micro_batch=4), layers=dict(gradient_checkpointing=True)).items():
        model = lm.fit_in_memory(random_gpt2(11, seed=1), flags(**change))
        kept[name] = kept_bytes(lambda model=model: preference_loss(model, triples))
    assert kept["parts"] < 0.2 * kept["whole"] and kept["layers"] < 0.5 * kept["whole"], kept


# ---------------------------------------------------------------------------------------------------
# --gradient-checkpointing, --train-layers

@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputed_layers_give_the_same_gradient_without_dropout(architecture):
    model, triples = random_model(architecture, 11), [([1, 2], [3], [4, 5]), ([2], [6, 1, 4], [3])]
    plain = gradient(model, preference_loss(model, triples))
    assert model.training, "dropout is configured, and on except in our log-probs"
    lm.fit_in_memory(model, flags(gradient_checkpointing=True))
    assert torch.allclose(gradient(model, preference_loss(model, triples)), plain, atol=1e-10)
    lm.fit_in_memory(model, flags(gradient_checkpointing=True, micro_batch=3))  # other rows meet in a batch
    assert torch.allclose(gradient(model, preference_loss(model, triples)), plain, atol=TOLERANCE[architecture])


def test_dropout_stays_off_where_a_layer_asks_its_own_mode():
    """OPT's layers drop by their own training flag, which transformers' switch for checkpointing needs to be set."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(
        vocab_size=11, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32, init_std=0.4, dropout=0.5)).double()
    triples = [([1, 2], [3], [4, 5]), ([2], [6, 1, 4], [3])]
    plain = gradient(model.train(), preference_loss(model, triples))
    lm.fit_in_memory(model, flags(gradient_checkpointing=True))
    assert torch.allclose(gradient(model, preference_loss(model, triples)), plain, atol=1e-10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointing_leaves_sampling_alone(architecture):
    """transformers' switch drops the key-value cache of a layer that is checkpointed."""
    model = random_model(architecture, 11)
    draw = lambda: lm.sample(model, [[1, 2], [3]], 6, EOS, torch.Generator().manual_seed(0))  # noqa: E731
    before = draw()
    lm.fit_in_memory(model, flags(gradient_checkpointing=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw() == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_last_layers_train(architecture):
    model = random_model(architecture, 11)
    triples = [([1, 2], [3], [4, 5])]
    full = gradient(model, preference_loss(model, triples))
    frozen = gradient(lm.fit_in_memory(model, flags(train_layers=1)), preference_loss(model, triples))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".1." in name or "norm" in name or "ln_f" in name or "head" in name or "embed_out" in name
               for name in trained), trained
    assert any(".1." in name for name in trained) and not any(".0." in name for name in trained)
    sizes = [p.numel() for p in model.parameters()]
    for (_, p), whole, part in zip(model.named_parameters(), full.split(sizes), frozen.split(sizes)):
        assert torch.allclose(part, whole, atol=1e-10) if p.requires_grad else not part.any()


def test_a_value_head_is_trained_whatever_is_frozen():
    scorer = lm.fit_in_memory(lm.make_scorer(random_gpt2(11)), flags(train_layers=1))
    trained = [name for name, p in scorer.named_parameters() if p.requires_grad]
    assert "score.weight" in trained and not any(name.startswith("transformer.w") for name in trained)


def test_more_layers_than_there_are_is_a_sentence():
    with pytest.raises(ValueError, match="--train-layers 3: this model has 2 layers"):
        lm.fit_in_memory(random_gpt2(11), flags(train_layers=3))


def test_the_flags_combine():
    model, triples = random_gpt2(11, seed=1), [([1, 2], [3], [4, 5]), ([2], [6, 1], [3])]
    expected = gradient(lm.fit_in_memory(model, flags(train_layers=1)), preference_loss(model, triples))
    for n, checkpointing in itertools.product((1, 3), (None, True)):
        lm.fit_in_memory(model, flags(train_layers=1, micro_batch=n, gradient_checkpointing=checkpointing))
        assert torch.allclose(gradient(model, preference_loss(model, triples)), expected, atol=1e-10)
