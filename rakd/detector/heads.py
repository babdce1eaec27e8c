"""The heads behind the pooling: class and 2D box, attributes of the 3D box, and what its distance follows from."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rakd.data.targets import CLASSES

KEYPOINTS = 9
"""8 projected corners and the projected 3D centre."""

MEAN_DIMENSIONS = ((1.53, 1.63, 3.88), (1.76, 0.66, 0.84), (1.74, 0.60, 1.76))
"""Height, width and length in metres that predictions start from, by class: rounded means of KITTI's labels."""

MIN_RATIO = 0.05  # of proposal height to projected height; keeps distances positive
MIN_HEIGHT = 0.1  # metres
_UNCERTAINTY = 3.0  # bound of log-uncertainties: sure predictions must not drown the other terms' gradients


@dataclass(frozen=True, eq=False)
class Box3DPrediction:
    """Predictions of the attribute and distance heads for N boxes, for one class each.

    Attributes:
        dimensions: ``[N, 3]`` height, width, length, metres.
        dimensions_log: ``[N]`` log-uncertainty of the dimensions.
        angle: ``[N, 2]`` sine and cosine of the observation angle, not of unit length.
        angle_log: ``[N]`` log-uncertainty of the angle.
        keypoints: ``[N, 9, 2]`` corners and centre relative to the box's centre, in units of its width and height.
        center_log: ``[N]`` log-uncertainty of the centre.
        height: ``[N]`` physical height, metres.
        reciprocal: ``[N]`` one over the projected height, in units of one over the box's height.
        factors: ``[N, 3]`` a, b, c of the triangular factor ``[[exp(a), 0], [c, exp(b)]]`` of the inverse covariance
            of height and scaled reciprocal (`rakd.detector.losses.distance_loss`).
    """

    dimensions: Tensor
    dimensions_log: Tensor
    angle: Tensor
    angle_log: Tensor
    keypoints: Tensor
    center_log: Tensor
    height: Tensor
    reciprocal: Tensor
    factors: Tensor


class _Trunk(nn.Sequential):
    """Two hidden layers on the pooled features."""

    def __init__(self, channels: int, output_size: int, width: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(channels * output_size**2, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )


class BoxHead(nn.Module):
    """Class and 2D box, as in Faster R-CNN (arXiv 1506.01497).

    Args:
        channels: Channels of the pooled features.
        output_size: Bins of the pooled features along an axis.
        width: Of the hidden layers.
    """

    def __init__(self, channels: int, output_size: int, width: int) -> None:
        super().__init__()
        self.trunk = _Trunk(channels, output_size, width)
        self.scores = _predictor(width, len(CLASSES) + 1, 0.01)
        self.deltas = _predictor(width, 4 * len(CLASSES), 0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Predict from pooled features ``[N, C, P, P]``.

        Returns:
            Logits ``[N, 1 + classes]``, background first, and box deltas ``[N, classes, 4]``; float32.
        """
        hidden = self.trunk(pooled)
        return self.scores(hidden).float(), self.deltas(hidden).float().view(-1, len(CLASSES), 4)


class Box3DHead(nn.Module):
    """Dimensions, angle, keypoints and distance of the 3D box, two heads with hidden layers of their own (MonoRCNN++).

    Args:
        channels: Channels of the pooled features.
        output_size: Bins of the pooled features along an axis.
        width: Of the hidden layers.
    """

    mean_dimensions: Tensor

    def __init__(self, channels: int, output_size: int, width: int) -> None:
        super().__init__()
        self.attribute_trunk = _Trunk(channels, output_size, width)
        self.attributes = _predictor(width, (4 + 3 + 2 * KEYPOINTS + 1) * len(CLASSES), 0.01)
        self.distance_trunk = _Trunk(channels, output_size, width)
        self.distance = _predictor(width, 5 * len(CLASSES), 0.01)
        self.register_buffer("mean_dimensions", torch.tensor(MEAN_DIMENSIONS), persistent=False)

    def forward(self, pooled: Tensor, classes: Tensor) -> Box3DPrediction:
        """Predict for one class of each box.

        Args:
            pooled: ``[N, C, P, P]`` features of the boxes.
            classes: ``[N]`` int64, places in `rakd.data.labels.CLASSES`.
        """
        attributes = _of_class(self.attributes(self.attribute_trunk(pooled)), classes)
        distance = _of_class(self.distance(self.distance_trunk(pooled)), classes)
        mean = self.mean_dimensions[classes]
        factors = distance[:, 2:]
        return Box3DPrediction(
            dimensions=(mean + attributes[:, :3]).clamp(min=MIN_HEIGHT),
            dimensions_log=_bounded(attributes[:, 3]),
            angle=attributes[:, 4:6],
            angle_log=_bounded(attributes[:, 6]),
            keypoints=attributes[:, 7 : 7 + 2 * KEYPOINTS].reshape(-1, KEYPOINTS, 2),
            center_log=_bounded(attributes[:, -1]),
            height=(mean[:, 0] + distance[:, 0]).clamp(min=MIN_HEIGHT),
            reciprocal=(1 + distance[:, 1]).clamp(min=MIN_RATIO),
            factors=torch.stack([_bounded(factors[:, 0]), _bounded(factors[:, 1]), factors[:, 2]], dim=1),
        )


def _predictor(width: int, count: int, spread: float) -> nn.Linear:
    layer = nn.Linear(width, count)
    nn.init.normal_(layer.weight, std=spread)
    nn.init.zeros_(layer.bias)
    return layer


def _of_class(values: Tensor, classes: Tensor) -> Tensor:
    """The part ``[N, d]`` of ``values`` ``[N, classes * d]`` that belongs to each row's class, as float32."""
    rows = torch.arange(len(classes), device=classes.device)
    return values.float().view(len(classes), len(CLASSES), values.shape[1] // len(CLASSES))[rows, classes]


def _bounded(log: Tensor) -> Tensor:
    return log.clamp(-_UNCERTAINTY, _UNCERTAINTY)
