"""The cost of a call around its kernels, counted and not timed: torch operations that are dispatched."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import backend_params, pyramid, random_boxes
from torch.utils._python_dispatch import TorchDispatchMode

from rakd_ops import _schemas, level_weights, multilevel_roi_align, soft_roi_distill


class Count(TorchDispatchMode):
    """Counts what is dispatched, ours apart."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counter = self.ours if func.namespace == "rakd_ops" else self.others
        counter[func.name()] += 1
        return func(*args, **(kwargs or {}))


def lists(dtype: torch.dtype) -> list[torch.Tensor]:
    return [boxes[:, 1:].to(dtype) for boxes in random_boxes(8, 1).split([3, 0, 5])]


@pytest.mark.parametrize("backend", backend_params("cpu"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("form", ["list", "rows"])
def test_operations_of_a_training_call(backend: str, dtype: torch.dtype, weights: bool, form: str) -> None:
    maps = pyramid(3, dtype=torch.float32, requires_grad=True)
    expert = pyramid(3, dtype=torch.float32, seed=1)
    boxes: Any = lists(dtype) if form == "list" else random_boxes(8).to(dtype)
    options: dict[str, Any] = {"backend": backend}
    if weights:
        options |= {"box_weights": torch.rand(8), "level_weights": torch.rand(8, 4).half()}
    with Count() as count:
        loss = soft_roi_distill(maps, expert, boxes, **options)
    assert count.ours == {"rakd_ops::prepare_boxes": 1, "rakd_ops::distill_gradient": 1}
    assert count.others.total() == 0  # at most 4 are allowed
    with Count() as count:
        loss.backward()
    # The gradient of 1 that starts the way back, and the look at it; results are detached for the leaves.
    assert set(count.others) <= {"aten::ones_like", "aten::_local_scalar_dense", "aten::detach"}
    with Count() as count:
        multilevel_roi_align(expert, boxes, backend=backend)
    assert count.ours == {"rakd_ops::prepare_boxes": 1, "rakd_ops::align": 1}
    assert count.others.total() == 0
    with Count() as count:
        level_weights(boxes)
    assert count.ours == {"rakd_ops::level_weights": 1}
    assert count.others.total() == 0


ALLOCATION = 'dispatcher("aten::empty") API call failed'  # what torch before 2.13 tells through the stable ABI


@pytest.mark.parametrize("op", ["align", "prepare_boxes"])
@pytest.mark.parametrize(
    ("backend", "text", "state", "expected"),
    [
        ("cuda", "CUDA out of memory. Tried to allocate", "", "^CUDA out of memory. Tried to allocate$"),
        ("cuda", ALLOCATION, "", "^CUDA out of memory: .* API call failed$"),
        ("cuda", ALLOCATION, "captures", None),
        ("cuda", ALLOCATION, "failed before", None),
        ("cuda", "something else", "", None),
        ("cpu", ALLOCATION, "", None),
    ],
)
def test_compiled_code_that_finds_no_memory_tells_it_as_torch_does(
    backend: str, text: str, state: str, expected: str | None, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(text)

    def query() -> bool:
        if state == "failed before":
            raise RuntimeError("an illegal memory access was encountered")
        return True

    monkeypatch.setattr(torch.ops.rakd_ops, op, fail)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state == "captures")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=query))
    told = expected or ("illegal memory access" if state == "failed before" else text)
    with pytest.raises(RuntimeError, match=told if expected else re.escape(told)) as caught:
        _schemas.call(op, backend, [torch.zeros(1)])
    assert isinstance(caught.value, torch.OutOfMemoryError) == (expected is not None)
