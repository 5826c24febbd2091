"""Every private interface of PyTorch that the package uses, looked up once, in one place.

An interface without a fallback fails on import, with its name; the others say what happens where a
release of PyTorch lacks them. Error texts are matched where PyTorch has no exception of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from enum import Enum
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import checkpoint
from torch.utils._pytree import tree_any, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["OpOverload", "OpOverloadPacket", "tree_any", "tree_flatten"]
__all__ += ["tree_leaves", "tree_map", "tree_unflatten"]


def _find(path: str) -> Any:
    """The object at a dotted path below `torch`; None where this release has none."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# Functions that function modes see. All are required.
NN: Any = torch._C._nn
"""The namespace of C functions that `torch.nn.functional` calls, such as pooling."""
EINSUM: Any = torch._VF.einsum  # type: ignore[attr-defined]
"""The C function that `torch.einsum` calls."""
WithoutFunctionModes: Any = torch._C.DisableTorchFunction
"""A context inside which no function mode and no tensor subclass sees calls."""


# Attributes of modules and tensors.
TABLES = ("_parameters", "_buffers", "_modules")
"""The attributes of a module that hold its parameters, buffers and submodules. Required."""
BUFFERS = TABLES[1]
TRANSIENT = "_non_persistent_buffers_set"
"""The attribute of a module that names the buffers that its state_dict leaves out. Required."""
version_of = attrgetter("_version")
"""How often a tensor was written to in place. Required; inference tensors have none."""
_set_versions = _find("_C._autograd._unsafe_set_version_counter")


def set_version(tensor: Tensor, version: int) -> None:
    """Sets the count of in-place writes; without it, graphs from before refuse to run backward."""
    if _set_versions is not None:
        _set_versions((tensor,), (version,))


def eager_module(model: object) -> object:
    """The module that `torch.compile` wrapped, else `model`; without the attribute, the wrapper."""
    return getattr(model, "_orig_mod", model)


# Compilation, transforms and modes.
def dynamo_loaded() -> bool:
    """Whether the compiler was imported: without it nothing is compiled, and it takes a second."""
    return "torch._dynamo" in sys.modules


def is_compiler_error(error: BaseException) -> bool:
    """Whether the compiler raised `error`."""
    return type(error).__module__.startswith("torch._dynamo")


_interpreter = _find("_C._functorch.peek_interpreter_stack")
_clear: Any = None
with suppress(ImportError):
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as _clear


def outside_transforms() -> AbstractContextManager[object]:
    """A context that transforms of torch.func around the caller do not see; without the interface
    calls inside such a transform are transformed, too.
    """
    if _clear is None or _interpreter is None or _interpreter() is None:
        return nullcontext()
    context: AbstractContextManager[object] = _clear()
    return context


_is_wrapped = _find("_C._functorch.is_functorch_wrapped_tensor")
_warn_of_fallbacks = _find("_C._functorch._set_vmap_fallback_warning_enabled")


def is_of_transform(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a transform of torch.func; without the interface none does, and a
    model that caches such a tensor fails on its next run.
    """
    return _is_wrapped is not None and bool(_is_wrapped(tensor))


def warn_of_vmap_fallbacks(enabled: bool) -> None:
    """Sets whether vmap warns of operators that it runs row by row; without it, PyTorch decides."""
    if _warn_of_fallbacks is not None:
        _warn_of_fallbacks(enabled)


without_dispatch_modes: Callable[[], AbstractContextManager[object]] = (
    _find("utils._python_dispatch._disable_current_modes") or nullcontext
)
"""A context that dispatch modes do not see; without it, calibration counts copies of weights."""


# Operators.
_safe_softmax = _find("_safe_softmax")
_cpu_attention = _find("ops.aten._scaled_dot_product_flash_attention_for_cpu")


def softmax_of_masked(logits: Tensor) -> Tensor:
    """Softmax over the last axis, where rows of -inf alone are zero."""
    if _safe_softmax is not None:
        result: Tensor = _safe_softmax(logits, -1, dtype=logits.dtype)
        return result
    return logits.softmax(-1).masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by the CPU's kernel, also of meta tensors, for which PyTorch
    chooses a kernel that keeps more. Without the interface calibration counts what that one keeps.
    """
    mask = attn_mask
    if _cpu_attention is None or query.dim() != 4 or dropout_p or enable_gqa:
        attention = torch.nn.functional.scaled_dot_product_attention
        own: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return attention(query, key, value, mask, dropout_p, is_causal, **own)
    found: Tensor = _cpu_attention(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[
        0
    ]
    return found


def is_rectifier_step(node: Any) -> bool:
    """Whether a step of autograd's graph is a rectifier's, by the name of its class."""
    return "Relu" in type(node).__name__


def kind_of_step(node: Any) -> str:
    """The operator of a step of autograd's graph, by its name: "Relu" of "ReluBackward0"."""
    name: str = node.name().rpartition("::")[2].rstrip("0123456789")
    return name.removesuffix("Backward")


# Checkpoints: what every kind of checkpoint goes through, under whatever name it was imported
# (`checkpoint`, `checkpoint_sequential`, wrappers of other libraries).
ReentrantCheckpoint: Any = checkpoint.CheckpointFunction
"""The autograd function of checkpoints with use_reentrant=True. Required."""
CheckpointHook: Any = checkpoint._checkpoint_hook
"""The saved-tensor hooks of checkpoints with use_reentrant=False. Required."""


class ErrorText(Enum):
    """Texts of PyTorch's errors, where it has no exception of its own for a failure.

    Where a release words an error otherwise, its message is shown without our cure.
    """

    OUT_OF_MEMORY = ("can't allocate memory", "ALLOC_FAILED")
    OVERWRITTEN = ("needed for gradient computation has been modified by an inplace",)
    IN_PLACE = ("inplace operation", "modified inplace", "in-place operation", "modified in-place")
    NO_DERIVATIVE = (
        *("derivative for", "not implemented", "not differentiable"),
        "does not support autograd",
    )
    NO_SECOND_DERIVATIVE = ("is not implemented", "double backward")
    INFERENCE_TENSOR = ("Inference tensors",)
    NO_GRADIENT = ("does not require grad", "does not have a grad_fn")

    def of(self, error: BaseException) -> bool:
        """Whether the message of an error holds one of the texts."""
        return any(text in str(error) for text in self.value)
