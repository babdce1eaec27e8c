"""Deformable attention beside Hugging Face's implementation, which transformers' DETRs use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rakd.detector.monodetr.attention import DeformableAttention, sample_maps

pytest.importorskip("transformers")

SHAPES = [(6, 10), (3, 5), (2, 3)]
CELLS = sum(height * width for height, width in SHAPES)


def theirs(values: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    shapes = torch.tensor(SHAPES)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), shapes.prod(1).cumsum(0)[:-1]])
    module = MultiScaleDeformableAttention()
    result: Tensor = module(values, shapes, SHAPES, starts, places, weights, 64)
    return result


def case(points: int = 4, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(points)
    values = torch.randn(2, CELLS, heads, 8, generator=rng)
    places = 1.4 * torch.rand(2, 7, heads, len(SHAPES), points, 2, generator=rng) - 0.2  # some outside of the image
    weights = torch.rand(2, 7, heads, len(SHAPES) * points, generator=rng).softmax(-1)
    return values, places, weights.view(2, 7, heads, len(SHAPES), points)


@pytest.mark.parametrize("points", [1, 4])
def test_samples_and_gradients_are_theirs(points: int) -> None:
    ours = [value.clone().requires_grad_() for value in case(points)]
    other = [value.clone().requires_grad_() for value in case(points)]
    found, expected = sample_maps(ours[0], SHAPES, ours[1], ours[2]), theirs(*other)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for own, theirs_ in zip(ours, other, strict=True):
        assert own.grad is not None and theirs_.grad is not None
        torch.testing.assert_close(own.grad, theirs_.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("numbers", [2, 4])
def test_the_whole_module_is_theirs(numbers: int) -> None:
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        DeformableDetrMultiscaleDeformableAttention,
    )

    config = DeformableDetrConfig(d_model=16, num_feature_levels=len(SHAPES))
    other = DeformableDetrMultiscaleDeformableAttention(config, 4, 2)
    own = DeformableAttention(16, 4, len(SHAPES), 2)
    rng = torch.Generator().manual_seed(1)
    names = {"sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "value", "output_proj": "out"}
    for theirs_, mine in names.items():
        for parameter in ("weight", "bias"):
            values = 0.3 * torch.randn(getattr(getattr(own, mine), parameter).shape, generator=rng)
            getattr(getattr(own, mine), parameter).data.copy_(values)
            getattr(getattr(other, theirs_), parameter).data.copy_(values)
    query, memory = torch.randn(2, 7, 16, generator=rng), torch.randn(2, CELLS, 16, generator=rng)
    references = torch.rand(2, 7, numbers, generator=rng)
    shapes = torch.tensor(SHAPES)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), shapes.prod(1).cumsum(0)[:-1]])
    expected = other(
        hidden_states=query,
        encoder_hidden_states=memory,
        reference_points=references[:, :, None].expand(-1, -1, len(SHAPES), -1),
        spatial_shapes=shapes,
        spatial_shapes_list=SHAPES,
        level_start_index=starts,
    )[0]
    if numbers == 4:  # width and height: as distances to the four sides
        half = references[..., 2:] / 2
        references = torch.cat([references[..., :2], half[..., :1], half[..., :1], half[..., 1:], half[..., 1:]], -1)
    torch.testing.assert_close(own(query, references, memory, SHAPES), expected, rtol=0, atol=1e-6)
