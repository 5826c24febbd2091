"""Every private interface of PyTorch that the package uses, looked up once.

An interface without a fallback fails on import, with its name; the others say what happens where a
release of PyTorch lacks them. Error texts are matched where PyTorch has no exception of its own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from enum import Enum
from functools import cache
from operator import attrgetter, methodcaller
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.utils import _python_dispatch, checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import (
    TreeSpec,
    tree_any,
    tree_flatten,
    tree_iter,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)

__all__ = ["OpOverload", "OpOverloadPacket", "TreeSpec", "is_traceable_wrapper_subclass"]
__all__ += ["tree_any", "tree_flatten", "tree_leaves", "tree_map", "tree_structure"]
__all__ += ["tree_iter", "tree_unflatten"]


_FLAGS = [
    name
    for name, one in vars(_python_dispatch).items()
    if name.startswith("_is_in_") and type(one) is bool
]
"""Whether a dispatch mode is on, which PyTorch keeps for all threads as each found it: those that
overlap leave it on, and nothing is compiled any more. A release without them needs no mending."""


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode whose dispatch is not wrapped in the compiler, which costs its whole import."""

    _lock, _entered = threading.Lock(), 0
    _before: list[bool]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Any:
        with DispatchMode._lock:
            if not DispatchMode._entered:
                DispatchMode._before = [getattr(_python_dispatch, name) for name in _FLAGS]
            DispatchMode._entered += 1
            return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> Any:
        with DispatchMode._lock:
            left = super().__exit__(*error)  # type: ignore[no-untyped-call]
            DispatchMode._entered -= 1
            if not DispatchMode._entered:
                for name, before in zip(_FLAGS, DispatchMode._before, strict=True):
                    setattr(_python_dispatch, name, before)
            return left


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
_GUARDS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@cache
def unguarded(func: FunctionType) -> FunctionType | None:
    """A copy of a Python function of PyTorch without its check for function modes. Such functions
    hand themselves over whole to a mode. The copy has the same code object and other globals, in
    which the check answers no, so that the mode sees the calls inside. None for functions without
    such a check, and for methods of Tensor: what these call passes the mode under its own name.
    Where a release names the check otherwise, a mode sees the function as one call, which has no
    lean version and keeps more memory.
    """
    if func.__module__ == "torch._tensor":
        return None
    cells = func.__closure__ or ()
    inner = tuple(CellType(_copy_of(cell.cell_contents)) for cell in cells)
    # As its own global name: what is reached through a module (`torch.sym_int`) keeps its check.
    own = set(_GUARDS) & set(func.__code__.co_names) & set(func.__globals__)
    # Some pooling functions are a choice between two guarded ones.
    chosen = any(a.cell_contents is not b.cell_contents for a, b in zip(inner, cells, strict=True))
    if not own and not chosen:
        return None
    space = {**func.__globals__, **dict.fromkeys(_GUARDS, lambda *_: False)}
    closure = inner if chosen else func.__closure__
    copy = FunctionType(func.__code__, space, func.__name__, func.__defaults__, closure)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _copy_of(value: Any) -> Any:
    return (unguarded(value) if isinstance(value, FunctionType) else None) or value


