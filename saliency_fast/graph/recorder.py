"""Records a model's calls as a program, from one run with one row and one with two."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakTensorKeyDictionary

from saliency_fast import _torch_compat as compat
from saliency_fast._types import Args, Function, Kwargs
from saliency_fast.graph.gradients import steps_behind
from saliency_fast.graph.intercept import (
    GRAPH,
    INNER_GRADIENTS,
    Calls,
    NotLeanError,
    autocast_is_on,
)
from saliency_fast.graph.opinfo import info, name_of
from saliency_fast.graph.program import (
    Missing,
    PerRow,
    Program,
    Read,
    Ref,
    Step,
    Value,
    leaves_in,
    mapped,
    refs_in,
    tensors_in,
)

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_HOOKING = frozenset(("register_hook", "register_post_accumulate_grad_hook"))
_NOT_RECORDED = ("__set__", "__delete__")
_INFERENCE = torch.is_inference_mode_enabled
_MODES = (autocast_is_on, _INFERENCE, compat.inside_transform, compat.inside_dual_level)
_BATCH_VARIES = "the model's calls depend on the number of rows"


_Before = tuple[Any, list[Tensor], list[int]]
"""A call's arguments before it runs: their template, and their tensors with versions."""


class _Seen(NamedTuple):
    """A tensor that a call made. gradient: how gradients reached it then, see `gradient_of`."""

    tensor: weakref.ref[Tensor]
    number: int
    gradient: object


def gradient_of(tensor: Tensor) -> object:
    """How gradients reach a tensor: equal for as long as it is the same output of the same node of
    autograd's graph. A custom function makes the tensors of its forward, which runs without
    gradients, outputs of a node of its own: their identity and `requires_grad` do not show it.
    """
    try:
        node = tensor.grad_fn
    except RuntimeError:
        # A view that must not be used any more: equal to nothing.
        return object()
    # By its number: the node itself would keep what it saved for the backward pass alive.
    found = None if node is None else (node.name(), compat.sequence_number(node), tensor.output_nr)
    return tensor.requires_grad, found


