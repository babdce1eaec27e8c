"""A comparison in miniature: it trains, evaluates, reports, goes on where it stopped, takes no other's results."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rakd.checkpoints import load_weights
from rakd.cli import main
from rakd.detector import export
from rakd.detector.configs import DETECTORS, DetectorConfig
from rakd.detector.detector import Detector
from rakd.distributed import Processes
from rakd.files import without_nan
from rakd.study import experiment as module
from rakd.study import runner
from rakd.study.experiment import Experiment
from rakd.study.results import StudyResult, read_run, read_study, write_run
from rakd.study.runner import Runner
from rakd.study.settings import StudySettings
from rakd.study.versions import source_commit
from rakd.training.settings import TrainSettings
from rakd.training.trainer import Trainer

CPU = Processes(torch.device("cpu"))
TRAINING = TrainSettings(steps=2, batch_size=2, learning_rate=1e-3, optimizer="adamw", warm_up=0, log_every=1)


@pytest.fixture(scope="module", autouse=True)
def detectors(small_config: DetectorConfig) -> Iterator[None]:
    """Detectors for the scenes' proportions, under names of their own."""
    apprentice = replace(small_config, width=224)
    expert = replace(apprentice, backbone=replace(apprentice.backbone, channels=24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DETECTORS, "mini", apprentice)
        patch.setitem(DETECTORS, "mini-expert", expert)
        patch.setitem(DETECTORS, "mini-tall", replace(expert, height=128, width=448))
        patch.setitem(DETECTORS, "mini-narrow", replace(expert, height=96, width=320))
        yield


def settings(**options: Any) -> StudySettings:
    given = {
        "expert": "mini-expert",
        "apprentice": "mini",
        "expert_training": replace(TRAINING, steps=3),
        "training": TRAINING,
        "weights": {"rakd": 1.0, "pkd": 2.0, "semckd": 1.0},
        "methods": ("none", "rakd"),
        **options,
    }
    return StudySettings(**given)


@dataclass
class Finished:
    """A study that is done: what it gave, its folder, and the expert as training left it."""

    result: StudyResult
    out: Path
    expert: dict[str, Tensor]


@pytest.fixture(scope="module")
def finished(detectors: None, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("study") / "run"
    with pytest.MonkeyPatch.context() as patch:
        experts: list[Detector] = []
        original = Runner.train

        def noted(self: Runner, run: Any, detector: Detector, expert: Detector | None) -> Any:
            experts.extend([] if expert is None else [expert])
            return original(self, run, detector, expert)

        patch.setattr(Runner, "train", noted)
        result = Experiment(settings(), scenes, out, CPU, quiet=True).run()
    (expert,) = experts  # of RAKD; nobody teaches the apprentice alone
    return Finished(result, out, expert.state_dict())


def figures(result: StudyResult) -> Any:
    """What a study found, without what a clock said."""
    return [without_nan(asdict(run)) for run in result.runs], result.config, result.seeds, result.data


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError("this has been done before")

    monkeypatch.setattr(Trainer, "_step", refused)
    monkeypatch.setattr(runner, "write_detections", refused)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of the time: pictures and timing."""
    monkeypatch.setattr(module, "write_report", lambda *arguments: None)
    monkeypatch.setattr(Experiment, "_draw_frames", lambda self: None)
    monkeypatch.setattr(Experiment, "_models", lambda self: ())


def test_a_study_writes_all_there_is(finished: Finished, scenes: Path) -> None:
    result, out = finished.result, finished.out
    assert [(run.method, run.seed) for run in result.runs] == [("expert", 0), ("none", 0), ("rakd", 0)]
    assert [run.losses.keys() >= {"objectness", "distance"} for run in result.runs] == [True] * 3
    assert ["distillation" in run.losses for run in result.runs] == [False, False, True]
    assert all(run.seconds is not None and run.seconds > 0 for run in result.runs)
    assert all(set(run.precisions) == {"official", "loose"} for run in result.runs)
    assert result.data == "small: 8 frames of train to learn from, 2 of val to evaluate on"
    assert result.versions["torch"] == torch.__version__
    assert result.config["apprentice"] == "mini"
    expert, apprentice = result.models
    assert (expert.name, apprentice.name) == ("expert", "apprentice")
    assert expert.parameters is not None and apprentice.parameters is not None
    assert expert.parameters > apprentice.parameters
    assert read_study(out / "study.json").to_json() == result.to_json()
    files = {"basis.json", "study.json", "tables.md", "tables.csv", "report.html"}
    files |= {"bars.png", "gains.png", "tradeoff.png", "sizes.png", "training.png", "frames.png"}
    assert {path.name for path in out.iterdir()} == files | {"expert-seed0", "none-seed0", "rakd-seed0"}
    for name in ("expert-seed0", "none-seed0", "rakd-seed0"):
        inside = {path.name for path in (out / name).iterdir()}
        every = {"checkpoint.pt", "log.csv", "log.jsonl", "detector.pt", "detections", "result.json", "settings.json"}
        assert inside == every | ({"expert.txt"} if name == "rakd-seed0" else set())
        frames = sorted(path.stem for path in (out / name / "detections").iterdir())
        assert frames == sorted((scenes / "ImageSets" / "val.txt").read_text().split())


def test_seeds_that_were_trained_unlike_are_told_by_compare(
    finished: Finished, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished.out, tmp_path / "run")
    for seed, steps in ((1, 2), (2, 1)):
        changed = settings(methods=("none",), seeds=(seed,), training=replace(TRAINING, steps=steps, warm_up=0))
        Experiment(changed, scenes, out, CPU, quiet=True).run()
        shutil.rmtree(out / f"expert-seed{seed}")
        assert main(["compare", str(out)]) == 0
        told = capsys.readouterr().err
        assert ("none: the runs that are averaged are no repetitions: steps 1 and 2" in told) == (steps == 1)


def test_latency_in_onnx_runtime_is_measured_where_it_can_be(
    finished: Finished,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The export itself has tests of its own, and takes long.
    class Exported:
        def __init__(self, path: Path, device: torch.device, *, needed: bool) -> None:
            assert device == CPU.device and needed
            self.detector = detectors.pop(path)
            self.config = self.detector.config

        def predict(self, *images: Any) -> Any:
            return self.detector.predict(*images)

    detectors: dict[Path, Detector] = {}
    monkeypatch.setattr(export, "export_onnx", lambda detector, path: detectors.update({path: detector}))
    monkeypatch.setattr(export, "OnnxDetector", Exported)
    out = shutil.copytree(finished.out, tmp_path / "run")
    forbid_work(monkeypatch)
    assert [model.onnx_ms for model in finished.result.models] == [None, None]
    models = Experiment(settings(), scenes, out, CPU, quiet=True, onnx=True).run().models
    assert not detectors
    assert all(model.onnx_ms is not None and model.onnx_ms > 0 for model in models)
    assert read_study(out / "study.json").models == models

    # An export that fails leaves the report as it is without.
    def refused(*arguments: Any) -> None:
        raise RuntimeError("there is no such operator")

    monkeypatch.setattr(export, "export_onnx", refused)
    monkeypatch.setattr(module, "write_report", lambda *arguments: None)
    monkeypatch.setattr(Experiment, "_draw_frames", lambda self: None)
    models = Experiment(settings(), scenes, out, CPU, onnx=True).run().models
    assert [model.onnx_ms for model in models] == [None, None]
    assert all(model.latency_ms is not None for model in models)
    assert "no latency in ONNX Runtime: there is no such operator" in capsys.readouterr().out


def test_the_expert_never_changes(finished: Finished) -> None:
    state, _ = load_weights(finished.out / "expert-seed0" / "detector.pt")  # written before the first apprentice
    assert state.keys() == finished.expert.keys()
    assert all(torch.equal(value, finished.expert[name]) for name, value in state.items())


def test_apprentices_of_a_seed_start_alike_and_learn_differently(finished: Finished) -> None:
    alone, taught = (load_weights(finished.out / f"{m}-seed0" / "detector.pt")[0] for m in ("none", "rakd"))
    assert alone.keys() == taught.keys()
    assert any(not torch.equal(value, taught[name]) for name, value in alone.items())
    logs = [(finished.out / f"{m}-seed0" / "log.csv").read_text().splitlines() for m in ("none", "rakd")]
    heads, first = ([log[i].split(",") for log in logs] for i in (0, 1))
    for name in ("objectness", "class", "distance"):
        # In the first step nothing but the distillation term tells them apart.
        assert first[0][heads[0].index(name)] == first[1][heads[1].index(name)]


def test_starting_again_does_nothing_again(
    bare: None, finished: Finished, scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid_work(monkeypatch)
    again = Experiment(settings(), scenes, finished.out, CPU).run()
    assert figures(again) == figures(finished.result)
    assert "all runs are finished already" in capsys.readouterr().out


def test_an_interrupted_study_goes_on(
    bare: None, finished: Finished, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = runner.write_detections

    def killed(detector: Any, dataset: Any, folder: Path, *rest: Any, **options: Any) -> None:
        if folder.parent.name == "none-seed0":
            raise KeyboardInterrupt
        original(detector, dataset, folder, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_detections", killed)
        with pytest.raises(KeyboardInterrupt):
            Experiment(settings(), scenes, tmp_path, CPU, quiet=True).run()
    assert (tmp_path / "expert-seed0" / "result.json").exists()
    assert not (tmp_path / "none-seed0" / "result.json").exists()
    result = Experiment(settings(), scenes, tmp_path, CPU, quiet=True).run()
    for ours, theirs in zip(figures(result)[0], figures(finished.result)[0], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"training": replace(TRAINING, learning_rate=2e-3)},
            r"settings\.learning_rate is 0\.001 there and",
        ),
        ({"training": replace(TRAINING, steps=3)}, r"settings\.steps"),
        ({"expert_training": TRAINING}, r"settings\.steps is 3 there and 2 here"),
        ({"weights": {"rakd": 0.5}}, r"weight is 1\.0 there and 0\.5 here"),
        ({"regions": "objects"}, "regions is 'proposals' there and 'objects' here"),
        ({"photometric": 0.0}, r"data\.augmentation\.photometric"),
        ({"apprentice": "mini-expert"}, r"detector\.backbone\.channels is 16 there and 24 here"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], message: str, finished: Finished, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_work(monkeypatch)
    with pytest.raises(ValueError, match=rf"holds a run with other settings: .*{message}"):
        Experiment(settings(**change), scenes, finished.out, CPU, quiet=True).run()


def test_other_frames_and_other_experts_are_refused(finished: Finished, scenes: Path) -> None:
    with pytest.raises(ValueError, match="other settings: evaluated frames is"):
        Experiment(settings(), scenes, finished.out, CPU, splits=("train", "train"), quiet=True).run()
    file = finished.out / "expert-seed0" / "detector.pt"
    with pytest.raises(ValueError, match='other settings: expert is "each seed\'s own" there and'):
        Experiment(settings(), scenes, finished.out, CPU, expert=file, quiet=True).run()


def test_an_expert_from_a_file(
    bare: None, finished: Finished, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = finished.out / "expert-seed0" / "detector.pt"
    result = Experiment(settings(), scenes, tmp_path, CPU, expert=file, quiet=True).run()
    for ours, theirs in zip(figures(result)[0], figures(finished.result)[0], strict=True):
        for name in ("method", "seed", "precisions", "depth"):
            assert ours[name] == theirs[name]
    assert result.runs[0].seconds is None
    taught = [load_weights(out / "rakd-seed0" / "detector.pt")[0] for out in (tmp_path, finished.out)]
    assert all(torch.equal(value, taught[1][name]) for name, value in taught[0].items())
    # Nor is another file's expert taken for this one's.
    forbid_work(monkeypatch)
    with pytest.raises(ValueError, match="other settings: expert is"):
        other = finished.out / "none-seed0" / "detector.pt"
        Experiment(settings(), scenes, tmp_path, CPU, expert=other, quiet=True).run()


def test_more_seeds_join_those_that_are_there(
    bare: None, finished: Finished, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    original = Trainer._step

    def noted(self: Trainer, batch: Any) -> Any:
        trained.append(self.name)
        return original(self, batch)

    def make(config: DetectorConfig, seed: int = 0) -> Detector:
        seeds.append(seed)
        return Detector(config, seed)

    def train(self: Runner, run: Any, detector: Detector, expert: Detector | None) -> Any:
        detectors[run.name], experts[run.name] = detector, expert
        return original_train(self, run, detector, expert)

    seeds: list[int] = []
    detectors: dict[str, Detector] = {}
    experts: dict[str, Detector | None] = {}
    original_train = Runner.train
    monkeypatch.setattr(Runner, "train", train)
    monkeypatch.setattr(DetectorConfig, "build", make)
    monkeypatch.setattr(Trainer, "_step", noted)
    methods = ("none", "rakd")
    result = Experiment(settings(seeds=(0, 1), methods=methods), scenes, finished.out, CPU, quiet=True).run()
    assert trained == ["expert-seed1"] * 3 + ["none-seed1"] * 2 + ["rakd-seed1"] * 2
    assert len(set(seeds)) == 4  # of the weights of two experts and of the apprentices of two seeds
    assert [(run.method, run.seed) for run in result.runs] == [(m, s) for s in (0, 1) for m in ("expert", *methods)]
    # Each seed's own expert teaches.
    for seed in (0, 1):
        assert experts[f"none-seed{seed}"] is None
        assert experts[f"rakd-seed{seed}"] is detectors[f"expert-seed{seed}"]
    assert without_nan(asdict(result.runs[1])) == without_nan(asdict(finished.result.runs[1]))
    first, second = (load_weights(finished.out / f"none-seed{seed}" / "detector.pt")[0] for seed in (0, 1))
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


def test_an_expert_of_larger_images_sees_its_own(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = Detector.extract_features

    def noted(self: Detector, images: Tensor) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            seen.append((self.config.height, tuple(images.shape[2:])))
        return forward(self, images)

    monkeypatch.setattr(Detector, "extract_features", noted)
    own = settings(expert="mini-tall", methods=("rakd", "pkd"), photometric=0.0)
    study = Experiment(own, scenes, tmp_path, CPU, quiet=True, cache_bytes=10**8).run()
    assert [run.method for run in study.runs] == ["expert", "rakd", "pkd"]
    assert set(seen) == {(128, (128, 448)), (64, (64, 224))}
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "images 64 pixels high, padded to a width of 224, the expert's 128 high and 448 wide" in text
    seen.clear()
    file = tmp_path / "expert-seed0" / "detector.pt"
    Experiment(replace(own, methods=("rakd",)), scenes, tmp_path / "file", CPU, quiet=True, expert=file).run()
    assert set(seen) == {(128, (128, 448)), (64, (64, 224))}
    text = (tmp_path / "file" / "tables.md").read_text(encoding="utf-8")
    assert "images 64 pixels high, padded to a width of 224, the expert's 128 high and 448 wide" in text


def test_the_commit_is_told_at_the_root_of_a_checkout_alone(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout[:7]
    assert source_commit(tmp_path) == commit
    (tmp_path / "inside").mkdir()
    assert source_commit(tmp_path / "inside") == ""  # such as site-packages below somebody's own sources
    (tmp_path / "a").touch()
    subprocess.run([*git, "add", "a"], check=True)
    assert source_commit(tmp_path) == f"{commit} with changes"


@pytest.mark.usefixtures("bare")
def test_a_report_made_later_tells_what_runs_were_trained_with(
    finished: Finished, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished.out, tmp_path / "run")
    trained = read_run(out / "none-seed0" / "result.json").versions
    assert trained["torch"] == torch.__version__ and "latency threads" not in trained
    monkeypatch.setattr("rakd.study.versions.versions", lambda _: {**trained, "commit": "later", "threads": "7"})
    again = Experiment(settings(), scenes, out, CPU, quiet=True).run().versions
    assert again == {**trained, "latency threads": "7"}
    one = replace(read_run(out / "none-seed0" / "result.json"), versions={**trained, "device": "another"})
    write_run(out / "none-seed0" / "result.json", one)
    joined = Experiment(settings(), scenes, out, CPU, quiet=True).run().versions
    assert joined["device"] == f"{trained['device']} and another"
