"""The module that the trainer trains: a detector, with the distillation term where there is an expert."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rakd.data.kitti import Batch
from rakd.data.targets import pooling_boxes
from rakd.detector.base import BaseDetector
from rakd.detector.base_config import BaseConfig
from rakd.distill import Regions, Rescale
from rakd.distill.cache import FeatureCache
from rakd.distill.distiller import Distiller
from rakd.errors import UserError


class DistillationModel(nn.Module):
    """A detector with its losses, and a term more where it is distilled. For `rakd.training.trainer.Trainer`.

    Args:
        detector: The apprentice, or whatever is trained.
        distiller: Brings the expert; None: no distillation.
        regions: Regions in which features are compared.
    """

    cached = False
    """Whether the distiller has a cache for the expert's features, as it may where mirroring alone varies images. The
    expert then sees one image at a time, so that no feature depends on what is in the cache."""

    shares = False
    """Whether the distiller's weight is a share of the task loss."""

    def __init__(
        self, detector: BaseDetector, distiller: Distiller | None = None, regions: Regions = "proposals"
    ) -> None:
        super().__init__()
        self.detector = detector
        self.distiller = distiller
        self.regions = regions

    def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            batch: Images and targets, on any device.
            seeds: One for each image, see `rakd.detector.base.BaseDetector.losses`.

        Returns:
            The terms, to be summed; "distillation" is the distiller's.
        """
        device = next(self.detector.parameters()).device
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets(device)
        features = self.detector.extract_features(images)
        # Before the losses, which wait for the device: so it has the expert's work to do meanwhile.
        larger = batch.expert_images
        expert_images = images if larger is None else larger.to(device, non_blocking=True)
        expert = None if self.distiller is None else self._expert_features(self.distiller, expert_images)
        losses, foreground = self.detector.losses(features, batch.sizes, targets, seeds)
        if self.distiller is not None:
            assert expert is not None
            boxes = foreground
            if self.regions == "objects":
                boxes = [target.boxes for target in targets]
            elif self.regions == "expert":
                boxes = self.distiller.expert.matched_boxes(expert, targets)
            maps = self.detector.distilled_maps(features)
            expert_maps = self.distiller.expert.distilled_maps(expert)
            scored = getattr(self.distiller.method, "needs_scores", False)
            scores = self.distiller.expert.class_scores(expert) if scored else None
            options = {"scores": scores, "expert_images": expert_images}
            if self.shares:
                options["task_loss"] = torch.stack(tuple(losses.values())).sum()
            try:
                losses["distillation"] = self.distiller(images, pooling_boxes(boxes), maps, expert_maps, **options)
            except FloatingPointError as error:
                raise UserError(f"{error}: a smaller learning rate or weight, or --amp off, may help") from None
            except ValueError as error:  # no share can be taken of this task loss
                if not self.shares:
                    raise
                raise UserError(str(error)) from None
        return losses

    def _expert_features(self, distiller: Distiller, images: Tensor) -> dict[str, Tensor]:
        """The expert's maps of its own images."""
        if not self.cached:
            return distiller.expert_features(images)
        # By content, since a cache outlives the data that it was filled with.
        keys = [hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest() for image in images]
        maps = [distiller.expert_features(image[None], [key]) for image, key in zip(images, keys, strict=True)]
        return {
            name: torch.cat([each[name] for each in maps]).contiguous(memory_format=torch.channels_last)
            for name in maps[0]
        }


def expert_size(apprentice: BaseConfig, expert: BaseConfig) -> tuple[int, int] | None:
    """(width, height) of an expert's images where they are larger or smaller than the apprentice's.

    Returns:
        None: They are of one height, and the expert sees the apprentice's.

    Raises:
        UserError: Their proportions differ, so that methods which compare whole maps would compare other parts of an
            image.
    """
    if expert.height == apprentice.height:
        return None
    size, own = expert.image_size, apprentice.image_size
    if size is None or own is None or size[0] * own[1] != own[0] * size[1]:
        sizes = [f"{c.width or 'any'} x {c.height}" for c in (apprentice, expert)]
        raise UserError(
            f"expert must be for images of the apprentice's height or of its aspect ratio: the apprentice's are "
            f"{sizes[0]} pixels, the expert's {sizes[1]}"
        )
    return size


def expert_strides(apprentice: BaseDetector, expert: BaseDetector) -> tuple[float, ...]:
    """Pixels of the apprentice's images per cell of each of the expert's maps."""
    ratio = apprentice.config.height / expert.config.height
    return tuple(ratio * stride for stride in expert.strides)


def make_distillation_model(
    apprentice: BaseDetector,
    expert: BaseDetector | None,
    method: nn.Module | None,
    weight: float | str,
    regions: Regions,
    cache: FeatureCache | None = None,
    rescale: Rescale = False,
) -> DistillationModel:
    """The apprentice with its losses; without a method or expert it is trained alone."""
    if method is None or expert is None:
        return DistillationModel(apprentice)
    if expert.strides != apprentice.strides:
        raise UserError(
            f"expert must have maps of the apprentice's strides, {apprentice.strides}, got {expert.strides}: choose "
            "two detectors of one family"
        )
    if getattr(method, "needs_scores", False) and not expert.config.has_scores:
        raise UserError("method: score_l2 needs an expert with class scores on its maps, a two-stage detector")
    if regions == "expert" and not expert.has_queries:
        raise UserError("regions: expert needs an expert with queries, a MonoDETR")
    if regions == "expert" and expert.config.height != apprentice.config.height:
        raise UserError(
            f"regions: expert needs an expert for images of the apprentice's height, {apprentice.config.height}, got "
            f"one for {expert.config.height}: take objects or proposals"
        )
    model = DistillationModel(apprentice, Distiller(expert, method, weight, cache=cache, rescale=rescale), regions)
    model.cached, model.shares = cache is not None, isinstance(weight, str)
    return model
