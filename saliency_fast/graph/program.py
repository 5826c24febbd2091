"""A model's calls of PyTorch as a program: recorded once, then run without the model's Python.

Where no call depends on numbers inside the model's tensors, the list of calls is the model, and can
be run in parts, fused and analysed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saliency_fast._torch_compat import TreeSpec, tree_unflatten
from saliency_fast.graph.intercept import NotLeanError, lean_call
from saliency_fast.graph.opinfo import OpInfo, Wrapped, info, name_of
from saliency_fast.graph.outputs import Unread

Env = dict[int, Any]
Filler = Callable[[Env, int, bool], Any] | None
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
class Read(Wrapped):
    """A call whose result is Python numbers: the program holds for this `value` alone."""

    value: Any

    def holds(self, found: Any) -> bool:
        return type(found) is type(self.value) and bool(found == self.value)

    def check(self, found: Any) -> None:
        if not self.holds(found):
            raise NotLeanError(
                f"the model reads {found!r} where it read {self.value!r} ({self.__name__})"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.check(self.func(*args, **kwargs))


@dataclass(frozen=True)
class Value:
    """What is known of a value.

    Attributes:
        shape: Sizes for one row.
        rowwise: Its first axis counts the rows, and no other size depends on them.
        varying: It depends on the points.
        memory: Equal for views of one tensor.
        growth: What each further row adds to the sizes, where that is known.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rowwise: bool
    varying: bool
    memory: int
    growth: tuple[int, ...] = ()

    def fits(self, shape: Sequence[int], rows: int) -> bool:
        """Whether `shape` is the value's for a launch of `rows`, as far as that is known."""
        if not self.growth:
            return True
        sizes = zip(self.shape, self.growth, strict=True)
        return [size + more * (rows - 1) for size, more in sizes] == [*shape]

    @property
    def nbytes(self) -> int:
        """Bytes for one row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Step:
    """One call of a program.

    Attributes:
        args, kwargs: Templates of its arguments: values of the program are `Ref`.
        outputs: Numbers of the tensors in its result, in order.
        varying: It depends on the points.
        detached: Gradients do not pass.
        changed: (before, after) numbers of arguments that it overwrites.
        donated: Numbers of values whose memory its result takes over.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]
    varying: bool
    detached: bool = False
    changed: tuple[tuple[int, int], ...] = ()
    donated: tuple[int, ...] = ()

    @property
    def overwritten(self) -> tuple[int, ...]:
        """The numbers of the values that are gone after the call."""
        return (*self.donated, *(before for before, _ in self.changed))

    @cached_property
    def used(self) -> frozenset[int]:
        """The numbers of the values that the call takes."""
        return frozenset(one.number for one in refs_in((self.args, self.kwargs)))

    @cached_property
    def _fillers(self) -> tuple[list[tuple[Any, Filler]], dict[str, tuple[Any, Filler]]]:
        """Its arguments, each with what fills it; most are the same in every launch."""
        return (
            [(one, _filler(one)) for one in self.args],
            {name: (one, _filler(one)) for name, one in self.kwargs.items()},
        )

    @property
    def made(self) -> tuple[int, ...]:
        """The numbers of the values that exist only after the call."""
        return (*self.outputs, *(after for _, after in self.changed))

    @property
    def name(self) -> str:
        return name_of(self.func)

    @property
    def info(self) -> OpInfo:
        return info(self.func)

    @property
    def passing(self) -> bool:
        """Whether gradients with respect to the points pass through the call."""
        return self.varying and not self.detached

    def with_arguments(self, change: Callable[[Any], Any]) -> Step:
        """The same call with each leaf of its arguments changed."""
        args, kwargs = mapped(change, self.args), mapped(change, dict(self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def run(self, env: Env, rows: int) -> None:
        """Runs the call on the values in `env` and adds its results."""
        passing, (positional, named) = self.passing, self._fillers
        args = tuple([fill(env, rows, passing) if fill else one for one, fill in positional])
        kwargs = {k: fill(env, rows, passing) if fill else one for k, (one, fill) in named.items()}
        if passing:
            result = lean_call(self.func, args, kwargs)
        else:
            with torch.no_grad():
                result = self.func(*args, **kwargs)
        made = (result,) if isinstance(result, Tensor) else tuple(tensors_in(result))
        if len(made) != len(self.outputs):
            raise NotLeanError(f"the model's calls depend on numbers or rows ({self.name})")
        for before, after in self.changed:
            env[after] = env[before]
        env.update(zip(self.outputs, made, strict=True))

    def __str__(self) -> str:
        named = (*map(_shown, self.args), *(f"{k}={_shown(v)}" for k, v in self.kwargs.items()))
        made, over = ([*map(Ref, dict.fromkeys(one))] for one in (self.made, self.overwritten))
        text = f"{_shown(made)} = {self.name}({', '.join(named)})"
        return f"{text}  # overwrites {_shown(over)}" if over else text


@dataclass(frozen=True)
class Program:
    """Steps that lead from inputs and further arguments to a model's return value.

    Attributes:
        steps: The calls, in order.
        inputs: Numbers of the points.
        extras: Numbers of the further arguments that are tensors.
        outputs: Templates of the return value's leaves, nested as `tree`.
        channels_last: Images and volumes enter in channels-last memory format.
        segments: Step indices where checkpoint segments end: a pass with gradients keeps only the
            values that are still needed there, and computes the others again on the way back.
        note: Called with every step before it runs.
        reads: Steps that repeat what the model's Python read, before all others.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    extras: tuple[int, ...]
    outputs: tuple[Any, ...]
    tree: TreeSpec
    values: Mapping[int, Value] = field(repr=False)
    channels_last: bool = False
    segments: tuple[int, ...] = ()
    note: Callable[[Step], None] | None = field(default=None, compare=False, repr=False)
    reads: tuple[Step, ...] = ()

    def __call__(self, points: Sequence[Tensor], extras: Sequence[Tensor]) -> Any:
        """What the model returns for a launch of `points` and its further arguments."""
        env, rows = self.enter(points, extras), len(points[0])
        if isinstance(points, list):
            points.clear()
        start = 0
        for stop in self.segments if torch.is_grad_enabled() else ():
            env = self._run_segment(env, rows, start, stop)
            start = stop
        self.run(env, rows, start, len(self.steps))
        found = filled(list(self.outputs), env, 0, False)
        # Only here: whatever reads a missing part raises.
        leaves = [Unread(one.reason) if isinstance(one, Missing) else one for one in found]
        return tree_unflatten(leaves, self.tree)

    def _run_segment(self, env: Env, rows: int, start: int, stop: int) -> Env:
        """`run`, keeping only the values in `env` for the backward pass."""
        taken, left = tuple(env), list[int]()
        # Otherwise the second pass would find what the first has overwritten.
        lost = {one for step in self.steps[start:stop] for one in step.overwritten}

        def segment(*values: Tensor) -> tuple[Tensor, ...]:
            own = dict(zip(taken, values, strict=True))
            own |= {number: own[number].clone() for number in lost & own.keys()}
            self.run(own, rows, start, stop)
            left[:] = own
            return tuple(own.values())

        # The second pass runs the same steps, so that comparing shapes again proves nothing, and
        # no recorded model draws random numbers.
        options: dict[str, Any] = {"determinism_check": "none", "preserve_rng_state": False}
        found = checkpoint(segment, *env.values(), use_reentrant=False, **options)
        return dict(zip(left, found, strict=True))

    def enter(self, points: Sequence[Tensor], extras: Sequence[Tensor]) -> Env:
        """The values that a run begins with; raises NotLeanError where Python reads others now."""
        for read, value in self.reading(extras, len(points[0])):
            read.check(value)
        if self.channels_last:
            points = [_in_channels_last(one) for one in points]
        return dict(zip((*self.inputs, *self.extras), (*points, *extras), strict=True))

    def reading(self, extras: Sequence[Tensor], rows: int) -> Iterator[tuple[Read, Any]]:
        """Each read of the model's Python, with its result for these further arguments."""
        env = dict(zip(self.extras, extras, strict=True)) if self.reads else {}
        for step in self.reads:
            if isinstance(step.func, Read):
                args, kwargs = filled((step.args, dict(step.kwargs)), env, rows, False)
                with torch.no_grad():
                    yield step.func, step.func.func(*args, **kwargs)
            else:
                step.run(env, rows)

    def run(self, env: Env, rows: int, start: int, stop: int) -> None:
        """Runs steps `start` to `stop` on the values in `env`; drops each after its last use."""
        for step, over in zip(self.steps[start:stop], self.dead_after[start:stop], strict=True):
            if self.note is not None:
                self.note(step)
            step.run(env, rows)
            for number in step.outputs:
                # A model whose shapes follow its numbers, or rows in parts, would go wrong.
                if not self.values[number].fits(env[number].shape, rows):
                    raise NotLeanError(
                        f"the model's shapes depend on numbers or rows ({step.name})"
                    )
            for number in over:
                env.pop(number, None)

    @cached_property
    def memories(self) -> frozenset[int]:
        """The addresses of the model's own tensors."""
        return frozenset(one.untyped_storage().data_ptr() for one in self.constants)

    @cached_property
    def constants(self) -> tuple[Tensor, ...]:
        """The model's own tensors that calls take."""
        return tuple(tensors_in([(step.args, step.kwargs) for step in self.steps]))

    @cached_property
    def dead_after(self) -> tuple[tuple[int, ...], ...]:
        """For each step, the values that no later step takes."""
        needed = {one.number for one in self.outputs if isinstance(one, Ref)}
        found = []
        for step in reversed(self.steps):
            here = {*step.used, *step.made, *(before for before, _ in step.changed)}
            found.append(tuple(here - needed))
            needed |= here
        return tuple(reversed(found))

    @cached_property
    def uses(self) -> Mapping[int, tuple[int, ...]]:
        """For each value, the indices of the steps that take it; len(steps) for an output."""
        found: dict[int, list[int]] = {}
        for index, step in enumerate(self.steps):
            for number in step.used:
                found.setdefault(number, []).append(index)
        for one in refs_in(self.outputs):
            found.setdefault(one.number, []).append(len(self.steps))
        return {number: tuple(indices) for number, indices in found.items()}

    @cached_property
    def made_at(self) -> Mapping[int, int]:
        """For each value, the index of the step that makes it."""
        return {number: index for index, step in enumerate(self.steps) for number in step.made}

    @cached_property
    def aliased(self) -> frozenset[int]:
        """Memory that is overwritten through one view and read through another one later."""
        found = set()
        for index, step in enumerate(self.steps):
            for _, after in step.changed:
                memory = self.values[after].memory
                for number, indices in self.uses.items():
                    shares = number not in step.made and self.values[number].memory == memory
                    if shares and self.made_at.get(number, -1) <= index < max(indices):
                        found.add(memory)
        return frozenset(found)

    def pruned(self) -> Program:
        """The program without calls that neither the points nor its outputs need. All calls on
        points stay: their shapes show where a recording does not hold.
        """
        varying = [step for step in self.steps if step.varying]
        return replace(self, steps=self._needed(varying, refs_in(self.outputs)))

    def rereading(self) -> tuple[Step, ...]:
        """The steps whose results Python reads, and those that they need."""
        return self._needed([step for step in self.steps if isinstance(step.func, Read)], ())

    def _needed(self, wanted: Sequence[Step], outputs: Iterable[Ref]) -> tuple[Step, ...]:
        """The steps `wanted`, and those that they or `outputs` need."""
        needed, asked = {one.number for one in outputs}, set(map(id, wanted))
        memories, kept = {self.values[number].memory for number in needed}, list[Step]()
        for step in reversed(self.steps):
            # What is written through one view is read through others.
            written = {self.values[after].memory for _, after in step.changed}
            if id(step) in asked or needed & set(step.made) or memories & written:
                kept.append(step)
                needed |= step.used
                memories |= {self.values[number].memory for number in (*step.used, *step.made)}
        return tuple(reversed(kept))

    def with_channels_last(self) -> Program:
        """The program on channels-last images and volumes, which views may have to copy."""
        steps = tuple(
            replace(step, func=Tensor.reshape) if step.func is Tensor.view else step
            for step in self.steps
        )
        return replace(self, steps=steps, channels_last=True)

    def in_segments(self, count: int) -> Program:
        """The program in `count` checkpoint segments of about equal bytes."""
        weights = [sum(self.values[number].nbytes for number in step.made) for step in self.steps]
        total, seen, ends = sum(weights), 0, list[int]()
        for index, weight in enumerate(weights):
            # A segment ends where a share is full, and nothing before it is overwritten later.
            if index and seen * count >= total * (len(ends) + 1):
                later = (number for step in self.steps[index:] for number in step.overwritten)
                if all(self.made_at.get(number, -1) >= index for number in later):
                    ends.append(index)
            seen += weight
        return replace(self, segments=tuple(ends[: count - 1]))

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

    def __str__(self) -> str:
        """One line per step, as `%3 = conv2d(%1, float32[8, 3, 3, 3], ...)`."""
        head = f"inputs {_shown([*map(Ref, self.inputs)])}"
        lines = [f"  {'' if one.varying else 'const '}{one}" for one in self.steps]
        for number, index in enumerate(self.segments):
            lines.insert(index + number, "  -- checkpoint segment --")
        return "\n".join([head, *lines, f"return {_shown(self.outputs)}"])


@dataclass(frozen=True)
class Prepared:
    """A program that takes tensors made of its weights, for as long as these do not change.

    copies: Pairs of a function that makes some of the tensors anew, and these tensors.
    """

    program: Program
    copies: tuple[tuple[Callable[[], Sequence[Tensor]], Sequence[Tensor]], ...]

    def refresh(self) -> None:
        """Makes the tensors anew, in the same places."""
        with torch.no_grad():
            for make, copies in self.copies:
                for copy, new in zip(copies, make(), strict=True):
                    # Views of the model's own weights are up to date.
                    if copy.data_ptr() != new.data_ptr():
                        copy.copy_(new)


def _shown(template: Any) -> str:
    """A template of arguments as text."""
    if isinstance(template, Ref):
        return f"%{template.number}"
    if isinstance(template, Tensor):
        return f"{str(template.dtype).removeprefix('torch.')}{list(template.shape)}"
    if isinstance(template, PerRow):
        return f"{template.base} + {template.slope} * rows"
    if isinstance(template, (tuple, list)):
        return ", ".join(map(_shown, template)).join("()" if len(template) != 1 else ("", ""))
    return name_of(template) if callable(template) else repr(template)


def is_channels_last(x: Tensor) -> bool:
    return x.dim() in _FORMATS and x.stride(1) == 1 and x.stride(-1) == x.shape[1]


def in_layout(tensors: Sequence[Tensor], channels_last: Sequence[bool]) -> tuple[Tensor, ...]:
    """Tensors in the memory formats of the inputs: in another one, operators round otherwise."""
    pairs = zip(tensors, channels_last, strict=True)
    return tuple(_in_channels_last(one) if last else one for one, last in pairs)


def _in_channels_last(point: Tensor) -> Tensor:
    """Images and volumes in channels-last memory format, other tensors as they are."""
    layout = _FORMATS.get(point.dim())
    if layout is None or (point.is_contiguous(memory_format=layout) and point.shape[1] > 1):
        return point
    if point.shape[1] > 1:
        return point.contiguous(memory_format=layout)
    # One channel lies the same way in both orders; only its strides tell operators which is meant.
    return point.reshape(len(point), *point.shape[2:], 1).movedim(-1, 1)


def mapped(change: Callable[[Any], Any], template: Any) -> Any:
    """A template of arguments with each of its leaves changed."""
    if isinstance(template, tuple):
        return tuple([mapped(change, one) for one in template])
    if isinstance(template, list):
        return [mapped(change, one) for one in template]
    if type(template) is dict:
        return {name: mapped(change, one) for name, one in template.items()}
    if isinstance(template, slice):
        ends = (template.start, template.stop, template.step)
        return slice(*[mapped(change, one) for one in ends])
    return change(template)


def leaves_in(template: Any) -> list[Any]:
    """The leaves of a template of arguments or of a result, in order."""
    if isinstance(template, slice):
        template = (template.start, template.stop, template.step)
    elif isinstance(template, Mapping):
        template = tuple(template.values())
    if not isinstance(template, (tuple, list)):
        return [template]
    found = []
    for one in template:
        if isinstance(one, (tuple, list, Mapping, slice)):
            found += leaves_in(one)
        else:
            found.append(one)
    return found


def refs_in(template: Any) -> list[Ref]:
    return [one for one in leaves_in(template) if isinstance(one, Ref)]


def tensors_in(result: Any) -> list[Tensor]:
    return [one for one in leaves_in(result) if isinstance(one, Tensor)]


def filled(template: Any, env: Env, rows: int, frozen: bool) -> Any:
    """A template with its values; `frozen`: weights as plain tensors of the same memory."""

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return env[leaf.number]
        if isinstance(leaf, Tensor):
            return leaf.detach() if frozen and leaf.requires_grad else leaf
        return leaf.base + leaf.slope * rows if isinstance(leaf, PerRow) else leaf

    return mapped(value, template)


def _filler(template: Any) -> Filler:
    """What `filled` does to a template, found once; None where it changes nothing."""
    if isinstance(template, Ref):
        number = template.number
        return lambda env, rows, frozen: env[number]
    if isinstance(template, Tensor):
        tensor = template
        return lambda env, rows, frozen: (
            tensor.detach() if frozen and tensor.requires_grad else tensor
        )
    if not any(isinstance(leaf, (Ref, Tensor, PerRow)) for leaf in leaves_in(template)):
        return None
    return lambda env, rows, frozen: filled(template, env, rows, frozen)


def tensors_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among further arguments, as programs number them."""
    return [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
