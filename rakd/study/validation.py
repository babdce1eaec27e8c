"""Validation in the course of a training: a detector's figure on the frames it is evaluated on, and its best state."""

from dataclasses import dataclass
from pathlib import Path

from rakd.data.kitti import KittiDataset
from rakd.detector.base import BaseDetector
from rakd.detector.files import save_detector
from rakd.detector.inference import write_detections
from rakd.distributed import Processes
from rakd.errors import UserError
from rakd.evaluation.kitti import LEVELS, evaluate, truth_flags
from rakd.evaluation.matching import VALID
from rakd.study.evaluation import precisions_of


@dataclass
class CarValidation:
    """Measures average precision of cars in 3D (R40, moderate, IoU 0.7); keeps the best detector. For the trainer.

    Attributes:
        detector: The one in training.
        dataset: Frames to measure on.
        out: The run's folder. Gets ``best.pt``, and in ``validation`` the last validation's detections.
        processes: That train together; all of them detect.
        metric: Its name in the log.

    Raises:
        UserError: No frame has a car of this difficulty.
    """

    detector: BaseDetector
    dataset: KittiDataset
    out: Path
    processes: Processes
    metric: str = "car_3d_moderate"

    def __post_init__(self) -> None:
        moderate = LEVELS.index("moderate")
        flags = (truth_flags(frame.read_labels(), "Car", moderate) for frame in self.dataset.frames)
        if not any((own == VALID).any() for own in flags):
            raise UserError("validate_every: the frames to evaluate on hold no Car of moderate difficulty to measure")

    def measure(self) -> float:
        """Detect and evaluate; the main process has the figure, percent."""
        folder = self.out / "validation"
        write_detections(
            self.detector, self.dataset, folder, self.processes.device, processes=self.processes, progress=False
        )
        if not self.processes.is_main:
            return 0.0
        frame = self.dataset.frames[0]
        frames = [frame.id for frame in self.dataset.frames]
        assert frame.label is not None  # of training
        result = evaluate(frame.label.parent, folder, frames=frames, progress=False)
        return precisions_of(official=result)["official"]["3d"]["Car"][LEVELS.index("moderate")]

    def keep(self) -> None:
        """Write the detector as the best so far."""
        save_detector(self.out / "best.pt", self.detector)
