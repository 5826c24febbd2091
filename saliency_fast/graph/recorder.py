"""Records a model's calls as a program, from one run with one row and one with two."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from saliency_fast.graph.intercept import INNER_GRADIENTS, Calls, NotLeanError
from saliency_fast.graph.program import (
    Missing,
    PerRow,
    Program,
    Read,
    Ref,
    Step,
    Value,
    refs_in,
    tensors_in,
)

# Answers that are no tensors and say nothing of the numbers inside one.
_SHAPES = frozenset(
    (
        "__get__",
        "__len__",
        "__hash__",
        "dim",
        "ndimension",
        "size",
        "stride",
        "numel",
        "nelement",
        "element_size",
        "get_device",
        "storage_offset",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_conj",
        "is_neg",
        "is_inference",
        "is_same_size",
        "is_tensor",
        "type",
        "result_type",
        "promote_types",
        "can_cast",
        "broadcast_shapes",
        "_is_view",
        "has_names",
        "is_shared",
        "is_pinned",
        "is_nested",
    )
)
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)


# Calls whose results have a size that the numbers in their arguments tell.
_SIZED = frozenset(
    (
        "nonzero",
        "argwhere",
        "masked_select",
        "bincount",
        "unique",
        "unique_consecutive",
        "_unique",
        "_unique2",
        "unique_dim",
    )
)


# Those among them whose size depends on which numbers are zero or alike.
_COUNTED = _SIZED - {"bincount"}


_HOOKING = frozenset(("register_hook", "register_post_accumulate_grad_hook"))
_SPLITS = frozenset(("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_split"))


@dataclass(frozen=True)
class _Before:
    """A call's arguments before it runs."""

    template: Any
    tensors: list[Tensor]
    versions: list[int]

    def changed(self) -> list[Tensor]:
        pairs = zip(self.tensors, self.versions, strict=True)
        return [one for one, version in pairs if one._version != version]


class _Seen(NamedTuple):
    """A tensor that a call made. gradient: how gradients reached it then, see `gradient_of`."""

    tensor: weakref.ref[Tensor]
    number: int
    gradient: object


def gradient_of(tensor: Tensor) -> object:
    """How gradients reach a tensor: equal for as long as it is the same output of the same node of
    autograd's graph.

    A custom function runs its forward without gradients and then gives the very tensors that this
    made a node of its own, so that neither their identity nor `requires_grad` tells.
    """
    try:
        node = tensor.grad_fn
    except RuntimeError:
        # A view that must not be used any more: equal to nothing.
        return object()
    # By its number: the node itself would keep what it saved for the backward pass alive.
    found = None if node is None else (node.name(), node._sequence_nr(), tensor.output_nr)
    return tensor.requires_grad, found


