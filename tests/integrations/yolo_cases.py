"""Networks small enough to train in a second or two, as ultralytics reads them, and settings of its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BODY = """nc: 3
backbone:
  - [-1, 1, Conv, [{w}, 3, 2]]
  - [-1, 1, Conv, [{w}, 3, 2]]
  - [-1, 1, Conv, [{w}, 3, 2]]
  - [-1, 1, Conv, [{v}, 3, 2]]
  - [-1, 1, Conv, [{v}, 3, 2]]
head:
  - [[2, 3, 4], 1, {head}]
"""


def network(folder: Path, name: str, width: int) -> str:
    """Write a description: ``yolo`` or ``rtdetr`` with maps of ``width``, 2 ``width`` and 2 ``width`` channels."""
    head = {"yolo": "Detect, [nc]", "rtdetr": "RTDETRDecoder, [nc, 32, 20, 4, 4, 1]"}[name]
    path = folder / f"{name}{width}.yaml"
    path.write_text(_BODY.format(w=width, v=2 * width, head=head), encoding="utf-8")
    return str(path)


def settings(data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of ``train``: no augmentation, no warm-up, one optimizer step per batch."""
    off = dict.fromkeys(("mosaic", "fliplr", "scale", "translate", "hsv_h", "hsv_s", "hsv_v", "erasing"), 0.0)
    fixed = {"epochs": 2, "imgsz": 96, "batch": 4, "nbs": 4, "device": "cpu", "workers": 0, "warmup_epochs": 0}
    quiet = {"plots": False, "verbose": False, "exist_ok": True, "project": str(folder), "optimizer": "AdamW"}
    return {"data": str(data), **fixed, **quiet, **off, "lr0": 1e-3, "amp": False, **changes}
