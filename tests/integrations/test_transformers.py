"""DistillMixin with transformers' real Trainer and its detectors."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("scipy")  # of the detectors' matchers

from detr_cases import KINDS, items, make, trainer  # noqa: E402

from rakd.integrations.transformers import decoder_maps  # noqa: E402
from rakd_ops import soft_roi_distill  # noqa: E402

STRIDES = {"deformable_detr": (8, 16, 32, 64), "detr": (32,)}


def logged(run: Any, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def test_adapters_are_clipped_as_the_model_is(tmp_path: Path) -> None:
    """The Trainer clips the model's gradients alone, at the same norm."""
    sgd = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
    run = trainer(
        make("rt_detr", 16), tmp_path, expert=make("rt_detr", 24, seed=1), distill={"weight": "auto:10"},
        max_grad_norm=1e-3, max_steps=2, save_strategy="no", **sgd
    )  # fmt: skip
    seen: list[list[Tensor]] = []

    class Note(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append([parameter.detach().clone() for parameter in run.distiller.parameters()])

    run.add_callback(Note())
    run.train()
    before, after = seen
    moved = torch.stack([(a - b).norm() for a, b in zip(before, after, strict=True)]).norm()
    assert float(moved) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_trains(kind: str, bf16: bool, tmp_path: Path) -> None:
    model, expert = make(kind, 32), make(kind, 64, seed=1)
    before = {name: value.clone() for name, value in expert.state_dict().items()}
    run = trainer(
        model, tmp_path, expert=expert, distill={"weight": "auto:0.2", "normalize": True}, bf16=bf16, logging_steps=1
    )
    start = [p.clone() for p in model.parameters()]
    run.train()
    assert run.distiller.strides == STRIDES.get(kind, (8, 16, 32))
    adapters = list(run.distiller.parameters())
    assert len(adapters) == 2 * len(run.distiller.strides)
    assert {p.dtype for p in adapters} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in expert.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    losses, added = logged(run, "loss"), logged(run, "distill_loss")
    assert len(added) == len(losses) == 12
    assert added[0] / (losses[0] - added[0]) == pytest.approx(0.2, rel=1e-3)
    assert added[-1] < added[0]
    assert logged(run, "eval_loss") == []
    # Saved models are the model's own, and load by its own class.
    saved = tmp_path / "checkpoint-12"
    again, report = type(model).from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())


def test_the_expert_runs_in_the_trainings_precision_where_autocast_is_around_the_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expert = make("rt_detr", 32), make("rt_detr", 64, seed=1)
    run = trainer(model, tmp_path, expert=expert, distill={"weight": 1.0}, bf16=True, max_steps=1)
    monkeypatch.setattr(run, "compute_loss_context_manager", contextlib.nullcontext)  # as on a GPU
    seen: list[torch.dtype] = []
    expert.model.encoder.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state[0].dtype))
    run.train()
    assert seen == [torch.bfloat16]


def test_the_loss_is_that_of_the_decoders_maps_and_pixel_boxes(tmp_path: Path) -> None:
    model, expert = make("rt_detr", 32), make("rt_detr", 32, seed=1)
    run = trainer(model, tmp_path, expert=expert, distill={"weight": 1.0}, max_steps=1, logging_steps=1)
    inputs = {"pixel_values": items()[0]["pixel_values"][None], "labels": [items()[0]["labels"]]}
    run.create_optimizer()
    model.train()
    torch.manual_seed(0)
    with_it = run.compute_loss(model, dict(inputs))
    torch.manual_seed(0)
    without = model(**inputs).loss
    maps = []
    for network in (model, expert):
        seen: list[Any] = []
        handle = network.model.encoder.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        torch.manual_seed(0)
        network(**inputs)
        handle.remove()
        maps.append(seen[0].last_hidden_state)
    boxes = torch.tensor([[0.2 * 96, 0.25 * 64, 0.4 * 96, 0.55 * 64], [0.45 * 96, 0.3 * 64, 0.75 * 96, 0.7 * 64]])
    expected = soft_roi_distill(maps[0], [m.detach() for m in maps[1]], [boxes], strides=(8, 16, 32))
    torch.testing.assert_close(with_it - without, expected, rtol=1e-4, atol=1e-5)
    model.eval()
    assert torch.equal(run.compute_loss(model, dict(inputs)), model(**inputs).loss)


