"""The runs of an experiment as plain data: what is trained, how, and in which folder. Imports no torch."""

from dataclasses import dataclass, replace

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
        weight: What the method's loss is multiplied with.
    """

    name: str
    method: str
    detector: str
    model_seed: int
    training: TrainSettings
    weight: float = 0.0

    @property
    def seed(self) -> int:
        """Runs of one seed are compared with each other."""
        return self.training.seed


def make_plan(settings: StudySettings) -> list[Run]:
    """List the runs of an experiment: the expert, then each method with each seed, which need the expert only."""
    seed = settings.expert_seed
    expert = Run("expert", "expert", settings.expert, 1000 + seed, replace(settings.expert_training, seed=seed))
    return [
        expert,
        *(
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
        ),
    ]


def run_name(method: str, seed: int) -> str:
    """Name of the folder of an apprentice's run."""
    return f"{method}-seed{seed}"
