"""Grades a student's copy of the project: points for each exercise, and what every failure was about.

    python assignment/grade.py DIR                      # all exercises
    python assignment/grade.py DIR --only 3 5           # some of them
    python assignment/grade.py DIR --json report.json   # the same as JSON

From DIR come the files that hold exercises, and nothing else: tests, settings and all other modules are the
grader's own. Each exercise runs in a process of its own with a time limit, and gives its points if all of its
tests pass, none otherwise. Results count only if they come from the grader's pytest plugin, through a socket and
signed, one for each test of the grader's own file, and if one more test, which must fail, has failed. So edited
tests, an early exit, printed results and a pytest that has been switched off earn nothing.

No defence against code that is written to deceive this very grader: it shares a process with the tests, may
recognise their inputs, and has the rights of whoever starts the grader (files, network, memory). To grade people
whom you do not trust, do it in a container without network that holds nothing else, and read what they wrote.
"""

import argparse
import ast
import json
import multiprocessing
import multiprocessing.connection
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from exercises import EXERCISES, PROJECT, Exercise

SHOWN = 3  # failures of an exercise that are printed
CANARY = "child.py::test_this_must_fail"
CORES = os.cpu_count() or 1
START_UP = 300  # seconds a child may take to import torch before its clock starts
PRELOADED = ["torch", "pytest", "transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2"]


# ---------------------------------------------------------------------------------------------------
# child processes

def make_sandbox(source: Path, sandbox: Path) -> Path:
    """A directory with the grader's modules, those that hold exercises replaced by the student's."""
    sandbox.mkdir()
    for path in PROJECT.glob("*.py"):
        shutil.copyfile(path, sandbox / path.name)
    for module in sorted({module for exercise in EXERCISES for module in exercise.modules}):
        if not (source / f"{module}.py").is_file():
            raise ValueError(f"{source} has no {module}.py; name the directory of the assignment, which holds it")
        shutil.copyfile(source / f"{module}.py", sandbox / f"{module}.py")
    return sandbox


def in_child(*args) -> None:
    """What a child process does. Imported there: this process shall have nothing to do with torch or pytest."""
    import child
    child.run(*args)


def start(context, sandbox: Path, exercises: list[Exercise]) -> dict:
    """A child process that runs the tests of some exercises, and what is known of it."""
    ours, theirs = socket.socketpair()
    nonce = secrets.token_hex(16)
    modules = sorted({module for exercise in exercises for module in exercise.modules})
    process = context.Process(target=in_child, args=(
        theirs, nonce, str(sandbox), modules, [str(exercise.tests) for exercise in exercises]))
    process.start()
    theirs.close()
    return dict(process=process, socket=ours, nonce=nonce, said=[], rest=b"", deadline=time.monotonic() + START_UP)


def listen(child: dict, limit: float) -> bool:
    """Take what a child has sent, JSON lines; False if there will be no more. Lines without the nonce do not count."""
    try:
        received = child["socket"].recv(2**16)
    except OSError:
        received = b""
    *lines, child["rest"] = (child["rest"] + received).split(b"\n")
    for line in lines:
        try:
            message = json.loads(line)
            genuine = message.pop("nonce") == child["nonce"]
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError):  # not from the plugin
            continue
        if genuine:
            child["said"].append(message)
            if "started" in message:
                child["deadline"] = time.monotonic() + limit
    finished = any("finished" in message for message in child["said"])
    return bool(received) and not finished and len(child["rest"]) < 2**20


def stop(child: dict, how: str | None = None) -> dict:
    """End a child and whatever it started: {"said": its messages, "end": how it ended}."""
    process = child["process"]
    if how is None:
        process.join(5)
        how = f"the process ended by itself with exit code {process.exitcode}"
    try:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
    except (AttributeError, OSError):
        process.kill()
    process.join(5)
    child["socket"].close()
    return {"said": child["said"], "end": how}


def run_all(tasks: list[tuple[Path, list[Exercise]]], limit: float, jobs: int) -> list[dict]:
    """Run (sandbox, exercises) tasks in child processes, `jobs` at a time; each gets `limit` seconds."""
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(PRELOADED)  # imported once, not once a child
    waiting, running, done = list(range(len(tasks))), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number = waiting.pop(0)
            running[number] = start(context, *tasks[number])
        patience = max(0.0, min(child["deadline"] for child in running.values()) - time.monotonic())
        ready = multiprocessing.connection.wait([child["socket"] for child in running.values()], patience)
        for number, child in list(running.items()):
            if child["socket"] in ready and not listen(child, limit):
                done[number] = stop(running.pop(number))
            elif time.monotonic() > child["deadline"]:
                done[number] = stop(running.pop(number), f"the time limit of {limit:g} s was reached")
    return [done[number] for number in range(len(tasks))]


# ---------------------------------------------------------------------------------------------------
# verdicts