@pytest.mark.parametrize("padded_along", [True, False])
def test_boxes_of_images_that_were_padded(padded_along: bool, tmp_path: Path) -> None:
    # Processors pad the labels along, and change their size; pad() on images alone leaves both as they were.
    run = trainer(make("detr", 32), tmp_path, expert=make("detr", 32, seed=1), distill={"weight": 1.0})
    run.create_optimizer()
    run.model.train()
    seen: list[Tensor] = []
    plain = run.distiller.forward
    run.distiller.forward = lambda images, boxes, **rest: seen.extend(boxes) or plain(images, boxes, **rest)
    mask = torch.zeros(2, 64, 96, dtype=torch.long)
    mask[0, :64, :48], mask[1, :32] = 1, 1
    shares = [torch.tensor([[0.5, 0.5, 0.2, 0.4]]), torch.tensor([[0.5, 0.5, 0.2, 0.4]])]
    sizes = [(64, 96)] * 2 if padded_along else [(64, 48), (32, 96)]
    labels: list[dict[str, Any]] = [
        {"class_labels": torch.tensor([1]), "boxes": own, "size": torch.tensor(size)}
        for own, size in zip(shares, sizes, strict=True)
    ]
    inputs = {"pixel_values": torch.rand(2, 3, 64, 96) * mask[:, None], "pixel_mask": mask, "labels": labels}
    run.compute_loss(run.model, dict(inputs))
    wide, high = torch.tensor([[0.5, 1, 0.5, 1]]), torch.tensor([[1, 0.5, 1, 0.5]])
    expected = shares if padded_along else [shares[0] * wide, shares[1] * high]
    for own, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(own, wanted)
    for size in ({}, {"size": torch.tensor((375, 500))}):
        labels[1] = {"class_labels": labels[1]["class_labels"], "boxes": labels[1]["boxes"], **size}
        with pytest.raises(ValueError, match=r"labels\[1\]\['size'\]: expected .*\(64, 96\), or .*\(32, 96\), got"):
            run.compute_loss(run.model, dict(inputs))


def test_a_loss_function_of_ones_own(tmp_path: Path) -> None:
    # The Trainer then takes the labels out of the batch.
    model = make("rt_detr", 32)
    run = trainer(
        model, tmp_path, expert=make("rt_detr", 32, seed=1), distill={"weight": 1.0}, max_steps=1, logging_steps=1
    )
    run.compute_loss_func = lambda outputs, labels, **_: outputs.logits.square().mean() + 0 * labels[0]["boxes"].sum()
    run.train()
    assert logged(run, "distill_loss")[0] > 0


@pytest.mark.parametrize("weight", [1.0, "auto:10"])
def test_a_loss_that_comes_divided_is_joined_by_a_divided_one(weight: Any, tmp_path: Path) -> None:
    """The Trainer does not divide what a loss function of one's own gives."""
    seen: dict[int, list[list[float]]] = {}
    for steps in (1, 2):
        run = trainer(
            make("detr", 32), tmp_path / str(steps), expert=make("detr", 32, seed=1), distill={"weight": weight},
            gradient_accumulation_steps=steps, max_steps=1, logging_steps=1, save_strategy="no", learning_rate=0.0,
        )  # fmt: skip
        run.compute_loss_func = lambda outputs, labels, steps=steps, **_: (0 * outputs.logits).sum() + 1 / steps
        run.train()
        seen[steps] = [logged(run, "loss"), logged(run, "distill_loss")]
        assert seen[steps][0][0] == pytest.approx(1 + seen[steps][1][0], rel=1e-4)
        assert not any(part._forward_hooks for part in run.model.modules())
        with torch.inference_mode():
            run.model(**{"pixel_values": torch.rand(1, 3, 64, 96)})
    if weight != 1.0:
        assert seen[2][1][0] == pytest.approx(10, rel=0.05)


