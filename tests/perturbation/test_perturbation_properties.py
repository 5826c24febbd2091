"""What holds for every perturbation method: launches, batches, traces, types, records, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError, ModelError
from saliency_fast.methods import make_method
from tests.models import SHAPES, Image, Tabular, Tokens, make, randn
from tests.naive import relative_l2

NINE = torch.arange(12)[:, None] // 4 * 3 + torch.arange(12) // 4
METHODS: list[tuple[Any, dict[str, Any]]] = [
    (sf.Occlusion(4, 3), {}),
    (sf.Occlusion(2, 1, hierarchy=2), {}),
    (sf.FeatureAblation(), {"features": NINE}),
    (sf.Rise(30, 4), {}),
    (sf.Lime(40), {"features": NINE}),
    (sf.KernelShap(60), {"features": NINE}),
    (sf.ShapleySampling(5), {"features": NINE}),
    (sf.ShapleyValues(), {"features": NINE % 4}),
]
IDS = [f"{method.name}-{number}" for number, (method, _) in enumerate(METHODS)]


@pytest.mark.parametrize(("method", "more"), METHODS, ids=IDS)
def test_launches_do_not_matter(method: Any, more: dict[str, Any]) -> None:
    model, x = make(Image), randn(3, *SHAPES[Image])
    maps = [
        sf.explain(model, x, target=1, method=method, points_per_launch=size, **more)
        for size in (1, 4, 1000)
    ]
    for one in maps[1:]:
        # Solving for slopes carries rounding on.
        assert relative_l2(one.values, maps[0].values) < 1e-11
        torch.testing.assert_close(one.error, maps[0].error, rtol=1e-7, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(("method", "more"), METHODS, ids=IDS)
def test_the_rest_of_the_batch_does_not_matter(method: Any, more: dict[str, Any]) -> None:
    model, x = make(Image), randn(3, *SHAPES[Image])
    together = sf.explain(model, x, target=1, method=method, **more)
    alone = sf.explain(model, x[1:2], target=1, method=method, **more)
    assert relative_l2(together.values[1:2], alone.values) < 1e-11


@pytest.mark.parametrize(("method", "more"), METHODS, ids=IDS)
def test_the_plan_knows_how_many_points_there_are(method: Any, more: dict[str, Any]) -> None:
    model, x = make(Image), randn(3, *SHAPES[Image])
    engine = sf.Engine(model, method)
    planned, found = engine.plan(x, 1, **more).points, engine(x, 1, **more).points
    exact = not getattr(method, "hierarchy", 0)
    assert int(found.sum()) == planned if exact else planned // 2 < int(found.sum()) <= planned


@pytest.mark.parametrize(("method", "more"), METHODS, ids=IDS)
def test_float32_is_close_to_float64(method: Any, more: dict[str, Any]) -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    exact = sf.explain(model, x, target=1, method=method, **more)
    found = sf.explain(model.float(), x.float(), target=1, method=method, **more)
    assert found.values.dtype == torch.float32
    # Differences of scores lose what the scores have in common.
    scale = float(exact.scores.abs().max() / exact.values.abs().max())
    # A hierarchy may choose another window where two are alike, but here none are.
    assert relative_l2(found.values, exact.values) < 1e-5 * max(1.0, scale)


@pytest.mark.parametrize(("method", "more"), METHODS, ids=IDS)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(method: Any, more: dict[str, Any], fails: bool) -> None:
    class Counted(Image):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counted.calls += 1
            if fails and Counted.calls > 6:
                raise KeyboardInterrupt
            return super().forward(x)

    model = make(Counted).train()
    x = randn(2, *SHAPES[Image]).requires_grad_()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    random = torch.get_rng_state()
    call = {"target": 1, "method": method, "points_per_launch": 3, "lean": False, **more}
    if fails:
        with pytest.raises(KeyboardInterrupt):
            sf.explain(model, x, **call)
    else:
        assert not sf.explain(model, x, **call).values.requires_grad
    assert x.grad is None
    assert x.requires_grad
    assert all(module.training for module in model.modules())
    assert not any(one._forward_hooks or one._backward_hooks for one in model.modules())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(("method", "more"), METHODS, ids=IDS)
def test_a_record_is_enough_to_do_it_again(
    method: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    path = sf.explain(model, x, target=1, method=method, **more).save(tmp_path / "map.safetensors")
    again = sf.replay(path, model, x)
    assert again, str(again)
    assert sf.load(path).extras.keys() == ({"features"} if more else set())


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (sf.Occlusion((1, 8), 1), {}),
        (sf.FeatureAblation(), {"features": torch.arange(6)[:, None]}),
        (sf.ShapleyValues(), {"features": torch.arange(6)[:, None] // 2}),
    ],
)
def test_tokens_are_taken_away_at_their_embeddings(
    method: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    """At a layer features are of what it gives: here one per token."""
    tokens = make(Tokens)
    model, ids = nn.Sequential(nn.Embedding(9, 8).double(), tokens), torch.arange(12).view(2, 6) % 9
    found = sf.explain(model, ids, target=1, method=method, at="0", baseline=0.5, **more)
    embedded = model[0](ids).detach()
    plain = sf.explain(tokens, embedded, target=1, method=method, baseline=0.5, **more)
    assert relative_l2(found.values, plain.values) < 1e-12
    assert sf.replay(found.save(tmp_path / "tokens.safetensors"), model, ids)


@pytest.mark.parametrize(("method", "more"), METHODS, ids=IDS)
def test_requests_may_ask_for_it(method: Any, more: dict[str, Any]) -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    alone = sf.explain(model, x, target=1, method=method, **more)
    with sf.Engine(model) as engine:
        futures = [engine.submit(x, 1, method=method, **more), engine.submit(x, 1)]
        assert relative_l2(futures[0].result().values, alone.values) < 1e-11
        assert futures[1].result().values.shape == x.shape


@pytest.mark.parametrize("name", ["occlusion", "feature_ablation", "rise", "lime"])
def test_a_model_that_gives_nan_is_told(name: str) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - 1.0).log().sum((1, 2, 3))

    x = randn(1, *SHAPES[Image]).abs() + 2.0
    more = {} if name in ("occlusion", "rise") else {"features": "grid:2"}
    with pytest.raises(ModelError, match="NaN or infinite"):
        sf.explain(Broken(), x, method=name, **more)


@pytest.mark.parametrize(
    ("window", "stride", "words"),
    [
        (13, None, r"window is larger than the input: got 13 on axis 2, which has 12"),
        ((3, 13), None, r"got 13 on axis 3"),
        ((4, 3, 3), None, r"got 4 on axis 1, which has 3"),
        (3, 4, r"stride is larger than the window, which would leave gaps: got 4 on axis 2"),
        (3, (1, 5), r"got 5 on axis 3"),
        (
            (3, 3, 3, 3),
            None,
            r"for each spatial axis \(2\) or for each axis behind the batch \(3\)",
        ),
        (((3, 3), (2,)), None, r"one for each of 1 inputs: got 2"),
    ],
)
def test_windows_that_do_not_fit(window: Any, stride: Any, words: str) -> None:
    model, x = make(Image), randn(1, *SHAPES[Image])
    with pytest.raises(InputError, match=words):
        sf.explain(model, x, target=1, method=sf.Occlusion(window, stride))


def test_fields_are_checked_when_methods_are_made() -> None:
    with pytest.raises(InputError, match="stride must be at least 1: got 0"):
        sf.Occlusion(3, 0)
    with pytest.raises(InputError, match="window must be at least 1: got -2"):
        sf.Occlusion((3, -2))
    with pytest.raises(InputTypeError, match="window must be a whole number, a tuple"):
        sf.Occlusion(2.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="hierarchy must be at least 0"):
        sf.Occlusion(hierarchy=-1)
    with pytest.raises(InputError, match="keep is a share, at most 1: got 2"):
        sf.Occlusion(keep=2.0)
    with pytest.raises(InputTypeError, match="seed must be a 64-bit int"):
        sf.Rise(seed=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["occlusion", "feature_ablation", "rise", "lime", "kernel_shap"])
def test_fills_that_do_not_fit(name: str) -> None:
    model, x = make(Tabular), randn(2, 7)
    for fill, words in (
        (torch.zeros(3, 7), r"baseline must match x or broadcast to it: got \[3, 7\]"),
        ("blur", r"needs axes of time or space: got \[2, 7\]; pass layout='BT'"),
        (float("nan"), "the model gives NaN"),
    ):
        method = make_method(name, {"grid": 2} if name == "rise" else {})
        with pytest.raises((InputError, ModelError), match=words):
            sf.explain(model, x, target=1, method=method, baseline=fill)
