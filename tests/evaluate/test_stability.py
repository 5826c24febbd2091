"""Stability against loops, and for maps whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError
from saliency_fast.evaluate.controls import centre_map, edge_detector, random_map
from saliency_fast.evaluate.maps import ssim
from saliency_fast.evaluate.metrics.robustness import Stability, noisy, shifted
from saliency_fast.zoo import digits_cnn, held_out
from tests.evaluate.naive_robustness import spearman
from tests.traces import Net, one_thread, unchanged


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


class Sums(nn.Module):
    """Two scores that no small change reverses."""

    def forward(self, x: Tensor) -> Tensor:
        total = (x * x).flatten(1).sum(1)
        return torch.stack([total + 1e3, total], 1)


def of(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 3, 12, 10), (2, 1, 16), (2, 2, 8, 8, 9), (3, 7)])
def test_like_the_loop(shape: tuple[int, ...]) -> None:
    x = of(shape)
    metric = Stability(noise_level=0.1, samples=2, shifts=(2,), seed=3)
    layout = {2: "BF", 3: "BCT", 4: "BCHW", 5: "BCDHW"}[x.dim()]
    found = metric(Sums(), x, x * x, target=0, method="input_x_gradient", layout=layout)
    # The gradient of a square times the input is twice the square.
    maps = (x * x).sum(1) if x.dim() > 2 else x * x
    spread = 0.1 * torch.stack([one.max() - one.min() for one in x])
    noise, shift = [[] for _ in x], [[] for _ in x]
    for sample in range(2):
        copy = noisy(x, spread, sample, "gaussian", 3)
        again = (copy * copy).sum(1) if x.dim() > 2 else copy * copy
        for b in range(len(x)):
            noise[b].append(spearman(maps[b], again[b]))
    for axis in range(2, x.dim()):
        size = x.shape[axis]
        for by in (2, -2):
            for b in range(len(x)):
                copy = torch.stack(
                    [x[b].select(axis - 1, max(0, min(size - 1, p - by))) for p in range(size)],
                    axis - 1,
                )
                again = (copy * copy).sum(0)
                inner = range(2, size - 2)
                one = torch.stack([maps[b].select(axis - 2, p) for p in inner])
                other = torch.stack([again.select(axis - 2, p + by) for p in inner])
                shift[b].append(spearman(one, other))
    mean = torch.tensor(noise, dtype=torch.float64).mean(1)
    torch.testing.assert_close(found.details["rank_correlation_noise"], mean, rtol=1e-10, atol=0)
    if x.dim() > 2:
        other = torch.tensor(shift, dtype=torch.float64).mean(1)
        got = found.details["rank_correlation_shift"]
        torch.testing.assert_close(got, other, rtol=1e-10, atol=0)
        mean = (mean + other) / 2
        # Maps of this model move with the input.
        torch.testing.assert_close(got, torch.ones_like(got), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.values, mean, rtol=1e-10, atol=0)
    assert found.better == "higher"


def test_maps_whose_answer_is_known() -> None:
    model, samples = digits_cnn(), held_out()
    x, target = samples.images[:8], samples.labels[:8]
    metric = Stability(samples=1, shifts=1)
    found = {
        method.__name__: metric(model, x, method(model, x, target), target=target, method=method)
        for method in (edge_detector, random_map, centre_map)
    }
    # Edges move with the image, a fixed map stays where it is, fixed noise is always new under it.
    edges, fixed = found["edge_detector"].details, found["random_map"].details
    assert float(edges["rank_correlation_shift"].nanmean()) > 0.999
    assert float(edges["ssim_shift"].nanmean()) > 0.999
    assert abs(float(fixed["rank_correlation_shift"].nanmean())) < 0.05
    assert float(found["centre_map"].details["rank_correlation_noise"].nanmean()) == 1.0
    assert float(found["random_map"].details["overlap_noise"].nanmean()) == 1.0
    assert found["edge_detector"].parameters["copies"] == 5


class Unsure(nn.Module):
    """Decides by the sign of the first place, which noise reverses for the first example."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, 0]
        return torch.stack([first + (x * x).flatten(1).sum(1) * 0, -first], 1)


def test_copies_decided_otherwise_are_left_out() -> None:
    x = of((2, 1, 9, 9))
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 1e-9, 50.0
    x[0, 0, 1:, :1] = x[0, 0, :1, 1:] = -1.0
    metric = Stability(noise_level=0.2, samples=6, shifts=())
    found = metric(Unsure(), x, x, target=0, method=edge_detector)
    spread = 0.2 * torch.stack([one.max() - one.min() for one in x])
    kept: list[float] = []
    for sample in range(6):
        copy = noisy(x, spread, sample, "gaussian", 0)
        if copy[0, 0, 0, 0] > -copy[0, 0, 0, 0]:
            again = edge_detector(Unsure(), copy)
            kept.append(spearman(x[0, 0], again[0]))
    assert 0 < len(kept) < 6
    assert f"{6 - len(kept)} of 12 copies" in found.caveats[0]
    assert float(found.values[0]) == pytest.approx(sum(kept) / len(kept), rel=1e-10)


def test_an_example_without_copies_says_nothing() -> None:
    x = of((2, 1, 9, 9))
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 1e-9, 50.0
    # The place next to the corner decides once the image is shifted.
    x[0, 0, 1, 0] = x[0, 0, 0, 1] = -5.0
    metric = Stability(samples=0, shifts=1)
    found = metric(Unsure(), x, x, target=0, method=edge_detector)
    assert found.values.isfinite().tolist() == [True, True]
    for row in range(2):
        x[row, 0, :2, :2] = -5.0
        x[row, 0, 0, 0] = 1.0
    # Shifted inwards the corner is repeated, outwards it is gone.
    found = metric(Unsure(), x, x, target=0, method=edge_detector)
    assert "4 of 8 copies" in found.caveats[0]


def test_shifted_repeats_the_edge() -> None:
    x = torch.arange(5.0)[None, None]
    assert shifted(x, 2, 2).flatten().tolist() == [0, 0, 0, 1, 2]
    assert shifted(x, 2, -1).flatten().tolist() == [1, 2, 3, 4, 4]


def test_one_number_per_example_and_flat_maps() -> None:
    x = of((2, 1, 8, 8))

    def score(inputs: Tensor) -> Tensor:
        return (inputs**2).flatten(1).sum(1)

    found = Stability(samples=1)(score, x, x, method="gradient")
    assert found.values.isfinite().all()
    flat = Stability(samples=1)(score, x, torch.ones_like(x), method="gradient")
    assert flat.values.isnan().all()
    assert "2 examples" in flat.caveats[0]
    assert ssim(x[:, 0], x[:, 0]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_level": 0.0},
        {"samples": -1},
        {"shifts": (0,)},
        {"noise": "salt"},
        {"top_share": 0.0},
        {"samples": 0, "shifts": ()},
    ],
)
def test_errors(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Stability(**wrong)


def test_nothing_to_shift() -> None:
    x = of((2, 5))
    with pytest.raises(InputError, match="smaller shifts"):
        Stability(samples=0)(Sums(), x, x, target=0, method="gradient")


def test_the_model_stays_as_it_is() -> None:
    model = Net()
    x = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    maps = sf.explain(model, x, method="gradient", target=1)
    with unchanged(model, x):
        Stability(samples=1)(model, x, maps)
