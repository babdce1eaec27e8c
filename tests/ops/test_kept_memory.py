"""Memory that the CPU backend keeps between calls: reused, never shared, given back, and never seen in results."""

import copy
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import pyramid
from processes import run_process

from rakd_ops import available_backends, multilevel_roi_align, release_memory, soft_roi_distill

KEPT_FROM = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
needs_keeping = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not KEPT_FROM or os.environ.get("RAKD_CPU_KEEP_MIB", "") != "",
    reason="memory is kept on Linux, under torch 2.11 and later, unless RAKD_CPU_KEEP_MIB says otherwise",
)
pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not True, reason="the CPU library is not installed")

BOXES = torch.tensor([[0, 20.0, 30.0, 220.0, 190.0], [1, 5.0, 9.0, 60.0, 70.0], [1, 300.0, 100.0, 400.0, 300.0]])


def make_maps(layout="contiguous", dtype=torch.float32, height=640):
    """Maps of which the finest is of 10 MiB in float32: large enough to be kept."""
    apprentice = pyramid(2, 64, height, 520, dtype=dtype, layout=layout, requires_grad=True)
    return apprentice, pyramid(2, 64, height, 520, dtype=dtype, layout=layout, seed=1)


def gradients(apprentice, expert, **options):
    loss = soft_roi_distill(apprentice, expert, BOXES, backend="cpu", **options)
    return torch.autograd.grad(loss, apprentice)


@needs_keeping
def test_memory_of_a_freed_gradient_serves_the_next():
    release_memory()
    maps = make_maps()
    first = gradients(*maps)
    address = first[0].data_ptr()
    del first
    assert gradients(*maps)[0].data_ptr() == address


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_stood_in_kept_memory_is_never_seen(layout, dtype):
    """Every element is written: untouched cells are zeros, also where another gradient stood before."""
    maps = make_maps(layout, dtype)
    release_memory()
    clean = [g.clone() for g in gradients(*maps)]
    for _ in range(3):
        dirty = gradients(*maps)
        for gradient in dirty:
            gradient.fill_(float("nan"))
        del dirty, gradient
        for again, before in zip(gradients(*maps), clean, strict=True):
            assert torch.equal(again, before)


def test_gradients_that_are_alive_share_nothing():
    maps = make_maps()
    held = [gradients(*maps) for _ in range(4)]
    expected = [g.clone() for g in held[0]]
    for number, maps_gradients in enumerate(held):
        for gradient in maps_gradients:
            gradient.fill_(number)
    for number, maps_gradients in enumerate(held):
        assert all(bool((gradient == number).all()) for gradient in maps_gradients)
    del held, maps_gradients, gradient
    assert all(torch.equal(g, e) for g, e in zip(gradients(*maps), expected, strict=True))


def test_a_gradient_outlives_the_release():
    maps = make_maps()
    gradient = gradients(*maps)[0]
    expected = gradient.clone()
    release_memory()
    gradients(*maps)[0].fill_(7.0)
    release_memory()
    assert torch.equal(gradient, expected)


def test_gradients_behave_like_any_tensor():
    gradient = gradients(*make_maps("channels_last"))[0]
    assert gradient.device == torch.device("cpu")
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    expected = gradient.clone()
    view = gradient[0]
    assert torch.equal(torch.from_numpy(gradient.numpy()), expected)
    assert torch.equal(gradient.share_memory_(), expected)
    assert torch.equal(copy.deepcopy(gradient), expected)
    assert torch.equal(gradient.resize_(1, 64, 160, 130), expected.resize_(1, 64, 160, 130))
    del gradient
    assert bool(view.isfinite().all())


def test_pooled_features_and_their_gradients():
    boxes = torch.cat([BOXES] * 100)
    features, _ = make_maps()
    first = multilevel_roi_align(features, boxes, output_size=7, backend="cpu")
    wanted = torch.autograd.grad(first.sum(), features)
    expected = [first.detach().clone(), *(g.clone() for g in wanted)]
    first.detach().fill_(float("nan"))
    wanted[0].fill_(float("nan"))
    del first, wanted
    again = multilevel_roi_align(features, boxes, output_size=7, backend="cpu")
    for value, before in zip((again, *torch.autograd.grad(again.sum(), features)), expected, strict=True):
        assert torch.equal(value, before)


def test_calls_from_several_threads():
    maps = make_maps()
    expected = [g.clone() for g in gradients(*maps)]
    wrong = []

    def work():
        for _ in range(10):
            if not all(torch.equal(g, e) for g, e in zip(gradients(*maps), expected, strict=True)):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@needs_keeping
def test_release_gives_memory_back():
    maps = make_maps(height=2560)
    gradients(*maps)
    kept = resident_mib()
    release_memory()
    assert kept - resident_mib() > 0.9 * maps[0][0].numel() * 4 / 2**20


PROGRAM = """
import torch
from rakd_ops import soft_roi_distill
maps = [torch.ones(1, 64, 160, 130, requires_grad=True)]
def step():
    boxes = [torch.tensor([[9.0, 9.0, 90.0, 90.0]])]
    loss = soft_roi_distill(maps, [torch.zeros(1, 64, 160, 130)], boxes, strides=(4,))
    return torch.autograd.grad(loss, maps)[0]
step()
addresses = [step().data_ptr() for _ in range(3)]
print(len(set(addresses)) == 1, addresses[0] % 2**21 == 0, float(step().sum()))
"""


@needs_keeping
@pytest.mark.parametrize("limit, kept", [(None, True), ("1024", True), ("0", False), ("1", False)])
def test_the_limit(limit, kept):
    """Memory of our own begins with a huge page; torch's does not, and a limit below the gradient's size keeps none."""
    result = run_process("-c", PROGRAM, RAKD_CPU_KEEP_MIB=limit)
    same, own, total = result.split()
    assert own == str(limit != "0")
    if kept:
        assert same == "True"
    assert float(total) > 0.0
