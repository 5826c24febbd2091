"""NaN for values that are missing: methods that read scores alone, against loops by hand."""

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
import saliency_fast.captum as captum
import saliency_fast.evaluate as ev
from saliency_fast.errors import InputError, ModelError
from saliency_fast.methods import METHODS, make_method

NAN = float("nan")


class Table(nn.Module):
    """A score of a table that may have gaps: what is missing counts by a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        gone = x.isnan()
        return self.rest(torch.cat([torch.where(gone, 0.0, x), gone.to(x.dtype)], 1))


class Picture(nn.Module):
    """A convolution behind `nan_to_num`."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 3)),
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.nan_to_num(x, nan=3.0))


@pytest.fixture(scope="module")
def table() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    x[0, 1] = x[2, 0] = x[2, 4] = NAN
    return Table().eval(), x


def ablated(model: nn.Module, x: Tensor, baseline: float) -> Tensor:
    """A missing value has nothing to take away: it stays missing, and is worth nothing."""
    found = torch.zeros_like(x)
    with torch.no_grad():
        for j in range(x.shape[1]):
            other = x.clone()
            other[:, j] = torch.where(x[:, j].isnan(), x[:, j], baseline)
            found[:, j] = (model(x) - model(other))[:, 1]
    return found


def shapley(model: nn.Module, x: Tensor, baseline: float) -> Tensor:
    """Shapley values by all subsets."""
    count = x.shape[1]
    start = torch.where(x.isnan(), x, torch.full_like(x, baseline))
    subsets = torch.arange(2**count)[:, None] >> torch.arange(count) & 1
    with torch.no_grad():
        scores = torch.stack([model(torch.where(s.bool(), x, start))[:, 1] for s in subsets])
    found = torch.zeros_like(x)
    size = subsets.sum(1)
    for j in range(count):
        without = (subsets[:, j] == 0).nonzero().flatten()
        chance = [1.0 / (count * _choose(count - 1, int(s))) for s in size[without]]
        gain = scores[without + 2**j] - scores[without]
        found[:, j] = (torch.tensor(chance, dtype=torch.float64)[:, None] * gain).sum(0)
    return found


def _choose(n: int, k: int) -> int:
    return 1 if k == 0 else _choose(n - 1, k - 1) * n // k


