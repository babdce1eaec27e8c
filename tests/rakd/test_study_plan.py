"""The plan of a study: its runs and settings, and what is refused of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_study_run import CPU, detectors, forbid_work, settings  # noqa: F401

from rakd.detector.configs import DETECTORS
from rakd.detector.detector import Detector
from rakd.detector.files import save_detector
from rakd.study.experiment import Experiment
from rakd.study.plan import make_plan
from rakd.study.settings import ALL_METHODS, PAPER_METHODS, STUDIES
from rakd.training.model import expert_size


def test_the_plan_is_a_list_of_runs() -> None:
    plan = make_plan(settings(seeds=(3, 1), methods=("none", "pkd")))
    names = ["expert-seed3", "none-seed3", "pkd-seed3", "expert-seed1", "none-seed1", "pkd-seed1"]
    assert [run.name for run in plan] == names
    assert [(run.method, run.seed, run.model_seed) for run in plan[:3]] == [
        *(("expert", 3, 1003), ("none", 3, 2003), ("pkd", 3, 2003))
    ]
    assert [run.detector for run in plan] == ["mini-expert", "mini", "mini"] * 2
    assert [run.weight for run in plan] == [0.0, 0.0, 2.0] * 2
    assert [run.training.steps for run in plan] == [3, 2, 2] * 2
    assert [run.taught_by for run in plan] == [None, None, "expert-seed3", None, None, "expert-seed1"]
    # One from a file teaches in all seeds.
    plan = make_plan(settings(seeds=(3, 1), methods=("none", "pkd")), expert=Path("expert.pt"))
    assert [run.name for run in plan] == ["expert", *names[1:3], *names[4:]]
    assert [run.taught_by for run in plan] == [None, None, "expert", None, "expert"]
    assert [run.trained for run in plan] == [Path("expert.pt"), *[None] * 4]


def test_a_missing_expert_leaves_the_folder_alone(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt is not there: expected a detector \(expert\)"):
        Experiment(settings(), scenes, tmp_path, CPU, expert=tmp_path / "none.pt", quiet=True)
    (tmp_path / "wrong.pt").write_bytes(b"not an expert")
    with pytest.raises(ValueError, match=r"wrong\.pt"):
        Experiment(settings(), scenes, tmp_path / "run", CPU, expert=tmp_path / "wrong.pt", quiet=True).run()
    assert not (tmp_path / "run").exists()


def test_batches_that_cannot_be_shared_out_are_refused_at_once(scenes: Path, tmp_path: Path) -> None:
    for count, methods, message in (
        (2, ("none", "semckd"), "SemCKD .* needs 2 or more in each of the 2 processes, got a batch_size of 2"),
        (4, ("none",), "batch_size must be a multiple of the number of processes, 4, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Experiment(settings(methods=methods), scenes, tmp_path, replace(CPU, count=count), quiet=True)


def test_apprentices_that_start_differently_are_refused(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = iter(["random weights", "ImageNet weights", "random weights (ImageNet's cannot be loaded: no network)"])
    monkeypatch.setattr(Detector, "init_source", property(lambda self: self._start))
    original = Detector.__init__

    def started(self: Detector, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self._start = next(starts)

    monkeypatch.setattr(Detector, "__init__", started)
    with pytest.raises(ValueError, match="must start alike: ImageNet weights before, now random weights"):
        Experiment(settings(methods=("none", "rakd")), scenes, tmp_path, CPU, quiet=True).run()


def test_a_method_that_weights_by_scores_needs_an_expert_that_has_them(scenes: Path, tmp_path: Path) -> None:
    assert "score_l2" in STUDIES["scenes"].weights
    given = {"expert": "monodetr-small", "apprentice": "monodetr-tiny", "weights": {"score_l2": 6.0}}
    own, out, file = settings(methods=("score_l2",), **given), tmp_path / "run", tmp_path / "expert.pt"
    with pytest.raises(ValueError, match=r"score_l2 needs the expert's class scores .*, got monodetr-small"):
        Experiment(own, scenes, out, CPU, quiet=True).run()
    save_detector(file, DETECTORS["monodetr-small"].without_download().build())
    own = replace(own, expert="tiny-expert")
    with pytest.raises(ValueError, match=r"score_l2 needs the expert's class scores .*, got .*expert\.pt"):
        Experiment(own, scenes, out, CPU, quiet=True, expert=file).run()
    assert not out.exists()


def test_an_expert_must_see_images_of_the_apprentices_proportions(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the apprentice's are 224 x 64 pixels, the expert's 320 x 96"):
        Experiment(settings(expert="mini-narrow"), scenes, tmp_path, CPU, quiet=True).run()


def test_missing_files_are_told_before_anything_is_trained(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_work(monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"moon\.txt"):
        Experiment(settings(), scenes, tmp_path, CPU, splits=("train", "moon"), quiet=True).run()
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        Experiment(settings(), scenes, tmp_path, CPU, expert=tmp_path / "none.pt", quiet=True).run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": "huge"}, "expert must be one of .*tiny.*, got 'huge'"),
        ({"apprentice": ""}, "apprentice must be one of"),
        ({"methods": ()}, "methods must hold at least one and none twice"),
        ({"methods": ("none", "none")}, "methods must hold at least one and none twice"),
        ({"methods": ("magic",)}, "methods must be of .*, got magic"),
        ({"methods": ("hfa", "rakd")}, "weights must hold one for each method, hfa lack one"),
        ({"seeds": ()}, "seeds must hold at least one"),
        ({"seeds": (2, 2)}, "seeds must hold at least one and none twice"),
        ({"seeds": (0, -1)}, "seeds must be 0 or more"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_named_studies_can_run_every_method() -> None:
    for name, study in STUDIES.items():
        # These have fewer, for two processor cores.
        short = dict.fromkeys(("scenes", "scenes-long", "monodetr-tiny"), ("none", "pkd", "rakd"))
        short["scenes-resolution-long"] = short["real-frames"] = ("none", "pkd", "rakd", "box_l2")
        short["scenes-resolution"] = (*short["scenes-resolution-long"], "l_roi", "hfa")
        short["scenes-methods"] = tuple(name for name in ALL_METHODS if name != "fgd_attention")
        assert study.methods == short.get(name, PAPER_METHODS)
        larger = expert_size(DETECTORS[study.apprentice], DETECTORS[study.expert])
        assert larger == ((672, 192) if name.startswith("scenes-resolution") or name == "real-frames" else None)
        assert not study.goes_on_from or study.goes_on_from in STUDIES
