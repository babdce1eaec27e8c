"""Life of a distiller's expert and apprentice: attached, copied, moved, saved and detached."""

import json
import math
import pickle
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rakd.distill import Rescale
from rakd.distill.expert import Expert, find_modules
from rakd.distill.hooks import FeatureHooks, check_function, unwrap
from rakd.distill.methods import make_method
from rakd.distill.optim import add_parameters
from rakd.distill.outputs import Layout
from rakd.distill.scale import RunningEnergy, TaskShare, UnitScale
from rakd.distill.step import PartialSetup
from rakd.distributed import GradientAverage

if TYPE_CHECKING:
    from typing_extensions import Self


_STATE_BYTES = 4096

LEFT_OUT = "a function that was left out of the pickle"
"""In the place of the expert's ``features``."""


def _is_portable(function: Any) -> bool:
    """Whether a pickle can hold a function, with no network in it."""
    if find_modules(function):
        return False
    try:
        pickle.dumps(function)
    except Exception:  # functions inside others, and whatever a partial holds
        return False
    return True


def _move(method: nn.Module, others: Iterable[nn.Parameter]) -> None:
    """Bring a method to the device of the first of other parameters."""
    first = next(iter(others), None)
    if first is not None and first.device.type != "meta":
        method.to(first.device)


def _read_state(state: Tensor) -> dict[str, Any]:
    """What `Lifecycle.get_extra_state` wrote."""
    content: dict[str, Any] = json.loads(bytes(state.cpu().tolist()))
    return content


