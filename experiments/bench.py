"""The training steps that ship, timed beside TRL's on the same work.

    pip install trl==1.16.0 accelerate==1.15.0 datasets==5.2.0    # without it, only the plain forms are compared
    python -m experiments.bench                                   # all rows, about an hour on one core of a CPU
    python -m experiments.bench --only "^DPO step, tiny$" --n 5   # the rows whose names match, five steps each
    python -m experiments.bench --pieces                          # what each piece of fast.py gains, about ten minutes
    python -m experiments.bench --device cuda --dtype bfloat16 --batch 16 --only "small|SmolLM2"    # on a GPU, minutes

What is timed is dpo.train, hypo.train, rlhf.train_reward, train_ppo, train_rloo and lm.sft themselves, from the moment
that their loop gives them a step until they ask for the next one: no evaluation, no checkpoint. The sides of a row are
TRL's own training loop, ours ("ours", with fast.py), and ours with the forms of lm.py ("plain"). They get the same
model directory, the same pairs in the same order and the same precision, and take their steps by turns. Where the work
is the same, not only of the same kind, loss and gradient norm must agree with TRL's in every step, or the row fails.

A row has the medians over the steps after the first, and the quartiles of the ratio step by step, in CPU seconds of
the process and one thread: other work on the machine disturbs them less than it does wall time. On a GPU it is wall
time, until the GPU is done.
"""

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import random
import re
import socket
import statistics
import string
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from unittest import mock

import huggingface_hub
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PrinterCallback, TrainerCallback

import data
import dpo
import fast
import hypo
import lm
import rlhf
import run
import world
from rows import encode

RESULTS = Path(__file__).parent.parent / "results" / "bench.json"  # and results/bench_gpu.json
OURS = {"ours": fast.FastLM, "plain": lm.LM}
PEERS = {"TRL": "TRL", "generate": "`generate`", "plain": "plain forms"}  # a row's peer is the first that it has
WORDS = [" " + "".join(letters) for letters in islice(product(string.ascii_lowercase, repeat=4), 50256)]


# ---------------------------------------------------------------------------------------------------
# the clock

