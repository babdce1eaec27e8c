"""``rakd latency``: the cost of expert and apprentice, side by side."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from rakd.errors import UserError


@dataclass(frozen=True)
class Latency:
    """Time detectors on one image, and count operations and parameters.

    Detectors take turns on the same rendered street scene, batch 1, from images on the device to objects.
    """

    detectors: Annotated[Positional[tuple[str, ...]], arg(metavar="DETECTOR...")] = ("tiny-expert", "tiny")
    """Names (see rakd train --help; random weights), files detector.pt of runs, or .onnx files of rakd export."""

    forms: tuple[Literal["eager", "compiled", "onnxruntime"], ...] = ("eager",)
    """Forms to time detectors in: eager; with backbone and pyramid compiled; exported to ONNX."""

    repeats: int = 30
    """Timed turns."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto takes a GPU if there is one."""

    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """CSV file to write the figures to."""

    def run(self) -> None:
        """Measure and print the table."""
        import csv
        import io
        from dataclasses import asdict
        from tempfile import TemporaryDirectory

        from rakd.commands.models import find_model, scene_size
        from rakd.data.frames import find_frames
        from rakd.detector.latency import Model, benchmark, compiled
        from rakd.detector.onnx_model import OnnxDetector
        from rakd.distributed import choose_device
        from rakd.files import check_output, write_text
        from rakd.scenes import make_scenes
        from rakd.study.versions import versions

        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                "rakd latency: expected one process, got one of several that torchrun started: processes that time "
                "side by side disturb each other"
            )
        if not self.forms:
            raise UserError("--forms: expected one or more")
        if self.repeats < 1:
            raise UserError(f"repeats must be 1 or more, got {self.repeats}")
        if self.out is not None:
            check_output(self.out, "--out")
        device, needed = choose_device(self.device), self.device == "cuda"
        models: list[tuple[str, Model]] = []
        with TemporaryDirectory() as folder:
            for name in self.detectors:
                model = find_model(name, device, needed=needed)
                if isinstance(model, OnnxDetector):
                    models.append((name, model))
                    continue
                for form in dict.fromkeys(self.forms):
                    if form == "onnxruntime":
                        from rakd.detector.export import exported

                        file = Path(folder) / f"{len(models)}.onnx"
                        models.append((name, exported(model, file, device, needed=needed)))
                    else:
                        models.append((name, compiled(model) if form == "compiled" else model))
            if self.forms != Latency.forms and all(name.endswith(".onnx") for name in self.detectors):
                warnings.warn("--forms does nothing for ONNX models", stacklevel=2)
            scenes = Path(folder) / "scenes"
            every = [model for _, model in models]
            make_scenes(scenes, 2, 0, size=scene_size(every), workers=1, progress=False)
            costs = benchmark(every, find_frames(scenes)[0], device, repeats=self.repeats)
        width = max(len(name) for name in (*self.detectors, "detector"))
        print(
            f"{'detector':<{width}}  {'runs':<11}  {'image':>10}  {'median ms':>9}  {'p90 ms':>8}  {'GFLOPs':>8}  "
            f"{'params M':>8}"
        )
        devices = [model.device if isinstance(model, OnnxDetector) else device for model in every]
        for (name, _), cost, own in zip(models, costs, devices, strict=True):
            size = f"{cost.size[0]} x {cost.size[1]}"
            gflops = "" if cost.gflops is None else f"{cost.gflops:.2f}"
            parameters = "" if cost.parameters is None else f"{cost.parameters / 1e6:.2f}"
            line = f"{name:<{width}}  {cost.runs:<11}  {size:>10}  {cost.median_ms:9.1f}  {cost.p90_ms:8.1f}"
            elsewhere = "" if own.type == device.type else f"  on {own.type}"
            print(f"{line}  {gflops:>8}  {parameters:>8}{elsewhere}".rstrip())
        there = versions(device)
        print(f"on {there['device']}, {there['threads']} threads, torch {there['torch']}, batch 1")
        if self.out is not None:
            text = io.StringIO()
            rows = [
                {
                    "detector": name,
                    **asdict(cost),
                    "size": "x".join(map(str, cost.size)),
                    **versions(own),
                }
                for (name, _), cost, own in zip(models, costs, devices, strict=True)
            ]
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(self.out, text.getvalue())
            print(f"written: {self.out}")
