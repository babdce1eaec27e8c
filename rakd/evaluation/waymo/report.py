"""Rows of Waymo's evaluation for readers: a table as in papers, and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rakd.evaluation.waymo.scoring import ALL, RANGES, WaymoRow

_NOTES = {
    "official": "official: boxes in the vehicle frame, 101 score cut-offs",
    "pct": "pct: camera axes in a z-up metric, 11 score cut-offs; compare only with PCT, DEVIANT, MonoCoP",
}


def format_table(rows: Sequence[WaymoRow]) -> str:
    """AP and APH in percent: types and levels down, metrics and ranges across.

    Args:
        rows: Result of `rakd.evaluation.waymo.scoring.evaluate`.

    Returns:
        Lines of text; the first says which mode the numbers are of. A dash marks shards without truths.
    """
    first = rows[0]
    titles = {"ap": "AP", "aph": "APH"}
    if first.let:
        titles = {"ap": "LET-3D-AP", "aph": "LET-3D-APH", "apl": "LET-3D-APL"}
    table = {(row.type, row.level, row.range): row for row in rows}
    lines = [(row.type, row.level) for row in rows if row.range == ALL]
    left = f"{'Waymo, %':<10}  IoU  L"
    ranges = (ALL, *RANGES)
    head, names = " " * len(left), left
    for title in titles.values():
        head += f" | {f'{title} [{first.mode}]':^{8 * len(ranges) - 1}}"
        names += " | " + " ".join(f"{name:>7}" for name in ranges)
    text = [_NOTES[first.mode], head, names, "-" * len(left) + ("-+-" + "-" * (8 * len(ranges) - 1)) * len(titles)]
    for type_, level in lines:
        line = f"{type_:<10}  {table[type_, level, ALL].iou:<4g} {level}"
        for field in titles:
            cells = [table[type_, level, name] for name in ranges]
            line += " | " + " ".join(f"{100 * row[field]:7.2f}" if row.objects else f"{'-':>7}" for row in cells)
        text.append(line)
    return "\n".join(text)


def to_json(tables: Sequence[Sequence[WaymoRow]]) -> str:
    """The rows of all tables as one JSON list; each row says its mode and overlap."""
    return json.dumps([asdict(row) for rows in tables for row in rows], indent=1) + "\n"
