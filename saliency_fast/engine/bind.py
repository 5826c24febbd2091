"""Bind: a call's inputs validated and brought into the form that the engine runs on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.baselines import MISSING
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.graph.passes.half import HALVES
from saliency_fast.graph.program import lies_innermost
from saliency_fast.model.layers import Layer
from saliency_fast.model.layout import LayoutLike, Layouts
from saliency_fast.model.targets import Target, Targets, read_targets


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

    >>> import torch, saliency_fast as sf
    >>> prompts = torch.eye(3)
    >>> sf.explain(lambda x, p: x @ p.T, torch.ones(3, 3), target=1,
    ...            forward_args=(sf.Shared(prompts),)).values[0].tolist()
    [0.0, 1.0, 0.0]
    """


class PerExample(Belonging):
    """Marks a further argument [B, *] of the model whose rows belong to the examples of a call, one
    to each, such as attention masks: points of an example come with its row.
    """


@dataclass(frozen=True)
class Call:
    """What one call explains: inputs [B, *] each, contiguous and detached, and its targets.

    dtypes: what the model takes. Inputs in half types are float32 here: points are written, and
    gradients added up, in float32 whatever the model's type. features: int64 [B | 1, *] per input,
    numbers of its segments; layers: where the method looks inside of the model, with `layer_input`
    at what they take. whole: the further arguments, by number or name, that go whole though they
    have the batch's length; told: those of which the caller said whose they are. innermost: which
    inputs the caller lays with their channels innermost in memory. layout: what the caller said of
    what is explained, and layouts: those of the inputs.
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
    whole: frozenset[int | str] = frozenset()
    told: frozenset[int | str] = frozenset()
    innermost: tuple[bool, ...] = ()

    layout: LayoutLike = None
    layouts: Layouts = field(default_factory=lambda: Layouts(()))

    def further(self) -> list[tuple[int | str, Any]]:
        """The further arguments by their number or name."""
        return [*enumerate(self.args), *self.kwargs.items()]

    @property
    def shapes(self) -> tuple[object, ...]:
        """Equal for calls whose tensors have the same shapes, but for the number of examples."""
        further = [one for _, one in self.further() if isinstance(one, Tensor)]
        tensors = (*self.inputs, *further)
        return self.dtypes, self.innermost, *((x.shape[1:], x.dtype, x.device) for x in tensors)

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
    finite = not missing or all(map(is_finite, parts))
    # Else these would be inference tensors, which no gradient may pass, where the caller is in
    # inference mode.
    with torch.inference_mode(False):
        targets = read_targets(target, len(parts[0])).to(parts[0].device)
        marked = dict(enumerate(args if isinstance(args, tuple) else (args,))) | dict(kwargs or {})
        told = {key for key, one in marked.items() if isinstance(one, Belonging)}
        whole = {key for key, one in marked.items() if isinstance(one, Shared)}
        plain = {key: _plain(_unmarked(one, len(parts[0]))) for key, one in marked.items()}
    several = isinstance(inputs, (tuple, list))
    return Call(
        parts,
        dtypes,
        several,
        targets,
        tuple(one for key, one in plain.items() if isinstance(key, int)),
        {key: one for key, one in plain.items() if isinstance(key, str)},
        finite,
        whole=frozenset(whole),
        told=frozenset(told),
        innermost=tuple(map(lies_innermost, inputs if several else (inputs,))),
    )


def _unmarked(value: Any, batch: int) -> Any:
    if not isinstance(value, Belonging):
        return value
    tensor = value.tensor
    if isinstance(value, PerExample) and (tensor.dim() == 0 or len(tensor) != batch):
        raise InputError(
            f"PerExample needs a row for each of the {batch} examples: got {list(tensor.shape)}; "
            "use Shared for what belongs to all of them"
        )
    return tensor


def _plain(value: Any) -> Any:
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
