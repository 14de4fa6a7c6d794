"""Grades a student's copy of the project: points for each exercise, and what every failure was about.

    python assignment/grade.py DIR                      # all exercises
    python assignment/grade.py DIR --only 3 5           # some of them
    python assignment/grade.py DIR --hints 2            # with a second hint, which is nearly the code; 0: none
    python assignment/grade.py DIR --json report.json   # the same as JSON
    python assignment/grade.py DIR --gradescope results.json
    python assignment/grade.py DIR --strict --summary summary.md    # for GitHub Classroom

From DIR come the files that hold exercises, and nothing else: tests, settings and all other modules are the grader's
own, read once, before any code of DIR runs. Each exercise runs in a process of its own with limits of time and memory,
and its tests share its points alike: 5 of 6 tests give five sixths of them, to the nearest tenth. Results count only if
they come from the grader's pytest plugin, through a socket and signed, one for each test of the grader's own file, and
if one more test, which must fail, has failed. So edited tests, an early exit, an endless loop, printed results, a
comparison that has been replaced and a pytest that has been switched off earn nothing in that exercise. With its
process ends all that an exercise has started. If the grader's own files are changed meanwhile, there are no points;
they are put back, and what was written stays beside them as *.changed.

Exits with 0, or with --strict with 1 if points are missing. An error is 1 as well, with a sentence.

Only Linux limits the memory (of each process) and ends a process that has left its group; Windows has no such groups.

No defence against code that is written to deceive this very grader: it shares a process with the tests, may
recognise their inputs, and has the rights of whoever starts the grader (files, network). To grade people whom you do
not trust, do it in a container without network that holds nothing else, and read what they wrote.
"""

import argparse
import ast
import contextlib
import importlib.machinery
import io
import json
import math
import multiprocessing.connection
import os
import re
import secrets
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path

if __name__ == "__main__":  # a submission may have left bytecode where Python would find it
    sys.pycache_prefix = os.devnull

import child
from child import Child, NoServer, Server, adopt, below, end_below, visible
from exercises import EXERCISES, PROJECT, Exercise

SHOWN = 3  # failures of an exercise that are printed
GRADED = sorted({f"{module}.py" for exercise in EXERCISES for module in exercise.modules})
CORES = os.cpu_count() or 1
MEMORY = 4.0  # GB; a solution needs less than a tenth of one
LARGEST = 10**6  # bytes of a student's file
CANARY = f"{child.CANARY}::test_this_must_fail"


# ---------------------------------------------------------------------------------------------------
# files: all are in memory before the first child starts

def submission(directory: Path) -> dict[str, bytes]:
    """The student's files that hold exercises; ValueError if one is not there, or is a link to somewhere else."""
    for name in GRADED:
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{directory} has no {name}; name the directory of the assignment, which holds it")
        if path.resolve().parent != directory.resolve():  # to the solution, say
            raise ValueError(f"{path} is a link that leads out of its directory; put the file itself there")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} has more than {LARGEST:,} bytes; it holds code and nothing else")
    return {name: (directory / name).read_bytes() for name in GRADED}


def grader_files() -> dict[str, bytes]:
    """The grader's own: programs, tests, modules that hold no exercise, and what could stand in for an import."""
    files = {}
    for path in [*PROJECT.glob("*.py"), *PROJECT.glob("assignment/**/*.*")]:
        with contextlib.suppress(OSError):  # what cannot be read is not there
            if path.is_file() and path.name not in GRADED and path.parent.name != "__pycache__" and (
                    path.name.endswith(tuple(importlib.machinery.all_suffixes()))):
                files[path.relative_to(PROJECT).as_posix()] = path.read_bytes()
    return files


def changed(before: dict[str, bytes], put_back: bool = False) -> list[str]:
    """The grader's files that are not as they were; put_back: make them so, and keep what is there as *.changed."""
    now = grader_files()
    names = sorted(name for name in before | now if before.get(name) != now.get(name))
    for name in names if put_back else ():
        if os.path.lexists(PROJECT / name):
            os.replace(PROJECT / name, PROJECT / f"{name}.changed")
        write({name: before[name]} if name in before else {}, PROJECT)
    return names


