"""Result files of converted frames as objects in the vehicle frame, for Waymo's tools and server."""

import warnings
from pathlib import Path

from rakd.data.labels import read_results
from rakd.data.waymo import WaymoSplit
from rakd.data.waymo_convert import FrameName, read_manifest, read_names
from rakd.errors import MissingFileError, UserError
from rakd.evaluation.waymo.folders import ObjectColumns, label_files, read_transform
from rakd.evaluation.waymo.objects import FrameKey, WaymoObjects


def collect_results(pred_dir: Path, data: Path, *, testing: bool = False) -> WaymoObjects:
    """Read a folder of result files, as `rakd.evaluation.waymo.wire.write_bin` wants them.

    Args:
        pred_dir: Folder of result files ``NNNNNN.txt``.
        data: Folder that `rakd.data.waymo_convert.convert_waymo` wrote.
        testing: The frames are those of the split ``testing``.

    Raises:
        MissingFileError: A folder or calibration is missing.
        UserError: There are no result files, one is malformed or is of no frame of ``data``, or a score is outside
            0..1; names the file.

    Warns:
        UserWarning: Frames of a split that has results have none: all their objects count as missed.
    """
    if not pred_dir.is_dir():
        raise MissingFileError(f"pred: {pred_dir} is not there: expected a folder of result files NNNNNN.txt")
    files = label_files(pred_dir)
    if not files:
        raise UserError(f"pred: {pred_dir} holds no result files NNNNNN.txt")
    names = _names(data, {path.stem for path in files}, testing=testing)
    calibrations = data / ("testing" if testing else "training") / "calib"
    columns = ObjectColumns()
    keys: list[FrameKey] = []
    for path in files:
        if path.stem not in names:
            raise UserError(f"{path}: {data} has no frame {path.stem}")
        objects = read_results(path)
        if objects.scores is not None and len(objects) and not 0 <= objects.scores.min() <= objects.scores.max() <= 1:
            reach = f"{objects.scores.min():g} to {objects.scores.max():g}"
            raise UserError(f"{path}: scores must lie in 0..1 for Waymo's metric, they reach from {reach}")
        columns.add(path, objects, read_transform(calibrations / path.name))
        name = names[path.stem]
        # Frames of 3D truths have no camera, and the devkit tells frames by it too.
        keys.append((name.segment, name.time, 0))
    return columns.objects(keys)


def _names(data: Path, wanted: set[str], *, testing: bool) -> dict[str, FrameName]:
    """The frames of the converted splits, after a warning if one is wanted in part."""
    names: dict[str, FrameName] = {}
    splits: tuple[WaymoSplit, ...] = ("testing",) if testing else ("training", "validation")
    unfinished: list[MissingFileError] = []
    converted = read_manifest(data)["segments"]
    for split in (split for split in splits if split in converted):
        try:
            found = read_names(data, split)
        except MissingFileError as error:  # results of the other split need not wait for this one
            unfinished.append(error)
            continue
        missing = sorted(found.keys() - wanted)
        if 0 < len(missing) < len(found):
            warnings.warn(
                f"{len(missing)} of {len(found)} frames of {split} have no result file, such as {missing[0]}.txt: all "
                "their objects count as missed",
                stacklevel=3,
            )
        names |= found
    if unfinished and not wanted <= names.keys():
        raise unfinished[0]
    return names
