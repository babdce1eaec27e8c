"""``python -m benchmarks.training_cost``: the cost of distillation in a training step of a real detector.

A step is what `rakd.training.trainer.Trainer` does with a batch in memory: forward, losses, backward, clipping,
optimiser. Steps of these kinds take turns in one run, on the same images and boxes:

- ``alone``: the apprentice learns alone;
- ``expert``: the expert runs as well, and its features are dropped;
- ``rakd:<backend>``: RAKD through `rakd_ops.soft_roi_distill`, as ``rakd distill`` trains;
- ``torchvision``: the same loss as people write it, RoIAlign per level and network and the rest in eager PyTorch.

Features are compared in boxes jittered around each image's objects, as many as the detector's losses may draw:
a trained proposal network finds that many, the random weights measured here would not. Unless backends are named,
the first that runs on the device is measured.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from benchmarks import results
from benchmarks.implementations import Implementation, add_options, check_agreement, choose_backends, torchvision_loss
from benchmarks.timing import Sampler, compare, end_to_end_sampler, time_interleaved, wall_sampler
from benchmarks.workloads import Inputs, Workload, jitter_boxes
from rakd.data.kitti import Batch, KittiDataset, collate
from rakd.data.targets import Targets
from rakd.detector.configs import DETECTORS, DetectorConfig
from rakd.detector.detector import Detector
from rakd.distill.distiller import Distiller
from rakd.distill.regions import RegionDistillation
from rakd.scenes import make_scenes
from rakd.training.optim import make_optimizer
from rakd.training.settings import Optimizer, TrainSettings

ALONE, EXPERT, TORCHVISION = "alone", "expert", "torchvision"

Features = dict[str, Tensor]
Term = Callable[[Features], Tensor | None]
"""Gives the loss that a kind of step adds to the apprentice's own, from its feature maps; None: nothing."""


@dataclass(frozen=True)
class Pair:
    """An expert, and the apprentice that learns from it."""

    expert: str  # name of its detector
    apprentice: str
    batch: int  # images a step
    optimizer: Optimizer  # of the pair's study


PAIRS = {"tiny": Pair("tiny-expert", "tiny", 4, "adamw"), "kitti": Pair("kitti-r50", "kitti-r18", 2, "sgd")}


@dataclass(frozen=True, kw_only=True)
class StepRow(results.Machine):
    """One kind of training step."""

    pair: str  # name of expert and apprentice together
    expert: str
    apprentice: str
    batch: int  # images
    boxes: int  # of the whole batch in which features are compared
    height: int  # of the images, pixels
    width: int
    implementation: str  # "alone", "expert", "rakd:<backend>" or "torchvision"
    median_ms: float  # of a step
    p20_ms: float  # 20th percentile
    p80_ms: float  # 80th percentile
    repeats: int  # steps these come from
    ratio: float  # this median over that of "alone", in the same interleaved run
    share: float | None = None  # of the loss, if any: median over the rounds of (this - expert) / expert
    share_p20: float | None = None
    share_p80: float | None = None
    threads: int  # of torch, on the CPU


