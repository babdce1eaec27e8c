"""What the trainer is made of: settings, order of frames, learning rate, log, files."""

from __future__ import annotations

import csv
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rakd.checkpoints import config_diff, load_checkpoint, load_weights, save_checkpoint, save_weights
from rakd.distributed import start_processes
from rakd.training.log import Log
from rakd.training.optim import learning_rate, make_optimizer
from rakd.training.order import InfiniteShuffle, StepSampler, image_seeds, process_seed
from rakd.training.settings import TrainSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("checkpoint_every", 0),
        ("log_every", -1),
        ("warm_up", -1),
        ("workers", -1),
        ("seed", -1),
        ("seed", 2**63),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("clip", 0.0),
        ("milestones", (0.5, 0.5)),
        ("milestones", (0.5, 1.0)),
        ("optimizer", "adam"),
        ("schedule", "linear"),
        ("amp", "fp16"),
    ],
)
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must .* got"):
        TrainSettings(**{name: value})


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 5))
def test_every_epoch_holds_every_frame_once(count: int, seed: int, epoch: int) -> None:
    order = InfiniteShuffle(count, seed)
    draws = [order.draw(position) for position in range(epoch * count, (epoch + 1) * count)]
    assert sorted(draw.frame for draw in draws) == list(range(count))
    assert {draw.epoch for draw in draws} == {epoch}


def test_order_is_shuffled_by_epoch_and_seed() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        order = InfiniteShuffle(50, seed)
        return [order.draw(position).frame for position in range(50 * number, 50 * number + 50)]

    assert len({tuple(epoch(number, seed)) for number in range(3) for seed in range(3)}) == 9
    assert epoch(2, 1) == epoch(2, 1) != list(range(50))
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        InfiniteShuffle(0, 0)


@given(st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 10))
def test_processes_share_the_batches_of_one(count: int, processes: int, start: int) -> None:
    batch, steps, share = 12, range(start, start + 3), 12 // processes
    whole = list(StepSampler(InfiniteShuffle(count, 7), steps, batch, range(batch)))
    parts = [
        list(StepSampler(InfiniteShuffle(count, 7), steps, batch, range(rank * share, (rank + 1) * share)))
        for rank in range(processes)
    ]
    assert [list(chain(*rows)) for rows in zip(*parts, strict=True)] == whole


def test_seeds() -> None:
    whole = image_seeds(3, 100, range(8))
    assert whole == [*image_seeds(3, 100, range(4)), *image_seeds(3, 100, range(4, 8))]
    others = [image_seeds(4, 100, range(8)), image_seeds(3, 101, range(8))]
    others += [[process_seed(3, 100, rank)] for rank in range(8)]
    everything = [*whole, *chain(*others)]
    assert len(set(everything)) == len(everything)
    assert all(0 <= seed < 2**63 for seed in everything)
    torch.Generator().manual_seed(max(everything))


