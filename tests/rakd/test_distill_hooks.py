"""Where maps come from: what networks give, and hooks by name that live as long as the distiller."""

import contextlib
import copy
import functools
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distill_cases import BOXES, ROWS, STAGES, Network, images, same_state, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from rakd.distill import Distiller, Expert
from rakd.distill.expert import find_modules
from rakd.distill.hooks import FeatureHooks
from rakd.distill.outputs import find_maps, pair_names

A, B = torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 2, 2)
MASK = torch.zeros(1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "output",
    [
        [A, B],
        (A, B),
        {"x": A, "y": B},
        [(A, MASK), (B, MASK)],
        ((A, MASK), (B, MASK)),
        ([(A, MASK), (B, MASK)], [A, A]),  # a DETR backbone: maps with masks, and position embeddings
        SimpleNamespace(feature_maps=(A, B)),
        {"feature_maps": (A, B)},
        {"last_hidden_state": [A, B]},
        {"last_hidden_state": [A, B], "attentions": None},
        [SimpleNamespace(tensors=A, mask=MASK), SimpleNamespace(tensors=B, mask=MASK)],
    ],
)
def test_forms_of_maps(output: Any) -> None:
    assert [id(m) for m in find_maps("features", output).values()] == [id(A), id(B)]


def test_a_single_map_and_channels_last() -> None:
    assert list(find_maps("features", A)) == ["0"]
    swin = torch.arange(24.0).view(1, 2, 4, 3)
    found = find_maps("features", [swin], "NHWC")["0"]
    assert found.shape == (1, 3, 2, 4)
    assert found[0, 1, 1, 2] == swin[0, 1, 2, 1]
    assert found.data_ptr() == swin.data_ptr()


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (None, "got None"),
        ({"logits": torch.zeros(1, 5), "maps": A}, r"got a dict of {logits: a tensor of shape \[1, 5\], maps: "),
        ([torch.zeros(1, 7, 3)], r"got a list of 1 \(a tensor of shape \[1, 7, 3\]\)"),
        ("maps", "got a str"),
    ],
)
def test_what_holds_no_maps_is_described(output: Any, told: str) -> None:
    with pytest.raises(TypeError, match=f"features: expected feature maps .*{told}"):
        find_maps("features", output)


def test_pairs_by_name_or_order() -> None:
    assert pair_names({"a": A, "b": B}, {"b": B, "a": A}) == ["a", "b"]
    assert pair_names({"0": A, "1": B}, {"p3": A, "p4": B}) == ["p3", "p4"]
    with pytest.raises(ValueError, match="expected maps of the same names, or of none in common"):
        pair_names({"p3": A, "p4": B}, {"p4": B, "p5": A})
    with pytest.raises(ValueError, match=r"as many expert maps as the apprentice has, 1 .* got 2 .*choose the levels"):
        pair_names({"p3": A}, {"p4": B, "p5": A})


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


