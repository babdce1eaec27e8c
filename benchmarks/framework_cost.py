"""``python -m benchmarks.framework_cost``: milliseconds that distillation adds to a step of each framework's trainer.

Every trainer runs its own loop in a thread and is let through one step at a time, so that steps of all kinds take
turns. Loading the batch is not in the time. The kinds:

- ``plain``: the apprentice trains alone;
- ``expert``: the expert runs as well, and its features are dropped;
- ``loss``: RAKD, normalised, with adapters where channels differ;
- ``cached``: the same with the expert's features from memory (the same images come again and again).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.timing import compare, time_interleaved

KINDS = ("plain", "expert", "loss", "cached")


@dataclass(frozen=True, kw_only=True)
class FrameworkRow(results.Machine):
    """One kind of step in one framework."""

    framework: str
    version: str  # of the framework
    expert: str  # the network that teaches
    apprentice: str  # the network that learns
    batch: int  # images
    size: int  # height and width of the images, pixels
    kind: str  # see the module
    median_ms: float  # of a step
    p20_ms: float  # 20th percentile
    p80_ms: float  # 80th percentile
    repeats: int  # steps these come from
    ratio: float  # this median over that of plain
    over_expert: float | None  # median over the rounds of (this - expert) / expert; None for plain and expert
    threads: int  # of torch


Train = Callable[["Gate"], Any]
"""Trains without end, calling `Gate.begin` and `Gate.end` around each step."""


class Gate:
    """Lets a trainer in another thread through one step at a time."""

    def __init__(self, train: Train) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: str | None = None
        threading.Thread(target=self._run, args=(train,), daemon=True).start()

    def _run(self, train: Train) -> None:
        try:
            train(self)
            self._error = "the trainer ended before its last step"
        except BaseException:
            self._error = traceback.format_exc()
        self._done.release()

    def begin(self, *_: Any) -> None:
        """Wait for a step to be wanted (called by the trainer)."""
        self._go.acquire()

    def end(self, *_: Any) -> None:
        """Tell that the step is done (called by the trainer)."""
        self._done.release()

    def sample(self) -> float:
        """Let one step through; its time in milliseconds."""
        start = time.perf_counter()
        self._go.release()
        self._done.acquire()
        taken = 1e3 * (time.perf_counter() - start)
        if self._error is not None:
            raise RuntimeError(self._error)
        return taken


class NoLoss(nn.Module):
    """A method that looks at no feature; the expert has run all the same."""

    def forward(self, expert: dict[str, Tensor], apprentice: dict[str, Tensor], boxes: Any) -> Tensor:
        """Give 0, with a graph."""
        return next(iter(apprentice.values())).flatten()[0] * 0.0


def distill_options(kind: str) -> dict[str, Any]:
    """Options of the distiller of one kind of step; none for ``plain``."""
    if kind == "plain":
        return {}
    if kind == "expert":
        return {"method": NoLoss(), "weight": 1.0}
    from rakd.distill.cache import FeatureCache

    # Weights are random: the loss shall take its time but move nothing.
    return {"weight": 1e-12, "normalize": True, **({"cache": FeatureCache()} if kind == "cached" else {})}


def make_items(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Images ``[3, size, size]`` of noise, each with 6 boxes of 16 pixels to half the side."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for _ in range(count):
        sides = 16 + torch.rand(6, 2, generator=generator) * (size / 2 - 16)
        corner = torch.rand(6, 2, generator=generator) * (size - sides)
        items.append((torch.rand(3, size, size, generator=generator), torch.cat([corner, corner + sides], dim=1)))
    return items


def _centres(boxes: Tensor, size: int) -> Tensor:
    """Boxes as centre, width and height in parts of the image, as DETR and YOLO have them."""
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1) / size


def retinanet(name: str, size: int) -> nn.Module:
    """A RetinaNet with random weights, all of which train."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    net: nn.Module = RetinaNet(backbone, 4, min_size=size, max_size=size)
    return net