def now() -> float:
    """Seconds: of the process, or by the wall where a GPU works."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Side(TrainerCallback):
    """A training function in a thread of its own, which rests before each of its steps until it is asked for it."""

    def __init__(self, train: Callable):
        self.seconds: list[float] = []  # one entry a step
        self.metrics: list[dict] = []  # what each step logged
        self.error: BaseException | None = None
        self.over = False
        self.turn, self.rests = threading.Semaphore(0), threading.Semaphore(0)

        def work():
            torch.set_num_threads(1)  # each thread has a number of its own
            try:
                train(self)
            except BaseException as error:
                self.error = error
            self.over = True
            self.rests.release()
        # a training function looks for its loop once, before its first step
        with mock.patch.object(run, "loop", self.loop), mock.patch.object(lm, "progress", self.bar):
            threading.Thread(target=work, daemon=True).start()
            self.wait()

    def step(self) -> None:
        """Let it take one step, and come to rest before the next."""
        if self.over:
            raise RuntimeError("it has taken all of its steps, perhaps in a loop that is not run.loop")
        self.turn.release()
        self.wait()

    def wait(self) -> None:
        """Until it rests, or is done."""
        self.rests.acquire()
        if self.error:
            raise self.error

    # -- what its thread calls; TRL's trainers call the three that begin with "on"

    def on_step_begin(self, *_, **__) -> None:
        self.rests.release()
        self.turn.acquire()
        self.began = now()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(now() - self.began)

    def on_log(self, *_, **more) -> None:
        if "grad_norm" in more["logs"]:
            self.metrics.append(more["logs"])

    def steps(self, numbers) -> Iterator[int]:
        """Of any loop."""
        for number in numbers:
            self.on_step_begin()
            yield number
            self.on_step_end()

    def loop(self, args, trained, optimizer, evaluate) -> Iterator[run.Step]:
        """In place of run.loop."""
        for number in self.steps(range(1, args.steps + 1)):
            step = run.Step(number, args)
            run.set_learning_rate(optimizer, 1 - (number - 1) / args.steps)
            yield step
            self.metrics.append({name: float(value) for name, value in step.metrics.items()})

    def bar(self, numbers, desc, unit, **_):
        """In place of lm.progress: over the bar of lm.sft, the steps; it is told the loss."""
        if not desc.startswith("SFT"):
            return numbers
        self.numbers = numbers
        return self

    def __iter__(self) -> Iterator[int]:
        return self.steps(self.numbers)

    def set_postfix_str(self, text, **_) -> None:
        self.metrics.append({"loss": float(text.split()[1])})


def measure(trains: dict[str, Callable], steps: int, check: float | None = None, rounding: float = 0.0) -> dict:
    """A row: the sides take their steps by turns. trains: name -> function (its Side), which trains.

    check: how far loss and gradient norm may be from TRL's, relative; rounding: the loss, absolute, besides.
    """
    sides = {name: Side(train) for name, train in trains.items()}
    for _ in range(steps):
        for side in sides.values():
            side.step()
    seconds = {name: side.seconds[1:] for name, side in sides.items()}
    peer = next((name for name in PEERS if name in sides), "ours")
    row: dict = dict(n=steps - 1, seconds={name: statistics.median(each) for name, each in seconds.items()}, ratio={})
    for name in sides.keys() - {peer}:
        ratios = [theirs / ours for theirs, ours in zip(seconds[peer], seconds[name])]
        row["ratio"][name] = statistics.quantiles(ratios * 2 if steps == 2 else ratios, n=4, method="inclusive")
    if check and peer == "TRL":
        for name, side in sides.items():
            for number, (us, them) in enumerate(zip(side.metrics, sides[peer].metrics, strict=True), 1):
                for what, slack in (("loss", rounding), ("grad_norm", 0.0)):
                    if not abs(us[what] - them[what]) <= check * abs(them[what]) + slack:  # NaN fails, too
                        raise AssertionError(f"{what} of step {number}: {name} {us[what]}, TRL {them[what]}")
        row["loss_and_gradient_norm"] = {
            name: [side.metrics[0]["loss"], side.metrics[0]["grad_norm"]] for name, side in sides.items()}
    return row


# ---------------------------------------------------------------------------------------------------
# the work: model directories, pairs, pi_ref, a reward

def make_model(kind: str, directory: Path) -> str:
    """tiny is the built-in model; the others have random weights and a tokenizer of words.

    small has GPT-2's size and vocabulary, smollm2 SmolLM2-135M's layers.
    """
    if kind == "tiny":
        policy = lm.LM.load(str(data.tiny_directory()))
    elif kind == "smollm2":
        tokenizer = lm.word_tokenizer(WORDS)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        policy = lm.LM(AutoModelForCausalLM.from_config(config), tokenizer)
    else:
        policy = lm.LM.untrained(WORDS, layers=12, width=768, heads=12, positions=1024, seed=0)
        policy.model.config.activation_function = "gelu_new"  # as GPT-2 comes
    # some of TRL's trainers would leave dropout on
    policy.model.config.update(dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    policy.save(directory / kind)
    return str(directory / kind)


def make_pairs(tiny: bool, n: int) -> list[data.Pair]:
    """n preferences: sentences of the world, or random words, 64 in a prompt and 16 to 64 tokens in a response."""
    if tiny:
        corpus = world.sft_corpus(3 * n)
        return [data.Pair(x, y, z, "") for (x, y), (_, z) in zip(corpus, corpus[n:]) if y != z][:n]
    dice = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(dice.choices(WORDS, k=dice.randint(low, high)))
    return [data.Pair(text(64, 64), text(15, 63), text(15, 63), "") for _ in range(n)]  # and the EOS


@torch.no_grad()
def noisy(model):
    """pi_ref is the policy and some noise, so that the first loss is not log 2."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return model


def reward(prompts, completions, **_) -> list[float]:
    """Cheap, and hardly ever a tie."""
    return [len(text) + 0.001 * (sum(map(ord, text)) % 1000) for text in completions]


