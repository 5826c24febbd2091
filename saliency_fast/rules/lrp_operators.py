"""Layer-wise relevance propagation (Bach, 2015) by operator: relevance flows as gradients do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saliency_fast._torch_compat import FUSED_RMS_NORM, custom_function
from saliency_fast._types import Args, Function, Kwargs
from saliency_fast.errors import InputError, ModelError
from saliency_fast.graph.autograd.norms import affine_of
from saliency_fast.graph.gradients import differentiable, steps_behind
from saliency_fast.graph.intercept import lean_call
from saliency_fast.graph.outputs import tensors_of
from saliency_fast.model.attention import scaled_products
from saliency_fast.rules.intercept import (
    ELEMENTWISE,
    OperatorRule,
    Rules,
    RulesMode,
    call_name,
    named,
    only_input_varies,
    register,
    split,
    varies,
)
from saliency_fast.rules.lrp import (
    Affine,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Numbers,
    PropagationRule,
    ZBox,
    ZPlus,
    ratio,
    read_rule,
)

LRP: dict[str, OperatorRule] = {}
"""The rules of operators by name."""
lrp_rule = partial(register, LRP)
_EPSILON = Epsilon()

VIEWS = frozenset(
    "view view_as reshape reshape_as _reshape_alias flatten unflatten ravel squeeze unsqueeze "
    "permute transpose t T mT H mH adjoint movedim moveaxis swapaxes swapdims contiguous clone "
    "alias detach to type type_as float double half bfloat16 cpu cuda chunk split split_with_sizes "
    "tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit unbind narrow select diagonal "
    "__getitem__ __setitem__ index_select take take_along_dim gather masked_select masked_fill "
    "where index index_put index_fill index_copy scatter select_scatter slice_scatter copy "
    "fill zero cat concat concatenate stack hstack vstack dstack column_stack expand expand_as "
    "broadcast_to broadcast_tensors repeat tile repeat_interleave flip fliplr flipud roll rot90 "
    "tril triu diag diag_embed pad constant_pad_nd reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d _pad_circular "
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold im2col "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d as_strided_copy real "
    "max min amax amin maximum minimum fmax fmin topk sort msort kthvalue median cummax cummin "
    "requires_grad_ pin_memory as_subclass atleast_1d atleast_2d atleast_3d meshgrid "
    "__len__ __iter__ retain_grad register_hook".split()
)
"""Results are elements of the input, or zeros: their gradients pass relevance on as it is."""


@dataclass(frozen=True)
class Composite(Rules):
    """Which propagation rule is for which kind of layer.

    Args:
        convolution, linear: Rules of layers with weights.
        first: Of layers with weights that get the input before any other.
        layers: (name, rule) pairs for layers by name, or all within one, which win.
        epsilon: Of sums, means, norms and additions.
        norms: Batch normalisation is "merge"d into the layer before it, or has the "epsilon" rule.
        pools: A maximum's relevance goes to the "winner", or by the "epsilon" rule.
        softmax: By its "taylor" expansion (Achtibat, 2024), or "constant" (Ali, 2022).
    """

    convolution: PropagationRule = _EPSILON
    linear: PropagationRule = _EPSILON
    first: PropagationRule | None = None
    layers: tuple[tuple[str, PropagationRule], ...] = ()
    epsilon: float = 1e-6
    norms: str = "merge"
    pools: str = "winner"
    softmax: str = "taylor"
    name: ClassVar[str] = "LRP"
    relevance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Epsilon(self.epsilon)
        for field, valid in (
            ("norms", ("merge", "epsilon")),
            ("pools", ("winner", "epsilon")),
            ("softmax", ("taylor", "constant")),
        ):
            if getattr(self, field) not in valid:
                raise InputError(
                    f"{field} must be one of {', '.join(valid)}: got {getattr(self, field)!r}"
                )

    def mode(self, model: Function | None = None) -> RulesMode:
        # Rules of layers by name, by the identity of the layers' weights.
        rules: dict[int, PropagationRule] = {}
        modules: dict[str, nn.Module] = {}
        if self.layers and isinstance(model, nn.Module):
            modules = dict(model.named_modules())
        for wanted, rule in self.layers:
            own = [m for n, m in modules.items() if n == wanted or n.startswith(f"{wanted}.")]
            if not own:
                near = difflib.get_close_matches(wanted, modules, 3)
                suggested = f"did you mean {', '.join(map(repr, near))}?"
                hint = suggested if near else "see named_modules()"
                raise InputError(f"layers: the model has no layer {wanted!r}; {hint}")
            weights = [w for m in own for w in (*m.parameters(False), *m.buffers(False))]
            if not weights:
                raise InputError(
                    f"layers: {wanted!r} has no weights, and rules by name are for layers with "
                    "weights"
                )
            rules |= dict.fromkeys(map(id, weights), rule)
        return Relevance(self, rules)


class Relevance(RulesMode):
    """Inside its `with`, gradients of what depends on points are relevance. own: the rule of the
    present call's layer by name; weights: whether the call has parameters of the model.
    """

    hidden = RulesMode.hidden | frozenset(
        "Convolution MkldnnConvolution Addmm Mm Bmm Baddbmm Mul Add Sub Rsub Div Neg Pow Exp Gelu "
        "Silu Elu LeakyRelu Hardtanh Sigmoid Tanh Softplus Softmax LogSoftmax Sum Mean "
        "NativeLayerNorm NativeBatchNorm NativeGroupNorm".split()
    )

    def __init__(self, composite: Composite, by_weight: Mapping[int, PropagationRule]) -> None:
        super().__init__("LRP", LRP)
        self.composite, self.by_weight = composite, by_weight
        self.own: PropagationRule | None = None
        self.weights = False

    @property
    def epsilon(self) -> Epsilon:
        return Epsilon(self.composite.epsilon)

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        # The base class makes plain tensors of weights.
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        self.weights = any(isinstance(one, nn.Parameter) for one in given)
        own = (self.by_weight.get(id(one)) for one in given)
        self.own = next((rule for rule in own if rule is not None), None)
        return super().call(func, args, kwargs)

    def keeps(self, name: str) -> bool:
        return name not in ELEMENTWISE

    def weighted(self, name: str, x: Tensor, layer: Affine) -> Tensor:
        """A layer with weights, by the rule of its kind."""
        composite = self.composite
        first = composite.first if composite.first is not None and _is_first(x) else None
        of_kind = composite.convolution if name.startswith("conv") else composite.linear
        return _propagated(x, layer, self.own or first or of_kind, True)

    def linear(self, x: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """A call that is linear in x and has no weights: the epsilon rule."""
        return _propagated(x, Affine(lambda x, *_: apply(x)), self.epsilon)

    def other(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        name, _ = call_name(func)
        result = func(*args, **kwargs)
        if name.removesuffix("_") in VIEWS or name in VIEWS:
            return result
        if any(one.requires_grad for one in tensors_of(result)):
            raise ModelError(
                f"LRP has no rule for {name or func}: relevance cannot go through this call of the "
                "model; use a method by gradients such as integrated gradients, or explain a "
                "layer downstream of it"
            )
        return result

    def check(self, node: Any) -> None:
        super().check(node)
        # Functions with a gradient of their own are not seen by the mode; their Python class.
        kind = custom_function(node)
        if kind is not None and not kind.__module__.startswith("saliency_fast."):
            raise ModelError(
                f"LRP has no rule for {node.name()}: the model has a function with a gradient "
                "of its own; use a method by gradients such as integrated gradients"
            )


@dataclass(frozen=True)
class _LayerBack:
    """Relevance of a layer's input by a propagation rule."""

    layer: Affine
    rule: PropagationRule
    weighted: bool = False

    def __call__(self, relevance: Tensor, x: Tensor) -> Tensor:
        return self.rule(self.layer, x, relevance)


