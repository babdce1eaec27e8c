"""The trainer: steps, mixed precision, checkpoints and logs for any model, in one process or many."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from inspect import signature
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rakd.checkpoints import config_diff, load_checkpoint, save_checkpoint, to_jsonable
from rakd.data.frames import digest
from rakd.data.kitti import Batch, KittiDataset
from rakd.distributed import (
    all_gather_object,
    all_reduce_mean,
    barrier,
    broadcast_object,
    broadcast_state,
    broadcast_tensors,
    current_processes,
)
from rakd.errors import UserError
from rakd.files import locked, remove_stale
from rakd.progress import bar
from rakd.training.loading import each_of, make_loader
from rakd.training.log import RESERVED, Log, Row
from rakd.training.optim import learning_rate, make_optimizer
from rakd.training.order import InfiniteShuffle, StepSampler, image_seeds, process_seed
from rakd.training.settings import TrainSettings

# Whether DistributedDataParallel copies the main process's buffers to all in each step; torch 2.14 renamed it.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
_AMP = {"off": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Settings that do not change what is learned, nor the log: a run may go on with others.
_FREE = ("workers", "checkpoint_every", "validate_every")
# At a loss scale this small float16 gradients do not overflow by the scale: they are not finite by themselves.
_SMALLEST_SCALE = 2.0**-10
_SAVE_SECONDS = 600.0  # after which a checkpoint is written though the steps between two are not done


class Validation(Protocol):
    """Measures what is trained, every `rakd.training.settings.TrainSettings.validate_every` steps and at the end."""

    metric: str
    """Name of what is measured; more is better."""

    def measure(self) -> float:
        """Measure the model as it is, in evaluation mode. All processes do; the first one's value counts."""

    def keep(self) -> None:
        """Keep the model as it is as the best so far; the first process does."""