def _targets(items: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    return [{"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)} for _, boxes in items]


def train_torchvision(gate: Gate, kind: str, batch: int, size: int) -> None:
    """A RetinaNet on ResNet-50 teaches one on ResNet-18, in a plain loop."""
    from rakd.integrations.torchvision import DistilledDetector

    items = make_items(batch, size)
    detector = retinanet("resnet18", size)
    if kind != "plain":
        keys = (lambda targets: list(range(len(targets)))) if kind == "cached" else None
        detector = DistilledDetector(detector, retinanet("resnet50", size), keys=keys, **distill_options(kind))
    optimizer = torch.optim.SGD(detector.train().parameters(), lr=1e-5)
    while True:
        gate.begin()
        optimizer.zero_grad()
        loss = torch.stack(list(detector([image for image, _ in items], _targets(items)).values())).sum()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
        gate.end()


def train_lightning(gate: Gate, kind: str, batch: int, size: int) -> None:
    """The same RetinaNets in Lightning; the expert is given images before normalisation."""
    import lightning.pytorch as pl

    from rakd.integrations.lightning import DistillCallback

    def training_step(self: Any, data: Any, batch_idx: int) -> Any:
        return torch.stack(list(self.net(data[0], _targets(list(zip(*data, strict=True)))).values())).sum()

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-5)

    methods = {"training_step": training_step, "configure_optimizers": configure_optimizers}
    module = type("Module", (pl.LightningModule,), methods)()
    module.net = retinanet("resnet18", size)
    through = type("Through", (pl.Callback,), {})()
    through.on_train_batch_start, through.on_train_batch_end = gate.begin, gate.end
    callbacks = [through]
    if kind != "plain":
        names = {"apprentice": "net", "apprentice_features": "backbone", "features": "backbone"}
        expert, keys = retinanet("resnet50", size), list(range(batch))
        options = {**names, **distill_options(kind)}
        callbacks.append(DistillCallback(expert, batch=lambda data: (*data, keys), **options))
    images, boxes = zip(*make_items(batch, size), strict=True)
    loader: Any = torch.utils.data.DataLoader([(list(images), list(boxes))] * 10_000, batch_size=None)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, callbacks=callbacks, **quiet)
    trainer.fit(module, loader)


def train_transformers(gate: Gate, kind: str, batch: int, size: int) -> None:
    """An RT-DETR on ResNet-50's widths teaches one on ResNet-18's, in transformers' Trainer."""
    import transformers as hf

    from rakd.integrations.transformers import DistillMixin

    def make(layers: str, depths: list[int], widths: list[int], hidden: int) -> Any:
        backbone = hf.RTDetrResNetConfig(
            depths=depths, hidden_sizes=widths, layer_type=layers, out_features=["stage2", "stage3", "stage4"]
        )
        sizes = {"encoder_hidden_dim": hidden, "encoder_in_channels": widths[1:], "decoder_in_channels": [hidden] * 3}
        config = hf.RTDetrConfig(backbone_config=backbone, num_labels=3, num_queries=100, decoder_layers=3, **sizes)
        return hf.RTDetrForObjectDetection(config)

    items = make_items(batch, size)
    data = []
    for number, (image, boxes) in enumerate(items):
        rows = _centres(boxes, size)
        labels = {"boxes": rows, "class_labels": torch.zeros(len(rows), dtype=torch.int64), "number": number}
        data.append({"pixel_values": image, "labels": labels})

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]), "labels": [r["labels"] for r in rows]}

    expert, distill = None, None
    if kind != "plain":
        expert = make("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048], 256)
        distill = distill_options(kind)
        if kind == "cached":
            distill["keys"] = lambda inputs: [label["number"] for label in inputs["labels"]]
    through = type("Through", (hf.TrainerCallback,), {})()
    through.on_step_begin, through.on_step_end = (lambda *_, **__: gate.begin()), (lambda *_, **__: gate.end())
    settings = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1_000}
    settings |= {"remove_unused_columns": False, "per_device_train_batch_size": batch, "max_steps": 10_000}
    trainer_class = type("DistillTrainer", (DistillMixin, hf.Trainer), {})
    with tempfile.TemporaryDirectory() as folder:
        args = hf.TrainingArguments(folder, **settings)
        apprentice = make("basic", [2, 2, 2, 2], [64, 128, 256, 512], 128)
        trainer_class(apprentice, args, collate, data, callbacks=[through], expert=expert, distill=distill).train()


