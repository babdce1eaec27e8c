import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rakd import files
from rakd.data.labels import LABEL_TYPES, Objects, concatenate, is_label_row, read_labels, read_results, write_objects
from rakd.errors import MissingFileError, UserError

LABEL = "Car 0.05 1 -1.58 587.01 173.33 614.12 200.12 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59"
DONTCARE = "DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10"


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "000000.txt"
    path.write_text(f"{LABEL}\n\n{DONTCARE}\r\n")
    return read_labels(path)


def objects_of(count: int, *, scored: bool) -> st.SearchStrategy[Objects]:
    values = st.floats(-900, 900, allow_nan=False).map(lambda value: round(value, 4))

    def column(*shape: int, elements=values):
        return hnp.arrays(np.float64, (count, *shape), elements=elements)

    positive = st.floats(0.1, 20).map(lambda value: round(value, 4))
    return st.builds(
        Objects,
        hnp.arrays(np.dtype("<U16"), count, elements=st.sampled_from(LABEL_TYPES)),
        column(),
        hnp.arrays(np.int64, count, elements=st.integers(-1, 3)),
        column(),
        column(4),
        column(3, elements=positive),
        column(3),
        column(),
        column() if scored else st.none(),
    )


@given(st.data(), st.integers(0, 4), st.booleans())
def test_reading_gives_what_was_written(tmp_path_factory, data, count, scored):
    objects = data.draw(objects_of(count, scored=scored))
    path = tmp_path_factory.mktemp("labels") / "000000.txt"
    write_objects(path, objects)
    back = read_results(path) if scored else read_labels(path)
    for field in dataclasses.fields(Objects):
        written, read = getattr(objects, field.name), getattr(back, field.name)
        if field.name == "scores" and not scored:
            assert read is None
        else:
            np.testing.assert_array_equal(read, written, err_msg=field.name)


@given(st.data())
def test_flipping_twice_changes_nothing(data):
    objects = data.draw(objects_of(3, scored=False))
    twice = objects.flipped(1242).flipped(1242)
    np.testing.assert_allclose(twice.boxes, objects.boxes, atol=1e-9)
    np.testing.assert_allclose(twice.location, objects.location)
    difference = np.remainder(twice.rotation_y - objects.rotation_y + 1, 2 * np.pi)
    known = objects.rotation_y != -10
    np.testing.assert_allclose(difference[known], 1, atol=1e-6)


def test_fields_of_a_label(labels):
    assert labels.types.tolist() == ["Car", "DontCare"]
    assert labels.occlusion.tolist() == [1, -1]
    assert labels.truncation.tolist() == [0.05, -1]
    np.testing.assert_array_equal(labels.boxes[0], [587.01, 173.33, 614.12, 200.12])
    np.testing.assert_array_equal(labels.dimensions[0], [1.65, 1.67, 3.64])
    np.testing.assert_array_equal(labels.location[0], [-0.65, 1.71, 46.70])
    assert (labels.alpha[0], labels.rotation_y[0], labels.scores) == (-1.58, -1.59, None)
    assert labels.has_box_3d.tolist() == [True, False]
    assert labels.is_type("car").tolist() == [True, False]


def test_unknown_places_and_angles_stay_unknown_when_flipped(labels):
    flipped = labels.flipped(1242)
    np.testing.assert_array_equal(flipped.location[1], labels.location[1])
    assert (flipped.alpha[1], flipped.rotation_y[1]) == (-10, -10)
    assert flipped.location[0, 0] == 0.65
    np.testing.assert_allclose(flipped.boxes[0, [0, 2]], [1241 - 614.12, 1241 - 587.01])


def test_labels_have_two_decimals_and_no_negative_zero(tmp_path, labels):
    path = tmp_path / "out.txt"
    write_objects(path, dataclasses.replace(labels, alpha=np.array([-0.001, -10])), decimals=2)
    first, second = path.read_text().splitlines()
    assert first == LABEL.replace("-1.58", "0.00")
    assert second.startswith("DontCare -1.00 -1 -10.00 503.89")


def test_empty_file_is_a_frame_without_objects(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert len(read_labels(tmp_path / "a.txt")) == 0
    assert len(read_results(tmp_path / "a.txt")) == 0


def test_further_columns_are_skipped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"{LABEL} 0.9 7 nonsense\n")
    assert read_labels(path).scores is None
    assert read_results(path).scores.tolist() == [0.9]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("", False),
        ("Car 0.00 0", False),
        (LABEL, True),
        (f"{LABEL} 90", True),  # a count of lidar points
        (f"{LABEL} 90 2", True),  # and a difficulty
        (f"{LABEL} 90 2 1", False),
        (f"{LABEL} 0.9", False),
        (f"{LABEL.replace('0.05 1', '-1 -1')} 1", False),  # a score
        (f"{LABEL.replace('0.05 1', '-1.0000 -1')} 0.015604", False),
        (DONTCARE, True),
    ],
)
def test_rows_of_labels_are_told_from_those_of_results(row, expected):
    assert is_label_row(row.split()) is expected