# Attributes of modules and tensors.
TABLES = ("_parameters", "_buffers", "_modules")
"""The attributes of a module that hold its parameters, buffers and submodules. Required."""
PARAMETERS, BUFFERS = TABLES[:2]
own_parameters: Callable[[nn.Module], dict[str, Any]] = attrgetter(PARAMETERS)
"""The parameters of a module without its submodules', by name, to read and to replace."""
own_buffers: Callable[[nn.Module], dict[str, Any]] = attrgetter(BUFFERS)
"""The buffers of a module without its submodules', by name, to read and to replace."""
own_modules: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter(TABLES[2])
"""The submodules of a module by name."""
TRANSIENT = "_non_persistent_buffers_set"
"""The attribute of a module that names the buffers that its state_dict leaves out. Required."""
HOOKS_OF_ALL_MODULES = [
    one for name, one in sorted(vars(nn.modules.module).items()) if name.endswith("_hooks")
]
"""The tables of hooks that run for every module. A release that names one otherwise goes without:
a program is not recorded anew where such a hook is added or removed."""
version_of: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor was written to in place. Required; inference tensors have none."""
_set_versions = _find("_C._autograd._unsafe_set_version_counter")


def set_version(tensor: Tensor, version: int) -> None:
    """Sets the count of in-place writes; without it, graphs from before refuse to run backward."""
    if _set_versions is not None:
        _set_versions((tensor,), (version,))


def storage_id(tensor: Tensor) -> int:
    """One number for all tensors of the same memory, also of memory without data. Required."""
    return int(tensor.untyped_storage()._cdata)


def own_state(module: nn.Module, prefix: str) -> dict[str, Any] | None:
    """What a module of a kind that saves by code of its own adds to its state_dict, with live
    tensors and names that begin with `prefix`; None for other modules. Required.
    """
    kind = type(module)
    plain = kind._save_to_state_dict is nn.Module._save_to_state_dict
    if plain and kind.get_extra_state is nn.Module.get_extra_state:
        return None
    found: dict[str, Any] = {}
    module._save_to_state_dict(found, prefix, keep_vars=True)
    return found


_COMPILED = "_orig_mod"


def eager_module(model: object) -> object:
    """The module that `torch.compile` wrapped, else `model`; without the attribute, the wrapper."""
    return getattr(model, _COMPILED, model)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of wrappers of torch.compile and distributed training; without the
    attributes, the wrapper.
    """
    for name in (_COMPILED, "module"):
        inner = dict(module.named_children()).get(name)
        of_torch = type(module).__module__.startswith(("torch._dynamo", "torch.nn.parallel"))
        module = inner if of_torch and inner is not None else module
    return module


# Compilation, transforms and modes.
def dynamo_loaded() -> bool:
    """Whether the compiler was imported: without it nothing is compiled, and it takes a second."""
    return "torch._dynamo" in sys.modules


def is_compiler_error(error: BaseException) -> bool:
    return type(error).__module__.startswith("torch._dynamo")


_interpreter = _find("_C._functorch.peek_interpreter_stack")
_clear: Any = None
with suppress(ImportError):
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as _clear


def inside_transform() -> bool:
    """Whether a transform of torch.func runs; without the interface, recordings may miss one."""
    return _interpreter is not None and _interpreter() is not None


def inside_dual_level() -> bool:
    """Whether forward derivatives are computed. Required."""
    return bool(forward_ad._current_level >= 0)


def outside_transforms() -> AbstractContextManager[object]:
    """A context that transforms of torch.func around the caller do not see; without the interface
    calls inside such a transform are transformed, too.
    """
    return nullcontext() if _clear is None or not inside_transform() else _clear()


_is_wrapped = _find("_C._functorch.is_functorch_wrapped_tensor")
_warn_of_fallbacks = _find("_C._functorch._set_vmap_fallback_warning_enabled")