# ---------------------------------------------------------------------------------------------------
# our sides

def arguments(steps: int, batch_size: int, **changes) -> argparse.Namespace:
    """What the training functions read of a command's."""
    return argparse.Namespace(**{**dict(
        steps=steps, batch_size=batch_size, lr=1e-5, beta=0.1, max_grad_norm=1.0, seed=0, device="cpu", dtype="float32",
        train_layers=None, gradient_checkpointing=False, max_new_tokens=32, loss="dpo", length_average=False, lam=0.004,
        k=2, grpo=False, eos_penalty=1.0, epochs=2, minibatches=1, target_kl=None), **changes})


def train_ours(algorithm: str, kind: type[lm.LM], path: str, pairs: list[data.Pair], args, side: Side) -> None:
    """The function that ships, with the loop of Side. kind: lm.LM or fast.FastLM."""
    policy = kind.load(path, args.device, batch_size=args.batch_size)
    ref, prompts = noisy(policy.frozen_copy()), [pair.prompt for pair in pairs]
    rows = encode(policy, pairs, 64 if policy.context_length > 64 else 32)
    start = types.SimpleNamespace(policy=policy, ref=ref, prompts=prompts, label=reward)
    if algorithm in ("DPO", "HyPO"):
        start.pairs = data.add_ref_logps(ref, rows)
    policy, ref = run.share(policy), run.share(ref)
    if algorithm == "DPO":
        dpo.train(policy, dpo.offline(start, args), None, args)
    elif algorithm == "OnlineDPO":
        dpo.train(policy, dpo.online(start, args), None, args)
    elif algorithm == "HyPO":
        hypo.train(policy, ref, start.pairs, None, args)
    elif algorithm == "PPO":
        rlhf.train_ppo(policy, ref, prompts, reward, None, args)
    elif algorithm == "RLOO":
        rlhf.train_rloo(policy, ref, prompts, reward, None, args)
    elif algorithm == "Reward":
        rlhf.train_reward(scorer_of(policy), rows, None, args)
    else:
        squares: list[torch.Tensor] = []  # lm.sft has no use for the gradient's norm
        for parameter in policy.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: squares.append(p.grad.square().sum()))
        corpus = [(pair.prompt, pair.chosen) for pair in pairs]
        lm.sft(policy, corpus, args.steps, args.batch_size, args.lr, args.seed)
        for metrics, norm in zip(side.metrics, torch.stack(squares).view(args.steps, -1).sum(1).sqrt()):
            metrics["grad_norm"] = norm.item()


def scorer_of(policy) -> lm.Scorer:
    """A scorer whose first scores are not 0."""
    scorer = lm.Scorer.of(policy)
    weight = scorer.model.score.weight
    weight.data.copy_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return scorer


# ---------------------------------------------------------------------------------------------------
# TRL's

TRL: dict[str, dict] = {  # what each of its trainers must be told for the same work
    "DPO": dict(beta=0.1, max_length=None),
    "OnlineDPO": dict(beta=0.1, temperature=1.0, top_k=0, max_new_tokens=32, max_length=128),
    "RLOO": dict(beta=0.1, temperature=1.0, num_generations=2, max_completion_length=32),
    "SFT": dict(max_length=None, completion_only_loss=True, weight_decay=0.01,
                max_grad_norm=1e9),
    "Reward": dict(max_length=None, weight_decay=rlhf.WEIGHT_DECAY),
}


