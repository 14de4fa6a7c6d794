"""What a run starts from: pi_ref, preference pairs, prompts, judges. All three algorithms share it.

--data says what the task is:

    (nothing)  the built-in world of world.py; its golden reward labels pairs and measures
    DIR        a directory with prompts, such as runs/reviews (recipes/movie_reviews.py makes it):
                 task.json               {"label", "second"}: judges; the second only measures
                 sft.jsonl               {"prompt", "response"}: what a model is first taught
                 prompts.jsonl           {"prompt"}: to train on
                 held_out_prompts.jsonl  {"prompt"}: to evaluate on
    FILE       preference pairs {"prompt", "chosen", "rejected"}, as texts or as messages, or in
               the columns of other public sets, see rows.py: JSONL, JSON, .gz; CSV and Parquet,
               what save_to_disk wrote, a hub's NAME or NAME:SPLIT (pip install datasets); a
               directory with pairs.jsonl and held_out_pairs.jsonl. --judge measures, if given

In the world and in DIR, pi_ref is the model after supervised fine-tuning on the task's texts, and a
pair is two samples of it to one prompt. .cache/ keeps both: every algorithm starts from the same.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import filelock
import torch

import fast
import lm
import run
import world
from judges import judged_samples, load_judge
from lm import LM, Encoded, Prompt, text_of
from rows import (
    Pair,
    Sift,
    cut,
    prompt_ids,
    prompt_of,
    read_objects,
    read_pairs_of,
    sources,
    string,
    token_ids,
)
from run import UserError, is_task

# The built-in model: large enough for the world's sentences, small enough for a laptop.
TINY = dict(layers=2, width=64, heads=4, positions=64, seed=0)
TINY_SFT: dict = dict(steps=300, batch_size=64, lr=8e-3, seed=0)
SFT: dict = dict(batch_size=16, lr=5e-5, seed=0)  # of pretrained models
TINY_SAMPLES = 8192  # of pi_ref, which evaluations compare with; of another model --eval-samples


class Start(NamedTuple):
    """What a run starts from; policy and ref are equal at first."""
    policy: LM
    ref: LM
    pairs: list[Encoded]  # to train on
    prompts: Sequence[Prompt]  # to train on
    held_out: list[Encoded]
    held_out_prompts: Sequence[Prompt]
    label: world.Judge | None  # labels what the policy writes while it trains (--judge)
    outcome: world.Judge | None  # measures, in every evaluation
    second: world.Judge | None  # measures, too, and labels nothing
    samples: list[dict] | None = None  # pi_ref's to the held-out prompts in turn; None: drawn when needed
    more: Callable | None = None  # (policy, rows of responses.jsonl) -> further metrics

    def inputs(self) -> dict:
        """What decides the run, by flag, as hashes and names: see run.prepare."""
        weights = hashlib.sha256()
        for tensor in self.ref.state_dict().values():
            weights.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())  # one may be 0-dim
        tokens = [[pair[:3] for pair in pairs] for pairs in (self.pairs, self.held_out)]
        rows = json.dumps([tokens, self.prompts, self.held_out_prompts]).encode()
        judges = [judge and fingerprint(judge.name) for judge in self[6:9]]
        return {"--model": weights.hexdigest(), "--data": hashlib.sha256(rows).hexdigest(),
                "--judge": judges}


def start(args) -> Start:
    """All of it, from the arguments of a training command."""
    label, outcome, second = judges_of(args)
    tiny = args.model == "tiny"
    policy = load_policy(args, str(tiny_directory(args.device)) if tiny else reference(args))
    ref = policy.frozen_copy()
    rows = preferences(args, ref, outcome)
    samples = samples_of(args, ref, rows[3], outcome, second, TINY_SAMPLES if tiny else args.eval_samples)
    return Start(run.share(policy), run.share(ref), *rows, label, outcome, second, samples)


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
    if not is_task(args.data):
        return label, world.golden_judge if args.data is None else label, None
    outcome, second = (judge_named(name, args.device, f"{args.data}/task.json: judge")
                       for name in read_task(args.data))
    if outcome is None:
        raise UserError(f"{args.data}/task.json: field 'label' is none, but pairs need a label")
    return outcome if args.judge == "task" else label, outcome, second


def judge_named(name: str, device: str, where: str = "--judge") -> world.Judge | None:
    """What --judge, or a file, names."""
    with to_user(f"{where} {name}"):
        return run.share(load_judge(name, device))


def load_policy(args, path: str) -> LM:
    """The model in `path`, ready to be trained as the flags of the machine say."""
    kind = LM if args.plain else fast.FastLM  # the one place that chooses
    if args.model != "tiny":
        print(f"loading {path}")
    made_here = "" if path == args.model else f", of which {path} is a copy made here (if it is " \
        "damaged, delete it: it will be made again)"
    with to_user(f"--model {args.model}{made_here}"):
        policy = kind.load(path, args.device, args.micro_batch, args.batch_size)
        if args.model != "tiny":
            policy.check()
    as_is = not args.train_layers and not args.gradient_checkpointing
    return policy if as_is else fit_in_memory(policy, args)


def scorer(ref: LM, args) -> lm.Scorer:
    """A reward model or a value function to train, started from pi_ref."""
    return run.share(fit_in_memory(lm.Scorer.of(ref), args))


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
    corpus = Path(args.data) / "sft.jsonl" if args.data else None
    texts = read_strings(corpus, "prompt", "response") if corpus else world.sft_corpus()

    def make(directory):
        """The fine-tuning. UserError: the number of a text that is too long."""
        policy = load_policy(args, args.model)
        for line, (prompt, response) in enumerate(texts, 1):
            n = len(policy.encode_prompt(prompt) + policy.encode_response(response, 10**9))
            if n > policy.context_length:
                raise UserError(f"{corpus or 'world.py'}: text {line} has {n} tokens, but the "
                                f"context of --model {args.model} is {policy.context_length}")
        lm.sft(policy, texts, args.sft_steps, **SFT)
        with run.touching(directory, "HYPO_CACHE"):
            policy.save(directory)
        print(f"pi_ref: {args.model} after {args.sft_steps} steps of SFT, kept in {directory}")

    return str(cached("sft", [SFT, args.sft_steps, args.train_layers, args.dtype, texts,
                              fingerprint(args.model), torch.__version__], make))


def tiny_directory(device: str = "cpu", **changes) -> Path:
    """Where the built-in model is; made by SFT on the world's texts if it is not cached."""
    torch.set_num_threads(1)  # too small to share: a second thread only makes it wait
    shape = {**TINY, **changes}
    language = Path(world.__file__).read_text(encoding="utf-8")  # another world, another model

    def make(directory):
        """The training from nothing."""
        corpus = world.sft_corpus()
        policy = fast.FastLM.untrained([text for row in corpus for text in row], **shape).to(device)
        lm.sft(policy, corpus, **TINY_SFT)
        with run.touching(directory, "HYPO_CACHE"):
            policy.save(directory)

    return cached("tiny", [shape, TINY_SFT, language, torch.__version__], make)