def write(files: dict[str, bytes], directory: Path) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


# ---------------------------------------------------------------------------------------------------
# child processes

def tests_of(exercises: list[Exercise], files: dict[str, bytes]) -> dict[str, bytes]:
    tests = {}
    for exercise in exercises:
        name, = (name for name in files if name.startswith(f"assignment/tests/test_{exercise.number:02}_"))
        tests[Path(name).name] = files[name]
    return tests


def start(server: Server | NoServer, files: dict[str, bytes], sandbox: Path, given: dict[str, bytes],
          exercises: list[Exercise], memory: float) -> Child:
    """A child process that runs the tests of some exercises on what a student gave."""
    tests = tests_of(exercises, files)
    modules = {name: content for name, content in files.items() if "/" not in name}
    write(modules | given | tests | {child.CANARY: child.TESTS[child.CANARY]}, sandbox)
    return Child(server, sandbox=str(sandbox), tests=[*tests, child.CANARY], memory=memory,
                 modules=sorted({module for exercise in exercises for module in exercise.modules}))


def run_all(tasks: list[tuple[dict[str, bytes], list[Exercise]]], limit: float, jobs: int,
            memory: float = MEMORY) -> list[dict]:
    """Run (submission, exercises) tasks in child processes, `jobs` at a time, each with limits in seconds and in GB.

    Returns what each said, how it ended, and its tests.
    """
    files, others = grader_files(), set(below(os.getpid()))
    waiting, running, done = list(range(len(tasks))), {}, {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, contextlib.ExitStack() as at_the_end:
        write({name: content for name, content in files.items() if "/" in name}, Path(temporary))
        at_the_end.callback(adopt, False)
        at_the_end.callback(end_below, others)
        adopt(True)
        server = Server(Path(temporary, "assignment")) if hasattr(os, "fork") else NoServer()
        at_the_end.callback(server.close)
        while waiting or running:
            while waiting and len(running) < jobs:
                number = waiting.pop(0)
                running[number] = start(server, files, Path(temporary, str(number)), *tasks[number], memory)
            patience = max(0.0, min(child.deadline for child in running.values()) - time.monotonic())
            ready = multiprocessing.connection.wait([child.socket for child in running.values()], patience)
            for number, child in list(running.items()):
                if child.socket in ready and not child.listen(limit):
                    code = server.exit_code(child.pid)
                    how = next((message["end"] for message in child.said if "end" in message),
                               f"the process ended by itself with exit code {code}")
                elif time.monotonic() > child.deadline:
                    how = f"the time limit of {limit:g} s was reached"
                else:
                    continue
                del running[number]
                server.end(child.pid, others | {other.pid for other in running.values()})
                child.socket.close()
                done[number] = dict(said=child.said, end=how, tests=tests_of(tasks[number][1], files))
    names = visible(", ".join(changed(files)))
    for outcome in done.values() if names else ():
        outcome["said"].insert(0, {"problem": f"files of the grader were changed while a submission ran: {names}"})
    return [done[number] for number in range(len(tasks))]


# ---------------------------------------------------------------------------------------------------
# verdicts

def verdict(exercise: Exercise, outcome: dict, hints: int = 1) -> dict:
    """One exercise of the report: what its tests share of its points, if the plugin reported the canary as failed.

    Points are rounded to a tenth; all tests give all points.
    """
    results = {message["test"]: message for message in outcome["said"] if "test" in message}
    wanted = [f"{name}::{node.name}" for name, source in outcome["tests"].items()
              if name.startswith(f"test_{exercise.number:02}_") for node in ast.parse(source).body
              if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    failures = [results[name] for name in wanted if name in results and not results[name].get("passed")]
    passed = [name for name in wanted if name in results and results[name].get("passed")]
    unwritten = [name for name in exercise.functions if any(name == row.get("not_written") for row in failures)]
    problem = next((message["problem"] for message in outcome["said"] if "problem" in message), None)
    if problem is None and (len(passed) + len(failures) < len(wanted) or CANARY not in results):
        begun = [message["running"] for message in outcome["said"] if "running" in message]
        problem = f"{outcome['end']}, {f'in {begun[-1]}' if begun else 'before the first test'}"
    elif problem is None and results[CANARY].get("passed"):
        problem = "a test that must fail has passed: something in the submission changes how tests are run"
    note = f"{len(passed)} of {len(wanted)} tests pass"
    if unwritten == list(exercise.functions) and not passed:
        note = "not written yet"
    elif unwritten:
        note += f"; {' and '.join(unwritten)} {'is' if len(unwritten) == 1 else 'are'} not written yet"
    failures = [failure for failure in failures if failure.get("not_written") not in unwritten]
    points = 0 if problem else round(exercise.points * len(passed) / max(len(wanted), 1), 1)
    failures = [{key: failure.get(key) for key in ("test", "input", "expected", "got")} for failure in failures]
    return dict(number=exercise.number, name=exercise.name, points=points, of=exercise.points, tests=wanted,
                passed=passed, note=note, problem=problem, equation=exercise.equation, failures=failures,
                hints=list(exercise.hints[:hints]))


def report_on(directory: Path, exercises: list[Exercise], outcomes: list[dict], hints: int = 1) -> dict:
    rows = [verdict(exercise, outcome, hints) for exercise, outcome in zip(exercises, outcomes)]
    return dict(directory=visible(directory), points=round(sum(row["points"] for row in rows), 1),
                of=sum(row["of"] for row in rows), exercises=rows)


# ---------------------------------------------------------------------------------------------------
# the command

def paragraph(name: str, text: str) -> str:
    return textwrap.fill(f"    {name:9} {text}", 110, subsequent_indent=" " * 14)


def titles(tests) -> str:
    """The names of tests, without their file."""
    return ", ".join(test.split("::")[1] for test in tests)


def general(row: dict) -> list[str]:
    """What is said once of an exercise whose tests fail."""
    return [paragraph("equation", row["equation"]), *(paragraph("hint", hint) for hint in row["hints"])]


def details(failure: dict) -> list[str]:
    return [paragraph(key, failure[key]) for key in ("input", "expected", "got") if failure[key]]


def table_of(report: dict) -> str:
    lines = [f"{row['number']:3}  {row['name']:34}{row['points']:6g} /{row['of']:3}   {remark(row)}".rstrip()
             for row in report["exercises"]]
    return "\n".join([*lines, f"     {'total':34}{report['points']:6g} /{report['of']:3}"])


def remark(row: dict) -> str:
    return "" if row["points"] == row["of"] else row["note"]


def text_of(report: dict) -> str:
    """The report as text: the first failures of each exercise, the table last."""
    lines = []
    for row in report["exercises"]:
        some = 0 < len(row["passed"]) < len(row["tests"])
        alone = len(report["exercises"]) == 1 and not row["passed"]  # asked for by itself: also before it is begun
        if row["failures"] or row["problem"] or some or alone:
            lines.append(f"Exercise {row['number']}: {row['name']}")
            if row["problem"]:
                lines.append(f"  {row['problem']}")
            elif row["failures"] or alone:
                lines += general(row)
            for failure in row["failures"][:SHOWN]:
                lines += [f"  {failure['test']}", *details(failure)]
            if len(row["failures"]) > SHOWN:
                names = titles(failure["test"] for failure in row["failures"][SHOWN:])
                lines.append(paragraph("also", f"{names}; --json FILE has them all"))
            if some and not row["problem"]:
                lines.append(paragraph("passing", titles(row["passed"])))
            lines.append("")
    return "\n".join([*lines, table_of(report)])


def json_of(report: dict) -> str:
    return json.dumps(report, indent=1) + "\n"


def gradescope_of(report: dict) -> str:
    """Gradescope's results.json: a test each, and their sum as rounded here."""
    tests = []
    for row in report["exercises"]:
        failures = {failure["test"]: failure for failure in row["failures"]}
        value = round(row["of"] / len(row["tests"]), 3)
        for place, name in enumerate(row["tests"], 1):
            right = name in row["passed"] and not row["problem"]
            why = [row["problem"] or row["note"]]
            if name in failures and not row["problem"]:
                why = [*general(row), *details(failures[name])]
            tests.append(dict(name=f"{row['name']}: {titles([name])}", number=f"{row['number']}.{place}",
                              score=value if right else 0, max_score=value, status="passed" if right else "failed",
                              output="" if right else "\n".join(why), visibility="visible"))
    return json.dumps(dict(score=report["points"], output=table_of(report), visibility="visible", tests=tests))


def summary_of(report: dict) -> str:
    """A table in Markdown; what comes from a submission is plain text in it."""
    rows = [(f"{row['number']}", row["name"], f"{row['points']:g} / {row['of']}", row["problem"] or remark(row))
            for row in report["exercises"]]
    rows.append(("", "total", f"{report['points']:g} / {report['of']}", ""))
    lines = [" | ".join(re.sub(r"([\\`*_{}\[\]<>()#!|~&@:.])", r"\\\1", cell) for cell in row) for row in rows]
    return "\n".join(["", "| | exercise | points | |", "| ---: | --- | ---: | --- |",
                      *(f"| {line} |" for line in lines), ""])


def write_whole(path: Path, text: str | None) -> None:
    """Written beside, under a name that no submission knows, and renamed; None: only tried. OSError if it cannot be."""
    if path.exists() and not path.is_file():
        raise OSError(0, "it is there and no file")
    beside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    beside.write_text(text or "", encoding="utf-8")
    if text is None:
        beside.unlink()
    else:
        os.replace(beside, path)


def number(kind: type, low: float, high: float):
    """An argparse type: a number in [low, high], so neither NaN nor infinite."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            sort = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {sort} from {low} to {high}, got {text!r:.40}")
        return value
    return read


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", metavar="DIR", type=Path, help="a student's copy of the project")
    add("--only", type=number(int, 1, len(EXERCISES)), nargs="+", metavar="N",
        help="grade these exercises, with spaces between (default: all)")
    add("--hints", type=int, choices=(0, 1, 2), default=1, help="how many an exercise that fails gets (default 1)")
    add("--json", type=Path, metavar="FILE", help="also write the report here")
    add("--gradescope", type=Path, metavar="FILE", help="also write the results here, for Gradescope")
    add("--summary", type=Path, metavar="FILE", help="also append a table in Markdown here, for GitHub")
    add("--strict", action="store_true", help="exit with 1 unless all points are reached")
    add("--limit", type=number(float, 1, 86400), default=60.0, help="seconds for an exercise's tests (default 60)")
    add("--memory", type=number(float, 0.1, 10**6), default=MEMORY,
        help=f"GB for an exercise's process, beside what torch needs (default {MEMORY:g}; only on Linux)")
    add("--jobs", type=number(int, 1, 1000), default=CORES, help="exercises at a time (default: one for each core)")
    args = parser.parse_args(argv)
    exercises = [exercise for exercise in EXERCISES if args.only is None or exercise.number in args.only]
    try:
        given = submission(args.directory)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {visible(error)}")
    outputs = [(flag, path, form) for flag, path, form in (
        ("--json", args.json, json_of), ("--gradescope", args.gradescope, gradescope_of),
        ("--summary", args.summary, summary_of)) if path]
    for flag, path, _ in outputs:
        try:
            write_whole(path, None)
        except OSError as error:
            parser.error(f"{flag} {visible(path)} cannot be written: {error.strerror}")
    before = grader_files()
    try:
        outcomes = run_all([(given, [exercise]) for exercise in exercises], args.limit, args.jobs, args.memory)
    finally:
        names = changed(before, put_back=True)
    report, problems = report_on(args.directory, exercises, outcomes, args.hints), []
    if names:
        problems.append(f"{visible(', '.join(names))}: changed while code of {visible(args.directory)} ran, so there "
                        "are no points; all is as before again, and what was there is beside it, *.changed")
    for flag, path, form in outputs:
        try:
            earlier = path.read_text("utf-8", "replace") if form is summary_of and path.exists() else ""
            write_whole(path, earlier + form(report))
        except OSError as error:
            problems.append(f"{flag} {visible(path)} could not be written: {error.strerror}; the report is above")
    print(text_of(report))
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))
    if args.strict and report["points"] < report["of"]:
        sys.exit(1)


def run_command(main) -> None:
    """main(), quiet when it is stopped, or when who reads its output has gone."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, so that children are ended
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    run_command(main)
