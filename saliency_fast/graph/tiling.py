"""Tiling: exact gradients of one image or volume that is larger than memory.

The leading local calls of a model run tile by tile, each with its halo; only their last values, the
cut, are ever whole. Backward computes every tile again, and gradients of overlapping halos add up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from saliency_fast._torch_compat import tree_structure
from saliency_fast.errors import BudgetError, InputError
from saliency_fast.graph.gradients import gradients
from saliency_fast.graph.intercept import NotLeanError, lean_call
from saliency_fast.graph.program import (
    Env,
    Program,
    Ref,
    Step,
    filled,
    mapped,
    refs_in,
    tensors_among,
    tensors_in,
)
from saliency_fast.graph.receptive_field import Box, CropRule, Span, crop_rule, varying

NARROW = 1.1
"""Share of time by which tiles that cut the innermost axis cost more, in a choice among tiles."""


def whole_box(size: Sequence[int]) -> Box:
    return tuple((0, length) for length in size)


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around boxes."""
    axes = zip(*boxes, strict=True)
    return tuple((min(a for a, _ in spans), max(b for _, b in spans)) for spans in axes)


def meet(one: Box, other: Box) -> Box | None:
    """The intersection of two boxes."""
    box = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return box if all(a < b for a, b in box) else None


def cropped(tensor: Tensor, wanted: Box, held: Box) -> Tensor:
    """The box `wanted` of a value of which `tensor` is the box `held`."""
    return tensor if wanted == held else tensor[inside(wanted, held)]


def inside(box: Box, held: Box | None = None) -> tuple[slice, ...]:
    """The index of a box in a value [R, C, *spatial], or in the box `held` of it."""
    starts = [first for first, _ in held or [(0, 0)] * len(box)]
    spans = [slice(a - first, b - first) for (a, b), first in zip(box, starts, strict=True)]
    return (slice(None), slice(None), *spans)


@dataclass(frozen=True)
class Stem:
    """The leading local calls of a model.

    local: leads from the input to the values `cut`. rest: leads from them to the outputs, and from
    the input as well where `through`. rules: one per step of `local`; None without the points.
    """

    local: Program
    rest: Program
    cut: tuple[int, ...]
    rules: tuple[CropRule | None, ...]
    through: bool

    @property
    def input(self) -> int:
        return self.local.inputs[0]

    def size(self, number: int) -> tuple[int, ...]:
        """The spatial sizes of a value."""
        return self.local.values[number].shape[2:]

    @cached_property
    def steps(self) -> tuple[tuple[Step, CropRule, list[int], tuple[int, ...]], ...]:
        """The steps on crops: call, rule, operands as often as named, values that end there."""
        steps = zip(self.local.steps, self.rules, self.local.dead_after, strict=True)
        values = self.local.values
        return tuple((one, rule, varying(one, values), over) for one, rule, over in steps if rule)

    def needed(self, cut: Mapping[int, Box]) -> dict[int, Box]:
        """The boxes of all values that boxes of cut values need."""
        found = dict(cut)
        for step, rule, operands, _ in reversed(self.steps):
            own = [found[number] for number in step.made if number in found]
            if own:
                found |= dict.fromkeys(step.made, hull(own))
                for number in operands:
                    seen = rule.sees(hull(own), self.size(number))
                    found[number] = hull([seen, found.get(number, seen)])
        return found

    def reached(self, region: Box) -> dict[int, Box]:
        """The boxes of cut values that a box of the input has a part in."""
        found = {self.input: region}
        for step, rule, operands, _ in self.steps:
            size = self.size(step.made[0])
            boxes = [rule.reaches(found[number], size) for number in operands if number in found]
            own = [box for box in boxes if box is not None]
            if own:
                found |= dict.fromkeys(step.made, hull(own))
        return {number: found[number] for number in self.cut if number in found}

    @cached_property
    def unit(self) -> tuple[int, ...]:
        """For each axis the step of the input by which all values move by whole positions."""
        scales = {self.input: (Fraction(1),) * len(self.size(self.input))}
        for step, rule, operands, _ in self.steps:
            strides = [Fraction(w.stride) ** (-1 if w.spread else 1) for w in rule.windows]
            scale = tuple(a * b for a, b in zip(scales[operands[0]], strides, strict=True))
            scales |= dict.fromkeys(step.made, scale)
        axes = zip(*scales.values(), strict=True)
        return tuple(math.lcm(*(scale.numerator for scale in axis)) for axis in axes)

    def constants(self, extras: Sequence[Tensor], rows: int) -> Env:
        """The values of `local` that do not depend on the points."""
        env = dict(zip(self.local.extras, extras, strict=True))
        for step, rule in zip(self.local.steps, self.rules, strict=True):
            if rule is None:
                step.run(env, rows)
        return env

    def run(self, crop: Tensor, boxes: Mapping[int, Box], constants: Env, at: Span) -> Env:
        """The `boxes` of cut values from the crop of a row; at: the row, and how many there are."""
        extras = [constants[number] for number in self.local.extras]
        env = {**constants, **self.local.enter((crop,), extras)}
        for step, rule, operands, over in self.steps:
            if step.made[0] not in boxes:
                continue
            out, size = boxes[step.made[0]], self.size(operands[0])
            seen = rule.sees(out, size)

            def placed(one: Any, rule: CropRule = rule, out: Box = out, seen: Box = seen) -> Any:
                if isinstance(one, Ref) and one.number in boxes:
                    return cropped(env[one.number], seen, boxes[one.number])
                if not isinstance(one, (Ref, Tensor)):
                    return one
                tensor: Tensor = (env[one.number] if isinstance(one, Ref) else one).detach()
                if isinstance(one, Ref) and self.local.values[one.number].rowwise:
                    tensor = tensor[at[0] : at[0] + 1]
                if not rule.constants:
                    return tensor
                # Broadcast against the box of the result.
                spans = zip(reversed(out), reversed(tensor.shape), strict=False)
                index = [slice(*span) if size > 1 else slice(None) for span, size in spans]
                return tensor[(..., *reversed(index))]

            args, kwargs = mapped(placed, (rule.args, dict(rule.kwargs)))
            args, kwargs = filled((args, kwargs), {}, at[1], False)
            result = _called(rule, args, kwargs, *rule.pads(out, seen, size))
            if any(window.spread for window in rule.windows):
                result = cropped(result, out, rule.made(seen, result.shape[2:]))
            env.update(zip(step.outputs, tensors_in(result), strict=True))
            for number in over:
                env.pop(number, None)
        return env


