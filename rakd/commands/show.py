"""``rakd show``: draw labels and predictions."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from rakd.data.frames import find_frames
from rakd.data.labels import Objects, is_label_row, read_labels, read_results
from rakd.errors import MissingFileError, UserError
from rakd.files import check_folder, check_output, read_text
from rakd.progress import bar


@dataclass(frozen=True)
class Show:
    """Draw frames: image with 3D boxes, image with 2D boxes, and bird's-eye view, side by side.

    Labels are green and solid, predictions orange and dashed, with their scores. One picture a frame.
    """

    data: Annotated[Path, arg(metavar="DIR")]
    """KITTI folder: holds training/image_2, training/calib, training/label_2."""

    pred: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of result files NNNNNN.txt (label files do too); without it, labels alone are drawn."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/show")
    """Folder to write the pictures NNNNNN.png to."""

    frames: Annotated[tuple[str, ...], arg(metavar="NNNNNN ...")] = ()
    """Frames to draw, such as 000007 000012; without any, the first COUNT ones."""

    count: int = 10
    """Number of frames to draw where FRAMES names none."""

    split: Annotated[str | None, arg(metavar="NAME")] = None
    """Take frames of this list in ImageSets, such as val; without it, of all."""

    part: Literal["training", "testing"] = "training"
    """Part of the data; testing has no labels."""

    min_score: float = 0.1
    """Leave out predictions that score less."""

    reach: float = 70.0
    """Range of the bird's-eye view, in metres."""

    def run(self) -> None:
        """Draw the frames and say where the pictures are."""
        from rakd.visualize import draw_frame, prediction_layer, truth_layer

        if self.count < 1:
            raise UserError(f"count must be at least 1, got {self.count}")
        if not (self.reach > 0 and isfinite(self.reach)):
            raise UserError(f"reach must be positive and finite, got {self.reach}")
        if not isfinite(self.min_score):
            raise UserError(f"min_score must be a finite number, got {self.min_score}")
        check_folder(self.out, "--out")
        found = {frame.id: frame for frame in find_frames(self.data, self.split, self.part)}
        unknown = [id_ for id_ in self.frames if id_ not in found]
        if unknown:
            raise UserError(f"frames: {unknown[0]} is not among the {len(found)} frames of {self.data}")
        chosen = self.frames or list(found)[: self.count]
        images = {frame.image.resolve() for frame in found.values()}
        for id_ in chosen:
            check_output(self.out / f"{id_}.png", "--out", images)
        predictions = {} if self.pred is None else {id_: _read_predictions(self.pred, id_) for id_ in chosen}
        left_out = 0
        for id_ in bar(chosen, desc="drawing", unit="frame", delay=2):
            frame = found[id_]
            layers = [] if frame.label is None else [truth_layer(frame.read_labels())]
            if id_ in predictions:
                objects = predictions[id_]
                shown = objects if objects.scores is None else objects.select(objects.scores >= self.min_score)
                left_out += len(objects) - len(shown)
                layers.append(prediction_layer(shown))
            draw_frame(
                *(self.out / f"{id_}.png", frame.read_image(), frame.read_calibration(), layers),
                title=f"Frame {id_}",
                reach=self.reach,
            )
        if left_out:
            print(f"left out: {left_out} predictions that score less than {self.min_score:g} (--min-score)")
        print(f"pictures are in {self.out}")


def _read_predictions(folder: Path, id_: str) -> Objects:
    """Read a result file, or a label file given in its place."""
    path = folder / f"{id_}.txt"
    if not path.is_file():
        what = f"has no {path.name}, the results of frame {id_}" if folder.is_dir() else "is not a folder"
        raise MissingFileError(f"--pred: {folder} {what}")
    rows = [line.split() for line in read_text(path, "a result file").splitlines() if line.strip()]
    return read_labels(path) if rows and all(map(is_label_row, rows)) else read_results(path)
