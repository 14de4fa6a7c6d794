"""Bad input ends in one sentence, at once, and loses nothing; near misses of it are accepted.

The cases are the table in bad_inputs.py. Each runs a command as `python X.py ARGS` does, in a new directory and in a
fork of this process, which has imported torch already.

    python -m pytest tests/test_bad_inputs.py    # every fourth case, for all of them take two minutes
    python tests/test_bad_inputs.py              # all: how many of each kind are right, and what the others did
    python tests/test_bad_inputs.py DIR          # the same, of another checkout
"""

import contextlib
import gc
import hashlib
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [*sys.argv[1:2], str(Path(__file__).resolve().parent.parent)]

import huggingface_hub
import pytest
import torch
from bad_inputs import BUILT, CASES, Case, build_models, run_command, words_of
from tqdm import tqdm

import eval

LIMIT = 40.0  # seconds for a case; most take a tenth of one
MEMORY = 8 * 2**30  # bytes for a case, beyond what this process has


class Outcome(NamedTuple):
    """What came of a case."""
    code: int | None  # None: it was still running after LIMIT seconds
    out: str
    err: str
    before: dict[str, str]  # the files that were there: path -> hash of the bytes
    after: dict[str, str]
    seconds: float  # of a core


# ---- the child

def files_in(directory) -> dict[str, str]:
    """The regular files below a directory, less locks, which change hands; links are not followed."""
    paths = [Path(folder, name) for folder, _, names in os.walk(directory) for name in names]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths if path.is_file() and not path.is_symlink() and path.name != ".lock"}


def exit_code(function, *args) -> int:
    """The code with which Python would end, and what it would print at the end."""
    try:
        function(*args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        traceback.print_exc()
        code = 120
    return code


def child(case: Case, folder: Path, shared: Path) -> int:
    """Make what the case needs in folder/case, and run its command there."""
    os.setsid()  # what it starts ends with it
    torch.set_num_threads(1)  # makes torch's thread pool anew, which two threads would otherwise try at once
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = open(os.devnull)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.environ.update(HYPO_CACHE=str(folder / "case" / "cache"), TOKENIZERS_PARALLELISM="false")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    tqdm.set_lock(threading.RLock())  # its own belongs to all forks, and one may be killed while it has it
    eval.plot_curve = lambda *args: None  # as much work as the rest of so short a run
    have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + MEMORY, have + MEMORY))
    os.chdir(folder / "case")
    for path in shared.iterdir():
        Path(path.name).symlink_to(path)
    for make in case.given:
        make()
    (folder / "before").write_text(json.dumps(files_in(".")))
    return exit_code(run_command, *words_of(case.command))


# ---- the parent

def outcomes_of(cases: list[Case], directory: Path, shared: Path) -> dict[str, Outcome]:
    """Run the cases, as many at a time as there are cores: name -> outcome."""
    waiting, running, done = list(enumerate(cases)), {}, {}
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            number, case = waiting.pop(0)
            folder = directory / str(number)
            (folder / "case").mkdir(parents=True)
            with warnings.catch_warnings():  # this process has one thread that does anything
                warnings.simplefilter("ignore", DeprecationWarning)
                process = os.fork()
            if not process:
                code = 99
                try:
                    code = child(case, folder, shared)
                except BaseException:  # the case could not be made
                    traceback.print_exc()
                finally:
                    os._exit(code)
            running[process] = case, folder, time.monotonic()
        for process, (case, folder, began) in list(running.items()):
            ended, status, used = os.wait4(process, os.WNOHANG)
            if ended or time.monotonic() > began + LIMIT:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
                if not ended:
                    os.waitpid(process, 0)
                code = os.waitstatus_to_exitcode(status) if ended else None
                out, err = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
                before = folder / "before"
                assert before.exists(), f"{case.name}: it could not be made\n{err}"
                done[case.name] = Outcome(
                    code, out, err, json.loads(before.read_text()), files_in(folder / "case"),
                    used.ru_utime + used.ru_stime)
                del running[process]
        time.sleep(0.002)
    return done


