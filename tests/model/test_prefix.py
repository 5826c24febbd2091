"""The affine prefix against the whole model at every point: same maps, same error, same scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import saliency_fast as sf
from saliency_fast.engine.calibrate import Calibration
from saliency_fast.errors import ModelError
from saliency_fast.graph import opinfo
from saliency_fast.graph.passes import affine_prefix as prefixes
from saliency_fast.graph.passes.affine_prefix import Prefix, check_affine, prefix_of
from saliency_fast.graph.recorder import unified
from saliency_fast.model.executors import RecordingExecutor
from tests.configured import ALWAYS_LEAN, configure
from tests.model.stems import IMAGE, STEMS, Chain, Net, Stem, chains
from tests.models import randn
from tests.traces import one_thread, unchanged

# Rounding of a sum of some dozen float64 terms, with room for the model's own conditioning.
FLOAT64, FLOAT32, REPORTED = 1e-12, 1e-5, 1e-9
METHODS = {
    "midpoint": sf.IntegratedGradients(6),
    "trapezoid": sf.IntegratedGradients(5, "trapezoid"),
    "tolerance": sf.IntegratedGradients(5, "trapezoid", tolerance=1e-2, max_steps=40),
    "smoothgrad": sf.SmoothGrad(6, sigma=0.3, seed=4),
}
some = pytest.mark.parametrize(
    "name", ["conv, norm, relu", "patches", "two branches", "skip", "conditioned", "two images"]
)


@pytest.fixture(autouse=True, scope="module")
def _lean_however_small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, one_thread():
        configure(patch, **ALWAYS_LEAN)
        yield


@contextmanager
def forced() -> Iterator[None]:
    """The prefix wherever there is one, whether it pays or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "_gain", lambda *_, **__: 1.0)
        yield


def probed(engine: sf.Engine) -> Calibration:
    (found,) = engine._location.cache.values()
    return found


def parts(att: sf.Attribution) -> tuple[Tensor, ...]:
    return att.values if isinstance(att.values, tuple) else (att.values,)


