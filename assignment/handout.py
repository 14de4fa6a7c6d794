"""Makes a student's copy of the project: the bodies of the exercises' functions are gone, nothing else changes.

    python assignment/handout.py DIR

The copy is made from the sources as they are, so it cannot fall behind them: the syntax tree says which lines
are a function's body, and only those lines are replaced. What gives answers away stays out: the project's
own tests (they state the formulas again), README.md and results/ (they answer the written questions), the
teacher's notes, the planted mistakes, and the half of fast.py that computes what students write in lm.py. The
exercises' own tests hold numbers and stubs, no solutions.
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path

from exercises import EXERCISES, HERE, PROJECT, Exercise

COPIED = ["LICENSE", "pyproject.toml", "requirements.txt", "assignment/README.md", "assignment/exercises.py",
          "assignment/check.py", "assignment/grade.py", "assignment/child.py"]  # and all *.py, and the exercises' tests


# fast.py knows no model there, so that all of them take lm.py's plain forms
KEPT_BACK = {"fast": {"knows": "return False", "TokenLogps": "pass", **dict.fromkeys(
    ["pack", "hidden_states", "token_logps", "scores"], 'raise NotImplementedError("kept back")')}}


def without_bodies(source: str, wanted: dict[str, str]) -> str:
    """The source with the body of each wanted function or class replaced by one statement.

    Signature and docstring stay; comments that stand in the body go with it. wanted: name -> statement.
    """
    lines = source.splitlines(keepends=True)
    found = {node.name: node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(f"the source has no function {', '.join(missing)}; exercises.py or KEPT_BACK is out of date")
    for name in sorted(wanted, key=lambda name: -found[name].lineno):  # from the end, so that line numbers hold
        node, end = found[name], found[name].end_lineno
        first = node.body[0]
        begin = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
        while end < len(lines) and lines[end].startswith(" ") and lines[end].lstrip().startswith("#"):
            end += 1
        lines[begin:end] = [f"    {wanted[name]}\n"]
    return "".join(lines)


def undone(exercise: Exercise) -> str:
    """The body of a function that is not written yet."""
    return f'raise NotImplementedError("Exercise {exercise.number}: {exercise.name}, see assignment/README.md")'


def wanted_of(module: str) -> dict[str, str]:
    """The functions that a student writes in module.py, and what is kept back -> what their bodies are instead."""
    return KEPT_BACK.get(module, {}) | {name.split(".")[1]: undone(exercise) for exercise in EXERCISES
                                        for name in exercise.functions if name.split(".")[0] == module}


def hand_out(directory: Path) -> None:
    """Write the student's copy; ValueError if the directory holds anything already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; name a new directory")
    (directory / "assignment" / "tests").mkdir(parents=True)
    for path in sorted(PROJECT.glob("*.py")):
        source = path.read_bytes().decode()  # bytes: line ends stay as they are
        (directory / path.name).write_bytes(without_bodies(source, wanted_of(path.stem)).encode())
    for name in COPIED:
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