class Recorder(Calls):
    """Notes every call while it runs as it is; `program` is what it saw.

    A model that cannot be recorded runs to its end all the same. What is recorded has autograd's
    own gradient: every tensor that a call takes is, in autograd's graph, what the noted call that
    made it gave, no call reads the graph to hook it, and nothing changes what is saved.
    """

    def __init__(self, points: Sequence[Tensor], extras: Sequence[Tensor]) -> None:
        super().__init__()
        self._refusal: str | None = None
        self._steps: list[Step] = []
        self._values: dict[int, Value] = {}
        self._seen: dict[int, _Seen] = {}
        self._by_memory: dict[int, list[int]] = {}
        self.read: str | None = None
        self.own: str | None = None
        self.asked: str | None = None
        self._varying = {id(one): weakref.ref(one) for one in points}
        self._given = {id(one): weakref.ref(one) for one in extras}
        self._inputs = [self._number(one, varying=True) for one in points]
        self._extras = [self._number(one, varying=False) for one in extras]

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func is Tensor.__iter__:
            return iter(self.call(Tensor.unbind, args, kwargs))
        if func in INNER_GRADIENTS:
            self._kept(_refuse, "the model takes gradients of its own")
        before = self._kept(self._before, args, kwargs)
        result = func(*args, **kwargs)
        self._kept(self._note, func, before, result)
        self._follow(func, args, kwargs, result)
        return result

    def _follow(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Follows what depends on the points, also where the recording was refused; `read` is the
        first call that tells Python of its numbers, `asked` of those of further arguments, `own`
        what gives gradients of its own.
        """
        given = list(tensors_in((args, kwargs)))
        self.own = self.own or own_gradient(func, given, result)
        if self.own is None and self.packs:
            self.own = "saved_tensors_hooks"
        for known in (self._varying, self._given):
            if any(_among(known, one) for one in given):
                self._follow_one(known, func, given, result)

    def _follow_one(
        self, known: dict[int, Any], func: Callable[..., Any], given: list[Tensor], result: Any
    ) -> None:
        made = list(tensors_in(result))
        for one in made:
            known[id(one)] = weakref.ref(one)
        name = _name(func)
        if name.endswith("_") or name == "__setitem__":
            known[id(given[0])] = weakref.ref(given[0])
        counted = name in _COUNTED or (name == "where" and len(given) == 1)
        if name in ("__setitem__", "__set__"):
            return
        if counted or not (made or name in _SHAPES):
            if known is self._varying:
                self.read = self.read or name
            else:
                self.asked = self.asked or name

    def _kept(self, note: Callable[..., Any], *args: Any) -> Any:
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

    def _before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Before:
        self.check_saving()
        given = list(tensors_in((args, kwargs)))
        template = self._template((args, dict(kwargs)))
        return _Before(template, given, [one._version for one in given])

    def program(self, raw: Any) -> Program:
        """The program that ends in `raw`, the model's return value; raises NotLeanError."""
        if self._refusal is not None:
            raise NotLeanError(self._refusal)
        leaves, tree = tree_flatten(raw)
        outputs = tuple(self._output(one) for one in leaves)
        missing = [one for one in outputs if isinstance(one, Missing)]
        if missing and not any(isinstance(one, Ref) for one in outputs):
            raise NotLeanError(missing[0].reason)
        inputs, extras = tuple(self._inputs), tuple(self._extras)
        return Program(tuple(self._steps), inputs, extras, outputs, tree, self._values)

    def _output(self, leaf: Any) -> Any:
        """A part of what the model returns; Missing where no noted call made it."""
        try:
            found = self._template(leaf)
        except NotLeanError as refusal:
            return Missing(str(refusal))
        except Exception as error:
            return Missing(f"the model returns what cannot be followed ({_line(error)})")
        if isinstance(found, (Ref, *_PLAIN)):
            return found
        return Missing(f"the model returns what no noted call made ({type(leaf).__name__})")

    def _note(self, func: Callable[..., Any], given: _Before, result: Any) -> None:
        made, changed = list(tensors_in(result)), given.changed()
        if not (made or changed):
            if given.tensors:
                self._note_read(func, given, result)
            return
        if _inside_a_mode():
            raise NotLeanError(
                "the model uses autocast, inference mode, torch.func or forward derivatives inside"
            )
        if self._sized_by_numbers(func, *given.template):
            raise NotLeanError(f"the model's shapes depend on numbers in tensors ({_name(func)})")
        if not torch.is_grad_enabled() and any(one.requires_grad for one in changed):
            raise NotLeanError(f"the model overwrites without gradients ({_name(func)})")
        args, kwargs = given.template
        varying = any(self._values[one.number].varying for one in refs_in(given.template))
        before = [self._known(one) for one in changed]
        if any(one is None for one in before):
            raise NotLeanError(f"the model changes its own state ({_name(func)})")
        outputs = tuple(self._number(one, varying=varying) for one in made)
        fresh = set(outputs)
        after = []
        for one in changed:
            number = self._known(one)
            after.append(number if number in fresh else self._number(one, varying=varying))
        for memory in {one.untyped_storage()._cdata for one in changed}:
            self._look_again(memory, varying)
        self._steps.append(
            Step(
                func,
                args,
                kwargs,
                outputs,
                varying,
                not torch.is_grad_enabled(),
                tuple(zip(before, after, strict=True)),  # type: ignore[arg-type]
            )
        )

    def _note_read(self, func: Callable[..., Any], given: _Before, result: Any) -> None:
        """Notes a call that tells Python numbers, where these do not depend on the points: they are
        read again in every launch, and must be the same.
        """
        name = _name(func)
        if isinstance(result, torch.autograd.graph.Node):
            raise NotLeanError("the model reads the graph of its gradient (grad_fn)")
        if name in _SHAPES and _is_plain(result):
            return
        args, kwargs = given.template
        varying = any(self._values[one.number].varying for one in refs_in(given.template))
        if varying or name in ("__set__", "__delete__") or not _is_plain(result):
            raise NotLeanError(f"the model reads numbers out of its tensors ({name})")
        self._steps.append(Step(Read(func, result), args, kwargs, (), False, True))

    def _template(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            number = self._known(value)
            if number is None:
                if not value.is_leaf:
                    raise NotLeanError(_of_unseen(value))
                return value
            if gradient_of(value) != self._seen[id(value)].gradient:
                raise NotLeanError(_of_unseen(value))
            return Ref(number)
        if isinstance(value, (tuple, list)):
            parts = [self._template(one) for one in value]
            return tuple(parts) if isinstance(value, tuple) else parts
        if type(value) is dict:
            return {name: self._template(one) for name, one in value.items()}
        if isinstance(value, slice):
            return slice(*[self._template(one) for one in (value.start, value.stop, value.step)])
        return value

    def _known(self, tensor: Tensor) -> int | None:
        seen = self._seen.get(id(tensor))
        return seen.number if seen is not None and seen.tensor() is tensor else None

    def _look_again(self, memory: int, varying: bool) -> None:
        """Notes anew how gradients reach the tensors of a memory that a call has overwritten: what
        is written to one view changes the graph and the numbers of the others.
        """
        for key in self._by_memory[memory]:
            seen = self._seen[key]
            tensor, value = seen.tensor(), self._values[seen.number]
            if tensor is not None and value.memory == memory:
                self._seen[key] = seen._replace(gradient=gradient_of(tensor))
                self._values[seen.number] = replace(value, varying=value.varying or varying)

    def _sized_by_numbers(self, func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        name = _name(func)
        if name == "__getitem__":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            inside = [one for one in parts if isinstance(one, slice)]
            masks = [one for one in parts if isinstance(one, Ref)]
            kinds = {self._values[one.number].dtype for one in masks}
            return any(refs_in(tuple(inside))) or bool(kinds & {torch.bool, torch.uint8})
        if name == "repeat_interleave":
            return any(refs_in((args[1:], kwargs.get("repeats"))))
        return name in _SIZED or (name == "where" and len(args) + len(kwargs) == 1)

    def _number(self, tensor: Tensor, *, varying: bool) -> int:
        number = len(self._values)
        # Weak: a recording must not keep a launch's activations alive.
        self._seen[id(tensor)] = _Seen(weakref.ref(tensor), number, gradient_of(tensor))
        memory = tensor.untyped_storage()._cdata
        self._by_memory.setdefault(memory, []).append(id(tensor))
        self._values[number] = Value(tuple(tensor.shape), tensor.dtype, False, varying, memory)
        return number


def unified(one: Program, two: Program) -> Program:
    """The program for any number of rows, from recordings with one row and with two."""
    first, second = (each.values[each.inputs[0]].shape for each in (one, two))
    if first == second:
        raise NotLeanError("the model's output of one row has no batch axis")
    if len(one.steps) != len(two.steps) or one.tree != two.tree:
        raise NotLeanError("the model's calls depend on the number of rows")
    steps = tuple(
        Step(
            a.func,
            _merged(a.args, b.args),
            _merged(a.kwargs, b.kwargs),
            a.outputs,
            a.varying,
            a.detached,
            a.changed,
        )
        for a, b in zip(one.steps, two.steps, strict=True)
        if _same_call(a, b)
    )
    pairs = zip(one.outputs, two.outputs, strict=True)
    outputs = tuple(_merged_outputs(a, b) for a, b in pairs)
    values = {
        number: replace(
            value,
            rowwise=_rowwise(value.shape, two.values[number].shape),
            growth=_growth(value.shape, two.values[number].shape),
        )
        for number, value in one.values.items()
    }
    tree: TreeSpec = one.tree
    for step in steps:
        if _parts_of_rows(step, values):
            raise NotLeanError(f"the model takes rows in parts of a fixed size ({step.name})")
    found = Program(steps, one.inputs, one.extras, outputs, tree, values)
    return replace(found, reads=found.rereading())


def _is_plain(value: Any) -> bool:
    """Whether a value is numbers, text and names alone, which can be compared later."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _among(known: Mapping[int, Any], tensor: Tensor) -> bool:
    found = known.get(id(tensor))
    return found is not None and found() is tensor


def own_gradient(func: Callable[..., Any], given: Sequence[Tensor], result: Any) -> str | None:
    """What of a call shows that the model gives gradients of its own, by code that may look at all
    rows on the way back: a custom function or a hook.
    """
    if _name(func) in _HOOKING or isinstance(result, torch.autograd.graph.Node):
        return "hook"
    for one in given:
        node: Any = one.grad_fn if one.requires_grad else None
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            name = type(node).__name__.removesuffix("Backward")
            home = vars(type(node))["_forward_cls"].__module__
            if not home.startswith(("saliency_fast.", "torch.utils.checkpoint")):
                return name
    return None


def _of_unseen(tensor: Tensor) -> str:
    """Why a tensor is not what a call of PyTorch's made."""
    node: Any = tensor.grad_fn
    name = "" if node is None else node.name().removesuffix("Backward")
    if name == "BackwardHookFunction":
        return "a module of the model has a backward hook"
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return f"the model has a custom autograd function {name}"
    return "the model computes outside of PyTorch's own calls"


def _same_call(a: Step, b: Step) -> bool:
    if a.func != b.func or (a.outputs, a.varying, a.detached, a.changed) != (
        b.outputs,
        b.varying,
        b.detached,
        b.changed,
    ):
        raise NotLeanError(f"the model's calls depend on the number of rows ({a.name})")
    return True


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
        ends = zip((a.start, a.stop, a.step), (b.start, b.stop, b.step), strict=True)
        return slice(*[_merged(x, y) for x, y in ends])
    elif type(a) is type(b) and (a is b or bool(a == b)):
        return a
    raise NotLeanError("the model's calls depend on the number of rows, or use tensors made anew")


def same_calls(one: Program, other: Program) -> bool:
    """Whether two recordings are of the same calls on the same tensors of the model's own."""
    parts = [
        (each.tree, each.inputs, each.extras, each.outputs, _kinds(each), len(each.steps))
        for each in (one, other)
    ]
    return parts[0] == parts[1] and all(
        a.func == b.func
        and (a.outputs, a.varying, a.detached, a.changed)
        == (b.outputs, b.varying, b.detached, b.changed)
        and _equal((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs)))
        for a, b in zip(one.steps, other.steps, strict=True)
    )


def _kinds(program: Program) -> list[object]:
    """What is known of the values, with their memories by the order in which they come."""
    seen: dict[int, int] = {}
    return [
        (number, replace(value, memory=seen.setdefault(value.memory, len(seen))))
        for number, value in program.values.items()
    ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(_equal(a[n], b[n]) for n in a)
    return type(a) is type(b) and bool(a == b)


def _merged_outputs(a: Any, b: Any) -> Any:
    missing = next((each for each in (a, b) if isinstance(each, Missing)), None)
    return _merged(a, b) if missing is None else missing


def _rowwise(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    return bool(one) and one[0] == 1 and two == (2, *one[1:])


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
    return step.name in _SPLITS and axis in (0, -len(values[first.number].shape))


def _growth(one: tuple[int, ...], two: tuple[int, ...]) -> tuple[int, ...]:
    if len(one) != len(two):
        raise NotLeanError("the model's shapes depend on the number of rows")
    return tuple(b - a for a, b in zip(one, two, strict=True))


def _refuse(reason: str) -> None:
    raise NotLeanError(reason)


def _inside_a_mode() -> bool:
    inside = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return inside or torch.is_inference_mode_enabled() or _transforming()


def _transforming() -> bool:
    """Whether a transform of torch.func or forward-mode derivatives are at work."""
    stacked = torch._C._functorch.peek_interpreter_stack() is not None
    return stacked or torch.autograd.forward_ad._current_level >= 0


def _line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _name(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", func))
