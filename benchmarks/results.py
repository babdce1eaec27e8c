"""Shared by all programs here: rows of measurements and where they were made, CSV files, command lines, printed tables.

A kind of rows is a dataclass with the columns of its CSV file. Nothing here needs torchvision, of which processes that
only measure are kept free.
"""

from __future__ import annotations

import argparse
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
from typing import Any, NoReturn, TypeVar

import torch
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

import rakd_ops

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Machine:
    """Where and with which versions a run was measured."""

    device: str  # "cpu", or the GPU's name
    cpu: str  # the processor's model
    torch: str
    torchvision: str
    rakd: str
    commit: str  # of the sources; empty outside a checkout
    dirty: bool  # whether tracked files differed from it
    date: str  # when it was measured (UTC)


@dataclass(frozen=True, kw_only=True)
class Row(Machine):
    """One measurement of an op."""

    op: str  # "distill" or "align"
    workload: str
    kind: str  # how its boxes are drawn
    batch: int  # images
    boxes: int  # of the whole batch
    output_size: int  # bins along each axis
    sampling_ratio: int  # samples per bin and axis
    channels: int  # of each map
    height: int  # of the images, pixels
    width: int
    dtype: str  # of the maps
    layout: str  # "nchw" or "nhwc" (channels-last)
    implementation: str  # "rakd:<backend>" or a baseline
    passes: str  # "forward" (alone, without gradients) or "forward+backward"
    median_ms: float  # on a GPU end to end, of steps that follow one another
    p20_ms: float  # 20th percentile
    p80_ms: float  # 80th percentile
    repeats: int  # runs these come from
    peak_extra_mib: float | None  # rise of peak memory by one run; None where the system does not tell
    ratio: float  # of these times over those of ratio_to, round by round; the median
    ratio_to: str  # the first backend of rakd_ops measured
    bound_mib: float  # bytes that must move
    bound_fraction: float  # share of the time (on a GPU device time) in which a plain copy would move them
    copy_gb_s: float  # measured copy bandwidth, bytes read and written
    threads: int  # of torch, on the CPU
    host_us: float | None = None  # on a GPU: time until the call returns, microseconds
    host_p20_us: float | None = None
    host_p80_us: float | None = None
    device_us: float | None = None  # on a GPU: time of the kernels, with a cold L2 cache
    device_p20_us: float | None = None
    device_p80_us: float | None = None
    device_by: str | None = None  # "graph", or "profiler" and why
    launches: int | None = None  # on a GPU: kernels, copies and fills of one step

    @property
    def is_subject(self) -> bool:
        """Whether this is the backend that the ratios refer to."""
        return self.implementation == self.ratio_to


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

    commit, dirty = git_state(ROOT)
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


def _columns(kind: type) -> dict[str, str]:
    """Names and types of a CSV's columns: the measurement, then the machine."""
    types = {field.name: str(field.type) for field in fields(kind)}
    return dict(sorted(types.items(), key=lambda item: item[0] in Machine.__annotations__))


def write_rows(path: Path, kind: type[Kind], rows: Iterable[Kind]) -> None:
    """Write rows, which are dataclasses of one kind, to a CSV file, whole or not at all."""
    names = list(_columns(kind))
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_to_text(getattr(row, name)) for name in names] for row in rows)


def read_rows(path: Path, kind: type[Kind]) -> list[Kind]:
    """Read back what :func:`write_rows` wrote; columns that may be empty may also be missing.

    Raises:
        ValueError: The file is missing, has other columns, or a cell does not parse; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    columns = _columns(kind)
    rows = []
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        there = reader.fieldnames or ()
        missing = [name for name, type_ in columns.items() if name not in there and not type_.endswith("| None")]
        if missing:
            raise ValueError(f"{path}: not a benchmark CSV, lacks the columns {', '.join(missing)}")
        for number, cells in enumerate(reader, start=2):
            values = {}
            for name, type_ in columns.items():
                try:
                    values[name] = _from_text(type_, cells.get(name))
                except (KeyError, ValueError):
                    raise ValueError(f"{path}, line {number}: {name} is {cells.get(name)!r}") from None
            rows.append(kind(**values))
    return rows


def csv_path(out: Path, stem: str, device: str) -> Path:
    """Name a run's CSV after its subject, place and time."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    return out / f"{stem}-{device}-{now}.csv"


