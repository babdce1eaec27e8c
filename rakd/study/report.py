"""An experiment written down: tables, figures for other programs, pictures."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rakd.detector.base_config import BaseConfig
from rakd.detector.configs import DETECTORS
from rakd.distill import auto_share
from rakd.files import atomic_write, write_text
from rakd.study.metrics import METHOD_NAMES
from rakd.study.results import METHODS, StudyResult, TrainingLog, write_study
from rakd.study.tables import Table, format_csv, format_html, format_lines, format_markdown, make_tables

_MARKS = (
    "Marks go by the means alone: they ignore the standard deviation, and a second best may be no worse than the best."
)
_NOTES = (
    "Figures are means over seeds ± the sample standard deviation. A seed is that of the expert and of the apprentices "
    "that it teaches (an expert from a file teaches in all seeds). All are evaluated on the same frames: what other "
    "frames would change is not in the deviation.",
    "Average precision in percent, 40 recall positions; averages are over classes and levels. IoU is "
    "that of cars and of the other classes; 0.5/0.25 holds in 3D and BEV.",
    "Recall: an object is found when a detection of its class has a 2D IoU of 0.5 or more with it. Scores have no "
    "threshold but the detector's own, and false positives cost nothing.",
    "AbsRel, the absolute relative error of depth, is a mean over the objects that each model itself found. Compare it "
    "beside the recall: a model that finds only the easy objects has a small one.",
    "Paired differences are between runs of the same seed: mean ± sample standard deviation over seeds, and in "
    "brackets a 95 % confidence interval over seeds (Student's t) and evaluated frames (bootstrap), widened so that "
    "all intervals of a column are simultaneous (Bonferroni). With one seed it tells what other frames would change, "
    "and nothing of other trainings.",
    "Distillation losses of different methods are different quantities; they cannot be compared.",
)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#22272e;margin:2em auto;max-width:90em;padding:0 1em}"
    "h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{text-align:right;padding:.2em .7em;border-bottom:1px solid #e4e7eb}th{border-bottom-color:#22272e}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}"
)
_REGIONS = {
    "proposals": "the apprentice's proposals on objects",
    "objects": "labelled boxes",
    "expert": "boxes of the expert's matched queries",
}


def format_tables(study: StudyResult) -> str:
    """Tables, notes and provenance as plain text for a terminal, metrics down and methods across."""
    parts = [format_lines(table) for table in make_tables(study)]
    notes = _bullets((f"* best, ' second. {_MARKS}", *_NOTES))
    parts += ["Notes", notes, "Where it comes from", f"{_provenance(study)}\n"]
    return "\n".join(parts)


def write_report(study: StudyResult, folder: Path, logs: Sequence[TrainingLog] = ()) -> list[Path]:
    """Write everything about a study to a folder, each file atomically.

    Args:
        study: The figures.
        folder: Made if it is not there. Files of other names in it are left alone.
        logs: Losses of the runs, for the picture of training; without any there is none.

    Returns:
        The files written: ``study.json``, ``tables.md``, ``tables.csv``, ``bars.png`` (if there are runs),
        ``gains.png`` and ``sizes.png`` (if a method and no distillation share a seed), ``tradeoff.png`` (if the
        models' latency was measured), ``training.png`` and ``report.html``.
    """
    from rakd.study.pictures import draw_bars, draw_gains, draw_sizes, draw_tradeoff, draw_training

    tables = make_tables(study)
    write_study(folder / "study.json", study)
    write_text(folder / "tables.csv", format_csv(tables))
    pictures = {"bars.png": draw_bars(study)} if study.runs else {}
    if any(table.key == "difference" and any(row.runs for row in table.rows) for table in tables):
        pictures["gains.png"] = draw_gains({"": study})
    if study.runs and all(model.latency_ms is not None for model in study.models) and study.models:
        pictures["tradeoff.png"] = draw_tradeoff(study)
    if (sizes := draw_sizes(study)) is not None:
        pictures["sizes.png"] = sizes
    if logs:
        pictures["training.png"] = draw_training(study, logs)
    for name, figure in pictures.items():
        with atomic_write(folder / name) as temporary:
            figure.savefig(temporary, dpi=130, facecolor="white")
    sections = [
        "# Distillation methods\n",
        f"{_provenance(study)}\n",
        "## Tables\n",
        f"Best **bold**, second <u>underlined</u>. {_MARKS}\n",
        *(format_markdown(table) for table in tables),
        "## Notes\n",
        _bullets(_NOTES),
        "## Pictures\n",
        *(f"![{name.partition('.')[0]}]({name})\n" for name in pictures),
    ]
    write_text(folder / "tables.md", "\n".join(sections))
    write_text(folder / "report.html", _format_page(study, tables, [*pictures, "frames.png"]))
    return [folder / name for name in ("study.json", "tables.md", "tables.csv", *pictures, "report.html")]


def _format_page(study: StudyResult, tables: Sequence[Table], pictures: Sequence[str]) -> str:
    """Tables, notes and pictures as one page that lies beside the pictures."""
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _NOTES)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Distillation methods</title>',
            f"<style>{_STYLE}</style><h1>Distillation methods</h1>",
            f"<p>{html.escape(_provenance(study))}</p>",
            f"<p>Best <b>bold</b>, second <u>underlined</u>. {_MARKS}</p>",
            *map(format_html, tables),
            f"<h2>Notes</h2><ul>{notes}</ul><h2>Pictures</h2>",
            # Frames are drawn after the report, and where there are none nothing shows.
            *(f'<p><img src="{name}" alt="" onerror="this.remove()"></p>' for name in pictures),
            "</html>\n",
        ]
    )


def _bullets(sentences: Sequence[str]) -> str:
    return "".join(f"- {sentence}\n" for sentence in sentences)


def _provenance(study: StudyResult) -> str:
    """The origin of the figures, in one paragraph; facts that the study lacks are left out."""
    config = study.config
    regions = config.get("regions")
    names = ("device", "threads", "latency threads")
    machine = {name: study.versions[name] for name in names if name in study.versions}
    done = sorted({run.seed for run in study.runs})
    rescaled = "Maps of both networks" if config.get("rescale") == "both" else "Expert's maps"
    parts = {
        "Data": study.data,
        "Detectors": _detectors(study),
        "Training": _training(config),
        "Seeds": ", ".join(map(str, study.seeds or done)),
        "Runs": str(len(study.runs)),
        "Boxes in which methods compare features": _REGIONS.get(str(regions), regions),
        rescaled: "brought to a root mean square of 1" if config.get("rescale") else None,
        "Loss weights": _weights(config),
        "Options of methods": _options(config),
        **_starts(config),
        "Runs that went on to more steps than they were made for": ", ".join(config.get("extended") or ()),
        "Versions": ", ".join(f"{name} {text}" for name, text in study.versions.items() if name not in machine),
        "Device": ", ".join(text if name == "device" else f"{name} {text}" for name, text in machine.items()),
    }
    return " ".join(f"{name}: {text}." for name, text in parts.items() if text)


def _detectors(study: StudyResult) -> str:
    """Names or files, backbones, and the size of images."""
    parts = []
    for role in ("expert", "apprentice"):
        name, model = study.config.get(role), study.model(role)
        if role == "expert" and study.config.get("expert_file"):
            name = f"of {study.config['expert_file']}"
        words = (role, name if isinstance(name, str) else "", f"({model.backbone})" if model else "")
        if any(words[1:]):
            parts.append(" ".join(word for word in words if word))
    config = DETECTORS.get(str(study.config.get("apprentice")))
    if config is not None:
        width = f", padded to a width of {config.width}" if config.width else ""
        parts.append(f"images {config.height} pixels high{width}{_expert_images(study.config, config)}")
    return ", ".join(parts)


def _expert_images(config: Mapping[str, Any], apprentice: BaseConfig) -> str:
    """The size of the expert's images, where it is another."""
    expert = config.get("expert")
    given = expert if isinstance(expert, Mapping) else vars(DETECTORS.get(str(expert), apprentice))
    if given["height"] == apprentice.height:
        return ""
    return f", the expert's {given['height']} high and {given['width']} wide"


def _training(config: Mapping[str, Any]) -> str:
    parts = []
    for role, key in (("expert", "expert_training"), ("apprentices", "training")):
        settings = config.get(key)
        if isinstance(settings, Mapping) and {"steps", "batch_size"} <= set(settings):
            parts.append(f"{role} {settings['steps']} steps of {settings['batch_size']} images")
    return ", ".join(parts)


def _weights(config: Mapping[str, Any]) -> str:
    """The loss weight of each method that was to be run, and what a reader must know to be fair to them."""
    weights = config.get("weights") or {}
    methods = config.get("methods") or weights
    used = {method: weights[method] for method in METHODS if method in methods and method in weights}
    if len(used) > 1 and len(set(used.values())) == 1:
        weight = next(iter(used.values()))
        if isinstance(weight, str):
            return f"each such that the loss is {auto_share(weight):g} times the task loss at first, not tuned"
        return f"one loss weight ({weight:g}) for every method, not tuned: methods' losses have different scales"
    texts = {method: weight if isinstance(weight, str) else f"{weight:g}" for method, weight in used.items()}
    return ", ".join(f"{METHOD_NAMES[method]} {text}" for method, text in texts.items())


def _options(config: Mapping[str, Any]) -> str:
    options = config.get("options") or {}
    return ", ".join(f"{METHOD_NAMES[m]} {name} {value}" for m, own in options.items() for name, value in own.items())


def _starts(config: Mapping[str, Any]) -> dict[str, str]:
    """Detectors and backbones that the trainings started from."""
    init, starts = config.get("init") or "", dict(config.get("started_from") or {})
    if init and not init.endswith(".pt"):  # a folder with a detector for each run
        return {"Detectors started from": f"those in {init}"}
    # A file brings weights of its own: what lay under them does not matter.
    for role, file in (("expert", config.get("expert_file")), ("apprentice", init)):
        if file:
            starts.pop(role, None)
    named = [f"{role} {starts[role]}" for role in ("expert", "apprentice") if role in starts]
    return {"Backbones started from": ", ".join(named), "Apprentices started from": init}
