"""Trainings in mixed precision, and losses and gradients that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_model import ToyModel, make_trainer

from rakd.data.kitti import Batch


class Spoiled(ToyModel):
    """Multiplies the first loss of one step by a factor, in the value or in the gradient alone."""

    def __init__(self, step: int, factor: float, *, gradient_only: bool = False) -> None:
        super().__init__()
        self.left = step
        self.factor = factor
        self.gradient_only = gradient_only

    def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
        losses = super().forward(batch, seeds)
        self.left -= 1
        if self.left == -1:
            if self.gradient_only:
                losses["count"].register_hook(lambda gradient: gradient * self.factor)
            else:
                losses["count"] = losses["count"] * self.factor
        return losses


def test_automatic_precision_is_full_on_a_cpu(scenes: Path, tmp_path: Path) -> None:
    assert make_trainer(scenes, tmp_path, amp="auto").settings.amp == "off"


@pytest.mark.parametrize("amp", ["off", "float16"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(scenes: Path, tmp_path: Path, factor: float, amp: str) -> None:
    model = Spoiled(4, factor)
    with pytest.raises(
        ValueError, match=r"the loss of step 5 is not finite: count (nan|inf), height [\d.]+; "
    ) as caught:
        make_trainer(scenes, tmp_path, model, amp=amp).run()
    assert str(caught.value).endswith("frames " + ", ".join(model.seen[-1]))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["model"].values())
    again = make_trainer(scenes, tmp_path, amp=amp)
    assert again.step == 3
    again.run()


def test_a_gradient_that_is_not_finite_stops(scenes: Path, tmp_path: Path) -> None:
    model = Spoiled(4, float("inf"), gradient_only=True)
    with pytest.raises(ValueError, match=r"the gradient of step 5 is not finite: count .* gradient norm (nan|inf)"):
        make_trainer(scenes, tmp_path, model).run()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_float16_gradients_that_overflow_are_skipped(scenes: Path, tmp_path: Path) -> None:
    model = Spoiled(4, float("inf"), gradient_only=True)
    trainer = make_trainer(scenes, tmp_path, model, amp="float16", log_every=1, checkpoint_every=1, clip=None)
    scales = []
    update = trainer.scaler.update
    trainer.scaler.update = lambda: (update(), scales.append(trainer.scaler.get_scale()))
    rows = trainer.run()
    assert len(rows) == 10
    skipped = [row["step"] for row in rows if row["grad_norm"] == float("inf")]
    assert 5 in skipped and len(skipped) < 6
    assert scales[4] == scales[3] / 2
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_float16_gradients_that_never_become_finite_stop(scenes: Path, tmp_path: Path) -> None:
    class Endless(ToyModel):
        def forward(self, batch: Batch, seeds: Sequence[int]) -> dict[str, Tensor]:
            losses = super().forward(batch, seeds)
            losses["count"].register_hook(lambda gradient: gradient * float("nan"))
            return losses

    with pytest.raises(ValueError, match="the gradient of step 28 is not finite"):  # 65536 halved 27 times is 2⁻¹¹
        make_trainer(scenes, tmp_path, Endless(), amp="float16", steps=40).run()


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_forward_runs_in_the_dtype_asked_for(scenes: Path, tmp_path: Path, amp: str) -> None:
    dtypes = set()
    model = ToyModel()
    model.conv.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    (row,) = make_trainer(scenes, tmp_path, model, amp=amp, steps=1).run()
    assert dtypes == {getattr(torch, amp)}
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    (full,) = make_trainer(scenes, tmp_path / "full", steps=1).run()
    assert row["total"] == pytest.approx(full["total"], rel=0.02)
    assert row["total"] != full["total"]
