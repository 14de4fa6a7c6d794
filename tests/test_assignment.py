"""The teaching assignment: the handout is the project without answers, and the grader is neither blind nor fooled."""

import ast
import json
import os
import py_compile
import re
import shlex
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import grade
import handout
import mutants
import pytest
from exercises import EXERCISES
from handout import functions_of

ROOT = Path(__file__).parent.parent
MODULES = sorted({module for exercise in EXERCISES for module in exercise.modules})
TEACHERS = (ROOT / "assignment" / "teachers.md").read_text(encoding="utf-8")
HANDOUT = (ROOT / "assignment" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The handout as a student gets it."""
    directory = tmp_path_factory.mktemp("class") / "student"
    handout.hand_out(directory)
    return directory


# ---------------------------------------------------------------------------------------------------
# the handout


def body_of(node: ast.FunctionDef) -> list[ast.stmt]:
    """Its statements, without the docstring."""
    return node.body[1:] if ast.get_docstring(node) else node.body


def lines_outside(source: str, names) -> list[str]:
    """The source's lines but for those of the bodies of these functions, and comments at a body's end."""
    lines = source.splitlines(keepends=True)
    for name, node in functions_of(source).items():
        if name in names:
            begin = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
            end, indent = node.end_lineno, " " * node.body[0].col_offset
            while lines[end:] and (lines[end] or "").startswith(indent + "#"):
                end += 1
            lines[begin:end] = [None] * (end - begin)
    return [line for line in lines if line is not None]


@pytest.mark.parametrize("module", [*MODULES, *handout.KEPT_BACK])
def test_a_handed_out_file_lacks_the_bodies_and_nothing_else(student, module):
    ours, theirs = ((place / f"{module}.py").read_text(encoding="utf-8") for place in (ROOT, student))
    wanted = handout.wanted_of(module)
    mine, stubs = functions_of(ours), functions_of(theirs)
    for name, statement in wanted.items():
        assert ast.get_docstring(mine[name]) == ast.get_docstring(stubs[name])
        assert [ast.unparse(line) for line in body_of(stubs[name])] == [ast.unparse(ast.parse(statement))]
    assert lines_outside(ours, wanted) == lines_outside(theirs, wanted), "signatures, comments, everything else"


def test_other_files_are_copied_byte_for_byte_and_no_answers_are_among_them(student):
    files = {path.relative_to(student).as_posix() for path in student.rglob("*") if path.is_file()}
    assert {"LICENSE", "requirements.txt", "run.py", "assignment/README.md", "assignment/grade.py"} <= files
    assert {name for name in files if name.startswith("experiments/")} == {
        "experiments/__init__.py", "experiments/coverage_of_run.py", "experiments/coverage_pictures.py"}, "no study"
    for name in files - {f"{module}.py" for module in [*MODULES, *handout.KEPT_BACK]}:
        assert (student / name).read_bytes() == (ROOT / name).read_bytes(), name
    told = [name for name in files if any(fnmatch(name, pattern) for pattern in handout.KEPT_OUT)]
    assert not told, told


def is_mere_call(value: ast.expr) -> bool:
    """f(...), or name.f(...) of names alone: that is no formula."""
    return isinstance(value, ast.Call) and (isinstance(value.func, ast.Name) or (
        isinstance(value.func, ast.Attribute) and isinstance(value.func.value, ast.Name)
        and all(isinstance(arg, (ast.Name, ast.Attribute)) for arg in value.args)))


def test_every_pattern_of_what_is_kept_out_keeps_something_out_and_a_handout_with_it_is_refused(tmp_path, monkeypatch):
    patterns = set(handout.KEPT_OUT) - {"runs/*", "*.ipynb"}  # which need not be in a clone
    for path in ROOT.rglob("*"):
        patterns -= {pattern for pattern in patterns if fnmatch(path.relative_to(ROOT).as_posix(), pattern)}
    assert not patterns
    monkeypatch.setattr(handout, "COPIED", [*handout.COPIED, "assignment/teachers.md"])
    with pytest.raises(ValueError, match="COPIED has assignment/teachers.md, which KEPT_OUT keeps out"):
        handout.hand_out(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def functions_in(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.FunctionDef)]


def test_no_function_of_the_handout_has_the_body_of_a_solution(student):
    """Under whatever name, and in whatever file; nor does a text have two lines of one beside each other."""
    def code(node):
        return [ast.unparse(line) for line in body_of(node)]

    bodies, pairs = [], set()
    for module in MODULES:
        source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
        for name in handout.wanted_of(module):
            node = functions_of(source)[name]
            bodies.append(code(node))
            lines = [line.strip() for line in source.splitlines()[body_of(node)[0].lineno - 1:node.end_lineno]]
            if name != "train":  # which begins as dpo.train does
                pairs |= {two for two in zip(lines, lines[1:]) if min(map(len, two)) > 20}
    assert len(bodies) > 25 and len(pairs) > 20
    for path in student.rglob("*.*"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        assert not pairs & {*zip(lines, lines[1:])}, path
        assert path.suffix != ".py" or not [node.name for node in functions_in(path) if code(node) in bodies], path


def test_no_sentence_of_the_written_answers_stands_in_the_handout(student):
    def words(text):
        return " ".join(re.sub(r"[*`]", "", text).split())

    answers = words(TEACHERS.split("## What a good answer contains")[1])
    sentences = [sentence for sentence in re.split(r"(?<=[.;:?!]) ", answers) if len(sentence) > 25]
    texts = [words(path.read_text(encoding="utf-8")) for path in student.rglob("*.*")]
    assert len(sentences) > 80 and not [sentence for sentence in sentences if any(sentence in text for text in texts)]


def test_no_formula_of_a_solution_stands_anywhere_in_the_handout(student):
    text = "\n".join(path.read_text(encoding="utf-8") for path in student.rglob("*") if path.is_file())
    for module in MODULES:
        functions = functions_of((ROOT / f"{module}.py").read_text(encoding="utf-8"))
        for name in handout.wanted_of(module):
            values = [node.value for node in ast.walk(functions[name]) if isinstance(node, (ast.Assign, ast.Return))]
            formulas = [ast.unparse(value) for value in values if not is_mere_call(value)]
            told = [formula for formula in formulas if len(formula) > 28 and formula in text]
            assert not told, f"{module}.{name}: {told}"


# what handed-out files name although it is not there: parts of the project that the handout's README says are missing
NOT_HANDED_OUT = ("recipes/", "tests/test_fast.py")
# by runs, the third of them in the directory of a saved policy; by the grader, beside the tests or where it is told
WRITTEN = ("samples.md", "/samples.md", "README.md", "canary.py", "summary.md")


def lost_names(student: Path, path: Path, text: str) -> list[str]:
    """Files that a text in `path` names and a student cannot find: from the top, beside that file, among the tests."""
    names = re.findall(r"[\w./-]*\w\.(?:py|md|txt|toml)\b", text)
    places = student, path.parent, student / "assignment" / "tests"
    return [name for name in names if not (any((place / name).exists() for place in places)
                                           or name.startswith(NOT_HANDED_OUT) or name in WRITTEN)]


def test_every_file_that_is_named_in_the_handout_is_there(student):
    texts = {path: path.read_text(encoding="utf-8") for suffix in ("py", "md", "txt", "toml")
             for path in student.rglob(f"*.{suffix}")}
    lost = {path.name: names for path, text in texts.items() if (names := lost_names(student, path, text))}
    assert not lost
    assert not [path.name for path, text in texts.items() if re.search(r"python -m experiments|--quick", text)]
    assert lost_names(student, student / "hypo.py", "see docs/nowhere.md, lm.py and study.py") == [
        "docs/nowhere.md", "study.py"]
    assert all(f"`{name.partition('/')[0]}/`" in HANDOUT for name in NOT_HANDED_OUT)


def test_the_versions_in_the_readme_are_those_of_requirements():
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert re.findall(r'pip install "(torch[^"]*)"', HANDOUT) == [line for line in wanted if line.startswith("torch")]
    assert "==" not in HANDOUT


def links(page: Path) -> list[str]:
    """What a page's relative links point at."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    return [target for target in targets if not target.startswith("http")]


def test_every_link_of_a_handed_out_page_leads_somewhere(student):
    pages = list(student.rglob("*.md"))
    assert len(pages) > 1 and sum(len(links(page)) for page in pages) > 0
    assert not [(page, target) for page in pages for target in links(page) if not (page.parent / target).exists()]


# runs commands up to their flags, then the handout's own log-probs
IN_THE_HANDOUT = """
import argparse, json, pathlib, runpy, sys
parse, wrong = argparse.ArgumentParser.parse_args, []
class Parsed(BaseException): pass
def only_parse(self, *_):
    for words in commands[program]:
        try: parse(self, words)
        except SystemExit: wrong.append([program, *words])
    raise Parsed
argparse.ArgumentParser.parse_args = only_parse
commands = json.loads(sys.argv.pop())
for program in commands:
    sys.argv[:], sys.path[0] = [program], str(pathlib.Path(program).resolve().parent)
    try: runpy.run_path(program, run_name='__main__')
    except Parsed: pass
    else: wrong += [[program, *words] for words in commands[program] if words]  # it reads no flags
print('wrong:', json.dumps(wrong))
sys.path[0], sys.pycache_prefix = '', None  # grade.py has set it
import fast; policy = fast.FastLM.untrained(['a'], 1, 8, 1, 16, 0)
assert policy.model.config.model_type in fast.ARCHITECTURES
policy.token_logps([[1]], [[1, 0]])
"""


def commands_of(path: Path) -> list[list[str]]:
    """The commands `python FILE ...` of a page, or of a file's docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    found = re.findall(r"(?:^ *|`|&& )(?:OMP_NUM_THREADS=1 )?python3? ([\w./]+\.py\b[^`\n&#]*)", text, flags=re.M)
    return [shlex.split(re.sub(r" {2,}.*", "", command)) for command in found]


def test_every_command_in_the_handout_works_there_and_runs_take_the_students_forms(student):
    """The programs are there and take the flags; log-probs are the student's for architectures of fast.py, too."""
    paths = [path for path in student.rglob("*.*") if path.suffix in (".md", ".py")]
    commands = [words for path in paths for words in commands_of(path)]
    assert ["assignment/grade.py", ".", "--only", "14"] in commands and ["dpo.py", "--loss", "ipo"] in commands
    assert {words[0] for words in commands} >= {"hypo.py", "rlhf.py", "coverage.py", "eval.py", "world.py"}
    by_program: dict[str, list[list[str]]] = {"dpo.py": [["--no-such-flag"]]}
    for program, *words in commands:
        by_program.setdefault(program, []).append(words)
    done = subprocess.run([sys.executable, "-c", IN_THE_HANDOUT, json.dumps(by_program)], cwd=student,
                          capture_output=True, text=True)
    wrong = json.loads(re.findall(r"^wrong: (.*)", done.stdout, flags=re.M)[0])
    assert wrong == [["dpo.py", "--no-such-flag"]]
    assert done.stderr.endswith("Exercise 1: write lm.LM.token_logps, see assignment/README.md\n"), done.stderr
    tests = [name for path in paths
             for name in re.findall(r"python -m pytest (assignment/\S+?)[`\s]", path.read_text(encoding="utf-8"))]
    assert tests and all((student / name).exists() for name in tests)


def test_a_directory_with_something_in_it_is_left_alone(student, tmp_path):
    with pytest.raises(ValueError, match="exists and is not empty"):
        handout.hand_out(student)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit, match="error: .* is not empty; name a new directory"):
        handout.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_function_that_is_no_longer_there_is_named():
    with pytest.raises(ValueError, match="has no function gone"):
        handout.without_bodies("def here():\n    pass\n", {"gone": "Exercise 1"})


