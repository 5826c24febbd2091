"""Private interfaces of PyTorch: all are there in the release that the tests run on, and fallbacks
give the same numbers.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saliency_fast import _torch_compat as compat


def test_every_interface_is_there() -> None:
    optional = [name for name in vars(compat) if name.startswith("_") and name[1:2].islower()]
    names = {"_safe_softmax", "_cpu_attention", "_set_versions", "_is_wrapped", "_interpreter"}
    assert names < set(optional)
    assert all(getattr(compat, name) is not None for name in names | {"_clear"})
    own = vars(nn.Linear(2, 1))
    assert all(name in own for name in (*compat.TABLES, compat.TRANSIENT))


def test_versions_can_be_set() -> None:
    x = torch.zeros(2)
    x += 1
    assert compat.version_of(x) == 1
    compat.set_version(x, 0)
    assert compat.version_of(x) == 0


def test_softmax_without_the_private_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0, 1], logits[1, 2, :2] = -torch.inf, -torch.inf
    expected = compat.softmax_of_masked(logits)
    monkeypatch.setattr(compat, "_safe_softmax", None)
    assert torch.allclose(compat.softmax_of_masked(logits), expected, rtol=1e-15)
    assert not expected[0, 1].any()


def test_attention_without_the_kernel_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = compat.cpu_attention(x, x, x, is_causal=True)
    monkeypatch.setattr(compat, "_cpu_attention", None)
    assert torch.allclose(compat.cpu_attention(x, x, x, is_causal=True), expected, rtol=1e-12)


def test_transforms_are_left() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        assert compat.is_of_transform(x)
        with compat.outside_transforms():
            assert not compat.is_of_transform(torch.ones(2))
        return x * 2

    assert torch.equal(torch.func.vmap(doubled)(torch.ones(3, 2)), torch.full((3, 2), 2.0))


def test_error_texts() -> None:
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    y.mul_(2)
    with pytest.raises(RuntimeError) as caught:
        y.sum().backward()
    assert compat.ErrorText.OVERWRITTEN.of(caught.value)
    assert compat.ErrorText.IN_PLACE.of(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2).sum().backward()
    assert compat.ErrorText.NO_GRADIENT.of(caught.value)
