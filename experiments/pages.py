"""results/README.md and the pictures, from the reports in results/*.json, without a run."""

import textwrap
from collections import Counter
from pathlib import Path

from eval import aligned, plot_goodhart
from experiments.draw import write_labels
from experiments.stats import Results
from experiments.studies import STUDIES
from run import UserError, read_json, read_rows, replacing, write_text

FIRST_COMMIT = "0357e55"  # of reports that name none

BEFORE = """They were made before the code was put in its present order, with a learning rate that stayed constant and
with other random draws than the same commands make now. Goodhart had five seeds at first, which left its question
open, so five more were run: that is optional stopping, and its intervals are a little too narrow."""
HOW = """`python -m experiments pages` writes this page and its pictures from the JSON files beside it, which hold every
evaluation of every run. It makes no run; `python -m experiments NAME` does."""
WORDS = """Means over seeds with Student's 95 % interval; s.e. is the standard error. "Golden" is the golden baseline, a
policy trained online on the golden reward itself. "At KL" is where the best checkpoint is, in nats a sequence; one half
of the held-out prompts picks it, the other half judges it."""
VERDICTS = """A verdict says where the interval lies. Holds: where the paper's claim wants it. Reversed: on the other
side of 0. Not resolved: it holds 0, so these seeds do not tell. Contradicted and not contradicted are about claims that
something is not above 0. Among {n} verdicts are {counts}. They are not corrected for their number: of 20 claims
about nothing, one would come out on some side."""


def draw_runs(folder: Path) -> None:
    """results/hypo_vs_dpo.png, from the runs in results/runs.jsonl whose one flag is the seed."""
    runs, names = {}, {}
    for row in read_rows(folder / "runs.jsonl"):
        program, _, flags = row["command"].removeprefix("python ").partition(".py ")
        if program in ("hypo", "dpo") and flags.count("--") == 1:
            runs[row["command"]], names[row["command"]] = row["evaluations"], program
    plot_goodhart(runs, names, folder / "hypo_vs_dpo.png")


def write_pages(folder: Path, names) -> None:
    """The pictures of the named studies, and README.md with all that have a report in the folder."""
    paths = {name: folder / f"{name}.json" for name in STUDIES}
    reports = {name: read_json(path) for name, path in paths.items() if path.exists()}
    if not reports:
        raise UserError(f"{folder} holds no report of a study; run this where the project's results/ is")
    for name in names:
        if name in reports:
            draw(reports[name], folder / f"{name}.png")
    write_text(folder / "README.md", page(reports))


def draw(report: dict, path: Path) -> None:
    """A study's picture, written beside and renamed."""
    figure = STUDIES[report["study"]].draw(Results(report))
    figure.draw_without_rendering()  # settles the axes, on which the labels then find their places
    for axis in figure.axes:
        write_labels(axis)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=110, bbox_inches="tight")


def page(reports: dict[str, dict]) -> str:
    """README.md of a folder of results."""
    commits = sorted({report.get("commit", FIRST_COMMIT) for report in reports.values()})
    counts = Counter(line["verdict"] for report in reports.values() for line in report["claims"])
    first = f"The numbers on this page are of commit {', '.join(commits)}. " + BEFORE * (FIRST_COMMIT in commits)
    counted = VERDICTS.format(n=sum(counts.values()), counts=", ".join(f"{n} {name!r}" for name, n in counts.items()))
    return "\n\n".join(["# Results of the studies", *map(wrap, (first, HOW, WORDS, counted)),
                        *map(section, reports.values())]) + "\n"


def wrap(text: str) -> str:
    """A paragraph in lines."""
    return textwrap.fill(" ".join(text.split()), 118)


def section(report: dict) -> str:
    """A study's part of the page."""
    columns, study = list(report["table"][0]), STUDIES[report["study"]]
    command = report["command"].replace("study.py", "-m experiments")
    return "\n".join([
        f"## {report['study']}", "", f"**{report['title']}** `{command}`, seeds {report['seeds'][0]} to "
        f"{report['seeds'][-1]}; {report['core-minutes']:.0f} minutes of training on one core ({report['hardware']}).",
        "", f"![{report['title']}]({report['study']}.png)", "", wrap(study.caption), "",
        "| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |",
        *("| " + " | ".join(row.values()) + " |" for row in report["table"]), "",
        *(f"- {sentence(line, '**')}" for line in report["claims"])])


def as_text(report: dict) -> str:
    """A study's table and claims for the terminal."""
    rows = report["table"]
    return "\n".join([f"\n{report['title']} ({report['study']})\n", aligned([list(rows[0]), *(
        list(row.values()) for row in rows)]), "", *(f"- {sentence(line)}" for line in report["claims"])])


def sentence(line: dict, bold: str = "") -> str:
    """A claim in words."""
    here = f"Here: {line['here']}" if line["paper"] else line["here"]
    return f"{line['paper']} {here}: {bold}{line['verdict']}{bold}.".strip()
