"""Attribution records: files of tensors and JSON, checked when read (docs/record.md)."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from saliency_fast._torch_compat import (
    TABLES,
    TensorType,
    is_traceable_wrapper_subclass,
    own_state,
    tree_leaves,
    version_of,
)
from saliency_fast.errors import RecordError
from saliency_fast.graph.passes.half import PRECISIONS
from saliency_fast.model.layout import LETTERS, Axes
from saliency_fast.model.preserve import below
from saliency_fast.model.targets import NextToken, Targets
from saliency_fast.version import __version__

SCHEMA = 1
KEY = "saliency_fast"

# --- Files ------------------------------------------------------------------------------------


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Writes a record; tensors are stored on the CPU, contiguous, in their own dtypes."""
    stored = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
    text = json.dumps({"schema": SCHEMA, **metadata}, sort_keys=True)
    path = Path(path)
    # Written beside the target and renamed, so that a record is complete or absent.
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(save(stored, metadata={KEY: text, "sha256": digest(text, stored)}))
    partial.replace(path)
    return path


def versions() -> dict[str, str]:
    """The versions that records name."""
    python, own = platform.python_version(), __version__
    return {"saliency_fast": own, "torch": str(torch.__version__), "python": python}


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a record.

    Raises:
        RecordError: The file is truncated, altered, of another schema, or holds something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            # Copies, because the tensors that safetensors returns are mapped to the file.
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
    if digest(header[KEY], tensors) != header["sha256"]:
        raise RecordError(f"record {path} fails its hash: its numbers or metadata were altered")
    try:
        _check_fields(metadata)
        _check_tensors(tensors, metadata)
        _check_references(tensors, metadata["provenance"])
    except _MismatchError as error:
        raise RecordError(f"record {path} does not match its schema: {error}") from error
    return tensors, metadata


# --- Schema -----------------------------------------------------------------------------------
# The hash finds accidents, not fields that make no sense. Every field and tensor is checked against
# a table, and tensors against each other, so that a record that is read can be shown and replayed.

Test = Callable[[Any], bool]


class _Field(NamedTuple):
    """What a field of the provenance must be: in words, and as a test."""

    expected: str
    test: Test
    required: bool = True


class _Kind(NamedTuple):
    """What a tensor must be: of these dtypes, shaped like the scores or [B], at least `least`."""

    dtypes: tuple[torch.dtype, ...]
    per_example: bool = False
    required: bool = False
    finite: bool = True
    least: float = -math.inf


def _is(kind: type) -> Test:
    return lambda value: type(value) is kind


def _number(least: float, *kinds: type) -> Test:
    return lambda value: type(value) in kinds and bool(least <= value < math.inf)


def _optional(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list_of(test: Test, least: int = 1) -> Test:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(test, value))


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _span(value: Any) -> bool:
    return _list_of(_COUNT, 2)(value) and len(value) == 2 and bool(value[0] < value[1])


def _layout(value: Any) -> bool:
    letters = isinstance(value, str) and value[:1] == "B" and set(value) <= set(LETTERS)
    return letters and len(set(value)) == len(value) > 1


def _index(value: Any) -> bool:
    if isinstance(value, dict):
        ends = value.get("slice")
        return len(value) == 1 and _list_of(_optional(_INT), 3)(ends) and len(value["slice"]) == 3
    return _INT(value) or value == "..."


def _target(value: Any) -> bool:
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _TARGETS:
        return False
    further = _TARGETS[kind]
    return set(value) == {"kind", *further} and all(t(value[name]) for name, t in further.items())


def _baseline(value: Any) -> bool:
    if not isinstance(value, dict):
        number = type(value) in (int, float) and abs(value) <= sys.float_info.max
        return value is None or number or _text(value)
    if len(value) != 1:
        return False
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return _text(inner)
    return kind in ("tuple", "list") and _list_of(_baseline)(inner)


