"""``rakd evaluate``: score result files by the official KITTI rules, or by Waymo's."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from rakd.data.frames import is_frame_name, read_split
from rakd.data.labels import LABEL_COLUMNS, WAYMO_LABEL_COLUMNS, is_label_row
from rakd.errors import NotAFolderError, UserError
from rakd.evaluation import report
from rakd.evaluation.kitti import Overlaps, evaluate
from rakd.files import check_folder, check_output, read_text

_IOU: tuple[Literal["official", "papers"], ...] = ("official", "papers")


@dataclass(frozen=True)
class Evaluate:
    """Score detections exactly as the official KITTI development kit does, or as Waymo's does.

    Prints average precision of 3D boxes, bird's-eye view, 2D boxes and orientation (AOS), by class and
    difficulty, over 40 recall positions (R40) and over 11 (R11). A dash marks metrics that the detections
    lack the data for. With --waymo: AP and APH of 3D boxes by type, level and range.
    """

    gt: Annotated[Positional[Path], arg(metavar="GT")]
    """Folder of label files NNNNNN.txt, such as KITTI/training/label_2; with --waymo also a .bin file."""

    pred: Annotated[Positional[Path], arg(metavar="PRED")]
    """Folder of result files NNNNNN.txt, one for each evaluated frame (if only an empty one); with --waymo also a
    .bin file."""

    split: Annotated[Path | None, arg(metavar="NAME|FILE")] = None
    """Frames to evaluate: a list in the ImageSets beside GT's training folder, such as val, or a file of that form;
    without it, all of GT."""

    overlaps: Overlaps = "official"
    """IoU that a detection must exceed. official: Car 0.7, others 0.5. loose: in 3D and BEV Car 0.5, others 0.25, for
    models that the official limits all give 0 (small data, early in training)."""

    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder to write evaluation.json and curves.png (precision over recall; KITTI only) to."""

    waymo: bool = False
    """Evaluate as the Waymo Open Dataset does. GT: labels that rakd convert-waymo wrote, or .bin files for both."""

    mode: Literal["official", "pct"] = "official"
    """With --waymo: official: Waymo's own. pct: as PCT, DEVIANT and MonoCoP evaluate, whose tables compare only among
    themselves."""

    iou: Annotated[tuple[Literal["official", "papers"], ...], arg(metavar="NAME...")] = _IOU
    """With --waymo: overlaps to make tables for. official: vehicles 0.7, others 0.5. papers: 0.5 and 0.3."""

    let: bool = False
    """With --waymo: LET-3D-AP and -APL, which tolerate errors along the camera's ray, at overlaps of 0.5 and 0.3."""

    json: Annotated[Path | None, arg(metavar="FILE|-")] = None
    """File to write all figures to as JSON; - prints them in the place of the tables."""

    def run(self) -> None:
        """Evaluate, print the tables and write the files."""
        if self.waymo:
            self._run_waymo()
            return
        for name, value, default in (("mode", self.mode, "official"), ("let", self.let, False)):
            if value != default:
                raise UserError(f"--{name}: only with --waymo")
        if self.iou != _IOU:
            raise UserError("--iou: only with --waymo; looser overlaps of KITTI are --overlaps loose")
        for name, folder in (("GT", self.gt), ("PRED", self.pred)):
            if not folder.is_dir():
                what = "is a file" if folder.exists() else "is not there"
                raise NotAFolderError(f"{name}: expected a folder of files NNNNNN.txt, {folder} {what}")
        frames = None if self.split is None else read_split(self._split_file(self.split))
        _check_scored(self.pred)
        _check_unscored(self.gt)
        is_printed = str(self.json) == "-"
        if self.out is not None:
            check_folder(self.out, "--out")
        if self.json is not None and not is_printed:
            check_output(self.json, "--json")
        result = evaluate(self.gt, self.pred, frames=frames, overlaps=self.overlaps)
        if is_printed:
            print(report.to_json(result, self.overlaps), end="")
        else:
            print(report.format_table(result, "R40", self.overlaps))
            print()
            print(report.format_table(result, "R11", self.overlaps))
            few = report.format_ceilings(result)
            if few:
                print(f"\n{few}")
        files = [] if self.json is None or is_printed else [self.json]
        if self.out is not None:
            files.append(self.out / "evaluation.json")
            self._remove_curves()
        for file in files:
            report.write_json(file, result, self.overlaps)
        if self.out is not None:
            files.append(self.out / "curves.png")
            report.write_curves(files[-1], result, self.overlaps)
        if files and not is_printed:
            print(f"\nwritten: {', '.join(map(str, files))}")

    def _run_waymo(self) -> None:
        """The same by Waymo's rules."""
        from rakd.evaluation.waymo import evaluate as evaluate_waymo
        from rakd.evaluation.waymo.report import format_table, to_json
        from rakd.files import write_text

        if self.overlaps != "official":
            raise UserError("--overlaps: is for KITTI; with --waymo take --iou")
        if not self.iou or len(set(self.iou)) < len(self.iou):
            raise UserError(f"--iou: expected one or more names, each once, got {' '.join(self.iou) or 'none'}")
        if self.let and self.iou != _IOU:
            raise UserError("--iou: not with --let, which has overlaps of its own, 0.5 and 0.3")
        is_printed = str(self.json) == "-"
        files = [] if self.json is None or is_printed else [self.json]
        files += [] if self.out is None else [self.out / "evaluation.json"]
        for file in files:
            check_output(file, "--json" if file == self.json else "--out")
        if self.split is not None and self.gt.is_file():
            raise UserError("--split: expected folders as GT and PRED, since .bin files name no frames of a list")
        frames = None if self.split is None else read_split(self._split_file(self.split))
        if self.pred.is_dir():
            _check_scored(self.pred)
        if self.gt.is_dir():
            _check_unscored(self.gt)
        tables = []
        for iou in ("papers",) if self.let else self.iou:
            tables.append(evaluate_waymo(self.gt, self.pred, mode=self.mode, iou=iou, let=self.let, frames=frames))
            if not is_printed:
                print(f"{format_table(tables[-1])}\n", flush=True)
        if is_printed:
            print(to_json(tables), end="")
        self._remove_curves()
        for file in files:
            write_text(file, to_json(tables))
        if files and not is_printed:
            print(f"written: {', '.join(map(str, files))}")

    def _remove_curves(self) -> None:
        """Those of an earlier evaluation would be taken for this one's."""
        if self.out is not None:
            (self.out / "curves.png").unlink(missing_ok=True)

    def _split_file(self, split: Path) -> Path:
        """The file of a list that is given by its name."""
        # Where GT stands, not where a link leads: the lists beside it are those that training took.
        folder = Path(os.path.abspath(self.gt))  # noqa: PTH100 - resolve() would follow links
        named = folder.parent.parent / "ImageSets" / f"{split}.txt"
        return named if split.name == str(split) and not split.is_file() and named.exists() else split


