"""What pages, docstrings and --help point at is there; and the house keeps its arrows.

    python tests/test_docs.py --fix     # writes the line numbers in docs/slides.md and the code in README.md again
"""

import ast
import contextlib
import functools
import importlib
import io
import json
import re
import runpy
import shlex
import sys
import textwrap
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for folder in (".", "docs", "recipes", "assignment", "results")
               for path in (ROOT / folder).glob("*.md"))
TOP = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "conftest")
SOURCES = [f"{name}.py" for name in TOP] + sorted(
    str(path.relative_to(ROOT)) for folder in ("experiments", "recipes", "assignment")
    for path in (ROOT / folder).glob("*.py"))

# what a run writes or a user brings, so it need not be here
OUTPUTS = {
    "metrics.jsonl", "inputs.json", "summary.json", "curve.png", "samples.md", "responses.jsonl", "checkpoint.pt",
    "goodhart.png",
    "task.json", "sft.jsonl", "prompts.jsonl", "held_out_prompts.jsonl", "pairs.jsonl", "held_out_pairs.jsonl",
    "judge.json", "job.json", "log.txt", "stream.jsonl", "config.json", "tokenizer_config.json", "tokenizer.json",
    "model.safetensors", "report.json", "results.json", "summary.md", "anna.json", "NAME.json",
    "vaderSentiment-3.3.2.tar.gz", "module.py"}
OUTPUT_FOLDERS = {"runs", "policy", "again", ".cache", "DIR", "DATA", "class"}


def read(name: str, root: Path = ROOT) -> str:
    return (root / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------
# finding: each function gives what is wrong with a text, one sentence each

def shell_lines(text: str) -> list[str]:
    """The command lines of a page or a docstring: in sh blocks, indented by four, or in backticks."""
    text = text.replace("\\\n", " ")
    fenced = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"^ {4,}((?:python3?|pip) .*)", prose, re.M)
    return fenced + indented + re.findall(r"`(python3? [^`]+)`", prose)


def simple_commands(lines: list[str]) -> list[list[str]]:
    """The words of each command, with shell variables put in, and without comments and loops."""
    commands: list[list[str]] = []
    variables: dict[str, str] = {}
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()")
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if not re.fullmatch(r"[;&|()]+", token):
                words += variables[token].split() if token in variables else [token]
                continue
            words = words[1:] if words[:1] == ["do"] else words
            while words and re.match(r"[A-Z_]+=", words[0]):
                name, _, value = words.pop(0).partition("=")
                variables[f"${name}"] = value
            if words and words[0] not in ("for", "done"):
                commands.append(words)
            words = []
    return commands


def file_of(program: str) -> str:
    """The file of a program, which is a path or "-m NAME"."""
    if not program.startswith("-m "):
        return program
    path = program[3:].replace(".", "/")
    return f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"


@functools.cache
def help_of(program: str) -> str:
    """What `python PROGRAM --help` prints; "" of one that reads no flags."""
    printed, argv, main = io.StringIO(), sys.argv, program.removeprefix("-m ")
    if not re.search(r"parse_args|run\.parse", read(file_of(program))):
        return ""
    sys.argv = [main, "--help"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            if program.startswith("-m "):
                runpy.run_module(main, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / main), run_name="__main__")
    finally:
        sys.argv = argv
    return printed.getvalue()


