"""Records whose hash is right and whose fields or tensors lie: refused, or usable in every way."""

from __future__ import annotations

import copy
import json
import random
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast import record
from saliency_fast.errors import RecordError, SaliencyError
from tests.traces import one_thread

BOX = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, -1, 1, 2, 1e308, float("nan"), float("inf"), -0.5])
    | st.sampled_from(["", "x", "float32", "cpu", "classes", "places", "index", "...", "0" * 64])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["kind", "tensor", "tuple", "slice", "index", "a"]), inner
        )
    ),
    max_leaves=4,
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))


X = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, dict[str, Any]] = {
    "classes": {"target": [0, 2], "method": sf.IntegratedGradients(steps=3)},
    "several": {"target": [[0, 1], [2, 0]], "method": sf.SmoothGrad(samples=2)},
    "places": {"target": [(0,), (1,)], "baseline": torch.ones_like(X), "method": "gradient_shap"},
    "tolerance": {"target": 1, "method": sf.IntegratedGradients(steps=3, tolerance=0.5)},
    "index": {"target": (slice(0, 2),), "baseline": [0.0, "mean"], "region": [(1, 4), (2, 6)]},
    "features": {"target": "predicted", "method": sf.FeatureAblation(), "features": "grid:3"},
    "layer": {"target": 1, "method": sf.GradCAM("0")},
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], Any]]:
    folder, found = tmp_path_factory.mktemp("records"), []
    for number, (name, call) in enumerate(CALLS.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = sf.explain(net(), X, **call).save(folder / f"{number}.safetensors")
        found.append(record.read(path))
        assert sf.replay(path, net(), X), name
    return found


def rewritten(path: Path, tensors: dict[str, Tensor], metadata: Any) -> Path:
    """A record of any contents, with the hash that belongs to them."""
    stored = {name: one.contiguous() for name, one in tensors.items()}
    text = json.dumps(metadata)
    header = {record.KEY: text, "sha256": record.digest(text, stored)}
    path.write_bytes(save(stored, metadata=header))
    return path


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    if isinstance(value, dict):
        found += [one for name, part in value.items() for one in places(part, (*at, name))]
    elif isinstance(value, list):
        found += [one for n, part in enumerate(value) for one in places(part, (*at, n))]
    return found


def put(metadata: Any, at: tuple[Any, ...], value: Any, gone: bool) -> Any:
    if not at:
        return value
    inner = metadata
    for step in at[:-1]:
        inner = inner[step]
    if gone:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return metadata


DTYPES = (torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8, torch.float16)


def spoilt(one: Tensor, way: int, draw: random.Random) -> Tensor:
    if way == 0:
        return one.to(draw.choice(DTYPES))
    if way == 1:
        return one.flatten()[: draw.randint(0, one.numel())]
    if way == 2:
        return one[None] if draw.random() < 0.5 or one.dim() == 0 else one[:1]
    if way == 3:
        return torch.full_like(one.double(), draw.choice([float("nan"), float("inf"), -1.0])).to(
            one.dtype if one.is_floating_point() else torch.float64
        )
    return one.mT.contiguous() if one.dim() > 1 else one.sum()


def usable(path: Path) -> bool:
    """Whether a record is read, and what is asked of it then fails by our own errors alone."""
    try:
        found = sf.load(path)
    except RecordError:
        return False
    assert repr(found)
    for call in (found.map, lambda: found.overlay(X), lambda: sf.replay(found, net(), X)):
        with suppress(SaliencyError):
            call()
    return True


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_lies(records: Any, tmp_path: Path, data: st.DataObject) -> None:
    tensors, metadata = records[data.draw(st.integers(0, len(records) - 1))]
    tensors, metadata = dict(tensors), copy.deepcopy(metadata)
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()):
            at = data.draw(st.sampled_from(places(metadata)))
            if at != ("schema",):
                metadata = put(metadata, at, data.draw(BOX), at != () and data.draw(st.booleans()))
            if not isinstance(metadata, dict):
                break
        else:
            name = data.draw(st.sampled_from(sorted(tensors)))
            way, draw = data.draw(st.integers(0, 6)), data.draw(st.randoms())
            one = tensors.pop(name)
            if way == 5:
                tensors[draw.choice(["values.7", "scores", "kept.a", "b"])] = one
            elif way < 5:
                tensors[name] = spoilt(one, way, draw)
            if not tensors:
                break
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usable(rewritten(tmp_path / "lies.safetensors", tensors, metadata))


REFUSED: dict[str, Any] = {
    "seconds": "long",
    "peak_bytes": -1,
    "points_per_launch": 0,
    "halvings": True,
    "precision": "float8",
    "dtype": "cat",
    "versions": {"torch": 2},
    "input_sha256": ["0"],
    "weights_sha256": 5,
    "target": {"kind": "any"},
    "baseline": {"tensor": "baseline.9"},
    "region": [[3, 1], [0, 2]],
    "at": "layer",
    "way": None,
    "notes": [],
    "method": "",
    "parameters": None,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_lies_is_named(records: Any, tmp_path: Path, name: str) -> None:
    tensors, metadata = records[0]
    metadata = copy.deepcopy(metadata)
    metadata["provenance"][name] = REFUSED[name]
    path = rewritten(tmp_path / "lies.safetensors", tensors, metadata)
    with pytest.raises(RecordError, match=rf"(?s){path.name}.*{name}.*got .*expected"):
        sf.load(path)


@pytest.mark.parametrize("name", ["values.0", "scores", "error", "points", "classes"])
@pytest.mark.parametrize("way", ["missing", "empty", "nan", "dtype", "shape"])
def test_a_tensor_that_lies_is_named(records: Any, tmp_path: Path, name: str, way: str) -> None:
    tensors, metadata = records[0]
    tensors = dict(tensors)
    one = tensors.pop(name)
    changed = {
        "empty": one[:0],
        "nan": one.float() * torch.nan,
        "dtype": one.half(),
        "shape": one.flatten().repeat(3),
    }
    if way != "missing":
        tensors[name] = changed[way]
    path = rewritten(tmp_path / "lies.safetensors", tensors, metadata)
    with pytest.raises(RecordError, match="expected"):
        sf.load(path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"a"', "[[1, 2]]", "[" * 5000])
def test_metadata_that_is_no_object(records: Any, tmp_path: Path, text: str) -> None:
    tensors, _ = records[0]
    header = {record.KEY: text, "sha256": record.digest(text, tensors)}
    path = tmp_path / "lies.safetensors"
    path.write_bytes(save(tensors, metadata=header))
    with pytest.raises(RecordError):
        sf.load(path)
