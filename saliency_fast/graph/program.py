"""A model's calls of PyTorch as a program: recorded once, then run without the model's Python.

Where no call depends on numbers inside the model's tensors, the list of calls is the model. It can
be run in parts, fused and analysed. What cannot be recorded with certainty is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten
from torch.utils.checkpoint import checkpoint

from saliency_fast.graph.intercept import NotLeanError, lean_call
from saliency_fast.graph.outputs import Unread

Env = dict[int, Any]
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Ref:
    """A value of the program, by its number."""

    number: int


@dataclass(frozen=True)
class PerRow:
    """An integer that follows the rows of a launch: `base + slope * rows`."""

    base: int
    slope: int


@dataclass(frozen=True)
class Missing:
    """A part of the model's return value that a program does not make, and why."""

    reason: str


@dataclass(frozen=True)
class Read:
    """A call that tells Python numbers: what follows holds for `value` alone."""

    func: Callable[..., Any]
    value: Any

    @property
    def __name__(self) -> str:
        return str(getattr(self.func, "__name__", self.func))

    def holds(self, found: Any) -> bool:
        """Whether it is the number that was read."""
        return type(found) is type(self.value) and bool(found == self.value)

    def check(self, found: Any) -> None:
        """Raises NotLeanError for another number."""
        if not self.holds(found):
            raise NotLeanError(
                f"the model reads {found!r} where it read {self.value!r} ({self.__name__})"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.check(self.func(*args, **kwargs))


@dataclass(frozen=True)
class Value:
    """What is known of a value.

    shape: for one row; rowwise: its first axis counts the rows and no other size depends on them;
    varying: it depends on the points; memory: equal for views of one tensor; growth: what each
    further row adds to the sizes, where that is known.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rowwise: bool
    varying: bool
    memory: int
    growth: tuple[int, ...] = ()

    def fits(self, shape: Sequence[int], rows: int) -> bool:
        """Whether `shape` is the value's for a launch of `rows`, as far as that is known."""
        sizes = zip(self.shape, self.growth, shape, strict=True)
        return not self.growth or (
            len(shape) == len(self.shape)
            and all(size + more * (rows - 1) == found for size, more, found in sizes)
        )

    @property
    def nbytes(self) -> int:
        """Bytes for one row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Step:
    """One call. outputs: the numbers of the tensors in its result, in order; changed: (before,
    after) numbers of arguments that it overwrites; spent: those whose memory its result takes over;
    detached: gradients do not pass.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]
    varying: bool
    detached: bool = False
    changed: tuple[tuple[int, int], ...] = ()
    spent: tuple[int, ...] = ()

    @property
    def overwritten(self) -> tuple[int, ...]:
        """The numbers of the values that are no more after the call."""
        return (*self.spent, *(before for before, _ in self.changed))

    @cached_property
    def used(self) -> frozenset[int]:
        """The numbers of the values that the call takes."""
        return frozenset(one.number for one in refs_in((self.args, self.kwargs)))

    @property
    def made(self) -> tuple[int, ...]:
        """The numbers of the values that are there only after the call."""
        return (*self.outputs, *(after for _, after in self.changed))

    @property
    def name(self) -> str:
        return str(getattr(self.func, "__name__", self.func))

    def run(self, env: Env, rows: int) -> None:
        """Runs the call on the values in `env` and adds its results."""
        passing = self.varying and not self.detached
        args = filled(self.args, env, rows, passing)
        kwargs = filled(self.kwargs, env, rows, passing)
        if passing:
            result = lean_call(self.func, args, kwargs)
        else:
            with torch.no_grad():
                result = self.func(*args, **kwargs)
        made = tuple(tensors_in(result))
        if len(made) != len(self.outputs):
            raise NotLeanError(f"the model's calls depend on numbers or rows ({self.name})")
        for before, after in self.changed:
            env[after] = env[before]
        env.update(zip(self.outputs, made, strict=True))