def train_ultralytics(gate: Gate, kind: str, batch: int, size: int) -> None:
    """YOLO11s teaches YOLO11n in ultralytics' trainer."""
    from PIL import Image
    from ultralytics import YOLO

    from rakd.integrations.ultralytics import distill

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("images", "labels"):
            (folder / part).mkdir()
        for number, (image, boxes) in enumerate(make_items(batch, size)):
            pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
            Image.fromarray(np.ascontiguousarray(pixels)).save(folder / "images" / f"{number}.png")
            rows = _centres(boxes, size)
            lines = [" ".join(["0", *(f"{value:.6f}" for value in row)]) for row in rows.tolist()]
            (folder / "labels" / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
        data = folder / "data.yaml"
        data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames:\n  0: thing\n", encoding="utf-8")
        off = dict.fromkeys(("mosaic", "fliplr", "scale", "translate", "hsv_h", "hsv_s", "hsv_v", "erasing"), 0.0)
        settings = {"epochs": 10_000, "batch": batch, "nbs": batch, "imgsz": size, "device": "cpu", "workers": 0}
        quiet = {"plots": False, "verbose": False, "val": False, "save": False, "amp": False, "warmup_epochs": 0}
        model: Any = YOLO("yolo11n.yaml")
        if kind != "plain":
            keys = (lambda seen: [Path(file).stem for file in seen["im_file"]]) if kind == "cached" else None
            model = distill(model, YOLO("yolo11s.yaml"), keys=keys, **distill_options(kind))
        model.add_callback("on_train_batch_start", gate.begin)
        model.add_callback("on_train_batch_end", gate.end)
        model.train(data=str(data), project=name, optimizer="AdamW", **settings, **quiet, **off)


FRAMEWORKS: dict[str, tuple[Callable[[Gate, str, int, int], None], str, str, str]] = {
    "ultralytics": (train_ultralytics, "ultralytics", "YOLO11s", "YOLO11n"),
    "transformers": (train_transformers, "transformers", "RT-DETR R50", "RT-DETR R18, half as wide"),
    "torchvision": (train_torchvision, "torchvision", "RetinaNet R50", "RetinaNet R18"),
    "lightning": (train_lightning, "lightning", "RetinaNet R50", "RetinaNet R18"),
}
"""By name: its training, its package, the expert and the apprentice."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = results.Parser("benchmarks.framework_cost", __doc__, out="benchmarks/results/framework_cost.csv")
    parser.add_names("--frameworks", list(FRAMEWORKS))
    parser.add_number("--repeats", 21, text="rounds after the warm-up")
    parser.add_number("--batch", 4, minimum=2)
    parser.add_number("--size", 320, 64, "height and width of the images", multiple=32)
    parser.add_threads()
    return parser.parse_args(arguments)


def measure(name: str, options: argparse.Namespace) -> list[FrameworkRow]:
    """Measure the kinds of step of one framework, interleaved."""
    train, package, expert, apprentice = FRAMEWORKS[name]
    machine = asdict(results.describe_machine("cpu"))
    gates: dict[str, Gate] = {}
    for kind in KINDS:
        gates[kind] = Gate(lambda gate, kind=kind: train(gate, kind, options.batch, options.size))  # type: ignore[misc]
        # One after the other, since some frameworks set global state up. The first steps make checks, adapters, caches
        # and buffers.
        gates[kind].sample()
        gates[kind].sample()
    samplers = {kind: gate.sample for kind, gate in gates.items()}
    with results.progress(len(KINDS) * (1 + options.repeats), "step") as bar:
        timings = time_interleaved(samplers, options.repeats, math.inf, bar.update)
    return [
        FrameworkRow(
            framework=name,
            version=importlib.metadata.version(package),
            expert=expert,
            apprentice=apprentice,
            batch=options.batch,
            size=options.size,
            kind=kind,
            **timing.columns(),
            repeats=timing.repeats,
            ratio=timing.median / timings["plain"].median,
            over_expert=None if kind in ("plain", "expert") else compare(timing, timings["expert"]).median - 1,
            threads=torch.get_num_threads(),
            **machine,
        )
        for kind, timing in timings.items()
    ]


def measure_apart(name: str, options: argparse.Namespace) -> list[FrameworkRow]:
    """Measure one framework in a process of its own: they change global settings, and leave threads behind."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.csv"
        given = {key: getattr(options, key) for key in ("repeats", "batch", "size", "threads")}
        arguments = [f"--{key}={value}" for key, value in {**given, "frameworks": name, "out": path}.items()]
        subprocess.run([sys.executable, "-m", __spec__.name, *arguments], check=True, stdout=subprocess.DEVNULL)
        return results.read_rows(path, FrameworkRow)


def format_rows(rows: list[FrameworkRow]) -> str:
    """Lay out the rows for the terminal."""
    lines = [["framework", "kind", "ms", "20-80 %", "ratio", "beside expert"]]
    for row in rows:
        times = results.time_cells(row.median_ms, row.p20_ms, row.p80_ms)
        over = "" if row.over_expert is None else f"{100 * row.over_expert:+.1f} %"
        lines.append([row.framework, row.kind, *times, f"{row.ratio:.2f}", over])
    return results.format_table(lines)


def main() -> None:
    """Measure, print and write."""
    options = parse()
    if len(options.frameworks) == 1:
        torch.set_num_threads(options.threads)
        os.environ.setdefault("YOLO_VERBOSE", "False")
        for name in ("ultralytics", "lightning.pytorch", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)
        rows = measure(options.frameworks[0], options)
    else:
        rows = [row for name in options.frameworks for row in measure_apart(name, options)]
    results.report(options.out, FrameworkRow, rows, format_rows(rows))


if __name__ == "__main__":
    results.exit_with_errors(main)
