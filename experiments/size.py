"""How much stands between a reader and an algorithm: the house of this project, measured.

    python -m experiments.size             # this checkout
    python -m experiments.size DIR         # another one, such as an earlier commit

Modules and their lines, floors of the import graph, the functions that `python hypo.py` calls before its first
update, comments for a line of code, long functions and long lines, README.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Runs hypo.py of the checkout in argv[1] up to the first step of its optimizer, and prints the functions of the
# top-level files that were called till then, in the order of their first call. Lambdas and comprehensions do not count.
TRACER = """
import contextlib, io, json, os, sys
root, out = sys.argv[1:]
sys.path.insert(0, root)
import torch
calls = {}

class FirstUpdate(BaseException):
    pass

def profile(frame, event, arg):
    code = frame.f_code
    if event == "call" and os.path.dirname(code.co_filename) == root and "<" not in code.co_name:
        calls[os.path.basename(code.co_filename), code.co_firstlineno] = code.co_name

def step(*args, **kwargs):
    sys.setprofile(None)
    raise FirstUpdate

torch.optim.AdamW.step = step
import hypo
sys.setprofile(profile)
with contextlib.suppress(FirstUpdate), contextlib.redirect_stdout(io.StringIO()):
    hypo.main(["--steps", "1", "--eval-samples", "16", "--out", out])
print(json.dumps([file for file, _ in calls]))
"""


def files_before_first_update(root: Path) -> list[str]:
    """For each function called before the first update of `python hypo.py`, its file. The built-in model is cached."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", TRACER, str(root), str(Path(folder) / "run")]
        subprocess.run([sys.executable, str(root / "hypo.py"), "--steps", "1", "--eval-samples", "16", "--out",
                        str(Path(folder) / "first")], check=True, capture_output=True, cwd=folder)  # makes the model
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout)


def imports_of(tree: ast.Module, modules) -> set[str]:
    """The project's own modules that a file imports at its top level."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & set(modules)


def floors_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """1 for a module that imports none of ours, else one more than the highest that it imports."""
    floors: dict[str, int] = {}
    while len(floors) < len(graph):
        ready = {name for name, needs in graph.items() if name not in floors and needs <= floors.keys()}
        floors |= {name: 1 + max((floors[need] for need in graph[name]), default=0) for name in ready}
    return floors


def code_and_comments(text: str, tree: ast.Module) -> tuple[list[str], int]:
    """(lines of code, number of comments): neither counts docstrings; a comment is a line or the end of one."""
    in_docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            in_docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = [line for n, line in enumerate(text.splitlines(), 1) if n not in in_docstrings and line.strip()]
    comments = sum(line.lstrip().startswith("#") or "  # " in line for line in lines)
    return [line for line in lines if not line.lstrip().startswith("#")], comments


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).parent.parent,
                        help="a checkout (default: this one)")
    root = parser.parse_args(argv).directory.resolve()
    missing = [name for name in ("hypo.py", "README.md") if not os.path.isfile(root / name)]
    if missing:
        parser.error(f"{root} is no checkout of this project: it has no {' and no '.join(missing)}")
    paths = {path.stem: path for path in sorted(root.glob("*.py")) if path.stem != "conftest"}
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    floors = floors_of({name: imports_of(tree, paths) for name, tree in trees.items()})
    longest, wide, code_lines = 0, 0, 0
    for name, text in texts.items():
        code, comments = code_and_comments(text, trees[name])
        code_lines, wide = code_lines + len(code), wide + sum(len(line) > 100 for line in code)
        functions = [node for node in ast.walk(trees[name]) if isinstance(node, ast.FunctionDef)]
        longest = max(longest, *((node.end_lineno or 0) - node.lineno + 1 for node in functions))
        print(f"{name + '.py':14}{text.count(chr(10)):5} lines, floor {floors[name]}, "
              f"{comments / len(code):.0%} comments")
    readme = (root / "README.md").read_text(encoding="utf-8")
    files = files_before_first_update(root)
    changes = sum(a != b for a, b in zip(files, files[1:]))
    print(f"\n{len(texts)} modules, {sum(text.count(chr(10)) for text in texts.values())} lines, "
          f"{max(floors.values())} floors\nbefore the first update of hypo.py: {len(files)} "
          f"functions, {len(set(files))} files, {changes} changes of file\nlongest function {longest} "
          f"lines; {wide / code_lines:.1%} of code lines over 100 columns\n"
          f"README {readme.count(chr(10))} lines, {len(readme.encode()) / 1000:.1f} KB")


if __name__ == "__main__":
    main()
