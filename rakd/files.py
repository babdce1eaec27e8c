"""Files: text as people's editors leave it; values as JSON takes them; atomic writing, never half a file."""

import codecs
import math
import os
import re
import secrets
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rakd.errors import MissingFileError, NotAFolderError, UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block ends well.

    The parent folder is made if it is not there. When the block raises, the temporary file is removed
    and ``path`` stays as it was. The temporary name starts with a dot and keeps the suffix, since
    image writers look at it.

    Args:
        path: Of the finished file.

    Yields:
        The temporary path to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_stale(paths: Iterable[Path]) -> None:
    """Remove temporary files of `atomic_write` that killed processes left.

    Args:
        paths: Files; others than temporary ones stay, and so do those younger than an hour, which may be another
            process's.
    """
    for path in paths:
        if re.fullmatch(r"\..+-[0-9a-f]{16}(\.\w+)?", path.name) and path.is_file():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask from working in a folder, which is made if it is not there.

    The end of the process frees it, too. Nothing is done where the system or the file system has no locks.

    Raises:
        UserError: Another process works there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another command, whose results would mix with these") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def check_folder(path: Path, name: str) -> None:
    """Make sure that files can be written into a folder, which need not be there yet.

    Args:
        path: The folder.
        name: The option's, for errors.

    Raises:
        NotAFolderError: It is a file, or lies in one.
    """
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise NotAFolderError(f"{name}: expected a folder to write to, {place} is a file")
            return


def check_output(path: Path, name: str, inputs: Collection[Path] = ()) -> None:
    """Make sure that a file can be written, before the work for it; it may be there.

    Args:
        path: The file.
        name: The option's, for errors.
        inputs: Files that are read, resolved, whose place it must not take.

    Raises:
        UserError: It is a folder or an input.
        NotAFolderError: Its folder is a file.
    """
    check_folder(path.parent, name)
    if path.is_dir():
        raise UserError(f"{name}: expected a file, {path} is a folder")
    if path.resolve() in inputs:
        raise UserError(f"{name}: expected another place, {path}, which is an input, would be overwritten")


def check_file(path: Path, expected: str) -> None:
    """Make sure that a file is there.

    Args:
        path: The file.
        expected: Such as "an image", for errors.

    Raises:
        MissingFileError: It is not, or is a folder.
    """
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "is not there"
        raise MissingFileError(f"{path} {what}: expected {expected}")


def read_text(path: Path, expected: str) -> str:
    """Read a text file: UTF-8, or UTF-16 with its byte-order mark, as shells on Windows write it.

    Byte-order marks are left out. Files that were joined have them in the middle, too.

    Args:
        path: The file.
        expected: Such as "a calibration file", for errors.

    Raises:
        MissingFileError: There is no such file.
        UserError: It cannot be read, or is not text.
    """
    check_file(path, expected)
    try:
        with Path(path).open("rb") as file:
            is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        return Path(path).read_text(encoding="utf-16" if is_utf16 else "utf-8").replace("\ufeff", "")
    except UnicodeError as error:
        raise UserError(f"{path}: not a text file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8, with the same line ends on every system."""
    write_bytes(path, text.encode("utf-8"))


def without_nan(value: Any) -> Any:
    """Nested dicts, lists and tuples with None for every float that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
