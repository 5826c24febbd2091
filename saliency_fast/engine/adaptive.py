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
from dataclasses import dataclass, replace
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
    total = (gap**2 / 12) @ (slope[:-1] - slope[1:])
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
    for j in np.flatnonzero(pieces > 1):
        number, cut = np.arange(1, pieces[j]), pieces[j]
        if j < len(gap):
            found += list(alpha[j] + gap[j] * number / cut)
        else:
            # From the known node outwards, the last piece half as wide: its outer side is an end.
            width = number / (cut - 0.5) if cut > 2 else number / 2
            first = j == len(gap)
            found += list(alpha[0] * (1 - width) if first else alpha[-1] + ends[1] * width)
    return np.sort(np.array(found))


@dataclass
class _Block:
    """Nodes that E examples get in one go, m each: alpha float64 [E, m]. Rows have nodes outermost.

    kept: for each of K targets and each input the gradients [m * E, *] of all rows; None where they
    are added up at once. weight, halves [E, m]: see `rule`. seen: rows that were visited, or, where
    nothing is kept, all.
    """

    examples: Tensor
    alpha: Array
    kept: list[Inputs] | None
    weight: Array
    halves: Array
    seen: int = 0

    @property
    def count(self) -> int:
        return self.alpha.shape[1]

    def rows(self, active: Tensor, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`; `active` are the block's examples."""
        row = torch.arange(start, stop, device=active.device)
        example = active[row % len(active)]
        columns = (_column(one, row) for one in (self.alpha, self.weight))
        return Rows(example, *columns, torch.ones_like(example))

    def others(self, start: int, rows: Rows) -> Rows:
        """The same rows, as they are added to what the map is compared with for its error."""
        row = torch.arange(start, start + len(rows.example), device=rows.example.device)
        weight = _column(self.weight - self.halves, row)
        return replace(rows, weight=weight, replicate=torch.zeros_like(rows.replicate))

    def of(self, example: int) -> tuple[int, int] | None:
        """The number of an example here, and how many of its nodes were visited."""
        numbers = (self.examples == example).nonzero().flatten().tolist()
        if not numbers:
            return None
        size = len(self.examples)
        return numbers[0], (self.seen - numbers[0] + size - 1) // size


def _column(table: Array, row: Tensor) -> Tensor:
    return torch.from_numpy(table.T.reshape(-1)).to(row.device)[row]


class AdaptiveEvaluation(SumEvaluation):
    """The evaluation of an integral whose nodes each example has for itself."""

    block: _Block
    refinement: Refinement

    def __init__(self, job: Job, call: Call, baselines: Inputs, *about: Any) -> None:
        super().__init__(job, call, baselines, *about)
        assert self.recipe.refinement is not None
        self.refinement = self.recipe.refinement
        # Those whose gradients are kept, of a group of examples.
        self.blocks = list[_Block]()
        self.start, self.stale = 0, False

    def steps(self, report: Report) -> Steps:
        yield from self.begin()
        done, of = 0, self.recipe.count * self.call.batch
        each = max(1, kept_bytes(self.refinement, self.call))
        groups = self.everyone.split(max(1, self.config.kept_bytes // each))
        for group in groups:
            block: _Block | None = self._first(group)
            while block is not None:
                self.block, self.start, rows = block, 0, block.count * len(block.examples)
                self.level, self.active = block, block.examples  # type: ignore[assignment]
                while self.start < rows:
                    stop = min(self.start + self.next_size, rows)
                    count = yield from self.launch(self.start, stop)
                    self.start, done = self.start + count, done + count
                    if count and self.start < rows:
                        # Of the last nodes, maps are not what they are until all are there.
                        yield report(self, done, of, maps=block.kept is not None)
                block = self._next(block)
                over = block is None and group is groups[-1]
                yield report(self, of if over else done, of)

    def add(
        self, rows: Rows, result: EvaluationResult, scale: Tensor | float | None = None
    ) -> None:
        block, own = self.block, self.function.scale if scale is None else scale
        self.points.index_add_(0, rows.example, torch.ones_like(rows.example))
        if block.kept is None:
            self._add(block, rows, self.start, result.gradients, own)
            return
        block.seen = self.start + len(rows.example)
        for stores, gradients in zip(block.kept, result.gradients, strict=True):
            for store, gradient in zip(stores, gradients, strict=True):
                store[self.start : block.seen] = gradient.to(store.dtype) / own
        self.stale = True

    def outcome(self) -> Outcome:
        if self.stale:
            self._sum_up(self.blocks[0].examples)
        return super().outcome()

    def _first(self, group: Tensor) -> _Block:
        """Midpoints, in bit-reversed order: the first of any number are spread over the path."""
        count = self.refinement.first
        width = (count - 1).bit_length()
        order = sorted(range(count), key=lambda i: f"{i:0{width}b}"[::-1])
        self.blocks = []
        return self._block(group, np.tile((np.array(order) + 0.5) / count, (len(group), 1)))

    def _block(self, examples: Tensor, alpha: Array, *, last: bool = False) -> _Block:
        zeros, seen = np.zeros_like(alpha), alpha.size if last else 0
        kept = None if last else [self._store(alpha.size) for _ in range(self.call.targets.count)]
        block = _Block(examples, alpha, kept, zeros, zeros.copy(), seen)
        if not last:
            self.blocks.append(block)
        return block

    def _store(self, rows: int) -> Inputs:
        return tuple(one.new_zeros(rows, *one.shape[1:]) for one in self.totals.totals)

    def _next(self, block: _Block) -> _Block | None:
        """More nodes for the examples that need them; None where none does."""
        active, steps = block.examples, self.refinement.steps
        visited = sum(one.count for one in self.blocks if one.of(int(active[0])))
        if self.recipe.tolerance is not None and (visited >= steps or block.kept is None):
            active = self._unfinished(active)
        if block.kept is None or active.numel() == 0:
            return None
        limit = steps if visited < steps else self.refinement.most
        wanted = min(limit, math.ceil(visited * GROWTH))
        alpha = np.stack([refined(*self._change(one), wanted - visited) for one in active.tolist()])
        following = self._block(active, alpha, last=wanted == self.refinement.most)
        if following.kept is None:
            # Now the weights of all nodes are known, and nothing more has to be kept.
            self._sum_up(self.blocks[0].examples, following)
            self.blocks = []
        return following

    def _change(self, example: int) -> tuple[Array, Array]:
        """The nodes [n] of an example, ascending, and by how much the gradient times the path's
        length changes between neighbours [n - 1]; the largest share over the targets.
        """
        inputs, baselines = self.totals.inputs, self.totals.baselines
        pairs = zip(inputs, baselines, strict=True)
        along = [x[example] - base[example % len(base)] for x, base in pairs]
        alpha, views = list[float](), list[list[Inputs]]()
        for block in self.blocks:
            number, seen = block.of(example) or (0, 0)
            alpha += block.alpha[number, :seen].tolist()
            for row in range(number, number + seen * len(block.examples), len(block.examples)):
                views.append([tuple(one[row] for one in part) for part in block.kept or ()])
        order, shares = np.argsort(alpha, kind="stable"), list[Array]()
        for k in range(self.call.targets.count):
            squares = np.zeros(len(alpha) - 1)
            for which, factor in enumerate(along):
                at_once = max(1, COMPARED // max(1, factor.numel()))
                for start in range(0, len(squares), at_once):
                    some = [views[i][k][which] for i in order[start : start + at_once + 1]]
                    found = square_norm(torch.stack(some).diff(dim=0) * factor)
                    squares[start : start + len(found)] += found.cpu().numpy()
            squares = np.nan_to_num(squares)
            shares.append(np.sqrt(squares / (squares.sum() or 1.0)))
        return np.array(alpha)[order], np.max(shares, axis=0)

    def _sum_up(self, examples: Tensor, following: _Block | None = None) -> None:
        """Adds up the gradients that are kept of examples, by the rule on all of their nodes, those
        of a block that is still to come among them.
        """
        for example in examples.tolist():
            found = [(one, one.of(example)) for one in (*self.blocks, following) if one is not None]
            parts = [(one, where[0], where[1]) for one, where in found if where and where[1]]
            if not parts:
                continue
            weight, halves = rule(np.concatenate([one.alpha[n, :seen] for one, n, seen in parts]))
            start = 0
            for one, number, seen in parts:
                own, start = slice(start, start + seen), start + seen
                one.weight[number, :seen], one.halves[number, :seen] = weight[own], halves[own]
        self.totals.clear(examples)
        for one in self.blocks:
            rows = one.rows(one.examples, 0, one.seen)
            kept = [tuple(store[: one.seen] for store in part) for part in one.kept or ()]
            self._add(one, rows, 0, kept, 1.0)
        self.stale = False

    def _add(
        self,
        block: _Block,
        rows: Rows,
        start: int,
        gradients: Sequence[Inputs],
        scale: Tensor | float,
    ) -> None:
        """Adds gradients of a block's rows from `start` on to the map and to what it is compared
        with.
        """
        for part in (rows, block.others(start, rows)):
            self.totals.add(part, list(gradients), self.source, scale)
