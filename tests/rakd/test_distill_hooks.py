"""Maps by the names of modules: hooks that live as long as the distiller, copied, pickled and compiled."""

import contextlib
import copy
import functools
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_cases import BOXES, ROWS, STAGES, Network, images, same_state, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from rakd.distill import Distiller, Expert
from rakd.distill.hooks import FeatureHooks


def make(**options: Any) -> tuple[Distiller, Network, Network]:
    expert, apprentice = Network((4, 8, 8), seed=1), Network(seed=2)
    defaults: dict[str, Any] = {"features": STAGES, "apprentice_features": STAGES, "canonical_size": 24}
    return Distiller(expert, apprentice=apprentice, **{**defaults, **options}), expert, apprentice


def value(distiller: Distiller, apprentice: nn.Module | None) -> Tensor:
    assert apprentice is not None
    apprentice(images())
    loss: Tensor = distiller(images(), BOXES)
    return loss


def test_outputs_and_inputs_by_name() -> None:
    distiller, expert, apprentice = make()
    before = snapshot(expert)
    expected = value(distiller, apprentice)
    assert expected > 0
    other, *_ = make(features="input:head", apprentice_features="input:head")
    assert torch.equal(value(other, other.apprentice), expected)
    given = Distiller((expert, lambda x: expert.features(x)), canonical_size=24)
    assert torch.equal(given(images(), ROWS, apprentice.features(images())), expected)
    function = Distiller(expert, features=lambda model, x: model.features(x), canonical_size=24)
    assert torch.equal(function(images(), ROWS, apprentice.features(images())), expected)
    distiller.train()
    value(distiller, apprentice).backward()
    assert apprentice.stages[0].conv.weight.grad is not None  # type: ignore[union-attr]
    assert same_state(expert, before)


def test_the_rest_of_the_experts_forward_is_run_once() -> None:
    distiller, expert, apprentice = make(features="input:head")
    first = value(distiller, apprentice)
    assert torch.equal(value(distiller, apprentice), first)
    assert (expert.head.runs, apprentice.head.runs) == (1, 2)
    broken, expert, apprentice = make(features="input:head")
    expert.head.scores = nn.ModuleList()
    assert torch.equal(value(broken, apprentice), first)


def test_functions_and_settings_that_do_nothing_are_told() -> None:
    with pytest.raises(TypeError, match=r"features: expected a function of \(network, images\) that gives maps"):
        make(features=lambda x: x)
    with pytest.raises(TypeError, match=r"apprentice_features: expected a function of \(network, images\)"):
        make(apprentice_features=lambda: None)
    with pytest.raises(ValueError, match="features: expected as an argument of the Expert"):
        Distiller(Expert(Network()), features=STAGES)


def test_names_that_are_not_there_are_told_with_those_that_are() -> None:
    with pytest.raises(
        ValueError, match=r"features: expected the name of a module of Network, got 'neck'; it has stages"
    ):
        make(features="neck")
    with pytest.raises(ValueError, match=r"apprentice_features: .* got 'stages.7'; it has"):
        make(apprentice_features=["stages.7"])
    with pytest.raises(TypeError, match="features: expected names of modules, got 3"):
        make(features=[3])


