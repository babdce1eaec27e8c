"""Tensors on ``cuda:0`` without a GPU: every operation runs on the CPU, over the memory of the CUDA tensors.

``fake_driver.cpp`` must be preloaded.
Allocation, pinned memory, streams, the autograd engine's device threads, autocast
and the dispatch by device are torch's own then. `FakeCuda` is a dispatch mode that refuses operands of two devices as
CUDA would, names operations that have no CUDA kernel, and notes with its place all that the host waits for. It shows no
numerics, times or races of a GPU.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

# The host needs a value, or a shape that the device finds.
_WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
    *("equal", "is_nonzero", "nms", "repeat_interleave"),
}
# They look at shapes only, or allocate: torch's CUDA code runs without a kernel.
_NATIVE = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"),
    *("_reshape_alias", "set_", "resize_", "is_pinned", "record_stream", "_unsafe_view", "device", "_pin_memory"),
    *("is_same_size", "_resize_output_", "as_strided", "_has_compatible_shallow_copy_type", "sym_size"),
}
_COPIES = {"copy_", "_to_copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_KERNELS = ("CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional")


class DeviceMismatch(RuntimeError):
    """Operands on two devices."""


class Wait(NamedTuple):
    """Something that holds the host up until the device is done.

    Attributes:
        what: Kind and operation.
        place: File and function that asked.
        operations: How many operations the device had been given before.
    """

    what: str
    place: str
    operations: int


class FakeCuda(TorchDispatchMode):
    """Runs CUDA operations on the CPU while it is entered.

    Attributes:
        waits: What the host waited for.
        mixed: Operations that took a number of the host as a tensor.
        without_kernel: Operations that CUDA does not have.
        names: Operations in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.mixed: list[str] = []
        self.without_kernel: set[str] = set()
        self.names: list[str] = []

    def __enter__(self) -> Any:
        # Numbers and lists become tensors of the device where no dispatch mode sees it.
        self._originals = [(owner, name, getattr(owner, name)) for owner, name in _MAKERS]
        for owner, name, original in self._originals:
            setattr(owner, name, self._noting(name, original))
        return super().__enter__()

    def __exit__(self, *arguments: Any) -> None:
        super().__exit__(*arguments)
        for owner, name, original in self._originals:
            setattr(owner, name, original)

    def _noting(self, name: str, original: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            data = args[1] if name == "new_tensor" else args[0] if args else kwargs.get("data")
            if isinstance(result, Tensor) and result.device.type == "cuda" and not isinstance(data, Tensor):
                self._wait(f"torch.{name} of host values")
            return result

        return make

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        on_gpu = [t for t in tensors if t.device.type == "cuda"]
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        to_gpu = asked is not None and asked.type == "cuda"
        if (not on_gpu and not to_gpu) or name in _NATIVE or func.is_view:
            return func(*args, **kwargs)
        self.names.append(func._schema.name)
        if name in _COPIES:
            return self._copy(func, name, args, kwargs)
        self._check(name, args, tensors)
        if not any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in _KERNELS):
            self.without_kernel.add(func.name())
        if to_gpu:
            kwargs["device"] = CPU
        on_host = tree_map(lambda t: host_view(t) if isinstance(t, Tensor) else t, (args, kwargs))
        result = _run(func, *on_host)
        return _returned(func, result, args, kwargs, CPU if asked is not None and not to_gpu else GPU)

    def _check(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        """Note waits; refuse operands of two devices but for indices and numbers of the host."""
        if name in _WAITS:
            self._wait(name)
        others = [t for t in tensors if t.device.type != "cuda"]
        if name in _INDEXING:
            indices = [t for t in args[1] if isinstance(t, Tensor)]
            # A mask filled with a number needs no shape from the device.
            fills = len(args) > 2 and args[2].numel() == 1 and args[2].device.type == "cpu"
            if any(t.dtype in (torch.bool, torch.uint8) for t in indices) and not fills:
                self._wait(f"{name} by mask")
            if any(t.device.type == "cpu" for t in indices):
                self._wait(f"{name} by the host's indices")
            others = [t for t in others if t.dim() and not any(t is i for i in indices)]
        elif others and all(t.dim() == 0 for t in others):
            self.mixed.append(f"{name} {_place()}")
            return
        if others:
            raise DeviceMismatch(f"{name}: operands on two devices: {[f'{t.device} {list(t.shape)}' for t in tensors]}")

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        source, target = (args[1], args[0].device) if name == "copy_" else (args[0], kwargs.get("device"))
        to = GPU.type if target is None else torch.device(target).type
        non_blocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        # Between pinned memory and the device copies can run by themselves.
        host = source if to == "cuda" else args[0] if name == "copy_" else None
        alone = non_blocking and host is not None and host.is_pinned()
        if to != source.device.type and not alone:
            self._wait(f"copy to {'host' if to == 'cpu' else 'device'}")
        if name == "copy_":
            host_view(args[0]).copy_(host_view(source))
            return args[0]
        options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
        result = func(host_view(source), **options)
        return on_device(result) if to == "cuda" else result

    def _wait(self, what: str) -> None:
        self.waits.append(Wait(what, _place(), len(self.names)))


_MAKERS = ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor"))


def host_view(t: Tensor) -> Tensor:
    """A CPU tensor over the memory of a CUDA tensor."""
    if t.device.type != "cuda":
        return t
    storage = t.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(raw, t.storage_offset(), t.shape, t.stride())


def on_device(t: Tensor) -> Tensor:
    """A CUDA tensor with the values and strides of a CPU tensor."""
    dense = t.contiguous() if any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride(), strict=True)) else t
    result = torch.empty_strided(dense.shape, dense.stride(), dtype=t.dtype, device=GPU)
    if dense.numel():
        host_view(result).copy_(dense)
    return result


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if func._schema.name == "rakd_ops::scale_gradients":  # which the CUDA library alone has
        for gradient in args[0]:
            gradient.copy_(gradient.to(args[1].dtype) * args[1])
        return None
    return func(*args, **kwargs)


def _returned(func: Any, result: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
    """Results on the device; what was written in place is the argument itself."""
    written = {}
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = kwargs.get(argument.name, args[i] if i < len(args) else None)
            written.update(dict.fromkeys(argument.alias_info.before_set, given))

    def place(value: Any) -> Any:
        return on_device(value) if device.type == "cuda" and isinstance(value, Tensor) else value

    values = result if isinstance(result, tuple) else (result,)
    out = []
    for value, returned in zip(values, func._schema.returns, strict=False):
        names = returned.alias_info.before_set if returned.alias_info is not None else ()
        own = [written[name] for name in names if name in written]
        out.append(own[0] if own else tree_map(place, value))
    return tuple(out) if isinstance(result, tuple) else out[0] if out else None


def _place() -> str:
    """File and function of the innermost caller that is neither this file nor torch's."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "site-packages/torch/" not in name and name != __file__ and "importlib" not in name:
            return f"{'/'.join(name.split('/')[-2:])} {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd engine"
