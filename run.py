"""What every training command shares and no reader of an algorithm needs.

Arguments, the step loop with its progress bar and metrics file, checkpoints and exact resume.

All randomness is a function of (seed, what it is for, step): a step draws from generators made for
it and from nothing else. So a checkpoint needs no random state and no position in the data: the
weights, the optimizer's state and the step's number say all, and a resumed run ends with the bytes
of an uninterrupted one.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

REVIEWS = Path("runs/reviews")  # the task of a pretrained model, if it is there
SHOWN = {"loss": "loss {:.3f}", "win_rate": "win {:.2f}", "reverse_kl": "KL {:.1f} nats",
         "reward_accuracy": "accuracy {:.2f}"}  # by the progress bar: the last ones measured


class UserError(Exception):
    """What the user gave cannot work. Its text says what was given, why not, and what to do.

    It is printed as a sentence. Every other exception is a bug, ours or a student's, and keeps its
    trace.
    """


def start(main: Callable,
          again="the same command with --resume goes on from the last checkpoint") -> None:
    """Run a command, print a UserError as a sentence, end quietly on Ctrl-C."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; {again}")


# ---- arguments

def parser(doc: str | None):
    """(argument parser with the flags of all training commands, what adds an algorithm's)."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    of_algorithm = add = p.add_argument_group("the algorithm").add_argument
    add("--steps", type=int, default=400, help="optimizer steps (default 400; rlhf.py 120)")
    add("--batch-size", type=int, help="preference pairs in a step (default 64 for tiny, else 16)")
    add("--lr", type=float, help="learning rate of AdamW, constant (default 5e-4 for tiny, else "
        "2e-5; with --train-layers try 1e-4)")
    add("--beta", type=float, default=0.1, help="the larger, the closer to pi_ref (default 0.1)")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm (default 1)")

    add = p.add_argument_group("the data").add_argument
    add("--model", default="tiny", help="the language model to start from: tiny (built in, made on "
        "first use), a transformers directory, or a hub name such as gpt2 (default tiny)")
    add("--data", help="what to learn: world (built in), a directory with prompts, or preference "
        "pairs from a JSONL file or a hub data set; data.py says more (default world; for a "
        f"pretrained model {REVIEWS}, if it is there)")
    add("--pairs", type=int, help="preference pairs to sample from pi_ref, where --data holds none "
        "(default 400 for tiny, else 1000)")
    add("--judge", help="who judges responses: golden, vader, a directory, task (the one that "
        "--data names) or none; judges.py says more (default task, golden in the world, none for "
        "pairs from a file; rlhf.py trains its own)")
    add("--sft-steps", type=int, help="steps of fine-tuning on the texts of --data that make a "
        "pretrained model pi_ref, done once and kept (default 200; 0 for the policy of a run)")
    add("--max-new-tokens", type=int, default=24, help="longest response, in tokens (default 24)")
    add_run_flags(p)
    return p, of_algorithm


def add_run_flags(p: argparse.ArgumentParser) -> None:
    """The flags that say how a run is watched and where it runs."""
    add = p.add_argument_group("the run").add_argument
    add("--seed", type=int, default=0, help="decides everything random (default 0)")
    add("--eval-every", type=int, default=50, help="evaluate and checkpoint every this many steps "
        "(default 50; rlhf.py 20)")
    add("--eval-samples", type=int, help="responses to evaluate (default 512 for tiny, else 64)")
    add("--out", type=Path, help="the run's directory (default runs/ and the algorithm's name)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, exactly")

    add = p.add_argument_group("the machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16"], help="what the forward pass computes in; "
        "weights stay float32 (default bfloat16 for a pretrained model on a GPU)")
    add("--train-layers", type=int, metavar="N", help="train only the last N layers: less memory "
        "and time, for CPUs (default: all)")
    add("--micro-batch", type=int, metavar="N", help="responses in a forward and backward pass; "
        "the gradient is the whole batch's, for less memory and a forward pass more (default: all)")
    add("--gradient-checkpointing", action="store_true", help="keep only each layer's input for "
        "the backward pass and compute the rest again: less memory, a forward pass more")
    add("--plain", action="store_true", help="run the forms that lm.py shows instead of fast.py's: "
        "slower, the same results to rounding")


def parse(p: argparse.ArgumentParser, argv, algorithm: Callable, may_be_zero: tuple = ()):
    """Checked arguments, every default filled in. algorithm: function args -> the run's name."""
    args = p.parse_args(argv)
    tiny = args.model == "tiny"
    if args.data is None and not tiny and (REVIEWS / "task.json").exists():
        args.data = str(REVIEWS)
    args.data = None if args.data == "world" else args.data
    has_prompts = args.data is None or (Path(args.data) / "task.json").exists()  # or it holds pairs
    of_a_run = (Path(args.model).parent / "summary.json").exists()  # it has been fine-tuned already
    defaults = dict(
        pairs=400 if tiny else 1000, batch_size=64 if tiny else 16, lr=5e-4 if tiny else 2e-5,
        eval_samples=512 if tiny else 64,
        sft_steps=200 if has_prompts and not tiny and not of_a_run else 0,
        dtype="bfloat16" if args.device.startswith("cuda") and not tiny else "float32",
        judge="golden" if args.data is None else "task" if has_prompts else "none")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("pairs", "steps", "batch_size", "lr", "beta", "max_grad_norm", "max_new_tokens",
                 "eval_every", "eval_samples", "train_layers", "micro_batch"):
        value = getattr(args, name)
        if value is not None and value <= 0 and name not in may_be_zero:
            p.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.sft_steps < 0:
        p.error(f"--sft-steps must not be negative, got {args.sft_steps}")
    if args.sft_steps and (tiny or not has_prompts):
        p.error("--sft-steps fine-tunes a pretrained model on the texts of the task; " + (
            "tiny has learned its texts" if tiny else f"--data {args.data} has none"))
    if args.judge == "task" and (args.data is None or not has_prompts):
        p.error("--judge task is the judge that a --data directory names in its task.json; here "
                "there is none")
    args.algorithm = algorithm(args)
    args.out = args.out or Path("runs") / args.algorithm.replace(" ", "-")
    return args


