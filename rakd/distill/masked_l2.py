"""Masked squared differences of feature maps: inside boxes (DeFeat's foreground), or by the expert's class scores."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rakd.distill.adapters import ChannelAdapters
from rakd.distill.base import Boxes, DistillationMethod, Maps, Setup, pair_maps, resize
from rakd.distill.maps import check_maps
from rakd.distill.masks import box_masks, read_boxes
from rakd.distributed import all_reduce_mean
from rakd.nn import widen


class WeightedL2(DistillationMethod):
    """``mean over levels of Σ_x w(x) mean_c d(x)² / Σ_x w(x)``; a subclass gives ``w``.

    In training the sums of weights are their means over all processes, which must then call this equally often: see
    `rakd.distributed.shared_mean_count`.
    """

    def _weights(self, expert: list[Tensor], boxes: Boxes, scores: Sequence[Tensor] | None) -> list[Tensor]:
        raise NotImplementedError

    def _loss(self, maps: Sequence[Tensor] | None, expert: list[Tensor], weights: list[Tensor]) -> Tensor:
        sums = []
        for i, (theirs, weight) in enumerate(zip(expert, weights, strict=True)):
            difference = widen(theirs) if maps is None else resize(maps[i], theirs) - widen(theirs)
            sums.append((difference.square().mean(dim=1) * weight.to(difference)).sum())
        weighted = torch.stack(sums)
        totals = torch.stack([weight.to(weighted).sum() for weight in weights])
        if self.training:
            totals = all_reduce_mean(totals)
        return (weighted / torch.where(totals > 0, totals, torch.ones_like(totals))).mean()

    def forward(self, expert: Maps, apprentice: Maps, boxes: Boxes, scores: Sequence[Tensor] | None = None) -> Tensor:
        """See `rakd.distill.base.DistillationMethod.forward`; 0 where all weights are.

        ``scores``: class logits ``[B, classes, H, W]`` of the expert's levels, where the method takes them.
        """
        expert_maps, maps = pair_maps(expert, apprentice, self.adapter)
        return self._loss(maps, expert_maps, self._weights(expert_maps, boxes, scores))

    def energy(self, expert: Maps, boxes: Boxes, scores: Sequence[Tensor] | None = None) -> Tensor:
        """See `rakd.distill.base.DistillationMethod.energy`."""
        with torch.no_grad():
            maps = check_maps("expert", expert)
            return self._loss(None, maps, self._weights(maps, boxes, scores))


class BoxMaskedL2(WeightedL2):
    """Squared difference in the cells that boxes touch, over their number; the mean over levels.

    The same regions as RAKD's, but all levels alike, no resampling, and large boxes count by their area.

    Args:
        expert_strides: Pixels of the apprentice's images per cell of the expert's maps.
        adapter: Brings the apprentice's maps to the expert's channels.

    Source:
        The foreground term of Guo et al., Distilling Object Detectors via Decoupled Features, CVPR 2021.
    """

    def __init__(self, expert_strides: Sequence[float], *, adapter: ChannelAdapters | None = None) -> None:
        super().__init__(adapter=adapter)
        self.expert_strides: tuple[float, ...] = tuple(float(stride) for stride in expert_strides)

    @classmethod
    def build(cls, setup: Setup, **options: Any) -> "BoxMaskedL2":
        """See `rakd.distill.base.DistillationMethod.build`."""
        return cls(setup.expert_strides, adapter=setup.adapter(), **options)

    def _weights(self, expert: list[Tensor], boxes: Boxes, scores: Sequence[Tensor] | None) -> list[Tensor]:
        rows = read_boxes(boxes, len(expert[0]), expert[0].device)
        return [
            box_masks(rows, stride, (feature.shape[2], feature.shape[3]), feature.shape[0])
            for feature, stride in zip(expert, self.expert_strides, strict=True)
        ]


class ScoreWeightedL2(WeightedL2):
    """Squared difference weighted by the expert's best class probability at each cell; the mean over levels.

    Args:
        logits: Whether scores are logits, which a sigmoid makes probabilities; else they are probabilities.
        adapter: Brings the apprentice's maps to the expert's channels.

    Source:
        The loss of ultralytics' own distillation (its documentation, 2026), written anew.
    """

    needs_scores: ClassVar[bool] = True

    def __init__(self, *, logits: bool = True, adapter: ChannelAdapters | None = None) -> None:
        super().__init__(adapter=adapter)
        self.logits = logits

    def _weights(self, expert: list[Tensor], boxes: Boxes, scores: Sequence[Tensor] | None) -> list[Tensor]:
        if scores is None:
            raise ValueError(
                "scores: expected the expert's class logits, one map per level, got None; name the modules that give "
                "them (Distiller(scores=...)), or pass them"
            )
        if len(scores) != len(expert):
            raise ValueError(f"scores: expected {len(expert)} maps, one per level, got {len(scores)}")
        weights = []
        for i, (score, feature) in enumerate(zip(scores, expert, strict=True)):
            fits = score.dim() == 4 and score.shape[0] == feature.shape[0] and score.shape[2:] == feature.shape[2:]
            if not fits:
                raise ValueError(
                    f"scores[{i}]: expected shape [B, classes, H, W] with B, H, W of the expert's map "
                    f"{list(feature.shape)}, got {list(score.shape)}"
                )
            best = widen(score.detach()).amax(dim=1)
            weights.append(best.sigmoid() if self.logits else best)
        return weights
