"""A study written down: tables, findings in words, figures for other programs, pictures."""

from collections.abc import Sequence
from pathlib import Path

from rakd.files import replacing, write_text
from rakd.study.findings import describe
from rakd.study.results import StudyResult, TrainingLog, write_study
from rakd.study.tables import format_csv, format_lines, format_markdown, make_tables

_NOTES = (
    "Figures are means over seeds ± the sample standard deviation. Average precision in percent, 40 recall "
    "positions. Official overlaps: Car 0.7, others 0.5; loose: Car 0.5, others 0.25 in 3D and BEV. An object is "
    "found when a detection of its class overlaps it by half in the image."
)


def format_tables(study: StudyResult) -> str:
    """All tables and findings as plain text for a terminal, measures down and methods across."""
    parts = [format_lines(table) for table in make_tables(study)]
    findings = "\n".join(f"- {sentence}" for sentence in describe(study))
    return "\n".join([*parts, f"* best, ' second. {_NOTES}", "", "What was found", findings]) + "\n"


def write_report(study: StudyResult, folder: Path, logs: Sequence[TrainingLog] = ()) -> list[Path]:
    """Write everything about a study to a folder, each file atomically.

    Args:
        study: The figures.
        folder: Made if it is not there. Files of other names in it are left alone.
        logs: Losses of the runs, for the picture of training; without any there is none.

    Returns:
        The files written: ``study.json``, ``tables.md``, ``tables.csv``, ``bars.png`` (if there are runs) and
        ``training.png``.
    """
    from rakd.study.pictures import draw_bars, draw_training

    tables = make_tables(study)
    write_study(folder / "study.json", study)
    write_text(folder / "tables.csv", format_csv(tables))
    pictures = {"bars.png": draw_bars(study)} if study.runs else {}
    if logs:
        pictures["training.png"] = draw_training(study, logs)
    for name, figure in pictures.items():
        with replacing(folder / name) as temporary:
            figure.savefig(temporary, dpi=130, facecolor="white")
    sections = [
        "# Ways to distil\n",
        f"{_provenance(study)}\n",
        "## What was found\n",
        "\n".join(f"- {sentence}" for sentence in describe(study)) + "\n",
        "## Tables\n",
        f"Best **bold**, second <u>underlined</u>. {_NOTES}\n",
        *(format_markdown(table) for table in tables),
        "## Pictures\n",
        *(f"![{name.partition('.')[0]}]({name})\n" for name in pictures),
    ]
    write_text(folder / "tables.md", "\n".join(sections))
    return [folder / name for name in ("study.json", "tables.md", "tables.csv", *pictures)]


def _provenance(study: StudyResult) -> str:
    """What the figures come from, in one paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in study.versions.items())
    done = sorted({run.seed for run in study.runs})
    parts = {
        "Data": study.data,
        "Seeds": ", ".join(map(str, study.seeds or done)),
        "Runs": str(len(study.runs)),
        "Versions": versions,
    }
    return " ".join(f"{name}: {text}." for name, text in parts.items() if text)
