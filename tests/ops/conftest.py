"""Makes the shared cases importable by the tests of this folder, and the emulated CUDA backend where it is wanted."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS)]

if os.environ.get("RAKD_TEST_EMULATED") == "1":
    sys.path.insert(0, str(TESTS / "emulator"))
    import cases
    import emulated_ops

    emulated_ops.install()
    cases.DEVICE_OF["cuda"] = "cpu"
