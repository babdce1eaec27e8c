"""A bounded cache of an expert's features, in memory or in a folder that several processes may share."""

import hashlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rakd.files import atomic_write, remove_stale

Features = tuple[dict[str, Tensor], list[Tensor] | None]
"""Maps by name, and class logits where they were asked for."""


def fingerprint(tensors: Sequence[Tensor], described: str) -> str:
    """Hash the contents of tensors.

    Args:
        tensors: Parameters and buffers.
        described: Everything else that the features depend on.
    """
    digest = hashlib.sha256(described.encode())
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel():
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(content.numpy().tobytes())
    return digest.hexdigest()[:24]


class FeatureCache:
    """Keeps what the expert gave for an image, by a key that the caller makes of image and augmentation.

    An entry belongs to one expert in one state and one input size: another expert, changed parameters or other images'
    sizes are misses. Features come back in the dtype that they were stored in, in the batch's order; images that are
    not there are run together. Memory and folder are bounded; the entries unused for longest go first.

    Args:
        folder: Folder of the entries' files; None: entries are in memory, on the device where they were made. Files
            are written to temporary names and renamed, so that several processes and data-loading workers may share the
            folder.
        max_bytes: Bound of all entries together; 2 GiB unless given. Processes that share a folder may exceed it, by a
            sixteenth each.
        dtype: To store features in, such as ``torch.float16``; None: their own.

    Raises:
        ValueError: The bound is not positive.

    Example:
        >>> cache = FeatureCache("features", max_bytes=20 * 2**30)
        >>> distiller = Distiller(expert, cache=cache)
        >>> loss = distiller(images, boxes, maps, keys=[(image_id, flipped) for image_id, flipped in batch])
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        max_bytes: int = 2 * 2**30,
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes: expected a positive number, got {max_bytes}")
        self.folder = None if folder is None else Path(folder)
        self.max_bytes = max_bytes
        self.dtype = dtype
        self.hits = 0
        self.misses = 0
        self._memory: OrderedDict[str, tuple[int, Features]] = OrderedDict()
        self._bytes = 0
        self._writes = True
        self._written = 0
        self._room = max_bytes // 16  # bytes that are freed at once where a folder is full

    def get(self, images: Tensor, keys: Sequence[Any], fingerprint: str, run: Callable[[Tensor], Features]) -> Features:
        """Give a batch's features, running the expert on the images that are not there.

        Args:
            images: ``[B, ...]``.
            keys: One for each image: numbers (also of NumPy, or tensors of one), text, and tuples or lists of them.
            fingerprint: Of the expert.
            run: Gives the features of images.

        Raises:
            ValueError: There are more or fewer keys than images.
            TypeError: A key holds something else.
        """
        if len(keys) != len(images):
            raise ValueError(f"keys: expected {len(images)}, one per image, got {len(keys)}")
        names = [self._name(key, fingerprint, images) for key in keys]
        entries = {name: self._read(name, images.device) for name in dict.fromkeys(names)}
        absent = [name for name, entry in entries.items() if entry is None]
        self.misses += len(absent)
        self.hits += len(entries) - len(absent)
        if absent:
            for i, name in enumerate(names):
                first = names.index(name)
                if first < i and name in absent and not torch.equal(images[first], images[i]):
                    raise ValueError(
                        f"keys: expected a key of its own for each image, got {keys[i]!r} for two that differ; keys "
                        "must hold all that an image's pixels depend on (its id, and its augmentation)"
                    )
            picked = [names.index(name) for name in absent]
            whole = len(picked) == len(images)
            maps, scores = run(images if whole else images[picked])
            for i, name in enumerate(absent):
                fresh = ({key: self._stored(m[i]) for key, m in maps.items()}, _each(scores, i, self._stored))
                entries[name] = fresh
                self._write(name, fresh)
        found = [entry for name in names if (entry := entries[name]) is not None]
        maps = {key: torch.stack([entry[0][key] for entry in found]) for key in found[0][0]}
        if found[0][1] is None:
            return maps, None
        return maps, [torch.stack([entry[1][i] for entry in found if entry[1]]) for i in range(len(found[0][1]))]

    def _stored(self, feature: Tensor) -> Tensor:
        return feature.detach().to(self.dtype or feature.dtype).clone()

    @staticmethod
    def _name(key: Any, fingerprint: str, images: Tensor) -> str:
        try:
            text = json.dumps([key, list(images.shape[1:]), fingerprint], default=_plain)
        except TypeError as error:
            raise TypeError(f"keys: expected numbers, text, and tuples or lists of them, got {key!r}") from error
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def _read(self, name: str, device: torch.device) -> Features | None:
        if self.folder is None:
            if name not in self._memory:
                return None
            self._memory.move_to_end(name)
            maps, scores = self._memory[name][1]
            return {key: m.to(device) for key, m in maps.items()}, scores and [score.to(device) for score in scores]
        path = self.folder / f"{name}.pt"
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except OSError as error:  # the expert can run instead
            warnings.warn(f"cache: {path} cannot be read: {error}", stacklevel=2)
            return None
        except MemoryError:
            raise
        except Exception:  # a damaged file raises nearly anything
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # of another user, or in a folder to be read only
            os.utime(path)  # what was used last goes last
        maps, scores = content["maps"], content["scores"]
        return {key: m.to(device) for key, m in maps.items()}, scores and [score.to(device) for score in scores]

    def _write(self, name: str, entry: Features) -> None:
        maps, scores = entry
        size = sum(t.numel() * t.element_size() for t in (*maps.values(), *(scores or ())))
        if size > self.max_bytes or not self._writes:
            return
        if self.folder is None:
            self._memory[name] = (size, entry)
            self._bytes += size
            while self._bytes > self.max_bytes:
                _, (freed, _) = self._memory.popitem(last=False)
                self._bytes -= freed
            return
        content = {"maps": {k: m.cpu() for k, m in maps.items()}, "scores": scores and [s.cpu() for s in scores]}
        try:
            with atomic_write(self.folder / f"{name}.pt") as temporary:
                torch.save(content, temporary)
        except (OSError, RuntimeError) as error:  # the latter of torch's writer
            # A training does not depend on it.
            self._writes = False
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"cache: {self.folder} cannot be written, so no more is kept there: {reason}", stacklevel=2)
            return
        self._written += size
        # Looking through the folder costs a call per file: not at every write, also where it is full.
        if self._bytes == 0 or self._written > self._room or self._bytes + self._written > self.max_bytes:
            self._written = 0
            self._bytes = self._trim()

    def _trim(self) -> int:
        """If the folder is over its bound, free a sixteenth of it, what was unused for longest first.

        Leftovers of killed processes go in any case.
        """
        assert self.folder is not None
        remove_stale(self.folder.glob(".*.pt"))
        files = []
        for path in self.folder.glob("[!.]*.pt"):
            with suppress(FileNotFoundError):  # another process removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        files.sort(key=lambda file: file[:2])
        total = sum(size for _, size, _ in files)
        most = self.max_bytes if total <= self.max_bytes else self.max_bytes - self._room
        for _, size, path in files:
            if total <= most:
                break
            path.unlink(missing_ok=True)
            total -= size
        return max(total, 1)

    def __len__(self) -> int:
        """Number of entries."""
        if self.folder is None:
            return len(self._memory)
        return sum(not path.name.startswith(".") for path in self.folder.glob("*.pt"))

    def clear(self) -> None:
        """Remove all entries."""
        self._memory.clear()
        self._bytes = self._written = 0
        if self.folder is not None:
            for path in self.folder.glob("*.pt"):
                path.unlink(missing_ok=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureCache":
        """Stay one, as the expert does."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave entries out of pickles."""
        return {**self.__dict__, "_memory": OrderedDict(), "_bytes": 0}


def _plain(value: Any) -> Any:
    """The number in a scalar of NumPy or a tensor, as data sets hold them in the place of an int."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):  # of anything else, an array, a tensor
        raise TypeError from None


def _each(scores: list[Tensor] | None, image: int, keep: Callable[[Tensor], Tensor]) -> list[Tensor] | None:
    return None if scores is None else [keep(score[image]) for score in scores]
