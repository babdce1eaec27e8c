"""``rakd make-scenes``: render a data set."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from rakd.errors import UserError
from rakd.scenes import make_scenes


@dataclass(frozen=True)
class MakeScenes:
    """Render street scenes in KITTI's layout, to train and test without a download.

    Writes training/{image_2,label_2,calib} and ImageSets/{train,val,trainval,fit,tune}.txt. The same seed gives the
    same files on any machine. An interrupted run is completed by repeating the command.
    """

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to write to: new, empty, or one to complete."""

    frames: int = 200
    """Number of frames to render; every fifth is for validation. A full-size frame takes 1.4 MB."""

    seed: int = 0
    """Another seed gives another data set."""

    size: Annotated[tuple[int, int], arg(metavar="W H")] = (1242, 375)
    """Width and height of the images in pixels."""

    workers: int = 0
    """Number of processes; 0 takes one for each processor. The files do not depend on it."""

    def run(self) -> None:
        """Render the frames and say where they are."""
        if self.workers < 0:
            raise UserError(f"workers must be 0 or more, got {self.workers}")
        workers = self.workers or os.cpu_count() or 1
        make_scenes(self.out, self.frames, self.seed, size=self.size, workers=workers, progress=True)
        print(f"{self.frames} frames are in {self.out}")
