"""Follows the elements of inputs through a model, to infer layouts and where layers lie in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from saliency_fast import _torch_compat as compat
from saliency_fast._types import Args, Function, Kwargs
from saliency_fast.graph.intercept import FunctionMode
from saliency_fast.model.layers import Layer, floats_at, hooked, tree_tensors
from saliency_fast.model.preserve import uncompiled

PATIENCE = 200
"""Calls in a row of no followed tensor, after which the search for a layout ends."""
MOST_CACHED = 64
"""Kinds of inputs whose layouts are cached for each model."""
EXACT = 2**24
"""Integers below this are float32 numbers."""

_MOVES = frozenset(
    "permute transpose swapaxes swapdims movedim moveaxis t view reshape view_as reshape_as "
    "flatten ravel unflatten unsqueeze squeeze expand expand_as repeat tile repeat_interleave flip "
    "fliplr flipud roll narrow __getitem__ select index_select chunk split split_with_sizes unbind "
    "tensor_split unfold pixel_unshuffle pixel_shuffle channel_shuffle cat concat concatenate "
    "stack hstack vstack unsqueeze_ squeeze_ transpose_ t_ T mT rot90 swapaxes_ swapdims_ "
    "broadcast_to atleast_3d pad im2col".split()
)
_RESIZES = frozenset(
    "interpolate upsample avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split()
)
_MIXES = frozenset(
    "matmul __matmul__ __rmatmul__ mm bmm einsum addmm baddbmm addbmm bilinear tensordot "
    "scatter gather sort argsort topk conv_tbc stft istft cdist kron outer".split()
)
_ARITHMETIC = frozenset("add sub subtract mul multiply div divide truediv".split())
_JOINS = frozenset("cat concat concatenate stack hstack vstack".split())
_PRODUCTS = frozenset("matmul __matmul__ bmm".split())
_CONVOLUTIONS = {f"conv{more}{n}d": n for n in (1, 2, 3) for more in ("", "_transpose")}
_RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())
_CELLS = frozenset("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())


@dataclass(frozen=True)
class Coordinates:
    """A tensor made of input `number` by calls that move its elements or keep their order.

    where: for each axis of the input the coordinate of each element, like the tensor; -1 where it
    is padding. mixed: axes of the input that a product summed over.
    """

    number: int
    where: tuple[Tensor, ...]
    mixed: frozenset[int] = frozenset()

    def along(self, axis: int) -> frozenset[int]:
        """The input's axes whose coordinate changes along an axis of the tensor."""
        found = set()
        for number, where in enumerate(self.where):
            if (size := where.shape[axis]) > 1 and where.stride(axis):
                a, b = where.narrow(axis, 0, size - 1), where.narrow(axis, 1, size - 1)
                if bool(((a != b) & (a >= 0) & (b >= 0)).any()):
                    found.add(number)
        return frozenset(found)

    def moved(self, change: Callable[[Tensor], Any]) -> list[Coordinates]:
        """The same after `change` moved elements: one for each tensor that is made."""
        made = [tree_tensors(change(one)) for one in self.where]
        return [replace(self, where=tuple(parts)) for parts in zip(*made, strict=True)]


@dataclass(frozen=True)
class Lattice:
    """The grid that tokens make over an input's positions, and the token at each point."""

    grid: tuple[int, ...]
    index: tuple[int, ...]


def lattice_of(tokens: Coordinates, places: Sequence[int]) -> Lattice | None:
    """The lattice of followed tokens [R, T, C], without tokens of no position, or None."""
    where = tokens.where[0]
    # Rows of more than one place are windows, which are no sequence of an example.
    if where.dim() != 3 or not places or (tokens.along(0) - {0}) or tokens.along(-1) & set(places):
        return None
    at = torch.stack([tokens.where[axis][0, :, 0] for axis in places], 1)
    real = (at >= 0).all(1)
    numbers = [torch.unique(one, return_inverse=True) for one in at[real].unbind(1)]
    grid = tuple(len(values) for values, _ in numbers)
    flat = torch.zeros(int(real.sum()), dtype=torch.int64, device=at.device)
    for size, (_, number) in zip(grid, numbers, strict=True):
        flat = flat * size + number
    # As many tokens as points, and one for each.
    if not len(flat) or len(flat) != math.prod(grid) or len(torch.unique(flat)) != len(flat):
        return None
    return Lattice(grid, tuple(real.nonzero().flatten()[flat.argsort()].tolist()))


def order_of(tensor: Coordinates, space: Sequence[int], places: Sequence[int]) -> list[int] | None:
    """For each of the input's `places` the one axis among `space` of a tensor along it, or None."""
    along = [tensor.along(axis) & set(places) for axis in space]
    order = []
    for place in places:
        own = [axis for axis, one in zip(space, along, strict=True) if one == {place}]
        if len(own) != 1:
            return None
        order.append(own[0])
    return order