def test_learning_rate() -> None:
    steps = TrainSettings(steps=90, learning_rate=2.0, warm_up=3)
    rates = [learning_rate(steps, step) for step in range(90)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[59:61] == pytest.approx([2.0, 0.2])
    assert rates[79:81] == pytest.approx([0.2, 0.02])
    cosine = TrainSettings(steps=100, learning_rate=2.0, warm_up=0, schedule="cosine")
    assert [learning_rate(cosine, step) for step in (0, 50)] == pytest.approx([2.0, 1.0])
    assert 0 < learning_rate(cosine, 99) < 0.001


def test_optimizer_decays_weights_but_neither_norms_nor_biases() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    network[0].weight.requires_grad_(False)
    optimizer = make_optimizer(network, TrainSettings(weight_decay=0.5))
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0
    assert [id(p) for p in decayed["params"]] == [id(network[2].weight)]
    expected = {id(p) for p in (network[0].bias, network[1].weight, network[1].bias, network[2].bias)}
    assert {id(p) for p in others["params"]} == expected
    assert optimizer.defaults["momentum"] == 0.9
    assert isinstance(make_optimizer(network, TrainSettings(optimizer="adamw")), torch.optim.AdamW)
    with pytest.raises(ValueError, match="model must have a parameter with requires_grad"):
        make_optimizer(network.requires_grad_(False), TrainSettings())


def test_the_best_validation_is_never_nan() -> None:
    log = Log(every=1, batch_size=1)
    values = [float("nan"), 5.0, 3.0, float("nan"), 5.0, 10.0]
    assert [log.add_validation(step, "ap", value) for step, value in enumerate(values)] == [
        False, True, False, False, True, True,
    ]  # fmt: skip


def test_log_rows_are_means(tmp_path: Path) -> None:
    log = Log(every=2, batch_size=8)
    log.write(tmp_path / "log.csv")
    assert not (tmp_path / "log.csv").exists()
    values = [(4.0, 1.0), (2.0, float("inf")), (1.0, float("inf"))]
    for step, (loss, norm) in enumerate(values, start=1):
        log.add(step, 0.1 * step, {"a": loss, "b": 1.0}, norm, 0.5, last=step == 3)
        if step == 1:  # a log restored between two rows goes on
            state = log.state_dict()
            log = Log(every=2, batch_size=8)
            log.load_state_dict(state)
    assert [row["step"] for row in log.rows] == [2, 3]
    first, second = log.rows
    assert (first["a"], first["b"], first["total"], first["lr"]) == (3.0, 1.0, 4.0, 0.2)
    assert (first["grad_norm"], second["grad_norm"]) == (1.0, float("inf"))
    assert (first["seconds"], second["seconds"], first["images_per_second"]) == (1.0, 1.5, 16.0)
    log.write(tmp_path / "log.csv")
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == [
        pytest.approx(row, rel=1e-7) for row in log.rows
    ]
    assert rows[0]["step"] == "2"


def test_weights_come_back(tmp_path: Path) -> None:
    state = {
        "a": torch.arange(1000.0)[:2],
        "b": nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "c": torch.tensor(3),
    }
    path = tmp_path / "new" / "model.pt"
    save_weights(path, state, {"name": "toy", "sizes": (1, 2)})
    loaded, config = load_weights(path)
    assert config == {"name": "toy", "sizes": [1, 2]}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].dtype == state[name].dtype for name in state)
    assert path.stat().st_size < 3500  # not the 1000 numbers that "a" is a part of
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]


def test_config_must_be_plain(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"config must hold numbers, text, lists and dicts only: .*Tensor"):
        save_weights(tmp_path / "model.pt", {}, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="config must hold finite numbers"):
        save_weights(tmp_path / "model.pt", {}, {"a": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut short", b"\x80\x02}q\x00."])
def test_files_that_are_no_weights(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt: expected"):
        load_weights(tmp_path / "model.pt")


def test_other_torch_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.pt is not there: expected a file of weights"):
        load_weights(tmp_path / "model.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="expected the format 'rakd weights 1', got None"):
        load_weights(tmp_path / "model.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "model.pt")  # would run code on loading
    with pytest.raises(ValueError, match="holds other things than tensors and text"):
        load_weights(tmp_path / "model.pt")
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 3})
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    with pytest.raises(ValueError, match="got 'rakd checkpoint 1'"):
        load_weights(tmp_path / "checkpoint.pt")


def test_a_file_cut_short_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_weights(path, {"a": torch.rand(1000)}, {})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="of another kind, or cut off"):
        load_weights(path)


def test_differences() -> None:
    there = {"settings": {"steps": 4, "clip": None}, "data": {}, "old": 1}
    here = {"settings": {"steps": 8, "clip": None}, "data": {"digest": "a"}, "old": 1}
    assert config_diff(there, there) == []
    assert config_diff(there, here) == [
        "data.digest is absent there and 'a' here",
        "settings.steps is 4 there and 8 here",
    ]


def test_processes_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with start_processes("cpu") as processes:
        assert (processes.rank, processes.count, processes.is_main, processes.device.type) == (0, 1, True, "cpu")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(ValueError, match="WORLD_SIZE must be set to a number by torchrun, got ''"),
        start_processes("cpu"),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="torch finds no CUDA device"), start_processes("cuda"):
        pass
