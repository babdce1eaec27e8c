"""Silent mistakes that must be errors with a remedy: boxes, strides, images, dtypes, layouts."""

import warnings
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distill_cases import BOXES, ROWS, SIZE, STAGES, Network, images
from torch import Tensor, nn
from torchvision import tv_tensors

from rakd.distill import Distiller
from rakd.distill.registry import METHODS
from rakd_ops import level_weights

HEIGHT, WIDTH = SIZE


def make(**options: Any) -> Distiller:
    defaults: dict[str, Any] = {"features": STAGES, "canonical_size": 24}
    return Distiller(Network((4, 8, 8), seed=1), **{**defaults, **options})


def features(size: tuple[int, int] = SIZE, count: int = 2) -> list[Tensor]:
    return Network(seed=2).features(images(count, size))


def run(boxes: Any, maps: Any = None, **options: Any) -> Tensor:
    loss: Tensor = make(**options)(images(), boxes, features() if maps is None else maps)
    return loss


def convert(boxes: list[Tensor], form: str, normalized: bool) -> list[Tensor]:
    converted = []
    for rows in boxes:
        first, last = rows[:, :2], rows[:, 2:]
        if form == "cxcywh":
            rows = torch.cat([(first + last) / 2, last - first], dim=1)
        elif form == "xywh":
            rows = torch.cat([first, last - first], dim=1)
        converted.append(rows / torch.tensor([WIDTH, HEIGHT] * 2) if normalized else rows)
    return converted


