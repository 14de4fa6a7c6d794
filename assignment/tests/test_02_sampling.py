"""Exercise 2: one draw, by its frequencies; and the sampler, on a table that can be read off and on a small GPT-2."""

import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from check import expect as expect_
from transformers import GPT2Config, GPT2LMHeadModel

import lm

pytestmark = pytest.mark.exercise(n=2)
expect = partial(expect_, 2)
tensor = partial(torch.tensor, dtype=torch.float64)

EOS = 0
# what follows a token, in eighths: 1 is followed by 2 or 3, 2 by 3, 3 by the EOS, and the EOS, if need be, by 2
NEXT = [[0, 0, 8, 0],
        [0, 0, 6, 2],
        [0, 0, 0, 8],
        [8, 0, 0, 0]]
EIGHTHS = [(2 * i + 1) / 16 for i in range(8)]  # uniform numbers, one from the middle of each eighth


# ---- draw


def how_often(eighths, temperature):
    """How often each token comes, for uniform numbers spread evenly over [0, 1)."""
    logits = tensor(eighths).log() * temperature + 7
    tokens = lm.draw(logits.expand(8, -1), tensor(EIGHTHS), temperature).tolist()
    return [Counter(tokens)[token] for token in range(len(eighths))]


def tokens_drawn(logits, uniform, dtype="float32"):
    """Each token that is drawn, once; all rows have these logits."""
    rows = torch.tensor(logits, dtype=getattr(torch, dtype)).expand(len(uniform), -1)
    return sorted(set(lm.draw(rows, tensor(uniform)).tolist()))


def test_each_token_comes_as_often_as_it_should():
    expect([4, 1, 3], how_often, [4, 1, 3], 1.0, because="eight rows, each with these probabilities in eighths")
    expect([0, 8, 0], how_often, [0, 8, 0], 1.0)


def test_logits_are_divided_by_the_temperature():
    expect([4, 1, 3], how_often, [4, 1, 3], 0.5, because="these logits are temperature * log p + 7")
    expect([4, 1, 3], how_often, [4, 1, 3], 3.0, because="these logits are temperature * log p + 7")


def test_each_row_has_logits_and_a_number_of_its_own():
    def draw(eighths, uniform):
        return lm.draw(tensor(eighths).log(), tensor(uniform))
    expect([0, 1, 1], draw, [[8, 0, 0], [3, 2, 3], [0, 8, 0]], [0.9, 0.45, 0.5], because="a row is a distribution")


def test_what_a_row_draws_depends_on_its_number_alone():
    def first_row_is_the_same_beside_others(eighths, uniform):
        logits = tensor(eighths).log().expand(len(uniform), -1)
        alone = [lm.draw(logits[:1], tensor([u])).item() for u in uniform]
        return lm.draw(logits, tensor(uniform)).tolist() == alone
    expect(True, first_row_is_the_same_beside_others, [4, 1, 3], EIGHTHS,
           because="nothing else is random: the same number gives the same token")


def test_a_token_of_probability_0_never_comes():
    expect([1], tokens_drawn, [-math.inf, 0.0, -math.inf], [0.0, 0.5, 1 - 2**-53],
           because="nor at the first and the last number of [0, 1)")


def test_the_rarest_token_can_come():
    expect([0, 1, 2], tokens_drawn, [0.0, 20.0, 0.0], [1e-9, 0.5, 1 - 1e-9],
           because="the first and the last token have 2e-9 each: in float32, 1 - 2e-9 is 1")


def test_logits_in_bfloat16_are_made_finer_first():
    expect([1], tokens_drawn, [0.0, 1.0], [0.2692, 0.7308], "bfloat16",
           because="token 0 has probability 0.2689, in bfloat16 0.2695")


def test_a_logit_that_is_no_number_draws_nothing():
    def error_of_draw(logits):
        try:
            return lm.draw(torch.tensor([logits]), tensor([0.5])).tolist()
        except FloatingPointError:
            return "FloatingPointError"
    expect("FloatingPointError", error_of_draw, [0.0, math.nan, 0.0],
           because="the search would end behind the last token")


# ---- sample_batch


class Table(torch.nn.Module):
    """A language model that looks at the last token only; it counts how often it is asked."""

    def __init__(self, eighths):
        super().__init__()
        self.logits = torch.nn.Parameter(tensor(eighths).log().clamp(min=-1e4))
        self.device, self.config, self.asked = torch.device("cpu"), GPT2Config(), 0

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                logits_to_keep=0):
        self.asked += 1
        return SimpleNamespace(logits=self.logits[input_ids][:, -logits_to_keep:], past_key_values=past_key_values)


