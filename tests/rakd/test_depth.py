"""Relative depth errors against answers by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rakd.evaluation.depth import SIZES, depth_errors, find_depth_errors
from rakd.evaluation.kitti import read_folders


def car(x1=100, z=20.0, *, name="Car", occlusion=0, x=1.0, bottom=200):
    """A label 100 pixels wide and, by default, 100 high."""
    return f"{name} 0 {occlusion} 0.5 {x1} 100 {x1 + 100} {bottom} 1.5 1.6 4 {x} 1.7 {z} 0.6"


def errors(folder, truth, detections):
    for kind, frames in (("gt", truth), ("pred", detections)):
        (folder / kind).mkdir(parents=True)
        for i, rows in enumerate(frames):
            (folder / kind / f"{i:06d}.txt").write_text("".join(f"{row}\n" for row in rows))
    return depth_errors(folder / "gt", folder / "pred", progress=False)


def test_mean_over_the_objects_found(tmp_path):
    # 22 m for 20 m, 9 m for 10 m; nobody finds the one at x1 = 400; the pedestrian is 3 m off at 30 m.
    truth = [[car(100, 20), car(400, 40)], [car(100, 10), car(300, 30, name="Pedestrian")]]
    found = [[car(105, 22) + " 0.9"], [car(300, 33, name="Pedestrian") + " 0.2", car(100, 9) + " 0.1"]]
    result = errors(tmp_path, truth, found)
    assert (result["Car"].abs_rel, result["Car"].recall) == pytest.approx((0.1, 2 / 3))
    assert (result["Pedestrian"].abs_rel, result["Pedestrian"].recall) == pytest.approx((0.1, 1.0))
    assert math.isnan(result["Cyclist"].abs_rel) and math.isnan(result["Cyclist"].recall)
    assert (result["all"].abs_rel, result["all"].recall, result["all"].objects) == pytest.approx((0.1, 0.75, 4))


def test_figures_by_size(tmp_path):
    # Boxes 100 wide: 100 x 100 is in the group of 96 to 136, 100 x 49 (root 70) in that of 68 to 96.
    truth = [[car(100, 20), car(400, 40)], [car(100, 10, bottom=149), car(300, 30, name="Pedestrian")]]
    found = [[car(105, 22) + " 0.9"], [car(300, 33, name="Pedestrian") + " 0.2", car(100, 8, bottom=149) + " 0.1"]]
    errors(tmp_path, truth, found)
    frames = ["000000", "000001"]
    groups = find_depth_errors(*read_folders(tmp_path / "gt", tmp_path / "pred", frames=frames)).by_size()
    assert len(groups) == len(SIZES) - 1 == 7
    assert [group.objects for group in groups] == [0, 0, 0, 0, 1, 3, 0]
    assert (groups[4].abs_rel, groups[4].recall) == pytest.approx((0.2, 1.0))
    assert (groups[5].abs_rel, groups[5].recall) == pytest.approx((0.1, 2 / 3))
    assert math.isnan(groups[0].abs_rel) and math.isnan(groups[0].recall)
    # Together they are all that there is.
    assert sum(group.objects for group in groups) == depth_errors(tmp_path / "gt", tmp_path / "pred")["all"].objects


def test_objects_without_any_detection(tmp_path):
    result = errors(tmp_path, [[car()]], [[]])
    assert math.isnan(result["Car"].abs_rel)
    assert (result["Car"].recall, result["all"].recall) == (0.0, 0.0)


def test_overlap_of_one_half_is_enough(tmp_path):
    # Half as high: intersection over union is exactly 0.5.
    result = errors(
        tmp_path, [[car(z=10)], [car(z=10)]], [[car(z=12, bottom=150) + " 1"], [car(z=12, bottom=149) + " 1"]]
    )
    assert (result["Car"].abs_rel, result["Car"].recall) == pytest.approx((0.2, 0.5))


def test_the_higher_score_chooses_first_and_takes_what_it_overlaps_most(tmp_path):
    # Both detections fit the object at 100 best; the surer one gets it, the other takes the one at 120.
    truth = [car(120, 50), car(100, 10)]
    found = [car(104, 60) + " 0.3", car(102, 11) + " 0.8"]
    result = errors(tmp_path, [truth], [found])
    assert (result["Car"].abs_rel, result["Car"].recall) == pytest.approx(((0.1 + 0.2) / 2, 1.0))


def test_equal_scores_choose_in_file_order_and_each_object_is_found_once(tmp_path):
    result = errors(tmp_path, [[car(z=10)]], [[car(z=11) + " 0.5", car(z=15) + " 0.5"]])
    assert (result["Car"].abs_rel, result["Car"].recall) == pytest.approx((0.1, 1.0))


def test_classes_and_frames_do_not_mix(tmp_path):
    result = errors(tmp_path, [[car()], []], [[car(name="Cyclist") + " 1"], [car() + " 1"]])
    assert result["all"].recall == 0


def test_ignored_objects_take_their_detections_with_them(tmp_path):
    # The van is what the surer detection means; as an error of the car behind it, 30 m for 60 m would mislead.
    truth = [car(100, 30, name="Van"), car(120, 60), car(400, 9, occlusion=3)]
    result = errors(tmp_path, [truth], [[car(100, 30) + " 0.9", car(120, 63) + " 0.4", car(400, 9) + " 0.8"]])
    assert (result["Car"].abs_rel, result["Car"].recall, result["Car"].objects) == pytest.approx((0.05, 1.0, 1))


def test_detections_and_labels_without_a_depth_take_no_part(tmp_path):
    truth = [car(100, 20), car(400, -0.5)]
    result = errors(tmp_path, [truth], [[car(100, -1000, x=-1000) + " 0.9", car(400, 3) + " 0.9"]])
    assert (result["Car"].recall, result["Car"].objects) == (0.0, 1)


def test_frames_choose_a_split_and_missing_files_are_errors(tmp_path):
    errors(tmp_path, [[car(z=10)], [car(z=10)]], [[car(z=11) + " 1"], [car(z=20) + " 1"]])
    part = depth_errors(tmp_path / "gt", tmp_path / "pred", frames=["000001"])
    assert part["Car"].abs_rel == pytest.approx(1.0)
    with pytest.raises(FileNotFoundError, match=r"000007\.txt"):
        depth_errors(tmp_path / "gt", tmp_path / "pred", frames=["000007"])


@given(scale=st.floats(0.2, 3), depths=st.lists(st.floats(2, 80), min_size=1, max_size=6))
def test_depths_off_by_one_factor_give_that_factors_error(scale, depths, tmp_path_factory):
    truth = [car(200 * i, z) for i, z in enumerate(depths)]
    found = [car(200 * i, z * scale) + f" 0.{i}" for i, z in enumerate(depths)]
    figures = errors(tmp_path_factory.mktemp("depth"), [truth], [found])["Car"]
    assert figures.abs_rel == pytest.approx(abs(scale - 1), abs=1e-12)
    assert figures.recall == 1
