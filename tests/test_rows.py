"""Rows that meet in a model: the map of an example is that of the model called with it alone."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from meeting_models import FIRST, meeting, without_statistics
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast import evaluate
from saliency_fast.engine.config import EngineConfig
from saliency_fast.errors import ModelError
from tests.configured import RECORDED

TIGHT = 1e-9


def picture(rows: int = 1) -> Tensor:
    torch.manual_seed(7)
    x = torch.rand(rows, 1, 12, 12, dtype=torch.float64) + 0.2
    # One pixel is the largest by far, so that most windows leave it where it is.
    x[:, 0, 6, 6] = 2.0
    return x


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def alone(model: Any, x: Tensor, method: Any, **given: Any) -> Tensor:
    """The maps of the examples, each explained by itself with one point in a launch."""
    parts = [
        sf.explain(model, one, method=method, points_per_launch=1, **given).values
        for one in x.split(1)
    ]
    return torch.cat(parts)


def naive(model: Any, x: Tensor, steps: int) -> Tensor:
    """Integrated gradients from the definition: one point, one call."""
    total = torch.zeros_like(x)
    for number in range(steps):
        for row in range(len(x)):
            point = ((number + 0.5) / steps * x[row : row + 1]).requires_grad_()
            (grad,) = torch.autograd.grad(model(point)[0, 1], point)
            total[row] += grad[0] / steps * x[row]
    return total


METHODS: dict[str, Any] = {
    "gradient": sf.Gradient(),
    "smoothgrad": sf.SmoothGrad(samples=6, seed=1),
    "vargrad": sf.VarGrad(samples=6, seed=1),
    "expected gradients": sf.ExpectedGradients(samples=6, seed=1),
    "occlusion": sf.Occlusion(4, 4),
    "ablation": sf.FeatureAblation(),
    "rise": sf.Rise(samples=12, grid=3, seed=1),
    "kernel shap": sf.KernelShap(samples=200, seed=1),
    "blur ig": sf.BlurIG(steps=6),
    "guided ig": sf.GuidedIG(steps=6, max_dist=0.3),
    "idgi": sf.IDGI(steps=6),
    "grad cam": sf.GradCAM("body.0"),
    "score cam": sf.ScoreCAM("body.0"),
    "guided": sf.GuidedBackprop(),
    "lrp": sf.LRP(),
    "input x gradient": sf.InputXGradient(),
}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("lean", [True, False])
def test_integrated_gradients_are_those_of_one_example_alone(
    name: str, rows: int, lean: bool
) -> None:
    model, x = (
        meeting(name),
        picture(rows) * torch.tensor([1.0, 0.6, 1.4]).double()[:rows, None, None, None],
    )
    method = sf.IntegratedGradients(steps=16, rule="midpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sf.explain(model, x, target=1, method=method, lean=lean)
    assert gap(found.values, naive(model, x, 16)) < TIGHT
    own = torch.cat([model(one) for one in x.split(1)])[:, 1]
    assert gap(found.scores, own.detach()) < TIGHT


@pytest.mark.parametrize("name", ["standardised", "largest", "branch", "sums over rows"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(name: str, method: str) -> None:
    model, x, more = meeting(name), picture(2), dict[str, Any]()
    if method == "expected gradients":
        more["baseline"] = torch.rand(3, 1, 12, 12, dtype=torch.float64)
    if method == "ablation":
        more["features"] = "grid:4"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sf.explain(model, x, target=1, method=METHODS[method], **more).values
        expected = alone(model, x, METHODS[method], target=1, **more)
    assert gap(found, expected) < TIGHT


def test_a_warning_names_both_scores_and_the_way_out() -> None:
    model, x = meeting("mean over rows"), picture(3)
    with pytest.warns(UserWarning, match="rows='together'") as seen:
        sf.explain(model, x * torch.tensor([1.0, 2.0, 3.0]).double()[:, None, None, None], target=1)
    (text,) = [str(one.message) for one in seen if "depend on each other" in str(one.message)]
    single_row = float(model(x[:1])[0, 1])
    assert f"{single_row:.6g} alone" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.explain(meeting("standardised"), x[:1], target=1)


def test_one_point_in_a_launch_tells_too() -> None:
    model, x = (
        meeting("mean over rows"),
        picture(2) * torch.tensor([1.0, 2.0]).double()[:, None, None, None],
    )
    with pytest.warns(UserWarning, match="depend on each other"):
        sf.explain(model, x, target=1, points_per_launch=1)


def test_plan_and_record_say_that_rows_depend() -> None:
    model, x = meeting("standardised"), picture()
    engine = sf.Engine(model)
    found = engine(x, 1)
    assert "vmap" in found.provenance.strategy
    assert "rows may depend on each other" in str(engine.plan(x, 1))
    single = sf.Engine(meeting("loop"))
    single(x, 1)
    assert single.plan(x, 1).points_per_launch == 1


def test_at_layers() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 3), nn.Linear(300, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(torch.tanh(y / y.std()).flatten(1))

    torch.manual_seed(0)
    model, x = Inside().double().eval(), picture(3) * torch.rand(3, 1, 1, 1).double()
    method = sf.IntegratedGradients(steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sf.explain(model, x, target=1, method=method, at="a").values
    assert gap(found, alone(model, x, method, target=1, at="a")) < TIGHT


def test_what_layers_give_is_read_alone() -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 3), nn.Linear(300, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x / (0.1 + x.std()))).flatten(1))

    torch.manual_seed(0)
    model, x = Before().double().eval(), picture(3) * torch.rand(3, 1, 1, 1).double()
    method = sf.IntegratedGradients(steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sf.explain(model, x, target=1, method=method, at="a").values
    assert gap(found, alone(model, x, method, target=1, at="a")) < TIGHT


@pytest.mark.parametrize("name", ["standardised", "branch", "capacity"])
def test_requests_do_not_share_launches(name: str) -> None:
    model, several = meeting(name), [picture() * share for share in (0.4, 1.0, 1.7, 2.5)]
    for method in (sf.Gradient(), sf.IntegratedGradients(steps=8), sf.Occlusion(4, 4)):
        with sf.Engine(model, method, latency=0.05) as engine:
            for _ in range(2):
                asked = [{"inputs": x, "target": 1} for x in several]
                answers = engine.explain_many(asked)
                for x, answer in zip(several, answers, strict=True):
                    assert gap(answer.values, alone(model, x, method, target=1)) < TIGHT


def test_metrics() -> None:
    model, x = meeting("largest"), picture()
    values = sf.explain(model, x, target=1, method=sf.Gradient()).values
    metric = evaluate.Deletion(steps=12)
    found = metric(model, x, values, target=1)
    one = metric(model, x, values, target=1, points_per_launch=1)
    assert gap(found.curve.y, one.curve.y) < TIGHT


def test_a_target_function_that_looks_at_all_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, method = picture(), sf.IntegratedGradients(steps=16, rule="midpoint")

    def target(out: Tensor) -> Tensor:
        return out[:, 1] - out[:, 1].mean() + out.softmax(0)[:, 2] + out[:, 0]

    found = sf.explain(model, x, target=target, method=method).values
    assert gap(found, alone(model, x, method, target=target)) < TIGHT


def test_models_without_statistics() -> None:
    model, x = without_statistics(), picture(2) * torch.rand(2, 1, 1, 1).double()
    with pytest.warns(UserWarning, match="depend on each other"):
        found = sf.explain(
            model, x, target=1, method=sf.IntegratedGradients(steps=16, rule="midpoint")
        )
    assert gap(found.values, naive(model, x, 16)) < TIGHT


def test_rows_apart_share_launches_and_are_not_asked_again() -> None:
    seen: list[int] = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return self.net(x)

    torch.manual_seed(0)
    method, config = sf.IntegratedGradients(steps=20), EngineConfig(**RECORDED)
    engine, x = sf.Engine(Counted().eval(), method, config=config), picture().float()
    engine(x, 1)
    seen.clear()
    engine(x, 1)
    # One row, at most: that of a launch picked at random.
    assert seen.count(1) <= 1


class Nodes(nn.Module):
    """Attention among rows, as nodes with a graph made of their features."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(torch.softmax(self.q(x) @ x.T, -1) @ x))