class Stop(transformers.TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = True
        return control


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_resumed_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    def run(model: nn.Module, folder: Path, **changes: Any) -> Any:
        # Nothing random but what is seeded: the trainer's own generators are not where they were at an epoch's end.
        model.config.num_denoising = 0
        for module in model.modules():
            for name in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        settings = {"weight": "auto:0.2", "normalize": True}
        fixed = {"lr_scheduler_type": "linear", "train_sampling_strategy": "sequential", **changes}
        return trainer(model, folder, expert=make(kind, 64, seed=1), distill=settings, **fixed)

    whole = run(make(kind, 32), tmp_path / "whole")
    whole.train()
    run(make(kind, 32), tmp_path / "parts", callbacks=[Stop()]).train()
    checkpoint = tmp_path / "parts" / "checkpoint-6"
    # Transformers renames a backbone's weights in its files, and its resuming does not find them; from_pretrained does.
    model = make(kind, 32)
    model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict(), strict=False)
    resumed = run(model, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 12
    for one, other in ((whole.model, resumed.model), (whole.distiller, resumed.distiller)):
        assert set(one.state_dict()) == set(other.state_dict())
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert logged(whole, "distill_loss")[3:] == logged(resumed, "distill_loss")[3:]


def test_accumulated_batches_count_as_one(tmp_path: Path) -> None:
    """The loss of two accumulated batches is their mean, as the model's own is."""
    seen: dict[int, list[float]] = {}
    for steps in (1, 2):
        run = trainer(
            make("detr", 32), tmp_path / str(steps), expert=make("detr", 32, seed=1), distill={"weight": 1.0},
            gradient_accumulation_steps=steps, max_steps=2, logging_steps=1, save_strategy="no",
        )  # fmt: skip
        run.train()
        seen[steps] = logged(run, "loss")
    assert all(loss < 1.5 * max(seen[1]) for loss in seen[2])


def test_evaluation_knows_nothing_of_it(tmp_path: Path) -> None:
    with_it = trainer(make("detr", 32), tmp_path, expert=make("detr", 64, seed=1), distill={"weight": 1.0})
    without = trainer(make("detr", 32), tmp_path)
    assert with_it.evaluate()["eval_loss"] == without.evaluate()["eval_loss"]
    assert without.distiller is None
    without.train()
    assert without.distiller is None


def test_any_expert_with_named_maps(tmp_path: Path) -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList(nn.Conv2d(3, 8, 3, stride=s, padding=1) for s in (8, 16, 32))

        def forward(self, images: Tensor) -> list[Tensor]:
            return [layer(images) for layer in self.body]

    run = trainer(make("d_fine", 32), tmp_path, expert=Expert(), distill={"weight": 0.1}, max_steps=2)
    run.train()
    assert run.distiller.strides == (8, 16, 32)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="features: could not find the feature maps of Linear"):
        decoder_maps(nn.Linear(1, 1))
    model = make("detr", 32)
    with pytest.raises(ValueError, match="expert: expected a network of its own"):
        trainer(model, tmp_path, expert=model).train()
    with pytest.raises(ValueError, match="features: expected as many expert maps as the apprentice has, 1"):
        trainer(model, tmp_path, expert=make("rt_detr", 32)).train()


def test_two_processes_stay_alike(tmp_path: Path) -> None:
    script = Path(__file__).parent / "transformers_processes.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run([*launch, script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert len(first["adapters"]) == 7
    assert first["boxes"] != second["boxes"]  # each saw its own images
    for part in ("adapters", "model"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part] if "running" not in name)
    started = [name for name in first["start"] if not torch.equal(first["start"][name], first["adapters"][name])]
    assert len(started) == 7
