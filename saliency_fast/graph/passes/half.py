"""Precision: the arithmetic of a model's convolutions and matrix products.

Products take half types and add up in float32; what lies between keeps the type that it gets, and
what half types cannot carry is done in float32. The model's own weights stay as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.graph.intercept import lean_call
from saliency_fast.graph.passes.fold_norm import CONVOLUTIONS, folded_convolution, folded_weights
from saliency_fast.graph.passes.fold_norm import partial_convolution as partial
from saliency_fast.graph.passes.fuse_relu import rectified
from saliency_fast.graph.patterns import only_maker
from saliency_fast.graph.program import Program, Step

Tensors = tuple[Tensor, ...]
HALVES = (torch.float16, torch.bfloat16)
_nn = torch._C._nn
_PRODUCTS = frozenset(
    (
        *CONVOLUTIONS,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        _nn.linear,
        _nn.scaled_dot_product_attention,
        torch.einsum,
        partial,
        *(getattr(torch, name) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm")),
        *(getattr(Tensor, name) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm")),
        Tensor.__matmul__,
        Tensor.__rmatmul__,
    )
)
_WIDE = frozenset(
    """
    exp exp2 expm1 log log2 log10 log1p pow __pow__ __rpow__ rsqrt reciprocal softplus cosh sinh tan
    acos asin cumsum cumprod prod sum norm vector_norm linalg_vector_norm linalg_norm renorm dist
    cdist logsumexp log_softmax cosine_similarity var std softmin
    """.split()
)
"""Calls, by name, whose results half types cannot hold, or not to the digits that count."""
_NORMS = frozenset(
    (torch.layer_norm, torch.group_norm, torch.instance_norm, torch.rms_norm, torch.prelu)
)
"""Calls whose parameters must have the type of their input."""


@dataclass(frozen=True)
class Precision:
    """half: the type of products, None for float32. tf32: products of float32 numbers rounded to
    10 bits, on GPUs. scaled: cotangents are multiplied with a power of two, as exponents are few.
    """

    name: str
    half: torch.dtype | None = None
    tf32: bool = False
    scaled: bool = False

    @property
    def exact(self) -> bool:
        return self.half is None and not self.tf32


FLOAT32 = Precision("float32")
AUTO = "auto"
PRECISIONS = {
    one.name: one
    for one in (
        FLOAT32,
        Precision("tf32", tf32=True),
        Precision("float16", torch.float16, scaled=True),
        Precision("bfloat16", torch.bfloat16),
    )
}
OF_DEVICE = {"cpu": ("bfloat16", "float32"), "cuda": ("float16", "bfloat16", "tf32", "float32")}
"""What a device offers, the fastest first, as a rule."""


def read_precision(name: str, device: torch.device) -> Precision:
    """The precision of that name; raises InputError where the device has none such."""
    offered = OF_DEVICE.get(device.type, ("float32",))
    if name not in offered:
        raise InputError(
            f"precision={name!r} is not offered on {device.type}: expected one of "
            f"{', '.join(offered)}, or 'auto'"
        )
    return PRECISIONS[name]


@dataclass(frozen=True)
class Cast:
    """A call that takes its floating-point numbers in the type `to`, where they are of `of`."""

    func: Callable[..., Any]
    of: tuple[torch.dtype, ...]
    to: torch.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {name: cast(value, self.of, self.to) for name, value in kwargs.items()}
        return lean_call(self.func, cast(args, self.of, self.to), named)

    @property
    def __name__(self) -> str:
        return str(getattr(self.func, "__name__", self.func))


@dataclass(frozen=True)
class LikeInput:
    """A call that takes its parameters in the type of its input, where that is a half type."""

    func: Callable[..., Any]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dtype in HALVES:
            args = cast(args, (torch.float32,), x.dtype)
            kwargs = {n: cast(value, (torch.float32,), x.dtype) for n, value in kwargs.items()}
        return lean_call(self.func, (x, *args), kwargs)

    @property
    def __name__(self) -> str:
        return str(getattr(self.func, "__name__", self.func))


def cast(value: Any, of: tuple[torch.dtype, ...], to: torch.dtype) -> Any:
    """`value` with its tensors of the types `of` in the type `to`."""
    if isinstance(value, Tensor):
        return value.to(to) if value.dtype in of else value
    if type(value) in (tuple, list):
        return type(value)([cast(one, of, to) for one in value])
    return value


@dataclass(frozen=True)
class Lowered:
    """A program with its products in a half type, and copies of its weights as they were then.

    copies: for each what it is a copy of, and the copy.
    """

    program: Program
    copies: tuple[tuple[Callable[[], Tensors], Tensors], ...]

    def refresh(self) -> None:
        """Copies the weights again, to the same places."""
        with torch.no_grad():
            for made, copies in self.copies:
                for copy, one in zip(copies, made(), strict=True):
                    copy.copy_(one)


def lowered(program: Program, half: torch.dtype) -> Lowered:
    """The program with its products in a half type.

    Batch normalisations are folded into the convolutions before them, in float32.
    """
    norms, copies = dict(_norms(program)), _Copies(half)
    steps = []
    for place, step in enumerate(program.steps):
        if not step.varying:
            steps.append(step)
            continue
        if place in norms.values():
            x, _, *others = step.args
            step = replace(step, args=(x, None, *others))
        if step.func is folded_convolution:
            x, weight, bias, func, options, norm = step.args
            step = replace(step, func=func, args=(x, *copies.folded(weight, bias, norm), *options))
        elif place in norms:
            x, weight, *others = step.args
            bias, norm = others[0] if others else None, program.steps[norms[place]].args[1]
            args = (x, *copies.folded(weight, bias, norm), *others[1:])
            step = replace(step, args=args)
        steps.append(_cast(step, half, copies.of))
    return Lowered(replace(program, steps=tuple(steps)), tuple(copies.made))


class _Copies:
    """Copies of weights in a half type, one of what several calls share."""

    def __init__(self, half: torch.dtype) -> None:
        self.half, self.made = half, list[tuple[Callable[[], Tensors], Tensors]]()
        # With the originals: the ids of what is gone are used again.
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, value: Any) -> Any:
        """`value` with its float32 tensors in the half type."""
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            if id(value) not in self._known:
                self._known[id(value)] = value, self._copies(lambda: (value.detach(),))[0]
            return self._known[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)([self.of(one) for one in value])
        return value

    def folded(self, *layer: Any) -> Tensors:
        """(weight, bias) of a convolution and the normalisation behind it."""
        return self._copies(lambda: folded_weights(*layer))

    def _copies(self, made: Callable[[], Tensors]) -> Tensors:
        with torch.no_grad():
            copies = tuple(one.to(self.half) for one in made())
        self.made.append((made, copies))
        return copies


def lowered_bytes(program: Program) -> int:
    """What the copies of the weights take."""
    found = {}
    for step in program.steps:
        if step.varying and (step.func in _PRODUCTS or step.func is folded_convolution):
            for one in (*step.args, *step.kwargs.values()):
                if isinstance(one, Tensor) and one.dtype == torch.float32:
                    found[id(one)] = one.nbytes // 2
    return sum(found.values())


def _norms(program: Program) -> Iterator[tuple[int, int]]:
    """(convolution, rectifier): places of convolutions whose normalisation is the rectifier's."""
    for place, step in enumerate(program.steps):
        if step.func is not rectified or step.args[1] is None or step.args[2] == step.args[0]:
            continue
        maker = only_maker(program, step.args[0].number, place)
        if maker is None or program.steps[maker].func not in CONVOLUTIONS:
            continue
        made = program.steps[maker]
        frozen = all(isinstance(one, Tensor) for one in made.args[1:3] if one is not None)
        if frozen and len(made.args) > 1 and not made.kwargs and made.varying and not made.detached:
            yield maker, place


