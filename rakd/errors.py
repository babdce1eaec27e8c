"""Errors that users can mend, apart from the program's own, and warnings in one line."""

import sys
from typing import TextIO


class UserError(ValueError):
    """An option, a file or a folder that a command cannot work with.

    The command line prints the message as one line. Every other error keeps its traceback.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or a folder is not there."""


class NotAFolderError(UserError, NotADirectoryError):
    """A file stands in the place of a folder."""


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, without the source line that raised it: commands' ``warnings.showwarning``."""
    print(f"rakd: warning: {message}", file=file or sys.stderr)
