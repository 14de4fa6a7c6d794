"""results/README.md and the pictures, from the reports in results/*.json, without a run."""

import textwrap
from collections import Counter
from pathlib import Path

from eval import aligned
from experiments.draw import write_labels
from experiments.stats import Results
from experiments.studies import STUDIES
from run import UserError, read_json, replacing, write_text

BELIEVE = """Believe a verdict as far as this world and its small models go: whatever is not open was decided at the 5 %
level, by an endpoint that was declared before the runs. Beside the claims, tables and pictures are exploratory."""
HOW = """`python -m experiments pages` writes this page and its pictures from the JSON files beside it, which hold every
evaluation of every run. It makes no run; `python -m experiments NAME` does. What each study asks was declared before
its runs, in [experiments/studies.py](../experiments/studies.py)."""
WORDS = """Means over seeds with Student's 95 % interval, of shares on the scale of log-odds. "Golden" is the golden
baseline, the exact optimum of the golden reward at b = 1. "At 4 nats": by interpolation between the last steps of a
sweep of beta, seed by seed. "Off support": the share of samples that pi_ref all but never writes, see
[the theory](../docs/theory.md)."""
VERDICTS = """A verdict is Student's test over seeds, corrected by Holm for the claims of its study. Holds: what the
paper says. Reversed: on the other side of 0. Equal: within the margin that is named. Different: where equal was
expected. Open: these seeds do not tell, and about so many would. Among {n} verdicts are {counts}."""
README_ROWS = ("fitting", "goodhart", "classify", "quality", "loss", "scale")  # after main: the first claim


def readme_table(reports: dict[str, dict]) -> str:
    """The rows of README: the primary claims, and the first claim of some other studies."""
    if "main" not in reports:
        raise UserError("results/main.json is missing; python -m experiments main makes it")
    lines = [*reports["main"]["claims"], *(reports[name]["claims"][0] for name in README_ROWS if name in reports)]
    return "\n".join(["| | the papers' claim | here | |", "| ---: | --- | --- | --- |", *(
        f"| {i} | {line['paper']} | {line['here']} | **{line['verdict']}** |" for i, line in enumerate(lines, 1))])


def write_readme(root: Path) -> None:
    """Put that table between the marks in README.md."""
    between_marks(root / "README.md", readme_table(read_reports(root / "results")))


def between_marks(path: Path, made: str) -> None:
    """Put what was made between the marks in a file."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"{path} has no lines {BEGIN!r} and {END!r} for the table to stand between")
    write_text(path, f"{before}{begin}\n{made}\n{end}{after}")


BEGIN, END = "<!-- from results/: python -m experiments pages -->", "<!-- end of it -->"


def read_reports(folder: Path) -> dict[str, dict]:
    """The reports that a folder holds."""
    paths = {name: folder / f"{name}.json" for name in STUDIES}
    return {name: read_json(path) for name, path in paths.items() if path.exists()}


def write_pages(folder: Path, names) -> None:
    """The pictures of the named studies, and README.md with all that have a report in the folder."""
    reports = read_reports(folder)
    if not reports:
        raise UserError(f"{folder} holds no report of a study; run this where the project's results/ is")
    for name in names:
        if name in reports:
            draw(reports[name], folder / f"{name}.png")
    write_text(folder / "README.md", page(reports))


def draw(report: dict, path: Path) -> None:
    """A study's picture."""
    figure = STUDIES[report["study"]].draw(Results(report))
    figure.draw_without_rendering()  # settles the axes, on which the labels then find their places
    for axis in figure.axes:
        write_labels(axis)
    save(figure, path)


def save(figure, path: Path) -> None:
    """A picture, complete or not at all."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=110, bbox_inches="tight")


def page(reports: dict[str, dict]) -> str:
    """README.md of a folder of results."""
    commits = sorted({report["commit"] for report in reports.values()})
    verdicts = [line["verdict"] for report in reports.values() for line in report["claims"]]
    kinds = Counter(verdict.partition(" ")[0].strip(":") for verdict in verdicts)
    counted = VERDICTS.format(n=sum(kinds.values()), counts=", ".join(f"{n} {name!r}" for name, n in kinds.items()))
    made = f"The numbers on this page are of commit {', '.join(commits)}."
    return "\n\n".join(["# Results of the studies", *map(wrap, (BELIEVE, counted, WORDS, made + " " + HOW)),
                        *map(section, reports.values())]) + "\n"


def wrap(text: str) -> str:
    """A paragraph in lines."""
    return textwrap.fill(" ".join(text.split()), 118)


def section(report: dict) -> str:
    """A study's part of the page."""
    rows, study = report["table"], STUDIES[report["study"]]
    return "\n".join([
        f"## {report['study']}", "", f"**{report['title']}** `{report['command']}`, seeds {report['seeds'][0]} to "
        f"{report['seeds'][-1]}; {report['core-minutes']:.0f} minutes of training on one core ({report['hardware']}).",
        "", f"![{report['title']}]({report['study']}.png)", "", wrap(study.caption), "",
        wrap(f"Declared: {study.conclude.__doc__}"), "",
        markdown([list(rows[0]), *(list(row.values()) for row in rows)]), "",
        *(f"- {sentence(line, '**')}" for line in report["claims"])])


def markdown(cells: list[list[str]]) -> str:
    """A table; the first row is its head."""
    head, *rows = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join([head, "| " + " | ".join("---" for _ in cells[0]) + " |", *rows])


def as_text(report: dict) -> str:
    """A study's table and claims for the terminal."""
    rows = report["table"]
    return "\n".join([f"\n{report['title']} ({report['study']})\n", aligned([list(rows[0]), *(
        list(row.values()) for row in rows)]), "", *(f"- {sentence(line)}" for line in report["claims"])])


def sentence(line: dict, bold: str = "") -> str:
    """A claim in words."""
    here = f"Here: {line['here']}" if line["paper"] else line["here"]
    return f"{line['paper']} {here}: {bold}{line['verdict']}{bold}.".strip()
