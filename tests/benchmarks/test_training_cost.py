"""The cost of distillation in a training step: equal work, agreeing terms, rows. No time is asserted."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import results, training_cost
from benchmarks.implementations import DisagreementError
from benchmarks.results import read_rows, write_rows
from benchmarks.timing import Timing, compare
from benchmarks.training_cost import ALONE, EXPERT, TORCHVISION, Pair, StepRow, Steps, parse
from rakd_ops import available_backends

MICRO = Pair("tiny-expert", "tiny", 1, "sgd")
BACKENDS = tuple(name for name in ("cpu", "reference") if available_backends()[name] is True)


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps(MICRO, "cpu", seed=0)


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_step_does_the_same_work(steps: Steps) -> None:
    terms = steps.terms(BACKENDS)
    assert list(terms) == [ALONE, EXPERT, *(f"rakd:{name}" for name in BACKENDS), TORCHVISION]
    before = [parameter.detach().clone() for parameter in steps.apprentice.parameters()]
    losses = {name: steps.run(term) for name, term in terms.items()}
    assert losses[ALONE] == losses[EXPERT] == steps.run(terms[ALONE])  # to the bit: same weights, same draws
    assert losses[TORCHVISION] > losses[ALONE]
    for name in BACKENDS:
        assert losses[f"rakd:{name}"] == pytest.approx(losses[TORCHVISION], rel=1e-5)
    assert all(map(torch.equal, before, steps.apprentice.parameters()))
    # The optimiser has worked: there is momentum from this step's gradients.
    assert all(state["momentum_buffer"].any() for state in steps.optimizer.state.values() if state)


def test_boxes_are_as_many_as_the_losses_may_draw(steps: Steps) -> None:
    heads = steps.apprentice.config.heads
    assert [len(rows) for rows in steps.boxes] == [int(heads.sampled * heads.positive_share)]
    assert steps.workload.boxes == len(steps.boxes[0])
    assert list(steps.images.shape) == [1, 3, steps.workload.height, steps.workload.width]


def test_terms_that_disagree_are_not_timed(steps: Steps) -> None:
    terms = steps.terms(BACKENDS[:1])
    steps.check(terms)
    first = terms[f"rakd:{BACKENDS[0]}"]
    with pytest.raises(DisagreementError, match=r"wrong and .* disagree"):
        steps.check({"right": first, "wrong": lambda features: 1.01 * first(features)})


def test_norm_that_is_kept_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    config = training_cost.DETECTORS["tiny"]
    frozen = replace(config, backbone=replace(config.backbone, frozen_norm=True))
    monkeypatch.setitem(training_cost.DETECTORS, "tiny", frozen)
    pyramid = Steps(MICRO, "cpu", seed=0).apprentice.pyramid
    norms = [module for module in pyramid.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert not norm.training
        assert not norm.weight.requires_grad


def test_rounds_are_compared_one_by_one() -> None:
    base = Timing(0.0, 0.0, 0.0, (100.0, 1000.0, 100.0))
    slower = Timing(0.0, 0.0, 0.0, (103.0, 1030.0, 103.0))
    ratio = compare(slower, base)
    assert (ratio.p20, ratio.median, ratio.p80) == pytest.approx((1.03, 1.03, 1.03))


def test_rows_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training_cost.PAIRS, "tiny", MICRO)
    rows = training_cost.measure(parse(["--repeats", "2"]), "cpu", BACKENDS[:1])
    assert [row.implementation for row in rows] == [ALONE, EXPERT, f"rakd:{BACKENDS[0]}", TORCHVISION]
    for row in rows:
        assert row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.repeats == 2
        assert row.ratio == pytest.approx(row.median_ms / rows[0].median_ms)
        assert (row.share is None) == (row.implementation in (ALONE, EXPERT))
    path = tmp_path / "steps.csv"
    write_rows(path, StepRow, rows)
    again = read_rows(path, StepRow)
    assert [row.implementation for row in again] == [row.implementation for row in rows]
    assert [row.share is None for row in again] == [row.share is None for row in rows]
    assert again[-1].share == pytest.approx(rows[-1].share, rel=1e-5)

    table = training_cost.format_rows(rows)
    assert "tiny learns from tiny-expert, 1 images 128×448, 16 boxes" in table
    assert len(table.splitlines()) == 2 + len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "giant"], "pair: invalid choice: 'giant' .*kitti"),
        (["--backends", "magic"], "backends: expected some of .*, got 'magic'"),
        (["--repeats", "0"], "repeats: expected a whole number of at least 1, got 0"),
        (["--seed", "-1"], "seed: expected a whole number of at least 0, got -1"),
        (["--threads", "-1"], "threads: expected a whole number of at least 0, got -1"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training_cost", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        results.exit_with_errors(training_cost.main)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.match(f"error: {message}", printed.err)
