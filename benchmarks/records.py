"""Rows of measurements: what each carries, how they are written to CSV and read back."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
import torchvision  # type: ignore[import-untyped, unused-ignore]

import rakd_ops
from rakd.files import replacing
from rakd.study.versions import processor


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        op: ``"distill"`` or ``"align"``.
        workload: Its name.
        kind: How its boxes are drawn.
        batch: Images.
        boxes: Boxes of the whole batch.
        output_size: Bins along each axis.
        sampling_ratio: Samples per bin and axis.
        channels: Channels of each map.
        height: Image height, pixels.
        width: Image width, pixels.
        dtype: Of the maps.
        layout: ``"nchw"`` or ``"nhwc"`` (channels-last).
        contender: Who was measured.
        what: ``"forward"`` (alone, without gradients) or ``"forward+backward"``.
        median_ms: Median time, milliseconds.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        repeats: Runs these come from.
        peak_extra_mib: Rise of peak memory by one run; None where the system does not tell.
        ratio: This contender's median over that of ``ratio_to``, in the same interleaved runs.
        ratio_to: The first backend of ``rakd_ops`` measured.
        floor_mib: Bytes that must move.
        floor_fraction: Share of the measured time in which a plain copy would move ``floor_mib``.
        copy_gb_s: Measured copy bandwidth, bytes read and written.
        device: ``"cpu"``, or the GPU's name.
        cpu: The processor's model.
        threads: Threads torch used on the CPU.
        torch: Version.
        torchvision: Version.
        rakd: Version.
        commit: Git commit of the sources; empty outside a checkout.
        dirty: Whether tracked files differed from that commit.
        date: When it was measured (UTC).
    """

    op: str
    workload: str
    kind: str
    batch: int
    boxes: int
    output_size: int
    sampling_ratio: int
    channels: int
    height: int
    width: int
    dtype: str
    layout: str
    contender: str
    what: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    peak_extra_mib: float | None
    ratio: float
    ratio_to: str
    floor_mib: float
    floor_fraction: float
    copy_gb_s: float
    device: str
    cpu: str
    threads: int
    torch: str
    torchvision: str
    rakd: str
    commit: str
    dirty: bool
    date: str

    @property
    def is_subject(self) -> bool:
        """Whether this is the backend that the ratios refer to."""
        return self.contender == self.ratio_to


@dataclass(frozen=True)
class StepRow:
    """One kind of training step, as ``python -m benchmarks.training_cost`` measures it.

    Attributes:
        pair: Name of expert and apprentice together.
        expert: The expert's name.
        apprentice: The apprentice's name.
        batch: Images.
        boxes: Boxes of the whole batch in which features are compared.
        height: Image height, pixels.
        width: Image width, pixels.
        contender: ``"alone"``, ``"expert"``, ``"rakd:<backend>"`` or ``"torchvision"``.
        median_ms: Median time of a step, milliseconds.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        repeats: Steps these come from.
        ratio: This step's median over that of ``"alone"``, in the same interleaved run.
        share: What the distillation loss adds to a step in which the expert runs for nothing, as a part of that
            step: median over the rounds of ``(this - expert) / expert``; None where there is no such loss.
        share_p20: 20th percentile.
        share_p80: 80th percentile.
        device: As all that follow: see :class:`Row`.
        cpu: Same.
        threads: Same.
        torch: Same.
        torchvision: Same.
        rakd: Same.
        commit: Same.
        dirty: Same.
        date: Same.
    """

    pair: str
    expert: str
    apprentice: str
    batch: int
    boxes: int
    height: int
    width: int
    contender: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    ratio: float
    share: float | None
    share_p20: float | None
    share_p80: float | None
    device: str
    cpu: str
    threads: int
    torch: str
    torchvision: str
    rakd: str
    commit: str
    dirty: bool
    date: str


