"""What every training command shares and no reader of an algorithm needs.

Arguments, the step loop with its progress bar and metrics file, checkpoints and exact resume.

All randomness is a function of (seed, what it is for, step): a step draws from generators made for
it and from nothing else. So a checkpoint needs no random state and no position in the data: the
weights, the optimizer's state and the step's number say all, and a resumed run ends with the bytes
of an uninterrupted one.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

REVIEWS = Path("runs/reviews")  # the task of a pretrained model, if it is there
SHOWN = {"loss": "loss {:.3f}", "win_rate": "win {:.2f}", "reverse_kl": "KL {:.1f} nats",
         "reward_accuracy": "accuracy {:.2f}"}  # by the progress bar: the last ones measured


RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
at = ""  # the step that runs, for the sentence about a number that went wrong in it


class UserError(Exception):
    """What the user gave cannot work. Its text says what was given, why not, and what to do.

    It is printed as a sentence. Every other exception is a bug, ours or a student's, and keeps its
    trace.
    """


def start(main: Callable,
          again="the same command with --resume goes on from the last checkpoint") -> None:
    """Run a command, print what the user can mend as a sentence, end quietly on Ctrl-C."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w", encoding="utf-8")
                              for stream in (sys.stdout, sys.stderr))  # one may be closed
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with joined():
            main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except FloatingPointError as error:  # a reward or a logit that is NaN or infinite
        sys.exit(f"error: {at}{error}")
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("(out of|allocate) memory", str(error))):
            raise
        sys.exit(f"error: out of memory ({error!s:.80}); --micro-batch 4 (or 2, 1) gives the same "
                 f"gradient with less memory, --gradient-checkpointing saves more; {again}")
    except BrokenPipeError:
        sys.exit(f"error: who read this command's output, such as head, has gone; {again}")
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; {again}")
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                sys.exit(f"error: standard output: {error}")


# ---- arguments

