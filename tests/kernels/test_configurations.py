"""The table of configurations: every launcher takes its kernel's size from it, and nothing else."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from saliency_fast.kernels.configurations import TABLE, Choice, Configuration, target_of

from benchmarks.tuning import OP_OF, VERSUS, call_for, candidates, using
from saliency_fast.ops import OPS

SIZES = {"BLOCK": 1, "BLOCKS": 4, "GROUPS": 8}
"""The constants that cut a kernel into programs, and the elements that each counts."""


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **constants: self.launches.append({"grid": grid, **constants})


def launches(kernel: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the kernel's op launches it with, of its sample that moves most bytes."""
    recorders = {}
    for name in TABLE:
        stem, function = name.split(".")
        module = importlib.import_module(f"saliency_fast.kernels.{stem}")
        recorders[name] = Recorder()
        monkeypatch.setattr(module, f"_{function}", recorders[name])
    op = OPS[OP_OF[kernel]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sample = max(op.samples(), key=lambda one: op.moved(*one.args))
    op.launcher("triton")(*sample.args)
    return recorders[kernel].launches


@pytest.mark.parametrize("kernel", TABLE)
def test_every_launcher_uses_the_table(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Configuration(2**15, warps=16, ahead=32, tiles=64)
    with using(kernel, odd):
        found = launches(kernel, monkeypatch)
    assert found
    for launch in found:
        read = {"warps"} if launch["num_warps"] == odd.warps else set()
        read |= {"elements" for name, n in SIZES.items() if launch.get(name, 0) * n == odd.elements}
        read |= {"ahead"} if launch.get("AHEAD") == odd.ahead else set()
        read |= {"tiles"} if launch.get("TILES") == odd.tiles else set()
        assert read == set(TABLE[kernel].free), launch


@pytest.mark.parametrize("name", ["elements", "tiles"])
@pytest.mark.parametrize("kernel", TABLE)
def test_larger_programs_are_fewer(kernel: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []
    for number in (8, 32):
        with using(kernel, replace(Configuration(8), **{name: number})):
            programs.append(launches(kernel, monkeypatch)[0]["grid"][0])
    if name in TABLE[kernel].free:
        assert programs[0] > 3 * programs[1]
    else:
        assert programs[0] == programs[1]


@pytest.mark.parametrize("kernel", TABLE)
def test_without_candidates_the_checked_in_one_is_launched(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (warps,) = {launch["num_warps"] for launch in launches(kernel, monkeypatch)}
    assert warps in {one.warps for one in TABLE[kernel].widths.values()}


def test_lookups() -> None:
    small, large = Configuration(256), Configuration(512)
    choice = Choice("why", {4: small, 8: small}, {"gfx9": {4: large}})
    assert choice.at(4, "sm_90") is choice.at(4, "gfx1100") is small
    assert choice.at(4, "gfx942") is large
    assert choice.at(8, "gfx942") is small
    assert target_of(torch.device("cpu")) == ""
    with pytest.raises(KeyError):
        choice.at(2)


@pytest.mark.parametrize("change", [{"elements": 384}, {"warps": 3}, {"ahead": 0}, {"tiles": -1}])
def test_configurations_are_powers_of_two(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="powers of two"):
        replace(Configuration(512), **change)


@pytest.mark.parametrize("kernel", TABLE)
def test_candidates_begin_with_the_checked_in_and_keep_what_is_not_free(kernel: str) -> None:
    for width, chosen in TABLE[kernel].widths.items():
        found = candidates(kernel, width, "sm_90")
        assert found[0] == chosen
        assert len(set(found)) == len(found) >= 4
        for name in {"elements", "warps", "ahead", "tiles"} - set(TABLE[kernel].free):
            assert {getattr(one, name) for one in found} == {getattr(chosen, name)}


def test_every_kernel_has_an_op_and_every_twin_is_compared() -> None:
    assert set(OP_OF) == set(TABLE)
    on_gpus = {name for name, op in OPS.items() if op.triton}
    assert set(OP_OF.values()) | {"relu_mask_"} == on_gpus
    assert set(VERSUS) == {op.name for op in OPS.values() if op.cuda}
    for kernel, op in OP_OF.items():
        for width in TABLE[kernel].widths:
            assert call_for(op, width, "meta").op.name == op
