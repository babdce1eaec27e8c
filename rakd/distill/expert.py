"""The expert: found in whatever was given, frozen, run without gradients, never copied."""

import functools
import math
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rakd.distill.cache import FeatureCache, fingerprint
from rakd.distill.hooks import FeatureHooks, Names, StopForward, check_function, run_for_maps, unwrap
from rakd.distill.outputs import Layout, find_maps, version
from rakd.distill.scale import mean_square


def find_modules(given: Any, depth: int = 3) -> list[nn.Module]:
    """Find the modules in an expert: itself, the object whose method it is, or what an object holds.

    Args:
        given: A module, a method, a ``partial``, a list, a dict, or an object with modules as attributes. Functions
            are not searched.
        depth: Levels of objects to follow.

    Returns:
        Modules, each once; empty where there are none.
    """
    if isinstance(given, nn.Module):
        return [given]
    parts: Iterable[Any] = ()
    if isinstance(given, functools.partial):
        parts = (given.func, *given.args, *given.keywords.values())
    elif isinstance(given, types.MethodType):
        parts = (given.__self__,)
    elif isinstance(given, (list, tuple)):
        parts = given
    elif isinstance(given, dict):
        parts = given.values()
    elif not isinstance(given, (types.FunctionType, types.ModuleType, type, Tensor)):
        parts = getattr(given, "__dict__", {}).values()
    inner = (find_modules(part, depth - 1) for part in parts) if depth else ()
    return list({id(module): module for modules in inner for module in modules}.values())


def _missing_expert() -> None:
    """Stand in for an expert in a pickle, which does not hold it."""


