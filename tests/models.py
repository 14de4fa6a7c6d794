"""Tiny random policies for the tests, made from a config."""

import functools
import itertools
import string
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fast
import lm


@functools.cache
def letters(n: int):
    """A tokenizer of n tokens: EOS = 0, and words of two letters."""
    words = map("".join, itertools.product(string.ascii_lowercase, repeat=2))
    return lm.word_tokenizer(list(itertools.islice(words, n - 1)))


def random_gpt2(vocabulary, positions: int = 64, seed: int = 0, dtype=torch.float64, dropout: float = 0.1,
                kind=fast.FastLM):
    """A policy whose GPT-2 has random weights, large enough to be far from uniform, and dropout configured.

    vocabulary: a tokenizer, or a number of tokens. kind: lm.LM or fast.FastLM.
    """
    tokenizer = letters(vocabulary) if isinstance(vocabulary, int) else vocabulary
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, initializer_range=0.4, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))
    return kind(model.to(dtype), tokenizer)


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


def random_model(architecture: str, vocabulary, seed: int = 0, dtype=torch.float64, kind=fast.FastLM):
    """The same for any of ARCHITECTURES: EOS = 0 and no pad token, context of 64 tokens."""
    if architecture == "gpt2":
        return random_gpt2(vocabulary, seed=seed, dtype=dtype, kind=kind)
    tokenizer = letters(vocabulary) if isinstance(vocabulary, int) else vocabulary
    torch.manual_seed(seed)
    grouped = {} if architecture == "gpt_neox" else dict(num_key_value_heads=1, head_dim=8)
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), max_position_embeddings=64, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
        pad_token_id=None, **grouped, **ARCHITECTURES[architecture])
    return kind(AutoModelForCausalLM.from_config(config).to(dtype), tokenizer)


def gradient(loss, policy) -> torch.Tensor:
    """The gradient as one vector, zeros where there is none; the graph is kept."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    grads = iter(torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True, materialize_grads=True))
    return torch.cat([(next(grads) if p.requires_grad else torch.zeros_like(p)).flatten()
                      for p in policy.parameters()])


def fitting(arguments: list[str]) -> list[str]:
    """Without --pairs where the last --data names a file, which holds its own."""
    *_, source = ["world", *(value for flag, value in zip(arguments, arguments[1:]) if flag == "--data")]
    at = arguments.index("--pairs")
    in_file = source != "world" and not (Path(source) / "task.json").exists()
    return arguments[:at] + arguments[at + 2:] if in_file else arguments
