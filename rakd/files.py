"""Atomic file writing: a reader sees the old file or the whole new one, never a half."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block ends well.

    The parent folder is made if it is not there. When the block raises, the temporary file is removed
    and ``path`` stays as it was. The temporary name starts with a dot and keeps the suffix, since
    image writers look at it.

    Args:
        path: Where the finished file shall stand.

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


def check_folder(path: Path, name: str) -> None:
    """Make sure that files can be written into a folder, which need not be there yet.

    Args:
        path: The folder.
        name: The option's, for errors.

    Raises:
        NotADirectoryError: It is a file, or lies in one.
    """
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise NotADirectoryError(f"{name}: expected a folder to write to, {place} is a file")
            return


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8, with the same line ends on every system."""
    write_bytes(path, text.encode("utf-8"))
