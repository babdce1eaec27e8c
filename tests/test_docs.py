"""The API reference leaves out no module and no command; code of the guides runs. `make docs` sees to the rest."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rakd.cli import _commands
from rakd.data.kitti import KittiDataset

ROOT = Path(__file__).parents[1]
PAGES = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.rst"))

# On the page of the command line by their help, or on another page through what their package exports.
ELSEWHERE = r"rakd\.(cli|__main__|commands|commands\..*|scenes\.(?!boxes2d).*)|rakd"


def test_every_module_has_its_place() -> None:
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "rakd").rglob("*.py")]
    modules = {".".join(name for name in names if name != "__init__") for names in parts}
    shown = set(re.findall(r"automodule:: (rakd[\w.]*)", PAGES)) - {"rakd_ops", "rakd_ops.reference"}
    assert shown == {name for name in modules if not re.fullmatch(ELSEWHERE, name)}


def test_every_command_shows_its_help() -> None:
    assert re.findall(r"command-help:: (\S+)", PAGES) == list(_commands())


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_a_page_says_nothing_twice(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)  # without comments of the code
    for found in (
        re.findall(r"^#+ .*", prose, re.MULTILINE),
        re.findall(r"^```bash\n.*?^```", text, re.DOTALL | re.MULTILINE),
    ):
        assert sorted(found) == sorted(set(found))


def code_of(page: str, first: str) -> Any:
    """The block of Python of a page that begins with some text, compiled."""
    blocks = re.findall(
        r"^( *)```python\n(.*?)^ *```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    (block,) = (code for _, code in blocks if textwrap.dedent(code).startswith(first))
    return compile(textwrap.dedent(block), page, "exec")


def test_the_method_that_the_guide_adds() -> None:
    scope: dict[str, Any] = {"__name__": "guide"}
    exec(code_of("extending.md", "import torch\nfrom torch import Tensor"), scope)
    method = scope["CosineDistillation"]()
    generator = torch.Generator().manual_seed(0)
    maps = {name: torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for name in "ab"}
    assert abs(method(maps, maps, [])) < 1e-12
    opposite = {name: -feature for name, feature in maps.items()}
    torch.testing.assert_close(method(opposite, maps, []), torch.tensor(4.0, dtype=torch.float64))  # 2 a level


def test_the_data_set_that_the_guide_writes(tmp_path: Path) -> None:
    car = np.array([[580.0, 170.0, 660.0, 230.0]])
    scope = {
        "root": tmp_path,
        "number": 7,
        "train": ["000007"],
        "image": Image.new("RGB", (1242, 375)),
        "projection": np.array([[720.0, 0, 620, 0], [0, 720, 187, 0], [0, 0, 1, 0]]),
        "types": np.array(["Car"]),
        "truncation": np.zeros(1),
        "occlusion": np.zeros(1, np.int64),
        "alpha": np.zeros(1),
        "boxes": car,
        "dimensions": np.array([[1.5, 1.6, 4.0]]),
        "location": np.array([[0.0, 1.6, 20.0]]),
        "rotation_y": np.zeros(1),
    }
    (tmp_path / "training" / "image_2").mkdir(parents=True)
    exec(code_of("extending.md", "from rakd.data.frames"), scope)
    sample = KittiDataset(tmp_path, "train")[0]
    assert sample.targets is not None and sample.targets.boxes.tolist() == car.tolist()
    assert sample.calibration.projection[0, 0] == 720