_INT, _COUNT = _number(-math.inf, int), _number(0, int)
_TARGETS: dict[str, dict[str, Test]] = {
    **{kind: {} for kind in ("scalar", "classes", "predicted", "next_token", "places")},
    "index": {"index": _list_of(_index, 0)},
    "function": {"name": _text},
}
_ROWS = ("alone", "together")
STRATEGY = "way"
"""The key of `Provenance.strategy` in records."""
_FLAG = _Field("true or false", _is(bool))
_NAME = _Field("text that is not empty", _text)
_SIZE = _Field("a whole number, 0 or more", _COUNT)
_FIELDS: dict[str, _Field] = {
    "method": _NAME,
    "parameters": _Field("names and values", _is(dict)),
    "target": _Field(f"a kind, one of {', '.join(_TARGETS)}, and what belongs to it", _target),
    "baseline": _Field("null, a number, a name, or a tuple, list or tensor of these", _baseline),
    "precision": _Field(f"one of {', '.join(PRECISIONS)}", lambda one: one in list(PRECISIONS)),
    "dtype": _Field(
        "the name of a dtype",
        lambda one: _text(one) and isinstance(getattr(torch, one, None), torch.dtype),
    ),
    "device": _NAME,
    "backend": _NAME,
    "versions": _Field(
        "names and texts", lambda one: _is(dict)(one) and all(map(_text, one.values()))
    ),
    "input_sha256": _Field("null or SHA-256s", _optional(_list_of(_sha256))),
    "weights_sha256": _Field("null or a SHA-256", _optional(_sha256)),
    "trained_mode": _FLAG,
    "seconds": _Field("a number, 0 or more", _number(0, int, float)),
    "peak_bytes": _SIZE,
    "peak_measured": _FLAG,
    "points_per_launch": _Field("a whole number, 1 or more", _number(1, int)),
    "halvings": _SIZE,
    "lean": _FLAG._replace(required=False),
    STRATEGY: _Field("text", _is(str), False),
    "region": _Field("null, or a start and a stop per axis", _optional(_list_of(_span)), False),
    "at": _Field("null, or names of layers", _optional(_list_of(_is(str))), False),
    "layer_input": _FLAG._replace(required=False),
    "rows": _Field(f"one of {', '.join(_ROWS)}", lambda one: one in _ROWS, False),
    "layout": _Field(
        "null, or a letter per axis of each input", _optional(_list_of(_optional(_layout))), False
    ),
    "notes": _Field("names and values", _is(dict), False),
}
_FLOAT64, _INT64 = (torch.float64,), (torch.int64,)
TENSORS: dict[str, _Kind] = {
    "scores": _Kind(_FLOAT64, required=True),
    "baseline_scores": _Kind(_FLOAT64),
    "delta": _Kind(_FLOAT64),
    "error": _Kind(_FLOAT64, required=True, finite=False, least=0),
    "classes": _Kind(_INT64, least=0),
    "points": _Kind(_INT64, per_example=True, required=True, least=0),
    "converged": _Kind((torch.bool,), per_example=True),
    "precision_error": _Kind(_FLOAT64, finite=False, least=0),
    "tie_share": _Kind(_FLOAT64, per_example=True, finite=False, least=0),
}
"""The tensors of a record beside its maps, each a field of `Attribution`."""
_MAP = _Kind((torch.float32, torch.float64))


class _MismatchError(Exception):
    """How a record differs from its schema."""


def _need(right: bool, what: str, got: Any, expected: Any) -> None:
    if not right:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise _MismatchError(f"{what}: got {shown}, expected {expected}")


def _check_fields(metadata: Mapping[str, Any]) -> None:
    known = {"schema", "tuple", "provenance"}
    _need(set(metadata) == known, "its fields", sorted(metadata), sorted(known))
    _need(_FLAG.test(metadata["tuple"]), "tuple", metadata["tuple"], _FLAG.expected)
    provenance = metadata["provenance"]
    _need(_is(dict)(provenance), "provenance", provenance, "names and values")
    missing = [name for name, one in _FIELDS.items() if one.required and name not in provenance]
    _need(not missing, "provenance lacks", missing, "all of its fields")
    for name, value in provenance.items():
        _need(name in _FIELDS, "provenance", name, "no such field")
        _need(_FIELDS[name].test(value), name, value, _FIELDS[name].expected)


