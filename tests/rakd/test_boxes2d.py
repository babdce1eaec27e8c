"""2D boxes for other frameworks: the dataset, YOLO's layout, and average precision beside pycocotools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rakd.data.boxes2d import CLASSES, BoxDataset, write_yolo
from rakd.data.frames import find_frames
from rakd.evaluation.boxes2d import mean_average_precision
from rakd.scenes import make_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "kitti"
    make_scenes(folder, 10, seed=1, size=(160, 96))
    return folder


def test_items_are_images_and_pixel_boxes(scenes: Path) -> None:
    data = BoxDataset(scenes, first_label=1)
    assert len(data) == 10
    count = 0
    for index, frame in enumerate(find_frames(scenes)):
        image, target = data[index]
        objects = frame.read_labels()
        kept = objects.select(objects.is_type("Car", "Van", "Pedestrian", "Cyclist"))
        assert image.shape == (3, 96, 160) and image.dtype == torch.float32
        assert float(image.min()) >= 0 and 0.5 < float(image.max()) <= 1
        # KITTI's pixels count from the first one's centre, these from its outer edge, and end at the image.
        wanted = (torch.tensor(kept.boxes.tolist()).reshape(-1, 4) + 0.5).clamp(min=0)
        wanted = wanted.minimum(torch.tensor([160.0, 96, 160, 96]))
        torch.testing.assert_close(target["boxes"], wanted)
        names = ["Car" if name == "Van" else name for name in kept.types.tolist()]
        assert [CLASSES[label - 1] for label in target["labels"].tolist()] == names
        count += len(kept)
    assert count > 5


def test_yolo_labels_give_the_boxes_back(scenes: Path, tmp_path: Path) -> None:
    settings = write_yolo(scenes, tmp_path / "yolo").read_text(encoding="utf-8")
    assert f'path: "{tmp_path / "yolo"}"\n' in settings and "  2: Cyclist\n" in settings
    # What follows a bare # is a comment in YAML, whose strings in quotes are JSON's.
    odd = write_yolo(scenes, tmp_path / "a #1").read_text(encoding="utf-8")
    assert json.loads(odd.splitlines()[0].removeprefix("path: ")) == str(tmp_path / "a #1")
    seen = 0
    for split in ("train", "val"):
        data = BoxDataset(scenes, split)
        files = sorted((tmp_path / "yolo" / "labels" / split).glob("*.txt"))
        assert len(files) == len(data)
        for index, file in enumerate(files):
            assert (tmp_path / "yolo" / "images" / split / f"{file.stem}.png").is_file()
            rows = torch.tensor([[float(v) for v in line.split()] for line in file.read_text().splitlines()])
            _, target = data[index]
            assert len(rows) == len(target["boxes"])
            if len(rows):
                centre, extent = rows[:, 1:3], rows[:, 3:]
                boxes = torch.cat([centre - extent / 2, centre + extent / 2], 1) * torch.tensor([160, 96, 160, 96])
                torch.testing.assert_close(boxes, target["boxes"], atol=1e-3, rtol=0)
                assert rows[:, 0].tolist() == target["labels"].tolist()
            seen += len(rows)
    assert seen > 5


def test_boxes_that_cannot_be_seen_are_left_out(scenes: Path, tmp_path: Path) -> None:
    """YOLO leaves out an image with a negative number; torchvision's detectors stop at a box without area."""
    data = shutil.copytree(scenes, tmp_path / "data")
    frame = find_frames(data, "train")[0]
    assert frame.label is not None
    boxes = ("-1 -1 -1 -1", "0 0 159 95", "-40 10 20 300", "170 10 200 20", "12 10 12 20")
    frame.label.write_text("".join(f"Car 0 0 0 {box} 1.5 1.6 4 1 1.5 20 0\n" for box in boxes))
    _, target = BoxDataset(data, "train")[0]
    assert target["boxes"].tolist() == [[0.5, 0.5, 159.5, 95.5], [0, 10.5, 20.5, 96]] and len(target["labels"]) == 2
    write_yolo(data, tmp_path / "yolo")
    text = (tmp_path / "yolo" / "labels" / "train" / f"{frame.image.stem}.txt").read_text()
    assert text.splitlines()[0] == "0 0.500000 0.500000 0.993750 0.989583" and len(text.splitlines()) == 2