def build(directory: Path) -> Path:
    """The models, files and runs that the cases share."""
    shared = directory / "shared"
    shared.mkdir()
    build_models(shared)
    eval.panels(["win rate"], "KL")[0].savefig(io.BytesIO())  # imports matplotlib
    gc.freeze()  # or each fork's collector would copy this process's memory
    for name, outcome in outcomes_of(BUILT, directory / "built", shared).items():
        assert outcome.code in (0, -signal.SIGKILL), f"{name}: {outcome.err}"
    for number, case in enumerate(BUILT):
        os.rename(directory / "built" / str(number) / "case" / case.name, shared / case.name)
    return shared


def shortfall(case: Case, got: Outcome) -> str:
    """What was not as it should be; "" if nothing."""
    text, new = got.out + got.err, got.after.keys() - got.before.keys()
    changed = [path for path, content in got.before.items() if got.after.get(path) != content]
    moved = {(Path(path).name, content) for path, content in got.after.items()}
    if got.code is None:
        return f"hang: more than {LIMIT:g} s"
    if "Traceback (most recent call last)" in text or got.code < 0 or got.code > 2:
        return f"traceback: exit code {got.code}, {text.strip()[-300:]!r}"
    if left := [path for path in new if ".tmp" in path]:
        return f"left behind: {left}"
    if case.accepted:
        lost = [path for path in changed if not path.startswith(case.changes or "\0")
                and (Path(path).name, got.before[path]) not in moved]
        missing = [word for word in case.words if word not in text]
        unequal = case.same and got.after.get(case.same[0]) != got.after.get(case.same[1])
        return (f"wrongly refused: exit code {got.code}, {got.err.strip()[-300:]!r}" if got.code else
                f"lost: {lost}" if lost else f"it does not say {missing}: {text[-300:]!r}" if missing else
                f"unequal: {case.same}" if unequal else "")
    if got.code == 0:
        return f"silent: exit code 0, {text.strip()[-200:]!r}"
    if changed:
        return f"lost or changed: {changed}"
    if left := [path for path in new if re.search(r"(^|/)(policy/|summary\.json$)", path)]:
        return f"looks like a finished run: {left}"
    sentence = re.search(r"^(?:usage: .*?^\S+(?: -m \S+)?: )?error: (.+)\Z", got.err, re.DOTALL | re.MULTILINE)
    if not sentence or "\n" in sentence[1].strip():
        return f"no sentence: {got.err.strip()[-300:]!r}"
    missing = [word for word in case.words if word not in sentence[1]]
    return f"vague: {missing} not in {sentence[1].strip()!r}" if missing else ""


# ---- the test

@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """All cases that were asked for, at once."""
    wanted = {item.callspec.params["case"].name for item in request.session.items
              if getattr(item, "module", None) is request.module}
    directory = tmp_path_factory.mktemp("bad")
    return outcomes_of([case for case in CASES if case.name in wanted], directory / "cases", build(directory))


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_bad_input(case, outcomes):
    problem = shortfall(case, outcomes[case.name])
    assert not problem, f"{case.command}\n{problem}"


def main() -> None:
    """The table by kind."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        found = outcomes_of(CASES, Path(directory, "cases"), build(Path(directory)))
    problems = {case: shortfall(case, found[case.name]) for case in CASES}
    short = {case: problem for case, problem in problems.items() if problem}
    rows = [["kind", "tried", "right", ""]]
    for kind in dict.fromkeys(case.kind for case in CASES):
        failed = [problem.partition(":")[0] for case, problem in short.items() if case.kind == kind]
        tried = sum(case.kind == kind for case in CASES)
        rows.append([kind, str(tried), str(tried - len(failed)),
                     ", ".join(f"{failed.count(how)} {how}" for how in sorted(set(failed)))])
    rows.append(["all", str(len(CASES)), str(len(CASES) - len(short)), ""])
    print(eval.aligned(rows))
    for case, problem in short.items():
        print(f"\n{case.name}\n  {case.command}\n  {problem}")


if __name__ == "__main__":
    main()
