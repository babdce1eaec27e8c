"""The distillation methods, in one table: everything that lists methods reads it here.

A new method is one class (a `rakd.distill.base.DistillationMethod`) and one entry. The classes are named by text, so
that the command line reads the table without loading torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

Role = Literal["", "compared", "ablation", "proposed"]
"""Place in the paper's tables: compared with RAKD, an ablation of it, RAKD itself, or in neither table."""


@dataclass(frozen=True)
class MethodSpec:
    """A distillation method.

    Attributes:
        label: Its name in tables and figures.
        factory: ``"module:Class"``; the class derives from `rakd.distill.base.DistillationMethod`.
        weight: Factor of its loss where the user gives none.
        paper: Source of the method, and of its default weight.
        color: Of its bars and curves. Told apart by lightness as well, so that no kind of colour blindness merges them.
        role: See `Role`.
        term: Its name in the table of the loss's terms, for ablations.
        options: Arguments of the class that make it this method.
        rescaled_weight: Factor for maps at a root mean square of 1 (`rakd.distill.distiller.Distiller`, ``rescale``):
            that chosen in docs/evidence_weights.md, on frames that no table is evaluated on; None: none was tried.
    """

    label: str
    factory: str
    weight: float
    paper: str
    color: str
    role: Role = ""
    term: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    rescaled_weight: float | None = None

    def load(self) -> Any:
        """Import the class."""
        module, _, name = self.factory.partition(":")
        return getattr(import_module(module), name)


_RAKD = "Cheon, Shin, Bae, ICT Express 2025, doi 10.1016/j.icte.2025.04.012 (no weight published; 1 here)"
_REGIONS = "rakd.distill.regions:RegionDistillation"

METHODS: dict[str, MethodSpec] = {
    "pkd": MethodSpec(
        "PKD",
        "rakd.distill.pkd:PearsonDistillation",
        6.0,
        "Cao et al., NeurIPS 2022, arXiv 2207.02039 (6: two-stage detectors; 10 for RetinaNet and FCOS3D)",
        "#d3702c",
        "compared",
        rescaled_weight=6.0,
    ),
    "semckd": MethodSpec(
        "SemCKD",
        "rakd.distill.semckd:SemanticCalibration",
        1.0,
        "Chen et al., AAAI 2021, doi 10.1609/aaai.v35i8.16865 (its weight of 400 is for image classifiers; 1 here)",
        "#f0bf7d",
        "compared",
        rescaled_weight=20.0,
    ),
    "l_roi": MethodSpec(
        "L_RoI", _REGIONS, 1.0, _RAKD, "#a9c1e6", "ablation", "L_RoI (uniform)", {"assignment": "uniform"}, 60.0
    ),
    "hfa": MethodSpec("HFA", _REGIONS, 1.0, _RAKD, "#17877a", "ablation", "HFA (hard)", {"assignment": "hard"}, 40.0),
    "rakd": MethodSpec(
        "RAKD", _REGIONS, 1.0, _RAKD, "#1f5fbf", "proposed", "SFA (soft) = RAKD", {"assignment": "soft"}, 150.0
    ),
    "box_l2": MethodSpec(
        "Box L2",
        "rakd.distill.masked_l2:BoxMaskedL2",
        1.0,
        "the foreground term of DeFeat, Guo et al., CVPR 2021, arXiv 2103.14475 (1 here: RAKD's scale)",
        "#6b3fa0",
        rescaled_weight=120.0,
    ),
    "score_l2": MethodSpec(
        "Score L2",
        "rakd.distill.masked_l2:ScoreWeightedL2",
        18.0,
        "the loss of ultralytics' distillation, 2026 (18: its 6 for each of three levels, where this is their mean)",
        "#b58bd9",
        rescaled_weight=40.0,
    ),
    "cwd": MethodSpec(
        "CWD",
        "rakd.distill.cwd:ChannelWiseDistillation",
        10.0,
        "Shu et al., ICCV 2021, arXiv 2011.13256 (10: mmrazor's Faster R-CNN)",
        "#8f1d3f",
        rescaled_weight=2.3,
    ),
    "mgd": MethodSpec(
        "MGD",
        "rakd.distill.mgd:MaskedGenerativeDistillation",
        2e-5,
        "Yang et al., ECCV 2022, arXiv 2205.01529 (2e-5: its detectors)",
        "#e3a6b6",
        rescaled_weight=0.000175,
    ),
    "fgd_attention": MethodSpec(
        "FGD att.",
        "rakd.distill.fgd:FocalAttentionDistillation",
        1.0,
        "Yang et al., CVPR 2022, arXiv 2111.11837, without its global part (its four weights are options)",
        "#7a6a2f",
    ),
}
"""By name. The order is that of tables and figures."""

NAMES = tuple(METHODS)
COMPARED = tuple(name for name, spec in METHODS.items() if spec.role in ("compared", "proposed"))
ABLATED = tuple(name for name, spec in METHODS.items() if spec.role in ("ablation", "proposed"))
IN_PAPER = tuple(name for name, spec in METHODS.items() if spec.role)


def find_method(name: Any) -> MethodSpec:
    """Look a method up.

    Raises:
        ValueError: There is none of that name.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {name!r}")
    return METHODS[name]
