"""The README's example runs as it stands, in a training loop that knows nothing of this project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    torch.manual_seed(0)
    expert, apprentice = SomeNetwork(8), SomeNetwork(8)
    boxes = [torch.tensor([[5.0, 8.0, 50.0, 60.0]]), torch.tensor([[0.0, 0.0, 90.0, 40.0], [60.0, 10.0, 80.0, 60.0]])]
    batch = (torch.rand(2, 3, 64, 96), [{"boxes": rows} for rows in boxes])
    losses: list[float] = []

    def task_loss(maps: list[Tensor], targets: Any) -> Tensor:
        return 0.0 * maps[0].sum()

    class Recorder(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            losses.append(scope["loss"].item())
            return super().step(closure)

    scope: dict[str, Any] = {
        "expert": expert,
        "apprentice": apprentice,
        "task_loss": task_loss,
        "loader": [batch] * 60,
        "optimizer": Recorder(apprentice.parameters(), lr=1e-2),
    }
    exec(compile(code, "README.md", "exec"), scope)
    assert len(losses) == 60
    assert losses[-1] < losses[0] / 5


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
