"""DistillCallback with Lightning's real Trainer: automatic and manual optimisation, resuming, two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pl = pytest.importorskip("lightning.pytorch")

from lightning_cases import Manual, Module, Pyramid, fit, items  # noqa: E402

from rakd.integrations.lightning import DistillCallback  # noqa: E402
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
    added, module = callback(), Module(8)
    fit(module, tmp_path / "one", callbacks=[added], max_epochs=1)
    fit(module, tmp_path / "two", callbacks=[added], max_epochs=1)
    assert len(module.backwards) == 6
    with pytest.raises(AttributeError, match="no_such"):
        fit(Module(8), tmp_path / "three", callbacks=[callback(apprentice="no_such")])
    shared = Module(8)
    with pytest.raises(ValueError, match="expert: expected a network of its own"):
        fit(shared, tmp_path / "four", callbacks=[DistillCallback(shared.net, apprentice="net")])
    assert isinstance(shared.net, nn.Module)


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
