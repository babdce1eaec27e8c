"""Heads on the decoder's queries: class, box, dimensions, angle and distance of each; and the three-way distance."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rakd.data.targets import CLASSES
from rakd.detector.monodetr.layers import perceptron
from rakd.nn import widen

ANGLE_BINS = 12
"""Bins of the observation angle, each 30 degrees wide; the first one's middle is 0."""

_PRIOR = 0.01  # probability of a class at the start
_LOG = 7.0  # bound of the log-uncertainty of a distance: 1 mm to 1 km
_EDGE = 1e-5  # shares are kept this far from 0 and 1 before their logit is taken


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of one decoder layer for N queries of B images; all float32 (float64 in a network of float64).

    Attributes:
        logits: ``[B, N, classes]``.
        boxes: ``[B, N, 6]`` u, v of the projected 3D centre and distances from there to the left, right, top and
            bottom side of the 2D box, as shares of the image's width and height, 0..1.
        dimensions: ``[B, N, 3]`` height, width, length, metres.
        angles: ``[B, N, 2 * ANGLE_BINS]`` logits of the bins, and each bin's residual in radians.
        depth: ``[B, N, 2]`` logit-like distance, see `distances`, and log-uncertainty of the distance.
    """

    logits: Tensor
    boxes: Tensor
    dimensions: Tensor
    angles: Tensor
    depth: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Predictions":
        """Apply a function to each field."""
        return Predictions(*(function(getattr(self, field.name)) for field in fields(self)))


class Heads(nn.Module):
    """Predictions of one decoder layer.

    Args:
        channels: Of the queries.
        first: Whether the layer is the first one, whose boxes start small.
    """

    def __init__(self, channels: int, *, first: bool) -> None:
        super().__init__()
        self.classes = nn.Linear(channels, len(CLASSES))
        nn.init.constant_(self.classes.bias, -math.log((1 - _PRIOR) / _PRIOR))
        self.box = perceptron(channels, 6, 3)
        if first:
            last = self.box[-1]
            assert isinstance(last, nn.Linear)
            nn.init.constant_(last.bias[2:], -2.0)
        self.dimensions = perceptron(channels, 3, 2)
        self.angles = perceptron(channels, 2 * ANGLE_BINS, 2)
        self.depth = perceptron(channels, 2, 2)

    def forward(self, queries: Tensor, references: Tensor) -> Predictions:
        """Predict.

        Args:
            queries: ``[B, N, C]``.
            references: ``[B, N, 2]`` centres or ``[B, N, 6]`` boxes, which are refined.
        """
        depth = widen(self.depth(queries))
        return Predictions(
            logits=widen(self.classes(queries)),
            boxes=refine(widen(self.box(queries)), references),
            dimensions=widen(self.dimensions(queries)),
            angles=widen(self.angles(queries)),
            depth=torch.cat([depth[..., :1], depth[..., 1:].clamp(-_LOG, _LOG)], dim=-1),
        )


def refine(change: Tensor, references: Tensor) -> Tensor:
    """Boxes ``[B, N, 6]`` by a change of the logits of centres ``[B, N, 2]`` or of boxes ``[B, N, 6]``."""
    kept = references.clamp(_EDGE, 1 - _EDGE)
    start = F.pad((kept / (1 - kept)).log(), (0, 6 - references.shape[2]))
    return (change + start).sigmoid()


def distances(found: Predictions, expected: Tensor, focal: Tensor, height: float) -> Tensor:
    """The distance of each query ``[B, N]``: the mean of three, in metres.

    They are ``1 / (sigmoid(d) + 1e-6) - 1`` of the depth head, ``focal * h / max(t + b, 1 pixel)`` of dimensions and
    box, and the map of distances at the box's centre, between the centres of its outermost cells at the image's edges.

    Args:
        found: Predictions.
        expected: ``[B, h, w]`` map of distances, metres.
        focal: ``[B]`` vertical focal length, pixels.
        height: Height of the images, padding included, pixels.
    """
    regressed = 1 / (found.depth[..., 0].sigmoid() + 1e-6) - 1
    tall = ((found.boxes[..., 4] + found.boxes[..., 5]) * height).clamp(min=1.0)
    geometric = focal[:, None] * found.dimensions[..., 0] / tall
    places = 2 * found.boxes[..., None, :2].detach() - 1
    mapped = F.grid_sample(expected[:, None], places, align_corners=True)[:, 0, :, 0]
    return (regressed + geometric + mapped) / 3


def boxes_2d(boxes: Tensor) -> Tensor:
    """Corners ``[..., 4]`` (x1, y1, x2, y2) of boxes ``[..., 6]``, as shares too."""
    u, v, left, right, top, bottom = boxes.unbind(dim=-1)
    return torch.stack([u - left, v - top, u + right, v + bottom], dim=-1)


def decode_angles(angles: Tensor) -> Tensor:
    """Observation angles ``[...]`` in -π .. π, radians, from ``[..., 2 * ANGLE_BINS]``."""
    bins = angles[..., :ANGLE_BINS].argmax(dim=-1, keepdim=True)
    alpha = bins[..., 0] * (2 * math.pi / ANGLE_BINS) + angles[..., ANGLE_BINS:].gather(-1, bins)[..., 0]
    return alpha - 2 * math.pi * (alpha / (2 * math.pi)).round()


def encode_angles(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The bin, int64, and the residual in radians, of observation angles ``[...]``."""
    width = 2 * math.pi / ANGLE_BINS
    places = (alpha / width).round()
    return places.long() % ANGLE_BINS, alpha - places * width
