"""The command line, ``rakd`` or ``python -m rakd``: hands the arguments to one of the commands.

To add a command, write its dataclass in `rakd.commands` and add its line to `_commands`.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any, Protocol, TextIO, cast

USER_ERROR = 2
INTERRUPTED = 130


class Command(Protocol):
    """What a command is: options as fields, work in ``run``."""

    def run(self) -> None:
        """Do what the command says."""


def _commands() -> dict[str, Any]:
    from rakd.commands.evaluate import Evaluate
    from rakd.commands.inspect import Inspect
    from rakd.commands.make_scenes import MakeScenes
    from rakd.commands.show import Show

    return {
        "inspect": Inspect,
        "make-scenes": MakeScenes,
        "evaluate": Evaluate,
        "show": Show,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        Exit code: 0, or 2 for a user's error, after one line on stderr that says what is wrong.
        (Malformed options and ``--help`` exit from within, by SystemExit with 2 and 0.)
    """
    warnings.showwarning = _show_warning
    try:
        import tyro

        command = cast(
            Command,
            tyro.extras.subcommand_cli_from_dict(
                _commands(), prog="rakd", description=_DESCRIPTION, args=argv, sort_subcommands=False
            ),
        )
        command.run()
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("rakd", "rakd_ops"):
            raise
        return _fail(f"{error.name} is not installed; run: pip install '.[train]'")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError) as error:
        return _fail(" ".join(str(error).split()))
    return 0


_DESCRIPTION = (
    "Region-aware knowledge distillation for monocular 3D detection: KITTI data, rendered scenes, "
    "official evaluation, pictures."
)


def _fail(message: str) -> int:
    print(f"rakd: error: {message}", file=sys.stderr)
    return USER_ERROR


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line for the user, without the source line that raised it."""
    print(f"rakd: warning: {message}", file=file or sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
