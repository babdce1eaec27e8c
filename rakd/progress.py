"""Progress bars on long work."""

import sys
from typing import Any

from tqdm import tqdm

_IN_FILES = 30.0  # seconds between its states there


def bar(*arguments: Any, **options: Any) -> "tqdm[Any]":
    """A progress bar on stderr, as `tqdm.tqdm` makes it; written to a file, it moves once in half a minute."""
    if not sys.stderr.isatty():
        options.setdefault("mininterval", _IN_FILES)
    return tqdm(*arguments, **options)
