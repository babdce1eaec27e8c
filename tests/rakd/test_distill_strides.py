"""Strides that the distiller finds by the sizes of images and maps."""

import pytest
import torch
from distill_cases import BOXES, images
from torch import nn

from rakd.distill import Distiller
from rakd.distill.checks import find_strides


def test_strides_of_patches_of_14_pixels_at_few_cells() -> None:
    for size, strides in ((224, (14.0, 28.0, 56.0)), (336, (14.0, 28.0, 56.0)), (512, (32.0, 64.0, 128.0))):
        maps = {str(s): torch.zeros(1, 2, int(size // s), int(size // s)) for s in strides}
        assert find_strides("strides", maps, (size, size)) == strides


def test_maps_of_one_level_alone() -> None:
    network = nn.Conv2d(3, 4, 8, stride=8)
    distiller = Distiller(nn.Conv2d(3, 5, 8, stride=8), canonical_size=24)
    assert distiller(images(), BOXES, network(images())).requires_grad
    assert distiller.strides == (8.0,)


@pytest.mark.parametrize(
    ("size", "cells", "strides"),
    [
        ((64, 96), [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)], (8, 16, 32, 64, 128)),
        ((640, 480), [(80, 60), (40, 30), (20, 15)], (8, 16, 32)),
        ((101, 99), [(26, 25), (13, 13)], (4, 8)),
        ((518, 518), [(37, 37)], (14,)),
        ((1333, 800), [(167, 100), (84, 50), (42, 25), (21, 13), (11, 7)], (8, 16, 32, 64, 128)),
    ],
)
def test_strides_are_found(size: tuple[int, int], cells: list[tuple[int, int]], strides: tuple[float, ...]) -> None:
    maps = [torch.rand(1, 2, *cell).requires_grad_() for cell in cells]
    distiller = Distiller(None, canonical_size=24)
    distiller(torch.zeros(1, 3, *size), [torch.tensor([[1.0, 1.0, 50.0, 60.0]])], maps, [m.detach() for m in maps])
    assert distiller.strides == strides


def test_strides_that_cannot_be_found() -> None:
    maps = [torch.rand(1, 2, 8, 8).requires_grad_(), torch.rand(1, 2, 8, 8).requires_grad_()]
    with pytest.raises(ValueError, match=r"could not find the stride of map '1' .* each level once"):
        Distiller(None)(torch.zeros(1, 3, 64, 64), [torch.zeros(0, 4)], maps, [m.detach() for m in maps])


def test_images_that_were_padded_inside_the_network() -> None:
    # 150 x 300 padded to 160 x 320: 3.75 and 7.5 would be exact.
    maps = [torch.rand(1, 2, 160 // stride, 320 // stride).requires_grad_() for stride in (4, 8, 16)]
    boxes = [torch.tensor([[1.0, 1.0, 50.0, 60.0]])]
    with pytest.raises(ValueError, match=r"could not find the stride of map '0' .* those that the network was given"):
        Distiller(None, canonical_size=24)(torch.zeros(1, 3, 150, 300), boxes, maps, [m.detach() for m in maps])
