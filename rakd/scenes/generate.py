"""Make a data set of rendered scenes in KITTI's layout."""

import json
import math
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rakd.data.frames import is_frame_name, read_split, write_calibration
from rakd.data.labels import Objects, make_objects, write_objects
from rakd.errors import UserError
from rakd.files import atomic_write, remove_stale, write_text
from rakd.geometry import Calibration
from rakd.progress import do_all
from rakd.scenes.draws import Draws
from rakd.scenes.raster import Camera, Drawn
from rakd.scenes.render import render
from rakd.scenes.world import Body, make_world

# Raised whenever the same seed gives other scenes than before.
_VERSION = 1
_MANIFEST = "scenes.json"

_MIN_HEIGHT = 14  # pixels; what is lower becomes a DontCare region, as in KITTI
_VAL_EVERY = 5
_TUNE_EVERY = 8


def make_scenes(
    out: Path | str,
    frames: int,
    seed: int = 0,
    *,
    size: tuple[int, int] = (1242, 375),
    workers: int = 1,
    progress: bool = False,
) -> None:
    """Render street scenes with cars, vans, pedestrians and cyclists, in KITTI's layout.

    Writes ``training/{image_2,label_2,calib}`` and ``ImageSets/{train,val,trainval,fit,tune}.txt``; every fifth frame
    is for validation. ``fit`` and ``tune`` share out ``train``, seven to one, to choose settings by: nothing need be
    chosen on ``val``. Of fewer than two frames for training they are not written. The pixels of a frame depend on the
    seed, its number and the size only, not on the number of frames or workers. Files appear whole or not at all, and
    an interrupted run is completed by the same call; frames that are there already are kept.

    Labels follow from the rendering: truncation is the share of the object's outline outside the image;
    occlusion is 0, 1, 2 or 3 where at least 80 %, 45 %, 15 % or less of its pixels in the image are seen.
    Objects of which nothing is seen have no label; those lower than 14 pixels are DontCare regions.

    Args:
        out: Folder to write to. New, empty, or begun by a call with the same seed and size.
        frames: How many frames, >= 2 (one each to train on and to validate with).
        seed: Another seed gives another data set, >= 0.
        size: (width, height) of the images in pixels; the camera is KITTI's, scaled to the width.
        workers: Number of processes. With more than one, the calling script needs the usual
            ``if __name__ == "__main__"`` guard.
        progress: Show a progress bar when it takes more than two seconds.

    Raises:
        ValueError: An argument is out of range, or ``out`` holds something else, or more frames.
    """
    out = Path(out)
    _check_count("frames", frames, 2)
    _check_count("seed", seed, 0)
    _check_count("workers", workers, 1)
    for name, value in zip(("width", "height"), size, strict=True):
        _check_count(f"size: {name}", value, 32)
    _claim(out, {"version": _VERSION, "seed": seed, "width": size[0], "height": size[1]})
    camera, calibration = _camera(*size)
    _check_split(out, frames)
    remove_stale(out.glob("training/*/.*"))
    missing = [i for i in range(frames) if not all(path.exists() for path in _paths(out, i))]
    write = partial(_write_frame, out, seed, camera, calibration)
    do_all(write, missing, workers, chunk=2, desc="rendering", unit="frame", disable=not progress)
    _write_splits(out, frames)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):  # also NumPy's
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")


def _claim(out: Path, settings: dict[str, int]) -> None:
    """Make sure that ``out`` is this data set's own, so that no other one is mixed up or overwritten."""
    manifest = out / _MANIFEST
    if manifest.exists():
        try:
            there = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            there = None
        if there != settings:
            raise UserError(f"out: {out} holds scenes made with {there}, not {settings}; choose another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out: {out} is not an empty folder and holds no {_MANIFEST}; choose another folder")
    else:
        write_text(manifest, json.dumps(settings) + "\n")


def _check_split(out: Path, frames: int) -> None:
    """Refuse to leave frames out of the lists that are there already, whether or not all were rendered."""
    path = out / "ImageSets" / "trainval.txt"
    numbers = (int(file.stem) for file in out.glob("training/*/*") if is_frame_name(file.stem))
    there = max([len(read_split(path)) if path.exists() else 0, *(number + 1 for number in numbers)])
    if there > frames:
        raise UserError(f"frames must be at least {there}, which {out} holds already, got {frames}")


