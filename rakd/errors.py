"""Errors that users can mend, apart from the program's own."""


class UserError(ValueError):
    """An option, a file or a folder that a command cannot work with.

    The command line prints the message as one line. Every other error keeps its traceback.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or a folder is not there."""


class NotAFolderError(UserError, NotADirectoryError):
    """A file stands in the place of a folder."""
