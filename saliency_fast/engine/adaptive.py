"""Integrals whose nodes lie where the integrand changes: each example has its own.

Some nodes are spread evenly; their gradients are kept, and tell where more are worth most. The
weights are those of a cubic between neighbours (Hermite, with slopes from three nodes), so that
smooth integrands gain from it, too. Half the difference of the same rule on every other node
estimates the error.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import Outcome, square_norm
from saliency_fast.engine.bind import Call
from saliency_fast.engine.evaluation import SumEvaluation
from saliency_fast.engine.job import Job, Report, Steps
from saliency_fast.engine.launch import EvaluationResult
from saliency_fast.engine.plan import kept_bytes
from saliency_fast.engine.recipe import GROWTH, Refinement, Rows

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

SAFETY = 1.3
"""What half the difference of two half rules is multiplied by, to be no less than the error."""
COMPARED = 2**20
"""Elements of gradients that are compared at a time."""


def weights(alpha: Array) -> Array:
    """Weights [n] of the integral over [0, 1] of the cubic Hermite interpolant through `alpha` [n],
    ascending. Slopes are those of the parabola through a node and its neighbours; beyond the
    first and the last node the interpolant goes on as a line.
    """
    count, gap = len(alpha), np.diff(alpha)
    if count < 3:
        edges = np.concatenate(([0.0], (alpha[1:] + alpha[:-1]) / 2, [1.0]))
        return np.diff(edges)
    # Row j of `rise` makes the divided difference of gap j from the values at the nodes.
    rise = np.zeros((count - 1, count))
    j = np.arange(count - 1)
    rise[j, j], rise[j, j + 1] = -1 / gap, 1 / gap
    share = (gap[1:] / (gap[1:] + gap[:-1]))[:, None]
    slope = np.concatenate((rise[:1], share * rise[:-1] + (1 - share) * rise[1:], rise[-1:]))
    before, after = alpha[0], 1 - alpha[-1]
    # Not a product of matrices: NumPy would open a library of its own for it.
    total = ((gap**2 / 12)[:, None] * (slope[:-1] - slope[1:])).sum(0)
    total += after**2 / 2 * slope[-1] - before**2 / 2 * slope[0]
    total[:-1] += gap / 2
    total[1:] += gap / 2
    total[0] += before
    total[-1] += after
    return np.asarray(total)


def rule(alpha: Array) -> tuple[Array, Array]:
    """The weights of nodes [n] in any order, and those of half the difference of the rules on every
    other node, which is NaN for fewer than four.
    """
    order = np.argsort(alpha, kind="stable")
    whole, halves = np.zeros_like(alpha), np.full_like(alpha, np.nan)
    whole[order] = weights(alpha[order])
    if len(alpha) >= 4:
        for start, sign in ((0, 0.5), (1, -0.5)):
            half = order[start::2]
            halves[half] = sign * SAFETY * weights(alpha[half])
    return whole, halves


def refined(alpha: Array, change: Array, count: int) -> Array:
    """`count` more nodes, ascending, where they are worth most: nodes `alpha` [n] ascend, and the
    gradient changes by `change` [n - 1] between neighbours. What a gap may hide is its width times
    the change, and falls with the square of the pieces that it is cut into; the ends, of which one
    side alone is known, count as gaps of twice their width.
    """
    gap = np.diff(alpha)
    ends = np.array([alpha[0], 1 - alpha[-1]])
    hidden = np.concatenate((gap * change, (2 * ends) ** 2 * (change / gap)[[0, -1]]))
    pieces = np.ones(len(hidden), dtype=np.int64)
    queue = [(-float(worth), j) for j, worth in enumerate(hidden)]
    heapq.heapify(queue)
    for _ in range(count):
        _, j = queue[0]
        pieces[j] += 1
        heapq.heapreplace(queue, (-float(hidden[j]) / float(pieces[j]) ** 2, j))
    found = list[float]()
    for j in np.flatnonzero(pieces > 1).tolist():
        number, cut = np.arange(1, pieces[j]), pieces[j]
        if j < len(gap):
            found += list(alpha[j] + gap[j] * number / cut)
        else:
            # From the known node outwards, the last piece half as wide: its outer side is an end.
            width = number / (cut - 0.5) if cut > 2 else number / 2
            first = j == len(gap)
            found += list(alpha[0] * (1 - width) if first else alpha[-1] + ends[1] * width)
    return np.sort(np.array(found))


class _Nodes:
    """A table of the nodes of a group of examples, round after round: `example` int64 [N], `alpha`
    float64 [N], and what `rule` gives for them, `weight` and `halves` [N].
    """

    def __init__(self) -> None:
        self.example = np.zeros(0, dtype=np.int64)
        self.alpha, self.weight, self.halves = (np.zeros(0) for _ in range(3))

    def append(self, examples: Sequence[int], alpha: Array) -> None:
        """Appends nodes [E, m] of some examples, nodes outermost."""
        more = np.tile(np.array(examples, dtype=np.int64), alpha.shape[1])
        self.example = np.concatenate((self.example, more))
        self.alpha = np.concatenate((self.alpha, alpha.T.reshape(-1)))
        self.weight = np.concatenate((self.weight, np.zeros(alpha.size)))
        self.halves = np.concatenate((self.halves, np.zeros(alpha.size)))

    def of(self, example: int, stop: int) -> IntArray:
        """The numbers of an example's nodes among the first `stop`."""
        return np.flatnonzero(self.example[:stop] == example)

    def rows(self, start: int, stop: int, device: torch.device) -> Rows:
        """Nodes `start` to `stop` with what the map gives them."""
        own = slice(start, stop)
        parts = (self.example, self.alpha, self.weight)
        example, alpha, weight = (torch.from_numpy(one[own]).to(device) for one in parts)
        return Rows(example, alpha, weight, torch.ones_like(example))

    def others(self, start: int, rows: Rows) -> Rows:
        """The same with what they are given in the map that tells the error."""
        own = slice(start, start + len(rows.example))
        weight = torch.from_numpy((self.weight - self.halves)[own]).to(rows.weight.device)
        return replace(rows, weight=weight, replicate=torch.zeros_like(rows.replicate))


