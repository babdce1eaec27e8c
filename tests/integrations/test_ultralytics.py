"""Distillation in ultralytics' real trainer: what is trained, logged, saved and resumed."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ultralytics = pytest.importorskip("ultralytics")

from yolo_cases import network, settings  # noqa: E402

from rakd.data.boxes2d import BoxDataset, write_yolo  # noqa: E402
from rakd.integrations.ultralytics import DistilledTraining, _Distilling, distill, head_inputs  # noqa: E402

RTDETR, YOLO = ultralytics.RTDETR, ultralytics.YOLO


@pytest.fixture(scope="module")
def data(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_yolo(scenes, tmp_path_factory.mktemp("yolo") / "data")


class Recorder(nn.Module):
    """A method that notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, expert: dict[str, Tensor], apprentice: dict[str, Tensor], boxes: Any) -> Tensor:
        self.calls.append((expert, apprentice, boxes))
        return sum(feature.float().mean() for feature in apprentice.values())


def rows(folder: Path) -> list[dict[str, float]]:
    names, *lines = (folder / "results.csv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(names.split(","), map(float, line.split(",")), strict=True)) for line in lines]


def pickled(path: Path) -> bytes:
    """The pickle inside a checkpoint: classes and names, without tensors' contents."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)


def test_adapters_join_the_weights_at_their_rate_and_are_clipped(data: Path, tmp_path: Path) -> None:
    """MuSGD has two groups of weights, one of which is for class heads, at a higher rate."""
    distilling = distill(YOLO(network(tmp_path, "yolo", 8)), YOLO(network(tmp_path, "yolo", 16)), weight="auto:10")
    norms: list[float] = []

    def note(trainer: Any) -> None:
        gradients = [p.grad for p in trainer.distiller.parameters() if p.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()) if gradients else 0.0)

    def watch(trainer: Any) -> None:
        trainer.optimizer.register_step_post_hook(lambda *_: note(trainer))

    distilling.add_callback("on_train_start", watch)
    distilling.train(name="kd", **settings(data, tmp_path, optimizer="MuSGD", lr0=1e-3, lrf=1.0, epochs=1))
    trainer = distilling.trainer
    own = {id(parameter) for parameter in trainer.distiller.parameters()}
    homes = [group for group in trainer.optimizer.param_groups if own & {id(p) for p in group["params"]}]
    assert len(own) == 6 and len(homes) == 1 and homes[0]["param_group"] == "weight"
    assert homes[0]["lr"] == min(g["lr"] for g in trainer.optimizer.param_groups if g["param_group"] == "weight")
    assert norms and max(norms) <= 10 * (1 + 1e-4)


@pytest.mark.parametrize(("apprentice", "expert"), [("yolo", "yolo"), ("rtdetr", "yolo"), ("yolo", "rtdetr")])
def test_trains_and_leaves_clean_checkpoints(apprentice: str, expert: str, data: Path, tmp_path: Path) -> None:
    kind = {"yolo": YOLO, "rtdetr": RTDETR}
    apprentice_file = network(tmp_path, apprentice, 8)
    arguments = settings(data, tmp_path)
    kind[apprentice](apprentice_file).train(name="plain", **arguments)
    teaching = kind[expert](network(tmp_path, expert, 16))
    before = {name: value.clone() for name, value in teaching.model.state_dict().items()}
    distilling = distill(kind[apprentice](apprentice_file), teaching, weight="auto:0.2", normalize=True)
    distilling.train(name="kd", **arguments)
    trainer = distilling.trainer
    assert trainer.distiller.strides == (8, 16, 32)
    assert len(list(trainer.distiller.parameters())) == 6
    assert all(torch.equal(value, before[name]) for name, value in teaching.model.state_dict().items())
    plain, distilled = rows(tmp_path / "plain"), rows(tmp_path / "kd")
    added = set(distilled[0]) - set(plain[0])
    assert added == {"train/distill_loss", "val/distill_loss"}
    assert all(row["train/distill_loss"] > 0 and row["val/distill_loss"] == 0 for row in distilled)
    for name in ("best.pt", "last.pt"):
        with_it, without = tmp_path / "kd" / "weights" / name, tmp_path / "plain" / "weights" / name
        content = pickled(with_it)
        # Ultralytics writes down where the data lie, and the commit, with its message, of a checkout that it is in.
        git = torch.load(with_it, weights_only=False).get("git") or {}
        for text in (str(data), *(value for value in git.values() if isinstance(value, str))):
            content = content.replace(text.encode(), b"")
        assert b"rakd" not in content
        assert abs(with_it.stat().st_size - without.stat().st_size) < 2000
        networks = [torch.load(path, weights_only=False)["model"] for path in (with_it, without)]
        assert [*networks[0].state_dict()] == [*networks[1].state_dict()]
        assert set(vars(networks[0])) == set(vars(networks[1]))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in networks[0].modules())
    # It loads and runs where this package is not.
    code = (
        "import sys; sys.modules['rakd'] = sys.modules['rakd_ops'] = None\n"
        f"import ultralytics, torch; m = ultralytics.{kind[apprentice].__name__}({str(with_it)!r})\n"
        "m.predict(torch.rand(1, 3, 96, 96), verbose=False); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("fine"), done.stderr


def test_boxes_lie_where_the_labels_are(data: Path, scenes: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    distilling = distill(YOLO(network(tmp_path, "yolo", 8)), YOLO(network(tmp_path, "yolo", 16)), method=recorder)
    distilling.train(name="boxes", **settings(data, tmp_path, epochs=1, imgsz=160))
    seen = torch.cat([boxes[:, 1:] for _, _, boxes in recorder.calls])
    # Images of 160 × 96 are letterboxed into 160 × 160: 32 pixels lower.
    expected = torch.cat([target["boxes"] for _, target in BoxDataset(scenes, "train")])
    expected = expected + torch.tensor([0.0, 32, 0, 32])
    assert len(seen) == len(expected) > 3
    order, other = seen.sum(1).argsort(), expected.sum(1).argsort()
    torch.testing.assert_close(seen[order], expected[other], atol=0.5, rtol=0)
    expert, apprentice, _ = recorder.calls[0]
    assert [tuple(m.shape[1:]) for m in apprentice.values()] == [(8, 20, 20), (16, 10, 10), (16, 5, 5)]
    assert [tuple(m.shape[1:]) for m in expert.values()] == [(16, 20, 20), (32, 10, 10), (32, 5, 5)]
    assert all(m.requires_grad for m in apprentice.values()) and not any(m.requires_grad for m in expert.values())


class Killed(Exception):
    pass


def test_resumes_with_adapters_and_measured_weights(data: Path, tmp_path: Path) -> None:
    def start(model: Any) -> DistilledTraining:
        return distill(model, YOLO(network(tmp_path, "yolo", 16)), weight="auto:0.2", normalize=True)

    torch.manual_seed(0)
    first = start(YOLO(network(tmp_path, "yolo", 8)))
    saved: dict[str, Any] = {}

    def kill(trainer: Any) -> None:
        if trainer.epoch == 1:
            saved.update({name: value.clone() for name, value in trainer.distiller.state_dict().items()})
            raise Killed

    first.add_callback("on_fit_epoch_end", kill)
    arguments = settings(data, tmp_path, epochs=4)
    with pytest.raises(Killed):
        first.train(name="run", **arguments)
    last = tmp_path / "run" / "weights" / "last.pt"
    checkpoint = torch.load(last, weights_only=False)
    assert not any(m._forward_pre_hooks for m in checkpoint["ema"].modules())
    second = start(YOLO(last))
    resumed: dict[str, Any] = {}
    moments: list[Any] = []

    def begin(trainer: Any) -> None:
        resumed.update({name: value.clone() for name, value in trainer.distiller.state_dict().items()})
        moments.extend(trainer.optimizer.state[p]["exp_avg"] for p in trainer.distiller.parameters())

    second.add_callback("on_train_start", begin)
    second.train(resume=True)
    assert set(saved) == set(resumed) and len(saved) == 7
    assert all(torch.equal(saved[name], resumed[name]) for name in saved)
    assert len(moments) == 6 and all(m.abs().sum() > 0 for m in moments)
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert any(not torch.equal(resumed[name], value) for name, value in second.trainer.distiller.state_dict().items())


def test_mixed_precision(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU ultralytics refuses AMP, so autocast is put in its place: the same calls as on a GPU."""
    from ultralytics.engine import trainer

    monkeypatch.setattr(trainer, "autocast", lambda *_, **__: torch.autocast("cpu", torch.bfloat16))
    recorder = Recorder()
    apprentice_file, expert_model = network(tmp_path, "yolo", 8), YOLO(network(tmp_path, "yolo", 16))
    distill(YOLO(apprentice_file), expert_model, method=recorder).train(
        name="types", **settings(data, tmp_path, epochs=1)
    )
    assert next(iter(recorder.calls[0][1].values())).dtype == torch.bfloat16
    distill(YOLO(apprentice_file), expert_model, weight=1.0).train(name="amp", **settings(data, tmp_path))
    assert all(0 < row["train/distill_loss"] < 1e4 for row in rows(tmp_path / "amp"))


def test_the_ema_and_copies_made_while_training_are_plain(data: Path, tmp_path: Path) -> None:
    import copy

    sizes: list[int] = []

    def look(trainer: Any) -> None:
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in trainer.ema.ema.modules())
        assert "loss" not in vars(trainer.ema.ema)
        assert "loss" in vars(trainer.model)
        sizes.append(len(pickle.dumps(trainer.ema.ema)))

    def recover(trainer: Any) -> None:
        """Copy the network as recovery from NaN does."""
        assert "loss" not in vars(trainer.model)
        copied = copy.deepcopy(trainer.model)
        assert b"rakd" not in pickle.dumps(copied).replace(bytes(str(data), "utf-8"), b"")

    distilling = distill(YOLO(network(tmp_path, "yolo", 8)), YOLO(network(tmp_path, "yolo", 32)))
    distilling.add_callback("on_train_batch_end", look)
    distilling.add_callback("on_train_epoch_end", recover)
    distilling.train(name="ema", **settings(data, tmp_path))
    assert len(sizes) == 4
    assert "loss" not in vars(distilling.trainer.model)


