"""MonoDETR: the detector of queries; see `rakd.detector.monodetr` for its parts."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rakd.data.labels import Objects
from rakd.data.targets import Targets
from rakd.detector.base import BaseDetector
from rakd.detector.decode import Boxes3D, to_objects
from rakd.detector.monodetr.configs import MonoDETRConfig
from rakd.detector.monodetr.decode import decode_queries
from rakd.detector.monodetr.depth import DepthPredictor
from rakd.detector.monodetr.heads import Predictions, boxes_2d, distances
from rakd.detector.monodetr.layers import sine_positions
from rakd.detector.monodetr.losses import depth_map_loss, query_losses
from rakd.detector.monodetr.matching import match
from rakd.detector.monodetr.projections import STRIDES, ProjectedPyramid
from rakd.detector.monodetr.targets import QueryTargets, query_targets
from rakd.detector.monodetr.transformer import Decoder, Encoder
from rakd.geometry import Calibration
from rakd.nn import seeded_modules, send, widen


class MonoDETR(BaseDetector):
    """A detector of queries; for each of them class, 2D box, dimensions, angle and distance.

    Images count as a whole, padding included. What draws random numbers in training is dropout, from torch's global
    generator.

    Args:
        config: Its settings.
        seed: Seed of the random weights; the global generator is left alone.
    """

    config: MonoDETRConfig
    has_queries = True

    def __init__(self, config: MonoDETRConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.strides = STRIDES[1:2] if config.distilled == "depth" else STRIDES
        self.channels = config.backbone.channels
        if config.backbone.deformable:
            raise ValueError("backbone.deformable must be False for a MonoDETR, got True")
        self.pyramid = ProjectedPyramid(
            config.backbone.name,
            config.backbone.weights,
            seed,
            channels=self.channels,
            frozen_norm=config.backbone.frozen_norm,
            frozen_stem=config.frozen_stem,
        )
        cast(Any, self.pyramid).to(memory_format=torch.channels_last)  # not every torch types this argument
        own = config.transformer
        with seeded_modules(seed + 1):
            self.depth = DepthPredictor(self.channels, own.heads, own.hidden, own.dropout, config.depth)
            self.encoder = Encoder(self.channels, len(STRIDES), own)
            self.decoder = Decoder(self.channels, len(STRIDES), own)

    @property
    def canonical_size(self) -> float:
        """See `rakd.detector.base.BaseDetector.canonical_size`."""
        return self.config.canonical_size

    def extract_features(self, images: Tensor) -> dict[str, Tensor]:
        """See `rakd.detector.base.BaseDetector.extract_features`.

        Besides the projections p3 .. p6 there are e3 .. e6, which the encoder made of them, or the depth branch's d4,
        where distillation compares these; `losses` then goes on from them.
        """
        features = super().extract_features(images)
        if self.config.distilled == "depth":
            features = {**features, "d4": self.depth.mix(features)}
        elif self.config.distilled == "encoder":
            maps = list(features.values())
            parts = self._encode(maps).split_with_sizes([m.shape[2] * m.shape[3] for m in maps], dim=1)
            encoded = {
                f"e{i}": part.transpose(1, 2).reshape(m.shape)
                for i, (part, m) in enumerate(zip(parts, maps, strict=True), start=3)
            }
            features = {**features, **encoded}
        return features

    def distilled_maps(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `rakd.detector.base.BaseDetector.distilled_maps`."""
        letter = {"projections": "p", "encoder": "e", "depth": "d"}[self.config.distilled]
        return {name: one for name, one in features.items() if name.startswith(letter)}

    def losses(
        self,
        features: dict[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Targets],
        seeds: Sequence[int],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """See `rakd.detector.base.BaseDetector.losses`.

        The detector's own boxes are those of the first group's queries that were matched in the last layer.
        """
        self.check_losses(features, sizes, targets, seeds)
        wanted = query_targets(targets, _image(features))
        found, depth, logits = self._run(features, wanted.focal)
        weights = self.config.losses
        matches = match(found.logits, found.boxes, wanted, self.config.transformer.groups, weights)
        result = query_losses(found, depth, wanted, matches, weights)
        result["depth_map"] = weights.depth_map * depth_map_loss(logits, wanted, self.config.depth)
        return result, _matched(found, matches, wanted, _image(features))

    @torch.no_grad()
    def matched_boxes(self, features: dict[str, Tensor], targets: Sequence[Targets]) -> list[Tensor]:
        """See `rakd.detector.base.BaseDetector.matched_boxes`."""
        if self.training:
            raise ValueError("matched_boxes needs the detector in evaluation mode, call eval() first")
        wanted = query_targets(targets, _image(features))
        found, _, _ = self._run(features, wanted.focal)
        last = found.map(lambda values: values[-1:])
        matches = match(last.logits, last.boxes, wanted, 1, self.config.losses)
        return _matched(last, matches, wanted, _image(features))

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], calibrations: Sequence[Calibration]
    ) -> list[Objects]:
        """See `rakd.detector.base.BaseDetector.predict`."""
        self.check_predict(images, sizes, calibrations)
        cameras = torch.from_numpy(np.stack([calibration.projection for calibration in calibrations]))
        focal = send(cameras[:, 1, 1].to(torch.float32), images.device)
        found, depth = _to_host(*self._last(images, focal))
        image = (images.shape[3], images.shape[2])
        return [
            to_objects(self._decode(_of_image(found, i), depth[i : i + 1], camera, image, torch.tensor(size)))
            for i, (camera, size) in enumerate(zip(cameras, sizes, strict=True))
        ]

    @torch.no_grad()
    def locate(self, image: Tensor, size: Tensor, projection: Tensor) -> Boxes3D:
        """See `rakd.detector.base.BaseDetector.locate`."""
        found, depth = self._last(image, projection[1:2, 1])
        return self._decode(found, depth, projection, (image.shape[3], image.shape[2]), size)

    def _last(self, images: Tensor, focal: Tensor) -> tuple[Predictions, Tensor]:
        """Predictions of the last layer, and distances."""
        found, depth, _ = self._run(self.extract_features(images), focal)
        return found.map(lambda values: values[-1]), depth[-1]

    def _decode(
        self, found: Predictions, depth: Tensor, camera: Tensor, image: tuple[int, int], size: Tensor
    ) -> Boxes3D:
        limit = self.config.score_limit
        return decode_queries(found, depth, camera, image, size, most=self.config.detections, limit=limit)

    def _run(self, features: dict[str, Tensor], focal: Tensor) -> tuple[Predictions, Tensor, Tensor]:
        """Run all that follows the maps.

        Args:
            features: Result of `extract_features`.
            focal: ``[B]`` vertical focal length, pixels.

        Returns:
            Predictions and distances of all layers, with the layers as first axis, and the logits of the map of
            distances.
        """
        maps = [features[f"p{i}"] for i in range(3, 7)]
        mixed = features["d4"] if "d4" in features else self.depth.mix(features)
        logits, expected, tokens = self.depth(mixed, self._positions(maps[1]))
        if "e3" in features:
            memory = torch.cat([features[f"e{i}"].flatten(2).transpose(1, 2) for i in range(3, 7)], dim=1)
        else:
            memory = self._encode(maps)
        shapes = [(int(m.shape[2]), int(m.shape[3])) for m in maps]
        layers = self.decoder(memory, shapes, tokens)
        height = float(_image(features)[1])
        depth = torch.stack([distances(layer, expected, focal, height) for layer in layers])
        found = Predictions(*(torch.stack([getattr(x, f.name) for x in layers]) for f in fields(Predictions)))
        return found, depth, logits

    def _encode(self, maps: list[Tensor]) -> Tensor:
        memory: Tensor = self.encoder(maps, [self._positions(m) for m in maps])
        return memory

    def _positions(self, one: Tensor) -> Tensor:
        return sine_positions(one.shape[2], one.shape[3], self.channels, one.device).to(widen(one).dtype)


