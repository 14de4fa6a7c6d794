"""What a run starts from: pi_ref, preference pairs, prompts, judges. hypo.py, dpo.py and rlhf.py share it.

--data says what the task is:

    (nothing)  the built-in world of data.py, whose golden reward labels pairs and measures the outcome
    DIR        a directory with prompts, such as runs/reviews (recipes/movie_reviews.py makes it):
                   task.json                "label", a judge: labels pairs, measures the outcome, may be gamed;
                                            "second", another judge, which only measures
                   sft.jsonl                {"prompt", "response"}: what a pretrained model is first taught to write
                   prompts.jsonl            {"prompt"}: to train on
                   held_out_prompts.jsonl   {"prompt"}: to evaluate on
    FILE       preference pairs {"prompt", "chosen", "rejected"}: JSONL, a hub data set, or a directory with
               pairs.jsonl and held_out_pairs.jsonl; --judge measures the outcome, if there is one

In the world and in DIR, pi_ref is the model after supervised fine-tuning on the task's texts, and a pair is two
samples of pi_ref to one prompt. What took minutes, a fine-tuned pretrained model and its pairs, is kept in
.cache/ under a name made of all that decides it, so every algorithm starts from the same ones.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

import data
import lm
import run
from judges import load_judge

SFT = dict(batch_size=16, lr=5e-5, seed=0)  # of pretrained models; the built-in one has lm.TINY


class Setup(NamedTuple):
    """policy and ref: equal at first; pairs and held_out: token ids, as from lm.encode_pairs."""
    policy: Any
    ref: Any
    tokenizer: Any
    respond: Any  # pi_ref as a function, see lm.responder
    pairs: list[dict]
    prompts: list[str]
    held_out: list[dict]
    held_out_texts: list[dict]
    held_out_prompts: list[str]
    label: Any  # the judge that labels what the policy writes while it trains (--judge), or None
    outcome: Any  # the judge of evaluations, or None
    second: Any  # another one, or None


def set_up(args) -> Setup:
    """All of it, from the arguments of a training command."""
    label, outcome, second = judges(args)
    if args.data is None and args.model != "tiny" and not has_prompts(run.REVIEWS):
        print(f"--model {args.model} learns in the built-in world, for there is no task in {run.REVIEWS}/; for film "
              "reviews, see recipes/README.md")
    args.pi_ref = reference(args)
    policy, tokenizer = lm.load(args.pi_ref, data.sft_corpus, args.device)
    lm.fit_in_memory(policy, args)
    ref = lm.frozen_copy(policy)
    respond = lm.responder(ref, tokenizer, args.max_new_tokens)
    pairs, prompts, held_out, held_out_prompts = load_pairs(args, respond, tokenizer, outcome)
    encode = lambda rows: lm.encode_pairs(policy, tokenizer, rows, args.max_new_tokens)  # noqa: E731
    return Setup(policy, ref, tokenizer, respond, encode(pairs), prompts, encode(held_out), held_out, held_out_prompts,
                 label, outcome, second)


def judges(args):
    """(label, outcome, second), see Setup; --judge reward, which rlhf.py is about to train, is not here yet: None."""
    named = None if args.judge in ("task", "reward") else load_judge(args.judge, args.device)
    if args.data is None:
        return named, data.golden_judge, None
    if not has_prompts(args.data):
        return named, named, None
    roles = data.read_task(args.data)
    outcome, second = (load_judge(str(inside) if (inside := Path(args.data) / name).is_dir() else name, args.device)
                       for name in (roles["label"], roles["second"]))
    return outcome if args.judge == "task" else named, outcome, second


def has_prompts(source) -> bool:
    """Whether --data names a directory of prompts, whose pairs are yet to be made."""
    return source is not None and (Path(source) / "task.json").exists()


def reference(args) -> str:
    """What lm.load takes for pi_ref: --model, after --sft-steps of supervised fine-tuning on the task's texts."""
    if not args.sft_steps:
        return args.model
    texts = data.read_strings(Path(args.data) / "sft.jsonl", "prompt", "response") if args.data else data.sft_corpus()
    decides = [SFT, args.sft_steps, args.train_layers, args.dtype, texts, fingerprint(args.model), torch.__version__]
    directory = lm.cached("sft", decides)
    if not directory.exists():
        model, tokenizer = lm.load(args.model, device=args.device)
        lm.sft(lm.fit_in_memory(model, args), tokenizer, texts, args.sft_steps, **SFT)
        lm.save(model, tokenizer, directory)
        print(f"pi_ref: {args.model} after {args.sft_steps} steps of supervised fine-tuning, kept in {directory}")
    return str(directory)


def load_pairs(args, respond, tokenizer, judge):
    """data.load_pairs; of a pretrained model, whose samples take time, they are kept."""
    n_held_out = 256 if args.model == "tiny" else args.eval_samples
    make = lambda: data.load_pairs(  # noqa: E731
        args.data, args.pairs, respond, tokenizer, args.seed, judge, n_held_out)
    if args.model == "tiny" or (args.data and not has_prompts(args.data)):
        return make()
    path = lm.cached("pairs", [fingerprint(args.pi_ref), fingerprint(args.data), args.pairs, args.seed, args.dtype,
                               args.device, args.max_new_tokens, args.eval_samples])
    if not path.exists():
        data.write_jsonl(path, make())
        print(f"pairs: two samples of pi_ref to each of {args.pairs} prompts, labelled, kept in {path}")
    return data.read_rows(path)


def fingerprint(name: str | None):
    """A hub name as it is; of a directory, its files with their sizes and times of change."""
    if name is None or not Path(name).is_dir():
        return name
    stats = {str(path): path.stat() for path in sorted(Path(name).resolve().rglob("*")) if path.is_file()}
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()]
