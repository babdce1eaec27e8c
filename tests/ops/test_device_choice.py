"""``auto`` takes the CUDA library only where it has code for the device at hand; no GPU is needed to test that."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rakd_ops import _backends, available_backends, release_memory
from rakd_ops._backends import can_run, choose_backend, explain_driver

SHIPPED = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "12.0+PTX")
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("architecture", "capability", "expected"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0", (7, 5), False),
        ("9.0+PTX", (9, 0), True),
        ("9.0+PTX", (12, 1), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        # A Tegra and a card of one major version run none of each other's machine code, whichever is the newer.
        ("8.6", (8, 7), False),
        ("8.7", (8, 9), False),
        ("8.7", (8, 7), True),
        ("8.0+PTX", (8, 7), True),
    ],
)
def test_compatibility(architecture: str, capability: tuple[int, int], expected: bool) -> None:
    assert can_run(architecture, capability) is expected


class Device:
    """A GPU that is not there: what torch would say of it, and how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability = (9, 0)
        self.driver = 13000
        self.architectures: tuple[str, ...] = SHIPPED
        self.asked = 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", self.ask)
        monkeypatch.setattr(_backends, "_driver_version", lambda: self.driver)
        self.toolkit = "13.0"
        monkeypatch.setattr(
            _backends,
            "build_info",
            lambda: {"cuda_toolkit": self.toolkit, "cuda_architectures": self.architectures},
        )
        monkeypatch.setattr(_backends, "_MISSING", dict.fromkeys(_backends.BACKENDS))
        monkeypatch.setattr(_backends, "_MISMATCHES", {})
        _backends._warn_slow.cache_clear()

    def ask(self, device: int) -> tuple[int, int]:
        self.asked += 1
        return self.capability


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (9, 0), (10, 3), (13, 0)])
def test_auto_takes_the_library_where_it_has_code(device: Device, capability: tuple[int, int]) -> None:
    device.capability = capability
    assert choose_backend("auto", GPU) == choose_backend("cuda", GPU) == "cuda"
    assert available_backends()["cuda"] is True
    assert device.asked == 1  # however many calls there are


@pytest.mark.parametrize(
    ("architectures", "capability"),
    [(("8.0", "9.0"), (7, 5)), (("9.0", "9.0+PTX"), (8, 6)), (SHIPPED, (8, 7)), ((), (9, 0))],
)
def test_auto_passes_over_a_library_that_cannot_run(
    device: Device, architectures: tuple[str, ...], capability: tuple[int, int]
) -> None:
    device.architectures, device.capability = architectures, capability
    wanted = "{}.{}".format(*capability)
    with pytest.warns(UserWarning, match="cuda tensors are served by the slower 'triton' backend"):
        assert choose_backend("auto", GPU) == "triton"
    reason = available_backends()["cuda"]
    assert isinstance(reason, str)
    assert f"the device has {wanted}. Build with TORCH_CUDA_ARCH_LIST={wanted}" in reason
    with pytest.raises(RuntimeError, match="backend: 'cuda' cannot run here: the CUDA library was built for"):
        choose_backend("cuda", GPU)
    assert choose_backend("triton", GPU) == "triton"


@pytest.mark.parametrize(
    ("toolkit", "driver", "good"),
    [
        ("13.0", 13000, True),
        ("13.2", 13000, True),  # minor versions are compatible
        ("13.0", 12090, False),
        ("12.6", 12020, True),
        ("12.6", 13010, True),
        ("12.6", 11080, False),
        ("", 11080, True),
        ("13.0", None, True),
    ],
)
def test_a_driver_serves_runtimes_of_its_major_version_and_older(toolkit: str, driver: int | None, good: bool) -> None:
    assert (explain_driver(toolkit, driver) is None) is good


@pytest.mark.parametrize(
    ("driver", "good"), [(13000, False), (13010, False), (13020, True), (14000, True), (None, True)]
)
def test_a_driver_compiles_ptx_up_to_its_own_version(driver: int | None, good: bool) -> None:
    assert (explain_driver("13.2", driver, from_ptx=True) is None) is good


def test_ptx_alone_asks_for_a_newer_driver(device: Device) -> None:
    device.toolkit, device.architectures = "13.2", ("8.0", "9.0", "9.0+PTX")
    assert choose_backend("cuda", GPU) == "cuda"
    _backends._MISMATCHES.clear()
    device.capability = (10, 0)
    with pytest.raises(RuntimeError, match=r"built with CUDA 13\.2; the driver here supports 13\.0"):
        choose_backend("cuda", GPU)


def test_auto_passes_over_a_library_that_is_too_new_for_the_driver(device: Device) -> None:
    device.driver = 12080
    with pytest.warns(UserWarning, match=r"slower 'triton' .*built with CUDA 13\.0; the driver here supports 12\.8"):
        assert choose_backend("auto", GPU) == "triton"
    with pytest.raises(RuntimeError, match=r"backend: 'cuda' cannot run here: .* update it or build anew"):
        choose_backend("cuda", GPU)


@pytest.mark.parametrize(("answer", "expected"), [(0, 12080), (1, None)])
def test_the_driver_tells_its_version(answer: int, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(version: Any) -> int:
        version._obj.value = 12080
        return answer

    asked: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name) or SimpleNamespace(cuDriverGetVersion=ask))
    assert _backends._driver_version() == expected
    assert asked == ["libcuda.so.1"]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert _backends._driver_version() is None

    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert _backends._driver_version() is None


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_backends, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(_backends.shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    monkeypatch.delenv("CC", raising=False)
    assert _backends._find_triton() is None
    monkeypatch.setattr(_backends.shutil, "which", lambda name: None)
    assert "finds no compiler" in str(_backends._find_triton())
    monkeypatch.setenv("CC", "/opt/cc")
    assert _backends._find_triton() is None
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: None)
    assert _backends._find_triton() == "triton is not installed"


def test_each_device_has_its_own_answer(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.architectures = ("9.0",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (8, 0))[index])
    assert choose_backend("auto", torch.device("cuda", 0)) == "cuda"
    with pytest.warns(UserWarning, match="slower 'triton'"):
        assert choose_backend("auto", torch.device("cuda", 1)) == "triton"


def test_tensors_on_the_cpu_ask_no_device(device: Device) -> None:
    assert choose_backend("auto", torch.device("cpu")) == "cpu"
    assert device.asked == 0


def test_a_device_that_cannot_be_asked_is_a_reason(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that was forked from one that uses CUDA; giving back memory of the CPU asks none."""

    def refuse() -> int:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", refuse)
    assert available_backends()["cuda"] == "Cannot re-initialize CUDA in forked subprocess"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a device was asked for"))
    release_memory()
    assert device.asked == 0


def test_fake_tensors_where_no_gpu_can_be_asked(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(index: int) -> tuple[int, int]:
        raise RuntimeError("Found no NVIDIA driver")

    monkeypatch.setattr(torch.cuda, "get_device_capability", ask)
    assert choose_backend("auto", GPU) == "cuda"


@pytest.mark.parametrize(("architectures", "chosen"), [(("9.0",), "cuda"), (("8.0",), "triton")])
def test_the_choice_is_made_while_compiling(
    device: Device, monkeypatch: pytest.MonkeyPatch, architectures: tuple[str, ...], chosen: str
) -> None:
    device.architectures = architectures
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler itself would use that GPU
    names: list[str] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        names.append(choose_backend("auto", GPU))
        return x + len(names)

    torch.compiler.reset()
    torch.compile(function, fullgraph=True, backend="eager")(torch.ones(2))
    assert names == [chosen]
