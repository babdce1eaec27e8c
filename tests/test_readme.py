"""The README's example runs as it stands, in a plain training loop; links of all pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


class SomeNetwork(nn.Module):
    """Four maps at strides 4 to 32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 2, stride=2) for _ in range(3))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for layer in self.down:
            maps.append(layer(maps[-1].relu()))
        return maps


def test_the_example_trains() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) == 3
    example = compile(code, "README.md", "exec")
    torch.manual_seed(0)
    expert, apprentice = SomeNetwork(8), SomeNetwork(8)
    boxes = [torch.tensor([[5.0, 8.0, 50.0, 60.0]]), torch.tensor([[0.0, 0.0, 90.0, 40.0], [60.0, 10.0, 80.0, 60.0]])]
    images, targets = torch.rand(2, 3, 64, 96), [{"boxes": rows} for rows in boxes]
    optimizer = torch.optim.Adam(apprentice.parameters(), lr=1e-2)
    with torch.no_grad():
        expert_maps = expert(images)
    losses: list[float] = []
    for _ in range(60):
        maps = apprentice(images)
        scope: dict[str, Any] = {
            "targets": targets,
            "apprentice_maps": maps,
            "expert_maps": expert_maps,
            "task_loss": 0.0 * maps[0].sum(),
            "weight": 10.0,
        }
        exec(example, scope)
        optimizer.zero_grad()
        scope["loss"].backward()
        optimizer.step()
        losses.append(scope["loss"].item())
    assert losses[-1] < losses[0] / 5


def heading_anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    for target, anchor in links:
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in heading_anchors(there), f"{target}#{anchor}"
