"""What every training command shares and no reader of an algorithm needs.

Arguments, the step loop with its progress bar and metrics file, checkpoints and exact resume.

All randomness is a function of (seed, what it is for, step): a step draws from generators made for it and
from nothing else. So a checkpoint needs no random state and no position in the data: weights, optimizer
state and the step's number say all, and a resumed run ends with the bytes of an uninterrupted one.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

REVIEWS = Path("runs/reviews")  # the task of a pretrained model, if it is there

# ---------------------------------------------------------------------------------------------------
# arguments

def parser(doc: str) -> argparse.ArgumentParser:
    """An argument parser with the flags that all training commands take."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("common to all training commands").add_argument
    add("--model", default="tiny", help="the language model to start from: tiny (built in, made on first use), a "
        "transformers directory, or a name on the model hub such as gpt2 (default tiny)")
    add("--pairs", type=int, help="offline preference pairs to collect, two samples of pi_ref each, labelled by the "
        "judge of the task; of no use if --data holds pairs (default 400 for tiny, else 1000)")
    add("--data", help="what to learn: world (built in); a directory with prompts, as recipes/movie_reviews.py makes "
        "it; preference pairs from a JSONL file with the fields prompt, chosen, rejected, or a hub data set, of whose "
        f"prompts a tenth is held out (default world; for a pretrained model {REVIEWS}, if it is there)")
    add("--sft-steps", type=int, help="steps of supervised fine-tuning on the texts of --data that make pi_ref of a "
        "pretrained model, done once and kept (default 200; 0 for a policy that a run left in its --out, and if --data "
        "has no such texts)")
    add("--judge", help="who judges responses: golden (the built-in world's true reward), vader, a directory with a "
        "judge.json or a sequence-classification model, task (the one that --data names) or none (default task, golden "
        "in the world, none for pairs from a file; rlhf.py trains its own)")
    add("--steps", type=int, default=400, help="optimizer steps (default 400; rlhf.py 120)")
    add("--batch-size", type=int, help="preference pairs in a step (default 64 for tiny, else 16)")
    add("--lr", type=float, help="learning rate of AdamW, constant (default 5e-4 for tiny, else 2e-5; with "
        "--train-layers try 1e-4)")
    add("--beta", type=float, default=0.1, help="temperature: the larger, the closer to pi_ref (default 0.1)")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient to this norm (default 1)")
    add("--max-new-tokens", type=int, default=24, help="longest response, in tokens (default 24)")
    add("--eval-every", type=int, default=50, help="evaluate and checkpoint every this many steps "
        "(default 50; rlhf.py 20)")
    add("--eval-samples", type=int, help="responses sampled in an evaluation (default 512 for tiny, else 64)")
    add("--seed", type=int, default=0, help="decides everything random: pairs, their order, samples (default 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ... "
        "(default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16"], help="what the forward pass computes in; weights and log-softmax "
        "stay float32 (default bfloat16 for a pretrained model on a GPU, else float32)")
    add("--train-layers", type=int, metavar="N", help="train only the last N layers: less memory and time, for CPUs "
        "(default: all)")
    add("--micro-batch", type=int, metavar="N", help="responses in one forward and backward pass; the gradient is that "
        "of the whole batch, for less memory and a forward pass more (default: the whole batch at once)")
    add("--gradient-checkpointing", action="store_true", default=None, help="keep only each layer's input for the "
        "backward pass and compute the rest again: less memory, a forward pass more")
    add("--out", type=Path, help="the run's directory (default runs/ and the algorithm's name)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, exactly")
    return p