class Steps:
    """Training steps of one apprentice on one batch, all alike but for the term that is added.

    The learning rate is 0: the optimiser works as ever, but every step starts from the same weights, so that each
    draws the same anchors and proposals and does the same work besides its term. The seed is that of weights, scenes
    and boxes.
    """

    def __init__(self, pair: Pair, device: str, seed: int) -> None:
        self.apprentice = _make_detector(pair.apprentice, seed + 1).to(device)
        self.expert = _make_detector(pair.expert, seed).to(device)
        config = self.apprentice.config
        batch = _render_batch(pair.batch, config.height, config.width, seed)
        self.images = batch.images.to(device)
        self.sizes = batch.sizes
        self.targets = batch.targets(device)
        self.seeds = range(pair.batch)
        count = int(config.heads.sampled * config.heads.positive_share)
        self.boxes = _draw_boxes(batch.targets("cpu"), count, device, seed)
        height, width = self.images.shape[2:]
        self.workload = Workload(pair.batch, count, 7, "proposals", self.apprentice.channels, height, width)
        for detector in (self.expert, self.apprentice):
            update_bn([self.images], detector.pyramid)  # random weights would give maps of absurd scales
        self.expert.eval().requires_grad_(False)
        self.apprentice.train()
        if config.backbone.frozen_norm:
            _freeze_norm(self.apprentice)
        self.settings = TrainSettings(optimizer=pair.optimizer)
        self.optimizer = make_optimizer(self.apprentice, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def run(self, term: Term) -> float:
        """Do one step as the trainer does, with a term beside the apprentice's losses; give the sum of all."""
        self.optimizer.zero_grad()
        features = self.apprentice.extract_features(self.images)
        losses, _ = self.apprentice.losses(features, self.sizes, self.targets, self.seeds)
        added = term(features)
        terms = [*losses.values(), *([] if added is None else [added])]
        total = torch.stack(terms).sum()
        total.backward()  # type: ignore[no-untyped-call]
        assert self.settings.clip is not None
        nn.utils.clip_grad_norm_(self.apprentice.parameters(), self.settings.clip)
        self.optimizer.step()
        return total.item()

    def terms(self, backends: tuple[str, ...]) -> dict[str, Term]:
        """The kinds of step, by name."""
        rakd: dict[str, Term] = {f"rakd:{name}": self._distillation(name) for name in backends}
        return {ALONE: lambda _: None, EXPERT: self._run_expert, **rakd, TORCHVISION: self._distill_eagerly}

    def check(self, terms: dict[str, Term]) -> None:
        """See that all distillation terms compute the same loss and gradients.

        Raises:
            DisagreementError: They do not.
        """
        with torch.no_grad():
            found = self.apprentice.extract_features(self.images)
        features = {name: feature.requires_grad_() for name, feature in found.items()}
        implementations = [
            Implementation(name, functools.partial(_value, term, features))
            for name, term in terms.items()
            if name not in (ALONE, EXPERT)
        ]
        upstream = torch.ones((), device=self.images.device)
        check_agreement(implementations, list(features.values()), upstream, "float32", lambda _: None)

    @torch.no_grad()
    def _expert_features(self) -> Features:
        return self.expert.extract_features(self.images)

    def _run_expert(self, _: Features) -> None:
        self._expert_features()

    def _distillation(self, backend: str) -> Term:
        distiller = Distiller(self.expert, RegionDistillation("soft", self.apprentice.strides, backend=backend))
        return lambda features: distiller(self.images, self.boxes, features)

    def _distill_eagerly(self, features: Features) -> Tensor:
        expert = self._expert_features()
        rows = [torch.cat([boxes.new_full((len(boxes), 1), i), boxes], dim=1) for i, boxes in enumerate(self.boxes)]
        inputs = Inputs(list(features.values()), [expert[name] for name in features], torch.cat(rows))
        return torchvision_loss(inputs, self.workload)


def _value(term: Term, features: Features) -> Tensor:
    value = term(features)
    assert value is not None
    return value


def _make_detector(name: str, seed: int) -> Detector:
    config = DETECTORS[name]
    assert isinstance(config, DetectorConfig)
    # Time does not depend on the weights, so nothing is downloaded.
    return Detector(config.without_download(), seed)


def _freeze_norm(detector: Detector) -> None:
    """Keep batch normalisation as ImageNet weights have it kept: its gradients would lengthen the step."""
    for module in detector.pyramid.body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def _render_batch(count: int, height: int, width: int | None, seed: int) -> Batch:
    """Render street scenes and take the first with something to learn."""
    with tempfile.TemporaryDirectory() as folder:
        make_scenes(Path(folder) / "scenes", 2 * count + 2, seed)
        dataset = KittiDataset(Path(folder) / "scenes", height=height)
        samples = []
        for index in range(len(dataset)):
            sample = dataset[index]
            if sample.targets is not None and len(sample.targets):
                samples.append(sample)
            if len(samples) == count:
                return collate(samples, size=None if width is None else (width, height))
    raise ValueError(f"seed: too few of its scenes hold objects to learn from, got {seed}; choose another")


def _draw_boxes(targets: list[Targets], count: int, device: str, seed: int) -> list[Tensor]:
    """Draw ``[count, 4]`` float32 boxes around each image's objects."""
    generator = torch.Generator().manual_seed(seed)
    return [jitter_boxes(target.boxes, count, generator).float().to(device) for target in targets]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = results.Parser("benchmarks.training_cost", __doc__)
    parser.add_argument("--pair", default="tiny", choices=list(PAIRS), help="tiny (tiny-expert and tiny, 128 x 448) or "
                        "kitti (kitti-r50 and kitti-r18, 512 x 1760: many seconds a step on a CPU)")  # fmt: skip
    add_options(parser)
    parser.add_number("--repeats", 21, text="interleaved rounds, after one that is not timed")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, device: str, backends: tuple[str, ...]) -> list[StepRow]:
    """Measure the kinds of step, a row for each.

    Raises:
        DisagreementError: The distillation terms do not compute the same.
    """
    pair = PAIRS[options.pair]
    steps = Steps(pair, device, options.seed)
    terms = steps.terms(backends)
    steps.check(terms)
    sampler = end_to_end_sampler if torch.device(device).type == "cuda" else wall_sampler
    runs: dict[str, Sampler] = {name: sampler(functools.partial(steps.run, term)) for name, term in terms.items()}
    with results.progress(len(runs) * (1 + options.repeats), "step") as bar:
        timings = time_interleaved(runs, options.repeats, math.inf, bar.update)
    machine = asdict(results.describe_machine(device))
    rows = []
    for name, timing in timings.items():
        shares: dict[str, Any] = {}
        if name not in (ALONE, EXPERT):
            beside = compare(timing, timings[EXPERT])
            shares = {"share": beside.median - 1, "share_p20": beside.p20 - 1, "share_p80": beside.p80 - 1}
        row = StepRow(
            pair=options.pair,
            expert=pair.expert,
            apprentice=pair.apprentice,
            batch=pair.batch,
            boxes=steps.workload.boxes,
            height=steps.workload.height,
            width=steps.workload.width,
            implementation=name,
            **timing.columns(),
            repeats=timing.repeats,
            ratio=timing.median / timings[ALONE].median,
            **shares,
            threads=torch.get_num_threads(),
            **machine,
        )
        rows.append(row)
    return rows


