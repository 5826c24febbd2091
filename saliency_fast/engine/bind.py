"""Bind: a call's inputs, targets and further arguments, validated and immutable."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saliency_fast._types import Inputs
from saliency_fast.engine.baselines import MISSING
from saliency_fast.engine.cudagraph import launching
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.graph.fingerprint import fingerprint
from saliency_fast.graph.passes.half import HALVES
from saliency_fast.graph.program import is_channels_last
from saliency_fast.graph.receptive_field import Box
from saliency_fast.model.executors import EagerExecutor, Executor, for_recurrent_layers
from saliency_fast.model.follow import Inside, cached_layouts, infer_layouts, locate_layers
from saliency_fast.model.function import PointFunction
from saliency_fast.model.layers import Layer, channel_axis, module_at
from saliency_fast.model.layout import Axes, LayoutLike, Layouts
from saliency_fast.model.preserve import preserve_model_state
from saliency_fast.model.targets import Target, Targets, read_of, read_targets

Model = Callable[..., Any]
Region = Tensor | Sequence[slice | tuple[int, int]] | None
SERVICE = "saliency_fast"
"""The thread of the service: random states are the whole process's, and not its to put back."""


@dataclass(frozen=True, eq=False)
class Belonging:
    """A further argument of the model, with whose it is. tensor: the argument."""

    tensor: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor):
            raise InputTypeError(
                f"{type(self).__name__} marks a tensor: got {type(self.tensor).__name__}; other "
                "arguments always belong to all examples"
            )


class Shared(Belonging):
    """Marks a further argument of the model that belongs to all examples of a call.

    The model gets it whole, whatever rows it is run on, even where its length happens to be that of
    the batch: prompts that pictures are compared with, an adjacency matrix, a table of prices.

    Example:
        >>> import torch, saliency_fast as sf
        >>> prompts = torch.eye(3)
        >>> sf.explain(lambda x, p: x @ p.T, torch.ones(3, 3), target=1, method="gradient",
        ...            forward_args=(sf.Shared(prompts),)).values[0].tolist()
        [0.0, 1.0, 0.0]
    """


class PerExample(Belonging):
    """Marks a further argument [B, *] of the model whose rows belong to the examples of a call, one
    to each, such as attention masks: points of an example come with its row.

    Example:
        >>> import torch, saliency_fast as sf
        >>> weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> sf.explain(lambda x, w: x * w, torch.ones(2, 2), target=1, method="gradient",
        ...            forward_args=(sf.PerExample(weights),)).values.tolist()
        [[0.0, 2.0], [0.0, 4.0]]
    """


@dataclass(frozen=True)
class Call:
    """What one call explains.

    Args:
        inputs: [B, *] each, contiguous and detached. Half types are float32 here: points are
            written, and gradients added up, in float32 whatever the model's type.
        dtypes: Types that the model takes.
        is_tuple: Whether the user passed a tuple.
        targets: The scalars that are explained.
        args, kwargs: Further arguments of the model.
        finite: Whether no input holds NaN or infinity.
        unused: Numbers of inputs that no score depends on.
        features: int64 [B | 1, *] per input, numbers of its segments.
        layers: Where the method looks inside of the model, with `layer_input` at their inputs.
        shared_arguments: Further arguments, by number or name, that belong to no example though
            they have the batch's length.
        marked: Further arguments of which the caller said whether they belong to the examples.
        channels_last: Which inputs lie with their channels innermost in memory.
        layout: What the caller said of the layout of what is explained.
        layouts: Those of the inputs.
    """

    inputs: Inputs
    dtypes: tuple[torch.dtype, ...]
    is_tuple: bool
    targets: Targets
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    finite: bool = True
    unused: frozenset[int] = frozenset()
    features: Any = ()
    layers: tuple[Layer, ...] = ()
    layer_input: bool = False
    shared_arguments: frozenset[int | str] = frozenset()
    marked: frozenset[int | str] = frozenset()
    channels_last: tuple[bool, ...] = ()
    layout: LayoutLike = None
    layouts: Layouts = field(default_factory=lambda: Layouts(()))

    def further(self) -> list[tuple[int | str, Any]]:
        """The further arguments by their number or name."""
        return [*enumerate(self.args), *self.kwargs.items()]

    def function(
        self, executor: Executor, kind: tuple[object, ...] = (), **further: Any
    ) -> PointFunction:
        """The model by an executor, with the arguments and targets of the call. further: fields."""
        return PointFunction(
            *(for_recurrent_layers(executor, self.device), self.targets, self.args, self.kwargs),
            dtypes=self.dtypes if self.halves else None,
            kind=kind,
            shared_arguments=self.shared_arguments,
            unused=self.unused,
            channels_last=self.channels_last,
            **further,
        )

    @property
    def settings(self) -> tuple[object, ...]:
        """What tells the further arguments apart that are no tensors."""
        further = {key: None if isinstance(one, Tensor) else one for key, one in self.further()}
        return fingerprint(further) if further else ()

    @property
    def reading(self) -> tuple[object, ...]:
        """What tells scores apart beside shapes: the function that reads them, which arguments go
        whole, and the arguments that are no tensors.
        """
        function = self.targets.function
        read = () if function is None else fingerprint(function)
        return read, self.shared_arguments, self.settings

    @property
    def shapes(self) -> tuple[object, ...]:
        """Equal for calls whose tensors have the same shapes, but for the number of examples."""
        further = [one for _, one in self.further() if isinstance(one, Tensor)]
        tensors = (*self.inputs, *further)
        return self.dtypes, self.channels_last, *((x.shape[1:], x.dtype, x.device) for x in tensors)

    @property
    def batch(self) -> int:
        return len(self.inputs[0])

    @property
    def halves(self) -> bool:
        """Whether the model takes half types."""
        return any(one in HALVES for one in self.dtypes)

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device


