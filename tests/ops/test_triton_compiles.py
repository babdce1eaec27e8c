"""Every Triton kernel compiles to machine code, without a GPU: ptxas comes with triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import as_layout, pyramid, random_boxes

triton = pytest.importorskip("triton", reason="triton is not installed")
from rakd_ops._triton import operations, preparation  # noqa: E402

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}
KERNELS = {"weigh_levels", "sample_bins", "distill_rows", "align_rows", "gather_tiles"}


def signature_of(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What triton would compile for these arguments: it specialises on ones and on multiples of 16."""
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, i)) for i, item in enumerate(value))
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
    layout: str = "contiguous",
    ratio: int = 2,
    assignment: int = 0,
    expert_scale: float = 1.0,
    channels: int = 64,
    strides: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0),
    boxes: int = 3,
    bins: int = 7,
    vast: bool = False,
) -> None:
    """All four ops on small maps; with the launcher replaced their results mean nothing."""
    steps = [s * expert_scale for s in strides]
    maps = pyramid(1, channels=channels, dtype=dtype, layout=layout, strides=strides)
    expert = pyramid(1, channels=channels, dtype=dtype, layout=layout, strides=tuple(steps), seed=1)
    if vast:  # an offset that only 64 bits hold
        maps[0] = torch.empty_strided(maps[0].shape, (2**33, *maps[0].stride()[1:]), dtype=dtype)
    rows = random_boxes(boxes)
    geometry = ([bins, bins], ratio, assignment, 1.0, 224.0, 4.0)
    distill = (maps, expert, rows, torch.ones(boxes, dtype=torch.float64), list(strides), steps, *geometry)
    operations.distill_loss(*distill)
    operations.distill_gradient(*distill, True, True)
    operations.align(maps, rows, list(strides), *geometry)
    shapes = [n for m in maps for n in m.shape]
    last = [layout == "channels_last"] * len(maps)
    gradient = as_layout(torch.rand(boxes, channels, bins, bins).to(dtype), layout)
    operations.align_backward(gradient, rows, shapes, last, list(strides), *geometry)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32, "vast": True},
        {"dtype": torch.float64, "layout": "channels_last", "ratio": 0, "assignment": 1},
        {"dtype": torch.float16, "layout": "channels_last", "expert_scale": 0.5, "assignment": 2},
        {"dtype": torch.bfloat16, "layout": "strided", "channels": 5, "boxes": 130},
        # Triton turns arguments that are 1 into constants.
        {"dtype": torch.bfloat16, "channels": 1, "strides": (200.0,), "ratio": 1, "boxes": 1, "bins": 1},
    ],
    ids=["float32", "float64", "float16", "bfloat16", "ones"],
)
def test_kernels_compile(architecture: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(architecture)
    monkeypatch.setattr(preparation, "launch", compiler)
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
