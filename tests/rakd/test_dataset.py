import multiprocessing
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.ops import box_iou

from rakd.data.augment import Augmentation, distort
from rakd.data.frames import Frame, read_image
from rakd.data.kitti import DIVISOR, KittiDataset, collate
from rakd.detector.configs import DETECTORS
from rakd.errors import UserError
from rakd.geometry import box_corners, project_boxes
from rakd.training.loading import make_loader
from rakd.training.order import InfiniteShuffle, StepSampler

DONTCARE = "DontCare -1 -1 -10 5 5 9 9 -1 -1 -1 -1000 -1000 -1000 -10"


@pytest.fixture
def plain(scenes):
    return KittiDataset(scenes, "train")


def projected_iou(sample):
    """Mean IoU of labelled boxes with the projections of their 3D boxes."""
    objects = sample.objects.select(sample.objects.has_box_3d & (sample.objects.truncation == 0))
    corners = box_corners(objects.location, objects.dimensions, objects.rotation_y)
    boxes = project_boxes(sample.calibration, corners, (sample.image.shape[2], sample.image.shape[1]))
    return box_iou(torch.as_tensor(boxes), torch.as_tensor(objects.boxes)).diagonal().mean()


def test_samples(plain):
    assert len(plain) == 8
    sample = plain[0]
    assert sample.image.shape == (3, 125, 414)
    assert sample.image.dtype == torch.float32
    assert 0 <= sample.image.min() < 0.2 < 0.8 < sample.image.max() <= 1
    assert sample.original_size == (414, 125)
    assert len(sample.targets) + len(sample.targets.ignored) == len(sample.objects)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("height", [None, 125, 64, 250])
def test_image_calibration_and_boxes_stay_together(scenes, flip, height):
    augmentation = Augmentation(flip=flip, photometric=0)
    dataset = KittiDataset(scenes, "train", height=height, augmentation=augmentation)
    assert np.mean([projected_iou(dataset[i]) for i in range(4)]) > 0.85
    if height:
        assert dataset[0].image.shape == (3, height, round(414 * height / 125))


def test_flip_mirrors_the_pixels(scenes, plain):
    mirrored = KittiDataset(scenes, "train", augmentation=Augmentation(flip=1, photometric=0))
    torch.testing.assert_close(mirrored[0].image.flip(2), plain[0].image)
    assert mirrored[0].image.is_contiguous()


def test_resizing_keeps_the_same_targets(scenes, plain):
    resized = KittiDataset(scenes, "train", height=250)
    for i in range(4):
        assert len(plain[i].targets) == len(resized[i].targets)


def test_augmentation_depends_on_seed_epoch_and_index_only(scenes):
    def images(*, seed=1, epoch=0, workers=0):
        dataset = KittiDataset(scenes, "train", height=100, augmentation=Augmentation(), seed=seed)
        dataset.set_epoch(epoch)
        context = multiprocessing.get_context("fork") if workers else None
        loader = DataLoader(
            dataset, batch_size=2, num_workers=workers, collate_fn=collate, multiprocessing_context=context
        )
        return torch.cat([batch.images for batch in loader])

    first = images()
    torch.testing.assert_close(images(workers=2), first, rtol=0, atol=0)
    assert not torch.equal(images(epoch=1), first)
    assert not torch.equal(images(seed=2), first)


def test_living_workers_see_the_epoch_change(scenes):
    dataset = KittiDataset(scenes, "train", augmentation=Augmentation())
    loader = DataLoader(dataset, num_workers=1, collate_fn=collate, persistent_workers=True)
    sums = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        sums.append([float(batch.images.sum()) for batch in loader])
    assert sums[0] == sums[2] != sums[1]


def test_load_takes_the_epoch_it_is_told(scenes):
    dataset = KittiDataset(scenes, "train", height=64, augmentation=Augmentation())
    dataset.set_epoch(2)
    second = dataset[3].image
    dataset.set_epoch(0)
    assert torch.equal(dataset.load(3, 2).image, second)
    assert torch.equal(dataset.load(-5, 2).image, second)
    assert not torch.equal(dataset.load(3, 1).image, second)


