"""Tiny random language models for the tests, made from a config."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel


def random_gpt2(vocab_size: int, positions: int = 64, seed: int = 0, dtype=torch.float64, dropout: float = 0.1):
    """A GPT-2 with random weights, large enough to be far from uniform, in train mode with dropout configured."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=positions, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.4, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))
    return model.to(dtype).train()


# What sets an architecture apart from the others here, beside its layers.
ARCHITECTURES = {
    "gpt2": dict(),  # learned positions, embeddings tied to the head
    "gpt_neox": dict(rotary_pct=0.5, use_parallel_residual=True),  # rotary on half of a head, untied
    "llama": dict(tie_word_embeddings=False),  # rotary, RMSNorm, gated MLP, grouped queries
    "qwen2": dict(tie_word_embeddings=True),  # biases on queries, keys and values
    "qwen3": dict(tie_word_embeddings=True),  # and norms on queries and keys
    "gemma3_text": dict(query_pre_attn_scalar=8, sliding_window=4,  # scaled embeddings, a window of 4 tokens
                        layer_types=["sliding_attention", "full_attention"]),
}

# RMSNorm computes in float32 whatever the model's dtype is, so there float64 does not show a law to 1e-10
TOLERANCE = {name: 1e-10 if name in ("gpt2", "gpt_neox") else 1e-5 for name in ARCHITECTURES}


def random_model(architecture: str, vocab_size: int, seed: int = 0, dtype=torch.float64):
    """The same for any of ARCHITECTURES: EOS = 0 and no pad token, context of 64 tokens."""
    if architecture == "gpt2":
        return random_gpt2(vocab_size, seed=seed, dtype=dtype)
    torch.manual_seed(seed)
    grouped = {} if architecture == "gpt_neox" else dict(num_key_value_heads=1, head_dim=8)
    config = AutoConfig.for_model(
        architecture, vocab_size=vocab_size, max_position_embeddings=64, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
        pad_token_id=None, **grouped, **ARCHITECTURES[architecture])
    return AutoModelForCausalLM.from_config(config).to(dtype).train()
