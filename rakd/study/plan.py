"""The runs of an experiment as plain data: what is trained, how, and in which folder. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from rakd.study.settings import StudySettings
from rakd.training.settings import TrainSettings


@dataclass(frozen=True)
class Run:
    """One detector to train and to evaluate.

    Attributes:
        name: Of its folder: "expert", or such as "rakd-seed0".
        method: One of `rakd.study.results.METHODS`.
        detector: Name in `rakd.detector.configs.DETECTORS`.
        model_seed: Of the detector's weights.
        training: How it is trained; its seed is the run's.
        weight: Factor of the method's loss.
        init: File of the detector whose weights it starts from; None: it starts as ``model_seed`` says.
    """

    name: str
    method: str
    detector: str
    model_seed: int
    training: TrainSettings
    weight: float = 0.0
    init: Path | None = None

    @property
    def seed(self) -> int:
        """Runs of one seed are compared with each other."""
        return self.training.seed


def make_plan(settings: StudySettings, init: Path | None = None) -> list[Run]:
    """List the runs of an experiment: the expert, then each method with each seed, which need the expert only.

    Args:
        settings: Of the experiment.
        init: File of a detector that all apprentices start from, or folder of another experiment: each run, the
            expert's too, starts from the run of its name there.
    """
    seed = settings.expert_seed
    expert = Run("expert", "expert", settings.expert, 1000 + seed, replace(settings.expert_training, seed=seed))
    apprentices = [
        Run(
            run_name(method, seed),
            method,
            settings.apprentice,
            2000 + seed,
            replace(settings.training, seed=seed),
            settings.weights.get(method, 0.0),
        )
        for seed in settings.seeds
        for method in settings.methods
    ]
    if init is None:
        return [expert, *apprentices]
    if not init.is_dir():
        return [expert, *(replace(run, init=init) for run in apprentices)]
    return [replace(run, init=init / run.name / "detector.pt") for run in (expert, *apprentices)]


def run_name(method: str, seed: int) -> str:
    """Name of the folder of an apprentice's run."""
    return f"{method}-seed{seed}"