def train_trl(algorithm: str, path: str, pairs: list[data.Pair], args, changes: dict, side: Side) -> None:
    """TRL's own loop, with its defaults otherwise."""
    order = [pair for number in range(args.steps) for pair in run.Step(number + 1, args).minibatch(pairs)]
    more: dict = {"reward_funcs": reward} if algorithm in ("OnlineDPO", "RLOO") else {}
    if algorithm in ("DPO", "OnlineDPO"):
        more["ref_model"] = noisy(AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False))
    elif algorithm == "SFT":  # as lm.sft draws
        dice = torch.Generator().manual_seed(args.seed)
        order = [pairs[i] for _ in range(args.steps)
                 for i in torch.randint(len(pairs), (args.batch_size,), generator=dice).tolist()]
    elif algorithm == "Reward":
        scorer, path = scorer_of(lm.LM.load(path)), f"{path}-scorer"
        pad = scorer.model.config.pad_token_id = len(scorer.tokenizer) - 1  # a text's end: not the EOS, nor in use
        scorer.tokenizer.pad_token = scorer.tokenizer.convert_ids_to_tokens(pad)
        scorer.save(path)
    rows = [dict(pair._asdict(), completion=pair.chosen) for pair in order]
    package = importlib.import_module("trl.experimental.online_dpo" if algorithm == "OnlineDPO" else "trl")
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # or TRL reports its use to the hub
    changes = TRL[algorithm] | changes
    config = getattr(package, f"{algorithm}Config")(**{**dict(
        output_dir=f"{path}-trl", per_device_train_batch_size=args.batch_size * changes.get("num_generations", 1),
        max_steps=args.steps, learning_rate=args.lr, lr_scheduler_type="linear", max_grad_norm=args.max_grad_norm,
        bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu", gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, train_sampling_strategy="sequential"), **changes})
    trainer = getattr(package, f"{algorithm}Trainer")(
        path, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(path, trust_remote_code=False), **more)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(side)
    trainer.train()


# ---------------------------------------------------------------------------------------------------
# the rows: functions (model directory, n steps, ...) -> row

CHECKS = {"DPO": (1e-4, 0.0), "SFT": (1e-4, 5e-4), "Reward": (1e-3, 0.0)}  # lm.sft shows three decimals of the loss


def sides_of(path, n, algorithm, batch, plain=True, config=None, **changes):
    """(arguments, the sides) of n + 1 steps. config: of TRL's trainer; changes: to our arguments."""
    args = arguments(n + 1, batch, **changes)
    pairs = make_pairs(path.endswith("tiny"), args.steps * batch)
    sides = {"TRL": partial(train_trl, algorithm, path, pairs, args, config or {})
             } if algorithm in TRL and find_spec("trl") else {}
    return args, sides | {name: partial(run.precision(args)(train_ours), algorithm, kind, path, pairs, args)
                          for name, kind in OURS.items() if plain or name == "ours"}


def step(path, n, algorithm, **how):
    """A training step of an algorithm."""
    args, sides = sides_of(path, n, algorithm, **how)
    return measure(sides, args.steps, *CHECKS.get(algorithm, ()) if args.dtype == "float32" else ())


def sampling(path, n, batch, new=48, **changes):
    """Against model.generate. The tiny model ends its responses; random weights hardly ever do."""
    new, length = (24, 8) if path.endswith("tiny") else (new, 64)
    args = arguments(n + 1, batch, **changes)
    policy = lm.LM.load(path, args.device)
    prompts = [(policy.encode_prompt(pair.prompt) * 9)[:length] for pair in make_pairs(path.endswith("tiny"), batch)]

    @torch.no_grad()
    def generate(side):
        ids = torch.tensor(prompts, device=args.device)
        for _ in side.steps(range(n + 1)):
            policy.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                                  max_new_tokens=new, pad_token_id=policy.eos_id, eos_token_id=policy.eos_id).tolist()

    def sample(kind, side):
        policy = kind.load(path, args.device, batch_size=batch)
        generator = torch.Generator(args.device).manual_seed(0)
        for _ in side.steps(range(n + 1)):
            policy.sample(prompts, new, generator)
    sides = {"generate": generate, **{name: partial(sample, kind) for name, kind in OURS.items()}}
    return measure({name: run.precision(args)(side) for name, side in sides.items()}, n + 1)


# ---------------------------------------------------------------------------------------------------
# fast.py without one of its pieces each

class Apart(int):
    """A token that equals no other, not even itself elsewhere: two prompts that begin so are not the same."""
    __eq__, __hash__ = object.__eq__, object.__hash__


def apart(prompts) -> list[lm.Ids]:
    """Prompts of which no two are equal, but by their tokens."""
    return [[Apart(first), *rest] for first, *rest in prompts]


class PlainLogps(fast.FastLM):
    """Rows with padding."""
    token_logps = lm.LM.token_logps


class NarrowRows(fast.FastLM):
    """A row holds one prompt with its responses."""
    def token_logps(self, *batch):
        plant = fast.plant
        with mock.patch.object(fast, "plant", lambda *args: [[tree] for row in plant(*args) for tree in row]):
            return super().token_logps(*batch)


class PromptsAgain(fast.FastLM):
    """A prompt is read once for each of its responses."""
    def token_logps(self, prompts, responses):
        return super().token_logps(apart(prompts), responses)

    def sample_batch(self, prompts, *how, **more):
        return super().sample_batch(apart(prompts), *how, **more)


class PlainSampling(fast.FastLM):
    """The sampler of lm.py."""
    sample_batch = lm.LM.sample_batch


class NobodyLeft(fast.FastLM):
    """A response that has ended is written on with the others."""
    def sample_batch(self, *args, **more):
        with mock.patch.object(fast, "CROWD", 0.0):
            return super().sample_batch(*args, **more)


PIECES = {"ours": fast.FastLM, "packed log-probs": PlainLogps, "several prompts in a row": NarrowRows,
          "a prompt read once": PromptsAgain, "the sampler": PlainSampling, "ended responses left behind": NobodyLeft}


def pieces(path, n, algorithm, batch, **changes):
    """A training step with all of fast.py ("ours"), and without each of its pieces."""
    args, pairs = arguments(n + 1, batch, **changes), make_pairs(path.endswith("tiny"), (n + 1) * batch)
    return measure({name: partial(train_ours, algorithm, kind, path, pairs, args)
                    for name, kind in PIECES.items()}, n + 1)


def memory(path, n):
    """Peak memory, MB, of a process that takes n + 1 DPO steps; pi_ref is kept, as dpo.py does for evaluations."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return dict(n=n, peak_megabytes={
            name: pool.apply(peak, (path, n, name)) for name in sides_of(path, n, "DPO", 4)[1]})


def processes(path, n, batch):
    """Wall time of a DPO step by one process and by two, a thread each, which share its rows; by turns."""
    context, wall = multiprocessing.get_context("spawn"), {1: [], 2: []}
    for count in (1, 2, 1, 2):
        results = context.SimpleQueue()
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        workers = []
        for rank in range(count):  # as torchrun starts them
            ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_ADDR="localhost", MASTER_PORT=port)
            with mock.patch.dict(os.environ, {name: str(value) for name, value in ranks.items()}):
                workers.append(context.Process(target=work, args=(path, n, batch, results)))
                workers[-1].start()
        wall[count] += results.get()
        for worker in workers:
            worker.join()
    one, two = (statistics.median(wall[count]) for count in (1, 2))
    return dict(n=2 * n, wall_seconds={"one": one, "two": two}, speedup=one / two)


def work(path: str, n: int, batch: int, results) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    seconds = []
    with run.joined():
        side = Side(sides_of(path, n, "DPO", batch, plain=False)[1]["ours"])
        for _ in range(n + 1):
            began = time.perf_counter()
            side.step()
            seconds.append(time.perf_counter() - began)
    if not run.RANK:
        results.put(seconds[1:])


def peak(path: str, n: int, name: str) -> int:
    """What memory() does in a process of its own."""
    measure({name: sides_of(path, n, "DPO", 4)[1][name]}, n + 1)
    status = Path("/proc/self/status").read_text()  # getrusage would begin with the peak of the parent
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


PRECOMPUTED = dict(precompute_ref_log_probs=True)  # before training, as we do; TRL's default is in every step
# name: (function, kind of model, n, arguments); no plain forms where a step takes long, or where there is one form
ROWS: dict[str, tuple[Callable, str, int, dict]] = {
    "DPO step, gpt2-small": (step, "small", 10, dict(algorithm="DPO", batch=4)),
    "DPO step, gpt2-small, TRL's reference precomputed": (
        step, "small", 10, dict(algorithm="DPO", batch=4, config=PRECOMPUTED)),
    "DPO step, gpt2-small, bfloat16": (step, "small", 10, dict(algorithm="DPO", batch=4, dtype="bfloat16")),
    "DPO step, tiny": (step, "tiny", 30, dict(algorithm="DPO", batch=64)),
    "DPO step, tiny, TRL's reference precomputed": (
        step, "tiny", 30, dict(algorithm="DPO", batch=64, config=PRECOMPUTED)),
    "online DPO step, 2 samples a prompt, gpt2-small": (
        step, "small", 10, dict(algorithm="OnlineDPO", batch=8, plain=False)),
    "online DPO step, 2 samples a prompt, tiny": (step, "tiny", 20, dict(algorithm="OnlineDPO", batch=64)),
    "RLOO step, 2 samples a prompt, gpt2-small": (step, "small", 10, dict(algorithm="RLOO", batch=8, plain=False)),
    "sampling, gpt2-small, batch 8": (sampling, "small", 10, dict(batch=8)),
    "sampling, gpt2-small, batch 32": (sampling, "small", 10, dict(batch=32)),
    "sampling, gpt2-small, batch 512": (sampling, "small", 2, dict(batch=512, new=16)),
    "sampling, tiny, batch 8": (sampling, "tiny", 30, dict(batch=8)),
    "sampling, tiny, batch 64": (sampling, "tiny", 30, dict(batch=64)),
    "sampling, tiny, batch 512": (sampling, "tiny", 20, dict(batch=512)),
    "sampling, SmolLM2's size, batch 32": (sampling, "smollm2", 4, dict(batch=32)),
    "DPO step, SmolLM2's size": (step, "smollm2", 4, dict(algorithm="DPO", batch=4)),
    "HyPO step, SmolLM2's size": (step, "smollm2", 4, dict(algorithm="HyPO", batch=4, max_new_tokens=24)),
    "SFT step, gpt2-small": (step, "small", 10, dict(algorithm="SFT", batch=8)),
    "SFT step, tiny": (step, "tiny", 30, dict(algorithm="SFT", batch=128)),
    "reward model step, gpt2-small": (step, "small", 10, dict(algorithm="Reward", batch=4, plain=False)),
    "HyPO step, tiny": (step, "tiny", 30, dict(algorithm="HyPO", batch=64, max_new_tokens=24)),
    "HyPO step, gpt2-small": (step, "small", 10, dict(algorithm="HyPO", batch=4, max_new_tokens=24)),
    "PPO step, gpt2-small": (step, "small", 10, dict(algorithm="PPO", batch=8)),
    "memory of DPO steps, gpt2-small": (memory, "small", 2, {}),
    "two processes, DPO step, gpt2-small": (processes, "small", 2, dict(batch=16)),
}
WITHOUT = {  # fast.py without one of its pieces
    "DPO step, gpt2-small": (pieces, "small", 10, dict(algorithm="DPO", batch=4)),
    "DPO step, tiny": (pieces, "tiny", 30, dict(algorithm="DPO", batch=64)),
    "online DPO step, gpt2-small": (pieces, "small", 4, dict(algorithm="OnlineDPO", batch=8)),
    "online DPO step, tiny": (pieces, "tiny", 20, dict(algorithm="OnlineDPO", batch=64)),
    "HyPO step, tiny": (pieces, "tiny", 20, dict(algorithm="HyPO", batch=64, max_new_tokens=24)),
}


# what a row should reach: peer / ours, at the median
GOALS = {"DPO step, gpt2-small": 4, "DPO step, tiny": 3, "online DPO step, 2 samples a prompt, gpt2-small": 2.2,
         "sampling, gpt2-small, batch 8": 1.3, "sampling, tiny, batch 64": 2.5, "PPO step, gpt2-small": 1}


# ---------------------------------------------------------------------------------------------------
# the command

def hardware(device: str) -> dict:
    """The machine and the versions."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text() if info.exists() else "")
    gpu = dict(GPU=torch.cuda.get_device_name(device)) if device.startswith("cuda") else {}
    return dict(**gpu, processor=model[1] if model else "unknown", cores=multiprocessing.cpu_count(), threads=1, **{
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl") if find_spec(name)})


def table(report: dict) -> str:
    """The machine, and the ratios as Markdown; a ratio under its row's goal is said to be so."""
    lines = ["Measured on " + ", ".join(f"{name} {value}" for name, value in report["hardware"].items()) + ":", "",
             "| | peer | ours, s | peer / ours [quartiles] | plain forms / ours | n |",
             "| --- | --- | ---: | ---: | ---: | ---: |"]
    for name in ROWS:
        row = report["rows"].get(name, {})
        if "ours" not in row.get("ratio", {}) or "seconds" not in row:
            continue
        seconds, (low, middle, high) = row["seconds"], row["ratio"]["ours"]
        peer = next(PEERS[side] for side in PEERS if side in seconds)
        plain = f"{seconds['plain'] / seconds['ours']:.2f}" if "plain" in seconds else ""
        aim = 0 if "GPU" in report["hardware"] else GOALS.get(name, 0)  # goals are of a CPU
        goal = f", under the goal of {aim}" if middle < aim else ""
        lines.append(f"| {name} | {peer} | {seconds['ours']:.3g} | {middle:.2f} [{low:.2f}, {high:.2f}]{goal} "
                     f"| {plain} | {row['n']} |")
    return "\n".join(lines)


def table_of_pieces(report: dict) -> str:
    """How much longer a step takes without a piece, in percent."""
    names = [name for name in PIECES if name != "ours"]
    lines = [f"| without | {' | '.join(names)} | n |", f"| --- | {'---: | ' * len(names)}---: |"]
    for name, row in report["rows"].items():
        gains = [f"{100 / row['ratio'][piece][1] - 100:+.0f} %" for piece in names]
        lines.append(f"| {name} | {' | '.join(gains)} | {row['n']} |")
    return "\n".join(lines)


def rows_named(pattern: str) -> list[str]:
    """The rows whose names match the regular expression."""
    try:
        names = [name for name in ROWS if re.search(pattern, name)]
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{pattern!r} is no regular expression: {error}") from None
    if not names:
        raise argparse.ArgumentTypeError(f"no row's name matches {pattern!r}; the rows are: {'; '.join(ROWS)}")
    return names


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=rows_named, metavar="PATTERN",
                        help="rows whose names match this regular expression (default: all)")
    parser.add_argument("--pieces", action="store_true", help="five training steps without one piece of fast.py each")
    parser.add_argument("--n", type=run.number(int, 1, 10**4),
                        help="steps of each row (default: 2 to 30, each row's own)")
    parser.add_argument("--device", type=run.device, help="cpu, or cuda on a machine with a GPU (default cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the forward passes (default: each row's "
                        "own, most often float32)")
    parser.add_argument("--batch", type=run.COUNT, help="pairs or prompts in a step (default: each row's own)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="the file of figures, made anew "
                        "(default runs/bench.json; the published ones are in results/bench.json)")
    args = parser.parse_args(argv)
    if args.pieces and args.only:
        parser.error("--only would have no effect: --pieces has rows of its own")
    rows = WITHOUT if args.pieces else {name: ROWS[name] for name in args.only or ROWS}
    asked = {name: getattr(args, name) for name in ("device", "dtype", "batch") if getattr(args, name)}
    if asked:  # the other rows are of the CPU alone
        rows = {name: row for name, row in rows.items() if row[0] in (step, sampling, pieces)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report: dict = {"rows": {}, "hardware": hardware(args.device or "cpu")}
    with tempfile.TemporaryDirectory() as directory:
        for name, (function, kind, n, how) in rows.items():
            run.write_text(args.out, json.dumps(report, indent=1) + "\n")  # at first empty: it can be written
            path = Path(directory, kind)
            if not path.exists():
                make_model(kind, path.parent)
            report["rows"][name] = row = function(str(path), args.n or n, **how | asked)
            print(name, json.dumps(row), flush=True)
    run.write_text(args.out, json.dumps(report, indent=1) + "\n")
    print((table_of_pieces if args.pieces else table)(report))


if __name__ == "__main__":
    run.start(main, again="the same command begins anew")