class _Followed:
    """Tensors that depend on some first ones, and the first call by which Python reads them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.first_read: str | None = None
        self._tensors = WeakTensorKeyDictionary(dict.fromkeys(tensors))

    def follow(self, func: Function, given: list[Tensor], made: list[Tensor]) -> None:
        if not any(one in self._tensors for one in given):
            return
        name, facts = name_of(func), info(func)
        written = name.endswith("_") or name == "__setitem__"
        self._tensors.update(dict.fromkeys((*made, *(given[:1] if written else ()))))
        if name in ("__setitem__", "__set__"):
            return
        counted = facts.data_sized == "zeros" or (name == "where" and len(given) == 1)
        if counted or not (made or facts.metadata):
            self.first_read = self.first_read or name


class Recorder(Calls):
    """Records every call while it runs unchanged; `program` gives the result.

    A recorded model has autograd's own gradient: every tensor that a call takes is, in autograd's
    graph, what the recorded call that made it returned, no call reads the graph to hook it, and
    nothing changes what is saved. custom_gradient: what gives gradients of its own, if anything.
    """

    def __init__(self, points: Sequence[Tensor], extras: Sequence[Tensor]) -> None:
        super().__init__()
        self._refusal: str | None = None
        self.custom_gradient: str | None = None
        self._steps, self._values = list[Step](), dict[int, Value]()
        self._seen, self._memories = dict[int, _Seen](), dict[int, int]()
        self._by_memory: dict[int, list[int]] = {}
        self._points, self._given = _Followed(points), _Followed(extras)
        with torch.enable_grad():
            node = torch.zeros((), device="cpu", requires_grad=True).clone().grad_fn
        self._begun = 0 if node is None else compat.sequence_number(node)
        self._starts = {get_gradient_edge(one).node for one in points if one.requires_grad}
        self._inputs = [self._number(one, varying=True) for one in points]
        self._extras = [self._number(one, varying=False) for one in extras]

    @property
    def first_read_of_points(self) -> str | None:
        """The first call by which Python reads numbers that depend on the points."""
        return self._points.first_read

    @property
    def first_read_of_arguments(self) -> str | None:
        return self._given.first_read

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        if func is Tensor.__iter__:
            return iter(self.call(Tensor.unbind, args, kwargs))
        if func == GRAPH and (node := func(*args)) is not None and compat.is_checkpoint(node):
            return node
        before = self._recorded(self._before, func, args, kwargs)
        result = func(*args, **kwargs)
        self._recorded(self._note, func, before, result)
        # Also where the recording was refused.
        given, made = list(tensors_in((args, kwargs))), list(tensors_in(result))
        self.custom_gradient = self.custom_gradient or own_gradient(func, given, result)
        if self.custom_gradient is None and self.packs:
            self.custom_gradient = "saved_tensors_hooks"
        for known in (self._points, self._given):
            known.follow(func, given, made)
        return result

    def _recorded(self, note: Callable[..., Any], *args: Any) -> Any:
        """Runs `note`, unless the recording was refused; remembers why it is."""
        if self._refusal is None:
            # As text: an error holds the frames that it passed, and they the model's tensors.
            try:
                return note(*args)
            except NotLeanError as refusal:
                self._refusal = str(refusal)
            except Exception as error:
                # Tensors without memory or a version of their own: the model runs on all the same.
                self._refusal = f"the model has tensors that cannot be followed ({_line(error)})"
        return None

    def _before(self, func: Function, args: Args, kwargs: Kwargs) -> _Before:
        if func in INNER_GRADIENTS:
            raise NotLeanError("the model takes gradients of its own")
        self.check_saving()
        given = list(tensors_in((args, kwargs)))
        template = mapped(self._leaf, (args, dict(kwargs)))
        return template, given, list(map(compat.version_of, given))

    def program(self, raw: Any) -> Program:
        """The program that ends in `raw`, the model's return value; raises NotLeanError."""
        if self._refusal is not None:
            raise NotLeanError(self._refusal)
        leaves, tree = compat.tree_flatten(raw)
        outputs = tuple(self._output(one) for one in leaves)
        missing = [one for one in outputs if isinstance(one, Missing)]
        if missing and not any(isinstance(one, Ref) for one in outputs):
            raise NotLeanError(missing[0].reason)
        inputs, extras = tuple(self._inputs), tuple(self._extras)
        return Program(tuple(self._steps), inputs, extras, outputs, tree, self._values)

    def _output(self, leaf: Any) -> Any:
        """A part of what the model returns; Missing where no recorded call made it."""
        try:
            found = mapped(self._leaf, leaf)
        except NotLeanError as refusal:
            return Missing(str(refusal))
        except Exception as error:
            return Missing(f"the model returns what cannot be followed ({_line(error)})")
        if isinstance(found, (Ref, *_PLAIN)):
            return found
        return Missing(f"the model returns what no recorded call made ({type(leaf).__name__})")

    def _note(self, func: Function, given: _Before, result: Any) -> None:
        template, tensors, versions = given
        (args, kwargs), made = template, list(tensors_in(result))
        known = zip(tensors, versions, strict=True)
        changed = [one for one, version in known if compat.version_of(one) != version]
        if not (made or changed):
            if tensors:
                self._note_read(func, template, result)
            return
        if any(is_on() for is_on in _MODES):
            raise NotLeanError(
                "the model uses autocast, inference mode, torch.func or forward derivatives inside"
            )
        if self._sized_by_numbers(func, args, kwargs):
            raise NotLeanError(f"the model's shapes depend on numbers in tensors ({name_of(func)})")
        detached = not torch.is_grad_enabled()
        if detached and any(one.requires_grad for one in changed):
            raise NotLeanError(f"the model overwrites without gradients ({name_of(func)})")
        varying = self._varying(template)
        before = [number for one in changed if (number := self._known(one)) is not None]
        if len(before) < len(changed):
            raise NotLeanError(f"the model changes its own state ({name_of(func)})")
        outputs = tuple(self._number(one, varying=varying) for one in made)
        after = []
        for one in changed:
            number = self._known(one)
            after.append(number if number in outputs else self._number(one, varying=varying))
        for memory in {self._memory_of(one) for one in changed}:
            self._look_again(memory, varying)
        pairs = tuple(zip(before, after, strict=True))
        self._steps.append(Step(func, args, kwargs, outputs, varying, detached, pairs))

    def _note_read(self, func: Function, template: Any, result: Any) -> None:
        """Records a call by which Python reads numbers that do not depend on the points: every
        launch reads them again, and they must be the same.
        """
        name, plain = name_of(func), all(isinstance(one, _PLAIN) for one in leaves_in(result))
        if isinstance(result, torch.autograd.graph.Node):
            raise NotLeanError("the model reads the graph of its gradient (grad_fn)")
        if info(func).metadata and plain:
            return
        if self._varying(template) or name in _NOT_RECORDED or not plain:
            raise NotLeanError(f"the model reads numbers out of its tensors ({name})")
        args, kwargs = template
        self._steps.append(Step(Read(func, result), args, kwargs, (), False, True))

    def _varying(self, template: Any) -> bool:
        return any(self._values[one.number].varying for one in refs_in(template))

    def _leaf(self, value: Any) -> Any:
        """A leaf of a call's arguments, as a template has it."""
        if not isinstance(value, Tensor):
            return value
        number = self._known(value)
        if number is None and (value.is_leaf or self._kept(value)):
            return value
        if number is None or gradient_of(value) != self._seen[id(value)].gradient:
            custom = compat.custom_function(value.grad_fn)
            if custom is None:
                raise NotLeanError("the model computes outside of PyTorch's own calls")
            if compat.is_module_hook(value.grad_fn):
                raise NotLeanError("a module of the model has a backward hook")
            raise NotLeanError(f"the model has a custom autograd function {custom.__name__}")
        return Ref(number)

    def _kept(self, tensor: Tensor) -> bool:
        """Whether it is of an earlier run, as a table that the model keeps, and has nothing to do
        with the points. Threads count their nodes apart: hence the look at the graph.
        """
        if compat.sequence_number(tensor.grad_fn) >= self._begun:
            return False
        return self._starts.isdisjoint(steps_behind((tensor,)))

    def _known(self, tensor: Tensor) -> int | None:
        seen = self._seen.get(id(tensor))
        return seen.number if seen is not None and seen.tensor() is tensor else None

    def _look_again(self, memory: int, varying: bool) -> None:
        """Records anew how gradients reach the tensors of a memory that a call has overwritten:
        what is written to one view changes the graph and the numbers of the others.
        """
        for key in self._by_memory[memory]:
            seen = self._seen[key]
            tensor, value = seen.tensor(), self._values[seen.number]
            if tensor is not None and value.memory == memory:
                self._seen[key] = seen._replace(gradient=gradient_of(tensor))
                self._values[seen.number] = replace(value, varying=value.varying or varying)

    def _sized_by_numbers(self, func: Function, args: Any, kwargs: Any) -> bool:
        name = name_of(func)
        if name == "__getitem__":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            inside = tuple(one for one in parts if isinstance(one, slice))
            kinds = {self._values[one.number].dtype for one in parts if isinstance(one, Ref)}
            return any(refs_in(inside)) or bool(kinds & {torch.bool, torch.uint8})
        if name == "repeat_interleave":
            return any(refs_in((args[1:], kwargs.get("repeats"))))
        alone = name == "where" and len(args) + len(kwargs) == 1
        return alone or bool(info(func).data_sized)

    def _number(self, tensor: Tensor, *, varying: bool) -> int:
        number, memory = len(self._values), self._memory_of(tensor)
        # Weak: a recording must not keep a launch's activations alive.
        self._seen[id(tensor)] = _Seen(weakref.ref(tensor), number, gradient_of(tensor))
        self._by_memory.setdefault(memory, []).append(id(tensor))
        self._values[number] = Value(tuple(tensor.shape), tensor.dtype, False, varying, memory)
        return number

    def _memory_of(self, tensor: Tensor) -> int:
        """The number of a tensor's memory. Once no recorded tensor of it is alive, its address
        counts as another one: who gets it depends on the heap, and two recordings must not.
        """
        address = compat.storage_id(tensor)
        memory = self._memories.get(address, -1)
        recorded = (self._seen[key].tensor() for key in self._by_memory.get(memory, ()))
        if not any(one is not None and compat.storage_id(one) == address for one in recorded):
            memory = self._memories[address] = len(self._by_memory)
            self._by_memory[memory] = []
        return memory


