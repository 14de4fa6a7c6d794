"""The grader's other processes: a server that has imported torch, and the children that it forks, one for each task.

A child shares its process with the student's code: it runs tests and reports what came. Everything it says goes
through one socket, as JSON lines that carry the grader's nonce; what the student's code prints goes nowhere. The grader
(grade.py) never imports the student's code, and believes nothing but those lines.

All files that these processes use of the grader's are copies that were written before, or for, them alone: the
server has read its own, the tests too, before the first child starts, and each child has a sandbox with the modules.
"""

import builtins
import contextlib
import ctypes
import gc
import importlib
import json
import math
import multiprocessing
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from operator import is_
from pathlib import Path

import pluggy

# check, pytest and torch are imported in functions: grade.py imports this file, and has nothing to do with them
PRELOADED = ["check", "standins", "pytest", "torch", "transformers.models.auto.modeling_auto",
             "transformers.models.auto.tokenization_auto", "transformers.models.gpt2.modeling_gpt2"]
START_UP = 300  # seconds that their import may take
LONGEST = 2000  # characters of a text that comes from a child
LINUX = sys.platform == "linux"
# read before any submission runs
TESTS = {path.name: path.read_bytes() for path in Path(__file__).with_name("tests").glob("*.py")}
BUILTINS = {**builtins.__dict__}
# the canary: if it passes, or does not run, the student's code has switched tests off
CANARY = "canary.py"
TESTS[CANARY] = b"import check\n\ndef test_this_must_fail():\n    check.expect(1, 2.0, lambda: 1.0)\n"


# ---------------------------------------------------------------------------------------------------
# the grader's side

def adopt(on: bool) -> None:
    """Linux: whether a process below this one becomes its child when it loses its parent, and so stays below it."""
    if LINUX:
        ctypes.CDLL(None).prctl(36, int(on), 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def below(root: int, spare=()) -> dict[int, bytes]:
    """Linux: what descends from a process, but for `spare` and theirs: process id -> state (Z: it has ended)."""
    children: dict[int, dict[int, bytes]] = {}
    for name in filter(str.isdigit, os.listdir("/proc") if LINUX else ()):
        with contextlib.suppress(OSError):  # it has gone since
            state, parent = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()[:2]
            children.setdefault(int(parent), {})[int(name)] = state
    found: dict[int, bytes] = {}
    todo = [root]
    for parent in todo:  # it grows
        new = {pid: state for pid, state in children.get(parent, {}).items() if pid not in spare}
        found |= new
        todo += new
    return found


def end_below(spare=(), server: int | None = None) -> None:
    """Linux: kill what descends from this process, but for `spare` and theirs, and for the server alone."""
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        found = {pid: state for pid, state in below(os.getpid(), spare).items() if pid != server}
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)  # if it is a child, not only a descendant
        if all(state == b"Z" for state in found.values()):
            return
        time.sleep(0.002)
    raise RuntimeError(f"a submission has started processes that cannot be ended: {sorted(found)}")


class Server:
    """Children by fork, of a process that has imported torch."""

    def __init__(self, directory: Path):
        """directory: has a copy of the grader's programs."""
        self.socket, theirs = socket.socketpair()
        code = f"import sys; sys.path.insert(0, {str(directory)!r}); import child; child.serve({theirs.fileno()})"
        # where Python looks for modules, and where Ctrl-C is heard, is not where the grader was started
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=directory, stdin=subprocess.DEVNULL,
                                        pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self.socket.settimeout(START_UP)
        if not self.socket.recv(64):
            raise RuntimeError("the process that runs the tests did not start; its error stands above")
        self.socket.settimeout(60)

    def ask(self, request: dict | int, *descriptors: int) -> int | None:
        """For a task and its socket a new child's process id, for that its exit code; None: there is no answer."""
        try:
            if descriptors:
                socket.send_fds(self.socket, [json.dumps(request).encode()], descriptors)
            else:
                self.socket.sendall(json.dumps(request).encode())
            return json.loads(self.socket.recv(64))
        except (OSError, ValueError):  # a submission has ended or stopped the server
            self.socket.close()
            return None

    def start(self, channel: socket.socket, task: dict) -> int | None:
        return self.ask(task, channel.fileno())

    def exit_code(self, pid: int | None) -> int | None:
        return self.ask(pid) if pid else None

    def end(self, pid: int | None, spare) -> None:
        """Kill a child and all that it has started, but for `spare` and theirs."""
        if pid:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)  # it leads a group of its own
        end_below(spare, self.process.pid)

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