@pytest.mark.parametrize("form", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("normalized", [False, True])
def test_boxes_of_every_format_are_the_same_boxes(form: str, normalized: bool) -> None:
    expected = run(BOXES)
    boxes = convert(BOXES, form, normalized)
    options = {"box_format": form, "normalized": normalized}
    torch.testing.assert_close(run(boxes, **options), expected, rtol=1e-5, atol=0)
    rows = torch.cat([ROWS[:, :1], torch.cat(boxes)], dim=1)
    torch.testing.assert_close(run(rows, **options), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_boxes_of_every_dtype(dtype: torch.dtype) -> None:
    torch.testing.assert_close(run([b.to(dtype) for b in BOXES]), run(BOXES), rtol=1e-6, atol=0)
    torch.testing.assert_close(run(ROWS.to(dtype)), run(BOXES), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
def test_bounding_boxes_carry_their_format(form: str) -> None:
    boxes = [
        tv_tensors.BoundingBoxes(rows, format=form, canvas_size=SIZE)  # type: ignore[call-overload]
        for rows in convert(BOXES, form.lower(), False)
    ]
    torch.testing.assert_close(run(boxes, box_format="xyxy"), run(BOXES), rtol=1e-6, atol=0)


def test_bounding_boxes_of_other_images_are_refused_in_every_step() -> None:
    def boxes(*sizes: tuple[int, int]) -> list[Tensor]:
        return [
            tv_tensors.BoundingBoxes(b, format="XYXY", canvas_size=size)  # type: ignore[call-overload]
            for b, size in zip(BOXES, sizes, strict=True)
        ]

    size, step = (80, 96), {"size": (80, 96)}
    for distiller in (make(), make()):
        # Images of a padded batch: the largest is as large as it, but for the multiple of 32 that it is padded to.
        # Letterboxes fill one side.
        for good in ((size, size), ((50, 96), (80, 40)), ((49, 60), (30, 65)), ((24, 96), (30, 80)), ((80, 40),) * 2):
            distiller(images(**step), boxes(*good), features(size))
        for bad in ((size, (81, 96)), ((80, 97), size), ((48, 60), (30, 64)), ((40, 48),) * 2, ((640, 640),) * 2):
            with pytest.raises(ValueError, match=r"BoundingBoxes of the images' size \(80, 96\), or of smaller images"):
                distiller(images(**step), boxes(*bad), features(size))
    with pytest.raises(ValueError, match=r"got canvas_size \(640, 640\); resize images and boxes by the same"):
        make()(images(**step), boxes((640, 640), size), features(size))


@pytest.mark.parametrize("method", ["box_l2", "fgd_attention", "rakd"])
@pytest.mark.parametrize(
    "fault", [[0.0, 40.0, 3.0, 2.0, 14.0], [0.0, float("nan"), 3.0, 40.0, 14.0], [2.0, 2.0, 3.0, 40.0, 14.0]]
)
def test_faulty_boxes_are_refused_after_the_first_step_too(method: str, fault: list[float]) -> None:
    distiller = make(method=method)
    distiller(images(), ROWS, features())
    with pytest.raises(ValueError, match=r"^boxes: expected .* got .*(40\.0|nan|2)"):
        distiller(images(), torch.cat([ROWS, torch.tensor([fault])]), features())


def test_normalized_boxes_as_pixels() -> None:
    with pytest.raises(ValueError, match=r"expected pixels, but all lie in the unit square .* say normalized=True"):
        run(convert(BOXES, "xyxy", True))
    with pytest.raises(ValueError, match="say normalized=True, box_format='cxcywh' or 'xywh'"):
        run(convert([torch.tensor([[2.0, 3.0, 14.0, 9.0]]), BOXES[1]], "cxcywh", True))
    with pytest.raises(ValueError, match="these are pixels, say normalized=False"):
        run(BOXES, normalized=True)


def test_a_yolo_row_as_rows() -> None:
    """``[image, cx, cy, w, h]``, normalised, is also ``[K, 5]``."""
    yolo = torch.cat([ROWS[:, :1], torch.cat(convert(BOXES, "cxcywh", True))], dim=1)
    with pytest.raises(ValueError, match="YOLO's and Hugging Face's labels are box_format='cxcywh', normalized=True"):
        run(yolo)
    torch.testing.assert_close(run(yolo, box_format="cxcywh", normalized=True), run(BOXES), rtol=1e-5, atol=0)
    classes = torch.cat([torch.tensor([[0.0], [7.0], [3.0]]), torch.cat(BOXES)], dim=1)
    with pytest.raises(ValueError, match=r"numbers of images from 0 to 1 in column 0 of \[K, 5\], got \[7.0"):
        run(classes)


def test_boxes_of_another_format_as_corners() -> None:
    with pytest.raises(ValueError, match=r"x1 <= x2 and y1 <= y2, .* say box_format='cxcywh' or 'xywh'"):
        run(convert(BOXES, "xywh", False))


def test_boxes_of_larger_images() -> None:
    """Boxes of 640 pixels on images of 160 gave a loss of 0."""
    with pytest.raises(ValueError, match="boxes inside images of 32×48 pixels, got 3 of 3 that lie mostly outside"):
        run([4 * b + 60 for b in BOXES])
    # One box of several may stick out: augmentation does that.
    run([torch.cat([BOXES[0], torch.tensor([[40.0, 20.0, 60.0, 40.0]]), BOXES[0]]), BOXES[1]])


def test_half_the_true_strides() -> None:
    with pytest.raises(
        ValueError, match=r"strides: .* got 2 for map '0' of 8×12 cells; these maps have strides=\(4.0, 8"
    ):
        run(BOXES, strides=(2, 4, 8))
    with pytest.raises(ValueError, match="strides: expected 3 strides, one per map, got 4"):
        run(BOXES, strides=(2, 4, 8, 16))
    with pytest.raises(ValueError, match=r"expert_strides: .* got 2 for map '0'"):
        run(BOXES, expert_strides=(2, 4, 8))
    assert run(BOXES, strides=torch.tensor([4.0, 8.0, 16.0])) == run(BOXES)  # a model's stride is a tensor


def test_three_images_for_maps_of_two() -> None:
    with pytest.raises(ValueError, match="images: expected 2 images, as many as the apprentice's maps are of, got 3"):
        make()(images(3), BOXES, features())
    with pytest.raises(ValueError, match="boxes: expected 2 tensors, one per image, got 3"):
        run([*BOXES, BOXES[0]])
    with pytest.raises(ValueError, match="expert_features: expected maps of 2 images"):
        Distiller(None)(images(), BOXES, features(), features(count=3))
    with pytest.raises(ValueError, match=r"images: expected images of one size.* after resizing and padding"):
        image_list = [torch.zeros(3, 32, 48), torch.zeros(3, 40, 48)]
        make()(image_list, BOXES, features())  # type: ignore[arg-type]


def test_channels_that_are_not_the_maps() -> None:
    with pytest.raises(ValueError, match=r"expert_channels: expected the maps' numbers of channels, \(4, 8, 8\), got"):
        run(BOXES, expert_channels=(4, 8, 16))


def test_channels_differ_by_level() -> None:
    distiller = make()
    loss = distiller(images(), BOXES, features())
    loss.backward()
    assert [tuple(p.shape) for p in distiller.parameters()] == [(8, 6, 1, 1), (8,)]
    assert all(p.grad is not None and p.grad.any() for p in distiller.parameters())


def test_maps_whose_channels_come_last() -> None:
    last = [m.permute(0, 2, 3, 1) for m in features()]
    with pytest.raises(ValueError, match="its channels seem to come last: say layout='NHWC'"):
        run(BOXES, last)
    assert torch.equal(run(BOXES, last, layout="NHWC"), run(BOXES))
    with pytest.raises(ValueError, match="expert_layout='NHWC'"):
        Distiller(None)(images(), BOXES, features(), last)


def test_an_apprentice_that_cannot_learn() -> None:
    with pytest.raises(ValueError, match=r"expected maps that need a gradient.* is the expert itself"):
        run(BOXES, [m.detach() for m in features()])
    network = Network()  # frozen by the distiller, before anyone could see that it is the apprentice too
    distiller = Distiller(network, features=STAGES)
    with pytest.raises(ValueError, match="is the expert itself"):
        distiller(images(), BOXES, network.features(images()))
    run(BOXES, [m.detach() for m in features()], check=False)


def test_a_level_that_cannot_learn_is_told() -> None:
    maps = features()
    with pytest.warns(UserWarning, match=r"no gradient goes to the maps '1', frozen or made without"):
        run(BOXES, [maps[0], maps[1].detach(), maps[2]])


def test_rows_of_zeros_are_no_boxes() -> None:
    padded = [torch.cat([b, torch.zeros(3 - len(b), 4)]) for b in BOXES]
    with pytest.raises(ValueError, match="boxes: expected boxes, got rows of four zeros, as lists are padded with"):
        run(padded)
    with pytest.raises(ValueError, match="got rows of four zeros"):
        run(convert(padded, "cxcywh", True), box_format="cxcywh", normalized=True)


def test_normalised_boxes_of_padded_images() -> None:
    batch = SimpleNamespace(tensors=images(), mask=torch.zeros(2, *SIZE, dtype=torch.bool))
    torch.testing.assert_close(make()(batch, BOXES, features()), run(BOXES), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"boxes: expected pixels beside a SimpleNamespace, got normalized=True"):
        make(normalized=True)(batch, convert(BOXES, "xyxy", True), features())


def test_the_check_can_be_turned_off() -> None:
    assert run([4 * b + 60 for b in BOXES], check=False).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes(dtype: torch.dtype) -> None:
    """Autocast of the model alone: half maps of the apprentice, float32 of the expert, and adapters in float32."""
    distiller = make()
    whole = [m.detach().requires_grad_() for m in features()]
    half = [m.detach().to(dtype).requires_grad_() for m in whole]
    expected = distiller(images(), BOXES, whole)
    loss = distiller(images(), BOXES, half)
    # bfloat16 keeps eight bits.
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    loss.backward()
    assert [m.grad.dtype for m in half if m.grad is not None] == [dtype] * 3
    assert {p.grad.dtype for p in distiller.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_half_maps_of_the_apprentice(method: str) -> None:
    distiller = make(method=method, scores=[f"head.scores.{i}" for i in range(3)] if method == "score_l2" else None)
    half = [m.detach().bfloat16().requires_grad_() for m in features()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="boxes from .* all get the same")
        distiller(images(), BOXES, half).backward()
    gradients = [m.grad for m in half if m.grad is not None]
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 3
    assert any(gradient.any() for gradient in gradients)  # HFA's boxes may leave a level out
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in distiller.parameters())


def test_levels_of_unlike_strides_are_told() -> None:
    expert, maps = Network((4, 8, 8), seed=1), features()[:2]
    options: dict[str, Any] = {"features": STAGES[1:], "canonical_size": 24}
    with pytest.warns(UserWarning, match="map '0' of stride 4 is compared with one of stride 8 of the exp") as told:
        found = Distiller(expert, **options)(images(), BOXES, maps)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(Distiller(expert, expert_strides=(8, 16), **options)(images(), BOXES, maps), found)


def test_boxes_without_area_lie_where_they_begin() -> None:
    flat = [torch.tensor([[30.0, 8.0, 30.0, 20.0], [5.0, 9.0, 5.0, 9.0], [2.0, 3.0, 40.0, 3.0]]), torch.zeros(0, 4)]
    assert run(flat) > 0
    with pytest.raises(ValueError, match=r"got 1 of 1 that lie mostly outside, such as \[60.0, 8.0, 60.0, 20.0\]"):
        run([torch.tensor([[60.0, 8.0, 60.0, 20.0]]), torch.zeros(0, 4)])


def test_targets_in_the_place_of_boxes() -> None:
    for targets in ({"boxes": BOXES}, [{"boxes": rows} for rows in BOXES]):
        with pytest.raises(TypeError, match=r"boxes: .* got targets; give \[t\['boxes'\] for t in targets\]"):
            run(targets)


def test_an_expert_that_sees_larger_images() -> None:
    expert = Network((4, 8, 8), seed=1)
    large = nn.functional.interpolate(images(), scale_factor=2.0)
    distiller = Distiller(expert, features=STAGES, canonical_size=24)
    report = distiller.check(images(), BOXES, features(), expert_images=large)
    assert [level.expert_stride for level in report.levels] == [2, 4, 8]
    told = Distiller(expert, features=STAGES, canonical_size=24, expert_strides=(2, 4, 8))
    loss = distiller(images(), BOXES, features(), expert_images=large)
    assert torch.equal(told(images(), BOXES, features(), expert_images=large), loss)


def test_the_report_is_a_small_table() -> None:
    expert, apprentice = Network((4, 8, 8), seed=1), Network(seed=2)
    before = {k: v.clone() for k, v in apprentice.state_dict().items()}
    distiller = Distiller(
        expert, apprentice=apprentice, features=STAGES, apprentice_features="input:head", canonical_size=24
    )
    report = distiller.check(images(), BOXES)
    one, two, three = level_weights(ROWS, strides=(4, 8, 16), canonical_size=24).sum(dim=0).tolist()
    maps = (network.features(images()) for network in (deepcopy(expert).eval(), deepcopy(apprentice)))
    theirs, own = ([f"{m.square().mean().sqrt():.2g}" for m in network] for network in maps)
    title, *rows = str(report).splitlines()
    assert title == "2 images of 32×48 pixels, 3 boxes"
    network = "channels stride RMS"
    assert [row.split() for row in rows] == [
        f"level apprentice {network} expert {network} boxes".split(),
        ["0", "8×12", "4", "4", own[0], "8×12", "4", "4", theirs[0], f"{one:.1f}"],
        ["1", "4×6", "6", "8", own[1], "4×6", "8", "8", theirs[1], f"{two:.1f}"],
        ["2", "2×3", "8", "16", own[2], "2×3", "8", "16", theirs[2], f"{three:.1f}"],
    ]
    assert len({len(row) for row in rows}) == 1
    assert sum(level.boxes for level in report.levels) == pytest.approx(3)
    # The apprentice ran for its maps alone.
    assert all(torch.equal(v, before[k]) for k, v in apprentice.state_dict().items())
    assert apprentice.training
    assert len(list(distiller.parameters())) == 2


def test_one_image_through_a_pooled_normalisation() -> None:
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    class Pooling(Network):
        def forward(self, x: Tensor) -> Any:
            maps = self.features(x)
            return [maps[0] + pooled(maps[0])]

    apprentice = Pooling()
    apprentice.add_module("pooled", pooled)
    distiller = Distiller(Network((4, 8, 8)), apprentice=apprentice, features=STAGES[:1], apprentice_features="")
    assert distiller.check(images(1), BOXES[:1]).images == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_a_fresh_apprentice_is_shown_as_it_trains(frozen: bool) -> None:
    apprentice = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.BatchNorm2d(8), nn.Dropout(0.5))
    nn.init.normal_(apprentice[0].weight, std=1e-2)  # which fresh statistics would leave as it is
    apprentice[1].train(not frozen)
    before = {k: v.clone() for k, v in apprentice.state_dict().items()}
    distiller = Distiller(Network((4, 8, 8)), apprentice=apprentice, features=STAGES[:1], apprentice_features="2")
    report = distiller.check(images(), BOXES)
    assert all(torch.equal(v, before[k]) for k, v in apprentice.state_dict().items())
    assert [module.training for module in apprentice] == [True, not frozen, True]
    as_trained = deepcopy(apprentice)
    as_trained[2].eval()
    assert report.levels[0].rms == pytest.approx(as_trained(images()).square().mean().sqrt().item(), rel=1e-5)
    assert (report.levels[0].rms > 0.5) is not frozen


def test_images_may_be_missing() -> None:
    distiller = Distiller(None, strides=(4, 8, 16), canonical_size=24)
    maps, expert = features(), [m.detach() for m in Network((4, 8, 8)).features(images())]
    loss = distiller(None, BOXES, maps, expert)
    assert torch.equal(Distiller(None, canonical_size=24)(images(), BOXES, maps, expert), loss)
    with pytest.raises(ValueError, match="strides: expected strides=, images or image_size="):
        Distiller(None)(None, BOXES, maps, expert)
    with pytest.raises(ValueError, match="image_size: expected the images' height and width"):
        Distiller(None, strides=(4, 8, 16), normalized=True)(None, BOXES, maps, expert)


@pytest.mark.parametrize("rescale", [True, "both", False])
def test_an_apprentice_that_would_have_to_shrink_is_told(rescale: Any) -> None:
    theirs = Network((4, 6, 8), seed=1).features(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factor in (1.0, 30.0) if rescale is not True else (1.0,):
            ours = [factor * m for m in Network((4, 6, 8), seed=2).features(images())]
            Distiller(None, rescale=rescale, canonical_size=24)(images(), BOXES, ours, theirs)
        # Adapters bring other channels to any scale.
        ours = [30 * m for m in Network((3, 5, 7), seed=2).features(images())]
        Distiller(None, rescale=rescale, canonical_size=24)(images(), BOXES, ours, theirs)
    if rescale is True:
        ours = [factor * m for factor, m in zip((1, 30, 9), Network((4, 6, 8), seed=2).features(images()), strict=True)]
        rms = ours[1].square().mean().sqrt().item()
        with pytest.warns(UserWarning, match=rf"the apprentice's map '1' has {rms:.2g}: it will shrink"):
            Distiller(None, rescale=True, canonical_size=24)(images(), BOXES, ours, theirs)
