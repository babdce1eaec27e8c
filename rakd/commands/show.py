"""``rakd show``: draw labels and predictions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm
from tyro.conf import arg

from rakd.data.frames import find_frames
from rakd.data.labels import Objects, read_labels, read_results


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
    """How many frames to draw when FRAMES does not say which."""

    split: Annotated[str | None, arg(metavar="NAME")] = None
    """Take frames of this list in ImageSets, such as val; without it, of all."""

    part: Literal["training", "testing"] = "training"
    """Which part of the data; testing has no labels."""

    min_score: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Leave out predictions that score less."""

    reach: float = 70.0
    """How far the bird's-eye view goes, in metres."""

    def run(self) -> None:
        """Draw the frames and say where the pictures are."""
        from rakd.visualize import draw_frame, prediction_layer, truth_layer

        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if not self.reach > 0:
            raise ValueError(f"reach must be positive, got {self.reach}")
        found = {frame.id: frame for frame in find_frames(self.data, self.split, self.part)}
        unknown = [id_ for id_ in self.frames if id_ not in found]
        if unknown:
            raise ValueError(f"frames: {unknown[0]} is not among the {len(found)} frames of {self.data}")
        if self.pred is not None and not self.pred.is_dir():
            raise FileNotFoundError(f"pred: {self.pred} is not a folder")
        for id_ in tqdm(self.frames or list(found)[: self.count], desc="drawing", unit="frame", delay=2):
            frame = found[id_]
            layers = [] if frame.label is None else [truth_layer(frame.read_labels())]
            if self.pred is not None:
                objects = _read_predictions(self.pred / f"{id_}.txt")
                if objects.scores is not None and self.min_score is not None:
                    objects = objects.select(objects.scores >= self.min_score)
                layers.append(prediction_layer(objects))
            draw_frame(
                *(self.out / f"{id_}.png", frame.read_image(), frame.read_calibration(), layers),
                title=f"Frame {id_}",
                reach=self.reach,
            )
        print(f"pictures are in {self.out}")


def _read_predictions(path: Path) -> Objects:
    """Read a result file, or a label file given in its place (15 columns throughout)."""
    with path.open(encoding="utf-8") as lines:
        is_labels = any(len(line.split()) == 15 for line in lines)
    return read_labels(path) if is_labels else read_results(path)
