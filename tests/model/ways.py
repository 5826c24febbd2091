"""One gradient by the model as it is, and by each of its memory-efficient executors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from saliency_fast.engine.memory import Ledger, MemoryMeter
from saliency_fast.graph.passes.fusion import fused
from saliency_fast.model.executors import (
    EagerExecutor,
    Executor,
    InterceptedExecutor,
    RecordedExecutor,
)
from tests.model.recording import record
from tests.models import randn

Model = Callable[..., Any]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Taken:
    """outputs and the gradient of an uneven sum of them; kept: bytes from forward to backward.

    nodes: the names of the functions that autograd goes through.
    """

    outputs: list[Tensor] = field(repr=False)
    gradient: Tensor = field(repr=False)
    kept: int
    nodes: frozenset[str]


def take(executor: Executor, x: Tensor) -> Taken:
    """One launch, with the points made inside, so that keeping them counts."""
    leaf, ledger = x.clone().requires_grad_(), Ledger(MemoryMeter())
    with ledger.meter, ledger:
        point = leaf.clone(memory_format=torch.preserve_format)
        raw = executor((point,), (), {})
        del point
    outputs = [one for one in tree_leaves(raw) if isinstance(one, Tensor)]
    passing = [one for one in outputs if one.requires_grad]
    total = sum((_real(one) * randn(*_real(one).shape, seed=9)).sum() for one in passing)
    (gradient,) = torch.autograd.grad(total, leaf)
    nodes = frozenset(_nodes(passing))
    plain = [one.detach().clone() for one in outputs]
    return Taken(plain, gradient, sum(ledger.kept.values()), nodes)


def _real(y: Tensor) -> Tensor:
    return torch.view_as_real(y) if y.is_complex() else y


def _nodes(outputs: list[Tensor]) -> Iterator[str]:
    waiting = [one.grad_fn for one in outputs]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node.name()
            waiting += [one for one, _ in node.next_functions]


def executors(model: Model, x: Tensor) -> dict[str, Executor]:
    """Every memory-efficient executor of a model that can be recorded."""
    program = fused(record(model, x))
    found: dict[str, Executor] = {
        "watched": InterceptedExecutor(model),
        "program": RecordedExecutor(program),
    }
    if x.dim() in FORMATS:
        found["channels last"] = RecordedExecutor(replace(program, channels_last=True))
    return found


def compare(found: Taken, expected: Taken, tolerance: float, where: str = "") -> None:
    """Asserts that outputs and gradient agree, each in relative L2."""
    assert len(found.outputs) == len(expected.outputs), where
    pairs = [*zip(found.outputs, expected.outputs, strict=True)]
    for number, (a, b) in enumerate([*pairs, (found.gradient, expected.gradient)]):
        what = f"{where}: " + ("gradient" if number == len(pairs) else f"output {number}")
        assert a.shape == b.shape, f"{what}: {tuple(a.shape)}, expected {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{what}: {a.dtype}, expected {b.dtype}"
        # Not through a subtraction alone: infinities are equal to themselves.
        gap = torch.where(a == b, torch.zeros_like(a), a - b).abs().double().norm()
        scale = b.abs().double().nan_to_num(0, 0, 0).norm()
        # As "not within", so that NaN fails.
        assert float(gap) <= tolerance * float(scale), f"{what}: off by {float(gap / scale):.2g}"


def check(model: Model, x: Tensor, tolerance: float = 1e-12) -> dict[str, Taken]:
    """Compares every memory-efficient executor with plain autograd; returns what each one took."""
    expected = take(EagerExecutor(model), x)
    taken = {name: take(executor, x) for name, executor in executors(model, x).items()}
    for name, one in taken.items():
        compare(one, expected, tolerance, name)
    return {"plain": expected, **taken}