def whole(model: Any, x: Tensor, read: Any, steps: int) -> Tensor:
    total = torch.zeros_like(x)
    for number in range(steps):
        point = ((number + 0.5) / steps * x).requires_grad_()
        total += torch.autograd.grad(read(model(point)).sum(), point)[0] / steps * x
    return total


@pytest.mark.parametrize("readout", ["class", "one node", "per row"])
def test_rows_together(readout: str) -> None:
    torch.manual_seed(0)
    model, x = Nodes().double(), torch.randn(5, 4).double()
    target: Any = {
        "class": 1,
        "one node": lambda out: out[2, 1],
        "per row": [0, 1, 2, 1, 0],
    }[readout]

    def read(out: Tensor) -> Tensor:
        if readout == "per row":
            return out.gather(1, torch.tensor(target)[:, None])
        return out[:, 1] if readout == "class" else out[2, 1]

    method = sf.IntegratedGradients(steps=16, rule="midpoint")
    found = sf.explain(model, x, target=target, method=method, rows="together")
    assert found.values.shape == x.shape
    assert gap(found.values, whole(model, x, read, 16)) < TIGHT
    expected = read(model(x)).detach().reshape(-1).expand(5)
    assert torch.allclose(found.scores, expected, atol=1e-12)
    total = float(found.values.sum())
    gain = read(model(x)).sum() - read(model(torch.zeros_like(x))).sum()
    assert found.delta is not None
    assert torch.allclose(found.delta, (total - gain.detach()).expand(5), atol=1e-9)