@dataclass(frozen=True)
class Program:
    """Steps that lead from `inputs` and further arguments `extras` to `outputs`, laid out as
    `tree`. channels_last: images and volumes enter with their channels innermost in memory.
    pieces: places of steps up to which a pass with gradients forgets all but the values that are
    still needed, to compute it again on the way back. note: told of every step before it runs.
    reads: steps that read again what the model's Python read, before all others.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    extras: tuple[int, ...]
    outputs: tuple[Any, ...]
    tree: TreeSpec
    values: Mapping[int, Value] = field(repr=False)
    channels_last: bool = False
    pieces: tuple[int, ...] = ()
    note: Callable[[Step], None] | None = field(default=None, compare=False, repr=False)
    reads: tuple[Step, ...] = ()

    def __call__(self, points: Sequence[Tensor], extras: Sequence[Tensor]) -> Any:
        """What the model returns for a launch of `points` and its further arguments."""
        env, rows = self.enter(points, extras), len(points[0])
        if isinstance(points, list):
            points.clear()
        start = 0
        for stop in self.pieces if torch.is_grad_enabled() else ():
            env = self._forgotten(env, rows, start, stop)
            start = stop
        self.run(env, rows, start, len(self.steps))
        return self.leave(env)

    def _forgotten(self, env: Env, rows: int, start: int, stop: int) -> Env:
        """`run`, of which only the values in `env` are kept for the way back."""
        taken, left = tuple(env), list[int]()
        # Else the second pass would find what the first has overwritten.
        spent = {one for step in self.steps[start:stop] for one in step.overwritten}

        def piece(*values: Tensor) -> tuple[Tensor, ...]:
            own = dict(zip(taken, values, strict=True))
            own |= {number: own[number].clone() for number in spent & own.keys()}
            self.run(own, rows, start, stop)
            left[:] = own
            return tuple(own.values())

        # The second pass runs the same steps; to compare shapes again proves nothing.
        found = checkpoint(
            piece,
            *env.values(),
            use_reentrant=False,
            determinism_check="none",
            # No recorded model draws.
            preserve_rng_state=False,
        )
        return dict(zip(left, found, strict=True))

    def enter(self, points: Sequence[Tensor], extras: Sequence[Tensor]) -> Env:
        """The values that a run begins with; raises NotLeanError where another is read now."""
        for read, value in self.reading(extras, len(points[0])):
            read.check(value)
        if self.channels_last:
            points = [_innermost(one) for one in points]
        return dict(zip((*self.inputs, *self.extras), (*points, *extras), strict=True))

    def reading(self, extras: Sequence[Tensor], rows: int) -> Iterator[tuple[Read, Any]]:
        """What the model's Python would read now, and where it did."""
        known = dict(zip(self.extras, extras, strict=True)) if self.reads else {}
        for step in self.reads:
            if isinstance(step.func, Read):
                args, kwargs = (filled(one, known, rows, False) for one in (step.args, step.kwargs))
                with torch.no_grad():
                    yield step.func, step.func.func(*args, **kwargs)
            else:
                step.run(known, rows)

    def run(self, env: Env, rows: int, start: int, stop: int) -> None:
        """Runs steps `start` to `stop` on the values in `env`, which forgets what is over."""
        for step, over in zip(self.steps[start:stop], self.over[start:stop], strict=True):
            if self.note is not None:
                self.note(step)
            step.run(env, rows)
            for number in step.outputs:
                # Else a model whose shapes follow its numbers, or rows in parts, would go wrong.
                if not self.values[number].fits(env[number].shape, rows):
                    raise NotLeanError(
                        f"the model's shapes depend on numbers or rows ({step.name})"
                    )
            for number in over:
                env.pop(number, None)

    def leave(self, env: Env) -> Any:
        """The model's return value from the values that a run ends with."""
        found = filled(list(self.outputs), env, 0, False)
        # As late as here: whoever looks at one raises.
        leaves = [Unread(one.reason) if isinstance(one, Missing) else one for one in found]
        return tree_unflatten(leaves, self.tree)

    @cached_property
    def memories(self) -> frozenset[int]:
        """Where the model's own tensors lie."""
        return frozenset(one.untyped_storage().data_ptr() for one in self.constants)

    @cached_property
    def constants(self) -> tuple[Tensor, ...]:
        """The model's own tensors that calls take."""
        return tuple(tensors_in([(step.args, step.kwargs) for step in self.steps]))

    @cached_property
    def over(self) -> tuple[tuple[int, ...], ...]:
        """For each step, the values that nothing behind it takes."""
        needed = {one.number for one in self.outputs if isinstance(one, Ref)}
        found = []
        for step in reversed(self.steps):
            here = {*step.used, *step.made, *(before for before, _ in step.changed)}
            found.append(tuple(here - needed))
            needed |= here
        return tuple(reversed(found))

    @cached_property
    def uses(self) -> Mapping[int, tuple[int, ...]]:
        """For each value, the places of the steps that take it; len(steps) for an output."""
        found: dict[int, list[int]] = {}
        for place, step in enumerate(self.steps):
            for number in step.used:
                found.setdefault(number, []).append(place)
        for one in refs_in(self.outputs):
            found.setdefault(one.number, []).append(len(self.steps))
        return {number: tuple(places) for number, places in found.items()}

    @cached_property
    def aliased(self) -> frozenset[int]:
        """Memory that is overwritten through one view and read through another one later."""
        found = set()
        for place, step in enumerate(self.steps):
            for _, after in step.changed:
                memory = self.values[after].memory
                for number, places in self.uses.items():
                    shares = number != after and self.values[number].memory == memory
                    born = self.born.get(number, -1)
                    if shares and born <= place and number not in step.made and max(places) > place:
                        found.add(memory)
        return frozenset(found)

    def pruned(self) -> Program:
        """The program without calls that neither the points nor its outputs need: behind layers,
        what led there.

        Calls on points stay, needed or not: their shapes tell that a recording does not hold.
        """
        varying = [step for step in self.steps if step.varying]
        return replace(self, steps=self._needed(varying, refs_in(self.outputs)))

    def _needed(self, wanted: Sequence[Step], outputs: Iterable[Ref]) -> tuple[Step, ...]:
        """The steps `wanted`, and those that they or `outputs` need."""
        needed, asked = {one.number for one in outputs}, set(map(id, wanted))
        memories, kept = {self.values[number].memory for number in needed}, list[Step]()
        for step in reversed(self.steps):
            # What is written through one view is read through others.
            written = {self.values[after].memory for _, after in step.changed}
            if not (id(step) in asked or needed & set(step.made) or memories & written):
                continue
            kept.append(step)
            needed |= step.used
            memories |= {self.values[number].memory for number in (*step.used, *step.made)}
        return tuple(reversed(kept))

    def rereading(self) -> tuple[Step, ...]:
        """The steps that tell Python numbers, and those that lead there."""
        asked = [step for step in self.steps if isinstance(step.func, Read)]
        return self._needed(asked, ())

    def innermost(self) -> Program:
        """The program on channels-last images and volumes, which views may have to copy."""
        steps = tuple(
            replace(step, func=Tensor.reshape) if step.func is Tensor.view else step
            for step in self.steps
        )
        return replace(self, steps=steps, channels_last=True)

    def in_pieces(self, count: int) -> Program:
        """The program in `count` pieces of about equal bytes, all but the last computed twice."""
        weights = [sum(self.values[number].nbytes for number in step.made) for step in self.steps]
        total, seen, places = sum(weights), 0, list[int]()
        for place, weight in enumerate(weights):
            # A piece begins where a share is full, and nothing from before it is overwritten later.
            if place and seen * count >= total * (len(places) + 1) and self._whole_at(place):
                places.append(place)
            seen += weight
        return replace(self, pieces=tuple(places[: count - 1]))

    def _whole_at(self, place: int) -> bool:
        return not any(
            self.born.get(number, -1) < place
            for step in self.steps[place:]
            for number in step.overwritten
        )

    @cached_property
    def born(self) -> Mapping[int, int]:
        return {number: place for place, step in enumerate(self.steps) for number in step.made}

    def part(self, given: Sequence[int], wanted: Sequence[Any], tree: TreeSpec) -> Program:
        """The program from the values `given` to the values `wanted`; extras stay arguments."""
        needed = {one.number for one in refs_in(tuple(wanted))} - set(given)
        kept: list[Step] = []
        for step in reversed(self.steps):
            if needed & set(step.made):
                kept.append(step)
                needed = (needed - set(step.made)) | (step.used - set(given))
        return replace(
            self, steps=tuple(reversed(kept)), inputs=tuple(given), outputs=tuple(wanted), tree=tree
        )