def wrong_commands(text: str, root: Path = ROOT) -> list[str]:
    wrong = []
    for words in simple_commands(shell_lines(text)):
        tool, *rest = words[0].split("/")[-1:] + words[1:]
        if [tool, *rest[:1]] == ["torchrun", "--nproc-per-node"]:
            tool, rest = "python", rest[2:]
        if tool not in ("python", "python3"):
            if tool not in ("pip", "pytest", "ruff", "mypy", "git", "sudo", "."):
                wrong.append(f"{words}: no command that we know")
            continue
        if rest[0] == "-m" and rest[1] in ("venv", "pytest", "coverage"):
            wrong += [f"{words}: no {word}" for word in rest[2:] if "/" in word and not (root / word).exists()]
            continue
        program, rest = (" ".join(rest[:2]), rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
        path = root / file_of(program)
        if not path.exists() or "__main__" not in path.read_text(encoding="utf-8"):
            wrong.append(f"{words}: no program {program}")
        elif program != "tests/test_docs.py":
            wrong += wrong_words(words, program, rest)
    return wrong


def wrong_words(words: list[str], program: str, rest: list[str]) -> list[str]:
    """Flags that --help does not know, values that it does not offer, studies that there are not."""
    known = help_of(program)
    usage = known.split("\n\n")[0]  # what follows is the docstring, which may be wrong itself
    flags = {"--help", *re.findall(r"--[a-z][a-z-]*", usage)}
    choices = {flag: offered.split(",") for flag, offered in re.findall(r"(--[a-z-]+) \{(.*?)\}", usage)}
    wrong = [f"{words}: {program} has no {word}" for word in rest
             if word.startswith("--") and word.split("=")[0] not in flags]
    wrong += [f"{words}: {flag} is one of {choices[flag]}"
              for flag, value in zip(rest, rest[1:]) if flag in choices and value not in choices[flag]]
    studies = set(re.findall(r"^ {4}(?:python -m experiments )?(\w+)", known, re.M)) | {"NAME"}
    if program == "-m experiments" and rest[0] not in studies:
        wrong.append(f"{words}: no study {rest[0]}")
    return wrong


# a file (folders, name, ending), or a folder with a slash at its end
PATH = re.compile(r"(?<![\w/.$*-])("
                  r"(?:[\w.-]+/)*[\w-]+(?:\.[\w-]+)*\.(?:py|md|jsonl?|png|txt|toml|pt|safetensors|tar\.gz)|"
                  r"(?:\.?[A-Za-z][\w-]+/)+)(?![\w/<(*-])")
NAME = re.compile(rf"(?<![\w./-])({'|'.join(TOP)}|experiments)\.([A-Za-z_]\w*)(?:\.(\w+))?")


def wrong_paths(text: str, folder: Path, root: Path = ROOT) -> list[str]:
    """Files and folders that are neither here nor among what a run writes. folder: of the text itself."""
    text = re.sub(r"https?://\S+", "", text)
    named = {path for path in PATH.findall(text)
             if Path(path).name not in OUTPUTS and not OUTPUT_FOLDERS & {*Path(path).parts}}
    return [f"{path} is not there" for path in sorted(named)
            if not any((where / path).exists() for where in (root, folder, root / "tests", root / "assignment/tests"))]


def wrong_names(text: str) -> list[str]:
    """`module.name` and `test_file.py::test_name` that do not exist."""
    wrong = []
    for module, name, inner in NAME.findall(text):
        if name in ("py", "md", "json", "jsonl", "png") or (ROOT / module / f"{name}.py").exists():
            continue
        found = getattr(importlib.import_module(module), name, None)
        if found is None or (inner and not hasattr(found, inner)):
            wrong.append(f"there is no {module}.{name}{'.' * bool(inner)}{inner}")
    for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", text):
        paths = [path for path in (ROOT / "tests" / file, ROOT / "assignment/tests" / file) if path.exists()]
        if not any(f"def {name}(" in path.read_text(encoding="utf-8") for path in paths):
            wrong.append(f"there is no {file}::{name}")
    return wrong


def wrong_pointers(text: str, module) -> list[str]:
    """"see X" where X is a name that the module does not have. Files and module.name are looked for elsewhere."""
    names = re.findall(r"\b[Ss]ee `?([A-Za-z_]\w*)`?(?!\w|[./]\w)", text)
    return [f"see {name}: there is no such name" for name in names
            if (name[0].isupper() or "_" in name) and not hasattr(module, name)]


def wrong_links(page: str) -> list[str]:
    """Links to files and headings that are not there."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        file, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists():
            wrong.append(f"{target} is not there")
        elif anchor and path.suffix == ".md" and anchor not in headings(path):
            wrong.append(f"{target}: no such heading")
    return wrong


def headings(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    lines = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


REFERENCE = re.compile(r"\[`([\w/]+\.py):(\d+)`\]\(((?:\.\./)?)[\w/]+\.py#L\d+\) `([^`]+)`")


def line_of(file: str, snippet: str) -> int:
    """The number of the one line of a file that holds a snippet."""
    numbers = [n for n, line in enumerate(read(file).splitlines(), 1) if snippet in line]
    assert len(numbers) == 1, f"{file} has {len(numbers)} lines with {snippet!r}; a reference needs exactly one"
    return numbers[0]


def with_true_lines(text: str) -> str:
    """The text with the line numbers that its references should have."""
    def true(match):
        file, _, up, snippet = match.groups()
        line = line_of(file, snippet)
        return f"[`{file}:{line}`]({up}{file}#L{line}) `{snippet}`"
    return REFERENCE.sub(true, text)


def algorithm_1() -> str:
    """The lines of hypo.train from line 1 of the box to the end of the update, without those that are empty."""
    lines = [line for line in read("hypo.py").splitlines() if line.strip()]
    begin = next(n for n, line in enumerate(lines) if line.strip().startswith("# 1: for t"))
    end = next(n for n in range(begin, len(lines)) if "optimizer.zero_grad()" in lines[n])
    return textwrap.dedent("\n".join(lines[begin:end + 1])) + "\n"


def with_true_code(readme: str) -> str:
    """README with the lines of Algorithm 1 that hypo.py has."""
    return re.sub(r"(?<=^```python\n).*?(?=^```)", lambda _: algorithm_1(), readme, flags=re.M | re.S)


def told_by(source: str, root: Path = ROOT) -> str:
    """Docstrings and comments of a source file."""
    text = read(source, root)
    nodes = [node for node in ast.walk(ast.parse(text))
             if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    comments = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT]
    return "\n\n".join([*filter(None, map(ast.get_docstring, nodes)), *comments])


# ---------------------------------------------------------------------------------------------------
# the pages

@pytest.mark.parametrize("page", PAGES)
def test_commands_files_names_and_links_of_a_page_are_there(page):
    text, folder = read(page), (ROOT / page).parent
    assert wrong_commands(text) + wrong_paths(text, folder) + wrong_names(text) + wrong_links(page) == []


@pytest.mark.parametrize("source", SOURCES)
def test_commands_files_and_names_in_docstrings_and_comments_are_there(source):
    text = told_by(source)
    wrong = wrong_commands(text) + wrong_paths(text, (ROOT / source).parent) + wrong_names(text)
    if "/" not in source:
        wrong += wrong_pointers(text, importlib.import_module(Path(source).stem))
    assert wrong == []


@pytest.mark.parametrize("program", ["hypo.py", "dpo.py", "rlhf.py", "coverage.py", "eval.py", "world.py",
                                     "-m experiments", "-m experiments.bench"])
def test_commands_files_and_names_in_help_are_there(program):
    text = re.sub(r"\n {10,}", " ", help_of(program))  # argparse breaks lines
    assert wrong_paths(text, ROOT) + wrong_names(text) + wrong_commands(text) == []


def test_a_handout_points_at_nothing_that_it_lacks(tmp_path):
    """But for recipes/ and the project's tests/, of which its page says that they are not part of it; README.md is a
    model's card there."""
    import handout
    handout.hand_out(tmp_path / "copy")
    copy, wrong = tmp_path / "copy", []
    for path in sorted(copy.rglob("*")):
        name = str(path.relative_to(copy))
        if path.suffix not in (".py", ".md") or "tests" in path.parts:
            continue
        text = path.read_text(encoding="utf-8") if path.suffix == ".md" else told_by(name, copy)
        problems = wrong_paths(text, path.parent, copy) + wrong_commands(text, copy)
        wrong += [f"{name}: {problem}" for problem in problems
                  if not re.match(r"recipes/|tests/|README.md ", problem)]
    assert wrong == []


@pytest.mark.parametrize("text", [
    "```sh\npython hyop.py\n```", "```sh\npython hypo.py --lamda 1\n```", "```sh\npython dpo.py --loss ip\n```",
    "    python -m experiments godhart", "`python recipes/no.py DIR`", "```sh\nS='--stepps 3'\npython dpo.py $S\n```",
    "```sh\nfor s in 0 1; do python hypo.py --sed $s; done\n```", "```sh\npyhton hypo.py\n```",
    "```sh\n.venv/bin/python -m pytest tests/test_no.py\n```", "a file no.py", "the folder nowhere/", "lm.LM.nothing",
    "lm.nothing", "test_lm.py::test_nothing", "see Nothing.", "see no_such_name", "`python data.py`"])
def test_negative_controls_of_the_finders(text):
    found = wrong_commands(text) + wrong_paths(text, ROOT) + wrong_names(text) + wrong_pointers(text, sys)
    assert found, "this must be found"


def test_the_readme_is_short_and_has_the_two_commands_that_ci_runs():
    readme = read("README.md")
    assert len(readme.splitlines()) <= 230 and len(readme.encode()) <= 14_000
    for end in ("hypo.py", "-m pytest -n 2 --dist loadfile"):
        assert len(re.findall(rf"^python3 -m venv .* {end}$", readme, re.M)) == 1


def test_the_code_in_the_readme_is_algorithm_1_as_it_stands_in_hypo_py():
    readme = read("README.md")
    assert "loss.backward()" in algorithm_1()
    assert readme == with_true_code(readme), "run: python tests/test_docs.py --fix"


def test_line_numbers_are_true():
    slides = read("docs/slides.md")
    assert slides == with_true_lines(slides), "run: python tests/test_docs.py --fix"


def test_the_slides_have_all_symbols_and_enough_references():
    symbols = read("docs/slides.md").split("## Symbols")[1]
    for symbol in ("y+", "y-", "y_w", "y_l", "pi_ref", "pi_sft", "beta", "lambda", "r*", "r_hat", "Z(x)", "C_glo",
                   "C_eps_kl", "eps_kl", "eps_dpo", "eps_reward", "R'", "rho", "D"):
        assert re.search(rf"^\|[^|]*(?<!\w){re.escape(symbol)}(?!\w)[^|]*\|", symbols, re.M), symbol
    assert len(REFERENCE.findall(read("docs/slides.md"))) > 40


def test_the_reading_order_has_every_file():
    order = read("README.md").split("## Reading order")[1].split("\n## ")[0]
    assert set(re.findall(r"\]\((\w+)\.py\)", order)) == set(TOP)


def test_every_metric_that_is_logged_or_measured_is_in_the_glossary():
    glossary = read("docs/glossary.md")
    logged = {keyword.arg for name in ("hypo", "dpo", "rlhf") for node in ast.walk(ast.parse(read(f"{name}.py")))
              if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "log" for keyword in node.keywords}
    names = {*importlib.import_module("eval").MEASURED, *filter(None, logged)}
    assert len(names) > 20 and not {name for name in names if f"`{name}`" not in glossary}


def test_every_metric_of_the_glossary_is_in_the_sources():
    sources = "".join(map(read, SOURCES))
    names = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*)\|", read("docs/glossary.md"), re.M))))
    parts = {re.sub(r"^(second|train|data)_|_(small|medium|large)_gap$", "", name)
             for name in names}
    assert len(names) > 40 and not {name for name in parts if name not in sources}


