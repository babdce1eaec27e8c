"""Packages that come with an extra: imported when they are needed, with an error that names the extra."""

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Its full name, such as "pyarrow.parquet".
        extra: The extra of this package that installs it.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: It is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != name:
            raise
        raise ModuleNotFoundError(f"{name} is not installed; run: pip install 'rakd[{extra}]'", name=name) from None