def precision(args):
    """Context in which matrix products run in --dtype. A cache would go stale: weights move."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16,
                          enabled=args.dtype == "bfloat16", cache_enabled=False)


# ---- files

def write_text(path, text: str) -> None:
    """Written beside and renamed: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_rows(path, rows) -> None:
    """JSONL: one JSON value a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path) -> list:
    """What write_rows wrote."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def prepare(args) -> Path | None:
    """Make --out ready. An earlier run that is not resumed is moved aside; returns where it is."""
    earlier = None
    if not args.resume and (args.out / "metrics.jsonl").exists():
        n = 1
        while args.out.with_name(f"{args.out.name}.{n}").exists():
            n += 1
        earlier = args.out.with_name(f"{args.out.name}.{n}")
        os.replace(args.out, earlier)
        print(f"the earlier run in {args.out} is now {earlier} (to go on with it: --out {earlier} "
              "--resume)")
    args.out.mkdir(parents=True, exist_ok=True)
    return earlier


def settings(args) -> dict:
    """The arguments that decide what a run computes, as JSON values."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in ("out", "resume")}


def save_checkpoint(args, step: int, trained, optimizer, seconds: float) -> None:
    """checkpoint.pt: everything that the next step depends on, replaced in one atomic rename."""
    beside = args.out / "checkpoint.pt.tmp"
    with open(beside, "wb") as file:
        torch.save({"settings": json.dumps(settings(args)), "step": step, "seconds": seconds,
                    "trained": trained.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, args.out / "checkpoint.pt")


def load_checkpoint(args, trained, optimizer) -> tuple[int, float]:
    """(step, seconds) of the last checkpoint, loaded into both; (0, 0.0) if there is none."""
    path = args.out / "checkpoint.pt"
    if not path.exists():
        print(f"nothing to resume in {args.out}: starting at step 0")
        return 0, 0.0
    state = torch.load(path, map_location=args.device, weights_only=True)
    then, now = json.loads(state["settings"]), json.loads(json.dumps(settings(args)))
    differ = [f"--{key.replace('_', '-')} {then.get(key)} (now {now.get(key)})"
              for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if differ:
        raise UserError(f"--resume: {args.out} was run with other settings: {', '.join(differ)}; "
                        "give those again, or start afresh with another --out")
    trained.load_state_dict(state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def seconds(args) -> float:
    """Training time of a finished run, over all its resumptions."""
    return torch.load(args.out / "checkpoint.pt", weights_only=True, mmap=True)["seconds"]


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

    def minibatch(self, rows: list) -> list:
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
    log = args.out / "metrics.jsonl"
    done, spent = load_checkpoint(args, trained, optimizer) if args.resume else (0, 0.0)
    if done:  # drop the lines of steps that the interrupted run took after its last checkpoint
        lines = read_rows(log)[:done + 1]
        write_rows(log, lines)
        shown = lines[-1]  # the last evaluation: a checkpoint follows each
        print(f"{args.out} is at step {done} of {args.steps}")
    else:
        shown = {"step": 0, **evaluate(trained)}
        write_rows(log, [shown])
    began = time.time() - spent
    with open(log, "a", encoding="utf-8") as file, tqdm(
            total=args.steps, initial=done, desc=str(args.out), unit="step", disable=None,
            dynamic_ncols=True) as bar:
        for number in range(done + 1, args.steps + 1):
            step = Step(number, args)
            bar.set_postfix_str(", ".join(form.format(shown[key]) for key, form in SHOWN.items()
                                          if shown.get(key) is not None), refresh=False)
            yield step
            line = {"step": number, **{name: float(x) for name, x in step.metrics.items()}}
            at_checkpoint = number % args.eval_every == 0 or number == args.steps
            line |= evaluate(trained) if at_checkpoint else {}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if at_checkpoint:
                save_checkpoint(args, number, trained, optimizer, time.time() - began)
            shown = {**shown, **line}
            bar.update()


def clip(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the model's gradient to a norm of at most max_norm; returns its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if not norm.isfinite():
        raise UserError(f"the gradient is {norm}: training has diverged; lower --lr, raise --beta")
    return norm