@pytest.mark.parametrize("arm", ["hypo", "dpo", "online dpo", "ipo", "online ipo", "ppo", "rloo"])
def test_the_defaults_are_what_the_sweep_chose(arm, tmp_path):
    sweep = importlib.import_module("experiments.sweep")
    command, flags = sweep.ARMS[arm]
    taken = []

    def begin(args):
        taken.append(args)
        raise KeyboardInterrupt  # it needs no run

    with pytest.raises(KeyboardInterrupt):
        command.main([*flags.split(), "--out", str(tmp_path / "run")], begin)
    words = sweep.chosen(sweep.read(sweep.RESULTS), arm).split()
    assert {name: getattr(taken[0], name[2:]) for name in words[::2]} == dict(zip(words[::2], map(float, words[1::2])))


def test_tables_made_by_code_are_what_the_code_makes():
    bench = importlib.import_module("experiments.bench")
    assert bench.table(json.loads(read("results/bench.json"))) in read("docs/speed.md")
    sweep = importlib.import_module("experiments.sweep")
    assert sweep.table(sweep.read(sweep.RESULTS)) in read("docs/details.md")
    coverage = importlib.import_module("coverage")
    theory = read("docs/theory.md")
    assert textwrap.dedent(coverage.worked_example()) in theory
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|.*\|.*\|(.*)\|$", theory, re.M)))
    assert len(named) > 10 and not [name for name in named if not hasattr(coverage, name)]


