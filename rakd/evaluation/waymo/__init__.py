"""Scoring of detections as the Waymo Open Dataset does it, without TensorFlow.

`evaluate <rakd.evaluation.waymo.scoring.evaluate>` is the entry point. It reads ``.bin`` files (`wire`) or folders of
KITTI files (`folders`), finds pairs (`overlaps`), matches them at all score cut-offs (`matching`) and integrates
precision over recall (`curves`, `scoring`). `report` turns its rows into a table and JSON, `export` packs results for
Waymo's server. The rules are those of ``src/waymo_open_dataset/metrics`` in the devkit, commit 99a4cb3. Needs the extra
``waymo`` (SciPy).
"""

from rakd.evaluation.waymo.objects import WaymoObjects
from rakd.evaluation.waymo.scoring import IOU, WaymoRow, evaluate
from rakd.evaluation.waymo.wire import read_bin, write_bin

__all__ = ["IOU", "WaymoObjects", "WaymoRow", "evaluate", "read_bin", "write_bin"]