def is_of_transform(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a transform of torch.func; without the interface, models that
    cache such a tensor fail on their next run.
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
# The names of operators that models call by other functions. Under other names their axes get no
# letters, and LRP has no rule for them.
PACKED_SEQUENCE = "_pack_padded_sequence"
ENCODER_LAYER = "_transformer_encoder_layer_fwd"
FUSED_RMS_NORM = "_fused_rms_norm"
schema_of = attrgetter("_schema")
"""The schema of an operator. Required."""
TensorType: Any = torch._C.TensorType
"""The type of tensors in graphs of torch.jit. Required."""
CONVOLUTION: Any = torch.ops.aten.convolution
"""The operator of all convolutions, transposed or not. Required."""
UNFOLDED_TRANSPOSES: dict[int, Any] = {
    4: torch.ops.aten.slow_conv_transpose2d,
    5: torch.ops.aten.slow_conv_transpose3d,
}
"""Transposed convolutions of images and volumes that unfold, by dimensions. Required."""


def backward_operator(name: str) -> Any:
    """The operator that gives the gradients of the operator `name`. Required."""
    return getattr(torch.ops.aten, f"{name}_backward")


ONEDNN_CONVOLUTION: Any = _find("ops.aten.mkldnn_convolution")
ONEDNN_TRANSPOSE: Any = _find("ops.mkldnn._convolution_transpose_pointwise")
ONEDNN_FUSED: Any = _find("ops.mkldnn._convolution_pointwise")
ONEDNN_REORDER: Any = _find("ops.mkldnn._reorder_convolution_weight")
_onednn_built = bool(_find("_C._has_mkldnn"))
onednn_enabled: Callable[[], bool] = _find("_C._get_mkldnn_enabled") or (lambda: False)
"""Whether the user leaves oneDNN on, where it is built in; without it, PyTorch's own calls run."""
HAS_ONEDNN = _onednn_built and None not in (ONEDNN_CONVOLUTION, ONEDNN_TRANSPOSE)
"""Whether oneDNN's convolutions can be called by name; without them, PyTorch chooses."""
HAS_ONEDNN_ORDERS = _onednn_built and None not in (ONEDNN_FUSED, ONEDNN_REORDER)
"""Whether oneDNN takes weights in its own order; without it, no weights are prepared for it."""
_cudnn_relu = _find("ops.aten.cudnn_convolution_relu")
_cudnn_add_relu = _find("ops.aten.cudnn_convolution_add_relu")
_safe_softmax = _find("_safe_softmax")
_cpu_attention = _find("ops.aten._scaled_dot_product_flash_attention_for_cpu")


def cudnn_fuses(x: Tensor) -> bool:
    """Whether cuDNN's convolutions that end in a ReLU, which know neither float64 nor PyTorch's
    switches for deterministic algorithms, serve `x`.
    """
    cudnn = torch.backends.cudnn
    built = None not in (_cudnn_relu, _cudnn_add_relu) and torch.version.cuda is not None
    strict = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    types = torch.float32, torch.float16, torch.bfloat16
    return built and x.is_cuda and cudnn.enabled and not strict and x.dtype in types


def cudnn_convolution_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, *geometry: Any
) -> Tensor:
    """ReLU of a convolution, plus `added` like its result, by cuDNN; without gradients.

    geometry: stride, padding and dilation, a number per axis, and groups.
    """
    found: Tensor = (
        _cudnn_relu(x, weight, bias, *geometry)
        if added is None
        else _cudnn_add_relu(x, weight, added, 1.0, bias, *geometry)
    )
    return found


def softmax_of_masked(logits: Tensor) -> Tensor:
    """Softmax over the last axis, where rows of -inf alone are zero."""
    if _safe_softmax is not None:
        return _safe_softmax(logits, -1, dtype=logits.dtype)  # type: ignore[no-any-return]
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
    if _cpu_attention is None or query.dim() != 4 or dropout_p or enable_gqa:
        attention = torch.nn.functional.scaled_dot_product_attention
        own: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return attention(query, key, value, attn_mask, dropout_p, is_causal, **own)
    kept: dict[str, Any] = {"attn_mask": attn_mask, "scale": scale}
    found: Tensor = _cpu_attention(query, key, value, 0.0, is_causal, **kept)[0]
    return found


def is_rectifier_step(node: Any) -> bool:
    """Whether a step of autograd's graph is a rectifier's, by the name of its class."""
    return "Relu" in type(node).__name__


BATCH_NORM_STEPS = ("NativeBatchNorm", "BatchNormWithUpdate")
"""How the names of the steps of batch normalisation's CPU kernel begin, in all releases. Under
another name its gradients stay PyTorch's, wrong ones of some memory formats included."""


