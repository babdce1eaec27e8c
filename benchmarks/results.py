"""Rows of measurements: their columns, how they are written to CSV and read back, and where they were measured."""

from __future__ import annotations

import contextlib
import csv
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch

import rakd_ops


@dataclass(frozen=True)
class Machine:
    """Where and with which versions a run was measured.

    Attributes:
        device: ``"cpu"``, or the GPU's name.
        cpu: The processor's model.
        torch: Version.
        torchvision: Version.
        rakd: Version.
        commit: Git commit of the sources; empty outside a checkout.
        dirty: Whether tracked files differed from that commit.
        date: When it was measured (UTC).
    """

    device: str
    cpu: str
    torch: str
    torchvision: str
    rakd: str
    commit: str
    dirty: bool
    date: str


@dataclass(frozen=True, kw_only=True)
class Row(Machine):
    """One measurement of an op.

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
        implementation: ``"rakd:<backend>"`` or a baseline.
        passes: ``"forward"`` (alone, without gradients) or ``"forward+backward"``.
        median_ms: Median time, milliseconds; on a GPU end to end, of steps that follow one another.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        repeats: Runs these come from.
        peak_extra_mib: Rise of peak memory by one run; None where the system does not tell.
        ratio: This implementation's median over that of ``ratio_to``, in the same interleaved runs.
        ratio_to: The first backend of ``rakd_ops`` measured.
        bound_mib: Bytes that must move.
        bound_fraction: Share of the measured time (on a GPU device time) in which a plain copy would move them.
        copy_gb_s: Measured copy bandwidth, bytes read and written.
        threads: Threads torch used on the CPU.
        host_us: On a GPU: time until the call returns, microseconds.
        host_p20_us: 20th percentile.
        host_p80_us: 80th percentile.
        device_us: On a GPU: time of the kernels, with a cold L2 cache.
        device_p20_us: 20th percentile.
        device_p80_us: 80th percentile.
        device_by: ``"graph"`` or ``"profiler"`` and why.
        launches: On a GPU: kernels, copies and fills of one step.
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
    implementation: str
    passes: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    peak_extra_mib: float | None
    ratio: float
    ratio_to: str
    bound_mib: float
    bound_fraction: float
    copy_gb_s: float
    threads: int
    host_us: float | None = None
    host_p20_us: float | None = None
    host_p80_us: float | None = None
    device_us: float | None = None
    device_p20_us: float | None = None
    device_p80_us: float | None = None
    device_by: str | None = None
    launches: int | None = None

    @property
    def is_subject(self) -> bool:
        """Whether this is the backend that the ratios refer to."""
        return self.implementation == self.ratio_to


@dataclass(frozen=True, kw_only=True)
class StepRow(Machine):
    """One kind of training step, as ``python -m benchmarks.training_cost`` measures it.

    Attributes:
        pair: Name of expert and apprentice together.
        expert: The expert's name.
        apprentice: The apprentice's name.
        batch: Images.
        boxes: Boxes of the whole batch in which features are compared.
        height: Image height, pixels.
        width: Image width, pixels.
        implementation: ``"alone"``, ``"expert"``, ``"rakd:<backend>"`` or ``"torchvision"``.
        median_ms: Median time of a step, milliseconds.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        repeats: Steps these come from.
        ratio: This step's median over that of ``"alone"``, in the same interleaved run.
        share: The loss's part beside a step in which the expert runs for nothing: median over the rounds of
            ``(this - expert) / expert``; None where there is no such loss.
        share_p20: 20th percentile.
        share_p80: 80th percentile.
        threads: Threads torch used on the CPU.
    """

    pair: str
    expert: str
    apprentice: str
    batch: int
    boxes: int
    height: int
    width: int
    implementation: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    ratio: float
    share: float | None
    share_p20: float | None
    share_p80: float | None
    threads: int


Kind = TypeVar("Kind")


def processor() -> str:
    """Return the processor's model, as Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state(folder: Path) -> tuple[str, bool]:
    """Return a checkout's commit, empty where there is none, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return ""

    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))


def describe_machine(device: str) -> Machine:
    """Describe this machine, the versions in use, and the sources."""
    # Here alone: it imports torch's compiler, which takes processes that only measure longer than all else.
    import torchvision  # type: ignore[import-untyped, unused-ignore]

    commit, dirty = git_state(Path(__file__).parent)
    return Machine(
        device=torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        cpu=processor(),
        torch=torch.__version__,
        torchvision=str(torchvision.__version__),
        rakd=rakd_ops.__version__,
        commit=commit,
        dirty=dirty,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``, which takes its place at the end; an error leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _to_text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _from_text(kind: str, text: str | None) -> object:
    """Parse a cell; ``kind`` is a field's annotation, which is a string here."""
    plain = kind.removesuffix(" | None")
    if plain != kind and not text:
        return None
    if text is None:
        raise ValueError("no such cell")
    if plain == "bool":
        return {"True": True, "False": False}[text]
    return {"int": int, "float": float, "str": str}[plain](text)


def write_rows(path: Path, kind: type[Kind], rows: Iterable[Kind]) -> None:
    """Write rows, which are dataclasses of one kind, to a CSV file, whole or not at all."""
    names = _columns(kind)
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_to_text(getattr(row, name)) for name in names] for row in rows)


def _columns(kind: type) -> list[str]:
    """Names of a CSV's columns: the measurement, then the machine."""
    names = [field.name for field in fields(kind)]
    return sorted(names, key=lambda name: name in Machine.__annotations__)


def _header(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as stream:
        return next(csv.reader(stream), [])


def _needed(kind: type) -> list[str]:
    types = {field.name: str(field.type) for field in fields(kind)}
    return [name for name in _columns(kind) if not types[name].endswith("| None")]


def read_rows(path: Path, kind: type[Kind]) -> list[Kind]:
    """Read back what :func:`write_rows` wrote; columns that may be empty may also be missing.

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
    missing = [name for name in _needed(kind) if name not in _header(path)]
    if missing:
        raise ValueError(f"{path}: not a benchmark CSV, lacks the columns {', '.join(missing)}")
    with path.open(newline="", encoding="utf-8") as stream:
        return [_parse_row(path, n, cells, kind) for n, cells in enumerate(csv.DictReader(stream), start=2)]


def _parse_row(path: Path, number: int, cells: dict[str, str], kind: type[Kind]) -> Kind:
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        try:
            values[field.name] = _from_text(str(field.type), cells.get(field.name))
        except (KeyError, ValueError):
            raise ValueError(f"{path}, line {number}: {field.name} is {cells.get(field.name)!r}") from None
    return kind(**values)


def read_all(paths: Sequence[Path]) -> list[Row]:
    """Read the rows of several files, which must hold at least one.

    Raises:
        ValueError: As :func:`read_rows`; or there are no files or no rows.
    """
    if not paths:
        raise ValueError("csv: expected at least one file")
    rows = [row for path in paths for row in read_rows(path, Row)]
    if not rows:
        raise ValueError(f"csv: no rows in {', '.join(map(str, paths))}")
    return rows


def csv_path(out: Path, stem: str, device: str) -> Path:
    """Name a run's CSV after its subject, place and time."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    return out / f"{stem}-{device}-{now}.csv"


def exit_with_errors(main: Callable[[], None]) -> None:
    """Run a program; a user's error becomes one line and exit code 2."""
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; finished cases are in the CSV", file=sys.stderr)
        sys.exit(130)
