"""Real KITTI frames, when RAKD_KITTI_ROOT names a folder with some."""

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from rakd.data.augment import Augmentation
from rakd.data.frames import find_frames
from rakd.data.kitti import KittiDataset, collate
from rakd.data.labels import LABEL_TYPES, write_objects
from rakd.evaluation.kitti import evaluate
from rakd.geometry import alpha_from_rotation, box_corners, project_boxes
from rakd.visualize import draw_frame, prediction_layer, truth_layer


def test_projected_boxes_overlap_the_labelled_ones(kitti_root):
    ious = []
    for frame in find_frames(kitti_root):
        objects, image = frame.read_labels(), frame.read_image()
        objects = objects.select(objects.has_box_3d & (objects.occlusion == 0) & (objects.truncation == 0))
        corners = box_corners(objects.location, objects.dimensions, objects.rotation_y)
        boxes = project_boxes(frame.read_calibration(), corners, (image.shape[1], image.shape[0]))
        ious += box_iou(torch.as_tensor(boxes), torch.as_tensor(objects.boxes)).diagonal().tolist()
    print(f"mean IoU {np.mean(ious):.3f} over {len(ious)} fully visible objects")
    assert np.mean(ious) > 0.8


def test_labelled_angles_agree_with_ours(kitti_root):
    differences = []
    for frame in find_frames(kitti_root):
        objects = frame.read_labels()
        objects = objects.select(objects.has_box_3d)
        ours = alpha_from_rotation(objects.rotation_y, objects.location)
        differences += np.abs(np.remainder(ours - objects.alpha + np.pi, 2 * np.pi) - np.pi).tolist()
    # KITTI rounds both angles to 0.01, and its own disagree a little for objects beside the camera.
    assert np.mean(np.array(differences) < 0.02) > 0.9
    assert max(differences) < 0.15


def test_label_types_are_known(kitti_root):
    types = {str(name) for frame in find_frames(kitti_root) for name in frame.read_labels().types}
    assert types <= set(LABEL_TYPES)


@pytest.mark.parametrize("flip", [0, 1])
def test_dataset(kitti_root, flip):
    dataset = KittiDataset(kitti_root, height=256, augmentation=Augmentation(flip=flip))
    batch = collate([dataset[i] for i in range(4)])
    assert batch.images.shape[2] == 256
    for sample in batch.samples:
        targets = sample.targets
        if len(targets):
            low, high = targets.keypoints[:, :8].amin(1), targets.keypoints[:, :8].amax(1)
            height = (targets.boxes[:, 3] - targets.boxes[:, 1]).numpy()
            assert (np.abs((high - low)[:, 1].numpy() - height) < 0.5 * height).all()


def test_labels_as_predictions_score_full_marks(kitti_root, tmp_path):
    frames = find_frames(kitti_root)
    for frame in frames:
        objects = frame.read_labels()
        objects = dataclasses.replace(objects, scores=np.linspace(1, 0, len(objects)))
        write_objects(tmp_path / f"{frame.id}.txt", objects.select(objects.has_box_3d))
    result = evaluate(kitti_root / "training" / "label_2", tmp_path, progress=False)
    for name in ("Car", "Pedestrian", "Cyclist"):
        for metric in ("bbox", "aos", "bev", "3d"):
            counts = result[name][metric]["objects"]
            full = [min(100.0, max(0, 100 * (count - 1) / 40)) for count in counts]
            assert result[name][metric]["R40"] == pytest.approx(full), (name, metric)


def test_picture(kitti_root, tmp_path):
    frame = find_frames(kitti_root)[7]
    labels = frame.read_labels()
    layers = [truth_layer(labels), prediction_layer(labels)]
    draw_frame(tmp_path / "a.png", frame.read_image(), frame.read_calibration(), layers)
    assert (tmp_path / "a.png").stat().st_size > 100_000