def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """An argparse type: a finite number of that kind in [low, high]; above: in (low, high]."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or value > high or math.isinf(value):
            sort = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(
                f"must be {sort} {'above' if above else 'of at least'} {low}"
                + (f" and at most {high:.0f}" if high < math.inf else "") + f", got {text:.40}")
        return value
    return read


COUNT, SEED = number(int, 1, 10**7), number(int, 0, 2**32 - 1)
NUMBER, POSITIVE = number(float, 0), number(float, 0, above=True)
ZERO_OR_COUNT = number(int, 0, 10**7)


def device(name: str) -> str:
    """An argparse type: a device on which a number can be put."""
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # each backend has its own ways to say that it is not there
        why = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{name} cannot be used here ({why:.99}); give cpu, or cuda "
                                         "on a machine with a GPU") from None
    return name


def parser(doc: str | None, beta: Callable = POSITIVE):
    """(argument parser with the flags of all training commands, what adds an algorithm's)."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    of_algorithm = add = p.add_argument_group("the algorithm").add_argument
    add("--steps", type=COUNT, help="optimizer steps, over which the learning rate falls in a line to 0 "
        "(default 100 for tiny, else 200)")
    add("--batch-size", type=COUNT, help="preference pairs in a step (default 64 for tiny, else 16)")
    add("--lr", type=POSITIVE, help="AdamW's learning rate in the first step (default for tiny 1e-3, "
        "in hypo.py 2e-3, in rlhf.py 4e-3; else 2e-5; with --train-layers try 1e-4)")
    add("--beta", type=beta, default=0.1, help="the larger, the closer to pi_ref (default 0.1)")
    add("--max-grad-norm", type=POSITIVE, default=1.0, help="clip the gradient's norm (default 1)")

    add = p.add_argument_group("the data").add_argument
    add("--model", default="tiny", help="the language model to start from: tiny (built in, made on "
        "first use), a transformers directory, or a hub name such as gpt2 (default tiny)")
    add("--data", help="what to learn: world (built in), a directory with prompts, or preference "
        "pairs from a JSONL file or a hub data set; data.py says more (default world; for a "
        f"pretrained model {REVIEWS}, if it is there)")
    add("--pairs", type=COUNT, help="preference pairs to sample from pi_ref, where --data holds "
        "none (default 400 for tiny, else 1000)")
    add("--judge", help="who judges responses: golden, vader, a directory, task (the one that "
        "--data names) or none; judges.py says more (default task, golden in the world, none for "
        "pairs from a file; rlhf.py trains its own)")
    add("--sft-steps", type=ZERO_OR_COUNT, help="steps of fine-tuning on the texts of --data that "
        "make a pretrained model pi_ref, done once and kept (default 200; 0 for the policy of a run)")
    add("--max-new-tokens", type=COUNT, help="longest response, in tokens (default 24; for pairs from "
        "a file, what 99 %% of their responses need)")
    add("--skip-bad", action="store_true", help="leave out the rows of a file that cannot be used, and "
        "count them; without it the first such row is an error")
    add_run_flags(p)
    return p, of_algorithm


def add_run_flags(p: argparse.ArgumentParser) -> None:
    """The flags that say how a run is watched and where it runs."""
    add = p.add_argument_group("the run").add_argument
    add("--seed", type=SEED, default=0, help="decides everything random (default 0)")
    add("--eval-every", type=COUNT, help="evaluate and checkpoint every this many steps (default: a "
        "quarter of --steps)")
    add("--eval-samples", type=COUNT, help="responses to evaluate (default 512 for tiny, else 64)")
    add("--out", type=Path, help="the run's directory (default runs/ and the algorithm's name)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, exactly")

    add = p.add_argument_group("the machine").add_argument
    add("--device", type=device, help="cpu, cuda, cuda:1, mps ... (default: cuda if there is one; for a "
        "pretrained model mps, if there is one)")
    add("--dtype", choices=["float32", "bfloat16"], help="what the forward pass computes in; "
        "weights stay float32 (default bfloat16 for a pretrained model on a GPU that has it)")
    add("--train-layers", type=COUNT, metavar="N", help="train only the last N layers: less memory "
        "and time, for CPUs (default: all)")
    add("--micro-batch", type=COUNT, metavar="N", help="responses in a forward and backward pass; "
        "the gradient is the whole batch's, for less memory and a forward pass more (default: all)")
    add("--gradient-checkpointing", action="store_true", help="keep only each layer's input for "
        "the backward pass and compute the rest again: less memory, a forward pass more")
    add("--plain", action="store_true", help="run the forms that lm.py shows instead of fast.py's: "
        "slower, the same results to rounding")


def is_task(data: str | None) -> bool:
    """Whether --data names a directory with prompts; else it names preference pairs."""
    return data is not None and os.path.isfile(os.path.join(data, "task.json"))


def parse(p: argparse.ArgumentParser, argv, algorithm: Callable, useless: Callable | None = None,
          tiny_lr: float = 1e-3):
    """Checked arguments, every default filled in. algorithm: function args -> the run's name.

    useless: function args -> {flag: why it would have no effect}; a flag that is given is refused.
    tiny_lr: default of --lr for the built-in model.
    """
    args = p.parse_args(argv)
    tiny = args.model == "tiny"
    if args.data is None and not tiny and is_task(str(REVIEWS)):
        args.data = str(REVIEWS)
    args.data = None if args.data == "world" else args.data
    has_prompts = args.data is None or is_task(args.data)  # or it holds pairs
    unused = useless(args) if useless else {}
    if tiny:
        unused["sft_steps"] = "tiny has learned its texts"
    if has_prompts:
        unused["skip_bad"] = "it is for pairs from a file"
    else:
        unused["pairs"] = f"--data {args.data} holds the pairs"
        unused["sft_steps"] = f"--data {args.data} has no texts to fine-tune a model on"
    # argparse leaves what a namespace holds already, so None stays where no flag was given
    given = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    for name, why in unused.items():
        if getattr(given, name):
            p.error(f"--{name.replace('_', '-')} would have no effect: {why}")
    fill_in(args, has_prompts, tiny_lr)
    if args.dtype == "bfloat16" and not has_bfloat16(args.device):
        print(f"--dtype float32: {args.device} has no bfloat16 of its own and would be far slower")
        args.dtype = "float32"
    if args.judge == "task" and (args.data is None or not has_prompts):
        p.error("--judge task is the judge that a --data directory names in its task.json; here "
                "there is none")
    if args.judge == "reward" and p.get_default("judge") != "reward":
        p.error("--judge reward is what rlhf.py trains; name the directory of one that it has "
                "trained, such as runs/ppo/reward/model")
    args.algorithm = algorithm(args)
    args.out = args.out or Path("runs") / args.algorithm.replace(" ", "-")
    return args


def fill_in(args, has_prompts: bool, tiny_lr: float) -> None:
    """The defaults that depend on other flags."""
    tiny = args.model == "tiny"
    if args.device is None:
        args.device = ("cuda" if torch.cuda.is_available() else
                       "mps" if torch.backends.mps.is_available() and not tiny else "cpu")
    of_a_run = os.path.exists(Path(args.model).parent / "summary.json")  # already fine-tuned
    defaults = dict(
        pairs=400 if tiny else 1000, batch_size=64 if tiny else 16,
        steps=100 if tiny else 200, lr=tiny_lr if tiny else 2e-5,
        eval_samples=512 if tiny else 64,
        max_new_tokens=24 if has_prompts else None,  # a file has its own, see data.pairs_of_file
        sft_steps=200 if has_prompts and not tiny and not of_a_run else 0,
        dtype="bfloat16" if not tiny and args.device.startswith("cuda") and has_bfloat16(args.device)
        else "float32",
        judge="golden" if args.data is None else "task" if has_prompts else "none")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.eval_every = args.eval_every or math.ceil(args.steps / 4)


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies in bfloat16; one that only emulates it takes many times longer."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last: ARM


def precision(args):
    """Context in which matrix products run in --dtype. A cache would go stale: weights move."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16,
                          enabled=args.dtype == "bfloat16", cache_enabled=False)


# ---- files

@contextlib.contextmanager
def touching(path, flag: str = ""):
    """Around the use of a path: the file system's error becomes a sentence with path and flag."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {path}: {why}".strip()) from None


@contextlib.contextmanager
def replacing(path: Path, flag: str = "--out"):
    """Where to write a file that takes the path's place once it is complete, or not at all."""
    if RANK:  # the first process writes
        with tempfile.TemporaryDirectory() as nowhere:
            yield Path(nowhere, path.name)
        return
    beside = path.with_name(path.name + ".tmp")
    try:
        with touching(path, flag):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path, text: str, flag: str = "--out") -> None:
    """A reader sees the old file or the new one, never half of one."""
    with replacing(Path(path), flag) as beside:
        beside.write_text(text, encoding="utf-8")