class Expert:
    """Runs an expert. Deep copies are the expert itself, pickles hold None in its place.

    Args:
        given: See `rakd.distill.distiller.Distiller`.
        features: Same.
        scores: Names of the modules that give class logits.
        layout: Of the expert's maps.
        dtype: The expert is converted to; None: as it is.
        channels_last: Whether it runs in that memory format.
        compiled: Whether, or with which options, ``torch.compile`` is applied.
        cache: Keeps features.

    Raises:
        TypeError: This is no expert, or its module cannot be found, as in a function.
    """

    def __init__(
        self,
        given: Any,
        *,
        features: Names | Callable[..., Any] | None = None,
        scores: Names | None = None,
        layout: Layout = "NCHW",
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        compiled: bool | dict[str, Any] = False,
        cache: FeatureCache | None = None,
    ) -> None:
        self.given = given
        self.layout = layout
        self.dtype = dtype
        self.channels_last = channels_last
        self.cache = cache
        self.hooks: FeatureHooks | None = None
        self.score_hooks: FeatureHooks | None = None
        self._print: tuple[tuple[Any, ...], str] | None = None
        self._served = 0  # batches of which something came from the cache
        source, runs = given, given
        if isinstance(given, tuple) and len(given) == 2 and callable(given[1]) and not isinstance(given[1], nn.Module):
            source, runs = given
            self.roots = [] if source is None else find_modules(source)
        else:
            if not callable(given) and not hasattr(given, "extract_features"):
                raise TypeError(
                    "expert: expected a module, a method of one, an object with extract_features, or "
                    f"(module, function), got {type(given).__name__}"
                )
            self.roots = find_modules(given)
        if not self.roots and source is not None:
            raise TypeError(
                f"expert: could not find the module inside this {type(given).__name__}, so that it cannot be frozen "
                "and put into eval mode; pass the module, with features=function(module, images), or "
                "(module, function), or (None, function) for an expert that is no torch module"
            )
        self._modules = [module for root in self.roots for module in root.modules()]
        self._parameters = [parameter for root in self.roots for parameter in root.parameters()]
        named = features is not None and not callable(features)
        if features is not None and len(self.roots) != 1:
            raise TypeError(f"features: expected one expert module to take them from, got {len(self.roots)}")
        if callable(features):
            if runs is not given:
                raise TypeError("features: expected names of modules beside (module, function), got another function")
            check_function("features", features)
        names: tuple[tuple[str, str], ...] = ()
        if named:
            self.hooks = FeatureHooks(self.roots[0], cast(Names, features), "features")
            names = tuple(self.hooks.names)
        if scores is not None:
            if self.hooks is None:
                raise ValueError("scores: expected features= by names of modules as well, from the same run")
            self.score_hooks = FeatureHooks(self.roots[0], scores, "scores")
            names += tuple(self.score_hooks.names)
        kind = type(unwrap(self.roots[0]) if self.roots else given).__name__
        self.described = f"{kind}:{names}:{layout}:{dtype}"
        run: Callable[[Tensor], Any]
        if features is not None and not named:
            run = functools.partial(cast(Callable[..., Any], features), given)
        elif named and isinstance(runs, nn.Module):
            run = runs
        else:
            run = getattr(runs, "extract_features", runs)
        self._run = run
        if compiled:
            self._run = torch.compile(run, **(compiled if isinstance(compiled, dict) else {}))
        # A compiled network cannot be left in the middle, nor a compiled function.
        compiles = any(hasattr(root, "_orig_mod") for root in self.roots) or hasattr(run, "_torchdynamo_orig_callable")
        plain = not compiled and not compiles
        self._stops_early = named and plain
        self._ran_whole = False
        for root in self.roots:
            if dtype is not None:
                root.to(dtype)
            if channels_last:
                root.to(memory_format=torch.channels_last)
        self.freeze()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Expert":
        """Stay one: an expert is never copied."""
        return self

    def __reduce__(self) -> Any:
        """Stay out of pickles."""
        return _missing_expert, ()

    def freeze(self) -> None:
        """Freeze and put into eval mode, also what overrides ``eval`` or was switched back by someone."""
        for root in self.roots:
            root.eval()
        for module in self._modules:
            module.training = False
        for parameter in self._parameters:
            parameter.requires_grad_(False)

    def move(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        """Take part in ``to``, ``cuda`` and the like; a dtype of its own stays."""
        for root in self.roots:
            # Some networks (ultralytics') override _apply without its second argument.
            root._apply(fn) if recurse else root._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if self.dtype is not None:
                root.to(self.dtype)

    def fingerprint(self) -> str:
        """Hash of what features depend on besides the image: parameters, buffers, and the names of the modules.

        The contents are hashed anew only when autograd's version counters, addresses or dtypes changed, which costs no
        look at the values. Changes through ``tensor.data`` and by fused optimizers are not seen.
        """
        held = (t for m in self._modules for t in (*m._parameters.values(), *m._buffers.values()))
        tensors = [tensor for tensor in held if tensor is not None]
        state = tuple((tensor.data_ptr(), version(tensor), tensor.dtype) for tensor in tensors)
        if self._print is None or self._print[0] != state:
            self._print = (state, fingerprint(tensors, self.described))
        return self._print[1]

    def __call__(
        self, images: Tensor, keys: Sequence[Any] | None = None
    ) -> tuple[dict[str, Tensor], list[Tensor] | None]:
        """Give the maps of a batch, and the scores' where they were asked for.

        Args:
            images: The expert's input.
            keys: For the cache, one for each image: its id and the state of its augmentation.

        Raises:
            ValueError: A batch has other features in the cache than the expert gives. The 1st, 4th, 16th and so on are
                compared.
        """
        if self.cache is None or keys is None:
            if self.cache is not None and not torch.compiler.is_compiling():
                warnings.warn(
                    "cache: keeps nothing of calls without keys; give keys=, one for each image", stacklevel=2
                )
            return self._fresh(images)
        kind, autocast = self._autocast(images)
        precision = f"-{torch.get_autocast_dtype(kind)}" if autocast else ""
        hits = self.cache.hits
        found = self.cache.get(images, keys, self.fingerprint() + precision, self._fresh)
        if self.cache.hits > hits:
            self._served += 1
            if math.log(self._served, 4) % 1 == 0:  # a key may leave out what differs now and then
                self._compare(found[0], self._fresh(images)[0])
        return found

    def _compare(self, cached: dict[str, Tensor], fresh: dict[str, Tensor]) -> None:
        """Refuse features of another function, which no hash can tell apart, or of other images with these keys."""
        for name, feature in fresh.items():
            other = cached.get(name)
            # Rounding differs between batches, and with the cache's dtype: a root mean square of 5 % is no rounding.
            limit = 0.05**2 * mean_square(feature)
            if other is None or other.shape != feature.shape or mean_square(other - feature) > limit:
                raise ValueError(
                    f"cache: expected what the expert gives for this batch, got another map {name!r}: keys must hold "
                    "all that an image's pixels depend on (its id, and its augmentation), and features= by another "
                    "function needs a cache of its own"
                )

    def _autocast(self, images: Any) -> tuple[str, bool]:
        """Kind of device, and whether the expert runs in the autocast that is on there."""
        kind = images.device.type if isinstance(images, Tensor) else "cpu"
        return kind, torch.is_autocast_enabled(kind) and self.dtype is None

    def _fresh(self, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor] | None]:
        if any(module.training for module in self._modules) or any(p.requires_grad for p in self._parameters):
            self.freeze()
        if self._parameters and isinstance(images, Tensor):
            first = self._parameters[0]
            if first.device != images.device:
                for root in self.roots:
                    root.to(images.device)
                first = self._parameters[0]
            if images.is_floating_point() and first.is_floating_point():
                images = images.to(first.dtype)
        if self.channels_last and isinstance(images, Tensor):
            images = images.contiguous(memory_format=torch.channels_last)
        kind, autocast = self._autocast(images)
        with torch.no_grad(), torch.autocast(kind, enabled=autocast):
            output = self._outputs(images)
        maps = find_maps("expert's output", output, self.layout)
        maps = {name: feature.detach() for name, feature in maps.items()}
        if self.score_hooks is None:
            return maps, None
        scores = self.score_hooks.take()
        return maps, [scores] if isinstance(scores, Tensor) else list(scores)

    def _outputs(self, images: Tensor) -> Any:
        if self.hooks is None:
            return self._run(images)
        groups = [hooks for hooks in (self.hooks, self.score_hooks) if hooks is not None]
        for hooks in groups:
            if hooks.closed:
                hooks.open()
            hooks.clear()
        if not self._stops_early:
            self._run(images)
        elif not self._ran_whole:  # to see whether each module runs once
            run_for_maps(self._run, images, groups)
            self._stops_early, self._ran_whole = not any(hooks.repeated for hooks in groups), True
        else:
            self._run_until_ready(images, groups)
        return self.hooks.take()

    def _run_until_ready(self, images: Tensor, groups: Sequence[FeatureHooks]) -> None:
        """Run until all maps are there."""
        for hooks in groups:
            hooks.stop_when = lambda: all(g.ready for g in groups)
        try:
            self._run(images)
        except StopForward:
            pass
        finally:
            for hooks in groups:
                hooks.stop_when = None

    def close(self) -> None:
        """Remove the hooks. They come back when the expert runs again, for others may use it."""
        for hooks in (self.hooks, self.score_hooks):
            if hooks is not None:
                hooks.close()
