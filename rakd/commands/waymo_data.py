"""Waymo's data in commands that train: conversion to KITTI's layout, and evaluation by Waymo's rules."""

import os
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from rakd.errors import UserError
from rakd.extras import require
from rakd.files import write_text

if TYPE_CHECKING:
    from rakd.distributed import Processes


def kitti_layout(data: Path, target: Path, processes: "Processes") -> Path:
    """A data set in KITTI's layout: ``data`` itself or, where it holds Waymo's parquet files, ``target``.

    The main process converts, as ``rakd convert-waymo`` does without options, but for segments that are finished.
    """
    from rakd.data.waymo import is_waymo
    from rakd.data.waymo_convert import convert_waymo
    from rakd.distributed import barrier

    converts = is_waymo(data)
    if converts:
        if processes.is_main:
            print(f"Waymo's parquet files: converting them into {target}", flush=True)
            convert_waymo(data, target, workers=os.cpu_count() or 1, progress=True)
        barrier(processes)
    data = target if converts else data
    if is_converted(data):
        # The evaluation needs it: better said now than after the training.
        require("scipy", "waymo")
    return data


def is_converted(data: Path) -> bool:
    """Whether a folder in KITTI's layout holds Waymo's data."""
    from rakd.data.waymo_convert import MANIFEST

    return (data / MANIFEST).is_file()


def format_waymo_tables(data: Path, detections: Path, frames: Sequence[str]) -> str:
    """Tables of both modes, at the official and the papers' overlaps; in the place of one that cannot be, the reason.

    Args:
        data: Folder that ``rakd convert-waymo`` wrote.
        detections: Folder of result files.
        frames: The frames to evaluate.
    """
    from rakd.evaluation.waymo import IOU, evaluate
    from rakd.evaluation.waymo.report import format_table
    from rakd.evaluation.waymo.scoring import MODES

    truth = data / "training" / "label_2"
    tables: list[str] = []
    failed: list[UserError] = []
    for mode, iou in product(MODES, IOU):
        try:
            tables.append(format_table(evaluate(truth, detections, mode=mode, iou=iou, frames=frames)))
        except UserError as error:  # MonoDETR's scores may be above 1, which is no reason to lose the other tables
            tables.append(f"mode {mode}, IoU {iou}: {error}")
            failed.append(error)
    if len(failed) == len(tables):
        raise failed[0]
    return "\n\n".join(tables)


def write_waymo_tables(path: Path, data: Path, split: str, runs: Sequence[Path]) -> None:
    """Write and print the tables of several runs' detections, ``RUN/detections``, as one Markdown file.

    A run without detections, as copies may be, keeps the file as it is: a part of the tables would replace all.
    """
    from rakd.data.frames import read_split

    lacking = [run.name for run in runs if not (run / "detections").is_dir()]
    if lacking:
        warnings.warn(f"Waymo's metrics are not made anew: no detections of {', '.join(lacking)}", stacklevel=2)
        return
    frames = read_split(data / "ImageSets" / f"{split}.txt")
    parts = [f"## {run.name}\n\n```\n{format_waymo_tables(data, run / 'detections', frames)}\n```\n" for run in runs]
    text = "\n".join(parts)
    write_text(path, text)
    print(f"{text}\nWaymo's metrics of all runs are in {path}")
