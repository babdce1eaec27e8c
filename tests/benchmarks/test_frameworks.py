"""Steps let through one by one, the table of frameworks, and the comparison's bookkeeping."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import framework_cost, yolo_comparison
from benchmarks.framework_cost import FRAMEWORKS, Gate
from benchmarks.results import describe_machine, read_rows, write_rows
from rakd.data.frames import read_split


def test_a_gate_lets_one_step_through_at_a_time() -> None:
    steps: list[int] = []

    def train(gate: Gate) -> None:
        while True:
            gate.begin()
            steps.append(len(steps))
            time.sleep(0.01)
            gate.end()

    gate = Gate(train)
    time.sleep(0.05)
    assert steps == []
    assert gate.sample() >= 10
    time.sleep(0.05)
    assert steps == [0]
    gate.sample()
    assert steps == [0, 1]


def test_a_trainer_that_fails_or_ends_is_told() -> None:
    def fail(gate: Gate) -> None:
        gate.begin()
        raise KeyError("what happened")

    with pytest.raises(RuntimeError, match="KeyError: 'what happened'"):
        Gate(fail).sample()
    with pytest.raises(RuntimeError, match="the trainer ended before its last step"):
        Gate(lambda gate: None).sample()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FRAMEWORKS))
def test_each_framework_is_measured(name: str, tmp_path: Path) -> None:
    pytest.importorskip(FRAMEWORKS[name][1])
    options = framework_cost.parse(["--repeats=2", "--batch=2", "--size=128", "--threads=1"])
    rows = framework_cost.measure_apart(name, options)
    assert [row.kind for row in rows] == list(framework_cost.KINDS)
    times = {row.kind: row.median_ms for row in rows}
    assert all(value > 0 for value in times.values())
    assert [row.over_expert is None for row in rows] == [True, True, False, False]
    assert name in framework_cost.format_rows(rows)
    write_rows(tmp_path / "rows.csv", framework_cost.FrameworkRow, rows)
    assert read_rows(tmp_path / "rows.csv", framework_cost.FrameworkRow) == rows


SMALL = ("--frames=10", "--learned=2", "--size=96", "--epochs=1", "--expert-epochs=1", "--batch=4")


def test_the_comparison_learns_tunes_and_validates_on_scenes_of_their_own(tmp_path: Path) -> None:
    for split in ("val", "tune"):
        extra = ["--tune"] if split == "tune" else []
        options = yolo_comparison.parse([f"--work={tmp_path}", f"--out={tmp_path / 'rows.csv'}", *SMALL, *extra])
        comparison = yolo_comparison.Comparison(options)
        used: dict[str, list[str]] = {}
        for role in ("expert", "apprentice"):
            lines = (tmp_path / "yolo" / f"{role}-{split}.yaml").read_text().splitlines()
            lists = {
                line.partition(": ")[0]: line.partition(": ")[2] for line in lines if line.startswith(("train", "val"))
            }
            for part, name in lists.items():
                images = (tmp_path / "yolo" / name).read_text().split()
                assert all((tmp_path / "yolo" / image).is_file() for image in images)
                used[f"{role} {part}"] = [Path(image).stem for image in images]
        assert used["apprentice train"] == used["expert train"][:2]
        assert used["apprentice val"] == used["expert val"]
        assert used["expert val"] == read_split(tmp_path / "kitti" / "ImageSets" / f"{split}.txt")
        assert not set(used["expert val"]) & set(used["expert train"])
        assert comparison._settings("alone")["validated"] == len(used["expert val"])


@pytest.mark.parametrize(
    "way",
    [
        "alone=1",
        "rakd",
        "unknown=1",
        "ultralytics",
        "ultralytics=auto:3",
        "rakd=auto:x",
        "rakd@=1",
        "rakd@0=1",
        "pkd@22=1",
    ],
)
def test_a_way_has_a_known_name_and_its_weight(way: str) -> None:
    with pytest.raises(ValueError, match=r"ways: expected alone, ultralytics=WEIGHT, METHOD=WEIGHT, rakd@SIZE"):
        yolo_comparison.parse(["--ways", way])


def test_a_ways_size_and_weight_reach_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ultralytics = pytest.importorskip("ultralytics")
    from rakd.integrations import ultralytics as integration

    given: dict[str, Any] = {}

    def distill(model: Any, expert: Any, weight: Any, **options: Any) -> None:
        given.update(weight=weight, **options)
        raise InterruptedError

    monkeypatch.setattr(ultralytics, "YOLO", lambda path: path)
    monkeypatch.setattr(integration, "distill", distill)
    comparison = yolo_comparison.Comparison(
        yolo_comparison.parse([f"--work={tmp_path}", f"--out={tmp_path / 'rows.csv'}", *SMALL])
    )
    for way, expected in (
        ("rakd@22=auto:3", {"method": "rakd", "weight": "auto:3", "canonical_size": 22.0}),
        ("rakd=2.5", {"method": "rakd", "weight": 2.5}),
        ("hfa=auto:1", {"method": "hfa", "weight": "auto:1"}),
    ):
        given.clear()
        with pytest.raises(InterruptedError):
            comparison._train(way, 0, tmp_path / "expert.pt")
        assert given == {"rescale": True, **expected}


def _row(way: str, seed: int, value: float, **changes: Any) -> yolo_comparison.ComparisonRow:
    fixed = {"network": "yolo11n", "learned": 2, "validated": 2, "split": "val", "epochs": 1, "expert_epochs": 1}
    fixed |= {"size": 96, "batch": 4, "ultralytics": "8"}
    machine = dataclasses.asdict(describe_machine("cpu"))
    found = {"way": way, "seed": seed, "map": value, "map50": 2 * value, "seconds": 60.0}
    return yolo_comparison.ComparisonRow(**{**found, **fixed, **machine, **changes})


def test_the_comparison_is_summed_up_seed_by_seed() -> None:
    rows = [_row("expert", 0, 0.4)]
    rows += [_row("alone", seed, 0.1 + 0.02 * seed) for seed in range(3)]
    rows += [_row("rakd=1", seed, 0.15 + 0.02 * seed + 0.01 * (seed - 1)) for seed in range(3)]
    rows += [_row("pkd=1", 0, 0.1)]  # of one seed: no interval
    ways, differences = (part.splitlines() for part in yolo_comparison.format_rows(rows).split("\n\n"))
    assert [line.split()[0] for line in ways] == ["way", "expert", "alone", "rakd=1", "pkd=1"]
    assert "40.00" in ways[1] and "±" not in ways[1]  # of one seed
    assert "12.00 ± 2.00" in ways[2] and "24.00 ± 4.00" in ways[2]
    assert "17.00 ± 3.00" in ways[3]
    (line,) = differences[1:]
    assert line.startswith("rakd=1 - alone") and "+5.00" in line
    # Student's t with 2 degrees of freedom at 0.975, one pair being there: 4.3027; error 1 / sqrt(3).
    assert "[+2.52, +7.48]" in line
    rows += [_row("pkd=1", seed, 0.1 + 0.03 * seed) for seed in (1, 2)]
    _, from_alone, of_rakd = (part.splitlines()[1:] for part in yolo_comparison.format_rows(rows).split("\n\n"))
    # At 1 - 0.025 / 2, two differences being there: 6.2053.
    assert [line.split("  ")[0] for line in from_alone] == ["rakd=1 - alone", "pkd=1 - alone"]
    assert "[+1.42, +8.58]" in from_alone[0]
    (line,) = of_rakd
    # RAKD 0.14, 0.17, 0.20; PKD 0.10, 0.13, 0.16: the differences are equal.
    assert line.startswith("rakd=1 - pkd=1") and "[+4.00, +4.00]" in line


def test_the_comparison_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'rows.csv'}", *SMALL]
    options = yolo_comparison.parse([*arguments, "--seeds", "0", "1", "--ways", "alone", "rakd=1"])
    write_rows(options.out, yolo_comparison.ComparisonRow, [_row("alone", 0, 0.1)])
    asked: list[tuple[str, int]] = []

    def train(self: Any, way: str, seed: int, expert: Path) -> None:
        asked.append((way, seed))
        self.rows.append(_row(way, seed, 0.2))

    monkeypatch.setattr(yolo_comparison.Comparison, "_train", train)
    yolo_comparison.Comparison(options).run()
    assert asked == [("expert", 0), ("rakd=1", 0), ("alone", 1), ("rakd=1", 1)]
    (tmp_path / "given.pt").touch()
    given = [f"--out={tmp_path / 'given.csv'}", "--seeds", "0", "--ways", "rakd=1", f"--expert={tmp_path / 'given.pt'}"]
    asked.clear()
    yolo_comparison.Comparison(yolo_comparison.parse([*arguments, *given])).run()
    assert asked == [("rakd=1", 0)]
    with pytest.raises(ValueError, match="expert: expected a file, got nowhere"):
        yolo_comparison.parse(["--expert=nowhere"])
    other = argparse.Namespace(**{**vars(options), "epochs": 2})
    with pytest.raises(ValueError, match="choose another file"):
        yolo_comparison.Comparison(other)


def test_an_expert_that_is_made_anew_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ultralytics = pytest.importorskip("ultralytics", reason="pip install 'rakd[ultralytics]'")
    arguments = [f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'rows.csv'}", *SMALL]
    again = yolo_comparison.Comparison(yolo_comparison.parse(arguments))
    again.rows = [_row("expert", 0, 0.4), _row("rakd=1", 0, 0.1)]
    write_rows(tmp_path / "same.csv", yolo_comparison.ComparisonRow, [_row("alone", 0, 0.3 + 1e-9)])

    class Trained:
        """Trains in no time, to another expert than that of the rows."""

        def __init__(self, name: str) -> None:
            self.box = argparse.Namespace(map=0.3, map50=0.6)

        def train(self, **_: Any) -> Any:
            return self

    monkeypatch.setattr(ultralytics, "YOLO", Trained, raising=False)
    with pytest.raises(ValueError, match=r"has 0\.4 for expert, made anew it has 0\.3"):
        again._train("expert", 0, tmp_path / "best.pt")
    again.rows = read_rows(tmp_path / "same.csv", yolo_comparison.ComparisonRow)
    again._train("alone", 0, tmp_path / "best.pt")  # the same, but for the digits that the file leaves out