def _numbered(tensors: Mapping[str, Tensor], prefix: str, what: str) -> list[Tensor]:
    """The tensors `prefix.0`, `prefix.1`, ... in this order; no other has this prefix."""
    names = [name for name in tensors if name.startswith(f"{prefix}.")]
    expected = [f"{prefix}.{number}" for number in range(len(names))]
    _need(set(names) == set(expected), what, names, expected or f"{prefix}.0 and on")
    return [tensors[name] for name in expected]


def _check_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    maps = _numbered(tensors, "values", "its maps")
    _need(maps != [], "its maps", [], "values.0 and on")
    several = metadata["tuple"] or len(maps) == 1
    _need(several, "tuple", metadata["tuple"], f"true for {len(maps)} maps")
    others = [n for n in tensors if not n.startswith(("values.", "kept.", "extras."))]
    _need(set(others) <= set(TENSORS), "its tensors", others, f"of {', '.join(TENSORS)}")
    for name, kind in TENSORS.items():
        _need(not kind.required or name in tensors, "a tensor is missing", name, "to be there")
    shape = tensors["scores"].shape
    right = len(shape) in (1, 2) and tensors["scores"].numel() > 0
    _need(right, "scores", list(shape), "[B] or [B, K]")
    for name in others:
        _check_numbers(name, tensors[name], TENSORS[name])
        like = shape[:1] if TENSORS[name].per_example else shape
        _need(tensors[name].shape == like, name, list(tensors[name].shape), list(like))
    double = metadata["provenance"]["dtype"] == "float64"
    for number, one in enumerate(maps):
        name = f"values.{number}"
        _check_numbers(name, one, _MAP)
        right = one.shape[: len(shape)] == shape and one.numel() > 0
        _need(right, name, list(one.shape), f"{list(shape)} and more axes")
        right = one.dtype == torch.float64 or not double
        _need(right, name, one.dtype, "float64 for float64 inputs")
    for name in (one for one in tensors if one.startswith("extras.")):
        right = tensors[name].shape[:1] == shape[:1]
        _need(right, name, list(tensors[name].shape), f"{shape[0]} examples")


def _check_numbers(name: str, tensor: Tensor, kind: _Kind) -> None:
    _need(tensor.dtype in kind.dtypes, name, tensor.dtype, ", ".join(map(str, kind.dtypes)))
    if kind.finite and tensor.is_floating_point():
        _need(bool(tensor.isfinite().all()), name, "NaN or infinity", "finite numbers")
    # NaN stands for an unknown number and passes.
    below = kind.least > -math.inf and bool((tensor < kind.least).any())
    _need(not below, name, "less than 0", "0 or more")