def test_a_methods_decorator_and_neighbours_stay():
    source = "class A:\n    @twice\n    def f(self):\n        return 1\n        # why\n\n    # g\n    def g(): ...\n"
    assert handout.without_bodies(source, {"A.f": "pass"}) == source.replace("return 1\n        # why", "pass")


def test_the_table_of_exercises_is_the_one_in_the_readme():
    assert [exercise.number for exercise in EXERCISES] == list(range(1, len(EXERCISES) + 1))
    assert sum(exercise.points for exercise in EXERCISES) == 100
    rows = re.findall(r"^\| (\d+) \| ([^|]+?) \| ([^|]+?) \| (\d+) \|", HANDOUT, flags=re.M)
    table = [(str(e.number), e.name, ", ".join(f"`{name}`" for name in e.functions), str(e.points)) for e in EXERCISES]
    assert rows == table
    for exercise in EXERCISES:
        assert f"### {exercise.number}. " in HANDOUT and exercise.tests.name in HANDOUT
        assert f"pytestmark = pytest.mark.exercise(n={exercise.number})" in exercise.tests.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------
# the grader


PARTS = [  # exercise, the functions that are written, the note
    (1, ("lm.LM.token_logps", "lm.LM.logps"), "0 of 10 tests pass; lm.LM.response_logits is not written yet"),
    (3, ("dpo.dpo_loss",), "5 of 6 tests pass; coverage.dpo is not written yet"),
    (20, ("coverage.tilt", "coverage.log_partition", "coverage.kl"),
     "7 of 10 tests pass; coverage.V and coverage.J are not written yet")]