def _rows(folder: Path, what: str) -> Iterator[tuple[Path, list[str]]]:
    for path in sorted(path for path in folder.glob("*.txt") if is_frame_name(path.stem)):
        for line in read_text(path, what).splitlines():
            yield path, line.split()


def _check_unscored(folder: Path) -> None:
    """Refuse a folder of results in the place of labels: their scores would be skipped, and all would be easy."""
    for path, words in _rows(folder, "a label file"):
        if words and words[0] != "DontCare":
            if len(words) == LABEL_COLUMNS + 1 and all(word.startswith("-1") for word in words[1:3]):
                raise UserError(f"GT: {path} holds results (columns 2 and 3 are -1, 16 a score), expected labels")
            return


def _check_scored(folder: Path) -> None:
    """Refuse a folder of labels in the place of results: all of its rows would be skipped."""
    empty = True
    for path, words in _rows(folder, "a result file"):
        columns = len(words)
        if columns == WAYMO_LABEL_COLUMNS and is_label_row(words):
            raise UserError(f"PRED: {path} holds labels of convert-waymo; are GT and PRED in each other's place?")
        if columns > LABEL_COLUMNS or 0 < columns < LABEL_COLUMNS:
            return  # results, or what their reader refuses by its line
        empty = empty and not columns
    if not empty:
        raise UserError(
            f"PRED: no row in {folder} has a score (16th column): expected results; "
            "are GT and PRED in each other's place?"
        )
