"""The floors of `rakd`: each part imports lower parts only. Imports are read from the source, lazy ones included."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rakd

HELPERS = {"checkpoints", "distributed", "errors", "extras", "files", "nn", "progress"}
# What each part may import beside itself and the helpers, which import one another only.
BELOW: dict[str, set[str]] = {
    **{name: set() for name in HELPERS},
    "geometry": set(),
    "data": {"geometry"},
    "scenes": {"geometry", "data"},
    "evaluation": {"geometry", "data"},
    "visualize": {"geometry", "data"},
    "detector": {"geometry", "data"},
    "distill": set(),
    "integrations": {"distill"},
}
BELOW["training"] = {"geometry", "data", "detector", "distill"}
BELOW["study"] = BELOW["training"] | {"training", "evaluation", "visualize"}
BELOW["commands"] = BELOW["study"] | {"study", "scenes"}
BELOW["cli"] = {"commands"}
BELOW["__main__"] = {"cli"}


def imported(source: str) -> Iterator[str]:
    """Names of the modules that a source imports, wherever in it: rakd's by full name, others' in short."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "rakd imports by full name"
            if node.module == "rakd":
                yield from (f"rakd.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def upward(part: str, source: str) -> list[str]:
    """The imports of a module of a part that its floor forbids."""
    allowed = BELOW[part] | HELPERS | {part}
    names = [name for name in imported(source) if name.partition(".")[0] == "rakd"]
    return [name for name in names if name.split(".")[1] not in allowed]


def modules() -> list[tuple[str, Path]]:
    """Each module of the package with its part's name."""
    root = Path(rakd.__file__).parent
    paths = [path for path in root.rglob("*.py") if path != root / "__init__.py"]
    return [(path.relative_to(root).parts[0].removesuffix(".py"), path) for path in paths]


def test_no_part_imports_a_higher_one() -> None:
    found = {str(path): upward(part, path.read_text(encoding="utf-8")) for part, path in modules()}
    assert len(found) > 100, "the package is read whole"
    assert {path: names for path, names in found.items() if names} == {}


def test_distillation_needs_torch_and_the_ops_only() -> None:
    others = {"torch", "rakd_ops", "rakd", "typing_extensions"}  # the last comes with torch
    for part, path in modules():
        if part == "distill":
            names = {name.partition(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
            assert names - others <= set(sys.stdlib_module_names), path


@pytest.mark.parametrize(
    ("part", "source", "refused"),
    [
        ("detector", "from rakd.training.trainer import Trainer", ["rakd.training.trainer"]),
        ("detector", "def lazily():\n    from rakd import distill", ["rakd.distill"]),
        ("distill", "import rakd.data.kitti as kitti", ["rakd.data.kitti"]),
        ("geometry", "if TYPE_CHECKING:\n    from rakd.data.labels import Objects", ["rakd.data.labels"]),
        ("training", "from rakd.study.plan import Run", ["rakd.study.plan"]),
        ("files", "from rakd.geometry import Calibration", ["rakd.geometry"]),
        ("distill", "from rakd.distributed import world_size\nfrom rakd.distill import maps", []),
    ],
)
def test_upward_imports_are_seen(part: str, source: str, refused: list[str]) -> None:
    assert upward(part, source) == refused
