"""``python -m benchmarks.resources``: registers, shared memory, spills and instructions of the CUDA kernels as built.

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
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

import rakd_ops
from rakd.files import write_text

_USAGE = re.compile(r"Function (\S+?):\s*\n\s*(REG:\d+.*)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)")
# Counted apart: multiply-adds, loads and stores of global and of shared memory, barriers.
OPERATIONS = ("FFMA", "DFMA", "LDG", "STG", "LDS", "STS", "BAR")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture.

    Attributes:
        architecture: Such as ``sm_90``.
        kernel: Name and element type.
        registers: Per thread.
        stack_bytes: Per thread, in local memory: spilled registers and indexed arrays.
        shared_bytes: Static shared memory of a block; dynamic shared memory depends on the call.
        instructions: In the code, once each, however often a loop runs them; 0: not known.
        operations: Of these, those of ``OPERATIONS``.
    """

    architecture: str
    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int = 0
    operations: tuple[int, ...] = (0,) * len(OPERATIONS)


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
            registers, stack, shared = (int(numbers.get(key, 0)) for key in ("REG", "STACK", "SHARED"))
            usages.append(Usage(architecture[1], plain_name(mangled), registers, stack, shared))
    return sorted(usages, key=lambda usage: (int(re.sub(r"\D", "", usage.architecture)), usage.kernel))


def count_instructions(dump: str) -> dict[tuple[str, str], Counter[str]]:
    r"""Read the output of ``cuobjdump --dump-sass``: instructions by name, for each architecture and kernel.

    Examples:
        >>> line = "  /*0010*/  @!P0 FFMA R0, R1, R2, R3 ;  /* 0x00 */"
        >>> count_instructions(f"Fatbin elf code:\n arch = sm_90\n Function : a\n{line}\n{line}")
        {('sm_90', 'a'): Counter({'FFMA': 2})}
    """
    counts = {}
    for section in dump.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = (\S+)", section)
        for function in section.split("Function : ")[1:]:
            name, _, code = function.partition("\n")
            if architecture is not None:
                counts[architecture[1], plain_name(name.strip())] = Counter(_INSTRUCTION.findall(code))
    return counts


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

    def dump(what: str) -> str:
        command = [str(find_cuobjdump()), what, str(libraries[0])]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    counts = count_instructions(dump("--dump-sass"))
    usages = []
    for usage in parse(dump("--dump-resource-usage")):
        count = counts.get((usage.architecture, usage.kernel), Counter[str]())
        operations = tuple(count[name] for name in OPERATIONS)
        usages.append(replace(usage, instructions=count.total(), operations=operations))
    print(table(usages))
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    header = ["architecture", "kernel", "registers", "stack_bytes", "shared_bytes", "instructions"]
    writer.writerow([*header, *(name.lower() for name in OPERATIONS)])
    for u in usages:
        figures = (u.registers, u.stack_bytes, u.shared_bytes, u.instructions)
        writer.writerow([u.architecture, u.kernel, *figures, *u.operations])
    write_text(out, rows.getvalue())
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
