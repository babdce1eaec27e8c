"""Options of an experiment: starting from files, extending, validating, keeping the expert's features."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

# Fixtures are found by their names here; the finished experiment is made anew for this file.
from test_study_run import CPU, TRAINING, Finished, bare, detectors, finished, settings  # noqa: F401

from rakd.checkpoints import load_checkpoint, load_weights
from rakd.commands.distill import method_options
from rakd.distill.cache import FeatureCache
from rakd.distill.distiller import Distiller
from rakd.study import experiment
from rakd.study.experiment import Experiment
from rakd.study.plan import make_plan
from rakd.study.results import read_run
from rakd.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("bare")


def steps_of(run: Path) -> list[int]:
    return [int(line.split(",")[0]) for line in (run / "log.csv").read_text().splitlines()[1:]]


def same(a: Path, b: Path) -> bool:
    ours, theirs = (load_weights(path / "detector.pt")[0] for path in (a, b))
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def run(scenes: Path, out: Path, changes: dict[str, Any] | None = None, **options: Any) -> Any:
    return Experiment(settings(**(changes or {})), scenes, out, CPU, quiet=True, **options).run()


def test_apprentices_are_extended_and_their_expert_is_not(finished: Finished, scenes: Path, tmp_path: Path) -> None:  # noqa: F811
    out = shutil.copytree(finished.out, tmp_path / "run")
    longer = {"training": replace(TRAINING, steps=4)}
    with pytest.raises(ValueError, match=r"settings\.steps is 2 there and 4 here; choose another folder or extend it"):
        run(scenes, out, longer)
    result = run(scenes, out, longer, extend=True)
    for name in ("none-seed0", "rakd-seed0"):
        assert steps_of(out / name) == [1, 2, 3, 4]
        assert load_checkpoint(out / name / "checkpoint.pt")["fingerprint"]["extended_from"] == [2]
        assert not same(out / name, finished.out / name)
        # It is evaluated anew, and figures are those of its end.
        now, before = (read_run(folder / name / "result.json") for folder in (out, finished.out))
        assert now.seconds is not None and before.seconds is not None and now.seconds > before.seconds
        assert now.losses != before.losses
    assert same(out / "expert-seed0", finished.out / "expert-seed0") and steps_of(out / "expert-seed0") == [1, 2, 3]
    assert [each.method for each in result.runs] == ["expert", "none", "rakd"]
    other = {**longer, "expert_training": replace(TRAINING, steps=5)}
    for extend in (True, False):
        # It is not extended, so that is not proposed.
        with pytest.raises(ValueError, match=r"expert-seed0 .*steps is 3 there and 5 here; choose another folder$"):
            run(scenes, out, other, extend=extend)
    shutil.rmtree(out / "expert-seed0")
    with pytest.raises(ValueError, match=r"rakd-seed0 holds a run taught by an expert that is gone, expert-seed0"):
        run(scenes, out, other)
    assert not (out / "expert-seed0").exists()


def test_runs_of_a_plan_start_from_a_file_or_from_the_runs_of_their_names(tmp_path: Path) -> None:
    file = tmp_path / "detector.pt"
    assert [each.init for each in make_plan(settings(), file)] == [None, file, file]
    names = ["expert-seed0", "none-seed0", "rakd-seed0"]
    assert [each.init for each in make_plan(settings(), tmp_path)] == [tmp_path / n / "detector.pt" for n in names]
    assert [each.init for each in make_plan(settings())] == [None] * 3


def test_apprentices_start_from_a_file(finished: Finished, scenes: Path, tmp_path: Path) -> None:  # noqa: F811
    file = finished.out / "none-seed0" / "detector.pt"
    run(scenes, tmp_path, init=file, expert=finished.out / "expert-seed0" / "detector.pt")
    logs = [(out / "none-seed0" / "log.csv").read_text().splitlines() for out in (tmp_path, finished.out)]
    assert logs[0][0] == logs[1][0] and logs[0][1].split(",")[2:5] != logs[1][1].split(",")[2:5]
    with pytest.raises(ValueError, match=r"init is .* there and absent here"):
        run(scenes, tmp_path, expert=finished.out / "expert-seed0" / "detector.pt")
    # A detector of other channels does not fit.
    wrong = r"does not fit the detector: shape of .*bbox_pred\.weight is \[12, 24, .* and \d+ more"
    with pytest.raises(ValueError, match=wrong):
        run(scenes, tmp_path / "wrong", init=finished.out / "expert-seed0" / "detector.pt")


def test_each_run_starts_from_the_run_of_its_name(finished: Finished, scenes: Path, tmp_path: Path) -> None:  # noqa: F811
    still = replace(TRAINING, steps=1, learning_rate=1e-12)
    run(scenes, tmp_path, {"training": still, "expert_training": still}, init=finished.out)
    for name in ("expert-seed0", "none-seed0", "rakd-seed0"):
        ours, theirs = (load_weights(out / name / "detector.pt")[0] for out in (tmp_path, finished.out))
        for key, value in theirs.items():
            if "running" not in key and "num_batches" not in key:
                torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-8)
    with pytest.raises(FileNotFoundError, match=r"expert-seed7.detector\.pt is not there: expected a detector"):
        run(scenes, tmp_path / "more", {"seeds": (7,)}, init=finished.out)


def test_every_run_is_validated(finished: Finished, scenes: Path, tmp_path: Path) -> None:  # noqa: F811
    out = shutil.copytree(finished.out, tmp_path / "run")
    shutil.rmtree(out / "none-seed0")
    run(scenes, out, {"training": replace(TRAINING, validate_every=1)})
    assert load_weights(out / "none-seed0" / "best.pt")[0].keys()
    figures = load_checkpoint(out / "none-seed0" / "checkpoint.pt")["log"]["validations"]
    assert [row["step"] for row in figures] == [1, 2]
    assert same(out / "none-seed0", finished.out / "none-seed0")  # validation changes nothing
    assert (out / "rakd-seed0" / "best.pt").exists()  # though it had been finished
    assert same(out / "rakd-seed0", finished.out / "rakd-seed0")


def test_a_weight_that_is_a_share_of_the_task_loss(
    finished: Finished,  # noqa: F811
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expert = finished.out / "expert-seed0" / "detector.pt"
    training = replace(TRAINING, steps=4, checkpoint_every=1)
    changes = {"methods": ("rakd",), "weights": {"rakd": "auto:10"}, "training": training}
    run(scenes, tmp_path / "whole", changes, expert=expert)
    with (tmp_path / "whole" / "rakd-seed0" / "log.csv").open() as file:
        first = next(csv.DictReader(file))
    total, distillation = float(first["total"]), float(first["distillation"])
    assert distillation == pytest.approx(10 * (total - distillation), rel=1e-5)
    # What was measured is in the checkpoint: a stopped run goes on to the same bits.
    original = Trainer._step

    def stopped(self: Trainer, batch: Any) -> Any:
        if self.step == 2:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(scenes, tmp_path / "again", changes, expert=expert)
    assert not (tmp_path / "again" / "rakd-seed0" / "result.json").exists()
    run(scenes, tmp_path / "again", changes, expert=expert)
    assert same(tmp_path / "again" / "rakd-seed0", tmp_path / "whole" / "rakd-seed0")


def test_kept_features_change_nothing_but_rounding(
    finished: Finished,  # noqa: F811
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    fresh: list[int] = []
    original = Distiller.expert_features
    get = FeatureCache.get

    def noted(self: Distiller, images: Any, keys: Any = None) -> Any:
        asked.extend(keys or ())
        return original(self, images, keys)

    def counted(self: FeatureCache, images: Any, keys: Any, fingerprint: str, run: Any) -> Any:
        def running(images: Any) -> Any:
            fresh.append(len(images))
            return run(images)

        return get(self, images, keys, fingerprint, running)

    monkeypatch.setattr(Distiller, "expert_features", noted)
    monkeypatch.setattr(FeatureCache, "get", counted)
    expert = finished.out / "expert-seed0" / "detector.pt"
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    changes = {"methods": ("rakd",), "photometric": 0.0, "training": replace(TRAINING, steps=6)}
    run(scenes, plain, changes, expert=expert)
    assert asked == []
    run(scenes, kept, changes, expert=expert, cache_bytes=2**26)
    # 12 images of 8 frames: each is computed once for each way that it was turned, some are seen again as they were.
    assert len(asked) == 12 and fresh == [1] * len(set(asked))
    assert 8 < len(set(asked)) < 12
    assert len(list((kept / "features").glob("*.pt"))) == len(set(asked))
    losses = [read_run(out / "rakd-seed0" / "result.json").losses for out in (plain, kept)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    # With all features there, the same bits come out; so an interrupted run goes on to them, too.
    done = kept / "rakd-seed0"
    shutil.move(done, tmp_path / "before")
    fresh.clear()
    run(scenes, kept, changes, expert=expert, cache_bytes=2**26)
    assert fresh == [] and same(done, tmp_path / "before")
    # Rounding aside it is the same, but a run goes on as it began.
    with pytest.raises(ValueError, match="feature_cache is True there and absent here"):
        run(scenes, kept, changes, expert=expert)
    with pytest.raises(ValueError, match=r"mirroring alone varies \(photometric 0\).*got photometric 0\.5"):
        run(scenes, tmp_path / "not", {"methods": ("rakd",)}, expert=expert, cache_bytes=2**26)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"options": {"rakd": {"sigma": 0.5, "output_size": [3, 5]}}},
            r"method_options\.sigma is absent there and 0\.5 here",
        ),
        ({"rescale": True}, "rescale is absent there and True here"),
        ({"rescale": "both"}, "rescale is absent there and 'both' here"),
    ],
    ids=["arguments", "rescaled maps", "both networks' maps rescaled"],
)
def test_what_changes_a_method_changes_its_training_alone(
    changes: dict[str, Any],
    message: str,
    finished: Finished,  # noqa: F811
    scenes: Path,
    tmp_path: Path,
) -> None:
    out = shutil.copytree(finished.out, tmp_path / "run")
    with pytest.raises(ValueError, match=rf"rakd-seed0 holds .*{message}"):
        run(scenes, out, changes)
    shutil.rmtree(out / "rakd-seed0")
    result = run(scenes, out, changes)
    assert same(out / "none-seed0", finished.out / "none-seed0")
    assert not same(out / "rakd-seed0", finished.out / "rakd-seed0")
    for name, value in changes.items():
        assert result.config[name] == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rakd": {"sigm": 1.0}}, "options of rakd: sigm: RAKD takes no such option; it takes .*sigma"),
        ({"rakd": {"sigma": -1.0}}, "options of rakd: sigma: expected"),
        ({"rakd": {"assignment": "hard"}}, "options of rakd: assignment: RAKD takes no such option"),
        ({"rkad": {"sigma": 1.0}}, "options of rkad: name: expected one of 'pkd'"),
    ],
)
def test_wrong_arguments_of_methods_are_refused_first(
    options: dict[str, Any], message: str, scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(scenes, tmp_path, {"options": options})
    assert not list(tmp_path.iterdir())


def test_the_command_reads_arguments_of_methods() -> None:
    given = ("rakd.sigma=1", "rakd.sigma=0.5", "hfa.output_size=[7, 19]", "mgd.backend=auto")
    assert method_options(given) == {
        "rakd": {"sigma": 0.5},
        "hfa": {"output_size": [7, 19]},
        "mgd": {"backend": "auto"},
    }
    for text in ("rakd", "rakd.sigma", "rakd.=1", "none.sigma=1", "sigma=1", "rakd.sigma="):
        with pytest.raises(ValueError, match=r"--option: expected METHOD\.NAME=VALUE with one of pkd, "):
            method_options((text,))


def test_jobs_of_several_seeds_learn_from_one_expert(
    finished: Finished,  # noqa: F811
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"expert": finished.out / "expert-seed0" / "detector.pt"}
    changes = {"seeds": (0, 1), "methods": ("rakd",)}
    in_turn = run(scenes, tmp_path / "in turn", changes, **options)
    asked: dict[str, str | None] = {}

    def do_here(work: Any, tasks: dict[str, Any], jobs: int, say: Any, after: dict[str, str]) -> None:
        asked.update({name: after.get(name) for name in tasks})
        for arguments in tasks.values():
            work(0, *arguments)

    monkeypatch.setattr(experiment, "run_side_by_side", do_here)  # processes would take seconds to start
    at_once = run(scenes, tmp_path / "at once", changes, jobs=2, **options)
    assert asked == {"expert": None, "rakd-seed0": "expert", "rakd-seed1": "expert"}
    assert [(each.method, each.seed) for each in at_once.runs] == [("expert", 0), ("rakd", 0), ("rakd", 1)]
    for name in ("expert", "rakd-seed0", "rakd-seed1"):
        assert same(tmp_path / "at once" / name, tmp_path / "in turn" / name)
    assert same(tmp_path / "at once" / "expert", finished.out / "expert-seed0")
    assert same(tmp_path / "at once" / "rakd-seed0", finished.out / "rakd-seed0")
    for ours, theirs in zip(at_once.runs, in_turn.runs, strict=True):
        assert ours.precisions == theirs.precisions and ours.losses == theirs.losses
