"""Hooks that note the outputs or inputs of named modules, and `tap`, which does so within a block.

Hooks lie in the tapped network, so they must not get in the way of what trainers do with it. A copy or pickle of the
network holds an inert function of the standard library in their place: it loads without this package, keeps no
tensors and copies no expert. A copy of hooks and network together (a deep copy or pickle of a
`rakd.distill.distiller.Distiller`) has hooks of its own.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rakd.distill.outputs import keep, list_tensors, versions

Names = str | Sequence[str]
"""Module names; ``"input:NAME"`` means what the module is given."""


class StopForward(BaseException):
    """Raised by the last of a network's hooks where the rest of its forward is not needed.

    A network's own ``except Exception`` does not stop it.
    """


class _Inert:
    """A hook that becomes inert in copies and pickles of the network: ``nullcontext().__exit__`` takes anything."""

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Hook(_Inert):
    """Notes what one module gives or is given."""

    def __init__(self, hooks: "FeatureHooks", key: str, side: str) -> None:
        self.hooks = hooks
        self.key = key
        self.side = side

    def __call__(self, module: nn.Module, arguments: Any, *rest: Any) -> None:
        """Note; ``rest`` is (keyword arguments) before the module runs, (output) after it."""
        if self.side == "input":
            keywords = rest[0] if rest else {}
            given = (*arguments, *keywords.values())
            self.hooks.note(self.key, given[0] if len(given) else None)
        else:
            self.hooks.note(self.key, rest[0])


class _Start(_Inert):
    """Forgets what was noted, when the network runs anew."""

    def __init__(self, hooks: "FeatureHooks") -> None:
        self.hooks = hooks

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        self.hooks.begin()


def parse_name(argument: str, name: Any) -> tuple[str, str]:
    """Split a name into the module's and "input" or "output".

    Raises:
        TypeError: This is no name.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected names of modules, got {name!r}")
    for side in ("input", "output"):
        if name.startswith(f"{side}:"):
            return name.removeprefix(f"{side}:"), side
    return name, "output"


def list_names(names: Any) -> list[Any]:
    """Bring one name or several to a list."""
    return [names] if isinstance(names, str) else list(names)