def test_what_ultralytics_keeps_does_not_outlast_a_copy(scenes: Path, tmp_path: Path) -> None:
    """It keeps labels by the sum of their sizes, which those of one width share, and images by their names."""
    write_yolo(scenes, tmp_path / "yolo")
    kept = [tmp_path / "yolo" / "labels" / f"{split}.cache" for split in ("train", "val")]
    kept += [path.with_suffix(".npy") for path in (tmp_path / "yolo" / "images").rglob("*.png")]
    for path in kept:
        path.touch()
    write_yolo(scenes, tmp_path / "yolo")
    assert not any(path.exists() for path in kept)


def test_a_loader_has_batches(scenes: Path) -> None:
    data = BoxDataset(scenes)
    assert [len(images) for images, _ in data.loader(4)] == [4, 4]
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"batch_size: expected 1 to the number of frames, 10, got {size}"):
            data.loader(size)


def test_yolo_folders_hold_no_frames_of_before(scenes: Path, tmp_path: Path) -> None:
    write_yolo(scenes, tmp_path / "yolo")
    write_yolo(scenes, tmp_path / "yolo")  # an interrupted copy is completed
    other = shutil.copytree(scenes, tmp_path / "other")
    lists = [other / "ImageSets" / f"{name}.txt" for name in ("train", "val")]
    texts = [path.read_text() for path in lists]
    for path, text in zip(lists, texts[::-1], strict=True):
        path.write_text(text)
    with pytest.raises(ValueError, match=r"out: expected a folder with no other images, got .*images/train/"):
        write_yolo(other, tmp_path / "yolo")


def _one(boxes: list[list[float]], labels: list[int], scores: list[float] | None = None) -> dict[str, Tensor]:
    found = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels)}
    return found if scores is None else {**found, "scores": torch.tensor(scores)}


