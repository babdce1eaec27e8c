"""Distillation: an apprentice (student) learns from the features of an expert (teacher).

`rakd.distill.distiller.Distiller` brings an expert, a method and a weight into any trainer; the methods are in
`rakd.distill.registry`, one file each. Maps come from `hooks`, `outputs` and `expert`; `adapters` match channels;
`checks` holds the errors of the first step, `scale` the weight. Importing this package loads no torch, since
the command line reads its choices here; ``Distiller`` is loaded when it is asked for.
"""

from math import isfinite, nan
from typing import TYPE_CHECKING, Any, Literal

from rakd.distill.registry import NAMES

if TYPE_CHECKING:
    from rakd.distill.cache import FeatureCache as FeatureCache
    from rakd.distill.distiller import Distiller as Distiller
    from rakd.distill.expert import Expert as Expert
    from rakd.distill.hooks import tap as tap
    from rakd.distill.methods import make_method as make_method

    MethodName = str
else:
    MethodName = Literal.__getitem__((*NAMES, "none"))
    """Distillation methods: those of the registry, and none."""

Regions = Literal["proposals", "objects", "expert"]
"""Regions in which features are compared: the apprentice's proposals (of MonoDETR: its queries' boxes) that lie on
objects, the labelled boxes, or the boxes of an expert's queries that lie on objects."""

Rescale = bool | Literal["both"]
"""Networks whose maps are brought to a root mean square of 1 before they are compared: none, the expert alone (True),
or both."""


def auto_share(weight: str) -> float:
    """Read a weight that is a share of the task loss, ``"auto:SHARE"``.

    Raises:
        ValueError: This is another text, or the share is not positive and finite.
    """
    kind, _, text = weight.partition(":")
    try:
        share = float(text)
    except ValueError:
        share = nan
    if kind != "auto" or not (isfinite(share) and share > 0):
        raise ValueError(f"weight: expected a number or 'auto:SHARE' such as 'auto:10', got {weight!r}")
    return share


_LAZY = {
    "Distiller": "rakd.distill.distiller",
    "Expert": "rakd.distill.expert",
    "FeatureCache": "rakd.distill.cache",
    "make_method": "rakd.distill.methods",
    "tap": "rakd.distill.hooks",
}


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