def format_rows(rows: list[StepRow]) -> str:
    """Lay out the rows for the terminal."""
    first = rows[0]
    heading = (
        f"{first.pair}: {first.apprentice} learns from {first.expert}, {first.batch} images "
        f"{first.height}×{first.width}, {first.boxes} boxes, {first.threads} threads, {first.repeats} rounds\n"
    )
    lines = [["step", "ms", "20-80 %", "ratio", "loss adds", "20-80 %"]]
    for row in rows:
        times = results.time_cells(row.median_ms, row.p20_ms, row.p80_ms)
        line = [row.implementation, *times, results.format_ratio(row.ratio), "", ""]
        if row.share is not None and row.share_p20 is not None and row.share_p80 is not None:
            line[-2:] = f"{100 * row.share:.1f} %", f"{100 * row.share_p20:.1f} to {100 * row.share_p80:.1f} %"
        lines.append(line)
    return heading + results.format_table(lines)


def main() -> None:
    """Measure, print and write."""
    options = parse()
    device, backends = choose_backends(options.backends, options.device)
    torch.set_num_threads(options.threads)
    path = results.csv_path(options.out, f"training-{options.pair}", device)
    rows = measure(options, device, backends[: len(options.backends) or 1])
    results.report(path, StepRow, rows, format_rows(rows))


if __name__ == "__main__":
    results.exit_with_errors(main)
