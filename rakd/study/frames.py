"""Pictures of frames as the models of an experiment see them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rakd.data.frames import Frame
from rakd.data.labels import Objects, read_results
from rakd.evaluation.kitti import DIFFICULTIES
from rakd.visualize import Compared, compare_frames

_COUNT = 2  # frames drawn
_SHOWN_SHARE = 0.5  # of a model's highest score in a frame: pictures leave out what scores less


def draw_frames(path: Path, frames: Sequence[Frame], detections: Mapping[str, Path]) -> None:
    """Draw the frames with most near cars, as each model sees them.

    Args:
        path: The picture to write.
        frames: To choose from.
        detections: Each model's folder of result files, by the title it gets.
    """
    by_objects = sorted(frames, key=lambda frame: -_large_cars(frame.read_labels()))
    compared = [
        Compared(
            frame.id,
            frame.read_image(),
            frame.read_calibration(),
            frame.read_labels(),
            {title: _best(read_results(folder / f"{frame.id}.txt")) for title, folder in detections.items()},
        )
        for frame in by_objects[:_COUNT]
    ]
    title = f"The same frames, {len(detections)} models: boxes that score at least half of a model's best in the frame"
    compare_frames(path, compared, title=title)


def _large_cars(objects: Objects) -> int:
    height = objects.boxes[:, 3] - objects.boxes[:, 1]
    return int((objects.is_type("Car") & (height >= DIFFICULTIES[0][0])).sum())


def _best(objects: Objects) -> Objects:
    if objects.scores is None or not len(objects):
        return objects
    return objects.select(objects.scores >= _SHOWN_SHARE * objects.scores.max())
