"""Records on disk: safetensors with JSON metadata, a schema version and a hash (docs/record.md)."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from saliency_fast.errors import RecordError

SCHEMA = 1
KEY = "saliency_fast"

_LOCK = threading.Lock()
_WEIGHTS: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], str]] = WeakKeyDictionary()


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Writes a record; tensors are stored on the CPU, contiguous, in their own dtypes."""
    stored = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    text = json.dumps({"schema": SCHEMA, **metadata}, sort_keys=True)
    header = {KEY: text, "sha256": _digest(text, stored)}
    path = Path(path)
    # First beside it, so that a record is whole or not there.
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(save(stored, metadata=header))
    partial.replace(path)
    return path


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a record; raises RecordError where it is truncated, altered or of another schema."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            # Copies, since what the file hands out is mapped and changes with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise RecordError(f"record {path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise RecordError(
            f"record {path} is truncated or not a safetensors file: {error}"
        ) from error
    if KEY not in header or "sha256" not in header:
        raise RecordError(
            f"record {path} has no {KEY!r} metadata: got the keys {sorted(header)}; it was not "
            "written by Attribution.save"
        )
    try:
        metadata = json.loads(header[KEY])
    except (ValueError, RecursionError) as error:
        raise RecordError(f"record {path} has metadata that is no JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise RecordError(f"record {path} has metadata that is no object: got {header[KEY][:40]}")
    if metadata.get("schema") != SCHEMA:
        raise RecordError(
            f"record {path} has another schema: got {metadata.get('schema')!r}, expected {SCHEMA}; "
            "read it with the version of saliency_fast that wrote it"
        )
    if _digest(header[KEY], tensors) != header["sha256"]:
        raise RecordError(f"record {path} fails its hash: its numbers or metadata were altered")
    return tensors, metadata


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        for part in _parts(tensors[name]):
            if isinstance(part, str):
                digest.update(f"{name}:{part}".encode())
            else:
                digest.update(f"{name}:{part.dtype}:{list(part.shape)}".encode())
                digest.update(_bytes(part))
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and contents."""
    return _digest("", {"": tensor})


def weights_sha256(model: Callable[..., Any]) -> str | None:
    """SHA-256 of a module's parameters and buffers by name, and of what else its state holds; None
    for a plain function, and where a tensor has numbers that cannot be read.

    Remembered until one of them is replaced or written to.
    """
    if not isinstance(model, nn.Module):
        return None
    state = _state(model)
    versions = tuple((_place(one), _version(one)) for one in state.values())
    with _LOCK:
        known = _WEIGHTS.get(model)
    if known is not None and known[0] == versions and all(v >= 0 for _, v in versions):
        return known[1]
    try:
        digest = _digest("", state)
    except (RuntimeError, NotImplementedError, TypeError):
        # A kind of tensor of somebody's own: a map is not lost for its record's sake.
        return None
    with _LOCK:
        _WEIGHTS[model] = (versions, digest)
    return digest


def _state(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers()), **_further(model)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _further(model: nn.Module) -> dict[str, Any]:
    """Tensors that are neither parameters nor buffers: packed weights of quantised layers, extra
    state, and the constants that frozen TorchScript has of them.
    """
    found: dict[str, Any] = {}
    if isinstance(model, torch.jit.ScriptModule):
        graph: Any = model.inlined_graph
        for number, node in enumerate(graph.findAllNodes("prim::Constant")):
            if isinstance(node.output().type(), torch._C.TensorType):
                found[f"constant {number}"] = node.t("value")
        return found
    for name, module in model.named_modules():
        kind = type(module)
        plain = kind._save_to_state_dict is nn.Module._save_to_state_dict
        if not (plain and kind.get_extra_state is nn.Module.get_extra_state):
            own: dict[str, Any] = {}
            module._save_to_state_dict(own, f"{name}.", keep_vars=True)
            leaves = tree_leaves([own[key] for key in sorted(own)])
            found |= {f"{name} {number}": one for number, one in enumerate(leaves)}
    return found


def _place(tensor: Tensor) -> tuple[object, ...] | None:
    """Where a tensor's numbers lie, and how; None where that is no one place."""
    other = tensor.is_meta or tensor.is_nested or tensor.is_quantized
    if other or type(tensor) not in _DENSE or tensor.layout != torch.strided:
        return None
    # Another view of the same memory is another tensor.
    read = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.data_ptr(), *read


def _version(tensor: Tensor) -> int:
    """PyTorch's count of in-place writes; -1 where that tells nothing: for inference tensors, which
    keep none, and for those that are made of others.
    """
    return -1 if _place(tensor) is None or tensor.is_inference() else tensor._version


_DENSE = (Tensor, nn.Parameter, nn.Buffer)
_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def _parts(tensor: Tensor) -> Iterator[Tensor | str]:
    """A tensor as dense ones, and text for what is none: itself, where it is dense."""
    if is_lazy(tensor):
        yield "not initialised"
        return
    tensor, wrapped = tensor.detach(), bool(is_traceable_wrapper_subclass(tensor))
    if tensor.is_meta:
        yield f"no numbers, {tensor.dtype} {list(tensor.shape)}"
    elif wrapped:
        wrapper: Any = tensor
        names, context = wrapper.__tensor_flatten__()
        yield f"{type(wrapper).__qualname__} {context}"
        for name in names:
            yield from _parts(getattr(wrapper, name))
    elif tensor.is_nested:
        yield "nested"
        for one in tensor.unbind():
            yield from _parts(one)
    elif tensor.is_quantized:
        yield from _quantised(tensor)
    elif tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        yield f"sparse {list(tensor.shape)}"
        yield from (whole.indices(), whole.values())
    elif tensor.layout in _COMPRESSED:
        yield f"{tensor.layout} {list(tensor.shape)}"
        yield from (getattr(tensor, name)() for name in _COMPRESSED[tensor.layout])
    else:
        yield tensor if tensor.layout == torch.strided else tensor.to_dense()


def _quantised(tensor: Tensor) -> Iterator[Tensor | str]:
    yield f"quantised {tensor.qscheme()}"
    yield tensor.int_repr()
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        yield f"{tensor.q_scale()!r} {tensor.q_zero_point()}"
    else:
        yield f"{tensor.q_per_channel_axis()}"
        yield from (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())


def _bytes(tensor: Tensor) -> memoryview:
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # A single number may have any stride and counts as contiguous.
    flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
