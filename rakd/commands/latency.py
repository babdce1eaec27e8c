"""``rakd latency``: what expert and apprentice cost, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from rakd.errors import UserError


@dataclass(frozen=True)
class Latency:
    """Time detectors on one image, and count operations and parameters.

    Detectors take turns on the same rendered street scene, batch 1, from pixels on the device to objects.
    """

    detectors: Annotated[Positional[tuple[str, ...]], arg(metavar="DETECTOR...")] = ("tiny-expert", "tiny")
    """Names (tiny, tiny-expert, small, kitti-r18, kitti-r50; random weights) or files detector.pt of runs."""

    repeats: int = 30
    """Timed turns."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""

    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """CSV file to write the figures to."""

    def run(self) -> None:
        """Measure and print the table."""
        import csv
        import io
        from dataclasses import asdict
        from tempfile import TemporaryDirectory

        from rakd.commands.devices import choose_device
        from rakd.data.frames import find_frames
        from rakd.detector.configs import DETECTORS
        from rakd.detector.detector import Detector
        from rakd.detector.files import load_detector
        from rakd.detector.latency import measure
        from rakd.files import write_text
        from rakd.scenes import make_scenes
        from rakd.study.versions import versions

        device = choose_device(self.device)
        models = []
        for name in self.detectors:
            config = DETECTORS.get(name)
            if config is None:
                if not Path(name).is_file():
                    raise UserError(f"DETECTOR must be one of {', '.join(DETECTORS)} or a file, got {name!r}")
                models.append(load_detector(Path(name)))
            else:
                # Layers take the same time with any weights, so nothing is downloaded.
                models.append(Detector(config.without_download()))
        with TemporaryDirectory() as folder:
            make_scenes(Path(folder), 2, 0, workers=1, progress=False)
            costs = measure(models, find_frames(Path(folder))[0], device, repeats=self.repeats)
        width = max(len(name) for name in (*self.detectors, "detector"))
        print(f"{'detector':<{width}}  {'image':>10}  {'median ms':>9}  {'p90 ms':>8}  {'GFLOPs':>8}  {'params M':>8}")
        for name, cost in zip(self.detectors, costs, strict=True):
            size = f"{cost.size[0]} x {cost.size[1]}"
            print(
                f"{name:<{width}}  {size:>10}  {cost.median_ms:9.1f}  {cost.p90_ms:8.1f}  {cost.gflops:8.2f}  "
                f"{cost.parameters / 1e6:8.2f}"
            )
        there = versions(device)
        print(f"on {there['device']}, {there['threads']} threads, torch {there['torch']}, batch 1")
        if self.out is not None:
            text = io.StringIO()
            rows = [
                {"detector": name, **asdict(cost), "size": "x".join(map(str, cost.size)), **there}
                for name, cost in zip(self.detectors, costs, strict=True)
            ]
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(self.out, text.getvalue())
            print(f"written: {self.out}")