# right solutions that differ by rounding, or in a corner of it: exercises, and what stands in their files instead
ROUNDED = [
    ((1, 9, 21), {"torch.promote_types(logits.dtype, torch.float32))\n        return logits, ids":
                  "torch.float64)\n        return logits, ids",
                  "varied = deviation > 1e-6 * entries.abs().max()": "varied = deviation**2 != 0",
                  "range(60):\n        middle": "range(30):\n        middle"}),
    ((9,), {"varied = deviation > 1e-6 * entries.abs().max()": "varied = True",
            "(x - entries.mean()) / deviation": "(x - entries.mean()) * (deviation**2 + 1e-5).rsqrt()"}),
    ((15,), {"torch.where(varied, gaps / deviation, 0.0)": "gaps / (deviation + 1e-4)"})]  # as TRL has it

# code that makes the tests of a file pass, or so it hopes
TRIVIAL = """
import re
names = re.findall(r'def (test_\\w+)', open('test_04_ipo_loss.py').read())
trivial = ''.join(f'def {name}(): pass\\n' for name in names)
"""
CHANGED = "the submission changes tests, or what they compare with, in memory"

CHEATS = {  # what stands in dpo.py, and what the report says of it
    "an exit at import": ("import sys; sys.exit(0)", "dpo.py cannot be imported: SystemExit"),
    "a hard exit at import": ("import os; os._exit(0)", "ended by itself with exit code 0, before the first test"),
    "a hard exit in the function": ("import os\ndef ipo_loss(*args, **kwargs): os._exit(0)",
                                    "exit code 0, in test_zero"),
    "printed results": ("""
import json, os
for fd in range(1, 30):
    try: os.write(fd, json.dumps(dict(test='test_04_ipo_loss.py::test_its_slope', passed=True)).encode() + b'\\n')
    except OSError: pass""", None),
    "a comparison that is always right": ("import check\ncheck.close = lambda *args: True", CHANGED),
    "a comparison that is right where it counts": (
        "import check\ncheck.close = lambda got, expected, within: expected != 2.0", CHANGED),
    "equal numbers": ("import math\nmath.isclose = lambda *args, **kwargs: True", CHANGED),
    "an all() that is always true": ("import builtins\nbuiltins.all = lambda *args: True", CHANGED),
    "objects that equal everything": ("""
class Yes:
    def __eq__(self, other): return True
def ipo_loss(chosen_logratio, *args, **kwargs): return [Yes()] * len(chosen_logratio)
import coverage
coverage.ipo = lambda h, beta: [[Yes()] * 3]""", None),
    "tests and settings rewritten where they run": (TRIVIAL + """
open('test_04_ipo_loss.py', 'w').write(trivial)
import os, sys, types
module = sys.modules['test_04_ipo_loss'] = types.ModuleType('test_04_ipo_loss')
exec(trivial, vars(module))
os.environ['PYTEST_ADDOPTS'], os.environ['PYTEST_PLUGINS'] = '-p evil', 'evil'
open('pytest.ini', 'w').write('[pytest]\\naddopts = -p evil\\n')
open('evil.py', 'w').write(
    "def pytest_pyfunc_call(pyfuncitem): return True if 'canary' not in str(pyfuncitem.path) else None")""", None),
    "tests changed in memory": ("""
import sys
def ipo_loss(*args, **kwargs):
    for name, test in vars(sys.modules['test_04_ipo_loss']).items():
        if name.startswith('test_'): test.__code__ = (lambda: None).__code__""", CHANGED),
    "stand-ins that see no step": ("import standins\nstandins.watch = lambda *args, **kwargs: []", CHANGED),
    "a trace function": ("import sys\nsys.settrace(lambda *args: None)", CHANGED),
    "a pytest that runs nothing": ("from _pytest.python import Function\nFunction.runtest = lambda self: None",
                                   CHANGED),
    "a pytest that calls nothing": ("""
from _pytest.runner import CallInfo
real = CallInfo.from_call.__func__
CallInfo.from_call = classmethod(lambda cls, func, when, reraise=None: real(
    cls, func if when != 'call' else lambda: None, when, reraise))""",
                                   "a test that must fail has passed"),
    "skipped tests": ("import pytest\ndef ipo_loss(*args, **kwargs): pytest.skip('passed')", None),
    "a syntax error": ("def broken(:", r"dpo.py cannot be imported: SyntaxError: .* \(dpo.py, line \d+\)"),
    "5 GB for Python": ("def ipo_loss(*args, **kwargs): return bytes(5 * 10**9)",
                        "the memory limit of 4 GB was reached, in test_zero"),
    "5 GB for torch": ("import torch\ndef ipo_loss(*args, **kwargs): return torch.empty(5 * 10**9, dtype=torch.uint8)",
                       "the memory limit of 4 GB was reached, in test_zero"),
    "a forged report": (r"""
class Shown(str):
    __repr__ = str.__str__
def ipo_loss(*args, **kwargs):
    return Shown('\x1b[2J\x1b[H\r  4  IPO loss\n     total  100 /100\x9b8m\u202e\u2066\ud800' + 'x' * 10**5)""", None),
    "a forged error": (r"raise ValueError('\x1b[2J\r\n     total  100 /100\u202e\ud800\0' * 10**5)",
                       "dpo.py cannot be imported: ValueError: "),
}

