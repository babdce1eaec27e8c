"""Files of a training run: checkpoints to go on from, and the weights of a finished model.

Both are written atomically and hold tensors, numbers and text only, so that reading one runs no code.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rakd.errors import UserError
from rakd.files import atomic_write, check_file

_CHECKPOINT, _WEIGHTS = "rakd checkpoint 1", "rakd weights 1"


def save_weights(path: Path, state: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Write the weights of a model and what it takes to build it.

    Args:
        path: The file.
        state: ``model.state_dict()``; tensors of any device.
        config: Plain values (numbers, text, lists, dicts with text keys) that say which model this is.

    Raises:
        TypeError: ``config`` holds something else.
        ValueError: ``config`` holds a number that is not finite.
    """
    # Cloned, since a file holds the whole storage of a tensor that is a part of one.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    _write(path, {"format": _WEIGHTS, "config": to_jsonable(config, "config"), "state": tensors})


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote.

    Returns:
        The state, on the CPU, and the config; tuples in it have become lists.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a file of weights.
    """
    content = _read(path, _WEIGHTS)
    return content["state"], content["config"]


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: The file.
        content: Tensors of any device, numbers, text, None, and lists and dicts of them.
    """
    _write(path, {"format": _CHECKPOINT, **content})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, with tensors on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a checkpoint.
    """
    return _read(path, _CHECKPOINT)


def file_digest(path: Path) -> str:
    """Hash a file's content, to tell it from others.

    Raises:
        MissingFileError: There is no such file.
    """
    check_file(path, "a file of weights")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def to_jsonable(values: Mapping[str, object], name: str) -> dict[str, Any]:
    """Values as they come back from a file: tuples become lists.

    Args:
        values: Numbers, text, None, lists and dicts with text keys.
        name: The argument's, for errors.

    Raises:
        TypeError: There is something else in it.
        ValueError: A number is not finite.
    """
    try:
        result: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    except TypeError as error:
        raise TypeError(f"{name} must hold numbers, text, lists and dicts only: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name} must hold finite numbers and no cycles: {error}") from None
    return result


def config_diff(there: Mapping[str, object], here: Mapping[str, object]) -> list[str]:
    """Say in which entries two nested dicts of plain values differ.

    Returns:
        Such as ``"settings.steps is 8 there and 4 here"``, sorted; empty if they are equal.
    """
    a, b = _flat(there), _flat(here)
    absent = "absent"
    return [
        f"{name} is {a.get(name, absent)} there and {b.get(name, absent)} here"
        for name in sorted(a.keys() | b.keys())
        if a.get(name, absent) != b.get(name, absent)
    ]


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    result = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{name}."))
        else:
            result[prefix + name] = repr(value)
    return result


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        # Into an open file: given a path, torch puts its random name into the file, which then has another digest.
        with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # of torch's writer, as where the disk is full
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: cannot be written; is the disk full? ({reason})") from error


def _read(path: Path, format_: str) -> dict[str, Any]:
    kind = format_.split()[1]
    check_file(path, f"a file of {kind}, such as detector.pt of a run" if kind == "weights" else f"a file of {kind}")
    if not zipfile.is_zipfile(path):  # what torch.save writes is one, with its end at the end
        what = "is of another kind, or cut off" if Path(path).stat().st_size else "is empty"
        raise UserError(f"{path}: expected a file of {kind}, this one {what}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message is advice on reading files that may run code: none of it holds here.
        raise UserError(f"{path}: expected a file of {kind}, this holds other things than tensors and text") from error
    except Exception as error:
        # A foreign or damaged archive makes torch raise nearly anything.
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: expected a file of {kind}, this cannot be read as one: {reason}") from error
    there = content.get("format") if isinstance(content, dict) else None
    if there != format_:
        raise UserError(f"{path}: expected the format {format_!r}, got {there!r}")
    return dict(content)
