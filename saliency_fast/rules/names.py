"""PyTorch's calls by what they do, as `call_name` names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu elu celu selu gelu silu mish softplus softsign tanh sigmoid expit "
    "log_sigmoid logsigmoid hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink "
    "prelu _prelu_kernel threshold clamp clip clamp_min clamp_max".split()
)
MATHS = frozenset(
    "abs absolute square sqrt rsqrt reciprocal pow __rpow__ float_power exp exp2 expm1 log log2 "
    "log10 log1p logit sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfinv "
    "sign sgn round floor ceil trunc frac nan_to_num".split()
)
ELEMENTWISE = ACTIVATIONS | MATHS
"""Every element of the result depends on one element of the input."""

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
"""Results are elements of the input, or zeros: gradients hand over what they get."""

LINEAR = frozenset(
    "sum mean cumsum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_linear1d "
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa grid_sampler grid_sampler_2d grid_sampler_3d col2im diff trace "
    "norm vector_norm std".split()
)
"""f(c x) = c f(x), so that x * f'(x) sums to f(x): sums, means, norms."""

DROPOUTS = frozenset(
    "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout".split()
)
MAX_POOLS = frozenset(
    f"{kind}max_pool{axes}d{more}"
    for kind in ("", "adaptive_")
    for axes in (1, 2, 3)
    for more in ("", "_with_indices")
)


def named(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, `names` those that may come without."""
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def only_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether no tensor but the first argument depends on the points."""
    rest = (*args[1:], *(value for name, value in kwargs.items() if name != "input"))
    first = args[0] if args else kwargs.get("input")
    varies = any(isinstance(one, Tensor) and one.requires_grad for one in rest)
    return isinstance(first, Tensor) and first.requires_grad and not varies