def names_of_tests(exercise: Exercise) -> list[str]:
    """The tests that must be reported, read from the grader's own file."""
    tree = ast.parse(exercise.tests.read_text(encoding="utf-8"))
    return [f"{exercise.tests.name}::{node.name}" for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def verdict(exercise: Exercise, outcome: dict) -> dict:
    """One exercise of the report: points if the plugin reported every test as passed, and the canary as failed."""
    results = {message["test"]: message for message in outcome["said"] if "test" in message}
    wanted = names_of_tests(exercise)
    failures = [results[name] for name in wanted if name in results and not results[name]["passed"]]
    unwritten = [name for name in exercise.functions if any(name == row.get("not_written") for row in failures)]
    absent = [name for name in wanted if name not in results]
    problem = next((message["problem"] for message in outcome["said"] if "problem" in message), None)
    if problem is None and (absent or CANARY not in results):
        begun = [message["running"] for message in outcome["said"] if "running" in message]
        problem = f"{outcome['end']}, {f'in {begun[-1]}' if begun else 'before the first test'}"
    elif problem is None and results[CANARY]["passed"]:
        problem = "a test that must fail has passed: something in the submission changes how tests are run"
    passed = len(wanted) - len(failures) - len(absent)
    note = f"{passed} of {len(wanted)} tests pass"
    if unwritten == list(exercise.functions) and not passed:
        note = "not written yet"
    elif unwritten:
        note += f"; {' and '.join(unwritten)} {'is' if len(unwritten) == 1 else 'are'} not written"
    failures = [failure for failure in failures if failure.get("not_written") not in unwritten]
    points = exercise.points if problem is None and passed == len(wanted) else 0
    failures = [{key: failure.get(key) for key in ("test", "input", "expected", "got")} for failure in failures]
    return dict(number=exercise.number, name=exercise.name, points=points, of=exercise.points, tests=len(wanted),
                note=note, problem=problem, equation=exercise.equation, hint=exercise.hint, failures=failures)


def grade(directory: Path, exercises=EXERCISES, limit: float = 60.0, jobs: int = CORES) -> dict:
    """The report on a student's directory."""
    with tempfile.TemporaryDirectory() as temporary:
        sandbox = make_sandbox(Path(directory), Path(temporary) / "project")
        outcomes = run_all([(sandbox, [exercise]) for exercise in exercises], limit, jobs)
    rows = [verdict(exercise, outcome) for exercise, outcome in zip(exercises, outcomes)]
    return dict(directory=str(directory), points=sum(row["points"] for row in rows),
                of=sum(row["of"] for row in rows), exercises=rows)


# ---------------------------------------------------------------------------------------------------
# the command

def text_of(report: dict) -> str:
    """The report as text: the first failures of each exercise, the table last."""
    lines, table = [], []
    for row in report["exercises"]:
        note = "" if row["points"] else row["note"]
        table.append(f"{row['number']:3}  {row['name']:34}{row['points']:4} /{row['of']:3}   {note}".rstrip())
        if row["failures"] or row["problem"]:
            lines.append(f"Exercise {row['number']}: {row['name']}")
            if row["problem"]:
                lines.append(f"  {row['problem']}")
            else:
                lines += [textwrap.fill(f"    {key:9} {row[key]}", 110, subsequent_indent=" " * 14)
                          for key in ("equation", "hint")]
            for failure in row["failures"][:SHOWN]:
                lines.append(f"  {failure['test']}")
                lines += [f"    {key:9} {failure[key]}" for key in ("input", "expected", "got") if failure[key]]
            if len(row["failures"]) > SHOWN:
                lines.append(f"  and {len(row['failures']) - SHOWN} more; --json FILE has them all")
            lines.append("")
    return "\n".join([*lines, *table, f"     {'total':34}{report['points']:4} /{report['of']:3}"])


def write_json(path: Path, report: dict) -> None:
    """Written beside and renamed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", metavar="DIR", type=Path, help="a student's copy of the project")
    add("--only", type=int, nargs="+", metavar="N", help="grade these exercises (default: all)")
    add("--json", type=Path, metavar="FILE", help="also write the report here")
    add("--limit", type=float, default=60.0, help="seconds for the tests of an exercise (default 60)")
    add("--jobs", type=int, default=CORES, help="exercises at a time (default: one for each core)")
    args = parser.parse_args(argv)
    exercises = [exercise for exercise in EXERCISES if args.only is None or exercise.number in args.only]
    if args.only and len(exercises) < len(set(args.only)):
        parser.error(f"--only: the exercises are 1 to {len(EXERCISES)}")
    if args.limit <= 0 or args.jobs < 1:
        parser.error("--limit must be positive, and --jobs at least 1")
    try:
        report = grade(args.directory, exercises, args.limit, args.jobs)
        if args.json:
            write_json(args.json, report)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(text_of(report))


if __name__ == "__main__":
    main()