class NoServer:
    """The same where there is no fork."""

    def __init__(self):
        self.processes: dict = {}

    def start(self, channel: socket.socket, task: dict) -> int:
        process = multiprocessing.get_context("spawn").Process(target=run, args=(channel,), kwargs=task)
        process.start()
        self.processes[process.pid] = process
        return process.pid

    def exit_code(self, pid: int) -> int | None:
        self.processes[pid].join(5)
        return self.processes[pid].exitcode

    def end(self, pid: int, spare) -> None:
        self.processes[pid].kill()

    def close(self) -> None:
        pass


class Child:
    """A child process that has been started, and what it has said."""

    def __init__(self, server: Server | NoServer, **task):
        self.socket, theirs = socket.socketpair()
        self.nonce, self.said, self.rest = secrets.token_hex(16), [], b""
        self.deadline = time.monotonic() + START_UP
        self.pid = server.start(theirs, dict(task, nonce=self.nonce))
        theirs.close()

    def listen(self, limit: float) -> bool:
        """Take what it has sent, JSON lines; False if there will be no more. Lines without the nonce do not count."""
        try:
            received = self.socket.recv(2**16)
        except OSError:
            received = b""
        *lines, self.rest = (self.rest + received).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                genuine = message.pop("nonce") == self.nonce
                message = {key: value if isinstance(value, bool) else visible(value) for key, value in message.items()}
            except (ValueError, RecursionError, AttributeError, TypeError, KeyError):  # not from the plugin
                continue
            if genuine:
                self.said.append(message)
                if len(self.said) == 1:  # it has started
                    self.deadline = time.monotonic() + limit
        finished = any("finished" in message for message in self.said)
        return bool(received) and not finished and len(self.rest) < 2**20 and len(self.said) < 1000


def visible(value) -> str:
    """A text of bounded length on one line, with escapes for control characters and those that turn the direction."""
    text = str(value)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:LONGEST])
    return shown + " ..." * (len(text) > LONGEST)


# ---------------------------------------------------------------------------------------------------
# the server's side

def serve(descriptor: int) -> None:
    """The server's life. It ends with the grader, in whatever way that ends, and then leaves nothing running."""
    for name in PRELOADED:
        importlib.import_module(name)
    sys.path.remove(str(Path(__file__).parent))  # a child that writes there reaches no later one
    gc.freeze()  # children need not look for garbage in what they have got from here
    adopt(True)
    control, answer = socket.socket(fileno=descriptor), 0
    with contextlib.suppress(BrokenPipeError):
        while True:
            control.sendall(json.dumps(answer).encode())  # the first one says that it is ready
            text, descriptors, *_ = socket.recv_fds(control, 2**16, 1)
            if not text:
                break
            if descriptors:
                answer = fork(socket.socket(fileno=descriptors[0]), json.loads(text))
            else:
                answer = exit_code(json.loads(text))
    end_below()


def fork(channel: socket.socket, task: dict) -> int:
    """The process id of a new child, which runs the task and never returns."""
    pid = os.fork()
    if pid:
        channel.close()
        return pid
    try:
        run(channel, **task)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def exit_code(pid: int) -> int | None:
    """Of a child that has ended, or does so within five seconds."""
    for _ in range(5000):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


# ---------------------------------------------------------------------------------------------------
# the child