def bind(
    inputs: Tensor | tuple[Tensor, ...],
    target: Target,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    *,
    integers: bool = False,
    missing: bool = False,
) -> Call:
    """Validates a call; raises InputError or InputTypeError with what, got, expected and cure.

    integers: whether inputs may be integers, where no gradient is taken at them. missing: whether
    they may hold NaN or infinity.
    """
    parts, dtypes = read_inputs(inputs, integers=integers, missing=missing)
    # Else targets and arguments would be inference tensors, which no gradient may pass, where the
    # caller is in inference mode.
    with torch.inference_mode(False):
        targets = read_targets(target, len(parts[0])).to(parts[0].device)
        given = dict(enumerate(args if isinstance(args, tuple) else (args,))) | dict(kwargs or {})
        plain = {key: _plain(one, len(parts[0])) for key, one in given.items()}
    several = isinstance(inputs, (tuple, list))
    return Call(
        *(parts, dtypes, several, targets),
        tuple(one for key, one in plain.items() if isinstance(key, int)),
        {key: one for key, one in plain.items() if isinstance(key, str)},
        finite=not missing or all(map(is_finite, parts)),
        shared_arguments=frozenset(key for key, one in given.items() if isinstance(one, Shared)),
        marked=frozenset(key for key, one in given.items() if isinstance(one, Belonging)),
        channels_last=tuple(map(is_channels_last, inputs if several else (inputs,))),
    )


def _plain(value: Any, batch: int) -> Any:
    """A further argument without its mark, and no inference tensor."""
    if isinstance(value, Belonging):
        tensor = value.tensor
        if isinstance(value, PerExample) and (tensor.dim() == 0 or len(tensor) != batch):
            raise InputError(
                f"PerExample needs a row for each of the {batch} examples: got "
                f"{list(tensor.shape)}; use Shared for what belongs to all of them"
            )
        value = tensor
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def read_inputs(
    inputs: Tensor | tuple[Tensor, ...], *, integers: bool = False, missing: bool = False
) -> tuple[Inputs, tuple[torch.dtype, ...]]:
    """The inputs, float32 where they were half, and the types that they had; see `bind`."""
    parts = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not parts:
        raise InputError("inputs is an empty tuple: pass at least one tensor")
    for number, x in enumerate(parts):
        name = f"input {number}" if len(parts) > 1 else "the input"
        _check(x, name, integers)
        if x.device != parts[0].device:
            raise InputError(
                f"inputs are on different devices: input {number} on {x.device}, input 0 on "
                f"{parts[0].device}; move them with .to()"
            )
        if len(x) != len(parts[0]):
            raise InputError(
                f"inputs have different batch sizes: input {number} has {len(x)}, input 0 "
                f"{len(parts[0])}"
            )
    if parts[0].is_meta:
        raise InputError(
            f"inputs have no numbers: got {list(parts[0].shape)} on the meta device; make them on "
            "the model's"
        )
    for number, x in enumerate(parts):
        if not missing and not is_finite(x):
            name = f"input {number}" if len(parts) > 1 else "the input"
            raise InputError(
                f"{name} holds NaN or infinity: expected finite numbers; look at "
                f"torch.isfinite(x).logical_not().nonzero(); {MISSING}"
            )
    wide = [x.float() if x.dtype in HALVES else x for x in parts]
    return tuple(x.detach().contiguous() for x in wide), tuple(x.dtype for x in parts)