def test_average_precision_by_hand() -> None:
    truth = [_one([[0, 0, 10, 10], [20, 20, 30, 30]], [0, 0])]
    assert mean_average_precision([_one([[0, 0, 10, 10], [20, 20, 30, 30]], [0, 0], [0.9, 0.8])], truth) == 1
    assert mean_average_precision([_one([], [], [])], truth) == 0
    # The wrong one has the highest score: precision 1/2 up to recall 1/2, 51 of 101 recalls.
    wrong_first = [_one([[50, 50, 60, 60], [0, 0, 10, 10]], [0, 0], [0.9, 0.8])]
    assert mean_average_precision(wrong_first, truth, [0.5]) == pytest.approx(0.5 * 51 / 101)
    # An object is found once.
    twice = [_one([[0, 0, 10, 10], [0, 0, 10, 9]], [0, 0], [0.9, 0.8])]
    assert mean_average_precision(twice, truth, [0.5]) == pytest.approx(51 / 101)
    # COCOeval's recalls are numpy's: 7 of 10 reach the 71st, 0.7000000000000001, which torch's linspace has as 0.7.
    ten = [[20 * i, 0, 20 * i + 10, 10] for i in range(10)]
    seven = [_one(ten[:7], [0] * 7, [0.9 - 0.1 * i for i in range(7)])]
    reached = sum(recall <= 7 / 10 for recall in np.linspace(0, 1, 101)) / 101
    assert mean_average_precision(seven, [_one(ten, [0] * 10)], [0.5]) == pytest.approx(reached)
    # IoU 0.8 counts up to the threshold of 0.8: 7 of 10.
    close = [_one([[0, 0, 10, 8], [20, 20, 30, 30]], [0, 0], [0.5, 0.9])]
    assert mean_average_precision(close, truth) == pytest.approx((7 * 1 + 3 * 51 / 101) / 10)
    assert torch.isnan(torch.tensor(mean_average_precision([_one([], [], [])], [_one([], [])])))
    with pytest.raises(ValueError, match="expected 1 images"):
        mean_average_precision([], truth)
    with pytest.raises(ValueError, match="thresholds: expected at least one"):
        mean_average_precision(twice, truth, [])
    assert mean_average_precision(wrong_first, truth, np.array([0.5])) == pytest.approx(0.5 * 51 / 101)
    for threshold in (0.0, -0.5, 50.0, float("nan")):
        with pytest.raises(ValueError, match="thresholds: expected IoU over 0 and up to 1, got"):
            mean_average_precision(twice, truth, [0.5, threshold])
    for most in (0, -1):
        with pytest.raises(ValueError, match=f"max_detections: expected 1 or more, got {most}"):
            mean_average_precision(twice, truth, max_detections=most)
    with pytest.raises(ValueError, match=r"targets: expected as many boxes as labels, image 0 has .*'labels': 2"):
        mean_average_precision(twice, [_one([[0, 0, 10, 10]], [0, 0])])
    wrong = [_one([[0, 0, 10, 10], [0, 0, float("nan"), 9]], [0, 0])]
    with pytest.raises(ValueError, match="targets: expected finite boxes, image 0 has others"):
        mean_average_precision(twice, wrong)
    with pytest.raises(ValueError, match="predictions: expected finite boxes, image 0 has others"):
        mean_average_precision([{**wrong[0], "scores": torch.ones(2)}], truth)
    with pytest.raises(ValueError, match=r"as many boxes as scores and labels, image 0 has .*'scores': 1"):
        mean_average_precision([_one([[0, 0, 10, 10]] * 2, [0, 0], [0.9])], truth)
    with pytest.raises(ValueError, match="scores that are numbers, image 0 has NaN"):
        mean_average_precision([_one([[0, 0, 10, 10]], [0], [float("nan")])], truth)


def test_average_precision_beside_pycocotools() -> None:
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    generator = torch.Generator().manual_seed(3)
    truths, found = [], []
    for _ in range(12):
        corner = torch.rand(6, 2, generator=generator) * 80
        boxes = torch.cat([corner, corner + 5 + 30 * torch.rand(6, 2, generator=generator)], 1)
        labels = torch.randint(0, 3, (6,), generator=generator)
        truths.append({"boxes": boxes, "labels": labels})
        noisy = torch.cat([boxes + torch.randn(6, 4, generator=generator) * 2, boxes[:3] + 4])
        noisy[:, 2:] = torch.maximum(noisy[:, 2:], noisy[:, :2] + 1)
        scores = torch.rand(9, generator=generator)
        found.append({"boxes": noisy, "labels": torch.cat([labels, labels[:3]]), "scores": scores})
    coco = COCO()
    coco.dataset = {"images": [{"id": i} for i in range(12)], "categories": [{"id": i} for i in range(3)]}
    coco.dataset["annotations"] = [
        {
            "id": 10 * i + j + 1, "image_id": i, "category_id": int(label), "iscrowd": 0,
            "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]], "area": (box[2] - box[0]) * (box[3] - box[1]),
        }
        for i, truth in enumerate(truths)
        for j, (box, label) in enumerate(zip(truth["boxes"].double().tolist(), truth["labels"], strict=True))
    ]  # fmt: skip
    coco.createIndex()
    rows = [
        {
            "image_id": i, "category_id": int(label), "score": score,
            "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]],
        }
        for i, one in enumerate(found)
        for box, label, score in zip(
            one["boxes"].double().tolist(), one["labels"], one["scores"].tolist(), strict=True
        )
    ]  # fmt: skip
    evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert mean_average_precision(found, truths) == pytest.approx(evaluation.stats[0], abs=1e-6)
    assert 0.1 < evaluation.stats[0] < 0.9
