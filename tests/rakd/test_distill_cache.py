"""The expert's features: cached in memory or a folder, in its own dtype and memory format, compiled."""

import functools
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_cases import BOXES, STAGES, Network, images
from processes import run_two_processes
from torch import Tensor

from rakd.distill import Distiller, Expert, FeatureCache

KEYS: list[Any] = [("a", False), ["b", 3, 0.5]]


def make(cache: FeatureCache, seed: int = 1, **options: Any) -> tuple[Distiller, Network, list[int]]:
    """A distiller, and the batch sizes that its expert ran on."""
    expert = Network((4, 6, 8), seed=seed)
    runs: list[int] = []
    expert.register_forward_pre_hook(lambda _, arguments: runs.append(len(arguments[0])))
    return Distiller(expert, features=STAGES, cache=cache, canonical_size=24, **options), expert, runs


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(m, theirs[name]) for name, m in ours.items())


@pytest.fixture(params=["memory", "folder"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache" if request.param == "folder" else None)


def test_hits_give_what_was_there_and_run_nothing(cache: FeatureCache) -> None:
    distiller, _, runs = make(cache)
    first = distiller.expert_features(images(), KEYS)
    assert equal(first, make(FeatureCache())[0].expert_features(images()))
    assert equal(distiller.expert_features(images(), KEYS), first)
    assert runs == [2, 2]  # the first batch out of the cache is compared, once
    turned = distiller.expert_features(images().flip(0), KEYS[::-1])
    assert equal(turned, {name: m.flip(0) for name, m in first.items()})
    assert runs == [2, 2]
    assert (cache.hits, cache.misses, len(cache)) == (4, 2, 2)
    distiller.expert_features(images(3), [*KEYS, "c"])  # only what is not there runs
    assert runs == [2, 2, 1]
    distiller.expert_features(images(1).repeat(2, 1, 1, 1), ["d", "d"])  # one key twice is one image
    assert runs == [2, 2, 1, 1]
    with pytest.raises(ValueError, match="keys: expected a key of its own for each image, got 'e' for two that differ"):
        distiller.expert_features(images(), ["e", "e"])
    maps = Network().features(images())
    assert torch.equal(distiller(images(), BOXES, maps, keys=KEYS), distiller(images(), BOXES, maps))


def test_a_cache_without_keys_is_told(cache: FeatureCache) -> None:
    distiller, _, runs = make(cache)
    maps = Network().features(images())
    with pytest.warns(UserWarning, match="cache: keeps nothing of calls without keys; give keys="):
        loss = distiller(images(), BOXES, maps)
    assert torch.equal(loss, distiller(images(), BOXES, maps, keys=KEYS))
    assert runs == [2, 2]
    assert len(cache) == 2


def test_other_experts_states_and_sizes_are_misses(cache: FeatureCache) -> None:
    distiller, expert, runs = make(cache)
    first = distiller.expert_features(images(), KEYS)
    distiller.expert_features(images(size=(64, 48)), KEYS)
    assert len(runs) == 2
    with torch.no_grad():
        expert.stages[0].conv.weight.mul_(2)  # type: ignore[union-attr, operator]
    changed = distiller.expert_features(images(), KEYS)
    assert len(runs) == 3
    assert not equal(changed, first)
    expert.load_state_dict(Network((4, 6, 8), seed=1).state_dict())
    assert equal(distiller.expert_features(images(), KEYS), first)  # as it was: its entries are good again
    assert len(runs) == 4  # to be compared
    other, _, others = make(cache, seed=5)
    other.expert_features(images(), KEYS)
    assert len(others) == 1
    inputs = Distiller(Network((4, 6, 8), seed=1), features="input:stages.1", cache=cache)
    assert len(inputs.expert_features(images(), KEYS)) == 1  # other modules of the same expert


def _first(network: Any, x: Tensor) -> list[Tensor]:
    return network.features(x)[:1]  # type: ignore[no-any-return]


def _last(network: Any, x: Tensor) -> list[Tensor]:
    return network.features(x)[-1:]  # type: ignore[no-any-return]


def _level(network: Any, x: Tensor, level: int) -> list[Tensor]:
    return [network.features(x)[level]]


class _Methods(Network):
    def first(self, x: Tensor) -> list[Tensor]:
        return _first(self, x)

    def last(self, x: Tensor) -> list[Tensor]:
        return _last(self, x)


def test_maps_of_another_function_are_told(cache: FeatureCache) -> None:
    expert = _Methods((4, 6, 8), seed=1)
    for first, other in (
        ((expert, _first), (expert, _last)),
        ((expert, functools.partial(_level, level=1)), (expert, functools.partial(_level, level=2))),
        ((expert.first, None), (expert.last, None)),
        (((expert, expert.first), None), ((expert, expert.last), None)),
    ):
        cache.clear()
        expected = Distiller(first[0], features=first[1], cache=cache).expert_features(images(), KEYS)
        again = Distiller(first[0], features=first[1], cache=cache)
        for _ in range(2):
            assert equal(again.expert_features(images(), KEYS), expected)
        with pytest.raises(ValueError, match=r"cache: expected what the expert gives .* needs a cache of its own"):
            Distiller(other[0], features=other[1], cache=cache).expert_features(images(), KEYS)


def test_keys_that_leave_something_out_are_told(cache: FeatureCache) -> None:
    distiller, _, _ = make(cache)
    distiller.expert_features(images(), ["a", "b"])
    with pytest.raises(ValueError, match=r"got another map '0': keys must hold all that an image's pixels"):
        distiller.expert_features(images().flip(3), ["a", "b"])  # mirrored, which the keys do not say


def test_maps_of_another_precision_are_misses(cache: FeatureCache) -> None:
    distiller, _, runs = make(cache)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = distiller.expert_features(images(), KEYS)
        assert equal(distiller.expert_features(images(), KEYS), half)
    assert {m.dtype for m in half.values()} == {torch.bfloat16}
    assert {m.dtype for m in distiller.expert_features(images(), KEYS).values()} == {torch.float32}
    assert len(runs) == 3  # one of them to compare


def test_a_new_process_finds_the_folder(tmp_path: Path) -> None:
    first = make(FeatureCache(tmp_path))[0].expert_features(images(), KEYS)
    distiller, _, runs = make(FeatureCache(tmp_path))
    for _ in range(3):
        assert equal(distiller.expert_features(images(), KEYS), first)
    assert runs == [2]  # to be compared, once


def test_a_key_that_leaves_something_out_now_and_then_is_found(cache: FeatureCache) -> None:
    distiller, _, runs = make(cache)
    for _ in range(3):
        distiller.expert_features(images(1), ["a"])
    turned = images(1).flip(3)
    distiller.expert_features(turned, ["a"])  # the third out of the cache, which is not compared
    with pytest.raises(ValueError, match="keys must hold all that an image's pixels depend on"):
        distiller.expert_features(turned, ["a"])
    assert runs == [1, 1, 1]


def test_it_is_bounded_and_forgets_what_was_unused_for_longest(cache: FeatureCache) -> None:
    size = (4 * 8 * 12 + 6 * 4 * 6 + 8 * 2 * 3) * 4
    if cache.folder is not None:
        make(cache)[0].expert_features(images(1), ["x"])
        size = next(cache.folder.glob("*.pt")).stat().st_size
        cache.clear()
    bounded = FeatureCache(cache.folder, max_bytes=3 * size + size // 2)
    distiller, _, runs = make(bounded)
    for key in ("a", "b", "c", "a", "d"):  # the fourth is a use of a
        distiller.expert_features(images(1), [key])
        time.sleep(0.02)  # file times
    assert len(bounded) <= 3
    runs.clear()
    distiller.expert_features(images(1), ["a"])
    assert not runs
    distiller.expert_features(images(1), ["b"])
    assert runs == [1]
    small = FeatureCache(cache.folder, max_bytes=10)
    make(small)[0].expert_features(images(1), ["e"])
    assert len(small) <= len(bounded)
    with pytest.raises(ValueError, match="max_bytes: expected a positive number, got 0"):
        FeatureCache(max_bytes=0)


def test_a_full_folder_is_not_looked_through_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(images: Tensor) -> Any:
        return {"p": images}, None

    FeatureCache(tmp_path).get(torch.zeros(1, 128, 128), ["x"], "expert", run)
    size = next(tmp_path.glob("*.pt")).stat().st_size
    cache = FeatureCache(tmp_path, max_bytes=64 * size)
    looks, trim = [], cache._trim
    monkeypatch.setattr(cache, "_trim", lambda: looks.append(1) or trim())
    for i in range(192):
        cache.get(torch.zeros(1, 128, 128), [i], "expert", run)
        assert len(cache) <= 64 + 4
    # Four entries, a sixteenth of the bound, are removed at a time.
    assert len(looks) <= 192 // 4 + 1
    assert 60 <= len(cache) <= 64 + 4


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(FeatureCache(tmp_path))[0].expert_features(images(), KEYS)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cache = FeatureCache(tmp_path)
    distiller, _, runs = make(cache)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("it is another's")

    for name in ("utime", "replace"):
        monkeypatch.setattr("os." + name, refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    assert equal(distiller.expert_features(images(), KEYS), first)
    assert (cache.hits, cache.misses) == (2, 0)
    with pytest.warns(UserWarning, match="cannot be written, so no more is kept there: it is another's"):
        distiller.expert_features(images(seed=1), ["c", "d"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller.expert_features(images(seed=1), ["c", "d"])
    assert runs == [2, 2, 2]  # the first out of the cache is compared
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_that_are_sound_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distiller, _, runs = make(FeatureCache(tmp_path))
    first = distiller.expert_features(images(), KEYS)
    before = set(tmp_path.iterdir())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        patch.setattr(Path, "unlink", fail)
        with pytest.warns(UserWarning, match="cannot be read: too many open files"):
            assert equal(distiller.expert_features(images(), KEYS), first)
    assert runs == [2, 2]
    assert set(tmp_path.iterdir()) == before


def test_damaged_files_are_misses(tmp_path: Path) -> None:
    distiller, _, runs = make(FeatureCache(tmp_path))
    first = distiller.expert_features(images(), KEYS)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    assert equal(distiller.expert_features(images(), KEYS), first)
    assert runs == [2, 2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_half_precision_in_the_cache(cache: FeatureCache) -> None:
    half = FeatureCache(cache.folder, dtype=torch.float16)
    distiller, *_ = make(half)
    first, second = (distiller.expert_features(images(), KEYS) for _ in range(2))
    assert {m.dtype for m in first.values()} == {torch.float16}
    assert equal(first, second)
    maps = Network().features(images())
    loss = distiller(images(), BOXES, maps, keys=KEYS)
    torch.testing.assert_close(loss, distiller(images(), BOXES, maps), rtol=1e-2, atol=0)  # float16: three digits


def test_keys_are_checked() -> None:
    distiller, *_ = make(FeatureCache())
    with pytest.raises(ValueError, match="keys: expected 2, one per image, got 1"):
        distiller.expert_features(images(), ["a"])
    for wrong in (torch.zeros(2), np.zeros(2), object()):
        with pytest.raises(TypeError, match="keys: expected numbers, text, and tuples or lists of them, got "):
            distiller.expert_features(images(), [wrong, "a"])


def test_numbers_are_keys_in_whatever_form_they_come(cache: FeatureCache) -> None:
    distiller, _, _ = make(cache)
    for seven in (7, np.int64(7), torch.tensor(7), torch.tensor([7])):
        distiller.expert_features(images(1), [(seven, np.bool_(True))])
    assert (cache.misses, cache.hits) == (1, 3)


WRITER = """
import torch
from distill_cases import STAGES, Network, images
from rakd.distill import Distiller, FeatureCache
torch.set_num_threads(1)
expected = Distiller(Network((4, 6, 8), seed=1), features=STAGES)
cache = FeatureCache({cache!r}, max_bytes=40_000)  # a few entries: processes remove each other's
distiller = Distiller(Network((4, 6, 8), seed=1), features=STAGES, cache=cache)
for step in range(60):
    key = step % 7
    got = distiller.expert_features(images(1, seed=key), [key])
    for name, feature in expected.expert_features(images(1, seed=key)).items():
        assert torch.equal(feature, got[name]), (step, name)
"""


def test_processes_share_a_folder(tmp_path: Path) -> None:
    code = WRITER.format(cache=str(tmp_path))
    run_two_processes("-c", code, count=3)
    # Each process looks through the folder after it wrote a sixteenth of the bound, or an entry that is larger.
    entries = [path.stat().st_size for path in tmp_path.iterdir()]
    assert 0 < sum(entries) <= 40_000 + 3 * max(entries)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_scores_are_cached_too(cache: FeatureCache) -> None:
    expert = Network((4, 6, 8), seed=1)
    names = [f"head.scores.{i}" for i in range(3)]
    distiller = Distiller(expert, "score_l2", features=STAGES, scores=names, cache=cache)
    maps = Network().features(images())
    expected = distiller(images(), BOXES, maps)
    assert expected > 0
    for _ in range(2):
        assert torch.equal(distiller(images(), BOXES, maps, keys=KEYS), expected)
    assert cache.hits == 2


def test_a_dtype_and_a_memory_format_of_its_own() -> None:
    network = Network((4, 6, 8), seed=1)
    seen: list[tuple[torch.dtype, bool]] = []
    network.register_forward_pre_hook(
        lambda _, a: seen.append((a[0].dtype, a[0].is_contiguous(memory_format=torch.channels_last)))
    )
    expert = Expert(network, features=STAGES, dtype=torch.bfloat16, channels_last=True)
    distiller = Distiller(expert, canonical_size=24)
    with torch.autocast("cpu", dtype=torch.float16):  # the apprentice's
        loss = distiller(images(), BOXES, Network().features(images()))
    assert seen == [(torch.bfloat16, True)]
    distiller.double()
    assert network.stages[0].conv.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    expected = make(FeatureCache())[0](images(), BOXES, Network().features(images()))
    torch.testing.assert_close(loss, expected, rtol=5e-2, atol=0)  # bfloat16: two digits


def test_a_compiled_expert() -> None:
    expert = Expert(Network((4, 6, 8), seed=1), features=STAGES, compiled={"backend": "aot_eager"})
    distiller = Distiller(expert, canonical_size=24)
    plain = make(FeatureCache())[0]
    maps = Network().features(images())
    torch.testing.assert_close(distiller(images(), BOXES, maps), plain(images(), BOXES, maps))
