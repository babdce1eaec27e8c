import json
import math

import numpy as np
import pytest
from PIL import Image

from rakd.evaluation.kitti import CLASSES
from rakd.evaluation.report import format_table, write_curves, write_json


@pytest.fixture
def result():
    def metric(evaluated, *values):
        curve = np.linspace(1, 0, 41).tolist()
        return {
            "evaluated": evaluated,
            "R40": list(values),
            "R11": [value / 2 for value in values],
            "precision": [curve] * 3,
            "objects": [1, 2, 3],
        }

    metrics = {
        "bbox": (90.0, 80.0, 70.0),
        "aos": (9.0, 8.0, math.nan),
        "bev": (1, 2, 3),
        "3d": (100.0, 2, 33.333),
    }
    return {
        name: {key: metric(name != "Cyclist" or key != "3d", *values) for key, values in metrics.items()}
        for name in CLASSES
    }


def test_table(result):
    head, levels, rule, *rows = format_table(result).splitlines()
    assert head.split("|")[1].strip() == "3D"
    assert levels.split("|")[1].split() == ["Easy", "Mod.", "Hard"]
    assert set(rule) == {"-", "+"}
    assert [row.split("|")[0].strip() for row in rows] == ["Car (0.7)", "Pedestrian (0.5)", "Cyclist (0.5)"]
    assert rows[0].split("|")[1].split() == ["100.00", "2.00", "33.33"]
    assert rows[0].split("|")[4].split() == ["9.00", "8.00", "nan"]
    assert rows[2].split("|")[1].split() == ["-", "-", "-"]
    assert len({len(line) for line in (levels, rule, *rows)}) == 1
    assert "50.00" in format_table(result, "R11").splitlines()[3]


def test_table_says_which_overlaps(result):
    *_, car, pedestrian, _, note = format_table(result, overlaps="loose").splitlines()
    assert car.startswith("Car (0.5)") and pedestrian.startswith("Pedestrian (0.25)")
    assert "2D boxes and orientation keep" in note and "Car 0.7" in note


def test_json_is_valid_without_nan(result, tmp_path):
    write_json(tmp_path / "deep" / "evaluation.json", result)

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    back = json.loads((tmp_path / "deep" / "evaluation.json").read_text(), parse_constant=refuse)
    assert back["Car"]["aos"]["R40"] == [9.0, 8.0, None]
    assert back["Cyclist"]["3d"]["evaluated"] is False


def test_curves_are_drawn(result, tmp_path):
    write_curves(tmp_path / "curves.png", result)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 1200
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {(27, 158, 119), (217, 95, 2), (117, 112, 179)} <= colors
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
