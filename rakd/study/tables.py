"""The paper's tables from a study's figures, and their forms: Markdown, CSV, lines for a terminal."""

import csv
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rakd.distill import registry
from rakd.evaluation.depth import ALL
from rakd.evaluation.kitti import CLASSES, LEVELS, Overlaps
from rakd.study.metrics import (
    CLASS_NAMES,
    IOU_NAMES,
    LEVEL_NAMES,
    MEAN,
    METHOD_NAMES,
    METRIC_NAMES,
    PRIMARY,
    Metric,
    Summary,
    difference_interval,
    paired_differences,
    summarise,
    values_by_seed,
)
from rakd.study.results import METHODS, StudyResult
from rakd.study.settings import PAPER_METHODS

Mark = Literal["", "best", "second"]

_OVERVIEW = {"expert": "Expert", "none": "Apprentice", "rakd": "Apprentice + RAKD"}
_ABLATED = {"none": METHOD_NAMES["none"], **{name: registry.METHODS[name].term for name in registry.ABLATED}}
# Of a model: field, head, digits after the point.
_COSTS = (
    ("latency_ms", "Latency, ms", 1),
    ("latency_p90_ms", "p90, ms", 1),
    ("onnx_ms", "ONNX, ms", 1),
    ("gflops", "GFLOPs", 1),
    ("parameters", "Params, M", 2),
)
_DASH = "–"


@dataclass(frozen=True)
class Cell:
    """A figure, rounded when it is shown.

    Attributes:
        metric: What it is a figure of; for costs of a model, only its kind is set.
        summary: Over seeds; the count is 0 for costs of a model, which no seed changes.
        digits: Digits after the point.
        mark: Its rank in its column.
    """

    metric: Metric
    summary: Summary
    digits: int
    mark: Mark = ""

    @property
    def rounded(self) -> float:
        """The mean as shown. Ranks go by it, so that equal-looking figures have equal marks."""
        return round(self.summary.mean, self.digits)

    def text(self, runs: int) -> str:
        """Mean and, with several seeds, standard deviation; a dash when there is none.

        Args:
            runs: Runs of the row; a figure from fewer says from how many.
        """
        if not math.isfinite(self.summary.mean):
            return _DASH
        text = f"{self.summary.mean:.{self.digits}f}"
        if math.isfinite(self.summary.std):
            text += f" ± {self.summary.std:.{self.digits}f}"
        return text + self._of(runs)

    def _of(self, runs: int) -> str:
        return "" if self.summary.count in (0, runs) else f" (of {self.summary.count})"


@dataclass(frozen=True)
class Difference(Cell):
    """A mean of paired differences, and the ends of its interval, NaN where there is none."""

    interval: tuple[float, float] = (math.nan, math.nan)

    def text(self, runs: int) -> str:
        """Mean, standard deviation over several seeds, and interval; a dash where no seed has both."""
        if not self.summary.count:
            return _DASH
        text = f"{self.summary.mean:+.{self.digits}f}"
        if self.summary.count > 1:
            text += f" ± {self.summary.std:.{self.digits}f}"
        if all(map(math.isfinite, self.interval)):
            low, high = self.interval
            text += f" [{low:+.{self.digits}f}, {high:+.{self.digits}f}]"
        return text.replace("-", "−") + self._of(runs)