def cached(kind: str, settings, make: Callable[[Path], None]) -> Path:
    """Where something is kept that these settings (JSON values) decide; made if it is not there.

    A second process that wants the same waits until the first has made it.
    """
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("HYPO_CACHE", Path(__file__).parent / ".cache"))
    path = cache / f"{kind}-{key}"
    if not run.RANK and not os.path.exists(path):
        with run.touching(cache, "HYPO_CACHE"):  # known before the minutes are spent
            cache.mkdir(parents=True, exist_ok=True)
            (cache / f"{path.name}.lock").touch()
        with filelock.FileLock(cache / f"{path.name}.lock"):
            if not path.exists():
                make(path)
    run.wait()
    return path


def fingerprint(name: str | None):
    """Of a directory, a hash of its files; any other name, such as a hub's, as it is."""
    if name is None or not os.path.isdir(name):
        return name
    files = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
    return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]


# ---- preference pairs

def preferences(args, ref: LM, judge) -> tuple[
        list[Encoded], Sequence[Prompt], list[Encoded], Sequence[Prompt]]:
    """(pairs, prompts) to train on and (pairs, prompts) held out: sampled, or from a file."""
    if args.data is not None and not is_task(args.data):  # it holds pairs
        (train, ids), (held_out, held_out_ids) = pairs_of_file(args, ref)
        return (add_ref_logps(ref, ids), prompts_of(train),
                add_ref_logps(ref, held_out_ids), prompts_of(held_out))
    prompts: Sequence[Prompt]
    held_out_prompts: Sequence[Prompt]
    if args.data is not None:
        prompts, held_out_prompts = read_prompts(args.data, ref, args.max_new_tokens)
    else:
        prompts, held_out_prompts = world.world_prompts()
        longest = max(len(ref.encode_prompt(prompt)) for prompt in prompts + held_out_prompts)
        if longest + args.max_new_tokens > ref.context_length:
            raise UserError(f"--max-new-tokens {args.max_new_tokens}: the context of --model "
                            f"{args.model} is {ref.context_length} tokens, and the longest prompt "
                            f"has {longest}")
    # labels of a task are without noise, as in the DPO paper's experiment on sentiment
    sure, n_held_out = args.data is not None, 256 if args.model == "tiny" else args.eval_samples

    def sampled() -> list[Encoded]:
        """Those to train on, then those held out."""
        pairs = []
        for asked, n, seed in ((prompts, args.pairs, args.seed),
                               (held_out_prompts, n_held_out, args.seed + 10**6)):
            pairs += add_ref_logps(ref, collect(
                lambda prompts, seed: ref.respond(
                    prompts, args.max_new_tokens, torch.Generator(args.device).manual_seed(seed)),
                asked, n, seed, judge, sure))
        return pairs

    if args.model == "tiny":  # a second's work
        pairs = sampled()
    else:
        file = cached("pairs", [
            fingerprint(ref.source), fingerprint(args.data), fingerprint(judge and judge.name), args.pairs,
            args.seed, args.dtype, args.device, args.max_new_tokens, args.eval_samples, args.plain,
            args.batch_size, args.micro_batch],  # log-probs are those of the same batches, to the bit
            lambda file: write_pairs(file, sampled(), "HYPO_CACHE"))
        print(f"pairs: two samples of pi_ref to each of {args.pairs} prompts, labelled, in {file}")
        pairs = read_pairs(file)
        if len(pairs) != args.pairs + n_held_out:
            raise UserError(f"{file} holds {len(pairs)} pairs, not {args.pairs} + {n_held_out}; "
                            "delete it, and it will be made again")
    return pairs[:args.pairs], prompts, pairs[args.pairs:], held_out_prompts


