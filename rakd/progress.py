"""Progress bars on long work, also of several processes."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tqdm import tqdm

_IN_FILES = 30.0  # seconds between its states there


def bar(*arguments: Any, **options: Any) -> "tqdm[Any]":
    """A progress bar on stderr, as `tqdm.tqdm` makes it; written to a file, it moves once in half a minute."""
    if not sys.stderr.isatty():
        options.setdefault("mininterval", _IN_FILES)
    return tqdm(*arguments, **options)


def do_all(do: Callable[[Any], None], tasks: Sequence[Any], workers: int, *, chunk: int = 1, **options: Any) -> None:
    """Do each task, in this process where ``workers`` is 1, else in several.

    Args:
        do: Something that a pickle can hold, as are the tasks.
        tasks: In the order in which they are begun.
        workers: Processes; no more are started than there are tasks.
        chunk: Tasks that a process takes at once.
        options: Of the `bar`, which shows after two seconds.
    """
    workers = min(workers, max(1, len(tasks)))
    with bar(total=len(tasks), delay=2, **options) as shown:
        if workers == 1:
            for task in tasks:
                do(task)
                shown.update()
            return
        # Fresh processes: forking one that holds threads (PyTorch's, say) may hang.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                for _ in pool.map(do, tasks, chunksize=chunk):
                    shown.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
