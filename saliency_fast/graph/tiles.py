"""Tiles: exact gradients of one image or volume that is larger than memory.

The local beginning of a model runs tile by tile, each with the halo that it needs; only its last
values, the cut, are ever whole. Backward computes every tile again. The gradients of overlapping
halos add up, so that the sum over tiles is the gradient of the whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from saliency_fast.errors import BudgetError, InputError
from saliency_fast.graph.gradients import gradients
from saliency_fast.graph.local import Box, Span
from saliency_fast.graph.program import tensors_among
from saliency_fast.graph.stem import Stem, cropped, inside, whole_box


@dataclass(frozen=True)
class Tiled:
    """A route: the stem by tiles of one row, the rest of the model whole.

    tile: the sizes of a tile along the input's spatial axes; cut values are shared out among tiles
    in proportion. region: a box of the input, (start, stop) per axis: gradients are exact inside
    and zero outside, and only the tiles that it has a part in are computed again.
    """

    stem: Stem
    tile: tuple[int, ...]
    region: Box | None = None

    def __post_init__(self) -> None:
        size = self.stem.size(self.stem.input)
        if len(self.tile) != len(size) or min(self.tile) < 1:
            raise InputError(
                f"tile must be a positive size for each spatial axis: got {list(self.tile)}, the "
                f"input has {list(size)}"
            )
        box = self.region or whole_box(size)
        if len(box) != len(size) or _meet(box, whole_box(size)) != box:
            raise InputError(
                f"region must be (start, stop) inside of each spatial axis: got {list(box)}, the "
                f"input has {list(size)}"
            )

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        (whole,), size = points, self.stem.size(self.stem.input)
        if whole.shape[2:] != size:
            raise InputError(
                f"points must have the sizes that were recorded: got {list(whole.shape[2:])}, "
                f"expected {list(size)}; record the model again"
            )
        extras = tensors_among(args, kwargs)
        given = _Leading.apply(whole, self, extras)  # type: ignore[no-untyped-call]
        if self.stem.through and self.region is not None:
            # Gradients that do not come through the stem are confined to the region too.
            box, entered = inside(self.region), whole
            whole = entered.detach().clone()
            whole[box] = entered[box]
        return self.stem.rest((*given, whole) if self.stem.through else given, extras)

    @property
    def share(self) -> float:
        """The share of the input that the region's gradient is computed from."""
        size = self.stem.size(self.stem.input)
        if self.region is None:
            return 1.0
        reached = self.stem.reached(self.region)
        box = self.stem.needed(reached)[self.stem.input] if reached else self.region
        return math.prod(b - a for a, b in box) / math.prod(size)

    def tiles(self, limits: Mapping[int, Box]) -> Iterator[dict[int, Box]]:
        """For each tile its boxes of cut values, as far as they are inside of `limits`."""
        size = self.stem.size(self.stem.input)
        counts = [-(-n // own) for n, own in zip(size, self.tile, strict=True)]
        for place in itertools.product(*map(range, counts)):
            found = {}
            for number, limit in limits.items():
                spans = zip(place, self.tile, size, self.stem.size(number), strict=True)
                if (box := _meet(tuple(_share(*one) for one in spans), limit)) is not None:
                    found[number] = box
            if found:
                yield found


class _Leading(torch.autograd.Function):
    """The stem, tile by tile: keeps the points, and no value in between."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, route: Tiled, extras: list[Tensor]) -> Any:
        stem, rows = route.stem, len(points)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(points)
        # Kept, not made again: what does not depend on the points may be random.
        ctx.route, ctx.constants = route, stem.constants(extras, rows)
        values = [(number, stem.local.values[number]) for number in stem.cut]
        found = {n: points.new_empty((rows, *v.shape[1:]), dtype=v.dtype) for n, v in values}
        for cut in route.tiles({number: whole_box(stem.size(number)) for number in stem.cut}):
            boxes = stem.needed(cut)
            for row in range(rows):
                crop = points[row : row + 1][inside(boxes[stem.input])]
                env = stem.run(crop, boxes, ctx.constants, (row, rows))
                for number, box in cut.items():
                    part = cropped(env[number], box, boxes[number])
                    found[number][row : row + 1][inside(box)] = part
                del crop, env, part
        return tuple(found.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (points,) = ctx.saved_tensors
        route, stem, rows = ctx.route, ctx.route.stem, len(points)
        total = torch.zeros_like(points)
        given = {n: grad for n, grad in zip(stem.cut, grads, strict=True) if grad is not None}
        region = route.region or whole_box(stem.size(stem.input))
        reached = stem.reached(region)
        for cut in route.tiles({n: reached[n] for n in given if n in reached}):
            boxes = stem.needed(cut)
            own = _meet(boxes[stem.input], region)
            if own is None:
                continue
            for row in range(rows):
                # A copy where it is not all of a row: calls would make copies of their own.
                leaf = points[row : row + 1][inside(boxes[stem.input])].detach().contiguous()
                with torch.enable_grad():
                    env = stem.run(leaf.requires_grad_(), boxes, ctx.constants, (row, rows))
                    parts = [cropped(env[n], box, boxes[n]) for n, box in cut.items()]
                # By their edges: the values themselves need not stay.
                edges = [get_gradient_edge(part) for part in parts]
                del env, parts
                asked = [given[n][row : row + 1][inside(box)] for n, box in cut.items()]
                (grad,) = gradients(edges, leaf, asked)
                total[row : row + 1][inside(own)] += cropped(grad, own, boxes[stem.input])
                del leaf, edges, asked, grad
        return total, None, None


def tile_bytes(stem: Stem, tile: Sequence[int]) -> int:
    """Bytes that one tile of one row takes in backward, beside what is whole.

    Whole are the points, the cut values and the gradients of both. Counted is, at each call on
    crops, what autograd has kept by then and the gradients that are alive there.
    """
    values, steps = stem.local.values, stem.steps
    boxes = stem.needed(_largest(stem, tile))

    def size(number: int, box: Box) -> int:
        value = values[number]
        return math.prod([b - a for a, b in box]) * value.shape[1] * value.dtype.itemsize

    # A view counts as the value whose memory it shares.
    owner, last = {stem.input: stem.input}, dict[int, int]()
    for place, (step, rule, operands, _) in enumerate(steps):
        last |= {owner[number]: place for number in operands}
        owner |= {number: owner[operands[0]] if rule.view else number for number in step.made}
    last |= {owner[number]: len(steps) for number in stem.cut}
    whole = {number: size(number, boxes[number]) for number in set(owner.values())}
    kept, extra, peak, alive = {stem.input}, 0, 0, {stem.input}
    for place, (step, rule, operands, _) in enumerate(steps):
        out, length = boxes[step.made[0]], stem.size(operands[0])
        seen = rule.sees(out, length)
        _, pads = rule.pads(out, seen, length)
        made = {number: size(number, out) for number in step.outputs}
        for number, own in made.items():
            elements = own // values[number].dtype.itemsize
            extra += {"bits": elements // 8, "bytes": elements}.get(rule.keeps, 0)
        kept |= {owner[n] for n in {"output": made, "operands": operands}.get(rule.keeps, ())}
        # What an operand's gradient goes through on its way: without padding, and in its box.
        wide = tuple((a - x, b + y) for (a, b), (x, y) in zip(seen, pads, strict=True))
        fresh = sum(size(n, wide) for n in operands)
        fresh += sum(whole[owner[n]] for n in operands if boxes[n] != wide)
        pending = {number for number in alive if last[number] > place}
        # Where an operand has a gradient already, a third holds the sum of both.
        joined = sum(whole[owner[n]] for n in operands if owner[n] in pending)
        now = sum(whole[n] for n in kept) + sum(whole[n] for n in pending) + extra + fresh
        peak = max(peak, now + max(joined, sum(made.values())))
        alive |= {owner[number] for number in made}
    return peak


def _largest(stem: Stem, tile: Sequence[int]) -> dict[int, Box]:
    """A tile's boxes of cut values, with a halo on all of its sides where a tile has one."""
    found = {}
    for number in stem.cut:
        sizes = zip(tile, stem.size(stem.input), stem.size(number), strict=True)
        spans = [_share((-(-one[1] // one[0]) - 1) // 2, *one) for one in sizes]
        found[number] = tuple((a, max(b, a + 1)) for a, b in spans)
    return found


def tile_sizes(stem: Stem, available: int) -> tuple[int, ...]:
    """A large tile, in whole strides of the stem, that takes no more than `available` bytes beside
    what is whole; raises BudgetError where even the smallest takes more.
    """
    size, unit = stem.size(stem.input), stem.unit

    def evened(tile: Sequence[int], axis: int, pieces: int) -> tuple[int, ...]:
        even = -(-size[axis] // (pieces * unit[axis])) * unit[axis]
        return (*tile[:axis], min(even, size[axis]), *tile[axis + 1 :])

    def work(tile: Sequence[int]) -> float:
        tiles = math.prod(-(-n // own) for n, own in zip(size, tile, strict=True))
        return tiles * tile_bytes(stem, tile) * (1.1 if tile[-1] < size[-1] else 1)

    tile = size
    while (smallest := tile_bytes(stem, tile)) > available:
        # A fifth off, or at least a step; nothing where a single step is left.
        steps = [(axis, -(-own // unit[axis]), unit[axis]) for axis, own in enumerate(tile)]
        less = [(axis, max(1, min(n - 1, n * 4 // 5)) * one) for axis, n, one in steps if n > 1]
        smaller = [evened(tile, axis, -(-size[axis] // own)) for axis, own in less]
        if not smaller:
            raise BudgetError(
                f"a tile must fit what the whole image leaves: got {available:,} bytes, the "
                f"smallest, {list(tile)}, takes {smallest:,}; raise memory_budget"
            )
        tile = min(smaller, key=work)
    for axis in reversed(range(len(size))):
        count = -(-size[axis] // tile[axis])
        wider = [evened(tile, axis, pieces) for pieces in range(max(1, count // 2), count)]
        tile = next((one for one in wider if tile_bytes(stem, one) <= available), tile)
    return tile


def _share(at: int, own: int, whole: int, length: int) -> Span:
    """A tile's part of a value, at `at` of tiles of `own` out of the input's `whole`."""
    return at * own * length // whole, min((at + 1) * own, whole) * length // whole


def _meet(one: Box, other: Box) -> Box | None:
    """What two boxes share."""
    box = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return box if all(a < b for a, b in box) else None
