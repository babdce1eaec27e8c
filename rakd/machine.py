"""The machine and the sources that figures come from. Imports no torch."""

import contextlib
import platform
import subprocess
from pathlib import Path


def processor() -> str:
    """The processor's model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state(folder: Path) -> tuple[str, bool]:
    """A checkout's commit, and whether tracked files differ from it; empty where the folder is no checkout's root."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return ""

    root = git("rev-parse", "--show-toplevel")
    if not root or Path(root).resolve() != folder.resolve():  # installed, perhaps below somebody else's sources
        return "", False
    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
