"""Distillation in anyone's trainer: a frozen expert, a method and a weight in one module."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rakd.distill import Rescale
from rakd.distill.boxes import BoxFormat, refuse_maps
from rakd.distill.cache import FeatureCache
from rakd.distill.checks import Report, check_learns, refuse_resizing, warn_of_large_apprentice_maps
from rakd.distill.finite import FiniteCheck
from rakd.distill.hooks import Names
from rakd.distill.lifecycle import Lifecycle
from rakd.distill.methods import check_method
from rakd.distill.optim import TrainingWatch
from rakd.distill.outputs import Layout, find_maps, pair_names
from rakd.distill.registry import find_method
from rakd.distill.scale import RunningEnergy, TaskShare, UnitScale, number_on, parse_weight
from rakd.distill.step import PartialSetup, Step, check_form, check_sizes, image_batch, inspect, refuse_padding
from rakd.distributed import GradientAverage


class Distiller(Lifecycle):
    """Gives the weighted distillation loss of an apprentice's (student's) features against a frozen expert's.

    The expert runs in eval mode and without gradients, whatever way it was given, and training leaves its parameters
    and buffers as they are to the bit. It is no submodule: ``parameters``, ``state_dict`` and ``train`` know nothing of
    it; deep copies (such as EMA models) share it, and pickles leave it out. ``to``, ``cuda`` and the like take it
    along.

    Channels that differ are adapted by 1×1 convolutions, which must be trained: call ``add_to(optimizer)``. They are
    made at the first step, so ``parameters()`` is empty before it, unless ``strides`` and both numbers of channels are
    given or ``check`` has run. Over several processes their gradients are averaged here, whether or not
    DistributedDataParallel wraps the distiller; every process must then call it equally often.

    Args:
        expert: Gives feature maps for a batch of images: a module, a method of one, an object with
            ``extract_features``, or ``(module, function)``; an `rakd.distill.expert.Expert` for one with its own dtype,
            memory format or compilation. None where all calls bring ``expert_features``.
        method: A name of `rakd.distill.registry.METHODS`, or a module called as ``method(expert, apprentice, boxes)``.
        weight: Factor of the loss; None: the method's own default, 1 with ``normalize``. ``"auto:10"``: so many times
            the task loss, which calls then bring as ``task_loss`` and which must not be negative, measured over the
            first 20 training steps, then fixed and saved.
        apprentice: The network that learns; needed for ``apprentice_features``, and to refuse an expert that shares
            parameters with it.
        features: Source of the expert's maps: names of its modules whose outputs they are, ``"input:NAME"`` for a
            module's input, or a function ``features(expert, images)``. Default: what the expert returns. By names, the
            rest of the expert's forward is run at the first call only.
        apprentice_features: The same of the apprentice; hooks stay until ``close``. Default: calls bring the maps.
        scores: Names of the expert's modules that give class logits, for methods that take them.
        strides: Pixels per cell of the apprentice's maps, fine to coarse. Default: found at the first step, as are the
            next three.
        expert_strides: Pixels of the apprentice's images per cell of the expert's maps.
        expert_channels: Per level.
        apprentice_channels: Per level.
        rescale: "both" brings each map of both networks to a root mean square of 1 before they are compared, so that
            neither imitates the other's scale; True the expert's alone, to which the apprentice's then shrink or grow.
            Measured over the first 20 training steps, then fixed and saved. A loss of squared differences becomes
            smaller by the mean square: give a weight as much larger, or ``"auto:10"``.
        normalize: Divide by the expert's own energy in the regions: 0 is equal, 1 as good as zeros, in any network.
            See `rakd.distill.scale.RunningEnergy`.
        adapters: False refuses channels that differ.
        box_format: "xyxy", "xywh" or "cxcywh".
        normalized: Whether boxes are normalised by the image's width and height.
        layout: "NHWC" where the channels of the apprentice's maps come last.
        expert_layout: The same of the expert's.
        check: Whether the first step runs ``check``.
        cache: Keeps the expert's features; calls then bring ``keys``.
        batch_size: Images in every batch, for methods that need it; default: those of the first step.
        seed: Of initial weights.
        options: Of the method, such as ``sigma`` or ``canonical_size``.

    Raises:
        TypeError: An argument has the wrong type, or the expert's module cannot be found.
        ValueError: An argument has a wrong value, or expert and apprentice share parameters.

    Example:
        A torchvision RetinaNet learns from a larger one. Torchvision's detectors resize and normalise images and boxes
        inside. Both are taken from inside, as the backbone sees them, and given to the expert's backbone alone: the
        whole expert would normalise them again.

        >>> distiller = Distiller(expert.backbone, apprentice=apprentice, apprentice_features="backbone", weight=0.5)
        >>> optimizer = torch.optim.SGD(apprentice.parameters(), lr=0.001)
        >>> distiller.add_to(optimizer)
        >>> for images, targets in loader:
        ...     with tap(apprentice.transform) as transform:
        ...         losses = apprentice(images, targets)
        ...     batch, seen = transform.output
        ...     loss = sum(losses.values()) + distiller(batch.tensors, [target["boxes"] for target in seen])
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        expert: Any,
        method: str | nn.Module = "rakd",
        weight: float | str | None = None,
        *,
        apprentice: nn.Module | None = None,
        features: Names | Callable[..., Any] | None = None,
        apprentice_features: Names | Callable[..., Any] | None = None,
        scores: Names | None = None,
        strides: Sequence[float] | Tensor | None = None,
        expert_strides: Sequence[float] | Tensor | None = None,
        expert_channels: int | Sequence[int] | None = None,
        apprentice_channels: int | Sequence[int] | None = None,
        rescale: Rescale = False,
        normalize: bool = False,
        adapters: bool = True,
        box_format: BoxFormat = "xyxy",
        normalized: bool = False,
        layout: Layout = "NCHW",
        expert_layout: Layout = "NCHW",
        check: bool = True,
        cache: FeatureCache | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        check_form(box_format, layout, expert_layout)
        check_method(method, options)
        # A method's default weight belongs to its loss as it is; a share of the expert's energy needs none.
        default = find_method(method).weight if isinstance(method, str) and not normalize else 1.0
        self._weight = parse_weight(weight, default)
        if not (isinstance(rescale, bool) or rescale == "both"):
            raise ValueError(f"rescale: expected False, True or 'both', got {rescale!r}")
        self._rescale = rescale
        self._scale = UnitScale() if rescale else None
        self._energy = RunningEnergy() if normalize else None
        self._facts = PartialSetup.of(strides, expert_strides, expert_channels, apprentice_channels, batch_size)
        self._method_name = method if isinstance(method, str) else None
        self._options = options
        self._adapters, self._seed = adapters, seed
        self.box_format, self.normalized = box_format, normalized
        self.layout, self.expert_layout = layout, expert_layout
        self._check = check
        self._begun = False
        self._inspected = False  # a step with boxes was
        self._optimizers = []
        self._sync, self._finite, self._watch = GradientAverage(), FiniteCheck(), TrainingWatch()
        self._expert = None
        self._owns_expert = True
        self._expert_settings = {"features": features, "scores": scores, "cache": cache}
        self._apprentice = (None,)
        self._hooks = None
        self._apprentice_features = apprentice_features
        self.method = None
        if not isinstance(method, str):
            self.method = method
            self._facts = self._facts.of_method(method)
        self.attach(expert=expert, apprentice=apprentice)
        if self._facts.complete and (self._method_name != "semckd" or batch_size is not None):
            self._build()

    def forward(
        self,
        images: Any,
        boxes: Any,
        apprentice_features: Any = None,
        expert_features: Any = None,
        *,
        task_loss: Tensor | None = None,
        keys: Sequence[Any] | None = None,
        scores: Sequence[Tensor] | None = None,
        expert_images: Any = None,
        image_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Compute the weighted loss.

        Args:
            images: ``[B, 3, H, W]``, as the apprentice's backbone was given them, after all resizing; None with
                ``expert_features``.
            boxes: In these images: ``[K_b, 4]`` per image, or ``[K, 5]`` with the image's number first, in the format
                given to the constructor.
            apprentice_features: The apprentice's maps, where no hooks give them; any form of
                `rakd.distill.outputs.find_maps`. Their graph is kept.
            expert_features: The expert's maps for these images; the expert then does not run.
            task_loss: The apprentice's own loss, for ``weight="auto:..."``.
            keys: For the cache, one for each image: its id and the state of its augmentation.
            scores: The expert's class logits per level, where no hooks give them.
            expert_images: The expert's input, where it differs from ``images``.
            image_size: Height and width, where ``images`` is None.

        Returns:
            A scalar.

        Raises:
            ValueError: Maps, images, boxes or strides do not fit each other, something is missing, or a task loss is
                negative where the weight is a share of it.
            TypeError: An argument has the wrong type.
            RuntimeError: The hooked modules did not run.
            FloatingPointError: The loss is not finite; names the level.
        """
        refuse_maps(boxes)
        maps = self._apprentice_maps(images) if apprentice_features is None else apprentice_features
        step = self._gather(
            images, boxes, maps, expert_features, keys=keys, scores=scores, expert_images=expert_images, size=image_size
        )
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._begin(step)
            if self._learns:  # one process may check and validate alone
                self._sync.attach(self)
                self._watch.step(list(self.parameters()))
        elif (
            self._facts.expert_strides is None
            or self.method is None
            or not self._sync.started
            or not all(s.known for s in self._scales)
        ):
            raise RuntimeError(
                "Distiller: expected one step before torch.compile sees it; check() is enough in one process without "
                "rescale=True, normalize=True and weight='auto:...', which are measured in a step with boxes"
            )
        loss = self._weighted(step, task_loss, update=not compiling)
        if not compiling:
            self._finite(loss, step.apprentice, step.expert)
        return loss

    def expert_features(self, images: Any, keys: Sequence[Any] | None = None) -> dict[str, Tensor]:
        """Run the expert, such as for filling a cache.

        Args:
            images: The expert's input.
            keys: See `forward`.

        Returns:
            Its maps by name, in the expert's layout; no gradient flows to them.

        Raises:
            ValueError: There is no expert, or there are no images.
        """
        maps = self._run_expert(image_batch("images", images), keys)[0]
        last = self.expert_layout == "NHWC"
        return {name: m.permute(0, 2, 3, 1) if last else m for name, m in maps.items()}

    def check(
        self, images: Any, boxes: Any, apprentice_features: Any = None, expert_features: Any = None, **options: Any
    ) -> Report:
        """See whether levels, strides, channels and boxes fit each other; ``print`` shows a small table.

        Any process may call it alone. Creates the method's parameters if the first step has not. Where hooks take the
        apprentice's maps and none are stored, the apprentice runs once in eval mode; its batch normalisation, where it
        trains, uses the batch's statistics, and keeps its own as they were.

        Args:
            images: See `forward`, as all others.
            boxes: Same.
            apprentice_features: Same.
            expert_features: Same.
            options: ``keys``, ``scores``, ``expert_images``, ``image_size``: same.

        Returns:
            The table; ``str`` lays it out.

        Raises:
            ValueError: Something does not fit; names the remedy.
            TypeError: An argument has the wrong type.
        """
        options["size"] = options.pop("image_size", None)
        maps = self._apprentice_maps(images, keep=True) if apprentice_features is None else apprentice_features
        step = self._gather(images, boxes, maps, expert_features, **options)
        report = self._inspect(step)
        self._inspected = report.boxes > 0
        self._begin(step, check=False)
        return report

    def _run_expert(self, images: Any, keys: Sequence[Any] | None) -> tuple[dict[str, Tensor], list[Tensor] | None]:
        if self._expert is None:
            raise ValueError(
                "expert_features: expected the expert's maps, since this Distiller has no expert (a pickle leaves it "
                "out: attach(expert=...))"
            )
        if images is None:
            raise ValueError("images: expected images for the expert, or expert_features in their place, got None")
        return self._expert(images, keys)

    def _apprentice_maps(self, images: Any, *, keep: bool = False) -> Any:
        wanted, network = self._apprentice_features, self.apprentice
        if self._hooks is not None:
            if keep and not self._hooks.ready and network is not None:
                refuse_resizing(self._hooks, image_batch("images", images), "run the apprentice before check()")
                self._hooks.watch_once(network, images)
                maps = self._hooks.take(stay=True)
                self._hooks.clear()
                return maps
            return self._hooks.take(stay=keep)
        if callable(wanted):
            return wanted(network, images)
        raise ValueError(
            "apprentice_features: expected the apprentice's maps, or a Distiller made with apprentice= and "
            "apprentice_features="
        )

    def _gather(
        self,
        images: Any,
        boxes: Any,
        apprentice_features: Any,
        expert_features: Any,
        *,
        keys: Sequence[Any] | None = None,
        scores: Sequence[Tensor] | None = None,
        expert_images: Any = None,
        size: tuple[int, int] | None = None,
    ) -> Step:
        if self.normalized and self._check:
            refuse_padding(images)
        batch = image_batch("images", images)
        expert_batch = batch if expert_images is None else image_batch("expert_images", expert_images)
        apprentice = find_maps("apprentice_features", apprentice_features, self.layout)
        if expert_features is None:
            if self._check and not self._inspected and self._expert is not None:
                refuse_resizing(self._expert.hooks, expert_batch, "give the part behind it, such as expert.backbone")
            expert, found = self._run_expert(expert_batch, keys)
            scores = found if scores is None else scores
        else:
            expert = find_maps("expert_features", expert_features, self.expert_layout)
        if isinstance(scores, Mapping):
            raise TypeError(f"scores: expected a list, one per level of the expert, got a {type(scores).__name__}")
        names, order = pair_names(apprentice, expert), list(expert)
        if scores is not None and len(scores) == len(order):
            scores = [scores[order.index(name)] for name in names]
        expert = dict(zip(apprentice, (expert[name] for name in names), strict=True))
        return Step.make(batch, expert_batch, size, apprentice, expert, scores, boxes, self.box_format, self.normalized)

    def _begin(self, step: Step, *, check: bool | None = None) -> None:
        """Check; at the first step find missing facts and make the method."""
        known = step.size is not None or self._facts.strides is not None
        if known and (self._check if check is None else check):
            if not self._inspected:
                self._inspected = self._inspect(step).boxes > 0
            else:
                check_sizes(step, self._facts)
            if self._learns:
                check_learns(step.apprentice)
        if not self._begun:
            step = step.sized(self._facts.strides)
            if self.method is None or step.size is not None:
                self._facts = self._facts.completed(step)
            if self.method is None:
                self._build()
            elif self._method_name is not None and self._facts.expert_strides is not None:
                self.method.expert_strides = self._facts.expert_strides  # type: ignore[assignment]
            with torch.inference_mode(False):
                self.to(next(iter(step.apprentice.values())).device)
            self._begun = True

    @property
    def _learns(self) -> bool:
        """Whether this is a step of training; a loop of one's own may validate without calling `eval`."""
        return self.training and torch.is_grad_enabled()

    def _inspect(self, step: Step) -> Report:
        report = inspect(step, self._facts, self._options, (self.box_format, self.normalized))
        if self._rescale is True:
            warn_of_large_apprentice_maps(report.levels)
        return report

    def _weighted(self, step: Step, task_loss: Tensor | None, *, update: bool) -> Tensor:
        assert self.method is not None
        device = next(iter(step.apprentice.values())).device
        factor = None
        if self._scale is not None:
            maps = [*step.expert.values(), *(step.apprentice.values() if self._rescale == "both" else ())]
            if update:
                self._scale.look(maps, learns=self._learns)
            step = step.rescaled(self._scale.factors(maps))
        if self._energy is not None:
            if update:
                self._energy.look(lambda: step.energy(self.method), learns=self._learns)
            factor = self._energy.factor(device)
        weight = self._weight
        if not isinstance(weight, TaskShare):
            if weight != 1.0:
                number = number_on(device, weight)
                factor = number if factor is None else factor * number
            return step.loss(self.method, factor)
        if update and weight.measures(task_loss, learns=self._learns):
            loss = step.loss(self.method, factor)
            weight.update(task_loss, loss)
            return loss * weight.factor(device).to(loss.dtype)
        share = weight.factor(device)
        return step.loss(self.method, share if factor is None else factor * share)
