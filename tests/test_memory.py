"""What saves memory changes no gradient: parts of a batch, recomputed layers, frozen lower layers."""

import itertools
import warnings
from argparse import Namespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, OPTConfig, OPTForCausalLM

import data
import dpo
import lm
from models import ARCHITECTURES, TOLERANCE, gradient, letters, random_gpt2, random_model

law = pytest.mark.law
EOS = 0
tokens = st.lists(st.integers(1, 10), min_size=1, max_size=6)
rows = st.lists(st.tuples(tokens, tokens, tokens), min_size=2, max_size=5)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
TRIPLES = [([1, 2], [3], [4, 5]), ([2], [6, 1, 4], [3])]


def preference_loss(policy, triples):
    """A DPO loss: it couples the rows of a pair, which may be in different parts."""
    return dpo.dpo_loss(*policy.pair_logps([lm.Encoded(*triple) for triple in triples]), beta=0.3).mean()


def loss_gradient(policy, triples=TRIPLES) -> torch.Tensor:
    return gradient(preference_loss(policy, triples), policy)


def kept_bytes(compute) -> int:
    """Bytes that autograd keeps of a forward pass for the backward pass, each storage once, parameters included."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = compute()  # held, or its storages could be used again
    del value
    return sum(kept.values())


# ---- --micro-batch

@law
@given(rows, st.integers(1, 7))
def test_parts_give_the_values_and_the_gradient_of_the_whole_batch(kind, triples, n):
    policy = random_gpt2(11, seed=1, kind=kind)
    whole = preference_loss(policy, triples)
    policy.micro_batch = n
    parts = preference_loss(policy, triples)
    assert torch.allclose(parts, whole, atol=1e-12)
    assert torch.allclose(gradient(parts, policy), gradient(whole, policy), atol=1e-10)


@law
def test_averaging_the_parts_own_means_is_another_gradient():
    """The usual mistake: parts of 3 and of 1 pairs count the same, and so do their tokens."""
    policy = random_gpt2(11, seed=1)
    triples = [([1, 2], [3], [4, 5]), ([2], [6, 1], [3]), ([5], [1], [2, 2]), ([7], [8], [9])]
    whole = loss_gradient(policy, triples)
    naive = (loss_gradient(policy, triples[:3]) + loss_gradient(policy, triples[3:])) / 2
    assert (naive - whole).norm() > 0.05 * whole.norm()


@law
@given(rows, st.integers(1, 4))
def test_scores_come_back_in_order_too(triples, n):
    scorer = lm.Scorer.of(random_gpt2(11, seed=1))
    torch.nn.init.normal_(scorer.model.score.weight, generator=torch.Generator().manual_seed(0))
    prompts, responses, _ = map(list, zip(*triples))
    whole, mask = scorer.scores(prompts, responses)
    scorer.micro_batch = n
    again, again_mask = scorer.scores(prompts, responses)
    assert torch.equal(mask, again_mask)
    used = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)  # after the prompt and after each token
    assert torch.allclose(whole[used], again[used], atol=1e-5)  # scores are float32


@law
@pytest.mark.parametrize("loss", ["dpo", "ipo", "bo2"])
def test_training_in_parts_ends_at_the_same_policy(loss, tmp_path):
    """Five steps of AdamW as with one large batch. In float64: some gradients are 0, as that of the keys' bias, and
    AdamW makes whole steps of their rounding errors if these are not far below its eps."""
    pairs = [lm.Encoded([1] * (1 + i % 3), [2 + i % 7] * (1 + i % 5), [9 - i % 7] * (1 + i % 4)) for i in range(8)]
    start, ends = random_gpt2(11, seed=1), []
    ready = data.add_ref_logps(start, pairs)
    for n in (None, 3):
        args = Namespace(lr=1e-4, steps=5, eval_every=5, beta=0.3, loss=loss, length_average=False, resume=False,
                         max_grad_norm=1.0, out=tmp_path / str(n), device="cpu", micro_batch=n)
        args.out.mkdir()
        policy = random_gpt2(11, seed=1)
        policy.micro_batch = n
        dpo.train(policy, lambda step: ready, lambda policy: {}, args)
        ends.append(torch.nn.utils.parameters_to_vector(policy.parameters()))
    assert (ends[0] - torch.nn.utils.parameters_to_vector(start.parameters())).abs().max() > 1e-4, "it moves"
    assert (ends[0] - ends[1]).abs().max() < 1e-8


@law
def test_parts_and_checkpointing_keep_less(kind):
    triples = [([1, 2, 3], [4, 5, 6, 7, 8], [9, 8, 7, 6])] * 16
    whole, parts, layers = (random_gpt2(11, seed=1, kind=kind) for _ in range(3))
    parts.micro_batch = 4
    layers.recompute_layers()
    most, *less = (kept_bytes(lambda policy=policy: preference_loss(policy, triples))
                   for policy in (whole, parts, layers))
    assert less[0] < 0.2 * most and less[1] < 0.5 * most, (most, less)


# ---- --gradient-checkpointing, --train-layers

@law
@each_architecture
def test_recomputed_layers_give_the_same_gradient_without_dropout(architecture, kind):
    policy = random_model(architecture, 11, kind=kind)
    plain = loss_gradient(policy)
    policy.recompute_layers()
    policy.train()  # dropout is configured in the GPT-2
    assert torch.allclose(loss_gradient(policy), plain, atol=1e-10)
    policy.micro_batch = 3  # other rows meet in a batch
    assert torch.allclose(loss_gradient(policy), plain, atol=TOLERANCE[architecture])


@law
def test_dropout_stays_off_where_a_layer_asks_its_own_mode():
    """OPT's layers drop by their own training flag, which transformers' switch for checkpointing needs to be set."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(
        vocab_size=11, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32, init_std=0.4, dropout=0.5)).double()
    policy = lm.LM(model, letters(11))
    plain = loss_gradient(policy)
    policy.recompute_layers()
    policy.train()
    assert torch.allclose(loss_gradient(policy), plain, atol=1e-10)