def _check_references(tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    """Targets, baselines and features against the tensors that they name."""
    kind, batch = provenance["target"]["kind"], tensors["scores"].shape[0]

    def need(name: str, dtype: torch.dtype, dim: int, shape: str) -> None:
        one = tensors.get(f"kept.{name}")
        right = one is not None and (one.dtype, one.dim(), len(one)) == (dtype, dim, batch)
        right = right and one is not None and one.numel() > 0
        _need(right, f"target {kind}", "other tensors", f"kept.{name}, {shape}")

    if kind in ("classes", "predicted", "next_token"):
        _need("classes" in tensors, f"target {kind}", "no classes", "the tensor classes")
    if kind == "next_token":
        need("target.position", torch.int64, 1, "int64 [B]")
        if "kept.target.real" in tensors:
            need("target.real", torch.bool, 2, "bool [B, T]")
    if kind == "places":
        need("target.places", torch.int64, 2, "int64 [B, D]")
    for name in _tensor_names(provenance["baseline"]):
        _need(f"kept.{name}" in tensors, "baseline", name, "the name of a kept tensor")
    features = _numbered(tensors, "kept.features", "its features")
    whole = all(one.dtype == torch.int64 for one in features)
    _need(whole, "its features", "other dtypes", "torch.int64")
    _check_layout(tensors, provenance)


def _check_layout(tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    lead = tensors["scores"].dim()
    layouts = provenance.get("layout")
    maps = _numbered(tensors, "values", "its maps")
    if layouts is not None:
        axes = [1 + one.dim() - lead for one in maps]
        right = len(axes) == len(layouts)
        right = right and all(
            one is None or len(one) == n for one, n in zip(layouts, axes, strict=True)
        )
        _need(right, "layout", layouts, f"{axes} letters")
    region, mask = provenance.get("region"), tensors.get("kept.region.mask")
    sizes = list(maps[0].shape[lead:])
    if layouts and layouts[0] is not None:
        sizes = [sizes[axis - 1] for axis in Axes(layouts[0]).places]
    if region is not None:
        sizes = sizes[-len(region) :]
        inside = len(sizes) == len(region)
        inside = inside and all(b <= n for (_, b), n in zip(region, sizes, strict=True))
        _need(inside, "region", region, f"within {sizes}")
    if mask is not None:
        right = mask.dtype == torch.bool and region is not None and list(mask.shape) == sizes
        _need(right, "kept.region.mask", list(mask.shape), f"bool {sizes}, with a region")


def _tensor_names(baseline: Any) -> list[str]:
    if not isinstance(baseline, dict):
        return []
    if "tensor" in baseline:
        return [baseline["tensor"]]
    return [name for part in next(iter(baseline.values())) for name in _tensor_names(part)]


# --- Targets and baselines --------------------------------------------------------------------


def describe_target(targets: Targets) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON, tensors) from which `restore_target` makes the same target again."""
    if targets.function is not None:
        name = getattr(targets.function, "__qualname__", type(targets.function).__name__)
        return {"kind": "function", "name": name}, {}
    if targets.position is not None:
        kept = {"target.position": targets.position, "target.real": targets.padding.real}
        return {"kind": "next_token"}, {name: one for name, one in kept.items() if one is not None}
    if targets.classes is not None or targets.predicted:
        return {"kind": "predicted" if targets.predicted else "classes"}, {}
    if targets.places is not None:
        return {"kind": "places"}, {"target.places": targets.places}
    if targets.index is None:
        return {"kind": "scalar"}, {}
    mask = {} if targets.mask is None else {"target.mask": targets.mask}
    return {"kind": "index", "index": [_part(one) for one in targets.index]}, mask


def _part(one: Any) -> Any:
    if isinstance(one, slice):
        return {"slice": [one.start, one.stop, one.step]}
    return "..." if one is Ellipsis else one


def restore_target(
    spec: Mapping[str, Any], classes: Tensor | None, many: bool, kept: Mapping[str, Tensor]
) -> Any:
    """The target of a record; raises RecordError for a function, which no record can hold."""
    kind = spec["kind"]
    if kind == "function":
        raise RecordError(
            f"the record's target is the function {spec['name']!r}, which a record cannot hold; "
            "pass it as target=..."
        )
    if kind in ("classes", "predicted", "next_token"):
        assert classes is not None
        found = classes if many else classes.flatten()
        if kind == "next_token":
            return NextToken(found, kept["target.position"], kept.get("target.real"))
        return found
    if kind == "places":
        return [tuple(row) for row in kept["target.places"].tolist()]
    if kind == "index":
        index = tuple(
            slice(*one["slice"]) if isinstance(one, dict) else ... if one == "..." else one
            for one in spec["index"]
        )
        return (*index, kept["target.mask"]) if "target.mask" in kept else index
    return None


def describe_baseline(baseline: Any) -> tuple[Any, dict[str, Tensor]]:
    """(JSON, tensors) of a baseline as the user gave it."""
    kept: dict[str, Tensor] = {}
    return _described(baseline, kept), kept


def _described(one: Any, kept: dict[str, Tensor]) -> Any:
    """JSON of a part of a baseline, whose tensors are added to `kept`."""
    if isinstance(one, Tensor):
        name = f"baseline.{len(kept)}"
        # A copy, since the user may write to the tensor later.
        kept[name] = one.detach().clone()
        return {"tensor": name}
    if isinstance(one, (tuple, list)):
        return {type(one).__name__: [_described(part, kept) for part in one]}
    return one


def restore_baseline(spec: Any, kept: Mapping[str, Tensor], device: torch.device) -> Any:
    """The baseline of a record, with its tensors on `device`."""
    if not isinstance(spec, dict):
        return spec
    if "tensor" in spec:
        return kept[spec["tensor"]].to(device)
    kind = "tuple" if "tuple" in spec else "list"
    parts = [restore_baseline(one, kept, device) for one in spec[kind]]
    return tuple(parts) if kind == "tuple" else parts


# --- Hashes -----------------------------------------------------------------------------------

_LOCK = threading.Lock()
_WEIGHTS: WeakKeyDictionary[nn.Module, WeightsHash] = WeakKeyDictionary()


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of tensors in the order of their names, as docs/record.md has it."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        for part in _parts(tensors[name]):
            if isinstance(part, str):
                found.update(f"{name}:{part}".encode())
            else:
                found.update(f"{name}:{part.dtype}:{list(part.shape)}".encode())
                found.update(_bytes(part))
    return found.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    return digest("", {"": tensor})


class WeightsHash:
    """The SHA-256 of a module's tensors, computed when asked for, or when the module goes."""

    def __init__(self, model: nn.Module, held: list[object]) -> None:
        state = _weights(model)
        self.key, self._held = _places(state), held
        self._found = None if None not in self.key else (_hash_of(state), "")
        self._tensors = [one for one in held if isinstance(one, Tensor)]
        plain = self._found is None and set(map(id, self._tensors)) == set(map(id, state.values()))
        self._plain = plain and all(own_state(one, "") is None for one in below([model]))
        self._counts = _counts(self._tensors) if plain else []
        self._samples = _samples(state) if plain else []
        self._model = weakref.ref(model)
        # Not of this object, which is to go where nobody asks for the hash any more.
        goes = weakref.finalize(model, _before_it_goes, weakref.ref(self), state)
        goes.atexit = False
        weakref.finalize(self, goes.detach).atexit = False

    def holds(self, held: list[object]) -> bool:
        """Whether it is still the hash of the tensors that are `held` by a module's tables."""
        same = self._plain and len(held) == len(self._held) and all(map(is_, held, self._held))
        same = same and _counts(self._tensors) == self._counts
        return same and _sampled(self._samples) == self.key[-1]

    def __call__(self) -> tuple[str | None, str]:
        """The hash, None where contents cannot be read, and a text where they have changed."""
        model = self._model()
        if self._found is None and model is not None:
            self.resolve(_weights(model))
        return self._found or (None, "the model was gone before the hash of its weights was read")

    def resolve(self, state: dict[str, Tensor]) -> None:
        """Computes it from the module's tensors."""
        if self._found is None:
            same = _places(state) == self.key
            changed = "" if same else "the weights have changed between the map and their hash"
            self._found = _hash_of(state), changed


def _before_it_goes(one: weakref.ref[WeightsHash], state: dict[str, Tensor]) -> None:
    wanted = one()
    if wanted is not None:
        wanted.resolve(state)


def weights_sha256(model: Callable[..., Any]) -> str | None:
    """SHA-256 of a module's tensors by name; None for functions and unreadable tensors."""
    found = weights_hash(model)
    return None if found is None else found()[0]


def weights_hash(model: Callable[..., Any]) -> WeightsHash | None:
    """The hash of a module's weights as they are, at once where PyTorch does not count changes."""
    if not isinstance(model, nn.Module):
        return None
    plain = [vars(one) for one in below([model]) if not isinstance(one, torch.jit.ScriptModule)]
    tables = [*chain.from_iterable(map(itemgetter(*TABLES), plain))]
    tensors = [one.values() for one in (*tables[::3], *tables[1::3])]
    held = [*chain.from_iterable(tables), *chain.from_iterable(tensors)]
    with _LOCK:
        known = _WEIGHTS.get(model)
        if known is None or not known.holds(held):
            found = WeightsHash(model, held)
            if known is None or known.key != found.key or None in found.key:
                known = _WEIGHTS[model] = found
    return known


def _counts(tensors: Sequence[Tensor]) -> list[tuple[int, int, torch.Size]]:
    """What tells of tensors that they were replaced in place, or written to."""
    return [(one.data_ptr(), version_of(one), one.shape) for one in tensors]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in _state(model).items() if isinstance(one, Tensor)}


