"""What the tests share: tiny random language models, made from a config, and hypothesis profiles."""

import os

import pytest
import torch
from hypothesis import settings
from transformers import GPT2Config, GPT2LMHeadModel

import data
import lm

# CI draws the same examples each time; `HYPOTHESIS_PROFILE=thorough pytest` draws many new ones
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(1)


def random_gpt2(vocab_size: int, positions: int = 64, seed: int = 0, dtype=torch.float64, dropout: float = 0.1):
    """A GPT-2 with random weights, large enough to be far from uniform, in train mode with dropout configured."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=positions, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.4, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))
    return model.to(dtype).train()


@pytest.fixture
def policy():
    """Vocabulary of 11 tokens, EOS = 0, float64."""
    return random_gpt2(11, seed=1)


@pytest.fixture
def ref():
    return lm.frozen_copy(random_gpt2(11, seed=2))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A transformers directory with the world's word tokenizer and random weights, for the commands."""
    directory = tmp_path_factory.mktemp("model") / "random"
    tokenizer = lm.word_tokenizer([text for pair in data.sft_corpus(2000) for text in pair])
    model = random_gpt2(len(tokenizer), dtype=torch.float32)
    lm.save(model, tokenizer, directory)
    return directory