def check_function(argument: str, function: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with a network and images.

    Raises:
        TypeError: It takes other arguments.
    """
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise TypeError(f"{argument}: expected a function of (network, images) that gives maps: {error}") from None
    except ValueError:  # built in: it cannot be asked
        return


def unwrap(network: nn.Module) -> nn.Module:
    """The module inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = network.module
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def _in_backward() -> bool:
    """Whether a backward runs, in which gradient checkpointing runs modules again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _sizes(value: Any) -> list[torch.Size]:
    """Rows and columns of each map in a value."""
    return [tensor.shape[2:] for tensor in list_tensors(value)]


class FeatureHooks:
    """Hooks on modules of a network, from now until `close`.

    Args:
        network: Wrappers such as DistributedDataParallel are looked through.
        names: See `Names`; dots as in ``get_submodule``.
        argument: Name of the argument, for errors.

    Raises:
        ValueError: There is no such module; the error lists similar names.
    """

    def __init__(self, network: nn.Module, names: Names, argument: str) -> None:
        self.argument = argument
        self.whole = False  # what is noted is of one forward of the network
        # A run with gradients whose values were not handed over; None before the first step, and once that was told.
        self.unused: bool | None = None
        self.told: set[str] = set()  # warnings
        self.stop_when: Callable[[], bool] | None = None  # raise `StopForward` in the network when this holds
        self.names = [parse_name(argument, name) for name in list_names(names)]
        self.keys = [f"{side}:{name}" for name, side in self.names]
        if not self.keys or len(set(self.keys)) < len(self.keys):
            raise ValueError(f"{argument}: expected at least one name of a module, and none twice, got {self.keys}")
        self.values: dict[str, Any] = {}
        self.versions: dict[str, list[int]] = {}
        self.repeated: dict[str, bool] = {}  # modules that ran again in one forward: whether with maps of another size
        self.network: nn.Module | None = unwrap(network)
        # Copies have the modules, not the network: they are complete before the hooks are, even where the network holds
        # the distiller.
        self.modules = [self._find(self.network, name) for name, _ in self.names]
        self._handles: list[Any] = []
        self.open()

    def open(self) -> None:
        """Hook the modules."""
        self.closed = False
        if self.network is not None:
            self._handles.append(self.network.register_forward_pre_hook(_Start(self)))
        for module, key, (_, side) in zip(self.modules, self.keys, self.names, strict=True):
            hook = _Hook(self, key, side)
            if side == "input":
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(hook))

    def _find(self, network: nn.Module, name: str) -> nn.Module:
        modules: dict[str, nn.Module] = dict(network.named_modules())
        if name in modules:
            return modules[name]
        last = name.rpartition(".")[2]
        like = [other for other in modules if other and (other.endswith(f".{last}") or name.startswith(f"{other}."))]
        listed = like or [child for child, _ in network.named_children()]
        raise ValueError(
            f"{self.argument}: expected the name of a module of {type(network).__name__}, got {name!r}; "
            f"it has {', '.join(listed[:12])}"
        )

    def note(self, key: str, value: Any) -> None:
        """Keep a value (called by the hooks)."""
        if _in_backward():
            return
        value = keep(value)
        if key in self.values:
            self.repeated[key] = self.repeated.get(key, False) or _sizes(value) != _sizes(self.values[key])
            # A loop that calls the network's parts, so that `begin` sees no new forward; one part may run repeatedly.
            if not self.whole and len(self.repeated) == len(self.keys):
                self._see_unused(self.values[key])
        self.values[key] = value
        if not torch.compiler.is_compiling():
            self.versions[key] = versions(value)
            if self.stop_when is not None and self.stop_when():
                raise StopForward

    @property
    def ready(self) -> bool:
        """Whether all modules have run since the last `take`."""
        return len(self.values) == len(self.names)

    def begin(self) -> None:
        """Forget what was noted in other forwards of the network (called by the hooks)."""
        if not _in_backward():
            if self.ready:
                self._see_unused(list(self.values.values()))
            self.clear()
            self.whole = True

    def _see_unused(self, noted: Any) -> None:
        """Note that a run with gradients is replaced by another, with its values not handed over."""
        if self.unused is False and not torch.compiler.is_compiling():
            self.unused = any(tensor.requires_grad for tensor in list_tensors(noted))

    def clear(self) -> None:
        """Forget what was noted, and with it the graph."""
        self.values.clear()
        self.versions.clear()
        self.repeated.clear()
        self.whole = False

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self.told:
            warnings.warn(f"{self.argument}: {text}", stacklevel=7)  # the caller of the distiller
            self.told.add(kind)

    def take(self, *, stay: bool = False) -> Any:
        """Hand over what was noted: the value of a single name, or a list in the order of the names.

        Args:
            stay: Leave it noted.

        Raises:
            RuntimeError: A module did not run since the last time, ran on maps of several sizes in one forward of the
                network, or its output was changed in place afterwards.
        """
        for key in self.keys:
            if key not in self.values:
                raise RuntimeError(
                    f"{self.argument}: {key} did not run since the last step, so there are no maps; run the network "
                    "before the distiller, call modules as module(...), and step the distiller once for each run. A "
                    "closed distiller sees nothing, nor does one of a network that torch.compile had compiled before: "
                    "make it first, or call torch._dynamo.reset()"
                )
            if self.whole and self.repeated.get(key):
                raise RuntimeError(
                    f"{self.argument}: {key} ran more than once since the network's forward began, on maps of several "
                    "sizes, as a head that all levels share does; name modules that give each level, or all at once"
                )
            if key in self.versions and versions(self.values[key]) != self.versions[key]:
                raise RuntimeError(
                    f"{self.argument}: {key} was changed in place after it was noted (by a following inplace=True "
                    "activation); name the module that changed it instead"
                )
        taken = [self.values[key] for key in self.keys]
        if not stay:
            if not torch.compiler.is_compiling():
                if self.whole and self.repeated:  # no fault of an activation that a block calls several times
                    what = f"{', '.join(self.repeated)} ran more than once since the network's forward began; "
                    self._warn_once("repeated", what + "the maps of the last run are taken")
                if self.unused:  # not before the first step: distillation may begin after other steps
                    what = "the network ran more than once since the last step; the maps of its last run are taken; "
                    self._warn_once("unused", what + "step the distiller once for each run, or give it the maps")
                self.unused = None if "unused" in self.told else False
            self.clear()
        return taken[0] if len(taken) == 1 else taken

    def watch_once(self, network: nn.Module, images: Any) -> None:
        """Run a network on images for its maps alone: in eval mode and without gradients.

        Batch normalisation that trains takes the statistics of the batch, unless it is one image, for a fresh one has
        no others; its own stay as they are.
        """
        modes = [(module, module.training) for module in network.modules()]
        # Not the kind that waits for other processes, which may not be here.
        norms = [m for m, on in modes if on and isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
        norms = [] if isinstance(images, (Tensor, list, tuple)) and len(images) == 1 else norms
        kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
        network.eval()
        for norm in norms:
            norm.training = True
        try:
            with torch.no_grad():
                run_for_maps(network, images, [self])
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.closed = True
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out handles and tensors, which cannot be copied."""
        return {
            **self.__dict__,
            "network": None,
            "whole": False,
            "_handles": [],
            "values": {},
            "versions": {},
            "repeated": {},
            "stop_when": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hook the modules that were copied along; their own copies of the hooks are inert."""
        self.__dict__.update(state)
        if not self.closed:
            self.open()


def run_for_maps(run: Callable[..., Any], images: Any, groups: Sequence[FeatureHooks]) -> None:
    """Run a network whole; what fails behind its maps does not matter."""
    try:
        run(images)
    except Exception:
        if not all(hooks.ready for hooks in groups):
            raise


class Tap:
    """The last output of a tapped module; see `rakd.distill.hooks.tap`."""

    def __init__(self) -> None:
        self._noted: list[Any] = []  # the output, and the number of in-place changes of its tensors

    @property
    def output(self) -> Any:
        """The module's last output, with its graph.

        Raises:
            RuntimeError: The module did not run while it was tapped, or its output was changed in place afterwards.
        """
        if not self._noted:
            raise RuntimeError("the tapped module did not run inside the with block: there is no output")
        output, before = self._noted
        if before is not None and versions(output) != before:
            raise RuntimeError(
                "the tapped module's output was changed in place after it was noted (by a following inplace=True "
                "activation); tap the module that changed it instead"
            )
        return output


class _TapHook(_Inert):
    """Notes what a tapped module gives."""

    def __init__(self, noted: list[Any]) -> None:
        self.noted = noted

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        output = keep(output)
        self.noted[:] = [output, None if torch.compiler.is_compiling() else versions(output)]


@contextmanager
def tap(module: nn.Module) -> Iterator[Tap]:
    """Within the block, note what a module gives when others call it.

    For networks that keep their features to themselves: the features come from the very pass that the network's own
    losses come from. Under DistributedDataParallel tap ``network.module``'s parts. Calls of other methods than
    ``module(...)`` are not seen. For hooks that last, give `rakd.distill.distiller.Distiller` the modules' names.

    Args:
        module: Any part of a network.

    Yields:
        A ``Tap``; its ``output`` can be read during and after the block. It holds the output, and with it the graph,
        for as long as it lives itself.

    Raises:
        TypeError: This is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a module, got {type(module).__name__}")
    tapped = Tap()
    handle = module.register_forward_hook(_TapHook(tapped._noted))
    try:
        yield tapped
    finally:
        handle.remove()