def samples_of(args, ref: LM, prompts: Sequence[Prompt], outcome, second, n: int) -> list[dict]:
    """n samples of pi_ref to the held-out prompts in turn, judged: drawn once, for runs of all seeds."""
    n = max(n, args.eval_samples)
    file = cached("samples", [
        fingerprint(ref.source), prompts, *(judge and fingerprint(judge.name) for judge in (outcome, second)),
        n, args.max_new_tokens, args.dtype, args.device, args.plain, args.batch_size, torch.__version__],
        lambda file: run.write_rows(file, judged_samples(
            ref, prompts, n, args.max_new_tokens, run.seed_of("pi_ref"), outcome, second), "HYPO_CACHE"))
    return read_once(file)


@functools.cache
def read_once(file: Path) -> list[dict]:
    """The rows of a file that does not change."""
    return run.read_rows(file)


def collect(respond: Callable, prompts: Sequence[Prompt], n: int, seed: int, judge: world.Judge,
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
def add_ref_logps(ref: LM, pairs: Sequence[Encoded]) -> list[Encoded]:
    """The pairs with log pi_ref of both responses, nats."""
    logps: list[tuple[float, float]] = []
    for i in lm.progress(range(0, len(pairs), ref.batch_size), "log pi_ref", "batches"):
        chosen, rejected = ref.pair_logps(pairs[i:i + ref.batch_size])
        logps += zip(chosen.tolist(), rejected.tolist())
    return [pair._replace(ref_chosen=c, ref_rejected=r) for pair, (c, r) in zip(pairs, logps)]


def write_pairs(path, pairs: Iterable[Encoded], flag: str = "--out") -> None:
    """Encoded pairs as JSONL."""
    run.write_rows(path, [pair._asdict() for pair in pairs], flag)


def read_pairs(path) -> list[Encoded]:
    """What write_pairs wrote."""
    try:
        return [Encoded(**row) for row in run.read_rows(path)]
    except (UserError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it will be made "
                        "again") from None


# ---- files from outside: every check names the file, the line and the field

def pairs_of_file(args, policy: LM) -> list[tuple[list[Pair], list[Encoded]]]:
    """[what to train on, what is held out], each as texts and as token ids; says what is lost.

    --max-new-tokens, where it is not given, is what 99 % of the responses need, within the context.
    """
    sift, parts, chat = Sift(args.skip_bad), [], bool(policy.tokenizer.chat_template)
    files = sources(args.data)
    for rows in files:
        pairs = read_pairs_of(rows, sift, chat)
        parts.append(sift(functools.partial(token_ids, policy), pairs))
    rows = [row for part in parts for row in part]
    lengths = sorted(len(y) for _, ids in rows for y in ids[1:3])
    prompts = sorted(len(ids.prompt) for _, ids in rows)
    room = max(policy.context_length // 2, policy.context_length - prompts[99 * (len(rows) - 1) // 100])
    if args.max_new_tokens is None:  # the one argument that the data decide
        args.max_new_tokens = max(1, min(lengths[-1 - len(lengths) // 100], room))
    parts = [sift(functools.partial(cut, policy, args.max_new_tokens), part) for part in parts]
    report(args, policy, sum(map(len, files)), [row for part in parts for row in part], sift.left_out, lengths)
    if len(parts) == 1:
        parts = split(parts[0], args)
    train, held_out = ([pair[:3] for pair, _ in part] for part in parts)
    refuse_shared(train, held_out, args.data)
    return [([pair for pair, _ in part], [ids for _, ids in part]) for part in parts]


def report(args, policy: LM, n_rows: int, rows: list, left_out: Counter, lengths: list[int]) -> None:
    """Say what is trained on of a file, and what is not."""
    n = args.max_new_tokens
    why = "".join(f", {count} {kind}" for kind, count in left_out.most_common())
    ended = [policy.ended(y) for _, ids in rows for y in ids[1:3]]
    tokens = sum(len(y) for _, ids in rows for y in ids[1:3])
    print(f"{args.data}: {n_rows} rows, {sum(left_out.values())} left out{why.replace(',', ':', 1)}. "
          f"Responses: {len(ended) - sum(ended)} of {len(ended)} are cut at --max-new-tokens {n}, "
          f"{sum(ended) / len(ended):.1%} end with their EOS; {tokens} of {sum(lengths)} tokens are used")
    chats = sum(not isinstance(pair.prompt, str) for pair, _ in rows)
    if policy.tokenizer.chat_template:
        print(f"{chats} of {len(rows)} prompts are conversations, which the chat template writes out; the others "
              "are texts as they are")
    spelled = {token for pair, _ in rows for text in (text_of(pair.prompt), pair.chosen, pair.rejected)
               for token in policy.chat.special.findall(text)}
    if spelled:
        print(f"The texts spell out {', '.join(sorted(spelled))}: there it is text, and no special token. "
              "A chat template writes special tokens around messages: give a list of them")


def split(rows: list[tuple[Pair, Encoded]], args) -> list[list[tuple[Pair, Encoded]]]:
    """[to train on, held out]: a tenth of the prompts is held out, with all their rows."""
    prompts = [text_of(prompt) for prompt in prompts_of([pair for pair, _ in rows])]
    if len(prompts) < 2:
        raise UserError(f"{args.data}: {len(prompts)} prompts; at least 2 are needed, one to hold out, "
                        "or a directory with pairs.jsonl and held_out_pairs.jsonl")
    random.Random(args.seed).shuffle(prompts)
    tenth = set(prompts[:max(1, len(prompts) // 10)])
    parts: list[list[tuple[Pair, Encoded]]] = [[], []]
    for row in rows:
        parts[text_of(row[0].prompt) in tenth].append(row)
    return parts


def prompts_of(pairs: Iterable[Pair]) -> list[Prompt]:
    """Each prompt once, in a fixed order."""
    return [prompt for _, prompt in sorted({text_of(pair.prompt): pair.prompt for pair in pairs}.items())]


def read_strings(path, *fields: str) -> list[tuple]:
    """Rows of strings, for example (prompt, response) of sft.jsonl."""
    return [tuple(string(row, field, where) for field in fields)
            for where, row in read_objects(path)]


def read_prompts(directory, policy: LM, max_new_tokens: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts) of a task directory; none may be in both."""
    prompts: list[list[Prompt]] = []
    for name in ("prompts.jsonl", "held_out_prompts.jsonl"):
        rows = read_objects(Path(directory) / name)
        prompts.append([prompt_of(row, where) for where, row in rows])
        for (where, _), prompt in zip(rows, prompts[-1]):
            prompt_ids(policy, prompt, where, max_new_tokens)
    refuse_shared([(prompt,) for prompt in prompts[0]], [(prompt,) for prompt in prompts[1]], directory)
    return prompts[0], prompts[1]


def refuse_shared(train: Iterable, held_out: Iterable, directory) -> None:
    """UserError if a row (prompt, texts) is trained on and held out."""
    train, held_out = ({(text_of(prompt), *texts) for prompt, *texts in rows}
                       for rows in (train, held_out))
    shared = train & held_out
    if shared:
        raise UserError(f"{directory}: {len(shared)} rows are among those to train on and among "
                        f"those held out, for example {min(shared)[0]!r:.60}; what is trained on "
                        "cannot be held out")


def read_task(directory) -> tuple[str, str]:
    """task.json: the judge that labels and measures ("label"), and the one that only measures."""
    folder, where = Path(directory), f"{directory}/task.json"
    task = run.read_json(folder / "task.json", "--data")
    names = [string(task, role, where) for role in ("label", "second")]
    # a judge's directory may lie in the task's
    label, second = (str(folder / name) if (folder / name).is_dir() else name for name in names)
    return label, second
