"""The teaching assignment: the handout is the project without answers, and the grader is neither blind nor fooled."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grade
import handout
import mutants
import pytest
from exercises import EXERCISES
from handout import functions_of

ROOT = Path(__file__).parent.parent
MODULES = sorted({module for exercise in EXERCISES for module in exercise.modules})
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
    told = [name for name in files if re.search("result|runs|cache|mutant|teacher|handout|^tests/|^README", name)]
    assert not told, told


def test_no_formula_of_a_solution_stands_anywhere_in_the_handout(student):
    """But for exercise 10, whose first half is dpo.train's on purpose, and for the cast that lm.draw shows."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in student.rglob("*") if path.is_file())
    for module in MODULES:
        functions = functions_of((ROOT / f"{module}.py").read_text(encoding="utf-8"))
        for name in handout.wanted_of(module):
            values = [node.value for node in ast.walk(functions[name]) if isinstance(node, (ast.Assign, ast.Return))]
            formulas = [ast.unparse(value) for value in values if name != "train" and not (
                isinstance(value, ast.Call) and isinstance(value.func, ast.Name))]  # a mere call is no formula
            told = [formula for formula in formulas if len(formula) > 28 and formula in text
                    and "promote_types" not in formula]
            assert not told, f"{module}.{name}: {told}"


# what handed-out files name although it is not there: parts of the project that the handout's README says are missing
NOT_HANDED_OUT = ("recipes/", "tests/test_fast.py")
WRITTEN_BY_RUNS = ("samples.md", "/samples.md", "README.md")  # the last one in the directory of a saved policy


def lost_names(student: Path, path: Path, text: str) -> list[str]:
    """Files that a text in `path` names and a student cannot find: from the top, beside that file, among the tests."""
    names = re.findall(r"[\w./-]*\w\.(?:py|md|txt|toml)\b", text)
    places = student, path.parent, student / "assignment" / "tests"
    return [name for name in names if not (any((place / name).exists() for place in places)
                                           or name.startswith(NOT_HANDED_OUT) or name in WRITTEN_BY_RUNS)]


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


def test_a_run_in_the_handout_takes_the_students_forms(student):
    """Also for the architectures that fast.py knows."""
    code = ("import fast; policy = fast.FastLM.untrained(['a'], 1, 8, 1, 16, 0)\n"
            "assert policy.model.config.model_type in fast.ARCHITECTURES\n"
            "policy.token_logps([[1]], [[1, 0]])")
    done = subprocess.run([sys.executable, "-c", code], cwd=student, capture_output=True, text=True)
    assert done.stderr.endswith("Exercise 1: write lm.LM.token_logps, see assignment/README.md\n"), done.stderr


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