def test_rows_together_of_a_graph_with_arguments(tmp_path: Any) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
            def hop(h: Tensor) -> Tensor:
                sent = h[edges[0]] * weights[:, None]
                return torch.zeros_like(h).index_add(0, edges[1], sent) + h

            return self.b(hop(torch.tanh(self.a(hop(x)))))

    torch.manual_seed(0)
    model, x, weights = Graph().double(), torch.randn(6, 4).double(), torch.rand(6).double()
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    given = {"forward_args": (edges, weights)}
    with pytest.raises(ValueError, match="rows='together'"):
        sf.explain(model, x, target=1, **given)
    method = sf.IntegratedGradients(steps=16, rule="midpoint")
    found = sf.explain(model, x, target=1, method=method, rows="together", **given)
    expected = whole(lambda p: model(p, edges, weights), x, lambda out: out[:, 1], 16)
    assert gap(found.values, expected) < TIGHT
    assert sf.replay(found.save(tmp_path / "graph.safetensors"), model, x, **given)


def test_rows_together_errors() -> None:
    model = Nodes().double()
    with pytest.raises(sf.errors.InputError, match="rows must be"):
        sf.Engine(model, rows="nodes")
    with pytest.raises(sf.errors.InputError, match="layers"):
        sf.Engine(model, "grad_cam", rows="together")
    with pytest.raises(sf.errors.InputError, match="call the engine itself"):
        sf.Engine(model, rows="together").submit(torch.randn(5, 4).double(), 1)