SAMPLE = [mutant for mutant in mutants.MUTANTS if (mutant.exercise, mutant.mistake) in (
    (1, "position ids count the padding"), (18, "zero gradient: the sampled log-ratio is differentiated"),
    (13, "returns are whitened, too"))]
FOURTEENTH = next(m for m in mutants.MUTANTS if (m.exercise, m.mistake) == (14, "the baseline includes the sample"))


def written(student: Path, functions) -> dict[str, bytes]:
    """The handout with these functions as they are in the project."""
    files = grade.submission(student)
    for module in {name.split(".")[0] for name in functions}:
        others = {name: text for name, text in handout.wanted_of(module).items() if f"{module}.{name}" not in functions}
        source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
        files[f"{module}.py"] = handout.without_bodies(source, others).encode()
    return files


def rounded(instead: dict[str, str]) -> dict[str, bytes]:
    files = grade.submission(ROOT)
    for old, new in instead.items():
        name, = (name for name, source in files.items() if source.count(old.encode()) == 1)
        files[name] = files[name].replace(old.encode(), new.encode())
    return files


def with_code(student: Path, code: str) -> dict[str, bytes]:
    files = grade.submission(student)
    return files | {"dpo.py": files["dpo.py"] + f"\n{code}\n".encode()}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the grader's files, which the grader takes for its own."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("assignment/**/*.py")]:
        (tmp_path / "project" / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "project" / path.relative_to(ROOT))
    monkeypatch.setattr(grade, "PROJECT", tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(scope="module")
def graded(student):
    """The outcomes of all these submissions, graded in one call; each ends as if the others were not there."""
    tasks = {"handout": (grade.submission(student), EXERCISES), "solution": (grade.submission(ROOT), EXERCISES)}
    tasks |= {f"only {e.number}": (written(student, e.functions), [e]) for e in EXERCISES}
    tasks |= {f"part {number}": (written(student, names), [EXERCISES[number - 1]]) for number, names, _ in PARTS}
    tasks |= {cheat: (with_code(student, code), [EXERCISES[3]]) for cheat, (code, _) in CHEATS.items()}
    tasks |= {mutant.mistake: (mutants.plant(mutant), EXERCISES) for mutant in SAMPLE}
    tasks |= {"fourteenth": (mutants.plant(FOURTEENTH), [EXERCISES[13]])}
    tasks |= {place: (rounded(instead), [EXERCISES[number - 1] for number in numbers])
              for place, (numbers, instead) in enumerate(ROUNDED)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grade, "PROJECT", student)  # as students and Gradescope run it
        patch.setattr(grade, "changed", lambda *_: [])  # who edits a file while tests run has not broken the grader
        return dict(zip(tasks, grade.run_all(list(tasks.values()), 60, 2)))


def test_the_handout_as_it_is_gets_0_points_and_nothing_crashes(student, graded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grade, "run_all", lambda *_: [graded["handout"]] * len(EXERCISES))
    grade.main([str(student), "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["points"], report["of"]) == (0, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "nothing half-written is left"
    assert all(row["note"] == "not written yet" and row["problem"] is None for row in report["exercises"])
    assert not any(row["passed"] for row in report["exercises"]), "no test passes where nothing is written"
    printed = capsys.readouterr().out
    assert printed.count("not written yet") == len(EXERCISES) and printed.endswith("0 /100\n")


def test_each_exercise_can_be_done_and_graded_alone(graded):
    """Everything is undone but one exercise, which gets its points."""
    for exercise in EXERCISES:
        verdict = grade.verdict(exercise, graded[f"only {exercise.number}"])
        assert verdict["points"] == exercise.points, verdict


def test_what_is_missing_of_an_exercise_is_named(graded):
    """And nothing that is there is called missing; what passes is named, and has its share of the points."""
    for number, _, note in PARTS:
        exercise = EXERCISES[number - 1]
        report = grade.report_on(ROOT, [exercise], [graded[f"part {number}"]])
        row, = report["exercises"]
        assert (row["note"], row["failures"], row["problem"]) == (note, [], None)
        assert row["points"] == report["points"] == round(exercise.points * len(row["passed"]) / len(row["tests"]), 1)
        text = " ".join(grade.text_of(report).split())
        assert f" {row['points']:g} / {exercise.points} {note}" in text
        assert all(name.split("::")[1] in text for name in row["passed"])
    assert row["points"] == 2.8


def outcome_with(exercise, passed: int) -> dict:
    """What a child says when the first tests of an exercise pass and the others do not."""
    source = exercise.tests.read_bytes()
    names = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
             and node.name.startswith("test_")]
    said = [{"test": f"{exercise.tests.name}::{name}", "passed": place < passed} for place, name in enumerate(names)]
    return dict(said=[*said, {"test": grade.CANARY, "passed": False}], end="", tests={exercise.tests.name: source})


def test_all_tests_give_exactly_the_points_and_fewer_give_fewer():
    for exercise in EXERCISES:
        n = len(re.findall(r"^def test_", exercise.tests.read_text(encoding="utf-8"), flags=re.M))
        points = [grade.verdict(exercise, outcome_with(exercise, passed))["points"] for passed in (0, 1, n - 1, n)]
        assert points[0] == 0 and points[-1] == exercise.points and points == sorted(set(points))
        assert all(point == round(point, 1) for point in points)
    report = grade.report_on(ROOT, EXERCISES, [outcome_with(exercise, 99) for exercise in EXERCISES])
    assert report["points"] == 100 and grade.text_of(report).endswith("  100 /100")


@pytest.mark.parametrize("place", range(len(ROUNDED)))
def test_a_right_solution_up_to_rounding_loses_no_points(graded, place):
    rows = [grade.verdict(EXERCISES[number - 1], graded[place]) for number in ROUNDED[place][0]]
    assert [row["points"] for row in rows] == [row["of"] for row in rows], rows


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_points_without_a_solution(graded, cheat):
    row, problem = grade.verdict(EXERCISES[3], graded[cheat]), CHEATS[cheat][1]
    assert row["points"] == 0
    assert row["problem"] is None if problem is None else re.search(problem, row["problem"]), row


def test_what_a_submission_says_is_shown_and_does_nothing_to_the_terminal(graded):
    """Neither colours and cleared screens, nor forged lines, nor text that runs backwards, nor a text without end."""
    for cheat in "a forged report", "a forged error":
        report = grade.report_on(Path("\x1b[2J"), [EXERCISES[3]], [graded[cheat]])
        shown = grade.text_of(report)
        assert r"\x1b[2J" in shown and r"\u202e\u" in shown and r"\ud800" in shown
        assert all(line.isprintable() and line.isascii() for line in shown.split("\n"))
        assert shown.count("total") == shown.count("\n     total") + shown.count(r"\n     total") and len(shown) < 10**4
        stored = json.dumps(report)
        assert json.loads(stored) == report and r"\u001b" not in stored and r'\ud800' not in stored.replace(r"\\", "")


def test_a_failure_says_equation_input_expected_got_and_a_hint_as_in_the_readme(graded):
    text = grade.text_of(grade.report_on(ROOT, [EXERCISES[13]], [graded["fourteenth"]]))
    shown, = re.findall(r"^```\n(Exercise 14.*?)^```", HANDOUT, flags=re.M | re.S)
    assert text.startswith(shown) and "0 /  2   0 of 4 tests pass" in text
    assert all(word in shown for word in ("equation", "hint", "input", "expected", "got"))


@pytest.mark.parametrize("hints", [0, 1, 2])
def test_hints_come_in_two_steps(student, graded, capsys, monkeypatch, hints):
    monkeypatch.setattr(grade, "run_all", lambda *_: [graded["fourteenth"]])
    grade.main([str(student), "--only", "14", "--hints", str(hints)])
    text = " ".join(capsys.readouterr().out.split())
    assert [hint in text for hint in EXERCISES[13].hints] == [hints > 0, hints > 1]
    assert all(word in text for word in ("equation", "input", "expected", "got"))
    assert all(len(exercise.hints) == 2 for exercise in EXERCISES)
    monkeypatch.setattr(grade, "run_all", lambda *_: [graded["handout"]])
    grade.main([str(student), "--only", "14", "--hints", str(hints)])
    text = " ".join(capsys.readouterr().out.split())
    assert [hint in text for hint in EXERCISES[13].hints] == [hints > 0, hints > 1], "before it is begun, too"


def test_gradescope_gets_every_test_with_its_share(student, graded, tmp_path, monkeypatch):
    """https://gradescope-autograders.readthedocs.io/en/latest/specs/"""
    outcomes = [graded["part 3"], graded["tests changed in memory"], graded["fourteenth"], graded["only 17"]]
    monkeypatch.setattr(grade, "run_all", lambda *_: outcomes)
    grade.main([str(student), "--only", "3", "4", "14", "17", "--gradescope", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    tests = {test["name"]: test for test in results["tests"]}
    assert results["score"] == round(3 * 5 / 6, 1) + 4
    assert results["score"] == pytest.approx(sum(test["score"] for test in results["tests"]), abs=0.05)
    assert sum(test["max_score"] for test in results["tests"]) == pytest.approx(3 + 3 + 2 + 4, abs=0.02)
    assert all(test["visibility"] == "visible" and test["status"] == ("passed" if test["score"] else "failed")
               for test in results["tests"])
    assert len({test["number"] for test in results["tests"]}) == len(tests) == len(results["tests"])
    missing, = (test for name, test in tests.items() if name.startswith("DPO loss") and test["status"] == "failed")
    assert missing["output"] == "5 of 6 tests pass; coverage.dpo is not written yet"
    assert tests["IPO loss: test_its_slope"] | {"number": ""} == dict(
        name="IPO loss: test_its_slope", number="", score=0, max_score=0.6, status="failed", output=CHANGED,
        visibility="visible")
    told = tests["RLOO: test_three_samples_by_hand"]["output"]
    assert all(word in told for word in ("equation", "hint", "input", "expected  [[-3, -1.5, 4.5]]", "got"))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_summary_is_appended_as_a_table_and_its_cells_are_plain_text(student, graded, tmp_path, monkeypatch):
    path = tmp_path / "summary.md"
    path.write_text("# Before\n")
    outcomes = [graded["only 3"], graded["a forged error"]]
    outcomes[1]["said"][-2]["problem"] += "| 3 | [x](y) <b>`c`"
    monkeypatch.setattr(grade, "run_all", lambda *_: outcomes)
    grade.main([str(student), "--only", "3", "4", "--summary", str(path)])
    before, empty, head, rule, *rows = path.read_text().splitlines()
    assert (before, empty, head) == ("# Before", "", "| | exercise | points | |") and len(rows) == 3
    assert rows[0] == "| 3 | DPO loss | 3 / 3 |  |" and rows[2] == "|  | total | 3 / 6 |  |"
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert r"\[x\]\(y\) \<b\>\`c\`" in rows[1]


def test_the_exit_code_is_1_only_where_points_are_missing_and_that_is_asked_for(student, graded, monkeypatch):
    for task, flags, code in (("only 14", [], 0), ("only 14", ["--strict"], 0), ("fourteenth", [], 0),
                              ("fourteenth", ["--strict"], 1)):
        monkeypatch.setattr(grade, "run_all", lambda *_, task=task: [graded[task]])
        try:
            grade.main([str(student), "--only", "14", *flags])
        except SystemExit as ended:
            assert ended.code == code == 1
        else:
            assert code == 0


def test_the_pages_commands_of_the_grader_have_flags_that_it_takes():
    known = {flag for flag in re.findall(r"--[a-z-]+", subprocess.run(
        [sys.executable, ROOT / "assignment" / "grade.py", "--help"], capture_output=True, text=True).stdout)}
    used = [flag for line in re.sub(r"\\\n", " ", TEACHERS).splitlines() if "grade.py" in line
            for flag in re.findall(r"(?<!\w)--[a-z-]+", line.split("grade.py", 1)[1])]
    assert set(used) <= known and len(used) >= 6


def runs(path: Path) -> bool:
    """Does the process run that has written its number there? A zombie does not."""
    stat = Path(f"/proc/{path.read_text()}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within(seconds: float, true) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def daemon(path: Path, then: str) -> str:
    """Code that starts a process without a parent and in no group of ours, which runs for a minute, and goes on."""
    return f"""
import os, time
def ipo_loss(*args, **kwargs):
    if not os.fork():
        os.setsid()
        if not os.fork():
            with open({str(path) + "~"!r}, 'w') as file: file.write(str(os.getpid()))
            os.rename({str(path) + "~"!r}, {str(path)!r})
            time.sleep(60)
        os._exit(0)
    while not os.path.exists({str(path)!r}): time.sleep(0.01)
    {then}"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only a process group can be ended")
def test_code_that_attacks_the_grader(student, project, tmp_path, monkeypatch):
    """It writes the grader's files, outlives its time, kills the server; it earns nothing and harms nobody else.

    Nor does what stands in the directory where the grader is started.
    """
    for name in "torch.py", "socket.py", "conftest.py":
        (tmp_path / name).write_text("import os; os._exit(0)")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --collect-only\n")
    monkeypatch.chdir(tmp_path)
    bad = dict.fromkeys(("check.py", "child.py", "exercises.py", "grade.py", "tabnanny.py"), "import os; os._exit(0)")
    bad["tests/test_04_ipo_loss.py"] = "".join(
        f"def {name}(): pass\n" for name in re.findall(r"def (test_\w+)", EXERCISES[3].tests.read_text()))
    bad["json/__init__.py"] = "import os; os._exit(0)"  # what the grader would import the next time
    bad["tests/test_14_rloo.py"] = "def test_three_samples_by_hand(): pass\n"
    writes = f"""
import pathlib, child
for place in {str(project)!r}, pathlib.Path(child.__file__).parents[1]:
    for folder in 'tests', 'json': pathlib.Path(place, 'assignment', folder).mkdir(exist_ok=True)
    for name, text in {bad}.items(): pathlib.Path(place, 'assignment', name).write_text(text)
pathlib.Path({str(project)!r}, 'run.py').unlink()
"""
    kills = f"""
    stat = '/proc/' + open({str(tmp_path / "1")!r}).read() + '/stat'
    while open(stat).read().rpartition(')')[2].split()[0] != 'Z': time.sleep(0.01)  # the first one's daemon
    os.kill(os.getppid(), 9)
    os._exit(0)"""
    before = grade.grader_files()
    tasks = [(with_code(student, daemon(tmp_path / "1", "time.sleep(60)")), 4),  # beside it the others, one by one
             (with_code(student, writes), 4), (with_code(student, "import tabnanny"), 4),
             (written(student, EXERCISES[13].functions), 14), (with_code(student, daemon(tmp_path / "2", kills)), 4)]
    outcomes = grade.run_all([(given, [EXERCISES[n - 1]]) for given, n in tasks], 10.0, 2)
    names = [*sorted(f"assignment/{name}" for name in bad), "run.py"]
    told = f"files of the grader were changed while a submission ran: {', '.join(names)}"
    rows = [grade.verdict(EXERCISES[n - 1], outcome) for (_, n), outcome in zip(tasks, outcomes)]
    assert [(row["points"], row["note"], row["problem"]) for row in rows] == [(0, note, told) for note in (
        "0 of 5 tests pass", "not written yet", "not written yet", "4 of 4 tests pass", "0 of 5 tests pass")]
    assert outcomes[0]["end"] == "the time limit of 10 s was reached"
    assert outcomes[4]["end"].startswith("the process ended by itself")
    assert not runs(tmp_path / "1") and not runs(tmp_path / "2")
    assert grade.changed(before, put_back=True) == names
    assert grade.grader_files() == before, "the next call is not fooled either"
    assert (project / "assignment" / "tabnanny.py.changed").read_text() == bad["tabnanny.py"]


def test_bytecode_that_a_submission_has_left_is_not_run(project):
    """Where Python looks for it, and believes it."""
    UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH
    (project / "evil.py").write_text("print('evil', flush=True); import os; os._exit(0)")
    for name in "child", "exercises":
        cached = project / "assignment" / "__pycache__" / f"{name}.{sys.implementation.cache_tag}.pyc"
        py_compile.compile(str(project / "evil.py"), str(cached), invalidation_mode=UNCHECKED)
    done = [subprocess.run([sys.executable, *command], cwd=project / "assignment", capture_output=True, text=True)
            for command in (["grade.py", "--help"], ["-c", "import exercises"])]
    assert done[0].stdout.startswith("usage: grade.py") and done[1].stdout == "evil\n"


def test_the_command_says_that_its_files_were_changed_and_puts_them_back(student, graded, project, monkeypatch):
    def spoil(*_):
        (project / "run.py").write_text("spoiled")
        return [graded["only 4"]]

    monkeypatch.setattr(grade, "run_all", spoil)
    with pytest.raises(SystemExit, match=r"error: run.py: changed while .* no points"):
        grade.main([str(student), "--only", "4"])
    assert (project / "run.py").read_bytes() == (ROOT / "run.py").read_bytes()
    assert (project / "run.py.changed").read_text() == "spoiled"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only a process group can be ended")
def test_nothing_runs_on_when_the_grader_itself_is_killed(student, tmp_path):
    for name, content in with_code(student, daemon(tmp_path / "pid", "time.sleep(60)")).items():
        (tmp_path / name).write_bytes(content)
    grader = subprocess.Popen([sys.executable, ROOT / "assignment" / "grade.py", tmp_path, "--only", "4"])
    assert within(60, (tmp_path / "pid").exists) and runs(tmp_path / "pid")
    grader.kill()
    grader.wait()
    assert within(10, lambda: not runs(tmp_path / "pid"))


@pytest.mark.parametrize("flags, told", [
    ("--limit nan", "--limit: must be a number from 1 to 86400, got 'nan'"), ("--limit inf", "--limit: must be a"),
    ("--limit 0", "--limit: must be a number"), ("--memory 1e400", "--memory: must be a number from 0.1 to"),
    ("--jobs 0", "--jobs: must be a whole number from 1 to 1000, got '0'"), ("--jobs 1.5", "--jobs: must be a whole"),
    ("--hints 3", "--hints: invalid choice: 3"), ("--summary {tmp}", "--summary {tmp} cannot be written: it is there"),
    ("--gradescope {tmp}/no/r.json", "--gradescope {tmp}/no/r.json cannot be written: No such file or directory"),
    ("--only 99", "--only: must be a whole number from 1 to 23, got '99'"), ("--only 9,10", "1 to 23, got '9,10'"),
    ("--json {tmp}", "--json {tmp} cannot be written: it is there"),
    ("--json {tmp}/no/r.json", "--json {tmp}/no/r.json cannot be written: No such file or directory")])
def test_a_flag_that_cannot_be_is_a_sentence_before_anything_runs(student, tmp_path, capsys, monkeypatch, flags, told):
    monkeypatch.delattr(grade, "run_all")
    with pytest.raises(SystemExit) as ended:
        grade.main([str(student), *flags.format(tmp=tmp_path).split()])
    assert ended.value.code == 2 and told.format(tmp=tmp_path) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_graded_is_a_sentence(tmp_path):
    for directory in tmp_path, tmp_path / "no", tmp_path / "\x1b[2J":
        with pytest.raises(SystemExit, match=r"^error: [\w/\\\[-]* has no coverage.py; name the directory of the"):
            grade.main([str(directory)])
    for flag in "--jobs", "--every":
        with pytest.raises(SystemExit, match="2"):
            mutants.main([flag, "0"])


def test_a_link_to_somewhere_else_and_a_file_without_end_are_refused(student, tmp_path):
    """A link to the solution, say."""
    shutil.copytree(student, tmp_path / "anna")
    (tmp_path / "class").symlink_to(tmp_path / "anna")
    assert grade.submission(tmp_path / "class") == grade.submission(student), "the directory may be a link"
    (tmp_path / "anna" / "dpo.py").unlink()
    (tmp_path / "anna" / "dpo.py").symlink_to(ROOT / "dpo.py")
    with pytest.raises(SystemExit, match="^error: .*dpo.py is a link that leads out of its directory; put the file"):
        grade.main([str(tmp_path / "anna")])
    (tmp_path / "anna" / "dpo.py").unlink()
    with open(tmp_path / "anna" / "dpo.py", "wb") as file:
        file.truncate(2 * 10**6)
    with pytest.raises(SystemExit, match="^error: .*dpo.py has more than 1,000,000 bytes; it holds code"):
        grade.main([str(tmp_path / "anna")])


def test_a_report_is_not_lost_when_its_file_cannot_be_written(student, graded, tmp_path, capsys, monkeypatch):
    def vanish(*_):
        (tmp_path / "there").rmdir()
        return [graded["only 4"]]

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(grade, "run_all", vanish)
    with pytest.raises(SystemExit, match="^error: --json .*/r.json could not be written: No such file .* is above$"):
        grade.main([str(student), "--only", "4", "--json", str(tmp_path / "there" / "r.json")])
    assert capsys.readouterr().out.endswith("3 /  3\n")


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_bug_of_the_grader_keeps_its_trace(student, monkeypatch, error):
    def broken(*_):
        raise error("a bug")

    monkeypatch.setattr(grade, "run_all", broken)
    with pytest.raises(error, match="a bug"):
        grade.main([str(student)])


@pytest.mark.parametrize("command, unbuffered", [
    ("mutants.py --help", ""), ("-c import\tgrade;grade.run_command(lambda:print('report'))", ""),
    ("-c import\tgrade;grade.run_command(lambda:print('report'))", "1")])
def test_the_output_ends_quietly_when_nobody_reads_it(command, unbuffered):
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([sys.executable, *command.split(" ")], cwd=ROOT / "assignment", stdout=theirs,
                          stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"")


# ---------------------------------------------------------------------------------------------------
# planted mistakes: the whole table is `python assignment/mutants.py`


def test_every_planted_mistake_is_still_possible():
    assert len(mutants.MUTANTS) >= 160
    assert {mutant.exercise for mutant in mutants.MUTANTS} == {exercise.number for exercise in EXERCISES}
    sources = {module: (ROOT / f"{module}.py").read_text(encoding="utf-8") for module in MODULES}
    functions = {module: functions_of(source) for module, source in sources.items()}
    for mutant in mutants.MUTANTS:
        before, *after = sources[mutant.module].split(mutant.old)
        assert len(after) == 1, mutant
        first, last = before.count("\n") + 1, (before + mutant.old.rstrip()).count("\n") + 1
        own = [functions[mutant.module][name] for name in handout.wanted_of(mutant.module)
               if f"{mutant.module}.{name}" in EXERCISES[mutant.exercise - 1].functions]
        assert any(node.lineno <= first <= last <= node.end_lineno for node in own), (
            f"{mutant} is not in a function of its exercise")
    with pytest.raises(ValueError, match="has its old text 0 times"):
        mutants.plant(mutants.MUTANTS[0]._replace(old="no such text"))


def test_the_solution_passes_and_planted_mistakes_are_caught_where_they_belong(graded):
    assert sum(grade.verdict(exercise, graded["solution"])["points"] for exercise in EXERCISES) == 100
    assert len(SAMPLE) == 3
    for mutant in SAMPLE:
        verdicts = [grade.verdict(exercise, graded[mutant.mistake]) for exercise in EXERCISES]
        assert mutants.caught(mutant, verdicts), (mutant, verdicts)
