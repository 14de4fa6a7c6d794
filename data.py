"""What a run starts from: pi_ref, preference pairs, prompts, judges. All three algorithms share it.

--data says what the task is:

    (nothing)  the built-in world of world.py; its golden reward labels pairs and measures
    DIR        a directory with prompts, such as runs/reviews (recipes/movie_reviews.py makes it):
                 task.json               {"label", "second"}: judges; the second only measures
                 sft.jsonl               {"prompt", "response"}: what a model is first taught
                 prompts.jsonl           {"prompt"}: to train on
                 held_out_prompts.jsonl  {"prompt"}: to evaluate on
    FILE       preference pairs {"prompt", "chosen", "rejected"}: JSONL, a hub data set, or a
               directory with pairs.jsonl and held_out_pairs.jsonl; --judge measures, if given

In the world and in DIR, pi_ref is the model after supervised fine-tuning on the task's texts, and a
pair is two samples of it to one prompt. .cache/ keeps both: every algorithm starts from the same.
"""

import contextlib
import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import fast
import lm
import world
from judges import load_judge
from lm import LM, Encoded
from run import UserError, read_rows, write_rows

# The built-in model: large enough for the world's sentences, small enough for a laptop.
TINY = dict(layers=2, width=64, heads=4, positions=64, seed=0)
TINY_SFT: dict = dict(steps=400, batch_size=128, lr=4e-3, seed=0)
SFT: dict = dict(batch_size=16, lr=5e-5, seed=0)  # of pretrained models
FIELDS = ("prompt", "chosen", "rejected")  # of a preference pair in a file


class Pair(NamedTuple):
    """A preference as texts, and the file and line that it comes from."""
    prompt: str
    chosen: str
    rejected: str
    where: str


class Start(NamedTuple):
    """What a run starts from; policy and ref are equal at first."""
    policy: LM
    ref: LM
    pairs: list[Encoded]  # to train on
    prompts: list[str]  # to train on
    held_out: list[Encoded]
    held_out_prompts: list[str]
    label: world.Judge | None  # labels what the policy writes while it trains (--judge)
    outcome: world.Judge | None  # measures, in every evaluation
    second: world.Judge | None  # measures, too, and labels nothing
    more: Callable | None = None  # (policy, rows of responses.jsonl) -> further metrics


def start(args) -> Start:
    """All of it, from the arguments of a training command."""
    label, outcome, second = judges_of(args)
    tiny = args.model == "tiny"
    policy = load_policy(args, str(tiny_directory(args.device)) if tiny else reference(args))
    ref = policy.frozen_copy()
    return Start(policy, ref, *preferences(args, ref, outcome), label, outcome, second)


@contextlib.contextmanager
def to_user(flag: str):
    """What lm.py and judges.py refuse becomes a sentence that names the flag."""
    try:
        yield
    except lm.Refused as error:
        raise UserError(f"{flag}: {error}") from error


# ---- judges and pi_ref

def judges_of(args) -> tuple[world.Judge | None, world.Judge | None, world.Judge | None]:
    """(label, outcome, second), see Start. --judge reward is not there yet: rlhf.py trains it."""
    label = world.golden_judge if args.judge == "golden" else None
    if args.judge not in ("golden", "task", "reward"):
        label = judge_named(args.judge, args.device)
    if args.data is None or not (Path(args.data) / "task.json").exists():
        return label, world.golden_judge if args.data is None else label, None
    outcome, second = (judge_named(name, args.device) for name in read_task(args.data))
    return outcome if args.judge == "task" else label, outcome, second


def judge_named(name: str, device: str) -> world.Judge | None:
    """What --judge names."""
    with to_user(f"--judge {name}"):
        return load_judge(name, device)


def load_policy(args, path: str) -> LM:
    """The model in `path`, ready to be trained as the flags of the machine say."""
    kind = LM if args.plain else fast.FastLM  # the one place that chooses
    with to_user(f"--model {args.model}"):
        policy = kind.load(path, args.device, args.micro_batch)
    as_is = not args.train_layers and not args.gradient_checkpointing
    return policy if as_is else fit_in_memory(policy, args)


def fit_in_memory(network, args):
    """A policy or a scorer, trained as --train-layers and --gradient-checkpointing say."""
    if args.train_layers:
        with to_user(f"--train-layers {args.train_layers}"):
            network.train_last_layers(args.train_layers)
    if args.gradient_checkpointing:
        network.recompute_layers()
    return network


