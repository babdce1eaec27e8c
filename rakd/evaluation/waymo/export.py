"""Result files of converted frames as objects in the vehicle frame, for Waymo's tools and server."""

from pathlib import Path

from rakd.data.labels import read_results
from rakd.data.waymo_convert import read_names
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
    """
    if not pred_dir.is_dir():
        raise MissingFileError(f"pred: {pred_dir} is not there: expected a folder of result files NNNNNN.txt")
    names = read_names(data, "testing" if testing else None)
    files = label_files(pred_dir)
    if not files:
        raise UserError(f"pred: {pred_dir} holds no result files NNNNNN.txt")
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
