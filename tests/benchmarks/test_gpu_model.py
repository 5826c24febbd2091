"""What an input gradient takes on a GPU: counts against those by hand, limits, and comparisons."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_model, tables
from benchmarks.gpu_model import DEVICES, Device, Operator
from benchmarks.models import Attention, Workload
from saliency_fast.graph.passes.fusion import OneCall


def counts(model: nn.Module, x: Tensor, precision: str, **options: Any) -> list[Operator]:
    return gpu_model.counted(gpu_model.recorded(model.eval(), x), 1, precision, **options)


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def test_dense_layers_by_hand() -> None:
    found = counts(dense(), torch.randn(1, 4), "float32", prefix=False)
    products = [one for one in found if one.products]
    # Forward and back through both layers: 2 x 4 x 8 and 2 x 8 x 3 operations.
    assert [one.operations for one in products] == [64, 48, 48, 64]
    # Rows in and rows out, in float32.
    assert [one.bytes for one in products] == [4 * 12, 4 * 11, 4 * 11, 4 * 12]
    # Weights, forward biases too, are read once a launch.
    assert [one.launch_bytes for one in products] == [4 * 40, 4 * 27, 4 * 24, 4 * 32]
    assert {one.kind for one in products} == {"float32"}
    rest: dict[str, float] = {}
    for one in (one for one in found if not one.products):
        rest[one.name] = rest.get(one.name, 0) + one.bytes
    assert {name: size for name, size in rest.items() if size} == {
        "clone": 32,  # four numbers read and written
        "relu_mask_": 65,  # eight in place, and a bit of each
        "sum": 4,
        "select_backward": 12,  # the gradient of three scores, made from one number
        "relu_mask_backward": 65,
        "accumulate": 16,
    }


def test_convolutions_by_hand_in_both_arithmetics() -> None:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1, bias=False))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    x = torch.randn(1, 3, 8, 8)
    first, second = 2 * 8 * 64 * 3 * 9, 2 * 16 * 16 * 8 * 9
    for precision, size, kind in (("float16", 2, "half"), ("tf32", 4, "tf32")):
        found = counts(model, x, precision, prefix=False)
        convolutions = [one for one in found if one.name == "convolution"]
        assert {one.kind for one in convolutions} == {kind}
        assert [one.operations for one in convolutions[:2]] == [first, second]
        # The second's stride: its transpose computes every output from every tap.
        assert [one.operations for one in convolutions[2:]] == [second, first]
        assert [one.bytes for one in convolutions] == [
            size * one for one in ((3 + 8) * 64, 8 * 64 + 16 * 16, 8 * 64 + 16 * 16, (3 + 8) * 64)
        ]
        assert convolutions[0].launch_bytes == size * (3 * 8 * 9 + 8)


def test_the_affine_prefix_is_no_part_of_a_point() -> None:
    stem = nn.Conv2d(3, 4, 7, 4, 3)
    model = nn.Sequential(stem, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3))
    x = torch.randn(1, 3, 32, 32)
    with_stem, without = (
        [one.name for one in counts(model, x, "float16", prefix=prefix)] for prefix in (False, True)
    )
    assert with_stem.count("convolution") == 2
    assert without.count("convolution") == 0


def test_attention_is_one_kernel_each_way() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = Attention(8, 2), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.attention(x).mean(1))
            return out

    for precision, size in (("float16", 2), ("float32", 4)):
        found = counts(Block(), torch.randn(1, 5, 8), precision)
        forward, backward = (one for one in found if one.name.startswith("attention"))
        # Two heads, five tokens against five, four numbers each: two products, and five back.
        assert forward.operations == 2 * 2 * (2 * 5 * 5 * 4)
        assert backward.operations == 5 * 2 * (2 * 5 * 5 * 4)
        assert forward.bytes == 4 * 40 * size
        assert backward.bytes == 8 * 40 * size
        assert forward.kind == ("half" if size == 2 else "float32")


def test_depthwise_convolutions_have_no_tensor_cores() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(), nn.Linear(512, 3))
    found = counts(model, torch.randn(1, 8, 8, 8), "float16", prefix=False)
    depthwise = [one for one in found if one.name == "convolution"]
    assert [one.operations for one in depthwise] == [2 * 8 * 64 * 9] * 2
    assert {one.kind for one in depthwise} == {"float32"}


def test_an_expanded_tensor_is_read_once() -> None:
    x = torch.zeros(3, 1, 5)
    assert gpu_model.touched_bytes(x) == 60
    assert gpu_model.touched_bytes(x.expand(3, 7, 5)) == 60
    assert gpu_model.touched_bytes(x[:0]) == 0


def test_switches_by_hand() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(8, 8, 1)
            self.second, self.head = nn.Conv2d(8, 8, 1), nn.Linear(512, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            out: Tensor = self.head((self.second(x) + x * 2).relu().flatten(1))
            return out

    x, bits = torch.randn(1, 8, 8, 8), 512 / 8
    rows = {}
    for on in (False, True):
        one_call = OneCall(relu=on, residual_relu=on)
        found = counts(Block(), x, "float16", prefix=False, one_call=one_call)
        rows[on] = [one for one in found if one.name != "_to_copy"]
        names = ("convolution", "convolution_relu", "relu_mask", "relu_mask_", "pack_mask")
        by = {name: [one.bytes for one in rows[on] if one.name == name] for name in names}
        if on:
            # Input, output, and what is added; the transposes as before.
            assert by["convolution_relu"] == [2 * 1024, 3 * 1024]
            assert by["pack_mask"] == [1024 + bits] * 2
            assert by["convolution"] == [2 * 1024] * 2
            assert not by["relu_mask"] + by["relu_mask_"]
        else:
            assert by["convolution"] == [2 * 1024] * 4
    # Each ReLU was read and written once more.
    moved = [sum(one.bytes for one in rows[on]) for on in (False, True)]
    assert moved[0] - moved[1] == 2 * 1024
    assert len(rows[False]) == len(rows[True])


def test_layer_norms_of_sums_by_hand() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y = y + self.first(y)
            out: Tensor = self.second(self.norm(y)) + y.mean()
            return out

    one_call = OneCall(layer_norm=True)
    found = counts(Block(), torch.randn(1, 5, 8), "float16", prefix=False, one_call=one_call)
    by = {one.name: one.bytes for one in found if one.name.startswith("add_layer_norm")}
    # float32 and float16 in, both out, and two numbers a token; both gradients of each.
    assert by["add_layer_norm"] == 40 * (4 + 2 + 4 + 2) + 5 * 8
    assert by["add_layer_norm_backward"] == 40 * (2 + 4 + 4 + 4 + 2) + 5 * 8


def test_the_slower_of_operations_and_bytes_counts() -> None:
    device = Device("a GPU", half=100.0, tf32=50.0, float32=10.0, bandwidth=20.0)
    operator = Operator("mm", operations=200.0, bytes=10.0, launch_bytes=40.0, kind="half")
    assert operator.seconds(device, 4, reached=False) == 2.0
    assert Operator("add", 0.0, 10.0, 40.0).seconds(device, 4, reached=False) == 1.0
    slower = operator.seconds(device, 4, reached=True)
    assert slower == 2.0 / gpu_model.REACHED_OPERATIONS


def test_rows_tables_and_what_was_measured(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    workload = Workload("tiny", dense, (4,), 1)
    monkeypatch.setattr(gpu_model, "NETWORKS", {"Tiny": lambda: workload})
    monkeypatch.setattr(gpu_model, "SWITCHED", ("Tiny",))
    monkeypatch.setattr(sys, "argv", ["gpu_model", "--out", str(tmp_path)])
    gpu_model.main()
    document = json.loads((tmp_path / "gpu-model.json").read_text())
    assert [row["precision"] for row in document["rows"]] == list(gpu_model.KINDS)
    for row in document["rows"]:
        for device in DEVICES:
            about = row["devices"][device.name]
            assert about["predicted"] < about["in_turn"] <= 1.0001 * about["limit"]
            by_bytes = (row["bytes"] + row["launch_bytes"] / gpu_model.ROWS) / device.bandwidth
            assert about["limit"] <= 1.0001 / by_bytes
    text = tables.table("gpu-model", tmp_path)
    assert text == (tmp_path / "gpu-model.md").read_text()
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {14}
    assert (tmp_path / "gpu-model-switches.md").read_text() == gpu_model.switched(document)
    # Dense layers have nothing that a switch changes.
    assert [one["switch"] for one in document["switches"]] == ["off"] * 2
    predicted = document["rows"][0]["devices"]["H200"]["predicted"]
    row = {"workload": "tiny", "contender": "saliency_fast, float16", "reason": None}
    rows = [row | {"gradients_per_second": share * predicted} for share in (0.1, 0.5)]
    measured = {"setting": {"device": "NVIDIA H200"}, "rows": [*rows, row]}
    (tmp_path / "end-to-end-gpu.json").write_text(json.dumps(measured))
    given = ["--measured", str(tmp_path / "end-to-end-gpu.json")]
    monkeypatch.setattr(sys, "argv", ["gpu_model", "--out", str(tmp_path), *given])
    gpu_model.main()
    assert "| 50% |" in capsys.readouterr().out
    measured["setting"]["device"] = "NVIDIA T4"
    with pytest.raises(ValueError, match="expected one of A100"):
        gpu_model.compared(document, measured)


def test_the_written_table_is_near_what_others_count() -> None:
    document = json.loads((gpu_model.RESULTS / "gpu-model.json").read_text())
    found = {(one["network"], one["precision"]): one for one in document["rows"]}
    assert len(found) == 12
    # Twice the published operations of a forward pass: 4.1, 17.6 and 4.5 G multiply-adds.
    for network, forward in (("ResNet-50", 4.1e9), ("ViT-B/16", 17.6e9), ("ConvNeXt-T", 4.5e9)):
        for precision in gpu_model.KINDS:
            assert found[network, precision]["operations"] == pytest.approx(4 * forward, rel=0.06)