def reference(args) -> str:
    """Where pi_ref of a pretrained model is: --model, after fine-tuning on the task's texts."""
    if args.data is None:
        print(f"{args.model} learns in the built-in world; for film reviews, see recipes/README.md")
    if not args.sft_steps:
        return args.model
    texts = (read_strings(Path(args.data) / "sft.jsonl", "prompt", "response") if args.data
             else world.sft_corpus())
    directory = cached("sft", [SFT, args.sft_steps, args.train_layers, args.dtype, texts,
                               fingerprint(args.model), torch.__version__])
    if not directory.exists():
        policy = load_policy(args, args.model)
        lm.sft(policy, texts, args.sft_steps, **SFT)
        policy.save(directory)
        print(f"pi_ref: {args.model} after {args.sft_steps} steps of SFT, kept in {directory}")
    return str(directory)


def tiny_directory(device: str = "cpu", **changes) -> Path:
    """Where the built-in model is; made by SFT on the world's texts if it is not cached."""
    torch.set_num_threads(1)  # too small to share: a second thread only makes it wait
    shape = {**TINY, **changes}
    language = Path(world.__file__).read_text(encoding="utf-8")  # another world, another model
    directory = cached("tiny", [shape, TINY_SFT, language, torch.__version__])
    if not directory.exists():
        corpus = world.sft_corpus()
        policy = fast.FastLM.untrained([text for row in corpus for text in row], **shape).to(device)
        lm.sft(policy, corpus, **TINY_SFT)
        policy.save(directory)
    return directory


def cached(kind: str, settings) -> Path:
    """Where something that these settings (JSON values) decide is kept; it may not be there yet."""
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("HYPO_CACHE", Path(__file__).parent / ".cache"))
    return cache / f"{kind}-{key}"


def fingerprint(name: str | None):
    """A hub name as it is; of a directory, its files with their sizes and times of change."""
    if name is None or not Path(name).is_dir():
        return name
    files = [path for path in sorted(Path(name).resolve().rglob("*")) if path.is_file()]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


# ---- preference pairs

def preferences(args, ref: LM, judge) -> tuple[list[Encoded], list[str], list[Encoded], list[str]]:
    """(pairs, prompts) to train on and (pairs, prompts) held out: sampled, or from a file."""
    if args.data is not None and not (Path(args.data) / "task.json").exists():  # it holds pairs
        train, held_out = split_file(args, ref)
        encoded = [add_ref_logps(ref, encode(ref, pairs, args.max_new_tokens))
                   for pairs in (train, held_out)]
        return encoded[0], prompts_of(train), encoded[1], prompts_of(held_out)
    file = None if args.model == "tiny" else cached("pairs", [  # the tiny model's take a second
        fingerprint(ref.source), fingerprint(args.data), args.pairs, args.seed, args.dtype,
        args.device, args.max_new_tokens, args.eval_samples, args.plain, args.micro_batch])
    prompts, held_out_prompts = read_prompts(args.data) if args.data else world.world_prompts()
    if file and file.exists():
        pairs = read_pairs(file)
    else:
        # labels of a task are without noise, as in the DPO paper's experiment on sentiment
        sure, n_held_out = args.data is not None, 256 if args.model == "tiny" else args.eval_samples
        pairs = []
        for asked, n, seed in ((prompts, args.pairs, args.seed),
                               (held_out_prompts, n_held_out, args.seed + 10**6)):
            pairs += add_ref_logps(ref, collect(
                lambda prompts, seed: ref.respond(
                    prompts, args.max_new_tokens, torch.Generator(args.device).manual_seed(seed)),
                asked, n, seed, judge, sure))
    if file and not file.exists():
        write_pairs(file, pairs)
        print(f"pairs: two samples of pi_ref to each of {args.pairs} prompts, labelled, in {file}")
    return pairs[:args.pairs], prompts, pairs[args.pairs:], held_out_prompts


def collect(respond: Callable, prompts: Sequence[str], n: int, seed: int, judge: world.Judge,
            sure: bool = False) -> list[Encoded]:
    """n labelled pairs: two responses to each prompt, the winner drawn from Bradley-Terry.

    respond: function (prompts, seed) -> (prompt ids, response ids, texts), independent samples. A
    pair keeps the ids, for a sampled text may tokenise otherwise. Equal texts are drawn again.
    sure: the larger reward always wins, and equal ones are drawn again.
    """
    rng = random.Random(seed)
    pairs: list[Encoded] = []
    for draw in range(100):
        asked = rng.choices(prompts, k=n - len(pairs))
        prompt_ids, ids, texts = respond(asked * 2, 1000 * seed + draw)  # a refill: other numbers
        rewards = judge(asked * 2, texts)
        for i in range(len(asked)):
            j = i + len(asked)
            gap = rewards[i] - rewards[j]
            if sure and gap == 0:
                continue
            p = float(gap > 0) if sure else (1 + math.tanh(gap / 2)) / 2  # sigmoid, no overflow
            chosen, rejected = (i, j) if rng.random() < p else (j, i)
            if texts[i] != texts[j]:
                pairs.append(Encoded(prompt_ids[i], ids[chosen], ids[rejected]))
        if len(pairs) == n:
            return pairs
    raise UserError(f"only {len(pairs)} of {n} pairs in 100 draws: nearly all responses are equal")