def lies_innermost(x: Tensor) -> bool:
    """Whether images or volumes lie with their channels innermost in memory."""
    return x.dim() in _FORMATS and x.stride(1) == 1 and x.stride(-1) == x.shape[1]


def laid(tensors: Sequence[Tensor], inside: Sequence[bool]) -> tuple[Tensor, ...]:
    """Tensors with their channels innermost in memory where `inside` says so.

    PyTorch's operators round otherwise in another memory format.
    """
    pairs = zip(tensors, inside, strict=True)
    return tuple(_innermost(one) if innermost else one for one, innermost in pairs)


def _innermost(point: Tensor) -> Tensor:
    """Images and volumes with their channels innermost in memory, others as they are."""
    layout = _FORMATS.get(point.dim())
    if layout is None or (point.is_contiguous(memory_format=layout) and point.shape[1] > 1):
        return point
    if point.shape[1] > 1:
        return point.contiguous(memory_format=layout)
    # One channel lies the same way in both orders; only its strides tell operators which is meant.
    return point.reshape(len(point), *point.shape[2:], 1).movedim(-1, 1)


def refs_in(template: Any) -> Iterator[Ref]:
    """The values that a template of arguments asks for."""
    if isinstance(template, Ref):
        yield template
    elif isinstance(template, (tuple, list)):
        for one in template:
            yield from refs_in(one)
    elif isinstance(template, Mapping):
        yield from refs_in(tuple(template.values()))
    elif isinstance(template, slice):
        yield from refs_in((template.start, template.stop, template.step))


def filled(template: Any, env: Env, rows: int, frozen: bool) -> Any:
    """A template with its values; `frozen`: weights as plain tensors of the same memory."""
    if isinstance(template, Ref):
        return env[template.number]
    if isinstance(template, Tensor):
        return template.detach() if frozen and template.requires_grad else template
    if isinstance(template, PerRow):
        return template.base + template.slope * rows
    if type(template) is tuple:
        return tuple([filled(one, env, rows, frozen) for one in template])
    if type(template) is list:
        return [filled(one, env, rows, frozen) for one in template]
    if type(template) is dict:
        return {name: filled(one, env, rows, frozen) for name, one in template.items()}
    if type(template) is slice:
        ends = (template.start, template.stop, template.step)
        return slice(*[filled(one, env, rows, frozen) for one in ends])
    return template


def tensors_in(result: Any) -> Iterator[Tensor]:
    """The tensors in a call's result, in order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for one in result:
            yield from tensors_in(one)
    elif isinstance(result, Mapping):
        for one in result.values():
            yield from tensors_in(one)


def tensors_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among further arguments, as programs number them."""
    return [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