def write_rows(path, rows, flag: str = "--out") -> None:
    """JSONL: one JSON value a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), flag)


def read_rows(path) -> list[dict]:
    """What write_rows wrote, of JSON objects."""
    return [json_object(row, where) for where, row in numbered_rows(path)]


def numbered_rows(path, flag: str = "") -> list[tuple[str, Any]]:
    """("file:line", value) of every line of a JSONL file."""
    with touching(path, flag):
        content = Path(path).read_bytes()
    return [(where, json_value(line, where)) for where, line in numbered_lines(path, content)]


def numbered_lines(path, content: bytes) -> list[tuple[str, bytes]]:
    """("file:line", line) of every line of a file that is not blank."""
    lines = enumerate(content.split(b"\n"), 1)
    return [(f"{path}:{number}", line) for number, line in lines if line.strip()]


def read_json(path, flag: str = "") -> dict:
    """The JSON object in a file."""
    with touching(path, flag):
        text = Path(path).read_bytes()
    return json_object(json_value(text, str(path)), str(path))


def json_object(value, where: str) -> dict:
    """The value, which must be a JSON object."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {value!r:.60}")
    return value


def json_value(text: bytes, where: str):
    """The JSON value that the bytes are. where: the file and line, for the sentence."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save it "
                        "as UTF-8") from None
    except (ValueError, RecursionError) as error:  # the second: lists in lists in lists
        raise UserError(f"{where}: not valid JSON ({error!s:.100})") from None


# ---- the run's directory

# all that runs and studies leave in --out: a regular expression of names
LEFT = (r"(metrics|responses|stream|round-\d+)\.jsonl|(inputs|summary|job|baseline)\.json|log\.txt|"
        r"samples\.md|curve\.png|checkpoint\.pt|policy|again|reward(\.\d+)?|.*\.tmp|\.lock|\.DS_Store")


@contextlib.contextmanager
def alone(folder: Path, flag: str = ""):
    """The folder, made if need be, belongs to this process inside."""
    if RANK:  # it belongs to the first process
        yield
        return
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    with touching(folder, flag):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    try:
        lock.acquire()  # the system lets go of it when this process dies
    except filelock.Timeout:
        raise UserError(f"{flag} {folder}: another process is writing there; wait for it, or name "
                        "another directory".strip()) from None
    try:
        yield
    finally:
        lock.release()
        if [path.name for path in folder.iterdir()] == [".lock"]:  # nothing came of it
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def working(args):
    """What a run works in: its precision, and --out, which belongs to this process alone."""
    if os.path.exists(args.out) and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a directory; name one, which may be new")
    with touching(args.out, "--out"):
        foreign = [path.name for path in args.out.glob("*") if not re.fullmatch(LEFT, path.name)]
    if foreign:
        raise UserError(f"--out {args.out} holds {foreign[0]}, which no run has written; a run could "
                        "replace it, so name another directory")
    with alone(args.out, "--out"), precision(args):
        if args.resume and (args.out / "checkpoint.pt").exists():
            refuse_other_settings(args)
        yield


def refuse_other_settings(args) -> None:
    """--resume: the settings of inputs.json must be given again, but for how a result is computed."""
    then, now = read_json(args.out / "inputs.json").get("settings") or {}, settings(args)
    if args.max_new_tokens is None:  # the data will say; if they have changed, prepare refuses
        now["max_new_tokens"] = then.get("max_new_tokens")
    for side in (then, now):
        side.update(micro_batch=None, gradient_checkpointing=None,
                    device=side.get("device", "").partition(":")[0])
    differ = [f"--{key.replace('_', '-')} {then.get(key)} (now {now.get(key)})"
              for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if differ:
        other_length = then.get("steps") != now.get("steps")
        why = " (the learning rate falls to 0 over --steps)" * other_length
        raise UserError(f"--resume: {args.out} was run with other settings{why}: {', '.join(differ)}; "
                        "give those again, or start afresh with another --out")


def prepare(args, inputs: dict) -> Path | None:
    """Make --out ready for a run that has all it needs; returns where an earlier run is now.

    inputs: hashes of what the run starts from, by flag. --resume refuses others.
    """
    out, aside = args.out, None
    wait()  # until all have read what is there
    if RANK:
        wait()  # until the first is done
        return None
    if args.resume and (out / "checkpoint.pt").exists():
        then = read_json(out / "inputs.json")
        changed = [flag for flag in inputs if inputs[flag] != then.get(flag)]
        if changed:
            raise UserError(f"--resume: what {' and '.join(changed)} names has changed since {out} "
                            "was begun; give it as it was, or start afresh with another --out")
    elif args.resume and (out / "policy").exists():
        raise UserError(f"--resume: {out} holds a policy, but no checkpoint.pt to go on from; "
                        "start afresh with another --out")
    elif not args.resume and {path.name for path in out.glob("[!.]*")} - {"reward"}:
        numbered = (out.with_name(f"{out.name}.{n}") for n in itertools.count(1))
        aside = next(path for path in numbered if not path.exists())
        with touching(aside, "--out"):
            aside.mkdir()
            for path in out.glob("[!.]*"):  # the lock stays
                os.replace(path, aside / path.name)
        print(f"the earlier run in {out} is now {aside} (to go on with it: --out {aside} --resume)")
    write_text(out / "inputs.json", json.dumps({**inputs, "settings": settings(args)}, indent=1))
    wait()
    return aside


@functools.cache
def commit() -> str:
    """The commit of this code, with + if its files differ from it; "unknown" where there is no git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent).stdout.strip()
    try:
        return git("rev-parse", "--short=7", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "*.py"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def settings(args) -> dict:
    """The arguments that decide what a run computes, as JSON values."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in ("out", "resume")}


def save_checkpoint(args, step: int, trained, optimizer, seconds: float) -> None:
    """checkpoint.pt: everything that the next step depends on, replaced in one atomic rename."""
    if RANK:
        return
    state = {"step": step, "seconds": seconds, "trained": trained.state_dict(),
             # after the last step nothing needs the optimizer's
             "optimizer": optimizer.state_dict() if step < args.steps else None}
    with replacing(args.out / "checkpoint.pt") as beside, open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(args, trained, optimizer) -> tuple[int, float]:
    """(step, seconds) of the last checkpoint, loaded into both; (0, 0.0) if there is none."""
    path = args.out / "checkpoint.pt"
    if not path.exists():
        print(f"nothing to resume in {args.out}: starting at step 0")
        return 0, 0.0
    try:
        state = torch.load(path, map_location=args.device, weights_only=True)
        trained.load_state_dict(state["trained"])
        if state["step"] < args.steps:
            optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["seconds"]
    except Exception as error:  # of many kinds, by what is damaged
        why = " ".join(str(error).split())
        raise UserError(f"--resume: {path} is damaged ({why:.99}); delete it, and the run starts at "
                        "step 0 again") from None


def seconds(args) -> float:
    """Training time of a finished run, over all its resumptions."""
    path = args.out / "checkpoint.pt"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["seconds"]


# ---- several processes: torchrun --nproc-per-node N hypo.py ...

@contextlib.contextmanager
def joined():
    """Work as one of torchrun's processes: all do the same, but for the rows that they `share`."""
    if PROCESSES == 1:
        yield
        return
    lost = UserError(f"another of the {PROCESSES} processes has ended; the same command with "
                     "--resume, for any number of processes, goes on from the last checkpoint")

    def terminated(*_):
        """torchrun ends the others when one has died."""
        raise lost

    signal.signal(signal.SIGTERM, terminated)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as stack:
        if RANK:  # the first process speaks for all
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" is that one from here on
        torch.distributed.init_process_group(  # the first may take hours to make pi_ref
            "nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(days=1))
        stack.callback(torch.distributed.destroy_process_group)
        try:
            yield
        except RuntimeError as error:
            if re.search("gloo|NCCL|[Cc]onnection", str(error)):
                raise lost from error
            raise


def wait() -> None:
    """Until all processes are here."""
    if PROCESSES > 1:
        torch.distributed.barrier()


def share(worker):
    """A policy, scorer or judge each of whose calls computes a share of the rows in each process.

    Every process gets all rows. A row has its gradient where it was computed, and clip adds the
    gradients up: so N processes do what one does, to rounding, and no algorithm need know.
    """
    if PROCESSES > 1 and isinstance(worker, torch.nn.Module):
        for name in {"token_logps", "scores", "sample_batch", "reverse_kl"} & {*dir(worker)}:
            setattr(worker, name, functools.partial(shared, getattr(worker, name)))
    elif PROCESSES > 1 and worker is not None:
        worker = worker._replace(rewards=functools.partial(shared, worker.rewards))
    return worker


def shared(method: Callable, *args):
    """method(*args), the rows of its lists and tensors dealt out to the processes by prompt."""
    has_rows = [isinstance(arg, (list, tuple, torch.Tensor)) for arg in args]
    numbers: dict[str, int] = {}  # of the prompts: what is asked again is read once, see fast.py
    dealt: list[list[int]] = [[] for _ in range(PROCESSES)]
    for row, prompt in enumerate(args[has_rows.index(True)]):
        dealt[numbers.setdefault(str(prompt), len(numbers)) % PROCESSES].append(row)
    rows = dealt[RANK] or [0]  # a process without a row takes one, for nothing
    done = method(*(arg if not has else arg[rows] if isinstance(arg, torch.Tensor)
                    else [arg[row] for row in rows] for arg, has in zip(args, has_rows)))
    if isinstance(done, tuple):
        return tuple(gathered(part, dealt) for part in done)
    return gathered(done, dealt)


def gathered(mine, dealt: list[list[int]]):
    """The rows of all processes in order, as a list or a padded tensor; mine with their gradient."""
    tensor = isinstance(mine, torch.Tensor)
    parts: list = [None] * PROCESSES
    torch.distributed.all_gather_object(parts, mine.tolist() if tensor else mine)
    of_row: dict[int, Any] = {
        row: value for rows, part in zip(dealt, parts) for row, value in zip(rows, part)}
    if not tensor:
        return [of_row[row] for row in sorted(of_row)]
    of_row = {row: mine.new_tensor(value) for row, value in of_row.items()}
    of_row |= zip(dealt[RANK], mine)
    rows = [of_row[row] for row in sorted(of_row)]
    whole = pad_sequence(rows, batch_first=True) if mine.dim() > 1 else torch.stack(rows)
    # a process without a row has a backward pass, too
    return whole + 0 * mine.sum() if mine.requires_grad and not dealt[RANK] else whole


# ---- the loop

def seed_of(*what) -> int:
    """A seed for one use, such as seed_of(args.seed, "online", step); other uses get others."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "big")


@dataclasses.dataclass
class Step:
    """One step of a training loop: what it draws, and what it logs."""
    number: int  # 1, 2, ...
    args: argparse.Namespace
    metrics: dict = dataclasses.field(default_factory=dict)

    def minibatch(self, rows: Sequence) -> list:
        """The next args.batch_size rows, through shuffled epochs: each row once an epoch."""
        n, batch = self.args.batch_size, []
        orders: dict[int, list[int]] = {}  # epoch -> its order of the rows
        for position in range((self.number - 1) * n, self.number * n):
            epoch, i = divmod(position, len(rows))
            if epoch not in orders:
                shuffle = self.generator("epoch", epoch, "cpu")
                orders[epoch] = torch.randperm(len(rows), generator=shuffle).tolist()
            batch.append(rows[orders[epoch][i]])
        return batch

    def generator(self, use: str, number: int | None = None, device=None) -> torch.Generator:
        """A random generator for one use in this step (or epoch, or round) and for nothing else."""
        seed = seed_of(self.args.seed, use, self.number if number is None else number)
        return torch.Generator(device or self.args.device).manual_seed(seed)

    def log(self, **metrics) -> None:
        """Numbers of the step's line, or 0-dim tensors, which are read once the step is over."""
        self.metrics |= {key: value.detach() if isinstance(value, torch.Tensor) else value
                         for key, value in metrics.items()}


def loop(args, trained: torch.nn.Module, optimizer, evaluate: Callable) -> Iterator[Step]:
    """Yield a Step for steps 1 .. args.steps; the body trains and logs.

    evaluate: function `trained` -> dict. It is called before the first step, then every
    args.eval_every steps and after the last; its values join that step's line in metrics.jsonl,
    and a checkpoint is written.
    """
    global at
    log, at = args.out / "metrics.jsonl", "step 0: "
    done, spent = load_checkpoint(args, trained, optimizer) if args.resume else (0, 0.0)
    if done:  # drop the lines of steps that the interrupted run took after its last checkpoint
        lines = read_rows(log)[:done + 1]
        if len(lines) <= done:
            raise UserError(f"--resume: {log} ends before step {done}, of which checkpoint.pt is; "
                            "delete checkpoint.pt to start at step 0")
        write_rows(log, lines)
        shown = lines[-1]  # the last evaluation: a checkpoint follows each
        print(f"{args.out} is at step {done} of {args.steps}")
    else:
        shown = finite({"step": 0, **evaluate(trained)})
        write_rows(log, [shown])
    began = time.time() - spent
    with touching(log, "--out"):
        file = open(os.devnull if RANK else log, "a", encoding="utf-8")
    told = time.time()
    with file, tqdm(
            total=args.steps, initial=done, desc=str(args.out), unit="step", disable=None,
            dynamic_ncols=True) as bar:
        for number in range(done + 1, args.steps + 1):
            step, at = Step(number, args), f"step {number}: "
            set_learning_rate(optimizer, 1 - (number - 1) / args.steps)
            last = ", ".join(form.format(shown[key]) for key, form in SHOWN.items()
                             if shown.get(key) is not None)
            bar.set_postfix_str(last, refresh=False)
            if bar.disable and time.time() - told > 120:  # no terminal: a line every two minutes
                told = time.time()
                print(f"{args.out}: step {number} of {args.steps}, {last}", flush=True)
            yield step
            line = {"step": number, **{name: float(x) for name, x in step.metrics.items()}}
            at_checkpoint = number % args.eval_every == 0 or number == args.steps
            line |= evaluate(trained) if at_checkpoint else {}
            with touching(log, "--out"):
                file.write(json.dumps(finite(line)) + "\n")
                file.flush()
            if at_checkpoint:
                save_checkpoint(args, number, trained, optimizer, time.time() - began)
            shown = {**shown, **line}
            bar.update()


def set_learning_rate(optimizer, share: float) -> None:
    """Set each group's rate to a share of its first one.

    In loop the share falls in a line to 0: the last, small steps settle what was learned, and the
    end of a run does not hang on the last bits of its sums.
    """
    for group in optimizer.param_groups:
        group["lr"] = share * group.setdefault("initial_lr", group["lr"])


DIVERGED = "training has diverged; lower --lr, raise --beta"


def finite(line: dict) -> dict:
    """The line of metrics, if none of them is NaN or infinite."""
    for name, value in line.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{at}{name} is {value}: {DIVERGED}")
    return line


def clip(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the model's gradient to a norm of at most max_norm; returns its norm before."""
    if PROCESSES > 1:
        for parameter in (p for p in model.parameters() if p.requires_grad):
            if parameter.grad is None:  # no row of this process has used it
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if not norm.isfinite():
        raise UserError(f"{at}the gradient is {norm}: {DIVERGED}")
    return norm
