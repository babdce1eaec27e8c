"""The log of a training run: a row every few steps, in memory, in checkpoints, and in files as CSV and JSON lines."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any

from rakd.files import without_nan, write_text

Row = dict[str, float]
"""A row of the log by column."""

_BEFORE, _AFTER = ("step", "lr"), ("total", "grad_norm", "seconds", "images_per_second")
RESERVED = frozenset(_BEFORE + _AFTER)
"""Columns that are not loss terms."""


class Log:
    """Gathers steps and makes rows of them.

    A row has ``step`` (steps done), ``lr`` (of the last step), each loss term, their ``total`` and ``grad_norm``
    (before clipping), which are means over the steps since the last row, ``seconds`` (trained since the first
    step, interruptions not counted) and ``images_per_second``. Steps whose float16 gradients overflowed do not
    count into ``grad_norm``; it is infinite if all did.

    Args:
        every: Steps a row.
        batch_size: Images a step.

    Attributes:
        rows: The rows so far.
        validations: The step and the metric of each validation.
    """

    def __init__(self, every: int, batch_size: int) -> None:
        self.every = every
        self.batch_size = batch_size
        self.rows: list[Row] = []
        self.validations: list[Row] = []
        self._steps: list[Row] = []  # those since the last row
        self._seconds = 0.0

    def add(
        self, step: int, lr: float, terms: Mapping[str, float], grad_norm: float, seconds: float, *, last: bool
    ) -> None:
        """Add a step.

        Args:
            step: How many steps are done, with this one.
            lr: Its learning rate.
            terms: Its loss terms, the same names in every step.
            grad_norm: Norm of its gradient.
            seconds: How long it took.
            last: Whether it ends the run; what is gathered then makes a row in any case.
        """
        self._steps.append({**terms, "total": sum(terms.values()), "grad_norm": grad_norm, "seconds": seconds})
        self._seconds += seconds
        if step % self.every == 0 or last:
            steps, self._steps = self._steps, []
            row: Row = {"step": step, "lr": lr}
            for name in (*terms, "total"):
                row[name] = sum(values[name] for values in steps) / len(steps)
            norms = [values["grad_norm"] for values in steps if isfinite(values["grad_norm"])]
            row["grad_norm"] = sum(norms) / len(norms) if norms else inf
            row["seconds"] = self._seconds
            row["images_per_second"] = self.batch_size * len(steps) / sum(values["seconds"] for values in steps)
            self.rows.append(row)

    def add_validation(self, step: int, metric: str, value: float) -> bool:
        """Add a validation, and tell whether it is the best so far; of equals, the last; NaN never is."""
        best = max((row[metric] for row in self.validations if metric in row and not isnan(row[metric])), default=-inf)
        self.validations.append({"step": step, metric: value})
        return value >= best

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from; plain lists, dicts and numbers."""
        return {"rows": self.rows, "validations": self.validations, "steps": self._steps, "seconds": self._seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.rows, self._steps = list(state["rows"]), list(state["steps"])
        self.validations = list(state["validations"])
        self._seconds = float(state["seconds"])

    def write(self, path: Path) -> None:
        """Write all rows as CSV, and beside it as JSON lines with the validations; nothing while there is no row.

        Both files are written atomically. Numbers that are not finite are null in JSON.
        """
        if self.rows:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(self.rows[0])
            writer.writerows(
                [int(value) if name == "step" else f"{value:.8g}" for name, value in row.items()] for row in self.rows
            )
            write_text(path, text.getvalue())
            lines = sorted([*self.rows, *self.validations], key=lambda row: row["step"])
            write_text(path.with_suffix(".jsonl"), "".join(json.dumps(without_nan(row)) + "\n" for row in lines))


def losses_of(row: Row, *others: str) -> Row:
    """The loss terms of a row of a log, and the columns named besides."""
    return {key: value for key, value in row.items() if key not in RESERVED or key in others}


def last_losses(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of each loss term over the last twentieth of the rows: single batches scatter."""
    last = [losses_of(row) for row in rows[-max(1, len(rows) // 20) :]]
    return {name: sum(row[name] for row in last) / len(last) for name in last[0]}
