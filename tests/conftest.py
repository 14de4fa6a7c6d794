"""What the tests share: fixtures of tiny random policies, and hypothesis profiles."""

import os

import pytest
import torch
from hypothesis import settings

import data
import fast
import lm
import world
from models import random_gpt2

# CI draws the same examples each time; `HYPOTHESIS_PROFILE=thorough pytest` draws many new ones
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(1)
data.TINY_SAMPLES = 512  # the 8192 that an evaluation compares with take five seconds


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What a run keeps for later ones goes where the tests' other files go."""
    os.environ["HYPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def policy():
    """Vocabulary of 11 tokens, EOS = 0, float64."""
    return random_gpt2(11, seed=1)


@pytest.fixture
def ref():
    return random_gpt2(11, seed=2).frozen_copy()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A transformers directory with the world's word tokenizer and random weights, for the commands."""
    directory = tmp_path_factory.mktemp("model") / "random"
    tokenizer = lm.word_tokenizer([text for pair in world.sft_corpus(2000) for text in pair])
    random_gpt2(tokenizer, dtype=torch.float32).save(directory)
    return directory


@pytest.fixture(scope="module", params=[fast.FastLM, lm.LM], ids=["fast", "plain"])
def kind(request):
    """A test that asks for it runs twice: with fast.py, and with the plain forms of lm.py."""
    return request.param