class Parser(argparse.ArgumentParser):
    """Reads a program's command line; a wrong one is a ``ValueError`` that names the option.

    Args:
        program: Name of the module.
        text: Description of the program.
        out: Default of ``--out``: a folder, for a file that :func:`csv_path` names, or the file itself.
    """

    def __init__(self, program: str, text: str | None, out: str = "runs/benchmarks") -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python -m {program}", description=text, formatter_class=form)
        kind = "the file" if Path(out).suffix else "folder of the results"
        self.add_argument("--out", type=Path, default=Path(out), help=f"{kind} (default: {out})")

    def error(self, message: str) -> NoReturn:
        """Raise, instead of printing the usage and ending the process."""
        raise ValueError(message.removeprefix("argument --"))

    def add_names(self, name: str, choices: Sequence[str], text: str = "", default: Sequence[str] = ()) -> None:
        """Add an option that takes some of these names; without a default all of them."""
        text = f"{text}: {', '.join(choices)} (default: {' '.join(default) or 'all'})"
        self.add_argument(
            name, nargs="+", choices=choices, default=default or choices, metavar="NAME", help=text.removeprefix(": ")
        )

    def add_number(
        self, name: str, default: int | None, minimum: int = 1, text: str = "", *, multiple: int = 1
    ) -> None:
        """Add an option that takes a whole number; the text names a default that is None here."""
        text = text if default is None else f"{text} (default: {default})".strip()
        self.add_argument(name, type=at_least(minimum, multiple), default=default, metavar="N", help=text)

    def add_threads(self) -> None:
        """Add ``--threads``, which are torch's on the CPU."""
        self.add_argument("--threads", type=_thread_count, default="0", help="of torch; 0: torch's own number")


def at_least(minimum: int, multiple: int = 1) -> Callable[[str], int]:
    """Make the type of an option that takes whole numbers from ``minimum``, perhaps multiples of a number alone."""
    kind = "whole number" if multiple == 1 else f"multiple of {multiple}"

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum or int(text) % multiple:
            raise argparse.ArgumentTypeError(f"expected a {kind} of at least {minimum}, got {text}")
        return int(text)

    return parse


def _thread_count(text: str) -> int:
    return at_least(0)(text) or torch.get_num_threads()


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


def progress(total: int | None, unit: str) -> tqdm[Any]:
    """Make a progress bar on stderr."""
    return tqdm(total=total, unit=unit, file=sys.stderr, dynamic_ncols=True, leave=False)


def run_apart(call: str, *words: object) -> list[list[float]]:
    """Run code in a process of its own, with words in ``sys.argv``, and return the numbers of each line that it prints.

    Raises:
        subprocess.CalledProcessError: It failed; its error stands on stderr.
    """
    command = [sys.executable, "-W", "ignore", "-c", call, *map(str, words)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    return [list(map(float, line.split())) for line in printed.splitlines()]


def report(path: Path, kind: type[Kind], rows: Sequence[Kind], table: str) -> None:
    """Write rows to a CSV file, and print their table."""
    write_rows(path, kind, rows)
    print(f"{table}\n{len(rows)} rows in {path}")


def format_time(time: float) -> str:
    """Write a time with three digits that mean something."""
    digits = 3 if time < 1.0 else 2 if time < 10.0 else 1 if time < 100.0 else 0
    return f"{time:.{digits}f}"


def format_ratio(ratio: float) -> str:
    """Write a ratio with two or three digits."""
    digits = 2 if ratio < 1.0 else 1 if ratio < 10.0 else 0
    return f"{ratio:,.{digits}f}×"


def time_cells(median: float, p20: float, p80: float) -> list[str]:
    """Write a median and its spread as two cells of a table."""
    return [format_time(median), f"{format_time(p20)}-{format_time(p80)}"]


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """Lay out cells for the terminal: the heading first, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(others, widths[1:], strict=True))]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)