def test_the_handout_as_it_is_gets_0_points_and_nothing_crashes(student, tmp_path, capsys):
    grade.main([str(student), "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["points"], report["of"]) == (0, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "nothing half-written is left"
    assert all(row["note"] == "not written yet" and row["problem"] is None for row in report["exercises"])
    printed = capsys.readouterr().out
    assert printed.count("not written yet") == len(EXERCISES) and printed.endswith("0 /100\n")


def test_each_exercise_can_be_done_and_graded_alone(student, tmp_path):
    """Everything is undone but one exercise, which gets its points."""
    tasks = []
    for exercise in EXERCISES:
        sandbox = grade.make_sandbox(student, tmp_path / str(exercise.number))
        for module in exercise.modules:
            source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
            others = {name: text for name, text in handout.wanted_of(module).items()
                      if f"{module}.{name}" not in exercise.functions}
            (sandbox / f"{module}.py").write_text(handout.without_bodies(source, others), encoding="utf-8")
        tasks.append((sandbox, [exercise]))
    for exercise, outcome in zip(EXERCISES, grade.run_all(tasks, 60, 2)):
        verdict = grade.verdict(exercise, outcome)
        assert verdict["points"] == exercise.points, verdict


def test_what_is_missing_of_an_exercise_is_named(student, tmp_path):
    """And nothing that is there is called missing."""
    cases = [  # exercise, the functions that are written, the note
        (1, {"lm.LM.token_logps", "lm.LM.logps"}, "0 of 10 tests pass; lm.LM.response_logits is not written"),
        (2, {"dpo.dpo_loss"}, "5 of 6 tests pass; coverage.dpo is not written"),
        (11, {"coverage.tilt", "coverage.log_partition", "coverage.kl"},
         "7 of 10 tests pass; coverage.V and coverage.J are not written"),
        (14, set(), "not written yet")]
    tasks = []
    for number, written, _ in cases:
        sandbox = grade.make_sandbox(student, tmp_path / str(number))
        for module in EXERCISES[number - 1].modules:
            source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
            missing = {name: text for name, text in handout.wanted_of(module).items()
                       if f"{module}.{name}" not in written}
            (sandbox / f"{module}.py").write_text(handout.without_bodies(source, missing), encoding="utf-8")
        tasks.append((sandbox, [EXERCISES[number - 1]]))
    for (number, _, note), outcome in zip(cases, grade.run_all(tasks, 60, 2)):
        row = grade.verdict(EXERCISES[number - 1], outcome)
        assert (row["note"], row["points"], row["failures"], row["problem"]) == (note, 0, [], None)


CHEATS = {  # what stands in dpo.py, and what the report says of it
    "nothing": ("", None),
    "edited tests, conftest and settings": ("", None),
    "an exit at import": ("import sys; sys.exit(0)", "dpo.py cannot be imported: SystemExit"),
    "a hard exit at import": ("import os; os._exit(0)", "ended by itself with exit code 0, before the first test"),
    "a hard exit in the function": ("import os\ndef ipo_loss(*args, **kwargs): os._exit(0)",
                                    "exit code 0, in test_zero"),
    "printed results": ("""
import json, os
for fd in range(1, 30):
    try: os.write(fd, json.dumps(dict(test='test_03_ipo_loss.py::test_its_slope', passed=True)).encode() + b'\\n')
    except OSError: pass""", None),
    "a comparison that is always right": ("import check\ncheck.close = lambda *args: True", "a test that must fail"),
    "a pytest that runs nothing": ("from _pytest.python import Function\nFunction.runtest = lambda self: None",
                                   "a test that must fail has passed"),
    "skipped tests": ("import pytest\ndef ipo_loss(*args, **kwargs): pytest.skip('passed')", None),
    "an infinite loop": ("def ipo_loss(*args, **kwargs):\n    while True: pass",
                         "the time limit of 3 s was reached"),
    "a syntax error": ("def broken(:", r"dpo.py cannot be imported: SyntaxError: .* \(dpo.py, line \d+\)"),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_points_without_a_solution(student, tmp_path, cheat):
    code, problem = CHEATS[cheat]
    copy = shutil.copytree(student, tmp_path / "copy")
    with open(copy / "dpo.py", "a", encoding="utf-8") as file:
        file.write("\n" + code + "\n")
    if cheat.startswith("edited"):
        (copy / "assignment" / "tests" / "test_03_ipo_loss.py").write_text("def test_fine(): pass\n")
        (copy / "conftest.py").write_text("def pytest_collection_modifyitems(items): items.clear()\n")
        (copy / "pytest.ini").write_text("[pytest]\naddopts = --collect-only\n")
    report = grade.grade(copy, [EXERCISES[2]], limit=3.0 if "loop" in cheat else 60.0)
    row, = report["exercises"]
    assert report["points"] == 0
    assert row["problem"] is None if problem is None else re.search(problem, row["problem"]), row
    if cheat == "an infinite loop":
        assert "0 of 5 tests pass" in grade.text_of(report)


def test_a_failure_says_equation_input_expected_got_and_a_hint_as_in_the_readme(tmp_path):
    mutant = next(m for m in mutants.MUTANTS if (m.exercise, m.mistake) == (7, "the baseline includes the sample"))
    text = grade.text_of(grade.grade(mutants.plant(mutant, tmp_path / "project"), [EXERCISES[6]]))
    shown, = re.findall(r"^```\n(Exercise 7.*?)^```", HANDOUT, flags=re.M | re.S)
    assert text.startswith(shown) and "0 /  5   0 of 4 tests pass" in text
    assert all(word in shown for word in ("equation", "hint", "input", "expected", "got"))


def test_what_cannot_be_graded_is_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: .* has no coverage.py; name the directory of the assignment"):
        grade.main([str(tmp_path)])
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path), "--only", "99"])
    assert "the exercises are 1 to 14" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# planted mistakes: the whole table is `python assignment/mutants.py`


def test_every_planted_mistake_is_still_possible(tmp_path):
    assert len(mutants.MUTANTS) >= 125
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
        mutants.plant(mutants.MUTANTS[0]._replace(old="no such text"), tmp_path / "project")


def test_the_solution_passes_and_planted_mistakes_are_caught_where_they_belong():
    nothing = mutants.Mutant(1, "lm", "def logps(", "none", "def logps(")
    sample = [mutant for mutant in mutants.MUTANTS if mutant.mistake in (
        "position ids count the padding", "zero gradient: the sampled log-ratio is differentiated",
        "a local score: each token weighed by its own log-ratio", "clipped after the step",
        "the radius is not divided by rho(x)")]
    assert len(sample) == 5
    solution, *others = mutants.run_mutants([nothing, *sample], jobs=2)
    assert sum(row["points"] for row in solution) == 100
    for mutant, verdicts in zip(sample, others):
        assert mutants.caught(mutant, verdicts), (mutant, verdicts)
