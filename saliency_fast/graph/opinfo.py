"""What the engine knows of PyTorch's operators: one table, read by every pass.

A call is looked up by its name without underscores: `add`, `add_` and `__add__` share an entry.
Facts that are code register themselves: `lean` versions in `graph/autograd`, `crop` rules in
`graph/receptive_field.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from saliency_fast._torch_compat import NN

Call = Callable[..., Any]
_F = TypeVar("_F", bound=Call)


@dataclass(frozen=True)
class OpInfo:
    """The facts of an operator; the defaults hold for an unknown one.

    Attributes:
        kind: What passes match: "convolution" (weights as they are), "folded convolution",
            "transposed convolution", "normalisation", "addition", "concatenation" or "rectified".
        linear: "first" where the result is linear in the first tensor, the others being constants;
            "any" in the one tensor that depends on the points; "all" in all of them together.
        training: Position of the argument that says whether a layer trains.
        view: The result may share its operand's memory: the call moves no bytes.
        fresh: Neither autograd nor the lean version keeps the result, which is memory of its own:
            it may be overwritten.
        blank: The result has none of its operands' numbers.
        metadata: Answers that are no tensors say nothing of the numbers inside a tensor.
        data_sized: The size of the result depends on "numbers", or on which are "zeros" or equal.
        takes_sizes: One of the arguments may be a size that counts the rows.
        rows: "along" where the call mixes along `axis`, "first" where it counts rows on axis 0.
        axis: Position of the argument `dim`, and its default; None stands for all axes.
        splits: Returns parts of its operand along `axis`.
        half: Half-type policy: "product" is done in a half type, "float32" is not, "input" needs
            parameters of its input's type; else the type follows the operands.
        keeps: What autograd keeps for the backward pass, per element: "nothing", "bits", "bytes",
            "output", "operands", "factors" (the operands of a product) or "view" (nothing, and the
            result shares memory).
        crop: How a recorded step of the operator runs on crops (a receptive-field rule).
    """

    kind: str = ""
    linear: str = ""
    training: int | None = None
    view: bool = False
    fresh: bool = False
    blank: bool = False
    metadata: bool = False
    data_sized: str = ""
    takes_sizes: bool = False
    rows: str = ""
    axis: tuple[int, int | None] = (1, -1)
    splits: bool = False
    half: str = ""
    keeps: str = "nothing"
    crop: Call | None = None


UNKNOWN = OpInfo()
TABLE: dict[str, OpInfo] = {}
LEAN: dict[Call, Call] = {}
"""Lean versions, by the call itself: a call in place has another one than its twin, or none."""


def name_of(call: Call) -> str:
    return str(getattr(call, "__name__", type(call).__name__))


def info(call: Call) -> OpInfo:
    """The facts of a call, those of an unknown operator where nothing is registered."""
    return TABLE.get(name_of(call).strip("_"), UNKNOWN)


def operators(names: str, **facts: Any) -> None:
    """Adds facts to the entries of operators, named without underscores."""
    for name in names.split():
        TABLE[name] = replace(TABLE.get(name, UNKNOWN), **facts)


def lean(*calls: Call) -> Callable[[_F], _F]:
    """Decorator: adds the lean version of calls; it may answer NotImplemented."""

    def add(function: _F) -> _F:
        LEAN.update(dict.fromkeys(calls, function))
        return function

    return add


def out_of_place(call: Call) -> Call:
    """The twin of a call in place that leaves its operand alone; other calls as they are."""
    name = name_of(call)
    if not name.endswith("_") or name.endswith("__"):
        return call
    for space in (torch, NN, Tensor):
        if getattr(space, name, None) == call:
            found: Call = getattr(space, name[:-1], call)
            return found
    return call


@dataclass(frozen=True)
class Wrapped:
    """A call of an operator that does something beside; it keeps the operator's name."""

    func: Call

    @property
    def __name__(self) -> str:
        return name_of(self.func)


_CONVOLUTIONS = "conv1d conv2d conv3d"
_TRANSPOSED = "conv_transpose1d conv_transpose2d conv_transpose3d"
_AVERAGES = "avg_pool1d avg_pool2d avg_pool3d"
_ADAPTIVE = "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
_MAXIMA = "max_pool1d max_pool2d max_pool3d"
_SPLITS = "chunk split split_with_sizes tensor_split unsafe_split"
_SUMS = "add radd iadd"