@torch.no_grad()
def add_ref_logps(ref: LM, pairs: Sequence[Encoded], batch_size: int = 64) -> list[Encoded]:
    """The pairs with log pi_ref of both responses, nats."""
    logps: list[tuple[float, float]] = []
    for i in range(0, len(pairs), batch_size):
        chosen, rejected = ref.pair_logps(pairs[i:i + batch_size])
        logps += zip(chosen.tolist(), rejected.tolist())
    return [pair._replace(ref_chosen=c, ref_rejected=r) for pair, (c, r) in zip(pairs, logps)]


def write_pairs(path, pairs: Iterable[Encoded]) -> None:
    """Encoded pairs as JSONL."""
    write_rows(path, [pair._asdict() for pair in pairs])


def read_pairs(path) -> list[Encoded]:
    """What write_pairs wrote."""
    return [Encoded(**row) for row in read_rows(path)]


def encode(policy: LM, pairs: Sequence[Pair], max_new_tokens: int) -> list[Encoded]:
    """Pairs of texts as token ids. UserError: file, line and field of what cannot be trained on."""
    rows, room, tokenizer = [], policy.context_length - max_new_tokens, policy.tokenizer
    for pair in pairs:
        for field, text in zip(FIELDS, pair):
            ids = tokenizer.encode(text, add_special_tokens=False)
            # GPT-2's unknown word is its EOS, which may be written out in a text
            if tokenizer.unk_token_id in ids and tokenizer.unk_token not in text:
                raise UserError(f"{pair.where}: field '{field}': --model does not know every word; "
                                f"it reads {tokenizer.decode(ids)!r:.60}; use a pretrained one")
        prompt = policy.encode_prompt(pair.prompt)
        chosen, rejected = (policy.encode_response(y, max_new_tokens) for y in pair[1:3])
        if len(prompt) > room:
            raise UserError(f"{pair.where}: field 'prompt' has {len(prompt)} tokens; the context "
                            f"less --max-new-tokens {max_new_tokens} leaves room for {room}; "
                            "shorten the prompt or lower --max-new-tokens")
        if chosen == rejected:
            raise UserError(f"{pair.where}: fields 'chosen' and 'rejected' are the same in their "
                            f"first {max_new_tokens} tokens; raise --max-new-tokens or drop it")
        rows.append(Encoded(prompt, chosen, rejected))
    return rows


# ---- files from outside: every check names the file, the line and the field

def split_file(args, policy: LM) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, held-out pairs) of a file, a hub data set, or a directory with both."""
    source = Path(args.data)
    if source.is_dir():
        return (read_jsonl(source / "pairs.jsonl", policy),
                read_jsonl(source / "held_out_pairs.jsonl", policy))
    pairs = read_jsonl(source, policy) if source.exists() else read_hub(args.data, policy)
    prompts = prompts_of(pairs)
    if len(prompts) < 2:
        raise UserError(f"{source}: {len(prompts)} prompts; at least 2 are needed, one to hold out, "
                        "or a directory with pairs.jsonl and held_out_pairs.jsonl")
    random.Random(args.seed).shuffle(prompts)
    held_out = set(prompts[:max(1, len(prompts) // 10)])  # a tenth, with all their rows
    return ([pair for pair in pairs if pair.prompt not in held_out],
            [pair for pair in pairs if pair.prompt in held_out])


def prompts_of(pairs: Iterable[Pair]) -> list[str]:
    """Each prompt once, in a fixed order."""
    return sorted({pair.prompt for pair in pairs})


def read_objects(path) -> list[tuple[str, dict]]:
    """("file:line", object) of every line of a JSONL file."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing; the head of data.py says what a directory holds")
    lines = enumerate(Path(path).read_bytes().split(b"\n"), 1)
    rows = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path}: no rows; each line must be one JSON object")
    return [(where, json_object(line, where)) for where, line in rows]


def json_object(text: bytes, where: str) -> dict:
    """The JSON object that the bytes are."""
    try:
        row = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save it "
                        "as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {row!r:.60}")
    return row