@dataclass(frozen=True)
class Inside:
    """Where layers' first tensors lie in each input, and all tensors [R, T, C], by T."""

    layers: tuple[tuple[Coordinates | None, ...], ...] = ()
    tokens: Mapping[int, Sequence[Coordinates]] = field(default_factory=dict)

    def of(self, layer: int, number: int) -> Coordinates | None:
        """Of a layer, as it was made of input `number`."""
        inputs = self.layers[layer] if layer < len(self.layers) else ()
        return inputs[number] if number < len(inputs) else None

    def sequence(self, count: int, places: Sequence[int], number: int) -> Lattice | None:
        """The lattice of the model's `count` tokens; None where there are none, or several."""
        several = [one for one in self.tokens.get(count, ()) if one.number == number]
        lattices = {lattice_of(one, places) for one in several} - {None}
        return lattices.pop() if len(lattices) == 1 else None


Run = Callable[[Sequence[Tensor]], Any]
_CACHED: WeakKeyDictionary[Any, dict[Any, tuple[str | None, ...]]] = WeakKeyDictionary()


def infer_layouts(model: Function, inputs: Sequence[Tensor], run: Run) -> tuple[str | None, ...]:
    """The letters of each input [1, *], None where no layer shows them; `run` may be stopped."""
    key = tuple((tuple(x.shape[1:]), x.dtype) for x in inputs)
    cached = _CACHED.setdefault(model, {}) if isinstance(model, nn.Module) else {}
    mode, failed = _TrackCoordinates(inputs), True
    # The same call raises an exception again where the model runs for its map.
    with suppress(Exception):
        with suppress(_Finished), torch.no_grad(), uncompiled(), mode:
            run(inputs)
        failed = False
    letters = tuple(mode.letters.get(number) for number in range(len(inputs)))
    if not failed:
        while len(cached) >= MOST_CACHED:
            cached.pop(next(iter(cached)))
        cached[key] = letters
    return letters


def cached_layouts(
    model: object, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]
) -> tuple[str | None, ...] | None:
    """The result of an earlier `infer_layouts` of a module and inputs of these shapes and types."""
    if not isinstance(model, nn.Module):
        return None
    key = tuple((shape[1:], kind) for shape, kind in zip(shapes, dtypes, strict=True))
    return _CACHED.get(model, {}).get(key)


def locate_layers(
    inputs: Sequence[Tensor], run: Run, layers: Sequence[Layer], of_input: bool
) -> Inside:
    """Follows inputs [R, *] to layers; takes a whole run."""
    mode = _TrackCoordinates(inputs, through=True)
    at_layers: dict[int, list[Coordinates | None]] = {}

    def seen(number: int, value: Any) -> None:
        with compat.WithoutFunctionModes():
            own = floats_at(value)
        at_layers[number] = [mode.of(own[0], n) for n in range(len(inputs))] if own else []

    hooks = hooked(tuple(layers), seen, of_input=of_input)
    with torch.no_grad(), uncompiled(), suppress(Exception), mode, hooks:
        run(inputs)
    return Inside(tuple(tuple(at_layers.get(at, ())) for at in range(len(layers))), mode.tokens)


class _Finished(BaseException):
    """All layouts are found: the model need not go on."""


