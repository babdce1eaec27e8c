"""Files of a command's options: each run writes its own, and ``--config`` reads one back."""

import json
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from rakd.errors import UserError
from rakd.files import read_text, write_text

_OPTION = "--config"


def write_options(command: Any, path: Path) -> None:
    """Write a command's options as JSON, atomically. Paths become absolute; options without a value are left out."""
    values = {field.name: getattr(command, field.name) for field in fields(command)}
    options = {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in values.items()
        if value not in (None, ()) and name != "config"
    }
    write_text(path, json.dumps({"command": type(command).__name__.lower(), **options}, indent=1) + "\n")


def check_command(command: Any, folder: Path) -> None:
    """Refuse a folder that another command has written to, before its ``config.json`` is replaced.

    Raises:
        UserError: The folder's ``config.json`` is another command's.
    """
    path, name = folder / "config.json", type(command).__name__.lower()
    other = read_options(path).get("command", name) if path.exists() else name
    if other != name:
        raise UserError(f"--out: {folder} holds what rakd {other} wrote: choose another folder")


def read_options(path: Path) -> dict[str, Any]:
    """Read what `write_options` wrote.

    Raises:
        UserError: The file is missing or is not JSON of that kind; names it.
    """
    try:
        content = json.loads(read_text(path, "a file of options (config.json of a run)"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: expected options as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected options by name, got {type(content).__name__}")
    return content


def insert_options(words: Sequence[str], commands: dict[str, Any]) -> list[str]:
    """Put the options of ``--config FILE`` in front of those of the command line, which so override them.

    Args:
        words: The command and its options.
        commands: Classes of all commands by name.

    Raises:
        UserError: The file is missing, is not JSON, is another command's, or holds an unknown option; names it.
    """
    paths = [after for word, after in pairwise(words) if word == _OPTION]
    paths += [word.partition("=")[2] for word in words if word.startswith(f"{_OPTION}=")]
    if not paths or not any(field.name == "config" for field in fields(commands[words[0]])):
        return list(words)
    return [words[0], *_read(Path(paths[-1]), words[0], commands[words[0]]), *words[1:]]


def _read(path: Path, name: str, command: type) -> list[str]:
    """The options in a file, as words of the command line, by which they are checked as those are."""
    content = read_options(path)
    if content.pop("command", name) != name:
        raise UserError(f"{path} holds the options of another command than {name}")
    known = [field.name for field in fields(command) if field.name != "config"]
    unknown = [option for option in content if option not in known]
    if unknown:
        raise UserError(f"{path}: {name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    words = []
    for option, value in content.items():
        flag = option.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list) and option in ("weight", "option"):  # each has an option of its own
            words += [word for entry in value for word in (f"--{flag}", str(entry))]
        elif value is not None:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words
