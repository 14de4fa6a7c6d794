"""Exercise 1: log-probabilities of responses, on a table model that can be read off, and on a small GPT-2."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from check import expect as expect_
from transformers import GPT2Config, GPT2LMHeadModel

import lm

pytestmark = pytest.mark.exercise(n=1)
expect = partial(expect_, 1)

EOS = 0
LN2 = 0.69314718056
# row: the token before; column: the probability of the next one, in powers of 1/2
NEXT = [[1 / 4, 1 / 4, 1 / 4, 1 / 4],
        [1 / 2, 1 / 4, 1 / 8, 1 / 8],
        [1 / 8, 1 / 8, 1 / 4, 1 / 2],
        [1 / 8, 1 / 2, 1 / 8, 1 / 4]]


class Table(torch.nn.Module):
    """A language model that looks at the last token only; its logits are log-probabilities plus 3."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(NEXT, dtype=dtype).log() + 3)
        self.device, self.config = torch.device("cpu"), SimpleNamespace()

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, use_cache=None):
        return SimpleNamespace(logits=self.logits[input_ids][:, -logits_to_keep:])


class Reader(Table):
    """Looks at how many tokens it attends to, besides."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, use_cache=None):
        attended = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).cumsum(1)  # (B, L)
        logits = self.logits[input_ids] + 0.1 * attended[..., None] * torch.arange(4)
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def policy(model):
    """The network as a policy; its tokenizer, whose token 0 is the EOS, plays no part here."""
    return lm.LM(model, lm.word_tokenizer(["a"]))


def small_gpt2():
    """Random weights, float64, with dropout where it is switched on; it has no pad token."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=11, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.4, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)).double()


def token_logps(prompts, responses):
    return policy(Table()).token_logps(prompts, responses)[0]


def mask(prompts, responses):
    return policy(Table()).token_logps(prompts, responses)[1]


def logps(prompts, responses):
    return policy(Table()).logps(prompts, responses)


def test_logits_stand_at_the_token_that_they_predict():
    def softmax_of_logits_and_ids(prompts, responses):
        logits, ids, _ = policy(Table()).response_logits(prompts, responses)
        return logits.softmax(-1), ids
    expect([[[NEXT[1], NEXT[2]]], [[2, 3]]], softmax_of_logits_and_ids, [[3, 1]], [[2, 3]],
           because="two positions: after the prompt's last token 1, and after the response's first token 2")


def test_each_token_by_hand():
    expect([[-3 * LN2, -1 * LN2, -3 * LN2]], token_logps, [[2, 1]], [[2, 3, EOS]],
           because="1 -> 2 has probability 1/8, 2 -> 3 has 1/2, 3 -> EOS has 1/8")


def test_rows_of_unequal_length_are_padded_with_zeros():
    expect([[-1 * LN2, 0, 0], [-2 * LN2, -2 * LN2, -2 * LN2]], token_logps, [[2, 2, 1], [1]], [[EOS], [1, 1, 1]],
           because="the EOS of the first row is its only token; the second was cut and has none")


def test_the_mask_marks_tokens_though_the_eos_is_also_the_padding():
    expect([[True, True, False], [True, True, True]], mask, [[1], [1]], [[3, EOS], [2, 3, EOS]])


def test_a_response_is_the_sum_of_its_tokens():
    expect([-7 * LN2, -1 * LN2], logps, [[2, 1], [1]], [[2, 3, EOS], [EOS]], because="a sum, not a mean, EOS included")


def test_logits_are_float32_or_wider_when_the_model_computes_in_bfloat16():
    def bits_of_logits_up_to_32(prompts, responses):
        return min(32, torch.finfo(policy(Table(torch.bfloat16)).response_logits(prompts, responses)[0].dtype).bits)
    expect(32, bits_of_logits_up_to_32, [[1]], [[2, EOS]], because="a log-softmax in bfloat16 has two digits")


def test_every_token_trains_the_model_the_eos_too():
    def gradient_of_the_eos_logit_after_3(prompts, responses):
        model = Table()
        policy(model).logps(prompts, responses).sum().backward()
        return model.logits.grad[3, EOS]
    expect(1 - 1 / 8, gradient_of_the_eos_logit_after_3, [[1]], [[3, EOS]],
           because="1 - 1/8: the logit is in its own normaliser, too")


# a row must not notice its batch-mates, who pad it on both sides

MATES = [[1, 1, 1, 1, 1]], [[2, 2, 2, 2]]


def change_from_batch_mates(model, prompt, response):
    alone = policy(model).token_logps([prompt], [response])[0][0]
    padded = policy(model).token_logps([prompt, *MATES[0]], [response, *MATES[1]])[0][0]
    return padded[:len(response)] - alone


def test_padding_changes_no_position():
    expect([0, 0, 0], change_from_batch_mates, small_gpt2(), [3, 7], [2, 9, EOS], within=1e-5,
           because="the first token of a prompt has position 0, however much padding is in front")


def test_padding_is_not_attended_to():
    expect([0, 0, 0], change_from_batch_mates, Reader(), [3, 1], [2, 3, EOS], within=1e-5)


def test_dropout_stays_off():
    def change_from_call_to_call(prompts, responses):
        model = policy(small_gpt2())
        return (model.logps(prompts, responses) - model.logps(prompts, responses)).abs().max()
    expect(0.0, change_from_call_to_call, [[3, 7]], [[2, 9, EOS]], because="lm.Network keeps evaluation mode")