def _camera(width: int, height: int) -> tuple[Camera, Calibration]:
    """KITTI's left colour camera, scaled to another image size."""
    scale = width / 1242
    focal, center = 721.5377 * scale, (609.5593 * scale, 172.854 * (height / 375))
    shift = (0.06, -0.0003, 0.0027)
    matrix = [
        [focal, 0.0, center[0], focal * shift[0] + center[0] * shift[2]],
        [0.0, focal, center[1], focal * shift[1] + center[1] * shift[2]],
        [0.0, 0.0, 1.0, shift[2]],
    ]
    return Camera(width, height, focal, center, shift), Calibration(np.array(matrix))


def _paths(out: Path, index: int) -> tuple[Path, Path, Path]:
    training = out / "training"
    name = f"{index:06d}"
    return (
        training / "image_2" / f"{name}.png",
        training / "label_2" / f"{name}.txt",
        training / "calib" / f"{name}.txt",
    )


def _write_frame(out: Path, seed: int, camera: Camera, calibration: Calibration, index: int) -> None:
    """Render frame ``index`` and write its three files."""
    draws = Draws(seed, index)
    world = make_world(draws)
    image, drawn, seen = render(world, camera, draws)
    image_path, label_path, calib_path = _paths(out, index)
    with atomic_write(image_path) as temporary:
        # The fastest level, at two thirds of the size of plain pixels.
        Image.fromarray(image).save(temporary, compress_level=1)
    write_calibration(calib_path, calibration)
    write_objects(label_path, _labels(world.bodies, drawn, seen, camera), decimals=2)


def _labels(bodies: list[Body], drawn: list[Drawn], seen: list[int], camera: Camera) -> Objects:
    names: list[str] = []
    rows: list[list[float]] = []
    for body, result, visible in zip(bodies, drawn, seen, strict=True):
        if not body.type or not visible or result.box is None:
            continue
        x1, y1, x2, y2 = result.box
        box = [max(x1, 0.0), max(y1, 0.0), min(x2, camera.width - 1.0), min(y2, camera.height - 1.0)]
        if box[3] - box[1] < _MIN_HEIGHT:
            names.append("DontCare")
            rows.append([-1.0, -1.0, -10.0, *box, -1.0, -1.0, -1.0, -1000.0, -1000.0, -1000.0, -10.0])
            continue
        alpha = body.rotation_y - math.atan2(body.location[0], body.location[2])
        alpha -= 2 * math.pi * round(alpha / (2 * math.pi))
        occlusion = _occlusion(visible / result.covered)
        names.append(body.type)
        rows.append([result.truncation, occlusion, alpha, *box, *body.dimensions, *body.location, body.rotation_y])
    # KITTI lists DontCare regions last.
    order = sorted(range(len(names)), key=lambda i: names[i] == "DontCare")
    return make_objects([names[i] for i in order], [rows[i] for i in order])


def _occlusion(visible: float) -> int:
    for level, least in enumerate((0.8, 0.45, 0.15)):
        if visible >= least:
            return level
    return 3


def _write_splits(out: Path, frames: int) -> None:
    splits: dict[str, list[int]] = {"train": [], "val": [], "trainval": list(range(frames)), "fit": [], "tune": []}
    # With few frames the last one validates, so that neither list is ever empty.
    for i in range(frames):
        held_out = i % _VAL_EVERY == _VAL_EVERY - 1 or (frames < _VAL_EVERY and i == frames - 1)
        splits["val" if held_out else "train"].append(i)
        if not held_out:
            splits["tune" if i % _TUNE_EVERY == 0 else "fit"].append(i)
    if len(splits["train"]) < 2:
        del splits["fit"], splits["tune"]
    for name, indices in splits.items():
        text = "".join(f"{i:06d}\n" for i in indices)
        write_text(out / "ImageSets" / f"{name}.txt", text)