class Lifecycle(nn.Module):
    """The part of `rakd.distill.distiller.Distiller` that is not a training step.

    The expert is no submodule: a deep copy shares it, a pickle holds None in its place. The apprentice is none either,
    but is copied along, so that the hooks of a copy lie in the copied apprentice.
    """

    method: nn.Module | None
    expert_layout: Layout
    _method_name: str | None
    _options: dict[str, Any]
    _adapters: bool
    _seed: int
    _facts: PartialSetup
    _weight: float | TaskShare
    _rescale: Rescale
    _scale: UnitScale | None
    _energy: RunningEnergy | None
    _expert: Expert | None
    _expert_settings: dict[str, Any]
    _owns_expert: bool
    _apprentice: tuple[nn.Module | None]  # in a tuple, where nn.Module does not find it
    _apprentice_features: Any
    _hooks: FeatureHooks | None
    _sync: GradientAverage
    _optimizers: list[tuple[Any, int]]

    def attach(self, *, expert: Any = None, apprentice: nn.Module | None = None) -> None:
        """Take an expert or an apprentice, such as after unpickling, which leaves out the expert.

        Args:
            expert: See the class. In the place of another one, its scales are measured anew.
            apprentice: See the class.

        Raises:
            TypeError, ValueError: As the constructor.
        """
        if apprentice is not None and not isinstance(apprentice, nn.Module):
            raise TypeError(f"apprentice: expected a module, got {type(apprentice).__name__}")
        learns = self.apprentice if apprentice is None else unwrap(apprentice)
        wanted = self._apprentice_features
        if wanted is not None and learns is None:
            raise ValueError("apprentice: expected the network whose apprentice_features are named, got None")
        if learns is not None:
            given = expert.roots if isinstance(expert, Expert) else find_modules(expert)
            roots = given or (self._expert.roots if self._expert is not None else [])
            own = {id(p) for p in learns.parameters()}
            shared = [name for root in roots for name, p in root.named_parameters() if id(p) in own]
            if shared or any(unwrap(root) is learns for root in roots):
                raise ValueError(
                    f"expert: expected a network of its own, got one that shares {len(shared)} parameters with the "
                    f"apprentice, such as {shared[:1]}; the expert is frozen: give another network, or a deep copy"
                )
        if expert is not None:
            before = self._expert
            if isinstance(expert, Expert):
                left = (None, LEFT_OUT)
                listed = [name for name, value in self._expert_settings.items() if value not in left]
                if listed:
                    raise ValueError(f"{listed[0]}: expected as an argument of the Expert, got it beside one")
                self._expert = expert
            else:
                if self._expert_settings["features"] == LEFT_OUT:
                    raise ValueError(
                        "features: expected again, as the pickle left the function out that takes the expert's maps: "
                        "attach(expert=Expert(network, features=function))"
                    )
                self._expert = Expert(expert, layout=self.expert_layout, **self._expert_settings)
            self._owns_expert = True
            if before is not None and before is not self._expert:
                before.close()
                if before.given is not self._expert.given:
                    self._measure_anew()
        if apprentice is not None:
            self._apprentice = (learns,)
            if self._hooks is not None:
                self._hooks.close()
            if callable(wanted):
                check_function("apprentice_features", wanted)
            elif wanted is not None:
                assert learns is not None
                self._hooks = FeatureHooks(learns, wanted, "apprentice_features")

    def _measure_anew(self) -> None:
        """Forget scales, which belong to one expert."""
        self._scale = UnitScale() if self._rescale else None
        self._energy = None if self._energy is None else RunningEnergy()
        if isinstance(self._weight, TaskShare):
            self._weight = TaskShare(self._weight.share)

    @property
    def expert(self) -> Any:
        """The expert as it was given; None where there is none."""
        return None if self._expert is None else self._expert.given

    @property
    def apprentice(self) -> nn.Module | None:
        """The apprentice, where it was given."""
        return self._apprentice[0]

    @property
    def weight(self) -> float:
        """Factor of the loss; of ``"auto:..."``, as it is measured so far (waits for the device)."""
        if isinstance(self._weight, TaskShare):
            return float(self._weight.factor(torch.device("cpu")))
        return self._weight

    @property
    def _scales(self) -> list[UnitScale | RunningEnergy | TaskShare]:
        """Scales that are measured in training steps."""
        share = self._weight if isinstance(self._weight, TaskShare) else None
        return [scale for scale in (self._scale, self._energy, share) if scale is not None]

    @property
    def strides(self) -> tuple[float, ...] | None:
        """Strides of the apprentice's maps, once they are known."""
        return self._facts.strides

    def add_to(self, optimizer: Any, group: int = 0) -> None:
        """Have an optimizer that exists already train what the method learns; schedulers go on as before.

        Parameters join a group that is there, since a new one would break a scheduler. Those that are made at the first
        step join then. Before an optimizer's state is loaded, this must be called as it was when the state was saved.

        Args:
            optimizer: Any optimizer, or a wrapper with ``param_groups``.
            group: Index of the group whose settings they take.
        """
        add_parameters(optimizer, (), group)  # refuses what is no optimizer
        self._optimizers.append((optimizer, group))
        if self.method is not None:
            self._join_optimizers()

    def _build(self) -> None:
        """Make the method, and give what it learns to the optimizers that wait for it."""
        if self._method_name is None:
            return
        with torch.inference_mode(False):  # a loss may be asked for in evaluation first
            self.method = self._make().train(self.training)
            if self.apprentice is not None:
                _move(self.method, self.apprentice.parameters())
        self._join_optimizers()

    def _make(self) -> nn.Module:
        """The method as it is at first; of the same facts always the same."""
        assert self._method_name is not None
        facts = self._facts.state()
        made = make_method(self._method_name, **facts, seed=self._seed, adapters=self._adapters, **self._options)
        assert made is not None
        return made

    def _join_optimizers(self) -> None:
        """Give what the method learns to the optimizers that wait for it.

        It goes where an optimizer's other parameters are, as will the state that is loaded into the optimizer.
        """
        assert self.method is not None
        for optimizer, group in self._optimizers:
            own = set(map(id, self.parameters()))
            others = (p for each in optimizer.param_groups for p in each["params"] if id(p) not in own)
            _move(self.method, others)
            add_parameters(optimizer, list(self.parameters()), group)
        self._optimizers.clear()

    def close(self) -> None:
        """Remove all hooks."""
        for hooks in (self._hooks, self._expert, self._sync):
            if hooks is not None:
                hooks.close()

    def __enter__(self) -> "Self":
        """Remove all hooks at the end of the ``with`` block."""
        return self

    def __exit__(self, *_: Any) -> None:
        """See `close`."""
        self.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Lifecycle":
        """Take the expert along in ``to``, ``cuda``, ``double`` and all that nn.Module builds on this."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._expert is not None and self._owns_expert:
            self._expert.move(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Go back to a state of before the method was made, too, as tuners of trainers do."""
        extra = state_dict.get(f"{prefix}_extra_state")
        made = self.method is not None and self._method_name is not None
        if made and extra is not None and not PartialSetup.load(_read_state(extra)["facts"]).complete:
            fresh = self._make().state_dict()
            state_dict.update({f"{prefix}method.{key}": value for key, value in fresh.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def get_extra_state(self) -> Tensor:
        """Keep what was found and measured: JSON as bytes in a tensor, which all checkpoint formats and EMAs hold.

        Spaces bring it to one length, since EMAs and distributed checkpoints copy into tensors of before.
        """
        state = {
            "facts": self._facts.state(),
            "measured": self._measured,
            "rescale": self._rescale,
            "scale": None if self._scale is None else self._scale.state(),
            "energy": None if self._energy is None else self._energy.state(),
            "share": self._weight.state() if isinstance(self._weight, TaskShare) else None,
        }
        text = json.dumps(state)
        length = _STATE_BYTES * math.ceil(len(text) / _STATE_BYTES)
        return torch.tensor(list(text.ljust(length).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up `get_extra_state`; makes the method, so that its weights can be loaded.

        Raises:
            ValueError: Of this distiller and the saved one, one rescales the expert's maps and the other does not; or
                what was measured of one loss would scale another.
        """
        content = _read_state(state)
        if content["rescale"] != self._rescale:
            raise ValueError(
                f"rescale: expected {content['rescale']!r} as when the state was saved, got {self._rescale!r}"
            )
        share = content["share"] if isinstance(self._weight, TaskShare) else None
        energy = None if self._energy is None else content["energy"]
        before = content["measured"]
        counted = [state is not None and state[0] > 0 for state in (share, energy)]  # calls
        for name, matters in (("method", any(counted)), ("normalize", counted[0])):
            if not matters or before[name] == self._measured[name]:
                continue
            raise ValueError(
                f"{name}: expected {before[name]!r}, for whose loss the saved scale was measured, got "
                f"{self._measured[name]!r}; to measure anew, start without the saved state, or give a number as weight"
            )
        if self.method is None or not self._facts.complete:
            self._facts = self._facts.filled(PartialSetup.load(content["facts"]))
        if self.method is None and self._facts.complete:
            self._build()
        if self._scale is not None:
            self._scale.load(content["scale"])
        if self._energy is not None and energy is not None:
            self._energy.load(energy)
        if isinstance(self._weight, TaskShare) and share is not None:
            self._weight.load(share)

    @property
    def _measured(self) -> dict[str, Any]:
        """Settings that the loss's scales depend on."""
        method = self._method_name or type(self.method).__name__
        return {"method": method, "normalize": self._energy is not None}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process: functions of it, and optimizers, which hold their own copies."""
        settings = {**self._expert_settings, "cache": None}
        if callable(settings["features"]) and not _is_portable(settings["features"]):
            settings["features"] = LEFT_OUT
        return {**self.__dict__, "_optimizers": [], "_expert_settings": settings, "_owns_expert": False}

    def extra_repr(self) -> str:
        """Show the expert's kind and the weight in ``repr``."""
        weight = f"auto:{self._weight.share}" if isinstance(self._weight, TaskShare) else self._weight
        return f"expert={type(self.expert).__name__}, method={self._method_name}, weight={weight}"
