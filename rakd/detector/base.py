"""The interface of all detectors, which training, studies, inference, files, latency and export use."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rakd.data.labels import Objects
from rakd.data.targets import Targets
from rakd.detector.base_config import BaseConfig
from rakd.detector.decode import Boxes3D
from rakd.detector.pyramid import Pyramid
from rakd.geometry import Calibration


class BaseDetector(nn.Module):
    """Finds objects in space from one image.

    Boxes and points are in pixels of the images given; the centre of the first pixel is (0, 0), as in KITTI.

    Attributes:
        config: Its settings.
        pyramid: Backbone and feature maps, the bulk of the work.
        strides: Pixels per cell of each map that distillation compares.
        channels: Channels of each of them.
        has_queries: Whether `matched_boxes` can tell where it sees an image's objects.
    """

    config: BaseConfig
    pyramid: Pyramid
    strides: tuple[int, ...]
    channels: int
    has_queries: ClassVar[bool] = False

    @property
    def init_source(self) -> str:
        """Weights that the backbone started from, for people."""
        return self.pyramid.init_source

    @property
    def canonical_size(self) -> float:
        """Root of a box's area in pixels that distillation compares at stride 16."""
        raise NotImplementedError

    def extract_features(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps, fine to coarse.

        Args:
            images: ``[B, 3, H, W]`` in 0..1, RGB, padded to multiples of the coarsest stride.
        """
        features: dict[str, Tensor] = self.pyramid(images.contiguous(memory_format=torch.channels_last))
        return features

    def distilled_maps(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The maps that distillation compares, of those that `extract_features` gave."""
        return features

    def class_scores(self, features: dict[str, Tensor]) -> list[Tensor]:
        """How surely each cell of the distilled maps sees an object.

        Args:
            features: Result of `extract_features`.

        Returns:
            Logits ``[B, classes, H, W]`` of each map.

        Raises:
            NotImplementedError: It gives none, see `rakd.detector.base_config.BaseConfig.has_scores`.
        """
        raise NotImplementedError

    def losses(
        self,
        features: dict[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Targets],
        seeds: Sequence[int],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses of a batch. With several processes, averaged gradients are those of the whole batch.

        Args:
            features: Result of `extract_features` for the images.
            sizes: (width, height) of each image without padding.
            targets: Objects to find in each.
            seeds: A seed for each image, for all that is drawn at random; >= 0.

        Returns:
            The terms, to be summed, and for each image the detector's own boxes that lie on objects, ``[K, 4]``.

        Raises:
            ValueError: The arguments' lengths differ, or the detector is not in training mode.
        """
        raise NotImplementedError

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], calibrations: Sequence[Calibration]
    ) -> list[Objects]:
        """Same as `predict`."""
        return self.predict(images, sizes, calibrations)

    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], calibrations: Sequence[Calibration]
    ) -> list[Objects]:
        """Find the objects in images.

        Args:
            images: As for `extract_features`.
            sizes: (width, height) of each image without padding.
            calibrations: Camera of each image, as it was resized.

        Returns:
            Objects of each image with scores, best first, in the pixels of these images.

        Raises:
            ValueError: The arguments' lengths differ, or the detector is in training mode.
        """
        raise NotImplementedError

    def matched_boxes(self, features: dict[str, Tensor], targets: Sequence[Targets]) -> list[Tensor]:
        """The boxes of the queries that stand for an image's objects, such as an expert's for distillation.

        Args:
            features: Result of `extract_features` for the images.
            targets: The objects of each.

        Returns:
            ``[K, 4]`` per image in pixels, one for each object.

        Raises:
            ValueError: The detector is in training mode.
            NotImplementedError: It has no queries, see ``has_queries``.
        """
        raise NotImplementedError

    def locate(self, image: Tensor, size: Tensor, projection: Tensor) -> Boxes3D:
        """Find the objects in one image, with tensors in and out, for `torch.export`.

        Args:
            image: ``[1, 3, H, W]`` float32 in 0..1, RGB, zeros right of and below the image.
            size: ``[2]`` float32, width and height without the padding.
            projection: ``[3, 4]`` camera of this image, as `rakd.geometry.Calibration` has it.
        """
        raise NotImplementedError

    def check_losses(
        self,
        features: dict[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Targets],
        seeds: Sequence[int],
    ) -> None:
        """Refuse what `losses` cannot work with."""
        if not self.training:
            raise ValueError("losses needs the detector in training mode, call train() first")
        count = next(iter(features.values())).shape[0]
        if not len(sizes) == len(targets) == len(seeds) == count:
            raise ValueError(
                "sizes, targets and seeds must hold one entry an image, got "
                f"{len(sizes)}, {len(targets)} and {len(seeds)} for {count} images"
            )

    def check_predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], calibrations: Sequence[Calibration]
    ) -> None:
        """Refuse what `predict` cannot work with."""
        if self.training:
            raise ValueError("predict needs the detector in evaluation mode, call eval() first")
        if not len(sizes) == len(calibrations) == len(images):
            raise ValueError(
                "sizes and calibrations must hold one entry an image, got "
                f"{len(sizes)} and {len(calibrations)} for {len(images)} images"
            )