def parse(p: argparse.ArgumentParser, argv=None, may_be_zero=()) -> argparse.Namespace:
    """Parsed and checked arguments."""
    args = p.parse_args(argv)
    tiny = args.model == "tiny"
    if args.data is None and not tiny and (REVIEWS / "task.json").exists():
        args.data = str(REVIEWS)
    args.data = None if args.data == "world" else args.data
    prompts = args.data is None or (Path(args.data) / "task.json").exists()  # otherwise pairs from a file
    raw = not tiny and not (Path(args.model).parent / "summary.json").exists()  # not the policy of a run
    defaults = dict(
        pairs=400 if tiny else 1000, batch_size=64 if tiny else 16, lr=5e-4 if tiny else 2e-5,
        eval_samples=512 if tiny else 64,
        dtype="bfloat16" if args.device.startswith("cuda") and not tiny else "float32",
        judge="golden" if args.data is None else "task" if prompts else "none",
        sft_steps=200 if prompts and raw else None)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.sft_steps = args.sft_steps or None
    for name in ("pairs", "steps", "batch_size", "lr", "beta", "max_grad_norm", "max_new_tokens", "eval_every",
                 "eval_samples", "sft_steps", "train_layers", "micro_batch"):
        value = getattr(args, name)
        if value is not None and value <= 0 and name not in may_be_zero:
            p.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.sft_steps and (tiny or not prompts):
        p.error("--sft-steps fine-tunes a pretrained model on the texts of the task; " + (
            "tiny has learned its texts" if tiny else f"--data {args.data} has none"))
    if args.judge == "task" and (args.data is None or not prompts):
        p.error("--judge task is the judge that a --data directory names in its task.json; here there is none")
    return args


def start(main, again="the same command with --resume goes on from the last checkpoint") -> None:
    """Run a command. An error raised by our own files is a sentence for the user; others keep their trace."""
    try:
        main()
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        ours = raised_in.parent == Path(__file__).resolve().parent
        if not ours:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; {again}")


def precision(args):
    """Context in which matrix products run in --dtype. No cache: it would go stale when the weights move."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16",
                          cache_enabled=False)


# ---------------------------------------------------------------------------------------------------
# randomness

def seed_of(*what) -> int:
    """A seed for one use, for example seed_of(args.seed, "online", step): other uses get unrelated ones."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "big")


def generator(args, *what) -> torch.Generator:
    """A random generator of its own for one use, on the run's device."""
    return torch.Generator(args.device).manual_seed(seed_of(args.seed, *what))


def minibatch(rows: list, args, step: int) -> list:
    """The rows of step 1, 2, ...: batch after batch through shuffled epochs, each row once an epoch."""
    epochs, batch = {}, []
    for position in range((step - 1) * args.batch_size, step * args.batch_size):
        epoch, i = divmod(position, len(rows))
        if epoch not in epochs:
            shuffle = torch.Generator().manual_seed(seed_of(args.seed, "epoch", epoch))
            epochs[epoch] = torch.randperm(len(rows), generator=shuffle).tolist()
        batch.append(rows[epochs[epoch][i]])
    return batch


# ---------------------------------------------------------------------------------------------------
# the run's directory

def prepare(args, algorithm: str) -> Path | None:
    """Make --out ready: a run that is already there is moved aside, or kept if it is to be resumed.

    Returns where the earlier run is now, or None.
    """
    args.algorithm = algorithm
    args.out = args.out or Path("runs") / algorithm.replace(" ", "-")
    aside = None
    if not args.resume and (args.out / "metrics.jsonl").exists():
        n = 1
        while (aside := args.out.with_name(f"{args.out.name}.{n}")).exists():
            n += 1
        os.replace(args.out, aside)
        print(f"the earlier run in {args.out} is now {aside} (to go on with it: --out {aside} --resume)")
    args.out.mkdir(parents=True, exist_ok=True)
    return aside


def write_text(path, text: str) -> None:
    """Written beside and renamed: a crash leaves the old file or the new one, never half of one."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def settings(args) -> dict:
    """The arguments that decide what a run computes, as JSON values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())
            if key not in ("out", "resume", "pi_ref")}


