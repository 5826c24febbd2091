"""The helpers that judge fast ops must themselves refuse what is wrong."""

from __future__ import annotations

import pytest
import torch
from checking import (
    EXACT,
    FEW_ROUNDINGS,
    assert_close,
    assert_close_to_reference,
    assert_levels,
    copied,
    mutated,
    relative_l2,
    results,
)

from saliency_fast.ops import OPS, Sample


def test_relative_l2_is_a_share_of_the_norm() -> None:
    want = torch.tensor([3.0, 4.0])
    assert relative_l2(want + torch.tensor([0.0, 0.5]), want) == pytest.approx(0.1)
    assert relative_l2(torch.ones(1), torch.zeros(1)) == 1.0
    assert relative_l2(torch.tensor([torch.nan]), torch.ones(1)) != 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a + 1e-5, "largest error"),
        (lambda a: torch.where(torch.arange(a.numel()) == 7, torch.nan, a), "largest error"),
        (lambda a: a * (1 + 4e-7), "relative L2"),
    ],
)
def test_close_refuses(change, says: str) -> None:
    want = torch.linspace(-1, 1, 1000)
    assert_close(want, want, FEW_ROUNDINGS, "here")
    with pytest.raises(AssertionError, match=f"here: {says}"):
        assert_close(change(want), want, FEW_ROUNDINGS, "here")


def test_exact_refuses_one_unit_and_not_a_number() -> None:
    want = torch.ones(3)
    for wrong in (torch.nextafter(want, 2 * want), torch.full((3,), torch.nan)):
        with pytest.raises(AssertionError, match="bit for bit"):
            assert_close(wrong, want, EXACT, "here")


def test_levels_refuse_two_levels_and_many_single_ones() -> None:
    want = torch.full((5000,), 9, dtype=torch.uint8)
    one = want.clone()
    one[3] += 1
    assert_levels(one, want, "here")
    with pytest.raises(AssertionError, match="levels off"):
        assert_levels(one + one - want, want, "here")
    with pytest.raises(AssertionError, match="too many"):
        assert_levels(want + 1, want, "here")


def test_results_leave_the_sample_alone_and_list_changed_arguments() -> None:
    op = OPS["accumulate"]
    sample = next(iter(op.samples()))
    before = sample.args[0].clone()
    assert mutated(op) == [0]
    (total,) = results(op, sample, op.reference)
    assert torch.equal(sample.args[0], before)
    assert not torch.equal(total, before)


def test_copies_keep_strides() -> None:
    x = torch.randn(2, 6, 4, 3).permute(0, 3, 1, 2)
    (copy,) = copied(Sample((x,)))
    assert copy.stride() == x.stride()
    assert torch.equal(copy, x)


def test_reference_comparison_refuses_shape_dtype_count_and_value() -> None:
    op = OPS["line_points"]
    sample = list(op.samples())[4]
    (good,) = results(op, sample, op.reference)
    assert_close_to_reference(op, sample, [good])
    late = good.clone()
    late.view(-1)[-1] += 1e-3
    for wrong, says in (
        ([good[:-1]], "shape"),
        ([good.double()], "float64"),
        ([good, good], "2 results"),
        ([late], "largest error"),
    ):
        with pytest.raises(AssertionError, match=says):
            assert_close_to_reference(op, sample, wrong)