class Reporter:
    """A pytest plugin that says which test begins and how it ended."""

    def __init__(self, say):
        self.say = say

    def pytest_configure(self, config):
        config.addinivalue_line("markers", "exercise(n): a test of exercise n")

    def pytest_runtest_logstart(self, nodeid, location):
        self.say(running=nodeid.split("::")[-1])

    @pluggy.HookimplMarker("pytest")(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" or not report.passed:
            told = {} if report.passed else failure(call.excinfo)
            self.say(test=f"{item.path.name}::{item.name}", passed=report.when == "call" and report.passed, **told)
        return report


def failure(excinfo) -> dict:
    """What the grader prints of a failed test."""
    import check
    if excinfo is None:
        return {"got": "the test was marked as failed"}
    error = excinfo.value
    undone = re.match(r"Exercise \d+: write ([\w.]+)", str(error)) if isinstance(error, NotImplementedError) else None
    if undone:  # as the handout leaves a function
        return {"not_written": undone[1], "got": check.describe(error)}
    return error.parts if isinstance(error, check.Mismatch) else {"got": check.describe(error)}


def import_all(modules: list[str], tests: list[str]) -> str | None:
    """What is wrong with the first of the student's files, or of the tests on them, that cannot be imported."""
    import check
    for name in [*modules, *(test.removesuffix(".py") for test in tests)]:
        try:
            if f"{name}.py" in TESTS:  # not from the sandbox, where the student's code may have written
                module = types.ModuleType(name)
                module.__file__ = os.path.abspath(f"{name}.py")
                exec(compile(TESTS[f"{name}.py"], module.__file__, "exec"), vars(module))
                sys.modules[name] = module  # pytest finds it there
            else:
                importlib.import_module(name)
        except BaseException as error:  # SystemExit, too
            return f"{name}.py cannot be imported: {check.describe(error)}"
    return None


def made_of(*places) -> list:
    """The objects that modules and classes consist of, and their code."""
    # pytest notes with a bool that it has warned of a class
    values = [value for place in places for value in vars(place).values() if not isinstance(value, bool)]
    return values + [getattr(value, "__code__", None) for value in values] + [sys.gettrace(), sys.getprofile()]


def same(before: list, now: list) -> bool:
    """One by one the same objects, whatever they say of themselves."""
    return len(before) == len(now) and all(map(is_, before, now))


def settle_in(sandbox: str, kept: int, memory: float) -> None:
    """Make this process one that finds the sandbox first, prints nowhere, and has only `kept` open."""
    import torch
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, so that what the student's code starts can be ended with it
        os.closerange(3, kept)  # the server's own
        os.closerange(kept + 1, 256)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.chdir(sandbox)
    os.environ.update(HYPO_CACHE=sandbox, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.path.insert(0, sandbox)
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    if LINUX:
        import resource
        has = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # torch's and Python's
        most, hard = int(memory * 2**30) + has, resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # not RLIMIT_AS: libraries are not its memory


def run(channel: socket.socket, nonce: str, sandbox: str, modules: list[str], tests: list[str], memory: float) -> None:
    """The whole life of a child: import the student's modules, run the tests, report."""
    import check
    import pytest
    import standins
    from _pytest import python, runner

    def say(**what):
        channel.sendall(json.dumps({"nonce": nonce, **what}).encode() + b"\n")

    # ready now, for when it is needed there may be no memory to make it
    last_words = json.dumps({"nonce": nonce, "end": f"the memory limit of {memory:g} GB was reached"}).encode() + b"\n"
    describe = check.describe

    def describe_or_leave(error):
        if LINUX and (isinstance(error, MemoryError) or "allocate memory" in str(error)):  # the latter is torch's
            try:
                channel.sendall(last_words)
            finally:
                os._exit(1)
        return describe(error)

    check.describe = describe_or_leave
    settle_in(sandbox, channel.fileno(), memory)
    say(started=True)
    try:
        places = [math, check, standins, python, python.Function, runner, Reporter]
        before, problem = made_of(*places), import_all(modules, tests)
        if problem:
            say(problem=problem)
        else:
            for name in "PYTEST_ADDOPTS", "PYTEST_PLUGINS":
                os.environ.pop(name, None)
            loaded = [sys.modules[test.removesuffix(".py")] for test in tests]
            tests_before = made_of(*loaded)
            pytest.main(["-c", os.devnull, "--rootdir=.", "--noconftest", "--strict-markers", "-qq", "--assert=plain",
                         "--capture=no", "-p", "no:cacheprovider", *tests], plugins=[Reporter(say)])
            names = {**builtins.__dict__}
            builtins.__dict__.update(BUILTINS)  # the next line needs them
            if not (same([*BUILTINS.values()], [*names.values()]) and same(before, made_of(*places))
                    and same(tests_before, made_of(*loaded))):
                say(problem="the submission changes tests, or what they compare with, in memory")
        say(finished=True)
    except MemoryError as error:
        describe_or_leave(error)
