"""The CPU kernels as each instruction set has them: right values, and the same bits for any number of threads.

The instruction set is chosen once in a process; so this file is also a program, run in processes of its own::

    PYTHONPATH=tests python tests/ops/test_instruction_sets.py THREADS,THREADS... [EXPECTED]

It prints a digest of all results for each number of threads, and fails where they differ from those in the file
EXPECTED.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import pyramid, random_boxes
from processes import run_process

from rakd_ops import multilevel_roi_align, soft_roi_distill

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-2}
STRIDES = (4.0, 8.0, 16.0, 32.0)


def runs(layout: str) -> Iterator[tuple[torch.dtype, list[Any]]]:
    """Every dtype, both forms of the kernels, experts at the same and at another resolution."""
    batch, _, height, width = shape = (3, 35, 96, 192)
    boxes = random_boxes(60, batch, height, width)
    for dtype, size in [*((dtype, 7) for dtype in TOLERANCES), (torch.float32, 19)]:
        for steps in (STRIDES, (3.0, 6.0, 12.0, 24.0)):
            maps = pyramid(*shape, STRIDES, dtype, layout=layout, requires_grad=True)
            yield dtype, [maps, pyramid(*shape, steps, dtype, layout=layout, seed=1), boxes, size, steps]


def results(
    backend: str,
    maps: list[torch.Tensor],
    expert: list[torch.Tensor],
    boxes: torch.Tensor,
    size: int,
    steps: tuple[float, ...],
) -> list[torch.Tensor]:
    """Loss, losses, pooled values, and the gradients of each."""
    options: dict[str, Any] = {"output_size": size, "backend": backend}
    loss = soft_roi_distill(maps, expert, boxes, expert_strides=steps, **options)
    losses = soft_roi_distill(maps, expert, boxes, expert_strides=steps, reduction="none", **options)
    pooled = multilevel_roi_align(maps, boxes, **options)
    scalars = (loss, losses.sum() / 60, pooled.double().square().sum())
    return [loss, losses, pooled, *(g for scalar in scalars for g in torch.autograd.grad(scalar, maps))]


def main(several: str, expected: str | None = None) -> None:
    every = torch.load(expected) if expected else None
    digests = {threads: hashlib.sha256() for threads in map(int, several.split(","))}
    for layout in ("contiguous", "channels_last"):
        for number, (dtype, call) in enumerate(runs(layout)):
            for threads, digest in digests.items():
                torch.set_num_threads(threads)
                got = [t.detach() for t in results("cpu", *call)]
                for t in got:
                    digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
                for x, y in zip(got, every[number], strict=True) if every else ():
                    error, slack = float((x.double() - y).abs().max()), 1e-6 * (dtype == torch.float16)
                    assert error <= TOLERANCES[dtype] * float(y.abs().max()) + slack, (layout, dtype, error)
    print(*(digest.hexdigest() for digest in digests.values()))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The reference's results in float64; those of one layout, as they do not depend on it."""
    every = []
    for _, (maps, expert, *call) in runs("contiguous"):
        exact = [m.detach().double().requires_grad_() for m in maps]
        every.append([t.detach() for t in results("reference", exact, [m.double() for m in expert], *call)])
    path = tmp_path_factory.mktemp("reference") / "results.pt"
    torch.save(every, path)
    return str(path)


@pytest.fixture(scope="module")
def possible() -> list[str]:
    """The instruction sets that run here, as the error tells them."""
    message = run_process("-c", PROGRAM, RAKD_CPU_ISA="which").splitlines()[0]
    listed: str = re.findall("expected one of (.*), which can run here", message)[0]
    return listed.split(", ")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_is_right(isa: str, expected: str, possible: list[str]) -> None:
    """The kernels are compiled several times; the ones this machine would not choose are run as well."""
    if isa not in possible:
        pytest.skip(f"{isa} cannot run here; possible are {', '.join(possible)}")
    run_process(__file__, "2", expected, RAKD_CPU_ISA=isa)


def test_same_bits_for_any_number_of_threads() -> None:
    digests = run_process(__file__, "1,2,7").split()
    assert len(digests) == 3 and len(set(digests)) == 1


PROGRAM = """
import torch
from rakd_ops import multilevel_roi_align, soft_roi_distill
maps, box = [torch.ones(1, 2, 8, 8)], [torch.tensor([[0.0, 0.0, 20.0, 20.0]])]
for op, pyramids in ((soft_roi_distill, [maps, maps]), (multilevel_roi_align, [maps])):
    try:
        op(*pyramids, box, strides=(4,))
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""


@pytest.mark.parametrize(
    "variable, value, expected",
    [
        ("RAKD_CPU_ISA", "avx", "expected one of"),
        ("RAKD_CPU_ISA", "AVX2", "expected one of"),
        ("RAKD_CPU_KEEP_MIB", "abc", "expected a whole number of MiB"),
        ("RAKD_CPU_KEEP_MIB", "-1", "expected a whole number of MiB"),
        ("RAKD_CPU_KEEP_MIB", "1.5", "expected a whole number of MiB"),
        ("RAKD_CPU_KEEP_MIB", "1e3", "expected a whole number of MiB"),
    ],
)
def test_wrong_values_of_environment_variables_are_errors(variable: str, value: str, expected: str) -> None:
    """At every call, also after the first, and for work that needs neither large memory nor threads."""
    messages = run_process("-c", PROGRAM, **{variable: value}).splitlines()
    assert len(messages) == 2
    assert all(f"{variable}: {expected}" in message and f"got '{value}'" in message for message in messages)


if __name__ == "__main__":
    main(*sys.argv[1:])
