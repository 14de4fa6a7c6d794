"""Tiny random language models for the tests, made from a config."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def random_gpt2(vocab_size: int, positions: int = 64, seed: int = 0, dtype=torch.float64, dropout: float = 0.1):
    """A GPT-2 with random weights, large enough to be far from uniform, in train mode with dropout configured."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=positions, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.4, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))
    return model.to(dtype).train()
