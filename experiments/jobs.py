"""The jobs of the studies, over the cores. A job is a command of hypo.py, dpo.py or rlhf.py for one seed.

It leaves an ordinary run directory in options.work/SEED/NAME, and job.json when it is done: its flags, and what
it measured beside. A job that was interrupted goes on from its last checkpoint. The workers of a study end when it
ends, in whatever way, and no two studies work in one folder.
"""

import contextlib
import json
import multiprocessing
import threading
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tqdm import tqdm

import data
import dpo
import run
from experiments import begin_worker, setting
from experiments.setting import CLASSIFY, Run, needs, setting_of
from lm import LM
from run import UserError

Job = tuple[int, Run]  # with its seed
tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, and Python warns of what an ended worker leaves of it


def directory(options, seed: int, job: Run) -> Path:
    """Where a job's results are."""
    return options.work / str(seed) / job.name


def flags_of(options, seed: int, job: Run) -> dict[str, str]:
    """The flags of a job's command, without --out and --resume."""
    proxy = directory(options, seed, setting_of(job)) / "reward" / "model"
    flags = {
        "--model": options.model, "--data": "world", "--sft-steps": 0, "--device": options.device, "--seed": seed,
        "--pairs": max(1, round(job.pairs * options.pairs)), "--batch-size": options.batch_size,
        "--eval-every": options.eval_every, "--eval-samples": options.eval_samples, "--lr": job.lr * options.lr}
    if job.source:  # a training run
        flags |= {"--steps": max(1, round(job.steps * options.steps)),
                  "--judge": proxy}
    if job.source and job.algorithm != "bo2":
        flags["--beta"] = job.beta
    if job.algorithm == "hypo":
        flags["--lam"] = job.lam
    elif job.source and job.algorithm != "ppo":
        flags |= {"--loss": job.algorithm, "--sampling": job.source if job.source in dpo.SOURCES else "online"}
    if job.rounds:
        flags["--rounds"] = job.rounds
    return {flag: str(value) for flag, value in flags.items()}


def finished(options, seed: int, job: Run) -> bool:
    """Whether a job was done with these settings; UserError if with others."""
    path = directory(options, seed, job) / "job.json"
    if not path.exists():
        return False
    then, now = run.read_json(path)["flags"], flags_of(options, seed, job)
    differ = [f"{flag} {then.get(flag)} (now {now.get(flag)})" for flag in {**now, **then}
              if then.get(flag) != now.get(flag)]
    if differ:
        raise UserError(f"{path.parent} was made with other settings: {', '.join(differ)}; move {options.work} away, "
                        "or give the settings it was made with")
    return True


def execute(options, seed: int, job: Run) -> None:
    """Do one job; what it prints goes to log.txt beside its results."""
    torch.set_num_threads(options.threads)
    out, flags, result = directory(options, seed, job), flags_of(options, seed, job), {}
    argv = [*(word for pair in flags.items() for word in pair), "--out", str(out), "--resume"]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):  # no bar where stderr is a file
        try:
            if job.algorithm == "setting":
                result = setting.make_setting(job, argv, out)
            elif job == CLASSIFY:
                result = setting.classify(out.parent)
            else:
                setting.train(job, argv, out.parent)
        except Exception:
            traceback.print_exc()
            raise
    run.write_text(out / "job.json", json.dumps({**result, "flags": flags}, indent=1) + "\n")
    (out / "checkpoint.pt").unlink(missing_ok=True)  # as large as three models, and there are many runs


# ---------------------------------------------------------------------------------------------------
# all of them

def with_needs(jobs: list[Job]) -> list[Job]:
    """The jobs and all that they need, each once, needs first."""
    ordered: dict[Job, None] = {}
    for job in jobs:
        ordered.update(dict.fromkeys([*with_needs(needs(*job)), job]))
    return list(ordered)


@contextlib.contextmanager
def stopping():
    """On Ctrl-C, end the workers at once: the next start goes on from their checkpoints."""
    try:
        yield
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise


def make_models(options, jobs: list[Job]) -> None:
    """The built-in models that jobs share, before the first of them starts; any other model is tried."""
    if options.model != "tiny":
        with data.to_user(f"--model {options.model}"):
            LM.load(options.model, options.device).check()
    for width in sorted({job.width for _, job in jobs}):
        if width or options.model == "tiny":
            data.tiny_directory(options.device, width=width or data.TINY["width"])


def run_jobs(options, jobs: list[Job]) -> None:
    """Do what is missing of the jobs and of what they need, options.jobs at a time."""
    jobs = with_needs(jobs)
    done = {job for job in jobs if finished(options, *job)}
    size = {job: int(flags_of(options, *job)["--steps"]) if job[1].source else 10 for job in jobs}
    waiting = [job for job in jobs if job not in done]
    if waiting:
        make_models(options, jobs)
    failed: dict[Job, BaseException] = {}
    running: dict[Future, Job] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=begin_worker) as pool, stopping(), tqdm(
            total=sum(size.values()), desc=f"{len(jobs)} runs", unit="step", disable=None, dynamic_ncols=True,
            initial=sum(size[job] for job in done)) as bar:
        while waiting or running:
            ready = [job for job in waiting if done.issuperset(needs(*job))]
            for job in ready[:options.jobs - len(running)]:
                running[pool.submit(execute, options, *job)] = job
                waiting.remove(job)
            if not running:  # what is left needs a run that failed
                break
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise UserError("a worker was ended from outside, perhaps for want of memory; the same command "
                                    "goes on where it stopped, with less memory if you give --jobs 1")
                if error:
                    failed[job] = error
                else:
                    done.add(job)
                if bar.disable:  # in a file, a line a run
                    print(f"{len(done)} of {len(jobs)} runs done", flush=True)
            bar.n = sum(size[job] for job in done) + sum(steps_taken(options, *job) for job in running.values())
            bar.set_postfix_str(f"{len(done)} of {len(jobs)} runs done", refresh=False)
            bar.refresh()
    if failed:
        raise UserError("some runs failed, and what needs them was not started; log.txt there says more, and the same "
                        "command tries again:\n" + "\n".join(
                            f"  {directory(options, *job)}: {error}" for job, error in failed.items()))


def steps_taken(options, seed: int, job: Run) -> int:
    """How far a job that goes on has come."""
    path = directory(options, seed, job) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0