def save_checkpoint(args, step, policy, optimizer, seconds) -> None:
    """checkpoint.pt: everything that the next step depends on, replaced in one atomic rename."""
    beside = args.out / "checkpoint.pt.tmp"
    with open(beside, "wb") as file:
        torch.save({"settings": json.dumps(settings(args)), "step": step, "seconds": seconds,
                    "policy": policy.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, args.out / "checkpoint.pt")


def load_checkpoint(args, policy, optimizer) -> tuple[int, float]:
    """(step, seconds) of the last checkpoint, loaded into policy and optimizer; (0, 0.0) if there is none."""
    path = args.out / "checkpoint.pt"
    if not path.exists():
        print(f"nothing to resume in {args.out}: starting at step 0")
        return 0, 0.0
    state = torch.load(path, map_location=args.device, weights_only=True)
    then, now = json.loads(state["settings"]), json.loads(json.dumps(settings(args)))
    differ = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if differ:
        raise ValueError(f"--resume: {args.out} was run with other settings: " + ", ".join(
            f"--{key.replace('_', '-')} {then.get(key)} (now {now.get(key)})" for key in differ)
            + "; give those again, or start afresh with another --out")
    policy.load_state_dict(state["policy"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def seconds(args) -> float:
    """Training time of a finished run, over all its resumptions."""
    return torch.load(args.out / "checkpoint.pt", weights_only=True, mmap=True)["seconds"]


# ---------------------------------------------------------------------------------------------------
# the loop

def loop(args, policy, optimizer, evaluate):
    """Yield (step, metrics) for steps 1 .. args.steps; the body trains and fills the dict metrics.

    evaluate: function policy -> dict. It is called before the first step, then every args.eval_every steps
    and after the last; its values join that step's line in metrics.jsonl, and a checkpoint is written.
    Values of metrics are floats, or 0-dim tensors, which are read only once the step is over.
    """
    log = args.out / "metrics.jsonl"
    step, spent = load_checkpoint(args, policy, optimizer) if args.resume else (0, 0.0)
    if step:  # drop the lines of steps that the interrupted run took after its last checkpoint
        lines = log.read_text(encoding="utf-8").splitlines()
        write_text(log, "".join(line + "\n" for line in lines[:step + 1]))
        shown = json.loads(lines[step])  # the last evaluation: a checkpoint follows each
    else:
        shown = {"step": 0, **evaluate(policy)}
        write_text(log, json.dumps(shown) + "\n")
    began = time.time() - spent
    with open(log, "a", encoding="utf-8") as file, tqdm(
            total=args.steps, initial=step, desc=str(args.out), unit="step", disable=None,
            dynamic_ncols=True) as bar:
        bar.set_postfix_str(postfix(shown))
        while step < args.steps:
            step += 1
            metrics = {}
            yield step, metrics
            line = {"step": step, **{name: float(value) for name, value in metrics.items()}}
            at_checkpoint = step % args.eval_every == 0 or step == args.steps
            if at_checkpoint:
                line.update(evaluate(policy))
                shown = line
            file.write(json.dumps(line) + "\n")
            file.flush()
            if at_checkpoint:
                save_checkpoint(args, step, policy, optimizer, time.time() - began)
            bar.set_postfix_str(postfix({**shown, **line}), refresh=False)
            bar.update()


def postfix(line: dict) -> str:
    """What the progress bar shows: the step's loss, and the last measured win rate and KL."""
    shown = {"loss": "loss {:.3f}", "win_rate": "win {:.2f}", "reverse_kl": "KL {:.1f} nats",
             "reward_accuracy": "accuracy {:.2f}"}
    return ", ".join(form.format(line[key]) for key, form in shown.items() if line.get(key) is not None)


def update(policy, optimizer, loss, args, *others) -> torch.Tensor:
    """One step down the gradient of the loss; returns the norm of the policy's gradient before clipping.

    others: models that the optimizer trains beside the policy, each clipped on its own.
    """
    loss.backward()
    norm, *_ = [torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm) for model in (policy, *others)]
    if not norm.isfinite():
        raise ValueError(f"the gradient is {norm.item()}: training has diverged; lower --lr, or raise --beta")
    optimizer.step()
    optimizer.zero_grad()  # not before the next backward pass: its forward pass can do with the memory
    return norm
