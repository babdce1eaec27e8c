"""Distillation: an expert's features teach an apprentice's.

Loads no torch: the command line reads its choices here. The losses are in `rakd.distill.methods`, and
`rakd.distill.distiller.Distiller` brings them and an expert into any trainer.
"""

from typing import Literal

Weights = Literal["pretrained", "random"]
"""What backbones start from."""

Regions = Literal["proposals", "objects"]
"""Where features are compared: the apprentice's proposals that lie on objects, or the labelled boxes."""

MethodName = Literal["rakd", "hfa", "l_roi", "pkd", "semckd", "none"]
"""Distillation methods: RAKD (soft assignment of regions to levels), its ablations with hard assignment (HFA) and
with all levels alike (L_RoI), PKD and SemCKD, which it is compared with, and none. See `methods.make_method`."""
