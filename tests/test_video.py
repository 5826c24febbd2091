"""Long clips and series in windows: averages, smoothing over time and what it is told to cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saliency_fast as sf
from saliency_fast.errors import InputError
from tests.models import Video, make, randn
from tests.naive import relative_l2

FLOAT64 = 1e-12


CLIP = randn(2, 2, 13, 7, 6)


def test_windows_are_averaged() -> None:
    model = make(Video)
    method = sf.IntegratedGradients(5)
    found = sf.explain_video(model, CLIP, 5, 3, target=1, method=method)
    assert found.starts == (0, 3, 6, 8)
    total, seen = torch.zeros_like(CLIP), torch.zeros(13)
    for number, start in enumerate(found.starts):
        part = CLIP[:, :, start : start + 5].contiguous()
        one = sf.explain(model, part, target=1, method=method)
        total[:, :, start : start + 5] += one.values
        seen[start : start + 5] += 1
        torch.testing.assert_close(found.scores[:, number], one.scores)
    assert relative_l2(found.values, total / seen.view(-1, 1, 1)) < FLOAT64
    assert not bool(found.change.any())
    assert found.windows.values.shape == (8, 2, 5, 7, 6)


def test_targets_baselines_and_arguments_follow_their_examples() -> None:
    inner = make(Video)

    def model(x: Tensor, scale: Tensor) -> Tensor:
        return inner(x) * scale[:, None]

    scale, start = torch.tensor([1.0, -2.0]).double(), randn(2, 2, 13, 7, 6, seed=3)
    # Of several targets, nodes are those of all.
    fixed = sf.IntegratedGradients(rule="midpoint")
    both = sf.explain_video(
        *(model, CLIP, 5),
        target=[1, 3],
        baseline=start,
        method="integrated_gradients",
        forward_args=(scale,),
    )
    many = sf.explain_video(
        *(model, CLIP, 5),
        target=[[0, 1], [2, 3]],
        baseline=start,
        method=fixed,
        forward_args=(scale,),
        coherence=1.5,
    )
    assert many.values.shape == (2, 2, 2, 13, 7, 6)
    assert many.scores.shape == (2, 5, 2)
    for i, k in enumerate((1, 3)):
        one = slice(i, i + 1)
        about = {"target": k, "baseline": start[one], "method": fixed, "coherence": 1.5}
        alone = sf.explain_video(inner, CLIP[one], 5, **about)
        plain = sf.explain_video(inner, CLIP[one], 5, target=k, baseline=start[one])
        assert relative_l2(both.values[i], plain.values[0] * scale[i]) < FLOAT64
        assert relative_l2(many.values[i, 1], alone.values[0] * scale[i]) < FLOAT64


def test_series() -> None:
    x = randn(2, 11, 3)

    def model(z: Tensor) -> Tensor:
        return (z**3).sum((1, 2))

    engine = sf.Engine(model, "gradient")
    found = sf.explain_video(engine, x, 4, 2, axis=1)
    assert relative_l2(found.values, 3 * x**2) < FLOAT64
    assert found.starts == (0, 2, 4, 6, 7)


class TestCoherence:
    def test_sums_over_time_stay(self) -> None:
        weight = randn(2, 2, 13, 7, 6, seed=5)
        found = sf.explain_video(
            *(lambda z, own: (z * own).flatten(1).sum(1), CLIP, 13),
            method="gradient",
            coherence=2.0,
            forward_args=(weight,),
        )
        torch.testing.assert_close(found.values.sum(2), weight.sum(2), rtol=1e-12, atol=1e-13)
        change = (found.values - weight).flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(found.change, change)
        before = torch.diff(weight, dim=2).flatten(1).abs().mean(1)
        before /= weight.flatten(1).abs().mean(1)
        torch.testing.assert_close(found.flicker[:, 0], before)
        assert bool((found.flicker[:, 1] < 0.5 * found.flicker[:, 0]).all())
        assert found.coherence == 2.0

    def test_its_width_where_the_clip_stands_still(self) -> None:
        still = randn(1, 2, 1, 3, 3).expand(1, 2, 61, 3, 3).contiguous()
        # The map is one frame's: what becomes of it is the kernel.
        found = sf.explain_video(
            lambda z: z[:, :, 30].flatten(1).sum(1), still, 61, method="gradient", coherence=3.0
        )
        kernel = found.values[0, 0, :, 0, 0]
        frame = torch.arange(61).double() - 30
        assert float((kernel * frame**2).sum()) == pytest.approx(9.0, rel=1e-9)
        assert bool((kernel >= 0).all())

    def test_cuts_keep_maps_apart(self) -> None:
        clip = torch.zeros(1, 1, 12, 2, 2).double()
        clip[:, :, 6:] = 1.0
        found = sf.explain_video(
            lambda z: z[:, :, :6].flatten(1).sum(1), clip, 12, method="gradient", coherence=2.0
        )
        # One cut in eleven changes: its own square is eleven times the usual one.
        assert float(found.values[0, 0, 6:].sum()) < 0.01 * float(found.values.sum())
        blurred = sf.explain_video(
            *(lambda z: z[:, :, :6].flatten(1).sum(1), torch.zeros_like(clip), 12),
            method="gradient",
            coherence=2.0,
        )
        assert float(blurred.values[0, 0, 6:].sum()) > 0.1 * float(blurred.values[0, 0].sum())


def test_what_is_refused() -> None:
    model = make(Video)
    for fields, message in (
        ({"window": 20}, "window must be from 1 to the clip's 13 frames: got 20"),
        ({"window": 5, "stride": 6}, "stride must be from 1 to the window's 5 frames: got 6"),
        ({"window": 5, "stride": 0}, "stride must be from 1"),
        ({"window": 5, "coherence": -1.0}, "coherence is a width in frames"),
        ({"window": 5, "axis": 0}, "axis must be one behind the batch"),
    ):
        with pytest.raises(InputError, match=message):
            sf.explain_video(model, CLIP, target=1, **fields)
    with pytest.raises(InputError, match="an Engine has its own options: got lean"):
        sf.explain_video(sf.Engine(model), CLIP, 5, target=1, lean=False)
