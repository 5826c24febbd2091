"""Passes over programs: their order, their listing, and that each gives an equal program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from saliency_fast.graph import opinfo
from saliency_fast.graph.autograd import LEAN
from saliency_fast.graph.passes import listing, pipeline
from tests.model.recording import prepared, record
from tests.models import randn

OPTIONS: dict[str, dict[str, Any]] = {
    "gradients": {},
    "prefix": {"line": True, "channels_last": True},
    "segments": {"segments": 2},
    "half": {"half": torch.bfloat16},
    "scores": {"scores": True, "channels_last": True},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return prepared(
        nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(True)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
        )
    ).float()


def test_names_in_order() -> None:
    names = {key: [one.name for one in pipeline(**options)] for key, options in OPTIONS.items()}
    fusing = ["fold_norm", "fuse_relu"]
    assert names == {
        "gradients": [*fusing, "invariant"],
        "prefix": ["affine_prefix", *fusing, "channels_last", "invariant"],
        "segments": [*fusing, "checkpoint", "invariant"],
        "half": [*fusing, "half"],
        "scores": [*fusing, "channels_last", "scores_only"],
    }


@pytest.mark.parametrize("key", OPTIONS)
def test_listing_shows_the_program_after_each_pass(key: str) -> None:
    passes = pipeline(**OPTIONS[key])
    text = listing(record(model(), randn(2, 3, 32, 32).float()).pruned(), passes)
    parts = text.split("\n\n")
    assert [one.split("\n")[0] for one in parts] == ["recorded", *(one.name for one in passes)]
    assert "%1 = conv2d(%0, float32[16, 3, 3, 3], float32[16]" in parts[0]
    assert "rectified" in parts[1 + [one.name for one in passes].index("fuse_relu")]


@pytest.mark.parametrize("key", [key for key in OPTIONS if key != "prefix"])
def test_each_pass_gives_an_equal_program(key: str) -> None:
    net, x = model(), randn(2, 3, 32, 32).float()
    program, expected = record(net, x).pruned(), net(x).detach()
    for one in pipeline(**OPTIONS[key]):
        program = one.apply(program)
        with torch.no_grad():
            found = program([x.clone()], ())
        close = 2e-2 if key == "half" else 1e-5
        torch.testing.assert_close(found.float(), expected, rtol=close, atol=close)


def test_every_lean_version_is_of_an_operator_in_the_table() -> None:
    without = {"max_pool", "pad", "reflection_pad", "replication_pad", "adaptive_avg_pool"}
    for call in LEAN:
        name = opinfo.name_of(call)
        assert opinfo.info(call) is not opinfo.UNKNOWN or name[:-2] in without, name


def test_a_name_without_underscores_has_one_entry_for_all_its_calls() -> None:
    calls = (torch.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__)
    assert all(opinfo.info(one).kind == "addition" for one in calls)
    assert opinfo.out_of_place(torch.Tensor.add_) == torch.Tensor.add
    assert opinfo.out_of_place(torch.relu_) == torch.relu


def test_rules_register_in_the_fields_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opinfo, "TABLE", dict(opinfo.TABLE))

    def rule() -> None: ...

    opinfo.operators("linear conv2d", crop=rule)
    assert opinfo.info(torch._C._nn.linear).crop is opinfo.info(torch.conv2d).crop is rule
    assert opinfo.info(torch.conv3d).crop is not rule
