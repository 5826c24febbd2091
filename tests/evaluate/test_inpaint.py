"""Inpainting against a sparse solver and Quantus."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.metrics import inpaint as module
from saliency_fast.evaluate.metrics.inpaint import inpaint
from tests.evaluate import naive_faithfulness as naive
from tests.models import randn

SOLVED = 1e-6
"""A relative residual of 1e-8 times the condition of these systems, which is up to 100."""


def holes(*size: int, share: float, seed: int = 0, wide: bool = False) -> Tensor:
    """Missing places, bool: the share of them where noise is largest, or smooth noise."""
    noise = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    if wide:
        for axis, length in enumerate(size[1:], start=1):
            steps = range(-(length // 3), length // 3 + 1)
            noise = torch.stack([noise.roll(step, axis) for step in steps]).mean(0)
    rows = noise.flatten(1)
    order = rows.argsort(1, descending=True)[:, : int(share * rows.shape[1])]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).view(size)


CASES = [
    # spatial size, share that is missing, in wide holes
    ((9,), 0.5, False),
    ((31,), 0.9, True),
    ((12, 12), 0.3, False),
    ((13, 18), 0.9, False),
    ((16, 21), 0.9, True),
    ((1, 14), 0.7, False),
    ((17, 2), 0.95, True),
    ((30, 30), 0.98, False),
    ((5, 6, 7), 0.6, False),
    ((8, 7, 6), 0.9, True),
]


@pytest.mark.parametrize(("size", "share", "wide"), CASES)
def test_against_a_sparse_solver(size: tuple[int, ...], share: float, wide: bool) -> None:
    x = randn(2, 3, *size)
    missing = holes(2, *size, share=share, wide=wide)
    found = inpaint(x, missing)
    for row in range(2):
        want = naive.inpainted(x[row], missing[row])
        assert (found[row] - want).abs().max() < SOLVED * x.abs().max()
        kept = ~missing[row]
        assert torch.equal(found[row][:, kept], x[row][:, kept])


def test_against_quantus() -> None:
    from quantus.functions.perturb_func import noisy_linear_imputation

    x, missing = randn(1, 2, 20, 17), holes(1, 20, 17, share=0.8)
    flat = missing.flatten().nonzero().flatten().numpy()
    want = torch.from_numpy(noisy_linear_imputation(x[0].numpy(), flat, noise=0.0))
    assert (inpaint(x, missing)[0] - want).abs().max() < SOLVED


def test_float32_and_scale() -> None:
    x, missing = randn(2, 1, 15, 15), holes(2, 15, 15, share=0.9, wide=True)
    want = inpaint(x, missing)
    found = inpaint(x.float(), missing)
    assert found.dtype == torch.float32
    assert (found - want).abs().max() < 1e-5 * x.abs().max()
    for scale in (1e-30, 1e30):
        assert (inpaint(scale * x, missing) / scale - want).abs().max() < SOLVED


def test_nothing_and_everything_missing() -> None:
    x = randn(3, 2, 6, 5)
    missing = torch.zeros(3, 6, 5, dtype=torch.bool)
    missing[1], missing[2, 3] = True, True
    found = inpaint(x, missing)
    assert torch.equal(found[0], x[0])
    mean = x[1].mean((1, 2), keepdim=True).expand_as(x[1])
    assert (found[1] - mean).abs().max() < 1e-12
    assert (found[2] - naive.inpainted(x[2], missing[2])).abs().max() < SOLVED


def test_constants_stay() -> None:
    x, missing = torch.full((1, 1, 12, 12), 0.7), holes(1, 12, 12, share=0.9)
    assert torch.equal(inpaint(x, missing), x)


def test_no_row_depends_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, missing = randn(4, 2, 11, 9), holes(4, 11, 9, share=0.7)
    together = inpaint(x, missing)
    for row in range(4):
        alone = inpaint(x[row : row + 1], missing[row : row + 1])
        assert (together[row] - alone[0]).abs().max() < 1e-9
    monkeypatch.setitem(module.ELEMENTS, "cpu", 250)
    assert (together - inpaint(x, missing)).abs().max() < 1e-9


def test_one_hole_for_all() -> None:
    x, missing = randn(3, 1, 8, 8), holes(1, 8, 8, share=0.5)
    assert (inpaint(x, missing) - inpaint(x, missing.expand(3, 8, 8))).abs().max() < 1e-9


def test_iterations_do_not_grow_with_the_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []
    shorter = module._shorter

    def counted(fine: Tensor) -> Tensor:
        # Each cycle restricts the field of the finest grid once; so do nine probes of the stencil.
        solved.append(fine.shape[-1] == 224)
        return shorter(fine)

    monkeypatch.setattr(module, "_shorter", counted)
    inpaint(randn(1, 1, 224, 224), holes(1, 224, 224, share=0.9, wide=True))
    assert sum(solved) - 9 < 30


def test_errors() -> None:
    missing = torch.zeros(2, 4, 4, dtype=torch.bool)
    with pytest.raises(InputError, match="axes behind the channels"):
        inpaint(randn(2, 4), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(InputError, match=r"missing must be \[3, 4, 4\]"):
        inpaint(randn(3, 1, 4, 4), missing)
    with pytest.raises(InputTypeError, match="missing bool"):
        inpaint(randn(2, 1, 4, 4), missing.float())