def small_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                                      eos_token_id=0, initializer_range=0.4)).double()


def sampler(model, ends=(EOS,)):
    """The network as a policy; its tokenizer plays no part here."""
    policy = lm.LM(model, lm.word_tokenizer(["a"]))
    policy.end_ids, policy.ends = set(ends), torch.tensor(ends)
    return policy


def sample(prompts, uniform, ends=(EOS,), eighths=NEXT):
    """Responses, each up to its end."""
    policy = sampler(Table(eighths), ends)
    with torch.no_grad():
        return [policy.up_to_end(row) for row in policy.sample_batch(prompts, tensor(uniform))]


def noting(given, logits, numbers, temperature):
    """In place of draw: the likeliest token, and a note of what it is given."""
    given.append([numbers.tolist(), temperature])
    return logits.argmax(-1)


def test_a_response_goes_on_until_its_end_token():
    expect([[3, EOS], [EOS], [3, EOS]], sample, [[1, 2], [2, 2, 3], [2]], [[0.5] * 5] * 3,
           because="prompts end with 2, 3 and 2; after 2 comes 3, after 3 the EOS; a row that ends stops no other")


def test_a_response_is_cut_at_the_limit():
    expect([[3], [EOS]], sample, [[2], [3]], [[0.5]] * 2, because="one uniform number a row, so one token")
    expect([[2, 2, 2]], sample, [[2]], [[0.5] * 3], eighths=[[0, 0, 8]] * 3, because="three, and no end token")


def test_tokens_are_drawn_and_not_the_likeliest_taken():
    def how_often_2_and_3_follow(prompt):
        tokens = Counter(response[0] for response in sample([prompt] * 8, [[u, 0.5, 0.5] for u in EIGHTHS]))
        return tokens[2], tokens[3]
    expect([6, 2], how_often_2_and_3_follow, [1], because="after 1 they have probability 6/8 and 2/8")


def test_any_end_token_ends_a_response():
    expect([[3], [EOS]], sample, [[2], [3]], [[0.5] * 4] * 2, (EOS, 3))


def test_the_model_is_not_asked_once_all_rows_have_ended():
    def passes_through_the_model(prompts, limit, ends):
        model = Table(NEXT)
        with torch.no_grad():
            sampler(model, ends).sample_batch(prompts, torch.full((len(prompts), limit), 0.5, dtype=torch.float64))
        return model.asked
    expect(2, passes_through_the_model, [[2], [3]], 20, (EOS,), because="the responses are 3, EOS and EOS,"
           " and do not end in the same step")
    expect(1, passes_through_the_model, [[2], [3]], 20, (EOS, 3), because="for the responses 3 and EOS, both at an end")


def test_each_draw_gets_its_column_of_numbers_and_the_temperature():
    def what_draw_is_given(prompts, uniform, temperature):
        given = []
        sampler(Table(NEXT)).sample_batch(prompts, tensor(uniform), temperature, partial(noting, given))
        return given
    expect([[[0.1, 0.4], 0.7], [[0.2, 0.5], 0.7]], what_draw_is_given, [[2], [2]], [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
           0.7, because="a column a token; both rows end with their second token")


# the logits that draw is given must be those of the model for this text alone

MATES = [[7, 3, 5, 1, 8, 2]]


def farthest_logit(prompt, tokens):
    """Between what draw is given for a prompt beside a longer one, and the model's own for prompt + tokens."""
    model, given, steps = small_gpt2(), [], iter(tokens)

    def draw(logits, numbers, temperature):
        given.append(logits[0])
        return torch.full((len(logits),), next(steps))
    with torch.no_grad():
        sampler(model).sample_batch([prompt, *MATES], torch.rand(2, len(tokens), dtype=torch.float64), 1.0, draw)
        alone = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1]
    assert given, "sample_batch has not called draw"
    return (torch.stack(given) - alone).abs().max()


def test_the_first_token_sees_its_prompt_and_no_padding():
    expect(0.0, farthest_logit, [3, 7], [4], within=1e-5,
           because="a longer prompt, by which this one is padded, changes neither what is seen nor the positions")


def test_later_tokens_see_all_before_them():
    expect(0.0, farthest_logit, [3, 7], [4, 9, 2, 6], within=1e-5,
           because="the new tokens follow at the positions 2, 3 and 4 and are seen, the padding is not")


def test_a_longer_prompt_sees_its_first_token():
    expect(0.0, farthest_logit, [3, 7, 1, 4, 4, 9, 2], [4, 9], within=1e-5,
           because="this one is the longer of the two")