def _is_first(x: Tensor) -> bool:
    """Whether no layer with weights is between the points and x."""
    backs = (getattr(node, "back", None) for node in steps_behind([x]))
    return not any(getattr(back, "weighted", False) for back in backs)


def _propagated(
    x: Tensor, layer: Affine, rule: PropagationRule, weighted: bool = False, y: Tensor | None = None
) -> Tensor:
    """A layer whose relevance goes to its input by a rule; y: its output, where that is known."""

    def run(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return layer.call(x, layer.weight, layer.bias) if y is None else y, (x,)

    result: Tensor = differentiable(x, run, _LayerBack(layer, rule, weighted))
    return result


def _passed(x: Tensor, apply: Callable[[Tensor], Tensor], open: Tensor | None = None) -> Any:
    """apply(x), shaped like x, which gets all relevance, or that of elements where `open`."""

    def back(relevance: Tensor, open: Tensor | None) -> Tensor:
        return relevance if open is None else relevance * open

    return differentiable(x, lambda x: (apply(x), (open,)), back)


# Operators of one tensor.


@lrp_rule(*ELEMENTWISE, "neg negative __neg__ rms_norm", FUSED_RMS_NORM)
def _elementwise(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    varying = only_input_varies(args, kwargs)
    return _passed(*split(func, args, kwargs)) if varying else NotImplemented


@lrp_rule("dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout")
def _dropout(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    x, apply = split(func, args, kwargs)
    with torch.no_grad():
        y = apply(x)
    return _passed(x, lambda _: y, (y != 0) | (x == 0))


@lrp_rule(
    "sum mean cumsum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_linear1d "
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa grid_sampler grid_sampler_2d grid_sampler_3d col2im diff trace "
    "norm vector_norm std"
)
def _homogeneous(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """f(c x) = c f(x), so that x * f'(x) sums to f(x): sums, means, norms."""
    varying = only_input_varies(args, kwargs)
    return mode.linear(*split(func, args, kwargs)) if varying else NotImplemented


@lrp_rule("var")
def _variance(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Homogeneous of degree two: x * f'(x) sums to 2 f(x)."""
    x, apply = split(func, args, kwargs)
    epsilon = mode.epsilon
    layer = Affine(lambda x, *_: apply(x))
    return _propagated(x, layer, lambda layer, x, relevance: epsilon(layer, x, relevance / 2))


@lrp_rule(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    *(f"{kind}max_pool{n}d_with_indices" for kind in ("", "adaptive_") for n in (1, 2, 3)),
)
def _max_pool(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    if mode.composite.pools == "winner":
        return func(*args, **kwargs)
    x, apply = split(func, args, kwargs)
    with torch.no_grad():
        result = apply(x)
    if isinstance(result, Tensor):
        return mode.linear(x, apply)
    return mode.linear(x, lambda x: apply(x)[0]), result[1]


# Normalisations.

_BATCH_NORM = tuple(
    "input weight bias running_mean running_var training momentum eps cudnn_enabled".split()
)


@lrp_rule("batch_norm")
def _batch_norm(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    given = named(_BATCH_NORM, args, kwargs)
    x, weight, bias, eps = (given[name] for name in ("input", "weight", "bias", "eps"))
    mean, variance = given["running_mean"], given["running_var"]
    if given["training"] or mean is None:
        raise ModelError(
            "LRP needs batch normalisation with frozen statistics: got one with the batch's; call "
            "model.eval() and keep track_running_stats"
        )
    scale, shift = affine_of(weight, bias, mean, variance, eps)
    scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    with torch.no_grad():
        y = lean_call(func, args, kwargs)
    before: Any = getattr(x.grad_fn, "back", None)
    # Into a layer with weights of which x is the whole output, with its channels on axis 1.
    merges = isinstance(before, _LayerBack) and before.weighted and before.layer.outputs is not None
    merges = merges and (before.layer.channels == 1 or x.dim() == 2)
    if mode.composite.norms == "merge" and mode.own is None and merges:
        (first,) = x.grad_fn.saved_tensors
        return _propagated(first, before.layer.scaled(scale, shift), before.rule, True, y)

    def normalised(x: Tensor, weight: Any, bias: Any) -> Tensor:
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)

    layer = Affine(normalised, torch.ones_like(mean) if weight is None else weight, bias)
    return _propagated(x, layer, mode.own or mode.epsilon, mode.own is not None, y)


@lrp_rule("instance_norm")
def _instance_norm(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    given = named(_BATCH_NORM, args, kwargs)
    if not given.pop("use_input_stats", given["training"]):
        return _batch_norm(mode, torch.batch_norm, (), given | {"training": False})
    return _standardised(mode, partial(func, *args, **kwargs), given, given["input"].flatten(2), 1)


@lrp_rule("layer_norm group_norm")
def _of_groups(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Their second argument is the shape of the last axes, or the number of groups of channels."""
    given = named(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    x = given["input"]
    groups: Any = given.get("num_groups", given.get("normalized_shape"))
    of_channels = isinstance(groups, int)
    lead = (len(x), groups) if of_channels else x.shape[: x.dim() - len(groups)]
    apply = partial(func, *args, **kwargs)
    return _standardised(mode, apply, given, x.reshape(*lead, -1), 1 if of_channels else None)


def _standardised(
    mode: Relevance, apply: Function, given: Kwargs, groups: Tensor, channels: int | None
) -> Tensor:
    """The epsilon rule (Achtibat, 2024) on the last axis of `groups`, its deviation constant."""
    x, shape = given["input"], groups.shape
    weight, bias = given.get("weight"), given.get("bias")
    with torch.no_grad():
        y = apply()
        variance = groups.var(-1, unbiased=False, keepdim=True)
        rate = torch.rsqrt(variance + given.get("eps", 1e-5))
    if channels is not None:
        wide = (-1, *(1,) * (x.dim() - 2))
        weight, bias = (one if one is None else one.view(wide) for one in (weight, bias))

    def affine(x: Tensor, *_: Any) -> Tensor:
        parts = x.reshape(shape)
        z = ((parts - parts.mean(-1, keepdim=True)) * rate).reshape(x.shape)
        z = z if weight is None else z * weight
        return z if bias is None else z + bias

    return _propagated(x, Affine(affine), mode.epsilon, y=y)


# Layers with weights.

_CONVOLUTION = tuple("input weight bias stride padding dilation groups".split())
_TRANSPOSED = tuple("input weight bias stride padding output_padding groups dilation".split())


@lrp_rule("linear conv1d conv2d conv3d", names=_CONVOLUTION, outputs=0)
@lrp_rule("conv_transpose1d conv_transpose2d conv_transpose3d", names=_TRANSPOSED, outputs=1)
def _layer(
    mode: Relevance, func: Function, args: Args, kwargs: Kwargs, names: Args, outputs: int
) -> Any:
    given = named(names, args, kwargs)
    x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    if varies(weight) or varies(bias):
        return NotImplemented

    def apply(x: Tensor, weight: Any, bias: Any) -> Tensor:
        result: Tensor = lean_call(func, (x, weight, bias), given)
        return result

    # Weights of grouped transposed convolutions number the outputs of one group alone.
    merges = outputs == 0 or given.get("groups", 1) == 1
    layer = Affine(apply, weight, bias, x.dim() - weight.dim() + 1, outputs if merges else None)
    return mode.weighted(func.__name__, x, layer)


def _product(mode: Relevance, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X @ weight + bias with a parameter of the model."""

    def call(x: Tensor, weight: Any, bias: Any) -> Tensor:
        z = torch.matmul(x, weight)
        return z if bias is None else z + bias

    outputs = 1 if weight.dim() == 2 else None
    return mode.weighted("linear", x, Affine(call, weight, bias, x.dim() - 1, outputs))


# Operators of two tensors.


def _two(args: Args, kwargs: Kwargs, swapped: bool) -> tuple[Any, Any]:
    further = [kwargs[name] for name in ("input", "other", "mat2", "vec2") if name in kwargs]
    first, second = (*args, *further)[:2]
    return (second, first) if swapped else (first, second)


@lrp_rule("add __add__ __radd__")
@lrp_rule("sub subtract __sub__", sign=-1)
@lrp_rule("rsub __rsub__", sign=-1, swapped=True)
def _add(
    mode: Relevance, func: Any, args: Args, kwargs: Kwargs, sign: int = 1, swapped: bool = False
) -> Any:
    """Relevance in proportion to the summands (Bach, 2015), but for changes of units."""
    a, b = _two(args, kwargs, swapped)
    factor = sign * kwargs.get("alpha", 1)
    varying = a if varies(a) else b
    if not (varies(a) and varies(b)) and _is_first(varying):
        with torch.no_grad():
            y = torch.add(a, b, alpha=factor) if isinstance(a, Tensor) else a + factor * b
        return _passed(varying.expand(y.shape), lambda _: y)
    a, b = (
        one if isinstance(one, Tensor) else torch.as_tensor(one, device=varying.device)
        for one in (a, b)
    )
    needed, epsilon = (varies(a), varies(b)), mode.composite.epsilon

    def back(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
        rate = ratio(relevance, torch.add(a, b, alpha=factor), epsilon)
        terms = zip(needed, (a, b * factor), strict=True)
        return tuple((term * rate).sum_to_size(term.shape) if own else None for own, term in terms)

    return differentiable(a, lambda a, b: (torch.add(a, b, alpha=factor), (a, b)), back, b)


@lrp_rule("mul multiply __mul__ __rmul__")
def _multiply(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Each of two factors that depend on the points gets half (Achtibat, 2024)."""
    a, b = _two(args, kwargs, False)
    x, factor = (a, b) if varies(a) else (b, a)
    with torch.no_grad():
        y = x * factor
    if not varies(factor):
        # Elements that are multiplied by zero, as by masks, get nothing.
        passing = factor != 0 if isinstance(factor, Tensor) else None
        return _passed(x.expand(y.shape), lambda _: y, passing)
    shapes = x.shape, factor.shape

    def back(relevance: Tensor) -> tuple[Tensor, ...]:
        return tuple((relevance / 2).sum_to_size(shape) for shape in shapes)

    return differentiable(x, lambda *_: (y, ()), back, factor)


@lrp_rule("div divide true_divide __truediv__")
@lrp_rule("__rdiv__ __rtruediv__", swapped=True)
def _divide(mode: Relevance, func: Any, args: Args, kwargs: Kwargs, swapped: bool = False) -> Any:
    """A divisor is a normalisation's, and gets nothing where the dividend varies."""
    a, b = _two(args, kwargs, swapped)
    x = a if varies(a) else b
    with torch.no_grad():
        a = torch.as_tensor(a, device=x.device)
        y = torch.div(a, b, rounding_mode=kwargs.get("rounding_mode"))
    return _passed(x.expand(y.shape), lambda _: y)


def _bilinear(mode: Relevance, a: Any, b: Any, call: Function) -> Any:
    """A sum of products of elements of a and b, of which each factor gets half where both vary."""
    if not varies(b):
        return mode.linear(a, lambda a: call(a, b))
    if not varies(a):
        return mode.linear(b, lambda b: call(a, b))
    epsilon = mode.composite.epsilon

    def back(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [one.detach().requires_grad_() for one in (a, b)]
            z = call(*leaves)
        grads = torch.autograd.grad(z, leaves, ratio(relevance / 2, z.detach(), epsilon))
        return tuple(one * grad for one, grad in zip((a, b), grads, strict=True))

    return differentiable(a, lambda a, b: (call(a, b), (a, b)), back, b)


@lrp_rule("matmul mm bmm mv dot __matmul__")
@lrp_rule("__rmatmul__", swapped=True)
def _matmul(mode: Relevance, func: Any, args: Args, kwargs: Kwargs, swapped: bool = False) -> Any:
    a, b = _two(args, kwargs, swapped)
    if mode.weights and not varies(b):
        return _product(mode, a, b)
    if mode.weights and not varies(a):
        layer = Affine(lambda x, weight, _: weight @ x, a, None, max(b.dim() - 2, 0))
        return mode.weighted("linear", b, layer)
    return _bilinear(mode, a, b, torch.matmul)


@lrp_rule("einsum")
def _einsum(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    varying = [number for number, one in enumerate(operands) if varies(one)]
    if not isinstance(equation, str) or len(varying) > 2:
        return NotImplemented

    def call(*given: Tensor) -> Any:
        filled = list(operands)
        for number, one in zip(varying, given, strict=True):
            filled[number] = one
        return torch.einsum(equation, *filled)

    if len(varying) == 1:
        return mode.linear(operands[varying[0]], call)
    return _bilinear(mode, operands[varying[0]], operands[varying[1]], call)


@lrp_rule("addmm baddbmm")
def _addmm(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Adds bias + x @ weight: a linear layer with its weight transposed, or a sum and a product."""
    base, a, b = args[:3]
    plain = call_name(func)[0] == "addmm" and len(args) == 3 and not kwargs
    if plain and mode.weights and varies(a) and not (varies(base) or varies(b)):
        return _product(mode, a, b, base)
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    with mode:
        product = torch.matmul(a, b) * alpha
        return torch.add(product, base, alpha=beta) if beta else product


# Attention.


@lrp_rule("softmax")
def _softmax(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """R_i = x_i (R_i - s_i sum_j R_j), softmax's first-order expansion at x (Achtibat, 2024)."""
    given = named(("input", "dim", "dtype"), args, kwargs)
    x, dim, dtype = given["input"], given["dim"], given.get("dtype")
    with torch.no_grad():
        # Tensor.softmax may get a stack level for warnings in the place of the type.
        y = torch.softmax(x, dim, dtype=dtype if isinstance(dtype, torch.dtype) else None)
    if mode.composite.softmax == "constant":
        return y

    def back(relevance: Tensor, x: Tensor, y: Tensor) -> Tensor:
        result = x * (relevance - y * relevance.sum(dim, keepdim=True))
        # Masked elements of x are -inf.
        return torch.where(y == 0, 0.0, result).to(x.dtype)

    return differentiable(x, lambda x: (y, (x, y)), back)


@lrp_rule("scaled_dot_product_attention")
def _attention(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Scaled dot-product attention, in calls that have rules."""
    if kwargs.get("dropout_p", (*args, *[0.0] * 5)[4]):
        return NotImplemented
    with mode:
        logits, value = scaled_products(*args, **kwargs)
        return torch.matmul(logits.softmax(-1), value)


@lrp_rule("cosine_similarity")
def _cosine_similarity(mode: Relevance, func: Function, args: Args, kwargs: Kwargs) -> Any:
    given = named(("x1", "x2", "dim", "eps"), args, kwargs)
    dim, eps = given.get("dim", 1), given.get("eps", 1e-8)
    with mode:
        sides = (given[name] for name in ("x1", "x2"))
        a, b = (one / one.norm(dim=dim, keepdim=True).clamp_min(eps) for one in sides)
        return (a * b).sum(dim)


# Composites by name.

COMPOSITES = tuple(
    "epsilon z_plus epsilon_plus epsilon_plus_flat epsilon_gamma epsilon_gamma_box "
    "epsilon_alpha2_beta1 epsilon_alpha2_beta1_flat captum".split()
)


def composite(
    name: str,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    bounds: tuple[Numbers, Numbers] | None = None,
    layers: tuple[Any, ...] = (),
    **options: str,
) -> Composite:
    """A composite by name; `layers`: (layer's name, rule as `read_rule` takes it) pairs."""
    if not isinstance(name, str) or name not in COMPOSITES:
        raise InputError(f"composite must be one of {', '.join(COMPOSITES)}: got {name!r}")
    are_pairs = isinstance(layers, (tuple, list)) and all(
        isinstance(one, (tuple, list)) and len(one) == 2 and isinstance(one[0], str)
        for one in layers
    )
    if not are_pairs:
        raise InputError(
            f"layers must be (layer's name, rule) pairs such as (('head', 'flat'),): got {layers!r}"
        )
    # The rule of convolutions, by the beginning of the name.
    kinds: dict[str, PropagationRule] = {
        "z_plus": ZPlus(epsilon),
        "epsilon_plus": ZPlus(epsilon),
        "epsilon_gamma": Gamma(gamma, epsilon),
        "epsilon_alpha2_beta1": AlphaBeta(2.0, 1.0, epsilon),
    }
    epsilons = Epsilon(epsilon)
    convolution = next((kinds[one] for one in kinds if name.startswith(one)), epsilons)
    first: PropagationRule | None = Flat() if name.endswith("_flat") else None
    if name.endswith("_box"):
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise InputError(
                f"epsilon_gamma_box needs bounds=(low, high) of the input: got {bounds!r}; each is "
                "a number or one per channel, such as (0.0, 1.0) for pixels that are not normalised"
            )
        first = ZBox(*bounds, epsilon)
    fields = {"norms": "epsilon", "pools": "epsilon"} if name == "captum" else {}
    return Composite(
        convolution=convolution,
        linear=convolution if name == "z_plus" else epsilons,
        first=first,
        layers=tuple((layer, read_rule(rule)) for layer, rule in layers),
        epsilon=epsilon,
        **fields | options,
    )