@pytest.mark.parametrize("baseline", [0.0, 0.7, NAN])
def test_ablation_and_occlusion_with_gaps(table, baseline: float) -> None:
    model, x = table
    right = ablated(model, x, baseline)
    for method in ("feature_ablation", sf.Occlusion(window=1, stride=1)):
        found = sf.explain(model, x, target=1, method=method, baseline=baseline).values
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    facade = captum.FeatureAblation(model).attribute(x, baselines=baseline, target=1)
    torch.testing.assert_close(facade, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("baseline", [0.0, 0.7, NAN])
@pytest.mark.parametrize("method", ["shapley_values", "kernel_shap"])
def test_shapley_values_with_gaps(table, method: str, baseline: float) -> None:
    model, x = table
    found = sf.explain(model, x, target=1, method=method, baseline=baseline)
    torch.testing.assert_close(found.values, shapley(model, x, baseline), rtol=1e-9, atol=1e-12)
    assert float(found.delta.abs().max()) < 1e-9


READ_SCORES = [name for name in METHODS if make_method(name, {}).recipe().scores_alone]


def test_which_methods_read_scores_alone() -> None:
    assert set(READ_SCORES) == {
        *("feature_ablation", "feature_permutation", "kernel_shap", "lime", "occlusion", "rise"),
        *("shapley_sampling", "shapley_values"),
    }


@pytest.mark.parametrize("name", READ_SCORES)
def test_finite_maps_of_a_model_that_takes_gaps(name: str) -> None:
    """As of a model behind `nan_to_num`, whose inputs have the number that it fills in."""
    torch.manual_seed(1)
    model, x = Picture().eval(), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    full = x.clone()
    full[0, 0, 2, 3] = full[1, 1, 7, 7] = 3.0
    x[0, 0, 2, 3] = x[1, 1, 7, 7] = NAN
    fields = {"samples": 300, "grid": 4} if name == "rise" else {}
    more = {} if name in ("rise", "occlusion") else {"features": "grid:3"}
    method = make_method(name, fields)
    start = torch.where(x.isnan(), 3.0, torch.tensor(0.5, dtype=torch.float64))
    if name == "feature_permutation":
        got, right = (sf.explain(model, one, target=1, method=method, **more) for one in (x, full))
        torch.testing.assert_close(got.values, right.values, rtol=1e-9, atol=1e-12)
        return
    got = sf.explain(model, x, target=1, method=method, baseline=0.5, **more)
    right = sf.explain(model, full, target=1, method=method, baseline=start, **more)
    torch.testing.assert_close(got.values, right.values, rtol=1e-9, atol=1e-12)
    if name != "rise":
        got = sf.explain(model, full, target=1, method=method, baseline=NAN, **more)
        right = sf.explain(model, full, target=1, method=method, baseline=3.0, **more)
        torch.testing.assert_close(got.values, right.values, rtol=1e-9, atol=1e-12)


def test_rise_keeps_what_it_does_not_fade() -> None:
    """Where the share of a value is one, it is there, whatever the baseline is."""
    model, x = (lambda x: x.isfinite().double().flatten(1).mean(1)), torch.rand(1, 1, 6, 6)
    for baseline in (NAN, float("inf")):
        method = sf.Rise(samples=64, grid=3)
        found = sf.explain(model, x, method=method, baseline=baseline)
        assert float(found.values.max()) > 0.1


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(READ_SCORES)))
def test_methods_that_differentiate_say_which_take_gaps(name: str) -> None:
    x = torch.rand(2, 3, 8, 8)
    x[0, 0, 0, 0] = NAN
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(InputError, match="feature_ablation"):
        sf.explain(model, x, target=1, method=name)


def test_infinity_is_a_number_that_a_model_may_take() -> None:
    model, x = (lambda x: x.clamp(-5, 5).sum(1)), torch.tensor([[1.0, float("inf")]])
    found = sf.explain(model, x, method="feature_ablation")
    assert found.values.tolist() == [[1.0, 5.0]]


def test_a_model_that_does_not_take_gaps() -> None:
    x = torch.tensor([[1.0, NAN]])
    with pytest.raises(ModelError, match="NaN"):
        sf.explain(lambda x: x.sum(1), x, method="feature_ablation")
    method = sf.Lime(400, distance="euclidean")
    with pytest.raises(InputError, match="distance='features'"):
        sf.explain(lambda x: torch.nan_to_num(x).sum(1), x, method=method)
    with pytest.raises(InputError, match="computed from the input"):
        sf.explain(
            lambda x: torch.nan_to_num(x).sum(1), x, method="feature_ablation", baseline="mean"
        )


@pytest.mark.parametrize("metric", [ev.Deletion, ev.Insertion])
@pytest.mark.parametrize("substrate", [0.0, NAN])
def test_curves_with_gaps(table, metric: type, substrate: float) -> None:
    model, x = table
    maps = torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = metric(step_size=1, substrate=substrate)(model, x, maps, target=1).curve.y
    gone = torch.where(x.isnan(), x, torch.full_like(x, substrate))
    now, then = (gone, x) if metric is ev.Insertion else (x, gone)
    order, now = maps.argsort(1, descending=True), now.clone()
    with torch.no_grad():
        right = [model(now).softmax(1)[:, 1]]
        for k in range(x.shape[1]):
            here = order[:, k : k + 1]
            now.scatter_(1, here, then.gather(1, here))
            right.append(model(now).softmax(1)[:, 1])
    torch.testing.assert_close(found, torch.stack(right, 1), rtol=1e-9, atol=1e-12)


def test_metrics_that_need_numbers_say_so(table) -> None:
    model, x = table
    for metric in (ev.Infidelity(), ev.Completeness(), ev.Sparseness()):
        with pytest.raises(InputError, match="deletion"):
            metric(model, x, torch.rand_like(x), target=1)
