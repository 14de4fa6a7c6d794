"""What the README says of commands, flags, files and lengths is true; and the house keeps its arrows."""

import ast
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest

import bench
import coverage
import data
import dpo
import eval  # noqa: A004  only to reach its main; elsewhere always `from eval import ...`
import hypo
import rlhf
import study

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(?:sh|bash)\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = [command.split(" #")[0].strip() for fence in FENCES for command in fence.splitlines()]
PROGRAMS = {"hypo.py": hypo.main, "dpo.py": dpo.main, "rlhf.py": rlhf.main, "eval.py": eval.main, "data.py": data.main,
            "coverage.py": coverage.main, "study.py": study.main}

# DESIGN: an arrow means "imports"; none runs back, and coverage is a leaf
ARROWS = {
    "study": {"experiments", "report", "eval", "data", "run"}, "report": {"eval", "data"},
    "experiments": {"hypo", "rlhf", "dpo", "eval", "judges", "data", "lm", "run"},
    "hypo": {"dpo", "task", "eval", "lm", "run"}, "rlhf": {"task", "eval", "judges", "data", "lm", "run"},
    "dpo": {"task", "eval", "data", "lm", "run"}, "eval": {"task", "judges", "data", "lm", "run"},
    "task": {"judges", "data", "lm", "run"},
    "judges": {"data", "lm"}, "data": set(), "lm": {"fast"}, "fast": set(), "run": set(), "coverage": set(),
}


def flags_of(program: str, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        PROGRAMS[program](["--help"])
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


@pytest.mark.parametrize("program", PROGRAMS)
def test_flags_in_the_readme_exist(program, capsys, monkeypatch):
    known = flags_of(program, capsys)
    used = {word.split("=")[0] for command in COMMANDS if program in command
            for word in shlex.split(command[command.index(program):].replace("&&", " ").split("|")[0])
            if word.startswith("--")}
    assert used <= known, f"{program} has no {used - known}"


def test_every_command_names_a_program_that_is_there():
    named = {word for command in COMMANDS for word in command.split() if word.endswith(".py")}
    assert {"hypo.py", "dpo.py", "eval.py"} <= named
    assert all((ROOT / name).exists() for name in named)


def test_files_and_pictures_that_the_readme_links_exist():
    for target in re.findall(r"\]\(([^)#]+?)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_table_of_files_has_the_true_line_counts():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, flags=re.M)
    assert {name for name, _ in rows} == {path.name for path in ROOT.glob("*.py")} - {"conftest.py"}
    for name, lines in rows:
        assert int(lines) == len((ROOT / name).read_text().splitlines()), name


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_imports_follow_the_arrows_of_the_house(path):
    if path.name == "conftest.py":
        return
    tree = ast.parse(path.read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert names & set(ARROWS) <= ARROWS[path.stem]
    assert "eval" not in {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}, \
        "`import eval` would hide the builtin: write `from eval import ...`"


def test_the_table_of_speed_is_the_one_that_was_measured():
    assert bench.table(json.loads(bench.RESULTS.read_text(encoding="utf-8"))) in README


def test_the_worked_example_is_the_same_in_the_readme_and_in_the_code():
    assert textwrap.dedent(coverage.worked_example()) in README


def test_coverage_is_ours_and_not_the_tool_of_that_name():
    assert Path(coverage.__file__) == ROOT / "coverage.py", "start the tests as `pytest` or `python -m pytest`"
    assert not hasattr(coverage, "__path__")
