"""Arguments that a method has no use for are refused, not passed over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError, ModelError
from saliency_fast.methods import METHODS

GROUPS = {
    *("feature_ablation", "feature_permutation", "lime", "kernel_shap", "shapley_sampling"),
    *("shapley_values", "integrated_hessians"),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten()).double()


@pytest.mark.parametrize("name", METHODS)
def test_features(name: str) -> None:
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    engine = sf.Engine(net(), name)
    if name in GROUPS:
        # Two by two blocks: the map has four values at most.
        found = engine(x, 1, features="grid:2").values[0].unique()
        assert len(found) <= 4 or name == "integrated_hessians"
        return
    for call in (engine, engine.plan, engine.submit):
        with pytest.raises(InputError, match=r"features: this method .* KernelShap"):
            call(x, 1, features="grid:2")
    with pytest.raises(InputError, match="features"):
        next(engine.stream(x, 1, features="grid:2"))


def test_conductance_is_about_one_layer() -> None:
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    with pytest.raises(InputError, match="one layer: got 2; call once for each"):
        sf.explain(net(), x, target=1, method="conductance", at=["0", "2"])


@pytest.mark.parametrize("method", ["gradient", "deeplift"])
def test_layers_behind_each_other(method: str) -> None:
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    with pytest.raises(ModelError, match="explain each by itself"):
        sf.explain(net(), x, target=1, method=method, at=["0", "2"])


def test_what_is_about_a_layer_needs_one() -> None:
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    with pytest.raises(InputError, match="layer_input is about a layer: name it with at="):
        sf.explain(net(), x, target=1, method="gradient", layer_input=True)
    region = (slice(0, 2), slice(0, 2))
    with pytest.raises(InputError, match="region is of the inputs, and this map is a layer's"):
        sf.explain(net(), x, target=1, method="grad_cam", region=region)


def test_a_method_by_mistake() -> None:
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    with pytest.raises(InputError, match="got 'gradcam'; did you mean 'grad_cam'"):
        sf.explain(net(), x, target=1, method="gradcam")
    with pytest.raises(InputTypeError, match=r"got the class LRP; make one with LRP\(\)"):
        sf.explain(net(), x, target=1, method=sf.LRP)
    with pytest.raises(InputError, match="on the meta device"):
        sf.explain(net(), x.to("meta"), target=1)