# ---------------------------------------------------------------------------------------------------
# the house: an arrow means "imports"; none runs back, none is missing, and there are at most five floors

ARROWS = {
    "hypo": {"dpo", "data", "eval", "run"}, "dpo": {"data", "eval", "run"}, "rlhf": {"data", "eval", "lm", "run"},
    "coverage": set(), "eval": {"judges", "lm", "rows", "run"}, "lm": set(), "world": set(), "run": set(),
    "data": {"world", "lm", "fast", "judges", "rows", "run"}, "rows": {"lm", "run"},
    "judges": {"world", "lm"}, "fast": {"lm"},
}
LATER = {"coverage": {"experiments", "run"}}  # inside functions


def imported(nodes) -> set[str]:
    """The modules of the project that some statements import."""
    nodes = list(nodes)
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names} & {*TOP, "experiments", "recipes", "assignment", "tests"}


def test_imports_are_the_arrows_of_the_house():
    assert set(ARROWS) == set(TOP)
    for name in TOP:
        tree = ast.parse(read(f"{name}.py"))
        assert imported(tree.body) == ARROWS[name], name
        assert imported(ast.walk(tree)) - ARROWS[name] == LATER.get(name, set()), name
        plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert "eval" not in plain, "`import eval` would hide the builtin: write `from eval import ...`"


def test_the_house_has_at_most_five_floors():
    @functools.cache
    def floor(name):
        return 1 + max(map(floor, ARROWS[name]), default=0)
    assert max(map(floor, ARROWS)) <= 5


def test_coverage_is_ours_and_not_the_tool_of_that_name():
    coverage = importlib.import_module("coverage")
    assert Path(coverage.__file__) == ROOT / "coverage.py", "start the tests as `pytest` or `python -m pytest`"
    assert not hasattr(coverage, "__path__")


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit("usage: python tests/test_docs.py --fix")
    for page, fixed in (("README.md", with_true_code), ("docs/slides.md", with_true_lines)):
        (ROOT / page).write_text(fixed(read(page)), encoding="utf-8")
