"""Makes a student's copy of the project: the bodies of the exercises' functions are gone, nothing else changes.

    python assignment/handout.py DIR

The copy is made from the sources as they are, so it cannot fall behind them: the syntax tree says which lines
are a function's body, and only those lines are replaced. What gives answers away stays out: KEPT_OUT, and the
part of fast.py that computes what students write in lm.py. The exercises' own tests hold numbers and stubs, no
solutions.
"""

import argparse
import ast
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

from exercises import EXERCISES, HERE, PROJECT, Exercise

# besides all *.py and the exercises' tests; of experiments/ what coverage.py's own command needs, and no study
COPIED = ["LICENSE", "pyproject.toml", "requirements.txt", "docs/glossary.md", "experiments/__init__.py",
          "experiments/coverage_pictures.py", "experiments/coverage_of_run.py", "assignment/README.md",
          "assignment/notes.md", "assignment/exercises.py", "assignment/check.py", "assignment/standins.py",
          "assignment/grade.py", "assignment/child.py"]

# what must never be among them, whatever is added above: pattern -> what it gives away
KEPT_OUT = {
    "assignment/teachers.md": "the written answers", "assignment/mutants.py": "lines of the solution",
    "assignment/handout.py": "what is kept back", "README.md": "figures that answer written questions",
    "CONTRIBUTING.md": "the tests of the solution", "tests/*": "the formulas", "docs/theory.md": "the derivations",
    "docs/details.md": "figures and derivations", "docs/slides.md": "the lines of the solution",
    "results/*": "figures that answer written questions", "experiments/__main__.py": "the studies",
    "experiments/stud*": "the studies", "recipes/*": "figures of runs", "runs/*": "figures of runs",
    "*.json*": "figures of runs", "*.png": "figures of runs", "*.ipynb": "code that may hold a solution"}

# fast.py knows no model there, so that every run takes the student's forms
HIDDEN = 'raise NotImplementedError("kept back")'
KEPT_BACK = {"fast": {"knows": "return False", "pack": HIDDEN, "FastLM.write": HIDDEN, "FastLM.replay": HIDDEN,
                      "FastLM.token_logps": "return super().token_logps(prompts, responses)",
                      "FastLM.sample_batch": "return super().sample_batch(prompts, uniform, temperature, draw)"}}


def functions_of(source: str) -> dict[str, ast.FunctionDef]:
    """The functions of a file, and the methods of its classes as "LM.logps"."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}": inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def without_bodies(source: str, wanted: dict[str, str]) -> str:
    """The source with the body of each wanted function replaced by one statement.

    Decorators, signature and docstring stay; comments that stand in the body go with it. wanted: name -> statement.
    """
    lines = source.splitlines(keepends=True)
    found = functions_of(source)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(f"the source has no function {', '.join(missing)}; exercises.py or KEPT_BACK is out of date")
    for name in sorted(wanted, key=lambda name: -found[name].lineno):  # from the end, so that line numbers hold
        node, end = found[name], found[name].end_lineno
        first = node.body[0]
        begin, indent = first.end_lineno if ast.get_docstring(node) else first.lineno - 1, " " * first.col_offset
        while end < len(lines) and lines[end].startswith(indent + "#"):
            end += 1
        lines[begin:end] = [f"{indent}{wanted[name]}\n"]
    return "".join(lines)


def undone(exercise: Exercise, name: str) -> str:
    """The body of a function that is not written yet. The grader reads the name."""
    return f'raise NotImplementedError("Exercise {exercise.number}: write {name}, see assignment/README.md")'


def wanted_of(module: str) -> dict[str, str]:
    """The functions that a student writes in module.py, and what is kept back -> what their bodies are instead."""
    return KEPT_BACK.get(module, {}) | {
        name.removeprefix(f"{module}."): undone(exercise, name) for exercise in EXERCISES
        for name in exercise.functions if name.startswith(f"{module}.")}


def hand_out(directory: Path) -> None:
    """Write the student's copy; ValueError if the directory holds anything already, or would hold an answer."""
    kept = [name for name in COPIED if any(fnmatch(name, pattern) for pattern in KEPT_OUT)]
    if kept:
        raise ValueError(f"COPIED has {', '.join(kept)}, which KEPT_OUT keeps out of every handout")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; name a new directory")
    (directory / "assignment" / "tests").mkdir(parents=True)
    for path in sorted(PROJECT.glob("*.py")):
        source = path.read_bytes().decode()  # bytes: line ends stay as they are
        (directory / path.name).write_bytes(without_bodies(source, wanted_of(path.stem)).encode())
    for name in COPIED:
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(PROJECT / name, directory / name)
    for path in sorted((HERE / "tests").glob("*.py")):
        shutil.copyfile(path, directory / "assignment" / "tests" / path.name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path, help="where the copy goes; must be new or empty")
    args = parser.parse_args(argv)
    try:
        hand_out(args.directory)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    functions = sum(len(exercise.functions) for exercise in EXERCISES)
    print(f"{args.directory}: {len(EXERCISES)} exercises, {functions} functions to write; begin with "
          f"{args.directory}/assignment/README.md")


if __name__ == "__main__":
    main()