COPIED = 1024**2
"""Bytes of inputs up to which copies are hashed when the hash is asked for."""
SAMPLED = 16
"""Numbers of each tensor that are compared: PyTorch does not count what is written to `.data`, to
memory that NumPy shares, and by batch normalisation."""


def _places(state: dict[str, Tensor]) -> tuple[object, ...]:
    """The memory, versions and some numbers of tensors; None where these do not determine them."""
    places = [_memory(one) for one in state.values()]
    if None in places:
        return (*places,)
    return (tuple(state), *places, _sampled(_samples(state)))


def _samples(state: dict[str, Tensor]) -> list[list[Tensor]]:
    """Views of some of the numbers of each tensor, by their dtype and device."""
    kinds: dict[object, list[Tensor]] = {}
    for one in state.values():
        kinds.setdefault((one.dtype, one.device), []).append(_sample(one))
    return [*kinds.values()]


def _sample(tensor: Tensor) -> Tensor:
    """A view of some of the numbers in a tensor's memory."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * step for size, step in axes) if tensor.numel() else 0
    step = max(1, extent // SAMPLED)
    return tensor.detach().as_strided((-(-extent // step),), (step,))


def _sampled(samples: list[list[Tensor]]) -> bytes:
    return b"".join([_bytes(torch.cat(several)) for several in samples])


def input_hashes(inputs: Sequence[Tensor]) -> Callable[[], list[str]]:
    """The SHA-256 of each input: of large ones computed now, of small ones later, from a copy."""
    if sum(one.nbytes for one in inputs) <= COPIED:
        copies = [one.clone() for one in inputs]
        return lambda: [tensor_sha256(one) for one in copies]
    found = [tensor_sha256(one) for one in inputs]
    return lambda: found


def _hash_of(state: dict[str, Tensor]) -> str | None:
    try:
        return digest("", state)
    except (RuntimeError, NotImplementedError, TypeError):
        # A tensor subclass of the user's: a missing hash must not lose the map.
        return None


def _state(model: nn.Module) -> dict[str, Any]:
    """Parameters, buffers, packed weights, extra state, and constants of frozen TorchScript."""
    found: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if isinstance(model, torch.jit.ScriptModule):
        graph: Any = model.inlined_graph
        for number, node in enumerate(graph.findAllNodes("prim::Constant")):
            if isinstance(node.output().type(), TensorType):
                found[f"constant {number}"] = node.t("value")
        return found
    for name, module in model.named_modules():
        own = own_state(module, f"{name}.")
        if own is not None:
            leaves = tree_leaves([own[key] for key in sorted(own)])
            found |= {f"{name} {number}": one for number, one in enumerate(leaves)}
    return found


def _memory(tensor: Tensor) -> tuple[object, ...] | None:
    """A tensor's memory, view and version; None where these do not determine its contents."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout != torch.strided:
        return None
    if tensor.is_meta or tensor.is_nested or tensor.is_quantized or tensor.is_inference():
        return None
    view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.data_ptr(), *view, version_of(tensor)


_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def _parts(tensor: Tensor) -> Iterator[Tensor | str]:
    """The dense tensors that a tensor consists of, and text that says how."""
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
