"""2D boxes: deltas, matching and suppression against torchvision's, and the drawing of anchors and proposals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou, nms

from rakd.detector.boxes import (
    box_overlaps,
    clip_boxes,
    decode_deltas,
    encode_deltas,
    image_extents,
    suppress,
    suppress_together,
)
from rakd.detector.proposals import best_boxes, match_boxes
from rakd.detector.sampling import IGNORED, draw, random_keys

CPU = torch.device("cpu")
SCALES = (10.0, 10.0, 5.0, 5.0)


def some_boxes(count: int, seed: int, extent: float = 60.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=rng) * extent
    return torch.cat([corner, corner + 2 + 20 * torch.rand(count, 2, generator=rng)], dim=1)


def test_overlaps_are_torchvisions() -> None:
    a, b = some_boxes(30, 0), some_boxes(20, 1)
    torch.testing.assert_close(box_overlaps(a, b), box_iou(a, b), rtol=0, atol=0)
    batched = box_overlaps(torch.stack([a, a + 1]), torch.stack([b, b]))
    assert torch.equal(batched[0], box_overlaps(a, b)) and torch.equal(batched[1], box_overlaps(a + 1, b))


def test_deltas_are_torchvisions() -> None:
    boxes, anchors = some_boxes(40, 0), some_boxes(40, 1)
    coder = BoxCoder(SCALES)
    deltas = encode_deltas(boxes, anchors, SCALES)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors))
    torch.testing.assert_close(decode_deltas(deltas, anchors, SCALES), boxes)
    wild = 40 * torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(decode_deltas(wild, anchors, SCALES), coder.decode_single(wild, anchors))


def test_boxes_are_clipped_to_their_own_image() -> None:
    extents = image_extents([(10, 20), (30, 5)], CPU)
    box = torch.tensor([-3.0, -4, 25, 25])
    for shape in ((2, 4), (2, 3, 4), (2, 3, 2, 4)):
        clipped = clip_boxes(box.expand(shape), extents).flatten(1)
        assert clipped[0, -4:].tolist() == [0, 0, 10, 20] and clipped[1, -4:].tolist() == [0, 0, 25, 5]


@pytest.mark.parametrize("every_object", [True, False])
def test_matching_is_torchvisions(every_object: bool) -> None:
    for seed in range(20):
        boxes, objects = some_boxes(60, seed), some_boxes(5, 100 + seed)
        matcher = Matcher(0.5, 0.5 - 0.2 * every_object, allow_low_quality_matches=every_object)
        expected = matcher(box_iou(objects, boxes))
        match, negative = match_boxes(boxes, objects, 0.5, 0.5 - 0.2 * every_object, every_object=every_object)
        assert torch.equal(match, expected.clamp(min=-1))
        assert torch.equal(negative, expected == Matcher.BELOW_LOW_THRESHOLD)
    match, negative = match_boxes(boxes, objects[:0], 0.5, 0.5, every_object=every_object)
    assert (match == -1).all() and negative.all()
    # Of an object that no box meets, as of labels of another image size, torchvision takes all boxes.
    match, negative = match_boxes(boxes, objects[:1] + 10_000, 0.5, 0.5, every_object=every_object)
    assert (match == -1).all() and negative.all()


@given(st.integers(0, 2**20), st.sampled_from([0, 1, 2, 40, 200]), st.sampled_from([0.05, 0.3, 0.7]))
def test_suppression_is_torchvisions(seed: int, count: int, limit: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    boxes = torch.stack([some_boxes(count, seed), some_boxes(count, seed + 1, 10.0)])
    scores = torch.randint(0, 50, (2, count), generator=rng) / 50  # many are equal
    valid = torch.rand(2, count, generator=rng) > 0.3
    for method in (suppress, suppress_together):
        kept = method(boxes, scores, valid, limit)
        for group in range(2):
            rows = valid[group].nonzero()[:, 0]
            expected = rows[nms(boxes[group, rows], scores[group, rows], limit)]
            assert kept[group].nonzero()[:, 0].tolist() == sorted(expected.tolist())


def test_long_chains_are_followed_to_their_end() -> None:
    # Each box overlaps its neighbours by more than the limit and no other, so that every second one is kept. The
    # answer for the last takes as many rounds as there are boxes.
    left = torch.arange(99.0) * 4
    boxes = torch.stack([left, torch.zeros(99), left + 10, torch.ones(99)], dim=1)[None]
    kept = suppress_together(boxes, -left[None], torch.ones(1, 99, dtype=torch.bool), 0.3)
    assert kept[0].tolist() == [i % 2 == 0 for i in range(99)]


def test_the_best_boxes_come_first_and_the_rest_are_zeros() -> None:
    boxes = some_boxes(5, 0)[None]
    scores, kept = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.7]]), torch.tensor([[True, True, False, True, False]])
    chosen, valid, best, places = best_boxes(boxes, scores, kept, 4)
    assert valid.tolist() == [[True, True, True, False]] and places[0, :3].tolist() == [1, 3, 0]
    assert torch.equal(chosen[0, :3], boxes[0, [1, 3, 0]]) and (chosen[0, 3] == 0).all()
    torch.testing.assert_close(best[0, :3], torch.tensor([0.9, 0.9, 0.1]))
    assert best_boxes(boxes, scores, kept, 50)[0].shape == (1, 5, 4)


labels = st.lists(st.sampled_from([IGNORED, 0, 1, 2]), min_size=60, max_size=60)


@given(st.lists(labels, min_size=1, max_size=3), st.integers(1, 80), st.floats(0, 1), st.integers(0, 2**63 - 9))
def test_draws(rows: list[list[int]], count: int, share: float, seed: int) -> None:
    table = torch.tensor(rows)
    seeds = range(seed, seed + len(rows))
    drawn = draw(table, seeds, count, share)
    assert drawn.rows.shape == (len(rows), min(count, 60))
    for image, places, positive, used in zip(table, *drawn, strict=True):
        assert len(set(places[used].tolist())) == used.sum()
        assert (image[places[positive]] > 0).all() and used[positive].all()
        assert (image[places[used & ~positive]] == 0).all()
        assert positive.sum() == min((image > 0).sum(), int(count * share))
        assert used.sum() - positive.sum() == min((image == 0).sum(), count - positive.sum())
        # Positives, negatives, rows that fill up: in this order.
        order = 2 * positive.int() + (used & ~positive).int()
        assert (order.diff() <= 0).all()
    # The last image alone: nothing else has a say.
    alone = draw(table[-1:], seeds[-1:], count, share)
    assert all(torch.equal(one[0], several[-1]) for one, several in zip(alone, drawn, strict=True))


def test_all_are_drawn_alike_often() -> None:
    counts = torch.zeros(20)
    for seed in range(400):
        drawn = draw(torch.ones(1, 20, dtype=torch.int64), [seed], 10, 0.5)
        counts[drawn.rows[drawn.positive]] += 1
    # 400 draws of a quarter each: 100 with a deviation of 8.7.
    assert (counts - 100).abs().max() < 40


def test_keys_are_those_of_splitmix64() -> None:
    # First outputs of the reference implementation (prng.di.unimi.it/splitmix64.c) for the seed 1234567, less the sign.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423 - 2**63]
    assert random_keys([1234567], 3, CPU)[0].tolist() == expected
    assert (random_keys([2**63 - 1, 0], 1000, CPU) >= 0).all()


def test_a_draw_wants_a_seed_an_image() -> None:
    with pytest.raises(RuntimeError):
        draw(torch.ones(2, 5, dtype=torch.int64), [1, 2, 3], 4, 0.5)
