"""``rakd predict``: a trained detector on images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from rakd.data.frames import is_image, read_calibration, read_image
from rakd.data.labels import is_label_row
from rakd.errors import UserError
from rakd.files import check_output, read_text


@dataclass(frozen=True)
class Predict:
    """Find cars, pedestrians and cyclists in images: KITTI result files and pictures.

    For each image NAME.png writes NAME.txt and NAME.png (the image with 3D boxes, and the bird's-eye view).
    """

    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE...", help_behavior_hint="(required)")]
    """Images, PNG or JPEG (turned as their EXIF orientation says), or folders of them."""

    calib: Annotated[Path, arg(metavar="FILE")]
    """KITTI calibration file for all images (its P2 is used; of raw data, P_rect_02 of calib_cam_to_cam.txt), or a
    folder with one NAME.txt for each."""

    checkpoint: Annotated[Path, arg(metavar="FILE")]
    """detector.pt of a run of rakd distill or rakd train, or an .onnx of rakd export."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("predictions")
    """Folder to write to."""

    min_score: float = 0.1
    """Lowest score in pictures; result files hold all detections."""

    pictures: bool = True
    """Draw pictures; without them, result files alone, as for a whole data set."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto takes a GPU if there is one."""

    def run(self) -> None:
        """Detect, write and draw."""
        from PIL import Image

        from rakd.commands.models import open_model
        from rakd.data.checks import check_end, check_widths, warn_of_centre
        from rakd.data.kitti import make_sample
        from rakd.data.labels import write_objects
        from rakd.detector.inference import detect
        from rakd.distributed import choose_device
        from rakd.visualize import draw_frame, prediction_layer

        if not isfinite(self.min_score):
            raise UserError(f"min_score must be a finite number, got {self.min_score}")
        images = self._find_images()
        self._check_names(images)
        device = choose_device(self.device)
        detector = open_model(self.checkpoint, device, needed=self.device == "cuda")
        # All images are checked before the first detection.
        check_widths(images, detector.config.height, detector.config.width)
        for path in images:
            check_end(path)
        files = [self.calib / f"{path.stem}.txt" if self.calib.is_dir() else self.calib for path in images]
        known = {file: read_calibration(file) for file in dict.fromkeys(files)}
        calibrations = [known[file] for file in files]
        warn_of_centre(zip(images, files, calibrations, strict=True))
        # Results of an earlier detector: after an interruption they would be taken for this one's.
        for path in images:
            for file in self._outputs(path):
                file.unlink(missing_ok=True)
        for path, calibration in zip(images, calibrations, strict=True):
            pixels = read_image(path)
            sample = make_sample(path.stem, Image.fromarray(pixels), calibration, None, detector.config.height)
            objects = detect(detector, sample, device)
            result, *pictures = self._outputs(path)
            write_objects(result, objects)
            scores = objects.scores
            shown = objects if scores is None else objects.select(scores >= self.min_score)
            for picture in pictures:
                draw_frame(picture, pixels, calibration, [prediction_layer(shown)], title=path.stem)
            print(f"{path}: {len(objects)} objects, {len(shown)} of them with a score of {self.min_score:g} or more")
        print(f"results{' and pictures' if self.pictures else ''} are in {self.out}")

    def _find_images(self) -> list[Path]:
        """The images, with those of folders in the order of their names."""
        if not self.images:
            raise UserError("IMAGE: expected at least one image, got none")
        found: list[Path] = []
        for path in self.images:
            inside = sorted(p for p in path.iterdir() if is_image(p) and p.name[0] != ".") if path.is_dir() else [path]
            if not inside:
                raise UserError(f"IMAGE: the folder {path} holds no PNG or JPEG files")
            found += inside
        return found

    def _check_names(self, images: Sequence[Path]) -> None:
        """Refuse images of one name, and to write over what is read."""
        names = [image.stem for image in images]
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise UserError(f"images must have different names, {', '.join(twice)} stands for several")
        calibrations = self.calib.iterdir() if self.calib.is_dir() else [self.calib]
        inputs = {path.resolve() for path in (*images, *calibrations)}
        for image in images:
            result, *pictures = self._outputs(image)
            for path in (result, *pictures):
                check_output(path, "--out", inputs)
            rows = read_text(result, "a result file").split("\n") if result.exists() else []
            if any(is_label_row(row.split()) for row in rows):
                raise UserError(f"--out: expected another folder, {result}, which holds labels, would be overwritten")

    def _outputs(self, image: Path) -> list[Path]:
        """The result file of an image and, where pictures are drawn, its picture."""
        return [self.out / f"{image.stem}{ending}" for ending in (".txt", ".png")[: 1 + self.pictures]]
