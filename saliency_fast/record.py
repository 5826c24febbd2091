"""Records on disk: safetensors with JSON metadata, a schema version and a hash (docs/record.md)."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from saliency_fast.errors import RecordError

SCHEMA = 1
KEY = "saliency_fast"

_LOCK = threading.Lock()
_WEIGHTS: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[int, int], ...], str]] = (
    WeakKeyDictionary()
)


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
        metadata = dict(json.loads(header[KEY]))
    except ValueError as error:
        raise RecordError(f"record {path} has metadata that is no JSON: {error}") from error
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
        digest.update(f"{name}:{tensors[name].dtype}:{list(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and contents."""
    return _digest("", {"": tensor})


def weights_sha256(model: Callable[..., Any]) -> str | None:
    """SHA-256 of a module's parameters and buffers by name; None for a plain function.

    Remembered until one of them is replaced or written to.
    """
    if not isinstance(model, nn.Module):
        return None
    state = {name: value for name, value in _state(model).items() if isinstance(value, Tensor)}
    versions = tuple((one.data_ptr(), _version(one)) for one in state.values())
    with _LOCK:
        known = _WEIGHTS.get(model)
    if known is not None and known[0] == versions and -1 not in {v for _, v in versions}:
        return known[1]
    digest = _digest("", state)
    with _LOCK:
        _WEIGHTS[model] = (versions, digest)
    return digest


def _state(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _version(tensor: Tensor) -> int:
    """PyTorch's count of in-place writes; -1 for inference tensors, which keep none."""
    return -1 if tensor.is_inference() else tensor._version


def _bytes(tensor: Tensor) -> memoryview:
    dense = tensor.detach().cpu().contiguous()
    # A single number may have any stride and counts as contiguous.
    flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