def unified(one: Program, two: Program) -> Program:
    """The program for any number of rows, from recordings with one row and with two."""
    first, second = (each.values[each.inputs[0]].shape for each in (one, two))
    if first == second:
        raise NotLeanError("the model's output of one row has no batch axis")
    if len(one.steps) != len(two.steps) or one.tree != two.tree:
        raise NotLeanError(_BATCH_VARIES)
    steps = []
    for a, b in zip(one.steps, two.steps, strict=True):
        if _about(a) != _about(b):
            raise NotLeanError(f"{_BATCH_VARIES} ({a.name})")
        args, kwargs = _merged(a.args, b.args), _merged(a.kwargs, b.kwargs)
        steps.append(replace(a, args=args, kwargs=kwargs))
    pairs = zip(one.outputs, two.outputs, strict=True)
    outputs = tuple(
        next((each for each in (a, b) if isinstance(each, Missing)), None) or _merged(a, b)
        for a, b in pairs
    )
    values = {n: _grown(value, two.values[n].shape) for n, value in one.values.items()}
    tree: compat.TreeSpec = one.tree
    for step in steps:
        if _parts_of_rows(step, values):
            raise NotLeanError(f"the model takes rows in parts of a fixed size ({step.name})")
    found = Program(tuple(steps), one.inputs, one.extras, outputs, tree, values)
    return replace(found, reads=found.rereading())