class Trainer:
    """Trains a model in a folder, from the start or from the last checkpoint there.

    The model is a module whose ``forward(batch, seeds)`` takes a `rakd.data.kitti.Batch` on the CPU and one integer
    for each of its images, and gives a dict of loss terms: scalars, the same names in every step. Their sum is
    minimised. The model moves what it needs to its device. It draws random numbers for an image from a generator
    seeded with that image's integer, which depends on the run's seed, the step and the image's index in the batch
    only. Draws from torch's global generators are repeated on resuming, too, but differ with the number of
    processes. ``train()`` is called on the model before the first step and after each validation. With several
    processes every parameter must get a gradient in every step, if of zeros, unless the model has a true
    ``may_leave_parameters_unused``.

    Under ``torch.distributed`` (see `rakd.distributed`) each process takes its share of every batch and
    gradients are averaged, so that terms which are means over images train as in one process. All processes make
    the trainer and run it; the first one writes. Batch normalisation sees the local images only.

    Writes ``checkpoint.pt``, ``log.csv`` and ``log.jsonl``. A run that was killed at any moment goes on to the same
    bits where the model's own operations give the same bits (on CUDA see `torch.use_deterministic_algorithms`), and
    can go on with another number of processes or on another device (with ``amp`` told), to the same result up to
    rounding. Of three and more processes only the same up to rounding is promised: DistributedDataParallel regroups
    gradients after the first step, and a sum of more than two numbers depends on their order.

    Args:
        model: The module to train; it is moved to ``device``. Its ``state_dict`` is in the checkpoints.
        dataset: Frames to learn from.
        settings: How.
        out: The run's folder. Processes on other machines need not see it.
        device: Where to compute.
        name: Title of the progress bar.
        fingerprint: Plain values that say what is learned (such as the model's configuration), under other keys
            than "settings", "data" and "extended_from"; a run goes on only with the same.
        image_size: (width, height) that all images are padded to. None: each process's batch to the next multiple
            of 64 of its largest image, which makes padding depend on the number of processes.
        quiet: Show no progress bar.
        validation: Measures the model from time to time, which changes nothing that is learned, and keeps the best;
            of equals, the last.
        extend: Go on with a run that was made for fewer steps. The learning rate follows the schedule of the new
            number of steps from the step that the run stands at: where it had fallen it rises again, without a
            warm-up. That makes another run than one of so many steps from the start, so a run once extended goes on
            with this argument only. None: do not, and propose it in no error.

    Attributes:
        step: Steps done.

    Raises:
        UserError: No frame holds anything to learn, ``batch_size`` cannot be shared out evenly, processes have other
            settings or data than the first one, the folder holds a run with other settings or data, or its checkpoint
            cannot be read.
        TypeError: ``fingerprint`` holds something else than plain values.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: KittiDataset,
        settings: TrainSettings,
        out: Path,
        device: torch.device,
        *,
        name: str = "training",
        fingerprint: Mapping[str, object] | None = None,
        image_size: tuple[int, int] | None = None,
        quiet: bool = False,
        validation: Validation | None = None,
        extend: bool | None = False,
    ) -> None:
        dataset.check_targets()
        if settings.amp == "auto":
            settings = replace(settings, amp="bfloat16" if device.type == "cuda" else "off")
        self.processes = current_processes(device)
        share, rest = divmod(settings.batch_size, self.processes.count)
        if rest:
            raise UserError(
                f"batch_size must be a multiple of the number of processes, {self.processes.count}, "
                f"got {settings.batch_size}"
            )
        self.settings = settings
        self.out = Path(out)
        self.device = device
        self.name = name
        self.quiet = quiet or not self.processes.is_main
        self.model = model.to(device)
        self.dataset = dataset
        self.image_size = image_size
        self.validation = validation if settings.validate_every else None
        self.extend = extend
        self.order = InfiniteShuffle(len(dataset), settings.seed)
        self.batch_indices = range(self.processes.rank * share, (self.processes.rank + 1) * share)
        self.optimizer = make_optimizer(model, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        self.log = Log(settings.log_every, settings.batch_size)
        self.step = 0
        self._terms: tuple[str, ...] | None = None
        self._fingerprint = self._make_fingerprint(fingerprint or {})
        self._agree()
        self._resume()
        self._wrapped = self._parallel()

    def run(self) -> list[Row]:
        """Train to the end.

        Returns:
            The rows of the log, see `rakd.training.log.Log`; in every process.

        Raises:
            ValueError: The loss or its gradient is not finite, or the model gives something else than loss terms.
                The last checkpoint stays.
            UserError: Another process trains in this folder.
        """
        with ExitStack() as held:

            def claim() -> str | None:
                try:
                    held.enter_context(locked(self.out))
                except UserError as error:
                    return str(error)
                return None

            fault = broadcast_object(self.processes, claim)
            if fault is not None:
                raise UserError(fault)
            return self._run()

    def _run(self) -> list[Row]:
        steps = range(self.step, self.settings.steps)
        sampler = StepSampler(self.order, steps, self.settings.batch_size, self.batch_indices)
        cuda = self.device.type == "cuda"
        loader = make_loader(self.dataset, sampler, image_size=self.image_size, workers=self.settings.workers, pin=cuda)
        self.model.train()
        progress = bar(initial=self.step, total=self.settings.steps, desc=self.name, unit="step", disable=self.quiet)
        with torch.random.fork_rng(devices=[self.device] if cuda else []), progress:
            if self.validation and not steps and all(row["step"] != self.step for row in self.log.validations):
                self._validate()  # of a finished run, which is to validate now
                self._save()
            last = saved = perf_counter()
            # Without steps left no worker is to be started.
            for batch in each_of(loader) if steps else ():
                terms, grad_norm = self._step(batch)
                self.step += 1
                now = perf_counter()
                done = self.step == self.settings.steps
                lr = learning_rate(self.settings, self.step - 1)
                self.log.add(self.step, lr, terms, grad_norm, now - last, last=done)
                progress.set_postfix({name: f"{value:.4g}" for name, value in terms.items()}, refresh=False)
                progress.update()
                validates = self.validation and (done or self.step % self.settings.validate_every == 0)
                if validates:
                    self._validate()
                due = self.step % self.settings.checkpoint_every == 0 or now - saved > _SAVE_SECONDS
                if done or validates or due:
                    self._save()
                    saved = now
                last = perf_counter() if validates else now
        # Running means of batch normalisation: each process has its own of the last step. The checkpoint has these.
        broadcast_tensors(self.processes, self.model.buffers())
        if self.processes.is_main:
            self.log.write(self.out / "log.csv")
        barrier(self.processes)
        return self.log.rows

    def _step(self, batch: Batch) -> tuple[dict[str, float], float]:
        """Do one step; give the loss terms (means over processes) and the norm of the gradient before clipping."""
        settings = self.settings
        # Draws from the global generators depend on the step alone: resuming need not restore them.
        torch.manual_seed(process_seed(settings.seed, self.step, self.processes.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, _AMP[settings.amp], enabled=settings.amp != "off"):
            losses = self._wrapped(batch, image_seeds(settings.seed, self.step, self.batch_indices))
        self._check_terms(losses)
        stacked = torch.stack(tuple(losses.values()))
        self.scaler.scale(stacked.sum()).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        # One transfer from the device for all that is wanted of a step.
        shared = all_reduce_mean(stacked.detach().double())
        *values, grad_norm = torch.cat([shared, norm.to(shared).reshape(1)]).tolist()
        terms = dict(zip(losses, values, strict=True))
        self._check_finite(terms, grad_norm)
        if settings.clip is not None:
            clip_grads_with_norm_(parameters, settings.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return terms, grad_norm

    def _validate(self) -> None:
        assert self.validation is not None
        # Running means of batch normalisation: all processes detect with those that the checkpoint has.
        broadcast_tensors(self.processes, self.model.buffers())
        self.model.eval()
        measured = self.validation.measure()
        self.model.train()
        value = broadcast_object(self.processes, lambda: measured)
        best = self.log.add_validation(self.step, self.validation.metric, value)
        if best and self.processes.is_main:
            self.validation.keep()

    def _check_terms(self, losses: Mapping[str, Tensor]) -> None:
        if not isinstance(losses, dict) or not losses:
            raise TypeError(f"model must give a dict of loss terms, got {losses!r}")
        for name, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.ndim:
                what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
                raise TypeError(f"model must give scalar tensors as loss terms, got {what} for {name!r}")
            if name in RESERVED:
                raise ValueError(f"model must not name a loss term {name!r}, a column of the log")
        if self._terms is None:
            self._terms = tuple(losses)
        elif self._terms != tuple(losses):
            raise ValueError(f"model must give the same terms in every step, {self._terms}, got {tuple(losses)}")

    def _check_finite(self, terms: Mapping[str, float], grad_norm: float) -> None:
        what = None
        if not all(map(isfinite, terms.values())):
            what = "the loss"
        elif not isfinite(grad_norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() < _SMALLEST_SCALE):
            what = "the gradient"
        if what is not None:
            draws = self.order.step(self.step, self.settings.batch_size)
            frames = ", ".join(self.dataset.frames[draw.frame].id for draw in draws)
            values = ", ".join(f"{name} {value:.6g}" for name, value in terms.items())
            raise UserError(
                f"{what} of step {self.step + 1} is not finite: {values}; gradient norm {grad_norm:.6g}; "
                f"frames {frames}"
            )

    def _parallel(self) -> Callable[[Batch, Sequence[int]], dict[str, Tensor]]:
        if self.processes.count == 1:
            return self.model
        # Running means of normalisation: nobody reads them in training, and a checkpoint has the main process's.
        unsynchronised: dict[str, Any] = {_SYNC_BUFFERS: False}
        return DistributedDataParallel(
            self.model,
            # Looking for them goes through the whole graph in each step.
            find_unused_parameters=bool(getattr(self.model, "may_leave_parameters_unused", False)),
            # Gradients lie where they are sent from, in their parameters' memory layout: none is copied back.
            gradient_as_bucket_view=True,
            **unsynchronised,
        )

    def _make_fingerprint(self, given: Mapping[str, object]) -> dict[str, Any]:
        for name in ("settings", "data", "extended_from"):
            if name in given:
                raise ValueError(f"fingerprint must not have the key {name!r}, which the trainer makes")
        dataset = self.dataset
        data = {
            "frames": len(dataset),
            "digest": digest(dataset.frames),
            "height": dataset.height,
            "augmentation": None if dataset.augmentation is None else asdict(dataset.augmentation),
            "seed": dataset.seed,
            "image_size": self.image_size,
        }
        if dataset.expert_size is not None:
            data["expert_size"] = dataset.expert_size
        settings = {name: value for name, value in asdict(self.settings).items() if name not in _FREE}
        return to_jsonable({"settings": settings, "data": data, **given}, "fingerprint")

    @property
    def extended_from(self) -> list[int]:
        """Steps at which the run was made to go on to more than it was made for."""
        return list(self._fingerprint.get("extended_from", ()))

    @property
    def _checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def _save(self) -> None:
        if self.processes.is_main:
            save_checkpoint(
                self._checkpoint,
                {
                    "fingerprint": self._fingerprint,
                    "step": self.step,
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "log": self.log.state_dict(),
                },
            )
            # After the checkpoint, so that no row stands there that will be made again.
            self.log.write(self.out / "log.csv")

    def _agree(self) -> None:
        # Each process reads its own copy of the data. All look at all, so that none waits for one that has given up.
        first, *others = all_gather_object(self.processes, self._fingerprint)
        for rank, fingerprint in enumerate(others, start=1):
            other = config_diff(first, fingerprint)
            if other:
                raise UserError(f"process {rank} (here) differs from the first one (there): {'; '.join(other)}")

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one. The main process reads it for all."""
        state = broadcast_state(self.processes, self._read)
        if state is None:
            return
        there = self._extended(state) if self.extend else state["fingerprint"]
        other = config_diff(there, self._fingerprint)
        if other:
            steps = all(entry.startswith(("settings.steps ", "extended_from ")) for entry in other)
            instead = " or extend it" if steps and self.extend is False else ""
            raise UserError(
                f"{self.out} holds a run with other settings: {'; '.join(other)}; choose another folder{instead}"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self._checkpoint} holds another model: {error}") from error
        self.scaler.load_state_dict(state["scaler"])
        self.log.load_state_dict(state["log"])
        self.step = int(state["step"])
        if self.log.rows:
            self._terms = tuple(name for name in self.log.rows[-1] if name not in RESERVED)

    def _extended(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's fingerprint as it is once the run is extended to the steps of this one; notes it here, too."""
        there: dict[str, Any] = dict(state["fingerprint"])
        before, steps = there["settings"]["steps"], self.settings.steps
        if before < steps:
            there["settings"] = {**there["settings"], "steps": steps}
            there["extended_from"] = [*there.get("extended_from", ()), state["step"]]
        if "extended_from" in there:
            self._fingerprint["extended_from"] = there["extended_from"]
        return there

    def _read(self) -> dict[str, Any] | None:
        remove_stale(self.out.glob(".*"))
        return load_checkpoint(self._checkpoint) if self._checkpoint.exists() else None