def test_rows_without_score_are_skipped_with_one_warning(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"{LABEL} 0.9\n{LABEL}\n{LABEL}\n")
    with pytest.warns(UserWarning, match=r"a\.txt:2: result rows without a score") as caught:
        assert len(read_results(path)) == 1
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Car 0 0 0", r"expected 15 columns, got 4: 'Car 0 0 0'"),
        (LABEL.replace("46.70", "far"), "z must be a finite number, got 'far'"),
        (LABEL.replace("587.01", "nan"), "x1 must be a finite number, got 'nan'"),
        (LABEL.replace("1.65", "inf"), "height must be a finite number, got 'inf'"),
        (LABEL.replace("614.12", "6_1"), "x2 must be a finite number, got '6_1'"),
        (LABEL.replace(" 1 ", " 1.5 "), "occlusion must be an integer, got '1.5'"),
        (LABEL.replace(" 1 ", f" {10**22} "), f"occlusion must be an integer, got '{10**22}'"),
        (LABEL.replace("1.67", "-1"), "width and length must both be positive or neither, got -1 and 3.64"),
        (LABEL.replace("3.64", "0"), "width and length must both be positive or neither, got 1.67 and 0"),
    ],
)
def test_bad_label_rows_name_file_and_line(tmp_path, row, message):
    path = tmp_path / "000007.txt"
    path.write_text(f"{LABEL}\n{row}\n")
    with pytest.raises(ValueError, match=rf"000007\.txt:2: .*{message}"):
        read_labels(path)


@pytest.mark.parametrize("score", ["nan", "high", "1_0"])
def test_bad_scores_name_file_and_line(tmp_path, score):
    path = tmp_path / "000007.txt"
    path.write_text(f"{LABEL} {score}\n")
    with pytest.raises(ValueError, match=rf"000007\.txt:1: score must be a number, got '{score}'"):
        read_results(path)


def test_results_may_have_any_occlusion(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"{LABEL.replace(' 1 ', ' -1.00 ')} 0.5\n")
    assert read_results(path).occlusion.tolist() == [-1]


def test_binary_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt: not a text file"):
        read_labels(tmp_path / "a.txt")


def test_objects_check_their_shapes(labels):
    with pytest.raises(ValueError, match=r"boxes must have shape \[2, 4\], got \[2, 3\]"):
        dataclasses.replace(labels, boxes=np.zeros((2, 3)))


def test_writer_refuses_what_the_reader_would_not_take(tmp_path, labels):
    path = tmp_path / "a.txt"
    path.write_text("as it was")
    for change, message in (
        ({"types": np.array(["Car", "Person sitting"])}, "plain words .* got 'Person sitting'"),
        ({"alpha": np.array([0.0, np.nan])}, "object 1 is not"),
        ({"scores": np.array([np.nan, 1.0])}, "object 0's is"),
    ):
        with pytest.raises(ValueError, match=message):
            write_objects(path, dataclasses.replace(labels, **change))
    assert path.read_text() == "as it was"


def test_concatenate(labels):
    both = concatenate([labels, labels.select(np.array([False, True]))])
    assert both.types.tolist() == ["Car", "DontCare", "DontCare"]
    with pytest.raises(ValueError, match="all have scores or none"):
        concatenate([labels, dataclasses.replace(labels, scores=np.zeros(2))])
    with pytest.raises(ValueError, match="at least one frame"):
        concatenate([])


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(
    "data",
    [
        f"\ufeff{LABEL} 0.5\n{DONTCARE} 0.4\n".encode(),
        f"{LABEL} 0.5\n\ufeff{DONTCARE} 0.4\n".encode(),  # two files joined
        f"{LABEL} 0.5\r\n{DONTCARE} 0.4\r\n".encode("utf-16"),
        f"\ufeff{LABEL} 0.5\n{DONTCARE} 0.4\n".encode("utf-16-be"),
        f"{LABEL} 0.5\r{DONTCARE} 0.4\r".encode(),
    ],
    ids=["utf-8", "joined", "utf-16-le", "utf-16-be", "carriage returns"],
)
@pytest.mark.parametrize("read", [read_labels, read_results])
def test_marks_and_line_ends_of_editors_lose_no_object(tmp_path, read, data):
    (tmp_path / "a.txt").write_bytes(data)
    objects = read(tmp_path / "a.txt")
    assert objects.types.tolist() == ["Car", "DontCare"]
    assert objects.is_type("Car").tolist() == [True, False]
    assert objects.location[:, 2].tolist() == [46.7, -1000]


@pytest.mark.parametrize("name", ['"Car"', "'Car'", "“Car”", "Car,", "Car:", "\u200bCar", "Car\u200b", "\x00Car"])
def test_a_type_with_more_than_its_name_is_refused(tmp_path, labels, name):
    path = tmp_path / "000007.txt"
    row = LABEL.replace("Car", name)
    path.write_text(f"{LABEL}\n{row}\n")
    for read in (read_labels, read_results):
        path.write_text(f"{LABEL} 0.5\n{row} 0.5\n")
        with pytest.raises(UserError, match=r"000007\.txt:2: type must be a plain word such as Car, got") as caught:
            read(path)
        assert repr(name) in str(caught.value)
    with pytest.raises(ValueError, match="plain words"):
        write_objects(path, dataclasses.replace(labels, types=np.array([name, "Car"])))


@pytest.mark.parametrize(
    "name", ["Person_sitting", "car", "two-wheeler", "3", "Fußgänger", "traffic.light", "truck/bus"]
)
def test_other_types_are_read_as_they_are(tmp_path, name):
    (tmp_path / "a.txt").write_text(LABEL.replace("Car", name), encoding="utf-8")
    assert read_labels(tmp_path / "a.txt").types.tolist() == [name]


def test_missing_label_files_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"a\.txt is not there: expected a label file"):
        read_labels(tmp_path / "a.txt")
    with pytest.raises(MissingFileError, match="is a folder: expected a result file"):
        read_results(tmp_path)
