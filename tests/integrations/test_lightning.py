"""DistillCallback with Lightning's real Trainer: automatic and manual optimisation, resuming, two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

pl = pytest.importorskip("lightning.pytorch")

from lightning_cases import Manual, Module, Pyramid, collate, fit, items  # noqa: E402

from rakd.integrations.lightning import DistillCallback, images_and_boxes  # noqa: E402
from rakd_ops import soft_roi_distill  # noqa: E402


def callback(**options: Any) -> DistillCallback:
    settings = {"weight": "auto:0.2", "normalize": True, "apprentice": "net", "seed": 3, **options}
    return DistillCallback(Pyramid(16, seed=1), **settings)


@pytest.mark.parametrize("kind", [Module, Manual])
def test_adds_the_loss_once_a_step(kind: type[Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = kind(8)
    added = callback()
    expert = {name: value.clone() for name, value in added._settings["expert"].state_dict().items()}
    trainer = fit(module, tmp_path, callbacks=[added])
    assert added.distiller is not None and added.distiller.strides == (4, 8, 16)
    adapters = list(added.distiller.parameters())
    assert len(adapters) == 6
    optimizer = trainer.optimizers[0]
    assert all(int(optimizer.state[p]["step"]) == 6 for p in adapters)
    first, total = module.seen[0], module.backwards[0]
    assert total == pytest.approx(1.2 * first, rel=1e-5)
    assert len(module.seen) == len(module.backwards) == 6
    assert float(trainer.logged_metrics["distill_loss"]) > 0
    assert "training_step" not in vars(module) and "manual_backward" not in vars(module)
    assert not any(m._forward_hooks for m in module.modules())
    assert all(torch.equal(value, expert[name]) for name, value in added._settings["expert"].state_dict().items())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert list(checkpoint["state_dict"]) == list(module.state_dict())
    assert not any("expert" in name or "distil" in name for name in checkpoint["state_dict"])
    (state,) = [value for name, value in checkpoint["callbacks"].items() if "Distill" in name]
    assert len(state["distiller"]) == 7


def test_the_loss_is_the_ops(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Module(16)
    added = callback(weight=1.0, normalize=False)
    images, boxes = zip(*items(4)[:2], strict=True)
    batch = torch.stack(list(images))
    with torch.no_grad():
        expected = soft_roi_distill(module.net(batch), Pyramid(16, seed=1)(batch), list(boxes), strides=(4, 8, 16))
    fit(module, tmp_path, callbacks=[added], max_steps=1)
    assert module.backwards[0] - module.seen[0] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", [Module, Manual])
def test_resumed_to_the_same_bits(kind: type[Module], tmp_path: Path) -> None:
    def start() -> tuple[Module, DistillCallback]:
        torch.manual_seed(0)
        return kind(8), callback()

    whole, whole_callback = start()
    fit(whole, tmp_path / "whole", callbacks=[whole_callback])
    half, half_callback = start()
    fit(half, tmp_path / "half", callbacks=[half_callback], max_epochs=1)
    resumed, resumed_callback = start()
    fit(resumed, tmp_path / "rest", callbacks=[resumed_callback], ckpt_path=tmp_path / "half" / "last.ckpt")
    assert resumed_callback.distiller is not None and whole_callback.distiller is not None
    for one, other in ((whole, resumed), (whole_callback.distiller, resumed_callback.distiller)):
        assert set(one.state_dict()) == set(other.state_dict())
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert whole.backwards[3:] == resumed.backwards


def test_dicts_hooks_by_name_and_bf16(tmp_path: Path) -> None:
    class Dicts(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "other": 1}

    names = ["stages.0", "stages.1"]
    added = callback(features=names, apprentice_features=names, weight=1.0)
    fit(Dicts(8), tmp_path, callbacks=[added], precision="bf16-mixed")
    assert added.distiller is not None and added.distiller.strides == (4, 8)


def test_two_fits_and_wrong_names(tmp_path: Path) -> None:
    added, module = callback(weight="auto:10"), Module(8)
    fit(module, tmp_path / "one", callbacks=[added], max_epochs=1)
    fit(module, tmp_path / "two", callbacks=[added], max_epochs=1)
    assert len(module.backwards) == 6
    assert added.distiller._weight.calls == 6  # measured on, not anew
    with pytest.raises(AttributeError, match="no_such"):
        fit(Module(8), tmp_path / "three", callbacks=[callback(apprentice="no_such")])
    shared = Module(8)
    with pytest.raises(ValueError, match="expert: expected a network of its own"):
        fit(shared, tmp_path / "four", callbacks=[DistillCallback(shared.net, apprentice="net")])
    assert isinstance(shared.net, nn.Module)


def test_two_callbacks_of_different_methods(tmp_path: Path) -> None:
    added, module = [callback(), callback(method="l_roi")], Module(8)
    fit(module, tmp_path, callbacks=added, max_epochs=1)
    assert len({one.state_key for one in added}) == 2
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]
    assert {one.state_key for one in added} <= set(state)
    keys = {callback(apprentice_features=lambda network, images: network(images)).state_key for _ in range(2)}
    assert len(keys) == 1 and "0x" not in keys.pop()  # a resumed run finds its state


@pytest.mark.parametrize("kind", [Module, Manual])
def test_two_callbacks_weigh_by_the_modules_own_loss_and_leave_it_as_it_was(kind: type[Module], tmp_path: Path) -> None:
    module = kind(8)
    other = callback(weight="auto:1", method="l_roi", features="stages.0", apprentice_features="stages.0")
    added = [callback(weight="auto:1"), other]
    trainer = fit(module, tmp_path / "one", callbacks=added, max_steps=1)
    assert module.backwards[0] == pytest.approx(3 * module.seen[0], rel=1e-5)
    assert float(trainer.logged_metrics["distill_loss"]) == pytest.approx(2 * module.seen[0], rel=1e-5)
    assert "training_step" not in vars(module) and "manual_backward" not in vars(module)
    fit(module, tmp_path / "two", callbacks=added, max_steps=1)
    fit(module, tmp_path / "three", callbacks=[], max_steps=1)
    assert module.backwards[2] == module.seen[2]


def test_the_tuners_go_back_to_before_the_first_step(tmp_path: Path) -> None:
    from lightning.pytorch.tuner.tuning import Tuner

    class Tuned(Module):
        lr = 1e-3

    added, module = callback(), Tuned(8)
    options = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    trainer = pl.Trainer(max_epochs=1, callbacks=[added], **options)
    loader = torch.utils.data.DataLoader(items(), batch_size=2, collate_fn=collate)
    assert Tuner(trainer).lr_find(module, loader, num_training=3, early_stop_threshold=None) is not None
    assert added.distiller is not None and added.distiller.weight == 0


def test_a_training_step_of_the_modules_own_stays(tmp_path: Path) -> None:
    added, module = callback(), Module(8)
    own = module.training_step
    module.training_step = own
    fit(module, tmp_path, callbacks=[added], max_epochs=1)
    assert vars(module)["training_step"] is own


@pytest.mark.parametrize("same", [True, False])
def test_a_fit_that_failed_leaves_nothing_behind(same: bool, tmp_path: Path) -> None:
    class Fails(Module):
        fails = True

        def on_train_batch_end(self, *_: object) -> None:
            if self.fails:
                raise KeyboardInterrupt if same else RuntimeError("out of memory")

    clean = Fails(8)
    clean.fails = False
    fit(clean, tmp_path / "clean", callbacks=[callback()], max_epochs=1)
    module, added = Fails(8), callback()
    module.load_state_dict(weights := {name: value.clone() for name, value in module.state_dict().items()})
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit(module, tmp_path / "failed", callbacks=[added], max_epochs=1)
    assert not any(part._forward_hooks for part in module.modules()) and "training_step" not in vars(module)
    module.load_state_dict(weights)
    module.fails = False
    module.seen.clear()
    module.backwards.clear()
    fit(module, tmp_path / "again", callbacks=[added if same else callback()], max_epochs=1)
    first = module.backwards[0] - module.seen[0]
    alone = callback()
    other = Module(8)
    other.load_state_dict(weights)
    fit(other, tmp_path / "other", callbacks=[alone], max_epochs=1)
    # The same callback has adapters that learned for a step; a loss that is added twice is twice as large.
    assert first == pytest.approx(other.backwards[0] - other.seen[0], rel=0.05 if same else 1e-6) and first > 0


class Resizing(nn.Module):
    """A detector of torchvision's kind: 60 x 60 pixels become 50 x 50, padded to 64 x 64."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.transform = GeneralizedRCNNTransform(50, 50, [0.0] * 3, [1.0] * 3)
        self.backbone = Pyramid(channels)

    def forward(self, images: list[torch.Tensor], boxes: list[torch.Tensor]) -> Any:
        self.seen = self.transform(images, [{"boxes": rows} for rows in boxes])
        return self.backbone(self.seen[0].tensors)


