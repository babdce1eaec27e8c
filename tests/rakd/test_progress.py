"""Progress bars: quick on a terminal, quiet in files."""

import io
import sys

import pytest

from rakd.progress import bar


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_move_often_only_where_somebody_watches(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    shown = bar(total=5, desc="work", file=stream)
    for _ in range(5):
        shown.last_print_t -= 1.0  # a second goes by
        shown.update()
    states = stream.getvalue().count("work:")
    assert states > 5 if terminal else states == 1