def _check(x: Any, name: str, integers: bool) -> None:
    if not isinstance(x, Tensor):
        raise InputTypeError(
            f"{name} must be a tensor: got {type(x).__name__}; use torch.as_tensor"
        )
    whole = integers and not x.is_floating_point() and not x.is_complex()
    if x.is_complex():
        raise InputTypeError(
            f"{name} must be real: got {x.dtype}; pass torch.view_as_real(x), and "
            "lambda x: model(torch.view_as_complex(x)) as the model"
        )
    if x.dtype not in (torch.float32, torch.float64, *HALVES) and not whole:
        raise InputTypeError(
            f"{name} must be float32, float64, float16 or bfloat16: got {x.dtype}; use .float(), "
            "or explain the embeddings of token ids and the like: at='embeddings'"
        )
    # One number per example is no input to take gradients at, but token ids may be.
    if x.dim() < (1 if whole else 2):
        raise InputError(
            f"{name} must have a batch axis and at least one more: got {list(x.shape)}; use "
            "x[None] for one example"
        )
    if x.numel() == 0:
        raise InputError(f"{name} is empty: got {list(x.shape)}, expected at least one element")


def is_finite(x: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    if not x.is_floating_point():
        return True
    # The sum of finite numbers may overflow, so only a suspicious one is looked at closely.
    return math.isfinite(float(x.detach().sum())) or bool(torch.isfinite(x.detach()).all())


_CAUSAL: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def with_next_token(model: Model, call: Call) -> Call:
    """The call; where its target is "predicted" and the model a causal language model, with the
    token that follows each text's last one as its target.
    """
    targets, ids = call.targets, call.inputs[0]
    if not targets.predicted or targets.position is not None:
        return call
    if not isinstance(model, nn.Module) or ids.is_floating_point() or ids.dim() != 2:
        return call
    causal = _CAUSAL.setdefault(model, {})
    key = (ids.shape[1], *sorted(call.kwargs))
    if key not in causal:
        causal[key] = _is_causal(model, call)
    if not causal[key]:
        return call
    last = torch.full((call.batch,), -1, device=ids.device)
    return replace(call, targets=replace(targets, position=last))


def _is_causal(model: nn.Module, call: Call) -> bool:
    """Whether outputs are [B, T, V] with V tokens, as tables of embeddings have, and no output
    depends on a later token. Where there is but one token, that is taken for granted.
    """
    ids = call.inputs[0]
    real = call.targets.padding.real
    text = 0 if real is None else int(real.sum(1).argmax())
    row = torch.tensor([text], device=ids.device)
    output = _output(model, call, ids[row], row)
    if output is None or output.dim() != 3 or output.shape[:2] != (1, ids.shape[1]):
        return False
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding)]
    if not any(one.num_embeddings == output.shape[2] for one in tables):
        return False
    last = ids.shape[1] - 1 if real is None else int(real[text].nonzero()[-1])
    changed, token = ids[row].clone(), ids[text, last]
    if changed[0, 0] != token:
        changed[0, last] = changed[0, 0]
    else:
        changed[0, last] = token - 1 if int(token) > 0 else token + 1
    again = _output(model, call, changed, row)
    assert again is not None
    before, after = output[0, :last].double(), again[0, :last].double()
    size = float(before.abs().max()) if before.numel() else 0.0
    return torch.allclose(before, after, rtol=0.0, atol=1e-5 * size, equal_nan=True)


@torch.no_grad()
def _output(model: nn.Module, call: Call, ids: Tensor, row: Tensor) -> Tensor | None:
    function = call.function(EagerExecutor(model))
    args, kwargs = function.rows(row)
    rest: list[Any] = [x[row] for x in call.inputs[1:]]
    return read_of(function.executor([ids.clone(), *rest], args, kwargs))


def layouts_of(model: Model, call: Call, given: LayoutLike) -> Layouts:
    """The layouts of a call's inputs; the model is looked at when they are asked for."""
    shapes, device = [tuple(x.shape) for x in call.inputs], call.device
    # Not the inputs themselves, which must not be held: the axes of any numbers are the same.
    ones = tuple(x.new_ones(()).expand(1, *x.shape[1:]) for x in call.inputs)
    about = replace(call, inputs=ones, features=(), layouts=Layouts(()))

    def ready(count: int) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], object]]:
        function = about.function(EagerExecutor(model))
        rows = [
            one.repeat(count, *(1,) * (one.dim() - 1)) for one in function.as_model_inputs(ones)
        ]
        args, kwargs = function.rows(torch.zeros(count, dtype=torch.int64, device=device))
        return rows, lambda inputs: function.executor(inputs, args, kwargs)

    @contextmanager
    def kept() -> Iterator[None]:
        draws = threading.current_thread().name != SERVICE
        with launching(device), preserve_model_state(model, device, draws=draws):
            yield

    def find() -> Sequence[str | None]:
        with kept():
            return infer_layouts(model, *ready(1))

    def look(layers: Sequence[Layer], of_input: bool) -> Inside:
        # Two rows: where a layer folds steps into the batch, their order tells.
        with kept():
            return locate_layers(*ready(2), layers, of_input)

    layouts = Layouts(shapes, given, find, look)
    cached = cached_layouts(model, shapes, call.dtypes)
    return layouts if cached is None else layouts.with_letters(cached)