def test_a_detector_that_resizes_images_needs_to_say_what_its_backbone_saw(tmp_path: Path) -> None:
    class Detecting(Module):
        def __init__(self) -> None:
            super().__init__(16)
            self.net = Resizing(16)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.net([image[:, :60, :60] for image in batch[0]], batch[1])[0].mean() + 1
            self.seen.append(loss.item())
            return loss

    torch.manual_seed(0)
    options = {"apprentice": "net.backbone", "weight": 1.0, "normalize": False}
    refused = Detecting()
    with pytest.raises(ValueError, match=r"batch: expected a function .* as net.transform resizes .*DistilledDetector"):
        fit(refused, tmp_path / "refused", callbacks=[callback(**options)])
    assert not any(m._forward_hooks for m in refused.modules())
    with pytest.raises(ValueError, match=r"as net.transform resizes"):
        names = {"apprentice": "", "apprentice_features": "net.backbone"}
        fit(Detecting(), tmp_path / "by name", callbacks=[callback(**options | names)])
    module = Detecting()

    def seen(batch: Any) -> Any:
        images, targets = module.net.seen
        return images.tensors, [target["boxes"] for target in targets]

    images, boxes = zip(*items(4)[:2], strict=True)
    with torch.no_grad():
        maps = module.net([image[:, :60, :60] for image in images], list(boxes))
        padded, rows = seen(None)
        expected = soft_roi_distill(maps, Pyramid(16, seed=1)(padded), rows, strides=(4, 8, 16))
    assert padded.shape[2:] == (64, 64)
    torch.testing.assert_close(rows[0], boxes[0] * 50 / 60)
    fit(module, tmp_path / "given", callbacks=[callback(**options, batch=seen)], max_steps=1)
    assert module.backwards[0] - module.seen[0] == pytest.approx(float(expected), rel=1e-5)


def test_an_epoch_that_goes_past_manual_backward_is_an_error(tmp_path: Path) -> None:
    class Plain(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch[0]).backward()

    with pytest.raises(RuntimeError, match=r"expected self.manual_backward\(loss\), to which the distillation loss"):
        fit(Plain(8), tmp_path, callbacks=[callback()])


def test_two_processes_stay_alike(tmp_path: Path) -> None:
    script = Path(__file__).parent / "lightning_processes.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run([*launch, script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["seen"] != second["seen"]
    assert len(first["adapters"]) == 7
    for part in ("adapters", "model"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())


def test_batches_of_another_form_are_told() -> None:
    with pytest.raises(TypeError, match=r"batch: expected batches \(images, targets\), got a dict; give batch="):
        images_and_boxes({"image": torch.zeros(1), "boxes": []})
    assert images_and_boxes((1, [{"boxes": 2}, {"boxes": 3}])) == (1, [2, 3])
    assert images_and_boxes([1, [2], "more"]) == (1, [2])