@dataclass(frozen=True)
class RooflineRow:
    """One run under the machine's roofs, as ``python -m benchmarks.roofline`` places it.

    Attributes:
        workload: Its name.
        layout: Of the maps.
        contender: Who ran.
        threads: Torch's threads.
        median_ms: Median time, milliseconds.
        giga_operations: Of the two-matrix form, 10⁹; a multiply-add is two.
        mebibytes: The floor's bytes.
        intensity: Operations by byte.
        gflops: 10⁹ operations by second.
        copy_gb_s: Copy bandwidth in that run, 10⁹ bytes read and written by second.
        peak_gflops: Of a matrix product of this size, measured for this file.
        cpu: The processor.
        commit: Of the run.
    """

    workload: str
    layout: str
    contender: str
    threads: int
    median_ms: float
    giga_operations: float
    mebibytes: float
    intensity: float
    gflops: float
    copy_gb_s: float
    peak_gflops: float
    cpu: str
    commit: str


@dataclass(frozen=True)
class Machine:
    """Where and with what a run was measured; the fields are those of :class:`Row`."""

    device: str
    cpu: str
    torch: str
    torchvision: str
    rakd: str
    commit: str
    dirty: bool
    date: str


Kind = TypeVar("Kind", Row, StepRow, RooflineRow)


def _git(*arguments: str) -> str:
    """Output of a git command in the sources' folder; empty where there is no git or no checkout."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def describe_machine(device: str) -> Machine:
    """Describe this machine, the versions in use, and the sources."""
    cuda = torch.device(device).type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        cpu=processor(),
        torch=torch.__version__,
        torchvision=str(torchvision.__version__),
        rakd=rakd_ops.__version__,
        commit=_git("rev-parse", "HEAD"),
        dirty=bool(_git("status", "--porcelain", "--untracked-files=no")),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _to_text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _from_text(kind: str, text: str) -> object:
    """Parse a cell; ``kind`` is a field's annotation, which is a string here."""
    if kind == "float | None":
        return float(text) if text else None
    if kind == "bool":
        return {"True": True, "False": False}[text]
    return {"int": int, "float": float, "str": str}[kind](text)


def write_rows(path: Path, kind: type[Kind], rows: Iterable[Kind]) -> None:
    """Write rows, which are dataclasses of one kind, to a CSV file, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(field.name for field in fields(kind))
        writer.writerows([_to_text(getattr(row, field.name)) for field in fields(kind)] for row in rows)


def read_rows(path: Path, kind: type[Kind]) -> list[Kind]:
    """Read back what :func:`write_rows` wrote.

    Args:
        path: The CSV.
        kind: The rows' dataclass.

    Returns:
        The rows.

    Raises:
        ValueError: The file is missing, has other columns, or a cell does not parse; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = [field.name for field in fields(kind) if field.name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path}: not a benchmark CSV, lacks the columns {', '.join(missing)}")
        return [_parse_row(path, number, cells, kind) for number, cells in enumerate(reader, start=2)]


def _parse_row(path: Path, number: int, cells: dict[str, str], kind: type[Kind]) -> Kind:
    values = {}
    for field in fields(kind):
        try:
            values[field.name] = _from_text(str(field.type), cells[field.name])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, line {number}: {field.name} is {cells[field.name]!r}") from None
    return kind(**values)  # type: ignore[arg-type]


def holds_rows(path: Path, kind: type[Row] | type[StepRow]) -> bool:
    """Whether a file is a CSV with the columns of a kind of rows."""
    if not path.is_file():
        return False
    with path.open(newline="", encoding="utf-8") as stream:
        header = next(csv.reader(stream), [])
    return all(field.name in header for field in fields(kind))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows of an op's measurements to a CSV file, whole or not at all."""
    write_rows(path, Row, rows)


def read_csv(path: Path) -> list[Row]:
    """Read rows of an op's measurements back.

    Raises:
        ValueError: As :func:`read_rows`.
    """
    return read_rows(path, Row)


def read_all(paths: Sequence[Path]) -> list[Row]:
    """Read the rows of several files, which must hold at least one.

    Raises:
        ValueError: As :func:`read_csv`; or there are no files or no rows.
    """
    if not paths:
        raise ValueError("csv: expected at least one file")
    rows = [row for path in paths for row in read_csv(path)]
    if not rows:
        raise ValueError(f"csv: no rows in {', '.join(map(str, paths))}")
    return rows