def string(row: dict, field: str, where: str, may_be_empty: bool = False) -> str:
    """The text in a field of a row."""
    text = row.get(field)
    if field not in row:
        why = f"is missing; found {sorted(row)}"
    elif not isinstance(text, str):
        why = f"must be a string, or all three of a pair lists of messages; got {text!r:.60}"
    elif text != text.encode(errors="ignore").decode():
        why = "has half a character (a lone surrogate), which cannot be tokenised"
    elif not text.strip() and not may_be_empty:
        why = "is empty; it needs a word"
    else:
        return text
    raise UserError(f"{where}: field '{field}' {why}")


def read_strings(path, *fields: str) -> list[tuple]:
    """Rows of strings, for example (prompt, response) of sft.jsonl."""
    return [tuple(string(row, field, where) for field in fields)
            for where, row in read_objects(path)]


def read_prompts(directory) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts) of a task directory; none may be in both."""
    train, held_out = ([prompt for prompt, in read_strings(Path(directory) / name, "prompt")]
                       for name in ("prompts.jsonl", "held_out_prompts.jsonl"))
    shared = set(train) & set(held_out)
    if shared:
        raise UserError(f"{directory}: {len(shared)} prompts are in prompts.jsonl and in "
                        f"held_out_prompts.jsonl, for example {min(shared)!r:.60}; what is trained "
                        "on cannot be held out")
    return train, held_out


def read_task(directory) -> tuple[str, str]:
    """task.json: the judge that labels and measures ("label"), and the one that only measures."""
    folder, where = Path(directory), f"{directory}/task.json"
    task = json_object((folder / "task.json").read_bytes(), where)
    names = [string(task, role, where) for role in ("label", "second")]
    # a judge's directory may lie in the task's
    label, second = (str(folder / name) if (folder / name).is_dir() else name for name in names)
    return label, second


def read_jsonl(path, policy: LM | None = None) -> list[Pair]:
    """Preference pairs of a JSONL file, see check_pair."""
    return [check_pair(row, where, policy) for where, row in read_objects(path)]


def read_hub(name: str, policy: LM | None = None) -> list[Pair]:
    """Preference pairs of the split "train" of a hub data set, see check_pair."""
    try:
        import datasets
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises many kinds; all mean that there are no rows
        raise UserError(f"--data {name}: there is no such file, and the reader of the hub (pip "
                        f"install datasets) says {error!r:.200}") from None
    return [check_pair(row, f"{name}: row {i}", policy) for i, row in enumerate(rows)]


def check_pair(row: dict, where: str, policy: LM | None = None) -> Pair:
    """A row as a pair of texts: its strings as they are, or its lists of messages rendered."""
    if all(isinstance(row.get(field), list) for field in FIELDS):
        row = render_chat({field: row[field] for field in FIELDS}, where, policy)
    prompt, chosen, rejected = (string(row, field, where, field == "prompt") for field in FIELDS)
    if chosen == rejected:
        raise UserError(f"{where}: fields 'chosen' and 'rejected' are the same text; drop the row")
    return Pair(prompt, chosen, rejected, where)


def render_chat(fields: dict, where: str, policy: LM | None) -> dict[str, str]:
    """Lists of messages -> strings: a response is what the template adds to the rendered prompt."""
    for field, messages in fields.items():
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise UserError(f"{where}: field '{field}': expected messages, got {messages!r:.60}")
        for message in messages:
            for key in ("role", "content"):
                string(message, key, f"{where}: field '{field}'", may_be_empty=True)
    if policy is None or not policy.tokenizer.chat_template:
        raise UserError(f"{where}: messages need a chat template, but this tokenizer has none; use "
                        "a chat model, or give the three fields as strings")
    render = policy.tokenizer.apply_chat_template
    try:
        prompt = render(fields["prompt"], tokenize=False, add_generation_prompt=True)
        whole = [render(fields["prompt"] + fields[field], tokenize=False) for field in FIELDS[1:]]
    except Exception as error:  # templates refuse what they do not like, in ways of their own
        raise UserError(f"{where}: the chat template refuses these messages: {error}") from None
    texts = {"prompt": prompt}
    for field, text in zip(FIELDS[1:], whole):
        if not text.startswith(prompt):  # so where the response begins is not defined
            raise UserError(f"{where}: field '{field}' makes the chat template alter the prompt")
        # encode_response adds the EOS itself; what a template writes after it is not the response
        texts[field] = text[len(prompt):].split(policy.tokenizer.eos_token)[0]
    return texts
