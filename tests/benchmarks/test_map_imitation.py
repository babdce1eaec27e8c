"""The figures of imitated maps are those of models whose maps are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import map_imitation
from benchmarks.map_imitation import explained, format_rows, measure, parse, swapped, unit_factors
from benchmarks.results import read_rows
from rakd.data.kitti import KittiDataset
from rakd.detector.configs import DETECTORS
from rakd.detector.files import save_detector
from rakd.scenes import make_scenes
from rakd.study.results import StudyResult, write_study


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(folder, 5)
    return folder


def test_shares_of_a_perfect_a_halved_and_an_empty_imitation(scenes: Path) -> None:
    expert, other, apprentice = (DETECTORS["tiny"].build(0).eval() for _ in range(3))
    frames = KittiDataset(scenes, "val", height=128, rules=expert.config.rules)
    factors = unit_factors(expert, frames)
    maps = expert.extract_features(torch.rand(1, 3, 128, 448))
    assert list(factors) == list(maps) == ["p2", "p3", "p4", "p5"]
    extract = expert.extract_features

    def scaled(factor: float) -> list[tuple[float, float]]:
        apprentice.extract_features = lambda images: {  # type: ignore[method-assign]
            name: factor * factors[name] * value for name, value in extract(images).items()
        }
        return explained(expert, apprentice, factors, frames)

    perfect, half, nothing = scaled(1.0), scaled(0.5), scaled(0.0)
    assert sum(weight for weight, _ in perfect) == pytest.approx(1.0)
    assert [share for _, share in perfect] == pytest.approx([1.0] * 4, abs=1e-9)
    for (_, some), (_, none) in zip(half, nothing, strict=True):
        # The error of a factor is its square times that of nothing, whose share is below 0 by the mean's own square.
        assert none < 0 and 1 - some == pytest.approx(0.25 * (1 - none))
    # A perfect imitation leaves the expert's maps as they are; another is seen in the map that is replaced alone.
    images = torch.rand(1, 3, 128, 448)
    own = extract(images)
    scaled(1.0)
    with swapped(other, apprentice, factors, ["p2", "p3", "p4", "p5"]):
        for name, value in other.extract_features(images).items():
            torch.testing.assert_close(value, own[name])
    scaled(0.5)
    with swapped(other, apprentice, factors, ["p3"]):
        for name, value in other.extract_features(images).items():
            torch.testing.assert_close(value, own[name] * (0.5 if name == "p3" else 1.0))
    for name, value in other.extract_features(images).items():
        assert torch.equal(value, own[name])


def test_an_expert_of_larger_images_is_compared_where_objects_are(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = replace(DETECTORS["tiny"], height=192, width=672)
    expert, apprentice = larger.build(0).eval(), DETECTORS["tiny"].build(1).eval()
    for folder, detector in (("expert-seed3", expert), ("box_l2-seed3", apprentice)):
        (tmp_path / folder).mkdir()
        save_detector(tmp_path / folder / "detector.pt", detector)
    write_study(tmp_path / "study.json", StudyResult((), config={}))
    rows = measure(parse([str(tmp_path), "--data", str(scenes), "--methods", "box_l2", "--seeds", "3"]))
    assert [(row.method, row.stride) for row in rows] == [("box_l2", n) for n in (4, 8, 16, 32)]
    assert {(row.expert_ap, row.swapped_ap) for row in rows} == {(None, None)}
    size = larger.image_size
    frames = KittiDataset(scenes, "val", height=128, rules=apprentice.config.rules, expert_size=size)
    ones = dict.fromkeys(expert.extract_features(torch.rand(1, 3, 192, 672)), 1.0)
    found = explained(expert, apprentice, ones, frames)
    assert [(row.weight, row.explained) for row in rows] == [pytest.approx(pair) for pair in found]

    def place(images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps that hold their cells' places, as shares of the image: linear, so that pooling gives the boxes'."""
        maps = {}
        for name, stride in zip(ones, (4, 8, 16, 32), strict=True):
            y, x = ((torch.arange(side // stride) + 0.5) / (side // stride) for side in images.shape[2:])
            maps[name] = (y[:, None] + x).expand(len(images), 64, -1, -1)
        return maps

    expert.extract_features = apprentice.extract_features = place  # type: ignore[assignment,method-assign]
    shares = [share for _, share in explained(expert, apprentice, ones, frames)]
    assert min(shares) > 0.97  # less than 1 where boxes reach the image's edge, whose half cells differ in size
    monkeypatch.setattr(map_imitation, "expert_strides", lambda *_: expert.strides)
    misplaced = [share for _, share in explained(expert, apprentice, ones, frames)]
    assert max(misplaced) < 0.5


@pytest.mark.filterwarnings("ignore:.*none of the .* detections")
def test_rows_and_table(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "rows.csv"
    for folder, seed in (("expert-seed3", 0), ("rakd-seed3", 1)):
        (run / folder).mkdir(parents=True)
        save_detector(run / folder / "detector.pt", DETECTORS["tiny"].build(seed))
    write_study(run / "study.json", StudyResult((), config={"rescale": True}))
    monkeypatch.setattr("sys.argv", ["x", str(run), "--data", str(scenes), "--seeds", "3", "--out", str(out)])
    map_imitation.main()
    rows = read_rows(out, map_imitation.ImitationRow)
    assert [(row.method, row.seed, row.stride) for row in rows] == [("rakd", 3, n) for n in (0, 4, 8, 16, 32)]
    assert rows[0].weight is None and rows[0].explained is None
    assert sum(row.weight or 0.0 for row in rows) == pytest.approx(1.0)
    assert format_rows(rows) in capsys.readouterr().out
    words = [str(run), "--data", str(scenes)]
    with pytest.raises(ValueError, match=r"expert-seed4.detector\.pt: no such file"):
        measure(parse([*words, "--seeds", "4"]))
    with pytest.raises(ValueError, match="methods: invalid choice: 'pkd'"):
        parse([*words, "--methods", "pkd"])
    save_detector(run / "rakd-seed3" / "detector.pt", DETECTORS["kitti-r18"].without_download().build(1))
    with pytest.raises(ValueError, match="images of the apprentice's height or of its aspect ratio"):
        measure(parse([*words, "--seeds", "3"]))
    write_study(run / "study.json", StudyResult((), config={"rescale": "both"}))
    with pytest.raises(ValueError, match="expected apprentices whose own maps were not rescaled, got 'both'"):
        measure(parse(words))
    (run / "study.json").unlink()
    with pytest.raises(ValueError, match=r"study\.json: no such file; is the study finished\?"):
        measure(parse(words))
