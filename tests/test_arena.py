"""The launches' arena: memory that is right, laid out as foretold, and given back."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.arena import LEAST, RESERVED, Arena, LaunchMemory, Trace
from saliency_fast.engine.memory import resident_bytes
from saliency_fast.ops.dispatch import backends
from tests.configured import RECORDED, configure
from tests.models import randn

CPU = torch.device("cpu")
MIB = 2**20
PAGE = 2 * MIB
pytestmark = pytest.mark.skipif(
    not backends()["cpu"].startswith("native"), reason="the C++ ops are not built or not wanted"
)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(CPU)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also few points are planned before they run."""
    configure(monkeypatch, **RECORDED)


def filled(number: int, size: int) -> Tensor:
    return torch.full((size,), number, dtype=torch.uint8)


def span(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + x.nbytes


def test_only_large_tensors_of_a_launch(arena: Arena) -> None:
    before = torch.empty(MIB)
    with arena.launch():
        small = filled(1, LEAST - 1)
        assert arena.extent == 0
        one = filled(2, LEAST)
        assert arena.extent == PAGE
        other = filled(3, MIB)
    after = filled(4, 8 * MIB)
    assert arena.extent == PAGE
    assert span(other)[0] == span(one)[1]
    assert all(span(x)[0] % 64 == 0 for x in (small, one, other))
    del before, after


def test_memory_is_taken_again(arena: Arena) -> None:
    places = set()
    for _ in range(20):
        with arena.launch():
            a, b = filled(1, 3 * MIB), filled(2, MIB)
            del a
            c = filled(3, 2 * MIB)
            places.add((span(b), span(c)))
            del b, c
    assert len(places) == 1
    assert arena.extent <= 3 * PAGE


def test_threads_and_launches_apart(arena: Arena) -> None:
    """What one thread enters, others do not; within a launch another may stand."""
    inner, found = Arena(CPU), []
    with arena.launch():
        worker = threading.Thread(target=lambda: found.append(filled(1, MIB)))
        worker.start()
        worker.join()
        assert arena.extent == 0
        with inner.launch():
            one = filled(2, MIB)
        assert (arena.extent, inner.extent) == (0, PAGE)
        two = filled(3, MIB)
        assert arena.extent == PAGE
    inner.close()
    assert [int(x[-1]) for x in (*found, one, two)] == [1, 2, 3]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_tensors_outlive_their_arena(where: str) -> None:
    arena = Arena(CPU)
    with arena.launch():
        kept = [filled(number, MIB + number) for number in range(8)]
    del kept[::2]
    arena.close()
    assert all(bool((x == x[0]).all()) for x in kept)
    resized = kept.pop().resize_(4 * MIB)
    assert int(resized[MIB]) == 7
    if where == "elsewhere":
        worker = threading.Thread(target=kept.clear)
        worker.start()
        worker.join()
    kept.clear()


def test_what_outlives_an_arena_stays_whole() -> None:
    """Beside memory that goes back to the system, by pages: tensors begin and end within them."""
    sizes = [LEAST + 1000 * number for number in range(1, 60)]
    for kept_of in (0, 1):
        arena = Arena(CPU)
        with arena.launch():
            made = [filled(number, size) for number, size in enumerate(sizes)]
        kept = dict(enumerate(made[kept_of::2]))
        made.clear()
        arena.close()
        for number in (*range(0, len(kept), 3), *range(1, len(kept), 3)):
            del kept[number]
            for other, x in kept.items():
                assert (x.numpy() == 2 * other + kept_of).all()
        assert kept


def test_memory_goes_back_to_the_system() -> None:
    def live(size: int) -> int:
        return resident_bytes()[0] - before

    gc.collect()
    before = resident_bytes()[0]
    arena = Arena(CPU)
    with arena.launch():
        kept, gone = filled(1, 64 * MIB), filled(2, 64 * MIB)
    del gone
    assert live(0) > 120 * MIB  # of what is closed, only the living stays
    arena.close()
    assert 56 * MIB < live(0) < 72 * MIB
    assert bool((kept == 1).all())
    del kept
    assert live(0) < 8 * MIB


def test_an_error_inside_leaves_the_arena() -> None:
    arena = Arena(CPU)
    with pytest.raises(ZeroDivisionError), arena.launch():
        raise ZeroDivisionError
    taken = filled(1, MIB)
    assert arena.extent == 0
    arena.close()
    arena.close()
    with arena.launch():
        filled(2, MIB)
    del taken


def test_other_devices_have_none() -> None:
    arena = Arena(torch.device("meta"))
    with arena.launch():
        filled(1, MIB)
    assert arena.extent == 0
    assert arena.trace() is None
    arena.close()


# LaunchMemory: lists of (bytes, how many later pieces it outlives).
pieces = st.lists(
    st.tuples(st.integers(1, 40).map(lambda n: n * LEAST // 3 + LEAST), st.integers(0, 6)),
    min_size=1,
    max_size=25,
)


def run(arena: Arena, launch: list[tuple[int, int]], expected: Trace | None = None) -> None:
    """A launch of tensors, each full of its own number until it goes."""
    alive: dict[int, Tensor] = {}

    def check(number: int) -> None:
        # By NumPy, whose own results are not the arena's.
        assert (alive[number].numpy() == number).all()

    with arena.launch(expected):
        for number, (size, _) in enumerate(launch):
            alive[number] = torch.empty(size, dtype=torch.uint8)
            alive[number].numpy().fill(number)
            for old in [one for one in alive if one + launch[one][1] <= number]:
                check(old)
                del alive[old]
        for number in alive:
            check(number)
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(map(span, alive.values()))))
        alive.clear()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(launch=pieces, other=pieces)
def test_launches_keep_their_numbers(
    launch: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    """Whatever comes: as expected it takes what was foretold, else it finds another place."""
    first, second = Arena(CPU, 1), Arena(CPU)
    run(first, launch)
    trace = first.trace()
    assert trace is not None
    assert len(trace.lives) == len(launch)
    live = max(alive_bytes(trace.lives, event) for event in range(2 * len(launch)))
    assert live <= trace.needed
    run(second, launch, trace)
    run(second, launch, trace)
    assert second.extent == trace.needed, "what is expected takes what was foretold"
    run(second, other, trace)
    run(second, launch[1:], trace)
    run(second, launch, None)
    for one in (first, second):
        one.close()


def alive_bytes(lives: Any, event: int) -> int:
    return sum(-(-size // 64) * 64 for size, start, stop in lives if start <= event < stop)


def test_launches_grow_by_rows() -> None:
    one = Trace(((3 * MIB, 0, 3), (MIB, 1, 2)))
    two = Trace(((4 * MIB, 0, 3), (MIB, 1, 2)))
    launches = LaunchMemory({2: one, 3: two})
    assert launches.consistent
    assert launches.of(3) is two
    five = launches.of(5)
    assert five == Trace(((6 * MIB, 0, 3), (MIB, 1, 2)))
    assert launches.of(5) is five
    assert launches.of(1) is None
    assert [launches.bytes_of(rows) for rows in (1, 2, 5)] == [4 * MIB, 4 * MIB, 8 * MIB]
    alone = LaunchMemory({2: one})
    assert alone.of(3) is None
    assert (alone.bytes_of(1), alone.bytes_of(3)) == (4 * MIB, None)
    assert not LaunchMemory({2: one, 3: Trace(((MIB, 0, 1),))}).consistent


class Volume(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(inplace=True)),
            *(nn.MaxPool3d(2), nn.Conv3d(8, 8, 3, padding=1), nn.GELU()),
            *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 3)),
        )


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(
    "method", [sf.IntegratedGradients(steps=9, rule="midpoint"), sf.SmoothGrad(samples=9)]
)
def test_a_plan_tells_what_launches_take(
    method: Any, lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, for launches of sizes that were never tried, and the maps stay as they are."""
    configure(monkeypatch, traced_from=1)
    model, x = Volume().eval(), randn(1, 1, 40, 40, 40).float()
    extents = []
    close = Arena.close

    def closed(arena: Arena) -> None:
        extents.append(arena.extent)
        close(arena)

    engine = sf.Engine(model, method, points_per_launch=9, lean=lean, hashes=False)
    plan = engine.plan(x, 1)
    (launches,) = next(iter(engine._location.cache.values())).launches.values()
    assert launches is not None
    monkeypatch.setattr(Arena, "close", closed)
    found = engine(x, 1)
    # Scores take less, in an arena that closes before.
    assert max(extents) == plan.launch_bytes
    assert plan.launch_bytes == launches.bytes_of(plan.points_per_launch)
    configure(monkeypatch, traced_from=2**60)
    other = sf.Engine(Volume().eval(), method, points_per_launch=9, lean=lean, hashes=False)
    other.model.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x, 1).values, found.values, rtol=1e-4, atol=1e-9)


def reservations() -> int:
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split()[0].split("-"))
        found += stop - start >= RESERVED
    return found


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell")
def test_nothing_stays_reserved() -> None:
    """Of calls, of plans, of streams that are left, and of errors."""

    class Fails(Volume):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise ZeroDivisionError
            return super().forward(x)

    model, x = Fails().eval(), randn(1, 1, 40, 40, 40).float()
    gc.collect()
    before = reservations()
    for lean in (True, False):
        engine = sf.Engine(model, sf.IntegratedGradients(steps=9), lean=lean, hashes=False)
        engine.plan(x, 1)
        engine(x, 1)
        stream = engine.stream(x, 1)
        next(stream)
        stream.close()
        model.fails = True
        engine._location.cache.clear()
        with pytest.raises(sf.errors.ModelError, match="ZeroDivisionError"):
            engine(x, 1)
        model.fails = False
    gc.collect()
    assert reservations() == before


def test_a_plan_tells_the_time() -> None:
    model, x = Volume().eval(), randn(1, 1, 24, 24, 24).float()
    engine = sf.Engine(model, sf.IntegratedGradients(steps=16), hashes=False)
    plan = engine.plan(x, 1)
    assert plan.seconds is not None
    assert f"{plan.seconds:.3g} s: " in str(plan)
    result = engine(x, 1)
    assert plan.seconds < 20 * result.provenance.seconds  # other things may run beside it
    later = engine.plan(x, 1).seconds
    assert later is not None
    assert later <= result.provenance.seconds


def test_a_model_that_fails_on_trial() -> None:
    """Is told by the call itself, as ever."""

    class Picky(Volume):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise ValueError("two at most")
            return super().forward(x)

    x = randn(1, 1, 40, 40, 40).float()
    engine = sf.Engine(Picky(), sf.IntegratedGradients(steps=9), lean=False, points_per_launch=9)
    engine.plan(x, 1)
    with pytest.raises(sf.errors.ModelError, match="two at most"):
        engine(x, 1)
    few = sf.Engine(Picky(), sf.IntegratedGradients(steps=9), lean=False, points_per_launch=2)
    few(x, 1)