@pytest.mark.parametrize(
    ("photometric", "read"),
    [
        pytest.param(1.0, 1, id="distorted: the image as it was read is kept"),
        pytest.param(0.0, 2, id="mirrored alone: both resized images are kept"),
    ],
)
def test_cached_frames_are_the_same(scenes, monkeypatch, photometric, read):
    options = {"height": 64, "augmentation": Augmentation(photometric=photometric)}
    plain, cached = (KittiDataset(scenes, "train", cache_bytes=size, **options) for size in (0, 10**7))
    reads = []
    monkeypatch.setattr(Frame, "read_image", lambda frame: (reads.append(frame.id), read_image(frame.image))[1])
    samples = [(cached.load(1, epoch), plain.load(1, epoch)) for epoch in range(6)]
    for sample, other in samples:
        assert torch.equal(sample.image, other.image)
        assert torch.equal(sample.targets.boxes, other.targets.boxes)
        assert sample.original_size == other.original_size == (414, 125)
        np.testing.assert_array_equal(sample.calibration.projection, other.calibration.projection)
    assert {sample.mirrored for sample, _ in samples} == {False, True}
    assert torch.equal(cached.load(-7, 1).image, plain.load(1, 1).image)
    assert len(reads) == read + 7  # the cached one's, and the other's


def test_images_beyond_the_bound_are_read_again(scenes, monkeypatch):
    augmentation = Augmentation(flip=0, photometric=0)
    dataset = KittiDataset(scenes, "train", height=64, augmentation=augmentation, cache_bytes=2 * 3 * 64 * 212)
    assert dataset[0].image.shape == (3, 64, 212)
    reads = []
    monkeypatch.setattr(Frame, "read_image", lambda frame: (reads.append(frame.id), read_image(frame.image))[1])
    for _ in range(2):
        for index in range(3):
            dataset[index]
    second, third = (frame.id for frame in dataset.frames[1:3])
    assert reads == [second, third, third]


def test_distortion_changes_with_the_draws(plain):
    image = Image.fromarray(plain.frames[0].read_image())
    options = Augmentation(photometric=1)
    results = [np.array(distort(image, options, np.random.default_rng(seed))) for seed in range(4)]
    assert all(result.shape == (125, 414, 3) and result.dtype == np.uint8 for result in results)
    assert len({result.tobytes() for result in results}) == 4
    for single in ("brightness", "contrast", "saturation", "hue"):
        others = dict.fromkeys({"brightness", "contrast", "saturation", "hue"} - {single}, 0.0)
        result = distort(image, Augmentation(photometric=1, **others), np.random.default_rng(0))
        assert np.abs(np.array(result).astype(int) - np.array(image)).mean() > 0.5, single
    assert distort(image, Augmentation(photometric=0), np.random.default_rng(0)) == image


def test_collate_pads_images_of_different_sizes(scenes, plain):
    small = KittiDataset(scenes, "train", height=60)[1]
    batch = collate([plain[0], small])
    assert batch.images.shape == (2, 3, 128, 448)
    assert batch.sizes == [(414, 125), (199, 60)]
    torch.testing.assert_close(batch.images[1, :, :60, :199], small.image)
    for place, sample in enumerate((plain[0], small)):
        assert torch.equal(batch.samples[place].image, sample.image)
        assert batch.samples[place].image.data_ptr() == batch.images[place].data_ptr()
    assert batch.images[1, :, 60:].abs().sum() == batch.images[1, :, :, 199:].abs().sum() == 0
    assert [len(targets) for targets in batch.targets("cpu")] == [len(plain[0].targets), len(small.targets)]
    assert collate([small], size=(512, 256)).images.shape == (1, 3, 256, 512)
    # MonoDETR's coarsest stride is 64.
    assert {config.stride for config in DETECTORS.values()} == {32, 64}
    assert all(DIVISOR % config.stride == 0 for config in DETECTORS.values())


