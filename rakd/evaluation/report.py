"""Evaluation results for readers: a table as in papers, JSON, precision-recall curves."""

import json
from pathlib import Path

from rakd.evaluation.kitti import CLASSES, DIFFICULTIES, LEVELS, LIMITS, Overlaps, Result
from rakd.files import atomic_write, without_nan, write_text

_TITLES = {"3d": "3D", "bev": "Bird's-eye view", "bbox": "2D box", "aos": "Orientation (AOS)"}
_LEVEL_COLORS = {"easy": "#1b9e77", "moderate": "#d95f02", "hard": "#7570b3"}


def format_table(result: Result, average: str = "R40", overlaps: Overlaps = "official") -> str:
    """Average precision in percent: classes down, metrics and levels across.

    Args:
        result: Result of `rakd.evaluation.kitti.evaluate`.
        average: "R40" or "R11".
        overlaps: Limits that ``result`` was evaluated with.

    Returns:
        Lines of text. Metrics that were not evaluated show a dash. The overlap limit of 3D boxes and of the view from
        above stands beside each class; for "loose" a last line says what 2D boxes and orientation keep.
    """
    notes = {name: f"{name} ({LIMITS[overlaps]['3d'][name]:g})" for name in CLASSES}
    width = max(map(len, notes.values()))
    head, levels = " " * width, f"AP {average}, %".ljust(width)
    for title in _TITLES.values():
        head += f" | {title:^23}"
        levels += " | " + " ".join(f"{level.capitalize()[:8]:>7}" for level in ("easy", "mod.", "hard"))
    rule = "-" * width + ("-+-" + "-" * 23) * len(_TITLES)
    rows = []
    for name in CLASSES:
        row = notes[name].ljust(width)
        for metric in _TITLES:
            figures = result[name][metric]
            values = figures["R40"] if average == "R40" else figures["R11"]
            cells = [f"{value:7.2f}" if figures["evaluated"] else f"{'-':>7}" for value in values]
            row += " | " + " ".join(cells)
        rows.append(row)
    if overlaps == "loose":
        kept = ", ".join(f"{name} {LIMITS[overlaps]['bbox'][name]:g}" for name in CLASSES)
        rows.append(f"Loose overlaps; 2D boxes and orientation keep the official ones: {kept}.")
    return "\n".join([head, levels, rule, *rows])


def format_ceilings(result: Result) -> str:
    """Say where few objects, or none, keep average precision low whatever the detections are, and what a dash means.

    Labels may be there and count at no difficulty: low 2D boxes, unknown ones (-1), much occlusion or truncation.
    For fewer than 41 the official rule takes at most one point of recall for each object, and leaves out the first of
    41: N objects, all found without a false one, reach (N - 1) / 40 by R40.

    Args:
        result: Result of `rakd.evaluation.kitti.evaluate`.

    Returns:
        Lines of text; none if every class has detections, and at least 41 objects of each difficulty.
    """
    few, none = [], []
    for name in CLASSES:
        counts = result[name]["3d"]["objects"]
        if not any(counts):
            none.append(name)
        reached = [f"{level} {100 * (n - 1) / 40:g}" for level, n in zip(LEVELS, counts, strict=True) if 0 < n < 41]
        if reached:
            few.append(f"{name} {', '.join(reached)}")
    lines = []
    if none:
        height, occlusion, truncation = DIFFICULTIES[-1]
        lines.append(
            f"Nothing to find: no labelled {' or '.join(none)} counts, so a 0 is no verdict on the detections. Objects "
            f"count if their 2D box is over {height:g} pixels high, with occlusion 0 to {occlusion} and truncation up "
            f"to {truncation:g} (rakd inspect counts them)."
        )
    if few:
        lines.append(
            "Few objects: by the official rule even perfect detections reach no more than (AP R40, %) "
            f"{'; '.join(few)}."
        )
    absent = [name for name in CLASSES if not any(figures["evaluated"] for figures in result[name].values())]
    if absent:
        lines.append(f"Not evaluated (-): no detection with a 2D or 3D box is of class {' or '.join(absent)}.")
    return "\n".join(lines)


def to_json(result: Result, overlaps: Overlaps = "official") -> str:
    """All figures and curves as JSON, and their limits; NaN, which JSON does not know, becomes null."""
    return json.dumps({"overlaps": overlaps, **without_nan(result)}, indent=1) + "\n"


def write_json(path: Path, result: Result, overlaps: Overlaps = "official") -> None:
    """Write all figures and curves as JSON, atomically."""
    write_text(path, to_json(result, overlaps))


def write_curves(path: Path, result: Result, overlaps: Overlaps = "official") -> None:
    """Draw the precision-recall curves of all classes and metrics as one picture, atomically.

    Args:
        path: A picture file; the suffix says which kind (.png, .pdf, .svg).
        result: Result of `rakd.evaluation.kitti.evaluate`.
        overlaps: Limits that ``result`` was evaluated with.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(_TITLES), 3.3 * len(CLASSES)), layout="constrained")
    figure.suptitle(f"KITTI precision over recall, {overlaps} overlaps", fontsize=15)
    axes = figure.subplots(len(CLASSES), len(_TITLES), sharex=True, sharey=True, squeeze=False)
    for row, name in zip(axes, CLASSES, strict=True):
        for axis, metric in zip(row, _TITLES, strict=True):
            figures = result[name][metric]
            for level, curve, mean in zip(LEVELS, figures["precision"], figures["R40"], strict=True):
                recall = [position / (len(curve) - 1) for position in range(len(curve))]
                label = f"{level}: {mean:.2f} %"
                if figures["evaluated"]:
                    axis.plot(recall, curve, color=_LEVEL_COLORS[level], linewidth=2, label=label)
            axis.set_title(f"{name}: {_TITLES[metric]}", fontsize=11)
            axis.set(xlim=(0, 1), ylim=(0, 1.03))
            axis.grid(color="#dddddd", linewidth=0.7)
            axis.spines[["top", "right"]].set_visible(False)
            if figures["evaluated"]:
                axis.legend(fontsize=9, loc="best", framealpha=0.85, title="AP R40", title_fontsize=9)
            else:
                axis.text(0.5, 0.5, "not evaluated", ha="center", va="center", color="#777777")
        row[0].set_ylabel("precision (AOS: similarity)")
    for axis in axes[-1]:
        axis.set_xlabel("recall")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)
