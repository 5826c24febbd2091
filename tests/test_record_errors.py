"""Records that are not what was written are refused, whatever was done to them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import saliency_fast as sf
from saliency_fast.errors import RecordError
from saliency_fast.record import KEY, SCHEMA

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = sf.explain(lambda x: x.square().sum(1), X, method=sf.IntegratedGradients(steps=3))
    return found.save(tmp_path / "record.safetensors")


def refused(path: Path, *words: str) -> None:
    with pytest.raises(RecordError) as caught:
        sf.load(path)
    assert isinstance(caught.value, ValueError)
    for word in (path.name, *words):
        assert word in str(caught.value)


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, as JSON, and the bytes of its tensors."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def join(path: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_a_record_written_again_from_its_parts_is_read(path: Path) -> None:
    # A copy: what is loaded is mapped from the file.
    before = sf.load(path).values.clone()
    join(path, *split(path))
    assert torch.equal(sf.load(path).values, before)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.95, 0.9999])
def test_truncated(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "truncated or not a safetensors file")


@pytest.mark.parametrize("text", ["", "attribution", "PK" + 100 * "x", "{}"])
def test_not_safetensors(path: Path, text: str) -> None:
    path.write_text(text)
    refused(path, "not a safetensors file")


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.safetensors", "does not exist")


def test_a_folder(tmp_path: Path) -> None:
    refused(tmp_path, "not a safetensors file")


def test_safetensors_of_another_origin(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"values.0": X}, str(path), metadata={"format": "pt"})
    refused(path, "no 'saliency_fast' metadata", "['format']", "Attribution.save")


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, None, str(SCHEMA)])
def test_another_schema(path: Path, schema: object) -> None:
    header, body = split(path)
    inner = json.loads(header["__metadata__"][KEY]) | {"schema": schema}
    header["__metadata__"][KEY] = json.dumps(inner)
    join(path, header, body)
    refused(path, "another schema", f"got {schema!r}", f"expected {SCHEMA}", "version")


def rename(header: dict[str, Any]) -> None:
    header["delta"], header["scores"] = header["scores"], header["delta"]


def reshape(header: dict[str, Any]) -> None:
    header["values.0"]["shape"].reverse()


def retype(header: dict[str, Any]) -> None:
    header["points"]["dtype"] = "F64"


def remove_hash(header: dict[str, Any]) -> None:
    del header["__metadata__"]["sha256"]


def edit(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        text = header["__metadata__"][KEY]
        assert old in text
        header["__metadata__"][KEY] = text.replace(old, new)

    return change


@pytest.mark.parametrize(
    "change",
    [
        rename,
        reshape,
        retype,
        remove_hash,
        edit('"steps": 3', '"steps": 4'),
        edit("integrated_gradients", "smoothgrad"),
        edit('"trained_mode": false', '"trained_mode": true'),
        edit('"steps": 3', '"steps": three'),
        edit("{", ""),
    ],
)
def test_altered_metadata(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, body = split(path)
    change(header)
    join(path, header, body)
    refused(path)


def test_an_altered_tensor(path: Path) -> None:
    header, body = split(path)
    for place in range(len(body)):
        join(path, header, body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
        refused(path, "altered")


def test_any_altered_byte_is_refused_or_without_effect(path: Path) -> None:
    """Alignment padding and other metadata that a record does not use may change."""
    whole, before = path.read_bytes(), sf.load(path)
    values, kept = before.values.clone(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = sf.load(path)
        except RecordError:
            continue
        kept += 1
        assert found.provenance == before.provenance
        assert torch.equal(found.values, values)
    assert kept < 16


def test_a_loaded_record_keeps_its_numbers_when_its_file_is_written_again(path: Path) -> None:
    found = sf.load(path)
    values = found.values.clone()
    sf.explain(lambda x: x.sum(1), X + 1.0, method="gradient").save(path)
    assert torch.equal(found.values, values)