def layouts_at(
    downstream: Model, call: Call, layers: Sequence[Layer], counts: Sequence[int], of_input: bool
) -> Layouts:
    """The layouts of what layers give, which are the inputs of a call that was moved to them: as a
    layer's own kind says, else the downstream layers.
    """
    layouts = layouts_of(downstream, call, call.layout)
    owners = [
        module_at(layer) for layer, count in zip(layers, counts, strict=True) for _ in range(count)
    ]
    letters = [
        settled or (None if of_input else _given_by(layer, shape))
        for layer, shape, settled in zip(
            owners, layouts.shapes, layouts.cached_letters, strict=True
        )
    ]
    return layouts.with_inferred(letters)


def _given_by(layer: nn.Module, shape: tuple[int, ...]) -> str | None:
    """The layout of a layer's output, by the number of features that the layer declares."""
    places = {3: "T", 4: "HW", 5: "DHW"}.get(len(shape))
    axis = channel_axis(layer, shape, 0)
    if places is None or axis == 0:
        return None
    return f"BC{places}" if axis == 1 else f"B{places}{'F' if len(shape) == 3 else 'C'}"


@dataclass(frozen=True)
class Part:
    """A box of an input's spatial axes, and the mask within it that is asked for, if it is not all.

    box: (start, stop) per axis; mask: bool like the whole of those axes. axes: the input's layout.
    """

    box: Box
    axes: Axes
    mask: Tensor | None = field(default=None, compare=False)

    def kept(self, values: Tensor) -> Tensor:
        """`values` [B, K, *], like the input behind K, with zeros outside of the part."""
        return self.axes.back(self._kept(self.axes.standard(values, 2)), 2)

    @property
    def first(self) -> bool:
        """Whether the input has its channels before its places, as convolutions take them."""
        return self.axes.channel == 1

    def _kept(self, values: Tensor) -> Tensor:
        if self.mask is not None:
            return values * self.mask
        found = torch.zeros_like(values)
        target, source = found, values
        for axis, (start, stop) in enumerate(self.box, start=values.dim() - len(self.box)):
            target = target.narrow(axis, start, stop - start)
            source = source.narrow(axis, start, stop - start)
        target.copy_(source)
        return found


def read_region(region: Region, call: Call) -> Part | None:
    """The part of a call's input; raises InputError or InputTypeError with the cure."""
    if region is None:
        return None
    shape = call.inputs[0].shape
    if len(call.inputs) != 1 or (len(shape) < 3 and call.layouts.cached_letters != ("BT",)):
        raise InputError(
            "region needs one input [B, C, *spatial]: got "
            f"{[list(x.shape) for x in call.inputs]}; mask the values of other inputs yourself"
        )
    axes = call.layouts.need(0, "region=")
    size = axes.size(shape)
    if isinstance(region, Tensor):
        return _masked(region, size, axes, call.device)
    if not isinstance(region, (tuple, list)):
        raise InputTypeError(
            f"region must be a bool mask or one slice per spatial axis: got {type(region).__name__}"
        )
    if len(region) != len(size):
        raise InputError(
            f"region must have one slice for each spatial axis: got {len(region)}, the input has "
            f"{list(size)}"
        )
    box = tuple(_span(one, n) for one, n in zip(region, size, strict=True))
    if any(start >= stop for start, stop in box):
        raise InputError(f"region is empty, or outside of {list(size)}: got {list(box)}")
    return Part(box, axes)


def _masked(mask: Tensor, size: tuple[int, ...], axes: Axes, device: torch.device) -> Part:
    if mask.dtype != torch.bool or mask.shape != size:
        raise InputError(
            f"region: a mask must be bool {list(size)}: got {mask.dtype} {list(mask.shape)}"
        )
    places = mask.nonzero()
    if not len(places):
        raise InputError("region is empty: got a mask without a single True")
    low, high = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
    return Part(tuple(zip(low, high, strict=True)), axes, mask.to(device))


def _span(given: slice | tuple[int, int], size: int) -> tuple[int, int]:
    if isinstance(given, slice):
        start, stop, step = given.indices(size)
        if step == 1:
            return start, stop
    elif isinstance(given, (tuple, list)) and len(given) == 2:
        start, stop = given
        if 0 <= start <= stop <= size:
            return int(start), int(stop)
    raise InputError(
        f"region: each axis needs a slice with step 1 or (start, stop) within its {size} places: "
        f"got {given!r}"
    )
