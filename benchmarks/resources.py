"""``python -m benchmarks.resources``: registers, shared memory and spills of the CUDA kernels, from the built library.

Needs no GPU: the figures are the compiler's. Prints a table and writes it as CSV. Reads the library with ``cuobjdump``,
from the CUDA toolkit or from Triton's package.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

import rakd_ops
from rakd.files import write_text

_USAGE = re.compile(r"Function (\S+?):\s*\n\s*(REG:\d+.*)")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture.

    Attributes:
        architecture: Such as ``sm_90``.
        kernel: Name and element type.
        registers: Per thread.
        stack_bytes: Per thread, in local memory: spilled registers and indexed arrays.
        shared_bytes: Static shared memory of a block; dynamic shared memory depends on the call.
    """

    architecture: str
    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int


def find_cuobjdump() -> Path:
    """Find the tool that reads compiled CUDA code.

    Raises:
        FileNotFoundError: It is neither on the PATH, nor in the CUDA toolkit, nor in Triton's package.
    """
    candidates = [Path("/usr/local/cuda/bin/cuobjdump")]
    if found := shutil.which("cuobjdump"):
        candidates.insert(0, Path(found))
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError("cuobjdump is not there: expected it on the PATH, in the CUDA toolkit or beside triton")


def plain_name(mangled: str) -> str:
    """Name and element type of a kernel, from the linker's name of it.

    Examples:
        >>> plain_name("_ZN4rakd3gpu6spreadIfEEvNS0_6SpreadIT_EE")
        'spread<float>'
        >>> plain_name("_ZN4rakd3gpu12distill_poolIfLb1EEEvNS0_11DistillPoolIT_EE")
        'distill_pool<float, true>'
    """
    match = re.match(r"_ZN4rakd3gpu(\d+)", mangled)
    if not match:
        return mangled
    start = match.end()
    name = mangled[start : start + int(match[1])]
    rest = mangled[start + int(match[1]) :]
    types = {"If": "float", "Id": "double", "I6__half": "half", "I13__nv_bfloat16": "bfloat16"}
    code, element = next(((code, text) for code, text in types.items() if rest.startswith(code)), ("", "?"))
    flag = re.match(r"Lb([01])E", rest[len(code) :])
    option = "" if flag is None else f", {'true' if flag[1] == '1' else 'false'}"
    return f"{name}<{element}{option}>"


def parse(dump: str) -> list[Usage]:
    """Read the output of ``cuobjdump --dump-resource-usage``, sorted by architecture and kernel."""
    usages = []
    for section in dump.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = (\S+)", section)
        if architecture is None:
            continue
        for mangled, line in _USAGE.findall(section):
            numbers = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", line))
            counts = [int(numbers.get(key, 0)) for key in ("REG", "STACK", "SHARED")]
            usages.append(Usage(architecture[1], plain_name(mangled), *counts))
    return sorted(usages, key=lambda usage: (int(re.sub(r"\D", "", usage.architecture)), usage.kernel))


def table(usages: list[Usage]) -> str:
    """Registers (and stack, where there is one) of each kernel, a column an architecture."""
    architectures = list(dict.fromkeys(usage.architecture for usage in usages))
    cells = {(u.kernel, u.architecture): f"{u.registers}{f'+{u.stack_bytes}' if u.stack_bytes else ''}" for u in usages}
    kernels = sorted({usage.kernel for usage in usages})
    lines = ["registers a thread (+ bytes of stack)", f"{'':28}" + "".join(f"{a:>10}" for a in architectures)]
    for kernel in kernels:
        lines.append(f"{kernel:28}" + "".join(f"{cells.get((kernel, a), '-'):>10}" for a in architectures))
    return "\n".join(lines)


def main(out: Annotated[Path, arg(metavar="CSV")] = Path("benchmarks/results/cuda_resources.csv")) -> int:
    """Print and write the kernels' resources.

    Args:
        out: File to write.

    Returns:
        Exit code.
    """
    libraries = sorted(Path(rakd_ops.__file__).parent.glob("_cuda*.so"))
    if not libraries:
        print("error: the CUDA library is not built; python -m rakd_ops says why", file=sys.stderr)
        return 2
    command = [str(find_cuobjdump()), "--dump-resource-usage", str(libraries[0])]
    usages = parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(table(usages))
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["architecture", "kernel", "registers", "stack_bytes", "shared_bytes"])
    writer.writerows([u.architecture, u.kernel, u.registers, u.stack_bytes, u.shared_bytes] for u in usages)
    write_text(out, rows.getvalue())
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