@dataclass(frozen=True)
class Row:
    """A method's figures; ``runs`` is the number of its runs."""

    method: str
    name: str
    runs: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table: methods down, metrics across.

    Attributes:
        key: Short name, for files.
        title: Above the table.
        heads: One for each column.
        rows: All with as many cells as there are heads.
    """

    key: str
    title: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]


def make_tables(study: StudyResult) -> list[Table]:
    """All tables of a study: expert and apprentice, methods compared, terms ablated, differences seed by seed."""
    ways, terms = "Distillation methods", "Terms of the loss"
    others = [name for name, spec in registry.METHODS.items() if not spec.role]
    compared = {name: METHOD_NAMES[name] for name in ("none", *registry.COMPARED, *others) if _is_shown(study, name)}
    ablated = {name: term for name, term in _ABLATED.items() if _is_shown(study, name)}
    tables = [
        _overview(study, "table2", "Table 2. Expert and apprentice", "official"),
        _overview(study, "table2_loose", "Table 2. Expert and apprentice", "loose"),
    ]
    if compared:
        tables += [
            _precisions(study, "table3", f"Table 3. {ways}", compared, "3d", "official"),
            _precisions(study, "table3_loose", f"Table 3. {ways}", compared, "3d", "loose"),
            _precisions(study, "table3_bev", f"Table 3. {ways}", compared, "bev", "official"),
            _precisions(study, "table3_bev_loose", f"Table 3. {ways}", compared, "bev", "loose"),
            _precisions(study, "table3_2d", f"Table 3. {ways}", compared, "bbox", "official"),
            _depths(study, "table3_depth", f"Table 3. {ways}", compared),
        ]
    if set(ablated) - set(compared):
        tables += [
            _precisions(study, "ablation", f"Ablation. {terms}", ablated, "3d", "official"),
            _precisions(study, "ablation_loose", f"Ablation. {terms}", ablated, "3d", "loose"),
            _depths(study, "ablation_depth", f"Ablation. {terms}", ablated),
        ]
    return [*tables, *differences(study), _training(study)]


def _is_shown(study: StudyResult, method: str) -> bool:
    """Whether a method was run, or is still to be."""
    planned = study.config.get("methods") or PAPER_METHODS
    return method in ("expert", *planned) or any(run.method == method for run in study.runs)


def _overview(study: StudyResult, key: str, title: str, overlaps: Overlaps) -> Table:
    """AP of cars, and what the models cost."""
    metrics = [Metric(metric, "Car", level, overlaps) for metric in ("3d", "bev") for level in LEVELS]
    heads = [f"{'3D' if m.kind == '3d' else 'BEV'} {LEVEL_NAMES[m.level]}" for m in metrics]
    rows = []
    for method, name in _OVERVIEW.items():
        model = study.model("expert" if method == "expert" else "apprentice")
        row = _row(study, method, name if model is None else f"{name} ({model.backbone})", metrics)
        costs = []
        for cost, _, digits in _COSTS:
            value = None if model is None else getattr(model, cost)
            scale = 1e-6 if cost == "parameters" else 1
            mean = math.nan if value is None else scale * value
            costs.append(Cell(Metric(cost), Summary(mean, math.nan, 0), digits))
        rows.append(replace(row, cells=(*row.cells, *costs)))
    heads += [head for _, head, _ in _COSTS]
    return Table(
        key, f"{title} (Car, AP R40, IoU {'0.7' if overlaps == 'official' else '0.5'}, %)", tuple(heads), tuple(rows)
    )


def _precisions(
    study: StudyResult, key: str, title: str, methods: dict[str, str], metric: str, overlaps: Overlaps
) -> Table:
    metrics = [Metric(metric, name, level, overlaps) for name in CLASSES for level in LEVELS]
    metrics.append(Metric(metric, MEAN, MEAN, overlaps))
    heads = [f"{CLASS_NAMES[m.name]} {LEVEL_NAMES[m.level]}".strip() for m in metrics]
    title = f"{title}: {METRIC_NAMES[metric]} (R40, {IOU_NAMES[overlaps]}, %)"
    return _ranked(study, key, title, methods, metrics, heads)


def _depths(study: StudyResult, key: str, title: str, methods: dict[str, str]) -> Table:
    metrics = [Metric(metric, name) for metric in ("abs_rel", "recall") for name in (*CLASSES, ALL)]
    kinds = {"abs_rel": "AbsRel", "recall": "recall"}
    heads = [f"{CLASS_NAMES[m.name]} {kinds[m.kind]}" for m in metrics]
    full = f"{title}: AbsRel of depth (lower is better) and recall at 2D IoU 0.5 (%)"
    return _ranked(study, key, full, methods, metrics, heads)


def differences(study: StudyResult) -> list[Table]:
    """Tables of each method less no distillation, and of RAKD less each baseline, over the seeds that both have."""
    ran = {run.method for run in study.runs}
    distilled = [name for name in registry.METHODS if name in ran and "none" in ran]
    baselines = [name for name in registry.METHODS if name in ran - {"rakd"} and "rakd" in ran]
    tables = []
    for key, title, pairs in (
        ("difference", "each method less no distillation", {name: (name, "none") for name in distilled}),
        ("difference_rakd", "RAKD less each baseline", {name: ("rakd", name) for name in baselines}),
    ):
        rows = []
        for name, pair in pairs.items():
            found = [list(paired_differences(study, *pair, metric).values()) for metric in PRIMARY]
            cells = [
                Difference(m, summarise(values), 2, interval=difference_interval(study, *pair, m, len(pairs)))
                for m, values in zip(PRIMARY, found, strict=True)
            ]
            rows.append(Row(name, METHOD_NAMES[name], max(map(len, found)), tuple(cells)))
        heads = tuple(metric.title for metric in PRIMARY)
        tables.append(Table(key, f"Paired differences: {title}", heads, tuple(rows)))
    return [table for table in tables if table.rows]


def _training(study: StudyResult) -> Table:
    """Time and losses at the end; not ranked, for losses of different methods are different things."""
    losses = list(dict.fromkeys(name for run in study.runs for name in run.losses))
    metrics = [Metric("minutes"), *(Metric("loss", name) for name in losses)]
    rows = [_row(study, method, METHOD_NAMES[method], metrics) for method in METHODS if _is_shown(study, method)]
    return Table("training", "Training: time, and losses at its end", ("minutes", *losses), tuple(rows))


def _row(study: StudyResult, method: str, name: str, metrics: Sequence[Metric]) -> Row:
    cells = [Cell(m, summarise(values_by_seed(study, method, m).values()), digits=2) for m in metrics]
    return Row(method, name, sum(run.method == method for run in study.runs), tuple(cells))


def _ranked(
    study: StudyResult,
    key: str,
    title: str,
    methods: dict[str, str],
    metrics: Sequence[Metric],
    heads: Sequence[str],
) -> Table:
    """A table whose best and second figures are marked; the expert stands above as a reference, unmarked."""
    expert = _row(study, "expert", "Expert (reference)", metrics)
    rows = [_row(study, method, name, metrics) for method, name in methods.items()]
    columns = [_marked([row.cells[i] for row in rows]) for i in range(len(metrics))]
    marked = [replace(row, cells=tuple(column[i] for column in columns)) for i, row in enumerate(rows)]
    return Table(key, title, tuple(heads), (expert, *marked))


def _marked(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of a column with marks; equal figures share one, and a column of equal figures has none."""
    values = {cell.rounded for cell in cells if math.isfinite(cell.summary.mean)}
    ranks = sorted(values, reverse=not cells[0].metric.lower_is_better)
    if len(ranks) < 2:
        return list(cells)
    marks: dict[float, Mark] = {ranks[0]: "best", ranks[1]: "second"}
    return [replace(cell, mark=marks.get(cell.rounded, "")) for cell in cells]