class Pooled(nn.Module):
    """Scores [G, 3] of the graphs that nodes [N, 4] belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        found = torch.zeros(int(graph.max()) + 1, 3, dtype=x.dtype)
        return found.index_add(0, graph, self.a(x).relu())


@pytest.mark.parametrize("target", [1, "predicted", [0, 1, 2, 0, 1, 2]])
def test_rows_together_of_a_model_with_a_row_for_each_graph(target: Any) -> None:
    torch.manual_seed(0)
    model, x = Pooled().double(), torch.randn(6, 4).double()
    graph = torch.tensor([0, 0, 0, 1, 1, 1])
    with pytest.raises(sf.errors.ModelError) as caught:
        sf.explain(model, x, target=target, rows="together", forward_args=(graph,))
    for words in ("got [2, 3]", "each of the 6 rows", "target=lambda output: output[0, 1]"):
        assert words in str(caught.value)
    assert "scalar" not in str(caught.value)
    found = sf.explain(
        model, x, target=lambda output: output[0, 1], rows="together", forward_args=(graph,)
    )
    assert bool((found.values[3:] == 0).all())


def test_rows_together_of_a_model_with_one_number() -> None:
    x = torch.randn(5, 4).double()
    with pytest.raises(sf.errors.ModelError, match=r"got \[\].*target=lambda output: output"):
        sf.explain(lambda x: x.tanh().sum(), x, rows="together")
    assert sf.explain(lambda x: x.tanh().sum(), x, target=lambda y: y, rows="together")


def test_fewer_rows_than_the_input_has_are_no_scalars() -> None:
    model, x = Pooled().double(), torch.randn(6, 4).double()
    with pytest.raises(sf.errors.ModelError, match=r"got \[2, 3\].*use rows='together'") as caught:
        sf.explain(model, x, target=1, forward_args=(torch.tensor([0, 0, 0, 1, 1, 1]),))
    assert "scalar" not in str(caught.value)


class Average(nn.Module):
    """Inputs against a moving average of all that it was called with."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.kept, self.seen, self.named = kept, [torch.zeros(4)], {"mean": torch.zeros(4)}
        self.pair: Any = (torch.zeros(4), 0)
        self.plain, self.out = torch.zeros(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = {
            "buffer": self.mean, "attribute": self.plain, "list": self.seen[-1],
            "dictionary": self.named["mean"], "tuple": self.pair[0],
        }[self.kept]  # fmt: skip
        mean = 0.9 * before + 0.1 * x.detach().mean(0)
        if self.kept == "buffer":
            self.mean = mean
        elif self.kept == "attribute":
            self.plain = mean
        elif self.kept == "list":
            self.seen.append(mean)
        elif self.kept == "tuple":
            self.pair = (mean, self.pair[1] + 1)
        else:
            self.named["mean"] = mean
        return self.out(torch.tanh(x - mean))


@pytest.mark.parametrize("kept", ["buffer", "attribute", "list", "dictionary", "tuple"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_that_keeps_an_average_of_its_rows(kept: str, rows: int) -> None:
    # Kept apart by vmap, it keeps a tensor that is none outside of vmap.
    torch.manual_seed(0)
    model, x = Average(kept).double(), torch.randn(rows, 4).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [sf.explain(model, x, target=1) for _ in range(2)]
    assert all(bool(one.values.isfinite().all()) for one in found)
    assert all(float(one.delta.abs().max()) < 1.0 for one in found if one.delta is not None)
    assert torch.equal(model.mean, torch.zeros(4).double())
    assert len(model.seen) == 1
    assert torch.equal(model.pair[0], torch.zeros(4))


def test_vmap_asks_nobody_to_file_an_issue() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x - x.mean()
            counts = torch.histc(y.detach(), 3, -1.0, 1.0)
            return y[:, :3].tanh() * counts.to(x.dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sf.explain(Counts().double(), torch.randn(1, 4).double(), target=1)
    assert "vmap" in found.provenance.strategy
    with pytest.warns(UserWarning, match="performance drop"):
        torch.func.vmap(lambda x: torch.histc(x, 3))(torch.randn(3, 4))


class Ranged(nn.Module):
    """Scales its whole input by what several places of it reach."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        parts = (nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.body = nn.Sequential(*parts, nn.Linear(16, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "median":
            return self.body(x - x.median())
        if self.kind == "nanmedian":
            return self.body(x - x.nanmedian())
        low = x.min() if self.kind == "range" else 0.0
        return self.body((x - low) / (x.max() - low + 1e-6))


@pytest.mark.parametrize("kind", ["range", "largest", "median", "nanmedian"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.filterwarnings("ignore:saliency_fast. the examples of this call depend")
def test_values_that_tie_over_the_whole_input(kind: str, rows: int) -> None:
    model, x = Ranged(kind).eval(), (picture(rows).clamp(0.4, 0.9) * 16).round() / 16
    x[:, :, :2] = 0.4
    x[:, :, 5:8, 5:8] = 1.0
    method = sf.IntegratedGradients(steps=6, rule="midpoint")
    for size in (None, 1):
        found = sf.explain(model, x, target=1, method=method, points_per_launch=size).values
        assert gap(found, naive(model, x, 6)) < TIGHT
    engine = sf.Engine(model, method)
    assert all(gap(engine(x, 1).values, naive(model, x, 6)) < TIGHT for _ in range(3))


class Counting(nn.Module):
    """Treats its rows apart as long as there are few of them."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.body = most, Ranged("largest").body

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if len(x) <= self.most else y - 0.5 * y.mean(0) * y.std(0)


@pytest.mark.parametrize("most", [3, 8])
def test_launches_of_more_rows_than_were_proved(most: int) -> None:
    model, x = Counting(most).eval(), picture(1)
    engines = [sf.Engine(model, sf.IntegratedGradients(steps=n, rule="midpoint")) for n in (2, 3)]
    for engine in engines:
        for _ in range(3):
            engine(x, 1)
    method = sf.IntegratedGradients(steps=50, rule="midpoint")
    assert gap(sf.explain(model, x, target=1, method=method).values, naive(model, x, 50)) < TIGHT


JOINS: dict[str, Any] = {
    "last": lambda h: h + h[-1:],
    "middle": lambda h: h + h[len(h) // 2],
    "largest": lambda h: h / (h.amax() + 2),
    "standardised": lambda h: (h - h.mean()) / (h.std() + 0.1),
    "number": lambda h: h * len(h),
    "sums": lambda h: h.cumsum(0),
    "branch": lambda h: h * 2 if h.max() > 1.5 else h,
}


class Joined(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.name, self.first = name, nn.Linear(5, 6).double()
        self.layer, self.last = nn.Tanh(), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(JOINS[self.name](self.first(x))))


@pytest.mark.parametrize("name", JOINS)
def test_deep_lift_refuses_what_joins_an_example_and_its_reference(name: str) -> None:
    torch.manual_seed(1)
    x = 3 * torch.randn(1, 5, dtype=torch.float64)
    with pytest.raises(ModelError, match="together with its reference"):
        sf.explain(Joined(name).eval(), x, target=1, method="deeplift")


@pytest.mark.parametrize("name", JOINS)
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "feature_ablation"])
@pytest.mark.filterwarnings("ignore:saliency_fast. the examples of this call depend")
def test_layers_behind_what_joins_the_examples(name: str, method: str) -> None:
    torch.manual_seed(1)
    model, x = Joined(name).eval(), torch.randn(3, 5, dtype=torch.float64)
    found = sf.explain(model, x, target=1, method=method, at="layer")
    for number in range(3):
        own = slice(number, number + 1)
        single = sf.explain(model, x[own], target=1, method=method, at="layer")
        assert gap(found.values[own], single.values) < TIGHT
        with torch.no_grad():
            torch.testing.assert_close(found.scores[own].double(), model(x[own])[:, 1])


class Switched(nn.Module):
    """Rows meet in it once an attribute says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.mixes = nn.Linear(12, 16), nn.Linear(16, 3), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        return self.last(y * y.mean(0, keepdim=True).exp() if self.mixes else y)


@pytest.mark.parametrize("steps", [4, 16, 300])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_that_meet_only_in_later_calls(steps: int, batch: int) -> None:
    torch.manual_seed(0)
    model, x = Switched().double().eval(), torch.randn(batch, 12).double()
    method = sf.IntegratedGradients(steps=steps, rule="midpoint")
    engine = sf.Engine(model, method)
    for _ in range(40):
        engine(x, 1)
    model.mixes = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = engine(x, 1).values
    assert gap(found, torch.cat([naive(model, one[None], steps) for one in x])) < TIGHT