class _TrackCoordinates(FunctionMode):
    """Follows inputs. letters: the layout of each input, once a layer shows it; closed: inputs of
    which the first such layer does not. through: goes on after these layers, and collects `tokens`.
    """

    def __init__(self, inputs: Sequence[Tensor], *, through: bool = False) -> None:
        super().__init__()
        self.through = through
        self.tokens: dict[int, list[Coordinates]] = {}
        self.shapes = [tuple(x.shape) for x in inputs]
        self.letters: dict[int, str] = {}
        self.closed: set[int] = set()
        self._idle = 0
        # By input: a tensor may be made of several, which are followed one by one.
        self._followed = [WeakTensorKeyDictionary() for _ in inputs]
        for number, x in enumerate(inputs):
            coordinates = []
            for axis, size in enumerate(x.shape):
                kind = torch.float32 if size < EXACT else torch.float64
                numbers = torch.arange(size, dtype=kind, device=x.device)
                coordinates.append(numbers.view(-1, *(1,) * (x.dim() - 1 - axis)).expand(x.shape))
            self._keep([x], [Coordinates(number, tuple(coordinates))])

    def opens(self, func: FunctionType) -> bool:
        return _name(func) not in _RESIZES | _MOVES | {"linear"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Before its body runs, which is followed call by call.
        if _name(func) == "multi_head_attention_forward":
            for number in range(len(self.shapes)):
                self._infer_axes(number, func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        flat = tree_tensors((args, dict(kwargs)))
        numbers = range(len(self.shapes))
        given = {n: [one for one in flat if one in self._followed[n]] for n in numbers}
        given = {number: tensors for number, tensors in given.items() if tensors}
        self._idle = 0 if given else self._idle + 1
        if self._idle > PATIENCE and not self.through:
            raise _Finished
        for number in given:
            self._infer_axes(number, func, args, kwargs)
        result = func(*args, **kwargs)
        for number, tensors in given.items():
            # Results of a call that cannot be followed are not followed.
            with suppress(Exception), compat.WithoutFunctionModes(), torch.no_grad():
                self._after(number, (func, args, kwargs), tensors, result)
        return result

    def of(self, value: Any, number: int) -> Coordinates | None:
        """What is followed of a tensor, as it was made of input `number`."""
        known = self._followed[number]
        return known[value] if isinstance(value, Tensor) and value in known else None

    def _keep(self, made: Sequence[Tensor], coordinates: Sequence[Coordinates]) -> None:
        for tensor, one in zip(made, coordinates, strict=False):
            if tensor.shape == one.where[0].shape:
                self._followed[one.number][tensor] = one
                if self.through and tensor.dim() == 3:
                    self.tokens.setdefault(tensor.shape[1], []).append(one)

    def _after(
        self, number: int, call: tuple[Function, Args, Kwargs], given: list[Tensor], result: Any
    ) -> None:
        """Follows the results of a call of followed tensors."""
        made, first = tree_tensors(result), self.of(given[0], number)
        (func, args, kwargs), name = call, _name(call[0])
        if first is None or not made:
            return
        rank, shape = first.where[0].dim(), made[0].shape
        if name == "linear" or name in _CONVOLUTIONS:
            # A product over one axis: the coordinates of its first element stand for all.
            if (args and given[0] is not args[0]) or len(shape) != rank:
                return
            if name == "linear":
                mixed = first.mixed | first.along(-1)
                where = tuple(one[..., :1].expand(shape) for one in first.where)
                self._keep(made[:1], [replace(first, where=where, mixed=mixed)])
            else:
                where = tuple(_nearest(one[:, :1], shape[2:]).expand(shape) for one in first.where)
                self._keep(made[:1], [replace(first, where=where)])
        elif name in _MOVES:
            self._keep(made, self._moved(number, func, args, kwargs, first))
        elif name in _RESIZES:
            if len(shape) == rank in (3, 4, 5):
                self._keep(made, first.moved(lambda one: _nearest(one, shape[2:])))
        elif name not in _MIXES:
            self._keep(made[:1], self._kept(number, name, given, made))

    def _kept(
        self, number: int, name: str, given: list[Tensor], made: list[Tensor]
    ) -> list[Coordinates]:
        """By a call that keeps the order of elements, or spreads them by broadcasting."""
        shape = made[0].shape
        same = [self.of(one, number) for one in given if one.shape == shape]
        first = self.of(given[0], number)
        if same and same[0] is not None:
            return [same[0]]
        wider = len(shape) - given[0].dim()
        if first is None or len(made) != 1 or wider < 0:
            return []
        pairs = zip((1,) * wider + tuple(given[0].shape), shape, strict=True)
        arithmetic = name.strip("_").lstrip("ri") in _ARITHMETIC
        broadcast = arithmetic and all(a in (1, b) for a, b in pairs)
        return first.moved(lambda where: where.expand(shape)) if broadcast else []

    def _moved(
        self, number: int, func: Function, args: Args, kwargs: Kwargs, first: Coordinates
    ) -> list[Coordinates]:
        """By a call that moves elements about: the same call with their coordinates."""
        name = _name(func)
        if name in ("view", "view_as"):
            # Coordinates lie in memory in another order than the tensor that they belong to.
            func = Tensor.reshape if name == "view" else Tensor.reshape_as

        def change(axis: int) -> list[Tensor]:
            def instead(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                own = self.of(value, number)
                if own is not None:
                    return own.where[axis]
                if name not in _JOINS:
                    # An index stays as it is.
                    return value
                return value.new_full((), -1.0, dtype=torch.float32).expand(value.shape)

            changed, named = compat.tree_map(instead, (args, dict(kwargs)))
            if name == "pad":
                changed, named = _padded(changed, named)
            return tree_tensors(func(*changed, **named))

        parts = [change(axis) for axis in range(len(first.where))]
        return [replace(first, where=one) for one in zip(*parts, strict=True)]

    def _infer_axes(self, number: int, func: Function, args: Args, kwargs: Kwargs) -> None:
        """Whether a call shows what the axes of an input are, before it runs."""
        if self.through or number in self.letters or number in self.closed:
            return
        name, values, shape = _name(func), [*args, *kwargs.values()], self.shapes[number]
        taken = kwargs.get("input", kwargs.get("query", values[0] if values else None))
        own = self.of(taken, number)
        if own is None:
            return
        channel: int | bool | None
        kernel = _CONVOLUTIONS.get(name, 0)
        if kernel and taken.dim() == kernel + 2:
            channel = _by_convolution(own, taken, values, kwargs, shape)
        elif name in _RECURRENT or name == compat.PACKED_SEQUENCE:
            packed = isinstance(values[1], Tensor) and not values[1].is_floating_point()
            if packed and name in _RECURRENT:
                return
            channel = _channel_of(own, {-1}, {0, 1}, shape, taken)
        elif name in _CELLS and taken.dim() == 2:
            channel = _channel_of(own, {-1}, {0}, shape, taken)
        elif name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            channel = _by_attention(own, 0 if name.startswith("multi") else -2, shape)
        elif name == compat.ENCODER_LAYER and taken.dim() == 3:
            channel = _by_attention(own, 1, shape)
        elif name in _PRODUCTS and len(values) > 1 and (other := self.of(values[1], number)):
            queries, keys = own.along(-2), other.along(-1)
            if not (queries and queries == keys and len(own.where) > 2 and own.mixed):
                return
            channel = _by_attention(own, -2, shape)
        else:
            return
        letters = None if channel is False else _letters_of(len(shape), channel, kernel)
        if letters is None:
            self.closed.add(number)
        else:
            self.letters[number] = letters
        if len(self.letters) + len(self.closed) == len(self.shapes):
            raise _Finished


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        # A property, as of `x.T`.
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return str(name)


def _nearest(where: Tensor, size: torch.Size) -> Tensor:
    return functional.interpolate(where, size=tuple(size), mode="nearest")


def _padded(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a padding, with -1 in the place of a constant."""
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    kwargs.pop("value", None)
    if mode == "constant":
        return args[:2], {**kwargs, "mode": "constant", "value": -1.0}
    return args[:3], kwargs


# Which axis of an input holds its channels: None where it has none, False where a layer that should
# show it does not.


def _channel_of(
    own: Coordinates, features: set[int], slid: set[int], shape: tuple[int, ...], taken: Tensor
) -> int | bool | None:
    """By the axes of a tensor that are `features`, and the axes `slid` over."""
    over = frozenset().union(*(own.along(axis) for axis in slid))
    axes = (own.mixed | frozenset().union(*(own.along(axis) for axis in features))) - over - {0}
    if axes:
        return next(iter(axes)) if len(axes) == 1 else False
    ones = [axis for axis, size in enumerate(shape) if axis and size == 1]
    if len(ones) > 1:
        # An axis of one is a channel's where the layer has its own.
        named = {axis % taken.dim() for axis in features}
        ones = [axis for axis in ones if taken.dim() == len(shape) and axis in named] or ones
    return ones[0] if ones else None


def _by_convolution(
    own: Coordinates, taken: Tensor, values: Any, kwargs: Kwargs, shape: tuple[int, ...]
) -> int | bool | None:
    axes = set(range(2, taken.dim()))
    channel = _channel_of(own, {1}, axes, shape, taken)
    if channel is not None:
        return channel
    # The kernel lies on all of an axis: it does not slide there, and mixes it.
    weight = kwargs.get("weight", values[1] if len(values) > 1 else None)
    if isinstance(weight, Tensor) and weight.dim() == taken.dim():
        whole = {axis for axis in axes if weight.shape[axis] == taken.shape[axis] > 1}
        if whole and whole != axes:
            return _channel_of(own, whole, axes - whole, shape, taken)
    # Slices along an axis that was folded into the batch are separate: channels, or steps?
    return False if own.along(0) - {0} else None


def _by_attention(own: Coordinates, tokens: int, shape: tuple[int, ...]) -> int | bool:
    """By attention over tokens: the axis that is mixed into their vectors, if it comes last."""
    over = own.along(tokens)
    axes = (own.mixed | own.along(-1)) - over - {0}
    if len(axes) != 1 or not over - {0}:
        return False
    axis = next(iter(axes))
    return axis if len(shape) > 3 or axis == len(shape) - 1 else False


def _letters_of(rank: int, channel: int | None, kernel: int) -> str | None:
    """A layout by its channel axis; names of the places by their number and the kernel's."""
    pairs, triples = "DT" if kernel == 1 else "HW", "DHW" if kernel == 3 else "THW"
    names = dict(enumerate(("T", pairs, triples, "TDHW"), 1))
    if (count := rank - 1 - (channel is not None)) not in names:
        return None
    letters = list(names[count])
    if channel is not None:
        # Channels are C of convolutions and of pictures, and F of steps.
        letters.insert(channel - 1, "C" if kernel or rank > 3 else "F")
    return "B" + "".join(letters)