# Layers.
operators(_CONVOLUTIONS, kind="convolution")
operators(_TRANSPOSED, kind="transposed convolution")
operators(f"{_CONVOLUTIONS} {_TRANSPOSED}", linear="first", fresh=True, rows="first")
operators("linear", linear="first", fresh=True)
operators("batch_norm", kind="normalisation", linear="first", training=5, fresh=True)
operators("layer_norm group_norm instance_norm rms_norm prelu", half="input")
operators("group_norm instance_norm", rows="first")
operators("prelu", keeps="bits")
operators("dropout feature_dropout alpha_dropout feature_alpha_dropout", training=2, keeps="view")
operators("dropout", linear="first", view=True)
operators(f"{_AVERAGES} {_ADAPTIVE}", linear="first", rows="first")
operators(f"{_MAXIMA} adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d", rows="first")
operators(_MAXIMA, keeps="bytes")
operators(
    """upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d pad pixel_shuffle pixel_unshuffle
    channel_shuffle im2col col2im""",
    linear="first",
)
operators("interpolate grid_sample", rows="first")
operators("unfold fold", rows="first", takes_sizes=True)
operators("unfold", linear="first")

# Elementwise.
operators(f"{_SUMS} sub subtract rsub isub", linear="all")
operators(_SUMS, kind="addition")
operators("mul multiply rmul imul", linear="any", keeps="factors")
operators("div divide true_divide truediv idiv itruediv", linear="first", keeps="factors")
operators("neg negative", linear="first")
operators("relu relu6 leaky_relu hardtanh clamp threshold", keeps="bits")
operators("sigmoid tanh exp expm1 sqrt rsqrt reciprocal", keeps="output")
operators(
    """gelu silu elu celu selu hardswish hardsigmoid mish softplus log_sigmoid where square pow abs
    log log1p log2 log10 sin cos atan erf clip clamp_min clamp_max maximum minimum lerp addcmul
    addcdiv exp2""",
    keeps="operands",
)

# Products and reductions.
operators("matmul mm bmm einsum", linear="any")
operators(
    f"""{_CONVOLUTIONS} {_TRANSPOSED} linear scaled_dot_product_attention partial_convolution
    matmul rmatmul mm bmm addmm baddbmm convolution_relu""",
    half="product",
)
operators("mean sum", linear="first", axis=(1, None))
operators("cat concat concatenate stack hstack vstack", linear="all")
operators("cat concat concatenate", axis=(1, 0))
operators("cat", kind="concatenation", fresh=True)
operators(
    """exp exp2 expm1 log log2 log10 log1p pow rpow rsqrt reciprocal softplus cosh sinh tan acos
    asin cumsum cumprod prod sum norm vector_norm linalg_vector_norm linalg_norm renorm dist cdist
    logsumexp log_softmax cosine_similarity var std softmin""",
    half="float32",
)
operators(
    """softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp sort argsort msort flip
    flipud roll rot90 normalize renorm glu diff gumbel_softmax""",
    rows="along",
)
operators("softmax log_softmax", keeps="output")
operators("glu", keeps="operands")
operators("normalize", axis=(2, 1))
operators("roll", axis=(2, None))
operators("rot90 renorm diff", axis=(2, -1))
operators("flipud msort", axis=(1, 0))

# Shapes and views.
operators(
    """view reshape flatten unflatten permute transpose t swapaxes movedim expand squeeze unsqueeze
    narrow select unbind getitem""",
    linear="first",
    view=True,
)
operators(
    """view_as reshape_as moveaxis contiguous clone expand_as to float double type type_as repeat
    roll flip""",
    linear="first",
)
operators("contiguous narrow", keeps="view")
operators("chunk split", linear="first", view=True)
operators(_SPLITS, axis=(2, 0), splits=True, rows="along", keeps="view")
operators("narrow", axis=(1, None))
operators(
    "index_select take index_add index_copy index_put scatter scatter_add",
    axis=(1, 0),
    rows="along",
)
operators(
    f"""view reshape expand repeat tile broadcast_to unflatten resize as_strided narrow getitem
    setitem {_SPLITS} new_zeros new_ones new_full new_empty zeros ones full empty arange eye rand
    randn randint repeat_interleave select index_select view_as_complex size sparse_coo_tensor
    range tril_indices triu_indices multi_head_attention_forward bincount one_hot meshgrid""",
    takes_sizes=True,
)
operators(
    """new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like
    rand_like randn_like""",
    blank=True,
)
operators(
    """nonzero argwhere masked_select unique unique_consecutive unique2 unique_dim""",
    data_sized="zeros",
)
operators("bincount", data_sized="numbers")
operators(
    """get len hash dim ndimension size stride numel nelement element_size get_device storage_offset
    is_contiguous is_floating_point is_complex is_signed is_conj is_neg is_inference is_same_size
    is_tensor type result_type promote_types can_cast broadcast_shapes is_view has_names is_shared
    is_pinned is_nested""",
    metadata=True,
)

# Calls that passes put in the place of several.
operators("folded_convolution", kind="folded convolution", fresh=True)
operators("partial_convolution", fresh=True)
operators("rectified", kind="rectified", keeps="bits")
operators("convolution_relu", keeps="bits")
operators("add_layer_norm", keeps="operands")
