"""The part of the grader that shares a process with the student's code: it runs tests and reports what came.

Everything it says goes through one socket, as JSON lines that carry the parent's nonce; what the student's code
prints goes nowhere. The parent (grade.py) never imports the student's code, and believes nothing but those lines.
"""

import importlib
import json
import os
import re
import sys
from pathlib import Path

import check
import pytest
import torch


class Reporter:
    """A pytest plugin that says which test begins and how it ended."""

    def __init__(self, say):
        self.say = say

    def pytest_runtest_logstart(self, nodeid, location):
        self.say(running=nodeid.split("::")[-1])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" or not report.passed:
            told = {} if report.passed else failure(call.excinfo)
            self.say(test=f"{item.path.name}::{item.name}", passed=report.when == "call" and report.passed, **told)
        return report


def failure(excinfo) -> dict:
    """What the grader prints of a failed test."""
    if excinfo is None:
        return {"got": "the test was marked as failed"}
    error = excinfo.value
    undone = re.match(r"Exercise \d+: write ([\w.]+)", str(error)) if isinstance(error, NotImplementedError) else None
    if undone:  # as the handout leaves a function
        return {"not_written": undone[1], "got": check.describe(error)}
    return error.parts if isinstance(error, check.Mismatch) else {"got": check.describe(error)}


def test_this_must_fail():
    """If this passes, or does not run, the student's code has switched the tests off."""
    check.expect(1, 2.0, lambda: 1.0)


def import_all(modules: list[str]) -> str | None:
    """What is wrong with the first of the student's files that cannot be imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:  # SystemExit, too
            return f"{name}.py cannot be imported: {check.describe(error)}"
    return None


def settle_in(sandbox: str, kept: int) -> None:
    """Make this process one that finds the student's modules first, prints nowhere, and has only `kept` open."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, so that what the student's code starts can be ended with it
        os.closerange(3, kept)  # the multiprocessing module's own
        os.closerange(kept + 1, 256)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.chdir(sandbox)
    os.environ.update(HYPO_CACHE=sandbox, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.path.insert(0, sandbox)
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    settings = "[pytest]\nmarkers = exercise(n): a test of exercise n\n"  # neither the project's nor the student's
    Path("pytest.ini").write_text(settings, encoding="utf-8")


def run(socket, nonce: str, sandbox: str, modules: list[str], files: list[str]) -> None:
    """The whole life of the child process: import the student's modules, run the test files, report."""
    def say(**what):
        socket.sendall(json.dumps({"nonce": nonce, **what}).encode() + b"\n")

    settle_in(sandbox, socket.fileno())
    say(started=True)
    problem = import_all(modules)
    if problem:
        say(problem=problem)
    else:
        pytest.main(["-c", f"{sandbox}/pytest.ini", f"--confcutdir={Path(files[0]).parent}", "--strict-markers", "-qq",
                     "--assert=plain", "--capture=no", "-p", "no:cacheprovider", *files,
                     f"{__file__}::test_this_must_fail"], plugins=[Reporter(say)])
    say(finished=True)