def _cast(step: Step, half: torch.dtype, weights: Callable[[Any], Any]) -> Step:
    """A step with its call in the type that suits it."""
    name, inplace = step.name, bool(step.changed)
    if step.func in _PRODUCTS:
        kwargs = {n: weights(value) for n, value in step.kwargs.items()}
        func = Cast(step.func, (torch.float32,), half)
        return replace(step, func=func, args=weights(step.args), kwargs=kwargs)
    if name in _WIDE and not inplace:
        return replace(step, func=Cast(step.func, HALVES, torch.float32))
    return replace(step, func=LikeInput(step.func)) if step.func in _NORMS else step


_TURN = threading.Condition()
_HELD: list[bool] = []
"""For each launch that is being asked for: whether it wants TF32."""


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """What PyTorch may do to float32 products inside, on a GPU. Its switches hold for all threads,
    so launches that want them otherwise wait.
    """
    if device.type != "cuda":
        yield
        return
    with _TURN:
        _TURN.wait_for(lambda: not _HELD or _HELD[0] == precision.tf32)
        if not _HELD:
            _SWITCHES.set(precision.tf32)
        _HELD.append(precision.tf32)
    try:
        yield
    finally:
        with _TURN:
            _HELD.pop()
            if not _HELD:
                _SWITCHES.restore()
                _TURN.notify_all()


class _Switches:
    """PyTorch's switches for TF32 and for choosing convolutions by their time, and what they were.

    Launches repeat their shapes, so that a choice pays; with `torch.backends.cudnn.deterministic`
    cuDNN chooses among those that give the same bits every time.
    """

    def __init__(self) -> None:
        self._before: tuple[bool, bool, bool] | None = None

    def set(self, allowed: bool) -> None:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        self._before = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark)
        matmul.allow_tf32 = cudnn.allow_tf32 = allowed
        cudnn.benchmark = True

    def restore(self) -> None:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        assert self._before is not None
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = self._before
        self._before = None


_SWITCHES = _Switches()