def _called(rule: CropRule, args: Any, kwargs: Any, both: list[int], pads: list[Span]) -> Any:
    """A rule's call, with padding."""
    x, *others = args
    if rule.padding is not None:
        others[rule.padding - 1] = both
    flat = [amount for pair in reversed(pads) for amount in pair]
    # Where a window sees padding alone, more is cut off than there is: pad first.
    for amounts in ([max(0, one) for one in flat], [min(0, one) for one in flat]):
        x = F.pad(x, amounts, value=rule.fill) if any(amounts) else x
    return lean_call(rule.func, (x, *others), kwargs)


def local_stem(program: Program) -> Stem:
    """The stem of an unfolded program; raises NotLeanError, which says why, if it has none."""
    if program.aliased:
        raise NotLeanError("the model overwrites memory by one view and reads it by another")
    if len(program.inputs) != 1:
        raise NotLeanError(f"tiles need a single input: the model takes {len(program.inputs)}")
    start, values = program.inputs[0], program.values
    program = program.part(program.inputs, program.outputs, program.tree)
    rules: dict[int, CropRule] = {}
    known, taken = {start}, {one.number for one in refs_in(program.outputs)}
    given = {values[number].memory for number in (*program.inputs, *program.extras)}
    for step in program.steps:
        rule = crop_rule(step, values) if known.issuperset(varying(step, values)) else None
        if rule is not None:
            rules[step.made[0]] = rule
            known.update(step.made)
            continue
        if any(values[number].memory in given for number in step.overwritten):
            raise NotLeanError("the model overwrites its input, which tiles read again")
        taken |= step.used
    cut = tuple(sorted(number for number in known & taken if number != start))
    if not cut:
        first = next((step.name for step in program.steps if step.varying), "none")
        raise NotLeanError(f"the model does not begin with local calls: its first is {first}")
    if not all(values[number].dtype.is_floating_point for number in cut):
        raise NotLeanError("the model's local calls end in values that carry no gradient")
    wanted = [Ref(number) for number in cut]
    local = program.part((start,), wanted, tree_structure([0] * len(wanted)))
    through = start in taken
    rest = program.part((*cut, *([start] if through else [])), program.outputs, program.tree)
    return Stem(local, rest, cut, tuple(rules.get(one.made[0]) for one in local.steps), through)


