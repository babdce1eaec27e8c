"""Settings of a study (a comparison of distillation methods), and the studies that have a name. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from rakd.detector.configs import DETECTORS
from rakd.distill import MethodName, Regions, Rescale, auto_share
from rakd.distill.registry import IN_PAPER, METHODS
from rakd.errors import UserError
from rakd.training.settings import TrainSettings

ALL_METHODS: tuple[MethodName, ...] = ("none", *METHODS)
"""Ways to train an apprentice: without distillation, or with a method of the registry."""

PAPER_METHODS: tuple[MethodName, ...] = ("none", *IN_PAPER)
"""Those of the paper's tables: alone, the methods it compares with, RAKD and its ablations."""


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study.

    Attributes:
        expert: Name of the expert's detector, one of `rakd.detector.configs.DETECTORS`.
        apprentice: Name of the apprentice's.
        methods: To train apprentices with, in this order.
        seeds: Each method is run with each of these; a seed is that of the weights and the training, of the expert and
            of the apprentices that it teaches.
        expert_training: How the expert is trained; its seed is replaced.
        training: How apprentices are trained; its seed is replaced.
        weights: Factor of each method's loss, or ``"auto:10"``: so many times the task loss, measured at first.
        options: Arguments of methods' classes by the method's name, such as ``{"rakd": {"sigma": 0.5}}``.
        rescale: Whose maps are brought to a root mean square of 1, see `rakd.distill.distiller.Distiller`.
        regions: Boxes in which the methods that take boxes compare features.
        photometric: Probability of each distortion of light and colour.
        goes_on_from: Study whose networks it starts from, which the command is told (``--init``); empty: none.
        scenes: Street scenes to render where no data are given; 0: data are needed.
        takes: Time that it was measured to take, for the command to tell; empty: not measured.

    Raises:
        ValueError: A name is not known, or nothing is to be done.
    """

    expert: str
    apprentice: str
    expert_training: TrainSettings
    training: TrainSettings
    weights: Mapping[str, float | str] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: tuple[MethodName, ...] = PAPER_METHODS
    seeds: tuple[int, ...] = (0,)
    rescale: Rescale = False
    regions: Regions = "proposals"
    photometric: float = 0.5
    goes_on_from: str = ""
    scenes: int = 0
    takes: str = ""

    def __post_init__(self) -> None:
        for name in ("expert", "apprentice"):
            if getattr(self, name) not in DETECTORS:
                raise UserError(f"{name} must be one of {', '.join(DETECTORS)}, got {getattr(self, name)!r}")
        for name, known in (("methods", ALL_METHODS), ("seeds", None)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} must hold at least one and none twice, got {values}")
            if known is not None and not set(values) <= set(known):
                raise UserError(f"{name} must be of {', '.join(known)}, got {', '.join(values)}")
        if min(self.seeds) < 0:
            raise UserError(f"seeds must be 0 or more, got {self.seeds}")
        for name, weight in self.weights.items():
            try:
                value = auto_share(weight) if isinstance(weight, str) else weight
            except ValueError:
                raise UserError(f"weights must be numbers or such as 'auto:10', got {weight!r} for {name}") from None
            if not (isfinite(value) and value > 0):
                raise UserError(f"weights must be positive, got {weight} for {name}")
        if not 0 <= self.photometric <= 1:
            raise UserError(f"photometric must lie in 0..1, got {self.photometric:g}")
        missing = [name for name in self.methods if name != "none" and name not in self.weights]
        if missing:
            raise UserError(f"weights must hold one for each method, {', '.join(missing)} lack one: --weight METHOD=W")


# Where none was tuned: the paper gives none, and methods' losses have different scales. In the grids of
# docs/evidence_weights.md each method was best at 4 to 123 times the task loss.
_WEIGHTS = dict.fromkeys(METHODS, "auto:10")

_RESCALED = {name: spec.rescaled_weight for name, spec in METHODS.items() if spec.rescaled_weight is not None}

_TINY = TrainSettings(
    steps=250,
    batch_size=4,
    learning_rate=1e-3,
    optimizer="adamw",
    warm_up=30,
    schedule="cosine",
    checkpoint_every=50,
    log_every=1,
)

_LONG = replace(_TINY, steps=3000, checkpoint_every=200)
_FIVE = (0, 1, 2, 3, 4)

# DEVIANT's length and batch: 30 epochs of its 52,386 training frames (convert-waymo takes some 53,000), 40 at once. The
# rate is Detectron2's for this kind of detector, 0.02 for 16 images, in proportion.
_WAYMO = TrainSettings(steps=39_290, batch_size=40, learning_rate=0.05, workers=4)

# MonoDETR's schedule: 195 epochs of KITTI's 3,712 frames, 16 at once. The original neither clips gradients nor warms
# up, and its users saw losses that were not finite; 0.1 is DETR's norm.
_MONODETR = TrainSettings(
    steps=45_240,
    batch_size=16,
    learning_rate=2e-4,
    optimizer="adamw",
    warm_up=500,
    milestones=(125 / 195, 165 / 195),
    clip=0.1,
    workers=4,
)

_MONODETR_TINY = replace(_TINY, steps=1200, learning_rate=5e-4, clip=1.0, checkpoint_every=200)

_SCENES = StudySettings(
    expert="tiny-lite0",
    apprentice="tiny",
    expert_training=replace(_TINY, steps=480, checkpoint_every=200),
    training=replace(_TINY, steps=650, checkpoint_every=200),
    weights=_RESCALED,
    methods=("none", "pkd", "rakd"),
    rescale=True,
    photometric=0.0,
    scenes=500,
    takes="11 minutes on two cores of an AMD EPYC",
)

# 9, 29, 84, 79 and 76 times the task loss at first, see docs/evidence_weights.md.
_RESOLUTION_WEIGHTS = {"pkd": 11.0, "rakd": 1.05, "box_l2": 2.8, "l_roi": 3.6, "hfa": 2.15}

_RESOLUTION = replace(
    _SCENES,
    expert="small-lite0",
    apprentice="tiny-lite0",
    expert_training=replace(_LONG, steps=1800, amp="bfloat16"),
    training=replace(_LONG, steps=1000, amp="bfloat16"),
    weights=_RESOLUTION_WEIGHTS,
    rescale=False,  # the maps of both networks are of one scale
    methods=("none", *_RESOLUTION_WEIGHTS),
    seeds=_FIVE,
    scenes=2500,
    takes="some 110 minutes a seed on a core of an AMD EPYC, and 8 to render the scenes",
)

# From the networks that learned on scenes, on few frames.
_REAL = replace(_RESOLUTION.training, steps=600, learning_rate=5e-4)

STUDIES: dict[str, StudySettings] = {
    "tiny": StudySettings(
        expert="tiny-expert",
        apprentice="tiny",
        expert_training=replace(_TINY, steps=400),
        training=_TINY,
        weights=_WEIGHTS,
        photometric=0.0,
        scenes=200,
    ),
    "scenes": _SCENES,
    "scenes-long": replace(
        _SCENES,
        expert_training=_LONG,
        training=_LONG,
        seeds=_FIVE,
        scenes=2500,
        takes="some 95 minutes a seed on a core of an AMD EPYC, and 8 to render the scenes",
    ),
    "scenes-methods": replace(
        _SCENES,
        expert_training=replace(_LONG, steps=1500),
        training=replace(_LONG, steps=1000),
        methods=("none", *_RESCALED),
        seeds=_FIVE,
        scenes=2500,
        takes="some 65 minutes a seed on a core of an AMD EPYC with --feature-cache 40, and 8 to render the scenes",
    ),
    "scenes-resolution": _RESOLUTION,
    "scenes-resolution-long": replace(
        _RESOLUTION,
        expert_training=replace(_RESOLUTION.expert_training, steps=1200, learning_rate=5e-4),
        training=replace(_RESOLUTION.training, learning_rate=5e-4),
        methods=("none", *tuple(_RESOLUTION_WEIGHTS)[:3]),
        goes_on_from="scenes-resolution",
        takes="some 80 minutes a seed on a core of an AMD EPYC, and 8 to render the scenes",
    ),
    "real-frames": replace(
        _RESOLUTION,
        expert_training=_REAL,
        training=_REAL,
        methods=("none", *tuple(_RESOLUTION_WEIGHTS)[:3]),
        photometric=0.5,
        goes_on_from="scenes-resolution",
        scenes=0,
        takes="some 42 minutes a seed on a core of an AMD EPYC, with 59 frames",
    ),
    "kitti": StudySettings(
        expert="kitti-r50",
        apprentice="kitti-r18",
        expert_training=TrainSettings(steps=60_000, workers=4),
        training=TrainSettings(steps=30_000, workers=4),
        weights=_WEIGHTS,
    ),
    "waymo": StudySettings(
        expert="waymo-r50",
        apprentice="waymo-r18",
        expert_training=_WAYMO,
        training=_WAYMO,
        weights=_WEIGHTS,
    ),
    "monodetr-tiny": StudySettings(
        expert="monodetr-small",
        apprentice="monodetr-tiny",
        expert_training=replace(_MONODETR_TINY, steps=1500, learning_rate=3e-4),
        training=_MONODETR_TINY,
        weights={"pkd": 135.0, "rakd": 420.0},  # ten times the task loss at first, see docs/monodetr.md
        methods=("none", "pkd", "rakd"),
        seeds=(0, 1, 2),
        rescale=True,
        regions="objects",
        photometric=0.0,
        scenes=500,
        takes="some 45 minutes a seed on a core of an AMD EPYC",
    ),
    "monodetr-kitti": StudySettings(
        expert="monodetr-r50",
        apprentice="monodetr-r18",
        expert_training=_MONODETR,
        training=_MONODETR,
        weights=_WEIGHTS,
        regions="objects",
    ),
}
"""Studies by name. ``scenes`` and ``tiny`` run on two processor cores in minutes. The tables of docs/evidence.md
and docs/monodetr.md are ``scenes-long``, ``scenes-methods``, ``scenes-resolution``, ``scenes-resolution-long`` and
``real-frames`` (which go on from its networks), and ``monodetr-tiny``: hours each. ``kitti`` has the paper's detectors
and steps; ``waymo`` those of monocular work on Waymo; ``monodetr-kitti`` the original's of MonoDETR. ``waymo`` and
``monodetr-kitti`` have not been run on those data here."""

if TYPE_CHECKING:
    StudyName = str
else:
    StudyName = Literal.__getitem__(tuple(STUDIES))
    """Names of `STUDIES`, as the command line reads them."""