class AdaptiveEvaluation(SumEvaluation):
    """The evaluation of an integral whose nodes each example has for itself."""

    refinement: Refinement

    def __init__(self, job: Job, call: Call, baselines: Inputs, *about: Any) -> None:
        super().__init__(job, call, baselines, *about)
        assert self.recipe.refinement is not None
        self.refinement = self.recipe.refinement
        # For each of K targets and each input the gradients [N, *] of the first nodes of the table.
        self.kept = list[Inputs]()
        self.nodes, self.seen, self.stale = _Nodes(), 0, False

    def steps(self, report: Report) -> Steps:
        yield from self.begin()
        done, of = 0, self.recipe.count * self.call.batch
        each = max(1, kept_bytes(self.refinement, self.call))
        groups = torch.split(self.everyone, max(1, self.config.kept_bytes // each))
        for group in groups:
            self._open(group)
            while self.seen < len(self.nodes.alpha):
                stop = min(self.seen + self.next_size, len(self.nodes.alpha))
                count = yield from self.launch(self.seen, stop)
                self.seen, done = self.seen + count, done + count
                round_over = self.seen == len(self.nodes.alpha)
                if round_over:
                    self._go_on()
                last = self.seen == len(self.nodes.alpha) and group is groups[-1]
                if count:
                    # Of the last nodes, maps are not what they are until all are there.
                    maps = round_over or self.seen < self._keeps
                    yield report(self, of if last else done, of, maps=maps)

    def rows(self, start: int, stop: int) -> Rows:
        return self.nodes.rows(start, stop, self.call.device)

    def add(
        self, rows: Rows, result: EvaluationResult, scale: Tensor | float | None = None
    ) -> None:
        start, own = self.seen, self.function.scale if scale is None else scale
        self.points.index_add_(0, rows.example, torch.ones_like(rows.example))
        if start >= self._keeps:
            self._add(rows, start, result.gradients, own)
            return
        self.stale = True
        for stores, gradients in zip(self.kept, result.gradients, strict=True):
            for store, gradient in zip(stores, gradients, strict=True):
                store[start : start + len(gradient)] = gradient.to(store.dtype) / own

    def outcome(self) -> Outcome:
        if self.stale:
            self._sum_up(self.seen)
        return super().outcome()

    @property
    def _keeps(self) -> int:
        """How many nodes of the table have their gradients kept."""
        return len(self.kept[0][0])

    def _open(self, group: Tensor) -> None:
        """Begins a group of examples with the nodes of the level."""
        self.nodes, self.active, self.kept, self.seen = _Nodes(), group, [], 0
        first = self.recipe.levels[0].node.numpy()
        self.nodes.append(group.tolist(), np.tile(first, (len(group), 1)))
        self._keep()

    def _keep(self) -> None:
        """Makes room for the gradients of all nodes of the table."""
        rows, kept = len(self.nodes.alpha), self.kept
        self.kept = [
            tuple(one.new_zeros(rows, *one.shape[1:]) for one in self.totals.totals)
            for _ in range(self.call.targets.count)
        ]
        for stores, earlier in zip(self.kept, kept, strict=False):
            for store, one in zip(stores, earlier, strict=True):
                store[: len(one)] = one

    def _go_on(self) -> None:
        """More nodes for the examples that need them, once all of the table were visited."""
        steps, most, tolerance = self.refinement.steps, self.refinement.most, self.recipe.tolerance
        active, over = self.active, self.seen > self._keeps
        visited = len(self.nodes.of(int(active[0]), self.seen))
        if tolerance is not None and visited >= steps:
            active = self._unfinished(active)
        if over or visited == most or active.numel() == 0:
            return
        wanted = min(steps if visited < steps else most, math.ceil(visited * GROWTH))
        examples = active.tolist()
        more = [refined(*self._change(one), wanted - visited) for one in examples]
        self.nodes.append(examples, np.stack(more))
        if wanted < most:
            self._keep()
        else:
            # Now the weights of all nodes are known, and nothing more has to be kept.
            self._sum_up(len(self.nodes.alpha))
            self.kept = [tuple(one.new_zeros(0) for one in stores) for stores in self.kept]
        self.active = active

    def _change(self, example: int) -> tuple[Array, Array]:
        """The nodes [n] of an example, ascending, and by how much the gradient times the path's
        length changes between neighbours [n - 1]; the largest share over the targets.
        """
        inputs, baselines = self.totals.inputs, self.totals.baselines
        numbers = self.nodes.of(example, self.seen)
        order = numbers[np.argsort(self.nodes.alpha[numbers], kind="stable")]
        shares = list[Array]()
        for stores in self.kept:
            squares = np.zeros(len(order) - 1)
            for store, x, base in zip(stores, inputs, baselines, strict=True):
                along = x[example] - base[example % len(base)]
                at_once = max(1, COMPARED // max(1, along.numel()))
                for start in range(0, len(squares), at_once):
                    chosen = torch.from_numpy(order[start : start + at_once + 1]).to(x.device)
                    found = square_norm(store[chosen].diff(dim=0) * along)
                    squares[start : start + len(found)] += found.cpu().numpy()
            squares = np.nan_to_num(squares)
            shares.append(np.sqrt(squares / (squares.sum() or 1.0)))
        return self.nodes.alpha[order], np.max(shares, axis=0)

    def _sum_up(self, count: int) -> None:
        """Adds up the gradients that are kept, by the rule on the first `count` nodes."""
        nodes, kept = self.nodes, min(self.seen, self._keeps)
        examples = np.unique(nodes.example[:count])
        for example in examples:
            own = nodes.of(example, count)
            nodes.weight[own], nodes.halves[own] = rule(nodes.alpha[own])
        self.totals.clear(torch.from_numpy(examples).to(self.call.device))
        gradients = [tuple(store[:kept] for store in stores) for stores in self.kept]
        self._add(self.rows(0, kept), 0, gradients, 1.0)
        self.stale = False

    def _add(self, rows: Rows, start: int, gradients: list[Inputs], scale: Tensor | float) -> None:
        """Adds gradients at rows from `start` on to the map and to what it is compared with."""
        for part in (rows, self.nodes.others(start, rows)):
            self.totals.add(part, gradients, self.source, scale)