def format_markdown(table: Table) -> str:
    """A Markdown table under its title; best bold, second underlined."""
    wrap = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}
    lines = [
        f"### {table.title}\n",
        "| Method | Seeds | " + " | ".join(table.heads) + " |",
        "|---|---:|" + "---:|" * len(table.heads),
    ]
    for row in table.rows:
        texts = [wrap[cell.mark].format(cell.text(row.runs)) for cell in row.cells]
        lines.append(f"| {row.name} | {row.runs or _DASH} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def format_html(table: Table) -> str:
    """An HTML table under its title; best bold, second underlined."""
    wrap = {"": "{}", "best": "<b>{}</b>", "second": "<u>{}</u>"}
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in ("Method", "Seeds", *table.heads))
    lines = [f"<h2>{html.escape(table.title)}</h2>", f"<table><tr>{heads}</tr>"]
    for row in table.rows:
        texts = [wrap[cell.mark].format(cell.text(row.runs)) for cell in row.cells]
        cells = "".join(f"<td>{text}</td>" for text in (html.escape(row.name), row.runs or _DASH, *texts))
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def format_lines(table: Table) -> str:
    """Lines for a terminal, turned round so that they fit: metrics down, methods across; best ``*``, second ``'``."""
    marks = {"": " ", "best": "*", "second": "'"}
    first = ["", "seeds", *table.heads]
    columns = [first]
    for row in table.rows:
        texts = [cell.text(row.runs) + marks[cell.mark] for cell in row.cells]
        columns.append([f"{row.name} ", f"{row.runs or _DASH} ", *texts])
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for entries in zip(*columns, strict=True):
        cells = [entries[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(entries[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([table.title, "", lines[0], rule, *lines[1:]]) + "\n"


def format_csv(tables: Sequence[Table]) -> str:
    """All figures in long form, a row each.

    Columns: table, method, class, metric, level, overlap, mean, std, seeds, and the ends of a difference's interval,
    low and high. Missing values are empty fields; so are the seeds of a model's costs.
    """
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["table", "method", "class", "metric", "level", "overlap", "mean", "std", "seeds", "low", "high"])
    for table in tables:
        for row in table.rows:
            for cell in row.cells:
                metric, summary = cell.metric, cell.summary
                ends = cell.interval if isinstance(cell, Difference) else (math.nan, math.nan)
                mean, std, low, high = (
                    f"{x:.6g}" if math.isfinite(x) else "" for x in (summary.mean, summary.std, *ends)
                )
                where = [metric.name, metric.kind, metric.level, metric.overlaps]
                count = summary.count or ("" if metric.name == "" else 0)
                writer.writerow([table.key, row.method, *where, mean, std, count, low, high])
    return lines.getvalue()