@dataclass(frozen=True)
class Tiled:
    """An executor: the stem by tiles of one row, the rest of the model whole.

    tile: sizes along the input's spatial axes; cut values are divided in proportion. region: a box
    of the input inside of which gradients are exact, outside zero.
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
        if len(box) != len(size) or meet(box, whole_box(size)) != box:
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
        given = _ByTiles.apply(whole, self, extras)  # type: ignore[no-untyped-call]
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
        for at in itertools.product(*map(range, counts)):
            found = {}
            for number, limit in limits.items():
                spans = zip(at, self.tile, size, self.stem.size(number), strict=True)
                if (box := meet(tuple(_part(*one) for one in spans), limit)) is not None:
                    found[number] = box
            if found:
                yield found


class _ByTiles(torch.autograd.Function):
    """The stem, tile by tile: keeps the points, and no value in between."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, tiled: Tiled, extras: list[Tensor]) -> Any:
        stem, rows = tiled.stem, len(points)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(points)
        # Kept, not made again: what does not depend on the points may be random.
        ctx.tiled, ctx.constants = tiled, stem.constants(extras, rows)
        values = [(number, stem.local.values[number]) for number in stem.cut]
        found = {n: points.new_empty((rows, *v.shape[1:]), dtype=v.dtype) for n, v in values}
        for cut in tiled.tiles({number: whole_box(stem.size(number)) for number in stem.cut}):
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
        tiled, stem, rows = ctx.tiled, ctx.tiled.stem, len(points)
        total = torch.zeros_like(points)
        given = {n: grad for n, grad in zip(stem.cut, grads, strict=True) if grad is not None}
        region = tiled.region or whole_box(stem.size(stem.input))
        reached = stem.reached(region)
        for cut in tiled.tiles({n: reached[n] for n in given if n in reached}):
            boxes = stem.needed(cut)
            own = meet(boxes[stem.input], region)
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
    """Bytes that one tile of one row takes in backward, beside the points, the cut values and the
    gradients of both: at each call, what autograd has kept by then and the gradients alive there.
    """
    values, steps = stem.local.values, stem.steps
    boxes = stem.needed(_largest(stem, tile))

    def size(number: int, box: Box) -> int:
        value = values[number]
        return math.prod([b - a for a, b in box]) * value.shape[1] * value.dtype.itemsize

    # A view counts as the value whose memory it shares.
    owner, last = {stem.input: stem.input}, dict[int, int]()
    for index, (step, rule, operands, _) in enumerate(steps):
        last |= {owner[number]: index for number in operands}
        owner |= {number: owner[operands[0]] if rule.view else number for number in step.made}
    last |= {owner[number]: len(steps) for number in stem.cut}
    whole = {number: size(number, boxes[number]) for number in set(owner.values())}
    kept, extra, peak, alive = {stem.input}, 0, 0, {stem.input}
    for index, (step, rule, operands, _) in enumerate(steps):
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
        pending = {number for number in alive if last[number] > index}
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
        spans = [_part((-(-one[1] // one[0]) - 1) // 2, *one) for one in sizes]
        found[number] = tuple((a, max(b, a + 1)) for a, b in spans)
    return found


def tile_sizes(stem: Stem, available: int) -> tuple[int, ...]:
    """A large tile, in whole strides, that takes up to `available` bytes beside what is whole."""
    size, unit = stem.size(stem.input), stem.unit

    def evened(tile: Sequence[int], axis: int, pieces: int) -> tuple[int, ...]:
        even = -(-size[axis] // (pieces * unit[axis])) * unit[axis]
        return (*tile[:axis], min(even, size[axis]), *tile[axis + 1 :])

    def work(tile: Sequence[int]) -> float:
        tiles = math.prod(-(-n // own) for n, own in zip(size, tile, strict=True))
        return tiles * tile_bytes(stem, tile) * (NARROW if tile[-1] < size[-1] else 1)

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


def _part(at: int, own: int, whole: int, length: int) -> Span:
    """A tile's part of a value, at `at` of tiles of `own` out of the input's `whole`."""
    return at * own * length // whole, min((at + 1) * own, whole) * length // whole
