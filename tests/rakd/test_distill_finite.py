"""Losses that are not finite: told at once on the CPU, a step later on a GPU, whichever of several it is."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distill_cases import BOXES, Network, images
from distiller_cases import features

from rakd.distill import Distiller
from rakd.distill.finite import FiniteCheck

MAPS = {"p2": torch.ones(1, 2, 3, 3), "p3": torch.tensor([1.0, float("nan"), float("inf")])}


class Loss:
    """A loss on a GPU that is not there."""

    device = torch.device("cuda", 1)

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value)

    def detach(self) -> "Loss":
        return self

    def isfinite(self) -> torch.Tensor:
        return self.value.isfinite()


class Gpus:
    """Which of two GPUs is the current one where the stream of the current one is taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = torch.device("cuda", 0)
        self.recorded: list[torch.device] = []
        self.arrived = False
        gpus, empty = self, torch.empty

        class Event:
            def record(self) -> None:
                gpus.recorded.append(gpus.current)

            def query(self) -> bool:
                return gpus.arrived

        def pinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            return empty(*size, **options)

        monkeypatch.setattr(torch, "empty", pinned)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpus.current.index != 1)

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before


def test_a_loss_on_another_gpu_than_the_current_one_is_awaited_in_its_own_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus, check = Gpus(monkeypatch), FiniteCheck()
    check(Loss(float("nan")), MAPS, MAPS)  # type: ignore[arg-type]
    check(Loss(1.0), MAPS, MAPS)  # type: ignore[arg-type]
    assert gpus.recorded == [torch.device("cuda", 1)]  # the first has not arrived: nothing is known, nothing is asked
    gpus.arrived = True
    with pytest.raises(FloatingPointError, match="of an earlier step is not finite; now: expert's map 'p3' has 2 of 3"):
        check(Loss(1.0), MAPS, MAPS)  # type: ignore[arg-type]
    for _ in range(3):
        check(Loss(1.0), MAPS, MAPS)  # type: ignore[arg-type]
    assert gpus.recorded == [torch.device("cuda", 1)] * 4


def test_a_loss_on_the_cpu_is_looked_at_at_once() -> None:
    check = FiniteCheck()
    check(torch.tensor(1.0), MAPS, MAPS)
    with pytest.raises(FloatingPointError, match="loss is not finite: all maps are finite, the largest value is 1 in"):
        check(torch.tensor(float("inf")), {"p2": MAPS["p2"]}, {"p2": MAPS["p2"]})


@pytest.mark.parametrize("side", ["expert", "apprentice"])
@pytest.mark.parametrize("level", [0, 2])
def test_what_is_not_finite_is_told_with_its_level(side: str, level: int) -> None:
    ours, theirs = features(), [m.detach() for m in Network((4, 6, 8), seed=1).features(images())]
    wrong = ours if side == "apprentice" else theirs
    wrong[level] = torch.where(torch.arange(wrong[level].shape[3]) == 1, torch.nan, wrong[level])
    with pytest.raises(FloatingPointError, match=rf"{side}'s map '{level}' has \d+ of \d+ values that are NaN or inf"):
        Distiller(None, canonical_size=24)(images(), BOXES, ours, theirs)
    huge = [1e25 * m for m in features()]
    with pytest.raises(
        FloatingPointError, match=r"all maps are finite, the largest value is .*e.25 in the apprentice's map"
    ):
        Distiller(None, canonical_size=24)(images(), BOXES, huge, theirs if side == "apprentice" else features())