def test_an_experts_images_come_along(scenes):
    augmentation = Augmentation(photometric=0)
    options = {"augmentation": augmentation, "seed": 5, "cache_bytes": 10**7}
    both = KittiDataset(scenes, "train", height=64, expert_size=(448, 128), **options)
    own, experts = (KittiDataset(scenes, "train", height=height, **options) for height in (64, 128))
    samples = [both.load(index, epoch) for index in range(3) for epoch in range(3)]
    assert {sample.mirrored for sample in samples} == {False, True}
    for i, sample in enumerate(samples):
        assert torch.equal(sample.image, own.load(i // 3, i % 3).image)
        assert torch.equal(sample.expert_image, experts.load(i // 3, i % 3).image)
    sampler = StepSampler(InfiniteShuffle(len(both), 1), range(2), 3, range(3))
    for workers in (0, 1):
        batches = list(make_loader(both, sampler, image_size=(224, 64), workers=workers, pin=False))
        for step, batch in enumerate(batches):
            draws = sampler.order.step(step, 3)
            wanted = collate([experts.load(draw.frame, draw.epoch) for draw in draws], size=(448, 128))
            assert torch.equal(batch.expert_images, wanted.images)
            assert batch.images.shape == (3, 3, 64, 224)
            assert all(sample.expert_image is None for sample in batch.samples)
    assert collate([own[0]]).expert_images is None
    with pytest.raises(ValueError, match="samples must all bring an expert's image or none, got 1 of 2"):
        collate([both[0], own[0]])


def test_bad_input(scenes, plain):
    with pytest.raises(
        ValueError, match=r"frame 000000: too large: resized it is 414 x 125 pixels, expected at most 100 x 100"
    ):
        collate([plain[0]], size=(100, 100))
    with pytest.raises(ValueError, match="samples must hold at least one"):
        collate([])
    with pytest.raises(ValueError, match="height must be positive, got 0"):
        KittiDataset(scenes, height=0)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        KittiDataset(scenes, seed=-1)
    with pytest.raises(ValueError, match="epoch must be 0 or more"):
        plain.set_epoch(-1)
    for name, value in (("flip", 1.5), ("brightness", -0.1), ("hue", 0.6)):
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            partial(Augmentation, **{name: value})()


def test_targets_of_frames_without_labels(scenes, tmp_path):
    (tmp_path / "testing").symlink_to(scenes / "training")
    dataset = KittiDataset(tmp_path, part="testing")
    assert dataset[0].targets is None
    with pytest.raises(ValueError, match="frame 000000 has no labels to learn from"):
        collate([dataset[0]]).targets("cpu")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda row: row.replace("Car", "automobile").replace("Cyclist", "bike").replace("Pedestrian", "man"),
            "automob",
        ),
        (lambda row: DONTCARE, r"DontCare \("),
        (lambda row: "", "the labels hold none"),
        # Two pixels high.
        (lambda row: " ".join([*row.split()[:5], "80", *row.split()[6:7], "82", *row.split()[8:]]), r"Car \("),
    ],
)
def test_frames_without_anything_to_learn_are_told(scenes, tmp_path, change, found):
    root = shutil.copytree(scenes, tmp_path / "kitti")
    KittiDataset(root, "train").check_targets()
    labels = sorted((root / "training" / "label_2").iterdir())
    for path in labels:
        path.write_text("".join(f"{change(row)}\n" for row in path.read_text().splitlines()))
    with pytest.raises(UserError, match=rf"none of the 8 frames holds an object to learn .*{found}"):
        KittiDataset(root, "train").check_targets()
    # One object in the last frame will do.
    shutil.copy(scenes / "training" / "label_2" / "000008.txt", labels[8])
    KittiDataset(root, "train").check_targets()