class Shared(nn.Module):
    """A network whose head runs on each level; or, of one size, several times in a row."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3, 4, stride, stride=stride) for stride in strides)
        self.head = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(stage(x)) for stage in self.stages]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("side", ["features", "apprentice_features"])
def test_a_head_that_levels_share_is_told(side: str, compiled: bool) -> None:
    network: Any = Shared((4, 8, 16))
    network = torch.compile(network, backend="eager") if compiled else network
    other = {"features": "apprentice_features", "apprentice_features": "features"}[side]
    names = {side: "input:head", other: "stages.0"}
    distiller = Distiller(copy.deepcopy(network), apprentice=network, canonical_size=24, **names)
    network(images())
    with pytest.raises(RuntimeError, match=rf"^{side}: input:head ran more than once since"):
        distiller(images(), BOXES)


def test_a_module_that_repeats_gives_its_last_maps_on_both_sides() -> None:
    network = Shared((8, 8, 8))
    expert = copy.deepcopy(network)
    distiller = Distiller(
        expert, apprentice=network, features="head", apprentice_features="head", canonical_size=24, check=False
    )
    for _ in range(3):
        network(images())
        assert distiller(images(), BOXES) == 0
    last = Distiller(expert, features=lambda e, x: e(x)[2], canonical_size=24)
    with torch.no_grad():
        network.stages[2].weight.mul_(2)
    maps = network(images())
    assert torch.equal(distiller(images(), BOXES), last(images(), BOXES, maps[2]))
    # Sizes of other forwards do not matter, nor those of modules called by themselves.
    network(images(size=(64, 96)))
    network(images())
    assert distiller(images(), BOXES) > 0
    network.head(torch.zeros(1, 4, 2, 2))
    network.head(network.stages[2](images()))
    assert distiller(images(), BOXES) > 0


def test_what_gradient_checkpointing_runs_again_is_not_noted() -> None:
    class Checkpointed(Network):
        def features(self, x: Tensor) -> list[Tensor]:
            maps = []
            for stage in self.stages:
                x = checkpoint(lambda y, stage=stage: 2 * stage(y), x, use_reentrant=False)
                maps.append(x)
            return maps

    apprentice = Checkpointed()
    distiller = Distiller(
        Network((4, 8, 8), seed=1),
        apprentice=apprentice,
        features=STAGES,
        apprentice_features=STAGES,
        canonical_size=24,
    )
    apprentice(images())
    loss = distiller(images(), BOXES)
    loss.backward()
    assert distiller._hooks is not None and not distiller._hooks.values  # nor the graph behind it kept
    with pytest.raises(RuntimeError, match="did not run since the last step"):
        distiller(images(), BOXES)


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


def test_what_is_changed_in_place_afterwards_is_told() -> None:
    apprentice = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(inplace=True))
    distiller = Distiller(Network((4,)), features="stages.0", apprentice=apprentice, apprentice_features="0")
    apprentice(images())
    with pytest.raises(RuntimeError, match=r"output:0 was changed in place after it was noted"):
        distiller(images(), BOXES)


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


def test_modules_of_wrappers_are_found() -> None:
    class Wrapper:
        def __init__(self) -> None:
            self.model = Network((3, 3, 3))

        def __call__(self, x: Tensor) -> list[Tensor]:
            return self.model.features(x)

    wrapper = Wrapper()
    assert find_modules(wrapper) == [wrapper.model]
    assert find_modules(functools.partial(Wrapper.__call__, wrapper)) == [wrapper.model]
    assert find_modules(wrapper.__call__) == [wrapper.model]
    wrapper.heads = {"p3": nn.Conv2d(1, 1, 1)}  # type: ignore[attr-defined]
    assert find_modules(wrapper) == [wrapper.model, wrapper.heads["p3"]]  # type: ignore[attr-defined]
    del wrapper.heads  # type: ignore[attr-defined]
    distiller = Distiller(wrapper)
    distiller(images(), BOXES, [m.requires_grad_() for m in Network((3, 3, 3), 4).features(images())])
    assert not wrapper.model.training
    with pytest.raises(
        TypeError, match=r"expert: could not find the module inside this function.* features=function\(module, images"
    ):
        Distiller(lambda x: wrapper(x))


class Stubborn(Network):
    """Overrides ``train`` by something else, as ultralytics' models do."""

    def train(self, mode: Any = True) -> Any:
        return self


def test_the_expert_is_in_eval_mode_whatever_it_overrides() -> None:
    expert = Stubborn((4, 8, 8))
    assert expert.training
    before = snapshot(expert)
    distiller = Distiller(expert, features=STAGES)
    expert.stages.train()  # someone else's
    distiller(images(), BOXES, Network().features(images()))
    assert same_state(expert, before)
    assert not any(module.training for module in expert.modules())


def test_an_expert_that_is_or_shares_the_apprentice_is_refused() -> None:
    network, other = Network(), Network(seed=1)
    with pytest.raises(ValueError, match=r"expert: expected a network of its own, got one that shares 18 parameters"):
        Distiller(network, apprentice=network)
    with pytest.raises(ValueError, match="shares 18 parameters"):
        Distiller(network.features, apprentice=network)
    other.stages[0] = network.stages[0]
    with pytest.raises(
        ValueError, match=r"shares 4 parameters with the apprentice, such as \['stages.0.conv.weight'\]"
    ):
        Distiller(other, apprentice=network)
    assert network.training
    assert all(p.requires_grad for p in (*network.parameters(), *other.parameters()))


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
