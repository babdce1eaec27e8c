"""``python -m benchmarks.gains``: what each method gains in six studies of five seeds, as one picture."""

from __future__ import annotations

from benchmarks.results import ROOT, Parser, atomic_write, exit_with_errors
from rakd.study.pictures import draw_gains
from rakd.study.results import read_study

STUDIES = {
    "MobileNetV3-small from random weights, 1,000 steps": "distill_scenes_methods",
    "MobileNetV3-small from random weights, 3,000 steps": "distill_scenes_long",
    "EfficientNet-Lite0 from ImageNet weights, 1,000 steps": "distill_scenes_resolution",
    "EfficientNet-Lite0 from ImageNet weights, 2,000 steps": "distill_scenes_resolution_long",
    "EfficientNet-Lite0 from ImageNet weights, 4,000 steps": "distill_scenes_resolution_four",
    "EfficientNet-Lite0 after 1,000 steps, fine-tuned on 59 frames of KITTI, evaluated on 31": "distill_real_frames",
}
"""Folders of ``benchmarks/results`` by what their rows are called."""


def main() -> None:
    """Read, draw and write."""
    options = Parser("benchmarks.gains", __doc__, out="benchmarks/results/gains.png").parse_args()
    folder = ROOT / "benchmarks" / "results"
    figure = draw_gains({name: read_study(folder / stem / "study.json") for name, stem in STUDIES.items()})
    with atomic_write(options.out) as temporary:
        figure.savefig(temporary, dpi=110, facecolor="white", format="png")


if __name__ == "__main__":
    exit_with_errors(main)
