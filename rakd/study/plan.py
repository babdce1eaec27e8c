"""The runs of an experiment as plain data: what is trained, how, and in which folder. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from rakd.study.settings import StudySettings
from rakd.training.settings import TrainSettings


@dataclass(frozen=True)
class Run:
    """One detector to train and to evaluate.

    Attributes:
        name: Of its folder, such as "expert-seed0" or "rakd-seed0"; "expert" for one from a file.
        method: One of `rakd.study.results.METHODS`.
        detector: Name in `rakd.detector.configs.DETECTORS`.
        model_seed: Of the detector's weights.
        training: How it is trained; its seed is the run's.
        weight: See `rakd.study.settings.StudySettings`; 0 where nobody teaches it.
        init: File of the detector whose weights it starts from; None: it starts as ``model_seed`` says.
        trained: File of a detector that is evaluated as it is; None: it is trained.
        taught_by: Name of the run whose detector teaches it; None: nobody does.
    """

    name: str
    method: str
    detector: str
    model_seed: int
    training: TrainSettings
    weight: float | str = 0.0
    init: Path | None = None
    trained: Path | None = None
    taught_by: str | None = None

    @property
    def seed(self) -> int:
        """Runs of one seed are compared with each other."""
        return self.training.seed


def make_plan(settings: StudySettings, init: Path | None = None, expert: Path | None = None) -> list[Run]:
    """List the runs of an experiment: for each seed the expert and each method. An expert comes before its apprentices.

    Args:
        settings: Of the experiment.
        init: File of a detector that all apprentices start from, or folder of another experiment: each run, the
            expert's too, starts from the run of its name there.
        expert: File of a trained expert, which teaches in all seeds; None: each seed trains its own.
    """
    from_folder = init is not None and init.is_dir()

    def start(name: str) -> Path | None:
        return init / name / "detector.pt" if init is not None and from_folder else init

    plan = []
    if expert is not None:
        training = replace(settings.expert_training, seed=settings.seeds[0])
        plan.append(Run("expert", "expert", settings.expert, 0, training, trained=expert))
    for seed in settings.seeds:
        taught_by = "expert" if expert is not None else run_name("expert", seed)
        if expert is None:
            own = start(taught_by) if from_folder else None
            training = replace(settings.expert_training, seed=seed)
            plan.append(Run(taught_by, "expert", settings.expert, 1000 + seed, training, init=own))
        plan += [
            Run(
                run_name(method, seed),
                method,
                settings.apprentice,
                2000 + seed,
                replace(settings.training, seed=seed),
                settings.weights.get(method, 0.0),
                init=start(run_name(method, seed)),
                taught_by=None if method == "none" else taught_by,
            )
            for method in settings.methods
        ]
    return plan


def has_begun(out: Path) -> bool:
    """Whether a run of an experiment in this folder has begun; a refused command leaves none."""
    return any(any(out.glob(f"*/{name}")) for name in ("checkpoint.pt", "result.json"))


def run_name(method: str, seed: int) -> str:
    """Name of a run's folder."""
    return f"{method}-seed{seed}"
