"""The evaluation against figures of the official development kit."""

import json
import lzma
import math
from pathlib import Path

import pytest

from rakd.evaluation.kitti import evaluate

CASES = sorted((Path(__file__).parent / "data" / "kitti_cases").glob("*.json.xz"))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name.partition(".")[0])
def test_figures_of_the_official_kit(case, tmp_path):
    content = json.loads(lzma.decompress(case.read_bytes()))
    for kind in ("gt", "pred"):
        (tmp_path / kind).mkdir()
        for name, text in content[kind].items():
            (tmp_path / kind / name).write_text(text)
    result = evaluate(tmp_path / "gt", tmp_path / "pred", progress=False)
    for name, expected in content["expected"].items():
        for metric in ("bbox", "aos", "bev", "3d"):
            figures = result[name][metric]
            assert figures["evaluated"] == expected[metric]["evaluated"], (name, metric)
            assert figures["objects"] == expected["n_gt"], (name, metric)
            for average in ("R40", "R11"):
                assert len(figures[average]) == 3
                for got, wanted in zip(figures[average], expected[metric][average], strict=True):
                    wanted = math.nan if wanted is None else wanted
                    assert got == pytest.approx(wanted, abs=1e-6, nan_ok=True), (name, metric, average)


def test_there_are_cases():
    assert len(CASES) == 7