def _image(features: dict[str, Tensor]) -> tuple[int, int]:
    """(width, height) of the images that the maps were made of."""
    first = features["p3"]
    return first.shape[3] * STRIDES[0], first.shape[2] * STRIDES[0]


def _matched(found: Predictions, matches: Tensor, targets: QueryTargets, image: tuple[int, int]) -> list[Tensor]:
    """Boxes in pixels of the first group's matched queries in the last layer, per image."""
    rows = matches[-1, :, 0]
    boxes = found.boxes[-1].detach().gather(1, rows[..., None].expand(*rows.shape, 6))
    sides = zip(boxes_2d(boxes).unbind(-1), (*image, *image), strict=True)
    pixels = torch.stack([side * float(length) for side, length in sides], dim=-1)
    return [own[:count] - 0.5 for own, count in zip(pixels, targets.counts, strict=True)]


def _of_image(found: Predictions, image: int) -> Predictions:
    return found.map(lambda values: values[image : image + 1])


def _to_host(found: Predictions, depth: Tensor) -> tuple[Predictions, Tensor]:
    """Predictions ``[B, N, ...]`` and distances ``[B, N]`` in main memory, by one transfer."""
    parts = [*(getattr(found, field.name) for field in fields(found)), depth[..., None]]
    *values, own = torch.cat(parts, dim=2).cpu().split_with_sizes([part.shape[2] for part in parts], dim=2)
    return Predictions(*values), own[..., 0]
