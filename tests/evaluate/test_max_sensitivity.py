"""Max- and avg-sensitivity against loops, against Captum and against Quantus."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from captum.metrics import sensitivity_max
from torch import nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.metrics.robustness import AvgSensitivity, MaxSensitivity, noisy
from tests.evaluate.naive_robustness import sensitivities
from tests.traces import Net, one_thread, unchanged

SAMPLES = 5


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 6 * 7, 3))
    return nn.Sequential(*layers).double().eval()


def images(batch: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 2, 8, 9, generator=generator, dtype=torch.float64)


TARGET = torch.tensor([0, 2, 1, 1])


def copies(x: torch.Tensor, radius: float, noise: str, seed: int = 0) -> list[torch.Tensor]:
    spread = torch.full((len(x),), radius, dtype=torch.float64)
    return [noisy(x, spread, k, noise, seed) for k in range(SAMPLES)]


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
@pytest.mark.parametrize("norm", ["map", "input", "none"])
def test_like_the_loop(noise: str, norm: str) -> None:
    model, x = network(), images()

    def explain(x: torch.Tensor) -> torch.Tensor:
        return sf.explain(model, x, method="gradient", target=TARGET).values

    given = {"radius": 0.3, "samples": SAMPLES, "noise": noise, "norm": norm, "seed": 7}
    expected = sensitivities(explain, x, copies(x, 0.3, noise, 7), norm)
    maps = sf.explain(model, x, method="gradient", target=TARGET)
    most, mean = MaxSensitivity(**given)(model, x, maps), AvgSensitivity(**given)(model, x, maps)
    largest = torch.tensor([max(row) for row in expected], dtype=torch.float64)
    average = torch.tensor([sum(row) / SAMPLES for row in expected], dtype=torch.float64)
    torch.testing.assert_close(most.values, largest, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean.values, average, rtol=1e-10, atol=1e-12)
    assert (most.better, most.parameters["norm"], most.caveats) == ("lower", norm, ())


def test_like_captum() -> None:
    model, x = network(), images()
    ours = torch.stack(copies(x, 0.1, "uniform"), 1).flatten(0, 1)
    saliency = Saliency(model)
    theirs = sensitivity_max(
        lambda inputs, target: saliency.attribute(inputs, target=target, abs=False),
        x,
        perturb_func=lambda inputs: ours,
        n_perturb_samples=SAMPLES,
        target=TARGET,
    )
    maps = sf.explain(model, x, method="gradient", target=TARGET)
    found = MaxSensitivity(radius=0.1, samples=SAMPLES)(model, x, maps)
    torch.testing.assert_close(found.values, theirs.double(), rtol=1e-10, atol=1e-12)


def test_like_quantus() -> None:
    quantus = pytest.importorskip("quantus")
    model, x = network().float(), images().float()
    handed = iter(copies(x, 0.1, "uniform"))

    def explain(model, inputs, targets, **_):
        values = torch.as_tensor(np.asarray(inputs), dtype=torch.float32)
        maps = sf.explain(model, values, method="gradient", target=torch.as_tensor(targets))
        return maps.values.numpy()

    metric = quantus.MaxSensitivity(
        nr_samples=SAMPLES,
        perturb_func=lambda arr, **_: next(handed).flatten(1).numpy(),
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    theirs = metric(
        model=model,
        x_batch=x.numpy(),
        y_batch=TARGET.numpy(),
        a_batch=explain(model, x.numpy(), TARGET),
        explain_func=explain,
    )
    maps = sf.explain(model, x, method="gradient", target=TARGET)
    found = MaxSensitivity(radius=0.1, samples=SAMPLES)(model, x, maps)
    torch.testing.assert_close(
        found.values, torch.as_tensor(np.asarray(theirs)).double(), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_an_example_has_the_same_value_in_any_batch(noise: str) -> None:
    model, x = network(), images()
    metric = MaxSensitivity(radius=0.1, samples=3, noise=noise)
    maps = sf.explain(model, x, method="gradient", target=TARGET).values
    whole = metric(model, x, maps, target=TARGET, method="gradient").values
    alone = metric(model, x[2:3], maps[2:3], target=TARGET[2:3], method="gradient").values
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-12, atol=0)


def test_noise_stays_in_its_box_and_fills_it() -> None:
    x = torch.zeros(3, 4000, dtype=torch.float64)
    spread = torch.tensor([1.0, 2.0, 0.0]).double()
    copies = [noisy(x, spread, sample, "uniform", 0) for sample in range(3)]
    found = torch.stack([copies[row][row] for row in range(3)])
    assert (found.abs().amax(1) <= spread).all()
    # A uniform draw has a third of its squared radius as variance; 4000 draws tell it to 5 %.
    torch.testing.assert_close(found[:2].var(1), spread[:2] ** 2 / 3, rtol=0.05, atol=0)
    assert not torch.equal(found[0], found[1] / 2)


def test_maps_of_places_and_functions() -> None:
    model, x = network(), images()

    def by_place(model, inputs, target):
        return sf.explain(model, inputs, method="gradient", target=target).values.sum(1)

    maps = by_place(model, x, TARGET)
    metric = MaxSensitivity(radius=0.1, samples=2)
    found = metric(model, x, maps, target=TARGET, method=by_place).values
    same = metric(model, x, maps, target=TARGET, method="gradient").values
    torch.testing.assert_close(found, same, rtol=1e-12, atol=0)


def test_zero_maps_have_no_relative_distance() -> None:
    model, x = network(), images(2)
    maps = torch.zeros_like(x)
    found = MaxSensitivity(samples=2)(model, x, maps, target=TARGET[:2], method="gradient")
    assert found.values.isnan().all()
    assert "2 examples" in found.caveats[0]
    free = MaxSensitivity(samples=2, norm="none")
    assert free(model, x, maps, target=TARGET[:2], method="gradient").values.isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"radius": 0.0},
        {"radius": float("nan")},
        {"samples": 0},
        {"noise": "laplace"},
        {"norm": "fro"},
        {"seed": -1},
    ],
)
def test_errors(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        MaxSensitivity(**wrong)


def test_errors_of_types() -> None:
    with pytest.raises(InputTypeError, match="samples"):
        MaxSensitivity(samples=2.5)
    with pytest.raises(InputError, match="method"):
        MaxSensitivity()(network(), images(), images(), target=TARGET)


def test_the_model_stays_as_it_is() -> None:
    model = Net()
    x = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    maps = sf.explain(model, x, method="gradient", target=1)
    with unchanged(model, x):
        MaxSensitivity(samples=2)(model, x, maps)
