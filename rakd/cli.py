"""The command line, ``rakd`` or ``python -m rakd``: hands the arguments to one of the commands.

To add a command, write its dataclass in `rakd.commands` and name it in `_commands`.
"""

import contextlib
import errno
import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Protocol, cast

from rakd.errors import UserError, show_warning

USER_ERROR = 2
INTERRUPTED = 130

# Commands that go on where they stopped.
_RESUMING = ("Distill", "Train", "MakeScenes", "ConvertWaymo")


# Of torch's errors, for memory of the GPU and of the machine.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "not enough memory", "can't allocate memory")
# Options that take less memory, as far as a command has them.
_SAVING = {"batch_size": "lower --batch-size", "amp": "set --amp bfloat16"}


class Command(Protocol):
    """A command: options as fields, work in ``run``."""

    def run(self) -> None:
        """Do what the command says."""


def _commands() -> dict[str, Any]:
    from rakd.commands.compare import Compare
    from rakd.commands.convert_waymo import ConvertWaymo, ExportWaymo
    from rakd.commands.distill import Distill
    from rakd.commands.evaluate import Evaluate
    from rakd.commands.export import Export
    from rakd.commands.inspect import Inspect
    from rakd.commands.latency import Latency
    from rakd.commands.make_scenes import MakeScenes
    from rakd.commands.predict import Predict
    from rakd.commands.show import Show
    from rakd.commands.train import Train

    return {
        "distill": Distill,
        "train": Train,
        "predict": Predict,
        "export": Export,
        "evaluate": Evaluate,
        "compare": Compare,
        "show": Show,
        "latency": Latency,
        "inspect": Inspect,
        "make-scenes": MakeScenes,
        "convert-waymo": ConvertWaymo,
        "export-waymo": ExportWaymo,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        Exit code: 0; 2 for a user's error or a lack of memory, after one line on stderr that says what is wrong; 130
        if interrupted. ``--help`` and ``--version`` exit from within, by SystemExit with 0; errors of the program
        itself are raised.
    """
    command: Command | str = ""
    try:
        command = _parse(argv)
        if isinstance(command, str):
            return _fail(command)
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            command.run()
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("rakd", "rakd_ops"):
            raise
        if "pip install" in str(error):
            return _fail(str(error))
        name = str(error.name)
        extra = "waymo" if name in ("pyarrow", "scipy") else "export" if name.startswith("onnx") else "train"
        return _fail(f"{error.name} is not installed; run: pip install '.[{extra}]'")
    except KeyboardInterrupt:
        resumes = type(command).__name__ in _RESUMING
        print(f"rakd: interrupted{'; repeat the command to go on' if resumes else ''}", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        # A loader's process hands on its whole traceback, which the message ends.
        return _fail(str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2])
    except OSError as error:
        # The system refuses a file, the disk is full, or the reader has gone: the program is not at fault.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
            raise
        return _fail(str(error))
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            reason = "was killed, as where memory is short: lower --workers"
            return _fail(f"a process that loads frames {reason} (torch says: {str(error).splitlines()[0]})")
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        saving = [text for option, text in _SAVING.items() if hasattr(command, option)]
        if "CUDA" in str(error) and hasattr(command, "device"):
            saving.append("set --device cpu")
        return _fail(f"out of memory: {' or '.join(saving) or 'use smaller images'} (torch says: {error})")
    return 0


def _parse(argv: Sequence[str] | None) -> Command | str:
    """The command that the arguments ask for, or what is wrong with them."""
    import tyro

    from rakd.commands.config import insert_options

    given = sys.argv[1:] if argv is None else list(argv)
    commands = _commands()
    if given == ["--version"]:
        from rakd_ops import __version__

        print(f"rakd {__version__}")
        raise SystemExit(0)
    if not given or (given[0] not in commands and not given[0].startswith("-")):
        what = f"got {given[0]!r}" if given else "got none"
        return f"expected a command, one of {', '.join(commands)}; {what} (--help says more)"
    if given[0] in commands:
        given = insert_options(given, commands)
    # tyro prints a framed page about a malformed option; its first paragraph says it all.
    page = io.StringIO()
    try:
        with contextlib.redirect_stderr(page):
            parsed = tyro.extras.subcommand_cli_from_dict(commands, prog="rakd", description=_DESCRIPTION, args=given)
    except SystemExit as stop:
        if not stop.code:
            raise
        return _first_paragraph(page.getvalue())
    return cast(Command, parsed)


def _first_paragraph(page: str) -> str:
    """The text above the first rule of a framed page, without the frame."""
    words: list[str] = []
    for line in page.splitlines():
        text = line.strip("│ ")
        if text.startswith("─"):
            break
        if not text.startswith("╭"):
            words += text.split()
    return f"{' '.join(words) or page.strip()} (--help says more)"


_DESCRIPTION = (
    "Region-aware knowledge distillation for monocular 3D detection: an expert trains a light apprentice, on KITTI "
    "or on rendered scenes; training, official evaluation, pictures."
)


def _fail(message: str) -> int:
    print(f"rakd: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