def check(found: sf.Attribution, expected: sf.Attribution, tolerance: float = FLOAT64) -> None:
    for one, other in zip(parts(found), parts(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        # Against the scale of the map: an input that some example ignores has a map of zeros.
        gap = (one - other).norm() / other.norm().clamp_min(1e-9)
        assert float(gap) < tolerance
    for name in ("scores", "baseline_scores", "delta", "error", "points", "converged"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            reported = max(REPORTED, tolerance)
            torch.testing.assert_close(mine, theirs, rtol=reported, atol=reported, equal_nan=True)


def once(
    stem: Stem, method: Any, target: Any = 1, size: int | None = 7, lean: bool = True, **more: Any
) -> tuple[sf.Attribution, Prefix | None]:
    engine = sf.Engine(stem.model(), method, points_per_launch=size, lean=lean)
    with forced():
        found = engine(stem.inputs(), target, forward_args=stem.arguments(), **more)
    return found, probed(engine).strategy.prefix


def explained(
    stem: Stem, method: Any, *args: Any, **more: Any
) -> tuple[sf.Attribution, sf.Attribution, Prefix | None]:
    """By the prefix, by the model as it is, and the prefix."""
    found, prefix = once(stem, method, *args, **more)
    return found, once(stem, method, *args, lean=False, **more)[0], prefix


@pytest.mark.parametrize("method", ["midpoint", "smoothgrad"])
@pytest.mark.parametrize("name", STEMS)
def test_every_stem(name: str, method: str) -> None:
    stem = STEMS[name]
    found, expected, prefix = explained(stem, METHODS[method])
    check(found, expected)
    calls = () if prefix is None else tuple(dict.fromkeys(prefix.calls))
    assert stem.hoisted is None or calls == stem.hoisted
    assert float(parts(expected)[0].abs().max()) > 0


@some
@pytest.mark.parametrize("rule", ["gauss_legendre", "left", "right", "refined"])
def test_every_rule(name: str, rule: str) -> None:
    method = METHODS["tolerance"] if rule == "refined" else sf.IntegratedGradients(6, rule)
    found, expected, prefix = explained(STEMS[name], method)
    assert prefix is not None
    check(found, expected)


@pytest.mark.parametrize(
    "name", [name for name, one in STEMS.items() if one.smooth and one.hoisted]
)
def test_float32(name: str) -> None:
    stem = STEMS[name]
    narrow = partial(torch.Tensor.to, dtype=torch.float32)
    x, further = stem.inputs(), tuple(map(narrow, stem.arguments()))
    x = tuple(map(narrow, x)) if isinstance(x, tuple) else narrow(x)
    found = []
    for lean in (True, False):
        engine = sf.Engine(
            stem.model().float(), METHODS["midpoint"], lean=lean, points_per_launch=7
        )
        with forced():
            found.append(engine(x, 1, forward_args=further))
    check(*found, tolerance=FLOAT32)


@some
@pytest.mark.parametrize("method", ["trapezoid", "smoothgrad"])
def test_launches_of_any_size(name: str, method: str) -> None:
    expected, _ = once(STEMS[name], METHODS[method], lean=False)
    for size in (1, 3, None):
        found, prefix = once(STEMS[name], METHODS[method], size=size)
        assert prefix is not None
        check(found, expected)


@some
@pytest.mark.parametrize("target", [[[1, 2], [0, 3], [3, 3]], [2, 0, 3], "predicted"])
def test_targets(name: str, target: Any) -> None:
    for method in ("midpoint", "smoothgrad"):
        found, expected, prefix = explained(STEMS[name], METHODS[method], target)
        assert prefix is not None
        check(found, expected)


BASELINES = {
    "number": 0.4,
    "one for all": randn(1, *IMAGE, seed=60),
    "one each": randn(3, *IMAGE, seed=61),
    "channels": randn(3, 1, 1, seed=62),
    "several": [None, randn(3, *IMAGE, seed=63), randn(1, *IMAGE, seed=64)],
    "blur": "blur",
}


@pytest.mark.parametrize("name", ["conv, norm, relu", "skip", "conditioned"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines(name: str, baseline: str) -> None:
    options, method = {"baseline": BASELINES[baseline]}, METHODS["midpoint"]
    found, expected, prefix = explained(STEMS[name], method, **options)
    assert prefix is not None
    check(found, expected)


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("first", [True, False])
def test_inputs_with_baselines_of_different_lengths(first: bool, size: int) -> None:
    pair = (randn(3, *IMAGE, seed=61), None)
    baseline = pair if first else pair[::-1]
    found, expected, _ = explained(
        STEMS["two images"], METHODS["midpoint"], 1, size, baseline=baseline
    )
    check(found, expected)


@some
@pytest.mark.parametrize("method", ["midpoint", "tolerance", "smoothgrad"])
def test_streams(name: str, method: str) -> None:
    stem, partial_maps = STEMS[name], []
    for lean in (True, False):
        engine = sf.Engine(stem.model(), METHODS[method], lean=lean, points_per_launch=4)
        with forced():
            stream = engine.stream(stem.inputs(), 1, forward_args=stem.arguments())
            partial_maps.append(list(stream))
    assert len(partial_maps[0]) > 1
    for one, other in zip(*partial_maps, strict=True):
        check(one, other)


class Heads(Net):
    """Two outputs, each from a branch of its own."""

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        found = {"left": self.a(*inputs), "right": self.b(*inputs)}
        return {name: functional.gelu(one).flatten(1).sum(1) for name, one in found.items()}


def test_targets_that_see_a_part_of_the_places() -> None:
    conv, x = partial(nn.Conv2d, 3, 4, 3), STEMS["conv"].inputs()
    targets = (
        lambda raw: raw["left"] + raw["right"],
        lambda raw: raw["left"],
        lambda raw: raw["right"] ** 2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Heads(lambda m, x: m.a(x), IMAGE, a=conv(), b=conv())
    for method in (METHODS["midpoint"], METHODS["smoothgrad"]):
        engine = sf.Engine(model, method, points_per_launch=7)
        plain = sf.Engine(model, method, points_per_launch=7, lean=False)
        for target in targets:
            with forced():
                found = engine(x, target)
            check(found, plain(x, target))
    assert [one.strategy.prefix is not None for one in engine._location.cache.values()].count(
        True
    ) == 2


@pytest.mark.parametrize("method", ["midpoint", "smoothgrad"])
@pytest.mark.parametrize(
    "name", ["normalised in place", "table in place", "skip", "overwritten view", "entry set"]
)
def test_leaves_no_trace(name: str, method: str) -> None:
    stem = STEMS[name]
    model, x, start = stem.model(), stem.inputs(), stem.inputs(seed=60)
    line = {"baseline": start} if method == "midpoint" else {}
    with forced(), unchanged(model, x, start):
        sf.explain(model, x, target=1, method=METHODS[method], **line)


def test_the_plan_names_what_is_taken_once() -> None:
    x = STEMS["patches"].inputs()
    with forced():
        line = sf.Engine(STEMS["patches"].model(), METHODS["midpoint"]).plan(x, 1)
        noise = sf.Engine(STEMS["patches"].model(), METHODS["smoothgrad"]).plan(x, 1)
        refused = sf.Engine(STEMS["square"].model(), METHODS["midpoint"]).plan(x, 1)
    assert line.prefix == "conv2d, flatten, transpose, cat, add: forward and back once in all"
    assert noise.prefix == "conv2d, flatten, transpose, cat, add: back once in all"
    assert refused.prefix == ""


def recorded(model: nn.Module, *shape: int) -> Any:
    runs = []
    for rows in (1, 2):
        recording = RecordingExecutor(model)
        recording((randn(rows, *shape),), (), {})
        runs.append(recording.program)
    return unified(*runs)


NOT_AFFINE = {
    "relu": functional.relu,
    "abs": torch.abs,
    "max_pool2d": lambda x: functional.max_pool2d(x, 2),
    "tanh": torch.tanh,
    "square": torch.square,
    "softmax": lambda x: x.softmax(1),
    "sign": torch.sign,
}


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_a_call_that_is_not_affine_is_found_out(name: str, monkeypatch: Any) -> None:
    call = NOT_AFFINE[name]
    stem = Stem(lambda: Net(lambda m, x: call(x) * m.wide, IMAGE, wide=randn(1)), (IMAGE,), None)
    known = opinfo.TABLE.get(name, opinfo.UNKNOWN)
    monkeypatch.setitem(opinfo.TABLE, name, replace(known, linear="first"))
    for method in (METHODS["midpoint"], METHODS["smoothgrad"]):
        found, expected, prefix = explained(stem, method)
        assert prefix is None
        check(found, expected)
    with forced():
        prefix = prefix_of(recorded(stem.model(), *IMAGE), channels_last=False, line=True)
    assert prefix is not None
    for point in (randn(1, *IMAGE), torch.zeros(1, *IMAGE).double(), randn(1, *IMAGE).abs()):
        with pytest.raises(ModelError, match="the prefix is not affine"):
            check_affine(prefix, (point,), [])


@pytest.mark.parametrize("name", ["conv", "patches", "normalised in place", "volume"])
def test_affine_stems_pass(name: str) -> None:
    stem = STEMS[name]
    with forced():
        found = prefix_of(recorded(stem.model(), *stem.shapes[0]), channels_last=False, line=True)
    assert found is not None
    point = stem.inputs(1)
    for scale in (0.0, 1.0, 1e6):
        check_affine(found, (point * scale,), [])


def test_places_that_the_stem_itself_overwrites_are_refused() -> None:
    with forced():
        program = recorded(STEMS["looked at and overwritten"].model(), *IMAGE)
        assert prefix_of(program, channels_last=False, line=True) is None


# When it pays.


def gain(layer: nn.Module, *shape: int, line: bool = True) -> float:
    """Positive where the prefix is chosen."""
    seen = []

    def spy(*args: Any, **kwargs: Any) -> float:
        seen.append(before(*args, **kwargs))
        return seen[-1]

    before = prefixes._gain
    model = Net(lambda m, x: m.layer(x), shape, layer=layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "_gain", spy)
        chosen = prefix_of(recorded(model, *shape), channels_last=False, line=line)
    assert (chosen is not None) == (seen[0] > 0)
    return seen[0]


def test_pays_where_the_stem_costs_more_than_its_places() -> None:
    side = (3, 32, 32)
    for line in (True, False):
        assert gain(nn.Conv2d(3, 64, 7, 2, 3), *side, line=line) > 0
        assert gain(nn.Conv2d(3, 48, 8, 8), *side, line=line) > 0
        assert gain(nn.Conv3d(1, 16, 5, padding=2), 1, 8, 8, 8, line=line) > 0
        # Measured: as fast with as without, in a U-Net, and larger with.
        assert gain(nn.Conv3d(1, 16, 3, padding=1), 1, 8, 8, 8, line=line) < 0
        assert gain(nn.AvgPool2d(4), *side, line=line) > 0
        assert gain(nn.Conv2d(3, 512, 1), *side, line=line) < 0
        assert gain(nn.Upsample(scale_factor=4), *side, line=line) < 0


def test_gain_follows_the_work_and_the_places() -> None:
    kernels = [gain(nn.Conv2d(3, 32, n, padding=n // 2), 3, 16, 16) for n in (1, 3, 5, 7)]
    assert kernels == sorted(kernels)
    widths = [gain(nn.Conv2d(3, n, 1), 3, 16, 16) for n in (16, 64, 256)]
    assert widths == sorted(widths, reverse=True)
    layer, normed = nn.Conv2d(3, 8, 7), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 7))
    assert gain(layer, 3, 16, 16) > gain(layer, 3, 16, 16, line=False) > 0
    assert len({gain(layer, 3, 16, 16) for _ in range(3)}) == 1
    assert gain(normed, 3, 16, 16) == pytest.approx(gain(layer, 3, 16, 16))


def test_linear_sums_alone_have_an_affine_prefix() -> None:
    taken = (sf.IntegratedGradients(4), sf.SmoothGrad(4))
    left = (
        sf.Gradient(),
        sf.Gradient(absolute=True),
        sf.InputXGradient(),
        sf.IntegratedGradients(3),
        sf.SmoothGradSquared(8),
        sf.VarGrad(8),
        sf.ExpectedGradients(8, noise_level=0.1),
    )
    assert all(method.recipe().prefixed(4) for method in taken)
    for method in left:
        assert not method.recipe().prefixed(4)
        found, expected, prefix = explained(STEMS["conv"], method)
        assert prefix is None
        check(found, expected)


@pytest.mark.parametrize("merge", [lambda x: x.view(-1, 3, 3, 3), lambda x: x.flatten(0, 1)])
def test_frames_merged_with_the_batch_in_any_memory_order(merge: Any) -> None:
    clip = (4, 3, 3, 3)

    def frames(m: Net, x: Tensor) -> Tensor:
        return m.a(merge(x)).reshape(len(x), -1)

    stem = Stem(lambda: Net(frames, clip, a=nn.Conv2d(3, 4, 3)), (clip,), None)
    for method in ("midpoint", "smoothgrad"):
        check(*explained(stem, METHODS[method])[:2])


@settings(max_examples=60, deadline=None)
@given(chains(), st.sampled_from(sorted(METHODS)), st.integers(1, 9))
def test_random_stems(case: tuple[Chain, Tensor, int], method: str, size: int) -> None:
    model, x, affine = case
    engine = sf.Engine(model, METHODS[method], points_per_launch=size)
    with forced():
        found = engine(x, 1)
    prefix = probed(engine).strategy.prefix
    assert (prefix is not None) == (affine > 0)
    plain = sf.Engine(model, METHODS[method], points_per_launch=size, lean=False)
    plain._location.caches = {}
    check(found, plain(x, 1))