def test_a_cache_saves_the_experts_forward(data: Path, tmp_path: Path) -> None:
    from rakd.distill import FeatureCache

    cache = FeatureCache()
    distilling = distill(
        YOLO(network(tmp_path, "yolo", 8)),
        YOLO(network(tmp_path, "yolo", 16)),
        cache=cache,
        keys=lambda batch: [str(name) for name in batch["im_file"]],
    )
    distilling.train(name="cache", **settings(data, tmp_path, epochs=3))
    assert (cache.misses, cache.hits) == (8, 16)


def test_its_trainer_can_be_pickled_for_other_processes(data: Path, tmp_path: Path) -> None:
    """As a multi-GPU run is started: class, settings and expert go through a file into a fresh process."""
    cloudpickle = pytest.importorskip("cloudpickle")
    base = YOLO(network(tmp_path, "yolo", 8))
    distilling = distill(base, YOLO(network(tmp_path, "yolo", 16)), weight=0.5)
    made: dict[str, Any] = {}

    class Stop(Exception):
        pass

    class Catch(base.task_map["detect"]["trainer"]):
        def train(self) -> None:
            made["trainer"] = self
            raise Stop

    with pytest.raises(Stop):
        distilling.train(trainer=Catch, name="file", **settings(data, tmp_path, epochs=1))
    # Catch belongs to this test; the processes get the class made from the task's own trainer.
    plain = type("Distilling", (type(made["trainer"]).__mro__[1], base.task_map["detect"]["trainer"]), {})
    plain.distill_settings, plain.distill_keys = type(made["trainer"]).distill_settings, None
    path = tmp_path / "state.pt"
    state = {"trainer": plain, "args": vars(made["trainer"].args), "model": made["trainer"].model}
    torch.save(state, path, pickle_module=cloudpickle)
    code = (
        "import torch\n"
        f"state = torch.load({str(path)!r}, weights_only=False)\n"
        "trainer = state['trainer'](overrides={k: v for k, v in state['args'].items() if k != 'save_dir'})\n"
        "trainer.train(); print('levels', len(trainer.distiller.strides))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "levels 3" in done.stdout, done.stdout[-500:] + done.stderr


def test_wrong_arguments(tmp_path: Path) -> None:
    model = YOLO(network(tmp_path, "yolo", 8))
    with pytest.raises(TypeError, match="model: expected a YOLO or RTDETR of ultralytics, got Linear"):
        distill(nn.Linear(1, 1), model)
    with pytest.raises(
        TypeError, match="box_format: expected none, as network and boxes are the trainer's, got 'xyxy'"
    ):
        distill(model, model, box_format="xyxy")
    with pytest.raises(NotImplementedError, match="tune: ultralytics tunes without distillation"):
        distill(model, model).tune()
    model.task = "obb"
    with pytest.raises(ValueError, match="model: expected the task detect, segment, pose, got 'obb'"):
        distill(model, model)
    with pytest.raises(TypeError, match="expected a network of ultralytics with a detection head, got Linear"):
        head_inputs(nn.Linear(1, 1))
    for name, value in (("compile", "default"), ("distill_model", network(tmp_path, "yolo", 16))):
        trainer = type("Named", (), {})()
        trainer.args = type("Args", (), {"compile": False, "distill_model": None, name: value})()
        with pytest.raises(ValueError, match=f"{name}: expected"):
            _Distilling.resume_training(trainer, None)


def test_other_attributes_are_the_models() -> None:
    model = YOLO("yolo11n.yaml")
    distilling = distill(model, YOLO("yolo11n.yaml"))
    assert distilling.task == "detect"
    assert distilling.names == model.names
    assert len(distilling(torch.zeros(1, 3, 64, 64), verbose=False)) == 1
    assert pickle.loads is not None and not hasattr(distilling, "no_such_attribute")


def test_two_processes_stay_alike(data: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent / "ultralytics_processes.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    done = subprocess.run([*launch, script, data, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert len(first["adapters"]) == 7
    for part in ("adapters", "model"):
        trained = [name for name in first[part] if "running" not in name and "num_batches" not in name]
        assert all(torch.equal(first[part][name], second[part][name]) for name in trained)
    # The adapters have learnt: their biases do not stay what they were, which are drawn by the distiller's seed.
    assert any(row["train/distill_loss"] > 0 for row in rows(tmp_path / "run"))