@law
@each_architecture
def test_checkpointing_leaves_sampling_alone(architecture, kind):
    """transformers' switch drops the key-value cache of a layer that is checkpointed."""
    policy = random_model(architecture, 11, kind=kind)
    before = policy.sample([[1, 2], [3]], 6, torch.Generator().manual_seed(0))
    policy.recompute_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy.sample([[1, 2], [3]], 6, torch.Generator().manual_seed(0)) == before


@each_architecture
def test_a_checkpointed_policy_is_saved_as_any_other(architecture, tmp_path):
    policy, plain = (random_model(architecture, 11, dtype=torch.float32) for _ in range(2))
    policy.recompute_layers()
    assert policy.state_dict().keys() == plain.state_dict().keys()
    other = random_model(architecture, 11, seed=1, dtype=torch.float32)
    other.load_state_dict(policy.state_dict())  # as a checkpoint of a run does
    policy.load_state_dict(other.state_dict())
    policy.save(tmp_path / "policy")
    plain.save(tmp_path / "plain")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("policy", "plain")]
    assert files[0] == files[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    rows = [[1, 2], [2]], [[3, EOS], [6, 1, 4]]
    for again in (lm.LM(model, plain.tokenizer), other):
        assert torch.allclose(again.logps(*rows), plain.logps(*rows), atol=1e-5)


def test_a_checkpointed_scorer_and_one_of_a_checkpointed_policy_are_as_any_other(tmp_path):
    policy, rows = random_gpt2(11, dtype=torch.float32), ([[1, 2], [2]], [[3, EOS], [6, 1, 4]])
    plain = lm.Scorer.of(policy)
    policy.recompute_layers()
    scorer = lm.Scorer.of(policy.frozen_copy())
    for each in (plain, scorer):
        torch.nn.init.ones_(each.model.score.weight)
    assert torch.allclose(scorer.final_scores(*rows), plain.final_scores(*rows), atol=1e-5)
    assert plain.final_scores(*rows).abs().min() > 0
    scorer.recompute_layers()
    scorer.save(tmp_path / "scorer")
    again = lm.Scorer(AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer"), scorer.tokenizer)
    assert torch.allclose(again.final_scores(*rows), plain.final_scores(*rows), atol=1e-5)


@law
@each_architecture
def test_only_the_last_layers_train(architecture, kind):
    policy = random_model(architecture, 11, kind=kind)
    triples = [([1, 2], [3], [4, 5])]
    full = loss_gradient(policy, triples)
    policy.train_last_layers(1)
    frozen = loss_gradient(policy, triples)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert all(".1." in name or "norm" in name or "ln_f" in name or "head" in name or "embed_out" in name
               for name in trained), trained
    assert any(".1." in name for name in trained) and not any(".0." in name for name in trained)
    sizes = [p.numel() for p in policy.parameters()]
    for p, whole, part in zip(policy.parameters(), full.split(sizes), frozen.split(sizes)):
        assert torch.allclose(part, whole, atol=1e-10) if p.requires_grad else not part.any()


@law
def test_a_value_head_is_trained_whatever_is_frozen():
    scorer = lm.Scorer.of(random_gpt2(11))
    scorer.train_last_layers(1)
    trained = [name for name, p in scorer.named_parameters() if p.requires_grad]
    assert "model.score.weight" in trained and not any(name.startswith("model.transformer.w") for name in trained)


def test_more_layers_than_there_are_is_a_sentence():
    with pytest.raises(lm.Refused, match="this model has 2 layers, so not 3"):
        random_gpt2(11).train_last_layers(3)
    flags = Namespace(train_layers=3, gradient_checkpointing=False)
    with pytest.raises(data.UserError, match="--train-layers 3: this model has 2 layers"):
        data.fit_in_memory(random_gpt2(11), flags)


@law
def test_the_flags_combine(kind):
    expected = random_gpt2(11, seed=1, kind=kind)
    expected.train_last_layers(1)
    for n, checkpointing, layers in itertools.product((1, 3), (False, True), (None, 1)):
        policy = random_gpt2(11, seed=1, kind=kind)
        policy.micro_batch = n
        data.fit_in_memory(policy, Namespace(train_layers=layers, gradient_checkpointing=checkpointing))
        got, want = loss_gradient(policy), loss_gradient(expected)
        trained = torch.cat([torch.full_like(p, p.requires_grad).flatten() for p in expected.parameters()]).bool()
        assert torch.allclose(got[trained], want[trained], atol=1e-10)
        assert got[~trained].any() == (layers is None)
