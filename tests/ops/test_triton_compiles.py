"""Every Triton kernel compiles to machine code, without a GPU: ptxas comes with triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import as_layout, random_boxes

triton = pytest.importorskip("triton", reason="triton is not installed")
from rakd_ops._triton import launch  # noqa: E402

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}
KERNELS = {"sample_bins", "distill_rows", "align_rows", "gather_tiles"}


def signature_of(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What triton would compile for these arguments: it specialises on ones and on multiples of 16."""
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            described = [describe(item, (*path, i)) for i, item in enumerate(value)]
            return type(value)(*described) if hasattr(value, "_fields") else tuple(described)
        if isinstance(value, float):
            return "fp64"
        if isinstance(value, int) and value == 1:
            constexprs[path] = 1
            return "constexpr"
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if number % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    names = kernel.arg_names
    signature = {names[i]: describe(value, (i,)) for i, value in enumerate(arguments)}
    signature |= dict.fromkeys(constants, "constexpr")
    assert list(signature) == names
    return signature, constexprs, attributes


class Compiler:
    """Stands in for the launcher: compiles what would have been launched."""

    def __init__(self, architecture: int) -> None:
        self.target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
        self.compiled: list[tuple[str, Any]] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        assert len(grid) <= 3
        constants = {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
        signature, constexprs, attributes = signature_of(kernel, arguments, constants)
        source = triton.compiler.ASTSource(kernel, signature, constexprs, attributes)
        self.compiled.append((kernel.__name__, triton.compile(source, target=self.target, options=options)))


def run_all(
    dtype: torch.dtype,
    expert_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    ratio: int = 2,
    expert_scale: float = 1.0,
    channels: tuple[int, ...] = (64,) * 4,
    strides: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0),
    boxes: int = 3,
    bins: int = 7,
    factor: tuple[int, ...] | None = None,
    vast: bool = False,
) -> None:
    """All four ops on small maps; with the launcher replaced their results mean nothing."""
    steps = [s * expert_scale for s in strides]
    sides = []
    for side_dtype, side_strides in ((dtype, strides), (expert_dtype or dtype, steps)):
        shapes = [(1, c, int(64 // s) + 1, int(96 // s) + 1) for c, s in zip(channels, side_strides, strict=True)]
        sides.append([as_layout(torch.rand(shape).to(side_dtype), layout) for shape in shapes])
    maps, expert = sides
    if vast:  # an offset that only 64 bits hold
        maps[0] = torch.empty_strided(maps[0].shape, (2**33, *maps[0].stride()[1:]), dtype=dtype)
    rows = torch.cat([random_boxes(boxes), torch.ones(boxes, len(strides), dtype=torch.float64)], dim=1)
    index = torch.tensor([0, boxes, *range(boxes)], dtype=torch.int32)
    geometry = ([bins, bins], ratio)
    launch.distill_loss(maps, expert, rows, index, list(strides), steps, *geometry)
    scale = None if factor is None else torch.ones(factor)
    launch.distill_gradient(maps, expert, rows, index, scale, list(strides), steps, *geometry, True, True)
    aligned = [m[:, : min(channels)] for m in maps]
    launch.align(aligned, rows, index, list(strides), *geometry)
    shapes = [n for m in aligned for n in m.shape]
    last = [layout == "channels_last"] * len(maps)
    gradient = as_layout(torch.rand(boxes, min(channels), bins, bins).to(dtype), layout)
    launch.align_backward(gradient, rows, index, shapes, last, list(strides), *geometry)


@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32, "vast": True, "channels": (64, 128, 256, 256)},
        {"dtype": torch.bfloat16, "expert_dtype": torch.float64, "layout": "channels_last", "ratio": 0, "factor": (3,)},
        {"dtype": torch.float16, "layout": "channels_last", "expert_scale": 0.5, "factor": ()},
        {"dtype": torch.bfloat16, "expert_dtype": torch.float32, "layout": "strided", "channels": (1, 5, 40, 65),
         "boxes": 130},
        # Triton turns arguments that are 1 into constants.
        {"dtype": torch.bfloat16, "channels": (1,), "strides": (200.0,), "ratio": 1, "boxes": 1, "bins": 1},
    ],
    ids=["float32", "float64", "float16", "bfloat16", "ones"],
)  # fmt: skip
def test_kernels_compile(architecture: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(architecture)
    monkeypatch.setattr(launch, "launch", compiler)
    run_all(**options)
    assert {name for name, _ in compiler.compiled} == KERNELS
    for name, kernel in compiler.compiled:
        assert kernel.asm["cubin"], name
        ptx = kernel.asm["ptx"]
        assert "atom." not in ptx and "red.global" not in ptx, name
        if name == "sample_bins":  # positions are rounded after each operation, as in the reference
            assert "fma.rn.f64" not in ptx and "mul.rn.f64" in ptx and "add.rn.f64" in ptx
            assert "div.approx" not in ptx and "div.full" not in ptx
            assert "cvt.f64.f32" not in ptx, "a constant or argument went through float32"


def test_grids_stay_within_what_cuda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        __name__ = "some"

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_: None

    launch.launch(Kernel(), (2**31 - 1, 1), torch.zeros(1))
    for grid in ((1, 2**16), (1, 1, 2**16), (2**16, 2**15)):  # the driver refuses the first two, triton skips the third
        with pytest.raises(ValueError, match="maps and boxes: expected fewer, for some would have the grid"):
            launch.launch(Kernel(), grid, torch.zeros(1))
    grids = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    images = 70_000  # crops, as a batch
    rows, index = torch.zeros(0, 6, dtype=torch.float64), torch.zeros(images + 1, dtype=torch.int32)
    maps = [torch.zeros(1).expand(images, 3, 4, 4)]
    launch.distill_gradient(maps, maps, rows, index, None, [4.0], [4.0], [7, 7], 2, True, False)
    assert grids[-1] == (images, 1)
