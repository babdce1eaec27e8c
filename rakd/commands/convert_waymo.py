"""``rakd convert-waymo``: the Waymo Open Dataset in KITTI's layout; ``rakd export-waymo``: results for its server."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from rakd.data.waymo import BoxSource, CameraName, WaymoSplit
from rakd.data.waymo_convert import WaymoConversion, convert_waymo
from rakd.errors import UserError
from rakd.files import check_output, read_text


@dataclass(frozen=True)
class ConvertWaymo:
    """Write the Waymo Open Dataset (version 2, parquet) in KITTI's layout, to train, show and evaluate with.

    Reads ROOT/{training,validation,testing}/{camera_image,camera_calibration,lidar_box,projected_lidar_box}/*.parquet.
    An interrupted run is completed by repeating the command. By default as papers on monocular detection do it: the
    front camera, every third frame of training and all of validation, distortion ignored. Waymo's licence does not
    allow to publish weights trained on its data.
    """

    root: Annotated[Positional[Path], arg(metavar="ROOT")]
    """Folder that holds training, validation and testing."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to write to: new, empty, or one to complete."""

    splits: Annotated[tuple[WaymoSplit, ...], arg(metavar="SPLIT...")] = ("training", "validation")
    """Splits to convert; they can be added one after the other. testing has no labels."""

    train_list: Annotated[Path | None, arg(metavar="FILE")] = None
    """Names of the training segments to take, one a line; without it, all."""

    val_list: Annotated[Path | None, arg(metavar="FILE")] = None
    """Names of the validation segments to take, one a line; without it, all."""

    camera: CameraName = "FRONT"
    """Camera whose images are taken."""

    every: Annotated[tuple[int, int], arg(metavar="TRAIN OTHERS")] = (3, 1)
    """Take every n-th frame of training segments, and of others."""

    boxes: BoxSource = "lidar"
    """lidar: boxes as labelled. synced: boxes at the time the camera saw them, which LET-3D-AP is scored on."""

    min_points: Annotated[tuple[int, int], arg(metavar="CARS OTHERS")] = (100, 50)
    """Training ignores cars, and other objects, with so few lidar points or less."""

    workers: int = 0
    """Number of processes; 0 takes one for each processor."""

    def run(self) -> None:
        """Convert, and say where the frames are."""
        if self.workers < 0:
            raise UserError(f"workers must be 0 or more, got {self.workers}")
        settings = WaymoConversion(self.camera, self.every, self.boxes, self.min_points)
        lists: dict[WaymoSplit, Path | None] = {"training": self.train_list, "validation": self.val_list}
        count = convert_waymo(
            self.root,
            self.out,
            settings,
            splits=self.splits,
            segments={split: _read_list(path) for split, path in lists.items() if path is not None},
            workers=self.workers or os.cpu_count() or 1,
            progress=True,
        )
        print(f"{count} frames are in {self.out}")


@dataclass(frozen=True)
class ExportWaymo:
    """Pack result files as the .bin file that Waymo's tools and server take.

    Takes the boxes of result files NNNNNN.txt back to the vehicle frame, with each frame's segment and time.
    """

    pred: Annotated[Positional[Path], arg(metavar="PRED")]
    """Folder of result files, one for each frame to pack."""

    data: Annotated[Path, arg(metavar="DIR")]
    """Folder that rakd convert-waymo wrote."""

    out: Annotated[Path, arg(metavar="FILE")]
    """File to write, such as predictions.bin."""

    testing: bool = False
    """The frames are those of the split testing."""

    def run(self) -> None:
        """Read, turn, write."""
        from rakd.evaluation.waymo import write_bin
        from rakd.evaluation.waymo.export import collect_results

        check_output(self.out, "--out")
        objects = collect_results(self.pred, self.data, testing=self.testing)
        write_bin(self.out, objects)
        print(f"{len(objects)} objects of {len(objects.keys)} frames are in {self.out}")


def _read_list(path: Path) -> list[str]:
    """Names of segments, one a line."""
    words = [line.strip() for line in read_text(path, "a list of segments, one a line").splitlines()]
    # Lists of other converters name the files.
    names = [word.removesuffix(".parquet").removesuffix(".tfrecord") for word in words if word]
    names = [name.removeprefix("segment-").removesuffix("_with_camera_labels") for name in names]
    if not names:
        raise UserError(f"{path} lists no segments")
    return names