def test_a_module_may_be_called_output() -> None:
    network = nn.Sequential()
    for name in ("stem", "output"):
        network.add_module(name, nn.Conv2d(3, 3, 4, stride=4))
    hooks = FeatureHooks(network, ("stem", "output"), "features")
    network(images())
    assert [tuple(feature.shape[2:]) for feature in hooks.take()] == [
        (images().shape[2] // stride, images().shape[3] // stride) for stride in (4, 16)
    ]


def test_maps_are_taken_once() -> None:
    distiller, _, apprentice = make()
    value(distiller, apprentice)
    with pytest.raises(RuntimeError, match=r"apprentice_features: output:stages.0 did not run since the last step"):
        distiller(images(), BOXES)


@pytest.mark.parametrize("parts", [False, True])
def test_runs_of_which_only_the_last_is_taken_are_told_once(parts: bool) -> None:
    distiller, _, network = make()
    # In parts: a loop that calls the network's modules, not the network.
    apprentice: Any = network.features if parts else network
    apprentice(images())  # before distillation began
    value(distiller, apprentice)
    with torch.no_grad():
        apprentice(images(seed=3))  # such as validation
    value(distiller, apprentice)
    for told in (1, 0):
        apprentice(images(seed=3))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            value(distiller, apprentice)
        assert sum("ran more than once since the last step" in str(one.message) for one in found) == told


def test_a_head_that_puts_its_results_into_its_inputs_list() -> None:
    class Overwriting(Network):
        def forward(self, x: Tensor) -> Any:
            return self.outer(self.features(x))

    class Outer(nn.Module):
        def forward(self, maps: list[Tensor]) -> list[Tensor]:
            for i, feature in enumerate(maps):
                maps[i] = feature[:, :1] * 0
            return maps

    expert, apprentice = Overwriting((4, 8, 8), seed=1), Overwriting(seed=2)
    expert.outer = apprentice.outer = Outer()
    distiller = Distiller(
        expert, apprentice=apprentice, features="input:outer", apprentice_features="input:outer", canonical_size=24
    )
    expected, _, network = make()
    assert torch.equal(value(distiller, apprentice), value(expected, network))


def test_close_and_with() -> None:
    distiller, expert, apprentice = make()
    with distiller:
        value(distiller, apprentice)
    for network in (expert, apprentice):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    with pytest.raises(RuntimeError, match="did not run"):
        value(distiller, apprentice)
    with contextlib.suppress(KeyError), make()[0] as other:
        raise KeyError
    assert not any(m._forward_hooks for m in other.apprentice.modules())  # type: ignore[union-attr]


def test_deep_copies_have_hooks_of_their_own_and_share_the_expert() -> None:
    distiller, expert, apprentice = make()
    expected = value(distiller, apprentice)
    apprentice(images())  # a graph lies in the hooks, which cannot be copied
    twin = copy.deepcopy(distiller)
    assert twin.apprentice is not apprentice
    assert twin.expert is expert
    assert torch.equal(value(twin, twin.apprentice), expected)
    assert torch.equal(value(distiller, apprentice), expected)
    twin.double()  # as an EMA that is saved in half precision would
    assert expert.stages[0].conv.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_an_expert_outlives_the_distillers_that_used_it() -> None:
    expert = Expert(Network((4, 6, 8), seed=1), features=STAGES)
    losses = []
    for _ in range(2):
        apprentice = Network(seed=2)
        with Distiller(expert, apprentice=apprentice, apprentice_features=STAGES, canonical_size=24) as distiller:
            losses.append(value(distiller, apprentice))
        assert not any(m._forward_hooks for m in expert.roots[0].modules())
    assert torch.equal(*losses)
    distiller, _, apprentice = make()
    expected = value(distiller, apprentice)
    copy.deepcopy(distiller).close()
    assert torch.equal(value(distiller, apprentice), expected)


def take_maps(network: Any, x: Tensor) -> list[Tensor]:
    return network.features(x)  # type: ignore[no-any-return]


def take_other(network: Any, x: Tensor, *, other: Any) -> list[Tensor]:
    return take_maps(other, x)


def test_a_function_that_a_pickle_left_out_is_asked_for() -> None:
    expert, apprentice = Network((4, 6, 8), seed=1), Network(seed=2)
    expected = Distiller(expert, features=take_maps, canonical_size=24)(images(), BOXES, apprentice.features(images()))
    kept = pickle.loads(pickle.dumps(Distiller(expert, features=take_maps, canonical_size=24)))
    kept.attach(expert=expert)
    assert torch.equal(kept(images(), BOXES, apprentice.features(images())), expected)
    inside = functools.partial(lambda network, x: network.features(x))
    twin = pickle.loads(pickle.dumps(Distiller(expert, features=inside, canonical_size=24)))
    holds = Distiller(expert, features=functools.partial(take_other, other=expert), canonical_size=24)
    assert len(pickle.dumps(holds)) < len(pickle.dumps(expert))
    with pytest.raises(ValueError, match=r"features: expected again, .* attach\(expert=Expert\(network, features="):
        twin.attach(expert=expert)
    twin.attach(expert=Expert(expert, features=take_maps))
    assert torch.equal(twin(images(), BOXES, apprentice.features(images())), expected)


class Holder(nn.Module):
    """A model that holds its distiller, before or after the apprentice."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        distiller, _, apprentice = make()
        for name in ("distiller", "apprentice") if first else ("apprentice", "distiller"):
            self.add_module(name, {"distiller": distiller, "apprentice": apprentice}[name])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copied_together_they_stay_together(first: bool, how: str) -> None:
    holder = Holder(first)
    expected = value(holder.distiller, holder.apprentice)
    expert = holder.distiller.expert
    twin = copy.deepcopy(holder) if how == "deepcopy" else pickle.loads(pickle.dumps(holder))
    assert twin.distiller.apprentice is twin.apprentice is not holder.apprentice
    if how == "pickle":
        twin.apprentice(images())
        with pytest.raises(ValueError, match=r"has no expert .*attach"):
            twin.distiller(images(), BOXES)
        twin.distiller.attach(expert=expert)
    assert torch.equal(value(twin.distiller, twin.apprentice), expected)


def test_an_apprentice_that_holds_its_distiller() -> None:
    distiller, _, apprentice = make()
    apprentice.criterion = distiller
    expected = value(distiller, apprentice)
    twin = copy.deepcopy(apprentice)
    assert torch.equal(value(twin.criterion, twin), expected)  # type: ignore[arg-type]


def test_the_expert_enters_no_state_pickle_or_copy(tmp_path: Path) -> None:
    expert, apprentice = Network((4, 64, 64), seed=1), Network(seed=2)
    plain = len(pickle.dumps(apprentice))
    distiller = Distiller(expert, apprentice=apprentice, features=STAGES, apprentice_features=STAGES)
    value(distiller, apprentice)
    assert not any("expert" in key for key in distiller.state_dict())
    big = len(pickle.dumps(expert))
    # The distiller brings its apprentice and adapters (4·64 + 6·64 + 8·64 weights of 4 bytes), never the expert.
    assert len(pickle.dumps(apprentice)) < plain + 1500
    assert len(pickle.dumps(distiller)) < plain + 4 * (18 * 64 + 128) + 8000 < big
    # A pickled apprentice loads where this package is not installed.
    torch.save({"model": copy.deepcopy(apprentice).half()}, tmp_path / "model.pt")
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("rakd", "rakd_ops"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)["model"].float()
model(torch.rand(1, 3, 32, 48))
assert "rakd" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    buffer = io.BytesIO()
    torch.save(distiller.state_dict(), buffer)
    buffer.seek(0)
    assert list(torch.load(buffer, weights_only=True)) == list(distiller.state_dict())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_hooks_in_compiled_networks(backend: str) -> None:
    plain, _, network = make()
    expected = value(plain, network)
    expected.backward()
    expert, apprentice = Network((4, 8, 8), seed=1), Network(seed=2)
    compiled = torch.compile(apprentice, backend=backend, fullgraph=True)
    distiller = Distiller(
        torch.compile(expert, backend=backend),
        apprentice=compiled,  # type: ignore[arg-type]
        features=STAGES,
        apprentice_features=STAGES,
        canonical_size=24,
    )
    compiled(images())
    loss = distiller(images(), BOXES)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for ours, theirs in zip(apprentice.stages.parameters(), network.stages.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    compiled(images(seed=3))
    assert not torch.equal(distiller(images(seed=3), BOXES), loss)


@pytest.mark.parametrize("boxes", [BOXES, ROWS], ids=["list", "rows"])
@pytest.mark.parametrize("options", [{}, {"rescale": True, "normalize": True}, {"weight": "auto:0.1"}], ids=str)
def test_the_distiller_itself_compiles(boxes: Any, options: dict[str, Any]) -> None:
    distiller, _, apprentice = make(apprentice_features=None, **options)
    features = [m.detach().requires_grad_() for m in apprentice.features(images())]
    task = torch.ones(()) if "weight" in options else None
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(distiller, backend=counter, fullgraph=True)
    needed = r"expected one step before torch.compile sees it; check\(\) is enough in one process without"
    with pytest.raises(Exception, match=needed):
        compiled(images(), boxes, features, task_loss=task)
    distiller.check(images(), boxes, features)
    torch._dynamo.reset()
    if options:  # nothing has been measured: compiled, factors would be 1, or 0, for ever
        with pytest.raises(Exception, match=needed):
            compiled(images(), boxes, features, task_loss=task)
        if options.keys() & {"weight", "normalize"}:  # nor in a step without boxes
            distiller(images(), [torch.zeros(0, 4)] * 2, features, task_loss=task)
            with pytest.raises(Exception, match=needed):
                compiled(images(), boxes, features, task_loss=task)
        distiller(images(), boxes, features, task_loss=task)
        torch._dynamo.reset()
    expected = distiller(images(), boxes, features, task_loss=task)
    counts = set()
    for _ in range(3):
        torch.testing.assert_close(compiled(images(), boxes, features, task_loss=task), expected)
        counts.add(counter.frame_count)
    assert len(counts) == 1  # compiled at the first call alone, the expert included


def test_the_distiller_needs_torch_and_the_op_alone() -> None:
    code = """
import sys
from rakd.distill import Distiller, Expert, FeatureCache, make_method, tap
from rakd.distill.registry import METHODS
for spec in METHODS.values():
    spec.load()
heavy = ("rakd.detector", "rakd.data", "rakd.training", "torchvision", "matplotlib", "PIL")
assert not [name for name in sys.modules if name.startswith(heavy)]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