def saved_input(node: Any) -> Tensor | None:
    """The input that a step of autograd keeps, None where a hook has packed it. Without what tells
    (in 2.9): None, and gradients of one image are copied before a normalisation's.
    """
    saved = getattr(node, "_raw_saved_input", None)
    if saved is None or getattr(saved, "unpack_hook", True) is not None:
        return None
    found = getattr(saved, "data", None)
    return found if isinstance(found, Tensor) else None


run_backward: Any = torch.autograd.Variable._execution_engine.run_backward
"""The backward pass behind `torch.autograd.grad`: (outputs, cotangents, retain_graph, create_graph,
inputs, allow_unreachable, accumulate_grad). Required."""
sequence_number = methodcaller("_sequence_nr")
"""The number of a step of autograd's graph in the order in which a thread made them. Required."""


def custom_function(node: Any) -> type | None:
    """The torch.autograd.Function of a step of autograd's graph, None of others. Required."""
    return vars(type(node))["_forward_cls"] if isinstance(node, BackwardCFunction) else None


def is_module_hook(node: Any) -> bool:
    """Whether a step of autograd's graph runs the full backward hooks of a module, by its name;
    under another name, models with such hooks run without lean calls.
    """
    return bool(node.name() == "BackwardHookFunctionBackward")


def is_checkpoint(node: Any) -> bool:
    """Whether a step of autograd's graph keeps the inputs of a checkpoint, by the name that it has
    in older releases such as 2.9: a checkpoint of theirs looks at it, and later ones have none.
    """
    return bool(node.name() == "_NoopSaveInputsBackward")


_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks


def saved_tensors_hooks() -> Any:
    """The innermost saved-tensor hooks (pack, unpack); a pair of None without any. Required."""
    return _top_hooks(True) or (None, None)


def kind_of_step(node: Any) -> str:
    """The operator of a step of autograd's graph, by its name: "Relu" of "ReluBackward0"."""
    return str(node.name()).rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


# Checkpoints: what every kind of checkpoint goes through, under whatever name it was imported
# (`checkpoint`, `checkpoint_sequential`, wrappers of other libraries).
ReentrantCheckpoint: Any = checkpoint.CheckpointFunction
"""The autograd function of checkpoints with use_reentrant=True. Required."""
CheckpointHook: Any = checkpoint._checkpoint_hook
"""The saved-tensor hooks of checkpoints with use_reentrant=False. Required."""


# What each kind of operator may round float32 to, by (backend, operator): "none" inherits. The
# public names have no switch of recurrent layers' own.
fp32_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
set_fp32_precision: Callable[[str, str, str], object] = torch._C._set_fp32_precision_setter


def end_allocation_to_pool(device: torch.device, pool: Any) -> None:
    """Ends what a failed capture leaves behind: its thread's memory comes from the graph's pool."""
    torch._C._cuda_endAllocateToPool(device.index, pool)


class ErrorText(Enum):
    """Texts of PyTorch's errors, where it has no exception of its own for a failure. Where a
    release words an error otherwise, its message is shown without our cure.
    """

    ALLOCATION = ("alloc",)
    OUT_OF_MEMORY = ("can't allocate memory", "ALLOC_FAILED", "CUDA error: out of memory")
    OVERWRITTEN = ("needed for gradient computation has been modified by an inplace",)
    IN_PLACE = ("inplace operation", "modified inplace", "in-place operation", "modified in-place")
    NO_DERIVATIVE = (
        *("derivative for", "not implemented", "not differentiable"),
        "does not support autograd",
    )
    NO_SECOND_DERIVATIVE = ("is not implemented", "double backward")
    INFERENCE_TENSOR = ("Inference tensors",)
    SAVED_TENSOR_HOOKS = ("saved tensor hooks",)
    NO_GRADIENT = ("does not require grad", "does not have a grad_fn")

    def of(self, error: BaseException) -> bool:
        """Whether the message of an error holds one of the texts."""
        return any(text in str(error) for text in self.value)