def _about(step: Step) -> list[object]:
    """All of a step but its arguments."""
    names = [one.name for one in fields(step) if one.name not in ("args", "kwargs")]
    return [getattr(step, name) for name in names]


def own_gradient(func: Function, given: Sequence[Tensor], result: Any) -> str | None:
    """The custom function or hook, if any, by which a call's gradient is the model's own."""
    if name_of(func) in _HOOKING or isinstance(result, torch.autograd.graph.Node):
        return "hook"
    known = ("saliency_fast.", "torch.utils.checkpoint")
    for one in given:
        custom = compat.custom_function(one.grad_fn) if one.requires_grad else None
        if custom is not None and not custom.__module__.startswith(known):
            return custom.__name__
    return None


def _merged(a: Any, b: Any) -> Any:
    """One template from two; integers that differ follow the rows."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if a is b:
            return a
    elif type(a) is int and type(b) is int and a != b:
        return PerRow(2 * a - b, b - a)
    elif isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        parts = [_merged(x, y) for x, y in zip(a, b, strict=True)]
        return tuple(parts) if isinstance(a, tuple) else parts
    elif type(a) is dict and type(b) is dict and a.keys() == b.keys():
        return {name: _merged(a[name], b[name]) for name in a}
    elif isinstance(a, slice) and isinstance(b, slice):
        return slice(*_merged((a.start, a.stop, a.step), (b.start, b.stop, b.step)))
    elif type(a) is type(b) and (a is b or bool(a == b)):
        return a
    raise NotLeanError(f"{_BATCH_VARIES}, or use tensors made anew")


def same_calls(one: Program, other: Program) -> bool:
    """Whether two recordings are of the same calls on the same tensors of the model's own."""

    def about(each: Program) -> tuple[object, ...]:
        return each.tree, each.inputs, each.extras, each.outputs, each.values, len(each.steps)

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return a is b
        return type(a) is type(b) and bool(a == b)

    if about(one) != about(other):
        return False
    for a, b in zip(one.steps, other.steps, strict=True):
        some, tree = compat.tree_flatten((a.args, dict(a.kwargs)))
        others, same = compat.tree_flatten((b.args, dict(b.kwargs)))
        if _about(a) != _about(b) or tree != same or not all(map(equal, some, others)):
            return False
    return True


def _parts_of_rows(step: Step, values: Mapping[int, Value]) -> bool:
    """Whether a call takes some of a launch's rows by numbers that hold for one and for two."""
    first = (*step.args, None)[0]
    if not isinstance(first, Ref) or not values[first.number].rowwise:
        return False
    if step.name == "__getitem__":
        index = step.args[1][0] if isinstance(step.args[1], tuple) else step.args[1]
        ends = (index.start, index.stop, index.step) if isinstance(index, slice) else ()
        return any(type(one) is int and one not in (0, 1) for one in ends)
    axis = step.kwargs.get("dim", (*step.args, 0, 0)[2])
    return step.info.splits and axis in (0, -len(values[first.number].shape))


def _grown(value: Value, two: tuple[int, ...]) -> Value:
    """A value of one row, with how its sizes follow the rows; two: its shape for two rows."""
    one = value.shape
    if len(one) != len(two):
        raise NotLeanError("the model's shapes depend on the number of rows")
    rowwise = bool(one) and one[0] == 1 and two == (2, *one[1:])
    return replace(
        value, rowwise=rowwise, growth=tuple(b - a for a, b in zip(one, two, strict=True))
    )


def _line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
