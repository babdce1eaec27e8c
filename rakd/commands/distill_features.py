"""``rakd distill-features``: an apprentice's feature pyramid learns an expert's in the objects' boxes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from rakd.distill import Weights
from rakd.files import check_folder
from rakd.scenes import make_scenes

_SCENES = 12  # frames rendered where no data are given


@dataclass(frozen=True)
class DistillFeatures:
    """Teach a light network the features of a strong one, inside the labelled boxes.

    The expert (ResNet-50 with a feature pyramid) is frozen; the apprentice (ResNet-18) learns its features with
    the RAKD loss. Writes the loss curve (PNG and CSV), the apprentice's weights and a summary. An interrupted
    run is continued by repeating the command.
    """

    data: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder in KITTI's layout, with labels. Without it a few street scenes are rendered into the run's folder."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/distill-features")
    """Folder of the run."""

    split: Annotated[str | None, arg(metavar="NAME")] = None
    """Name of a frame list in ImageSets, such as train; without it all frames are used."""

    steps: int = 100
    """Training steps."""

    batch_size: int = 2
    """Frames in a step."""

    height: int = 192
    """Images are resized to this height in pixels, keeping their proportions."""

    learning_rate: float = 1e-3
    """Of AdamW."""

    weights: Weights = "pretrained"
    """What the backbones start from: torchvision's ImageNet weights if they can be loaded, or random ones."""

    seed: int = 0
    """Seed of random weights and of the order of frames."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""

    def run(self) -> None:
        """Train and report."""
        from rakd.commands.devices import choose_device
        from rakd.distill.features import FeatureDistillation, FeatureRun

        device = choose_device(self.device)
        check_folder(self.out, "--out")
        data, split = self.data, self.split
        if data is None:
            data = self.out / "scenes"
            print(f"no data given: learning from {_SCENES} rendered street scenes in {data}", flush=True)
            make_scenes(data, _SCENES, self.seed, workers=os.cpu_count() or 1, progress=True)
        settings = FeatureDistillation(
            data=str(data),
            split=split,
            weights=self.weights,
            height=self.height,
            batch_size=self.batch_size,
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )
        run = FeatureRun(settings, self.out, device)
        print(f"expert: {settings.expert}, {run.expert.loaded}")
        print(f"apprentice: {settings.apprentice}, {run.apprentice.loaded}")
        outcome = run.run()
        print(
            f"loss over {len(run.dataset)} frames: {outcome.before:.4g} before, {outcome.after:.4g} after "
            f"{settings.steps} steps: {outcome.ratio:.1f} times lower"
        )
        print(f"curve: {self.out / 'loss.png'} and {self.out / 'log.csv'}; weights: {self.out / 'apprentice.pt'}")
