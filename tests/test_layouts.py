"""Layouts: a model that permutes its input gets the maps of the same model in the standard one."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast import evaluate, summary
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.inputs import read_evaluation_input
from saliency_fast.evaluate.metric import Suite
from saliency_fast.model.layout import Axes, LayoutWarning
from tests.layout_models import LAYOUTS, SIZES, laid, standard, to
from tests.models import Tabular, make, randn
from tests.naive import relative_l2

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gradient": ("gradient", {}),
    "mean": (sf.IntegratedGradients(steps=3), {"baseline": "mean"}),
    "blur": (sf.IntegratedGradients(steps=3), {"baseline": "blur"}),
    "several": (sf.IntegratedGradients(steps=3), {"baseline": ["mean", "blur", 0.5]}),
    "set": (sf.ExpectedGradients(samples=4), {"baseline": ["blur", "mean"]}),
    "blur_ig": (sf.BlurIG(steps=3, max_sigma=2.0), {}),
    "occlusion": ("occlusion", {}),
    "occlusion of threes": (sf.Occlusion(3, 2), {"baseline": "mean"}),
    "coarse to fine": (sf.Occlusion(1, hierarchy=1), {}),
    "rise": (sf.Rise(samples=20, grid=2), {"baseline": "blur"}),
    "grid": ("feature_ablation", {"features": "grid:3"}),
    "slic": ("feature_ablation", {"features": "slic:6"}),
    "kernel_shap": (sf.KernelShap(samples=12), {"features": "grid:2"}),
    "grad_cam": ("grad_cam", {}),
    "layer_cam": (sf.LayerCAM(), {}),
    "score_cam": ("score_cam", {}),
}


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert relative_l2(found, expected) < 1e-9


def inputs_of(name: str) -> Tensor:
    return randn(2, *SIZES[LAYOUTS[name][0]])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", METHODS)
def test_maps(name: str, kind: str) -> None:
    method, more = METHODS[kind]
    if kind == "set":
        more = {"baseline": [randn(*SIZES[LAYOUTS[name][0]]), 0.25]}
    moved = {
        key: [to(name, one[None])[0] if isinstance(one, Tensor) else one for one in value]
        if isinstance(value, list)
        else value
        for key, value in more.items()
    }
    if kind == "slic":
        pytest.importorskip("skimage")
    x = inputs_of(name)
    expected = sf.explain(standard(name), x, target=1, method=method, **more)
    found = sf.explain(laid(name), to(name, x), target=1, method=method, **moved)
    shown = to(name, expected.values) if LAYOUTS[name][1] else expected.values[:, 0]
    near(found.values, shown)
    assert found.provenance.layout is not None
    assert Axes(found.provenance.layout[0]) == Axes(found.layout[0] or "")
    # Channels are summed over where they are, for every reduction.
    for reduction in ("sum", "absmax", "l2"):
        near(found.map(reduction), expected.map(reduction))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_given_counts(name: str, tmp_path: Path) -> None:
    """A function tells nothing: maps need the layout, records keep it, replays agree."""
    whole, x = laid(name), to(name, inputs_of(name))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5).double())
    found = sf.explain(flat, x, target=1, method="occlusion", layout=name.lower())
    assert found.layout == (name,)
    assert found.map().shape == Axes(name).standard(found.values)[:, 0].shape
    again = sf.load(found.save(tmp_path / "map.safetensors"))
    assert again.provenance.layout == [name]
    assert torch.equal(again.map(), found.map())
    assert sf.replay(again, flat, x)
    assert name in str(sf.Engine(flat, layout=name).plan(x, 1))
    with sf.Engine(whole, "occlusion") as engine:
        near(engine.submit(x, 1).result().values, engine(x, 1).values)
        near(engine.submit(x, 1, layout=name).result().values, engine(x, 1).values)


@pytest.mark.parametrize("name", LAYOUTS)
def test_regions(name: str) -> None:
    x, size = inputs_of(name), SIZES[LAYOUTS[name][0]][1:]
    box = [(1, n - 2) for n in size]
    mask = randn(*size) > 0
    for region in (box, mask):
        expected = sf.explain(standard(name), x, target=1, method="gradient", region=region)
        found = sf.explain(laid(name), to(name, x), target=1, method="gradient", region=region)
        near(found.map(), expected.map())
        near(found.map("l2"), expected.map("l2"))


SUITE = Suite(quick=True).metrics()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("metric", [one for one in SUITE if not one.startswith("sanity")])
def test_metrics(name: str, metric: str) -> None:
    x, target = inputs_of(name), torch.tensor([1, 3])
    masks = torch.zeros(2, *x.shape[2:], dtype=torch.bool)
    masks[(slice(None), *(slice(1, n - 1) for n in x.shape[2:]))] = True
    start, method = randn(1, *x.shape[1:]), sf.IntegratedGradients(steps=3)
    found = []
    for model, move in ((standard(name), lambda one: one), (laid(name), lambda one: to(name, one))):
        about: Any = {"target": target, "method": method, "baseline": move(start)}
        maps = sf.explain(model, move(x), **about)
        found.append(SUITE[metric](model, move(x), maps, boxes=masks, **about))
    expected, own = (one.values for one in found)
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_substrates_and_tensors_of_maps(name: str) -> None:
    """Tensors beside the inputs are in the model's layout, too."""
    x, fill = inputs_of(name), randn(1, *SIZES[LAYOUTS[name][0]])
    values, target = randn(*x.shape), torch.tensor([1, 3])
    expected = evaluate.Deletion(fill, steps=5)(standard(name), x, values, target=target)
    metric = evaluate.Deletion(to(name, fill), steps=5)
    for maps in (to(name, values), values.sum(1)):
        found = metric(laid(name), to(name, x), maps, target=target)
        near(found.values, expected.values)
    nothing = copy.copy(to(name, x))
    with pytest.raises(InputError, match=r"substrate|baseline"):
        evaluate.Deletion(randn(1, 77))(laid(name), nothing, to(name, values), target=target)


@pytest.mark.parametrize("name", LAYOUTS)
def test_summaries(name: str) -> None:
    x = inputs_of(name)
    told = []
    for model, own in ((standard(name), x), (laid(name), to(name, x))):
        maps = sf.explain(model, own, target=1, method="occlusion")
        for how in ("components", "grid:3"):
            told.append([str(one) for one in summary.summarise(model, own, maps, how=how)])
            told.append(summary.regions(own, maps, how).labels.tolist())
    assert told[:4] == told[4:]


class Alone(nn.Module):
    """Tells nothing of its input: a linear layer of all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = nn.Linear(size, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))


ASKING: dict[str, dict[str, Any]] = {
    "baseline='mean'": {"method": sf.IntegratedGradients(steps=2), "baseline": "mean"},
    "baseline='blur'": {"method": sf.IntegratedGradients(steps=2), "baseline": "blur"},
    "a window": {"method": "occlusion"},
    "features='grid:2'": {"method": "feature_ablation", "features": "grid:2"},
    "rise": {"method": sf.Rise(samples=4, grid=2)},
    "a path of blurs": {"method": sf.BlurIG(steps=2, max_sigma=1.0)},
    "region=": {"method": "gradient", "region": [(0, 2)]},
}


@pytest.mark.parametrize("what", ASKING)
def test_what_the_model_does_not_tell_is_asked_for(what: str) -> None:
    """Series and clips: an error; pictures: a warning, and channels first."""
    with pytest.raises(InputError, match=rf"{what} depends on .*pass layout=, such as 'BCT'"):
        sf.explain(Alone(12), randn(2, 4, 3), target=1, **ASKING[what])
    with pytest.raises(InputError, match=r"'BTCHW' \(a clip\)"):
        sf.explain(Alone(2 * 3 * 16), randn(2, 2, 3, 4, 4), target=1, **ASKING[what])
    picture, more = randn(2, 3, 4, 4), dict(ASKING[what])
    if "region" in more:
        more["region"] = [(0, 2), (0, 2)]
    with pytest.warns(LayoutWarning, match="taken as layout='BCHW'") as seen:
        found = sf.explain(Alone(48), picture, target=1, **more)
    assert [one.filename for one in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sf.explain(Alone(48), picture, target=1, layout="BCHW", **more)
    assert found.values.shape == again.values.shape


def test_what_means_the_same_in_every_layout_is_not_asked_for() -> None:
    x, model = randn(2, 4, 3), Alone(12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("gradient", "integrated_gradients", "smoothgrad", sf.Occlusion((1, 3))):
            found = sf.explain(model, x, target=1, method=method)
        sf.explain(model, x, target=1, method="feature_ablation")
        sf.explain(make(Tabular), randn(2, 7), target=1, method="occlusion")
    with pytest.raises(InputError, match=r"map\(\) depends on .*pass layout="):
        found.map()
    assert found.map(channel_axis=2).shape == (2, 4)


def test_metrics_ask_too() -> None:
    x, model = randn(2, 4, 3), Alone(12)
    with pytest.raises(InputError, match="pass layout="):
        evaluate.Deletion()(model, x, x, target=1)
    with pytest.raises(InputError, match="pass layout="):
        summary.regions(x, x)
    curve = evaluate.Deletion()(model, x, x, target=1, layout="BTF").curve
    assert curve is not None
    assert len(curve.x) == 5


@pytest.mark.parametrize(
    ("layout", "error", "words"),
    [
        (3, InputTypeError, "a string with one letter per axis"),
        ("BT", InputError, "expected 3 letters"),
        ("TBF", InputError, "B, the batch, first"),
        ("BTT", InputError, "each once"),
        ("BTX", InputError, "C is channels, F features"),
        (("BTF", "BTF"), InputError, "one for each of 1 inputs"),
    ],
)
def test_layouts_that_are_none(layout: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sf.explain(Alone(12), randn(2, 4, 3), target=1, layout=layout)


def test_results_can_be_pickled_and_hold_no_model() -> None:
    model = laid("BTF")
    function = lambda x: model(x)  # noqa: E731
    found = sf.explain(function, to("BTF", inputs_of("BTF")), target=1, method="gradient")
    again = pickle.loads(pickle.dumps(found))
    assert again.layout == ("BTC",)
    assert torch.equal(again.map(), found.map())


def test_waveforms() -> None:
    """[B, T] into a convolution of one channel: time, of which "blur" is made."""

    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv1d(1, 3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[:, None])

    model, x = make(Wave), randn(2, 20)
    for method, more in (
        (sf.IntegratedGradients(steps=3), {"baseline": "blur"}),
        (sf.BlurIG(steps=3, max_sigma=2.0), {}),
        ("occlusion", {}),
        ("grad_cam", {}),
        (sf.Rise(samples=8, grid=2), {}),
    ):
        found = sf.explain(model, x, target=1, method=method, **more)
        expected = sf.explain(model.net, x[:, None], target=1, method=method, **more)
        near(found.values, expected.values[:, 0])
    values = randn(2, 20)
    found = evaluate.Road(output="logit")(model, x, values, target=torch.tensor([1, 1]))
    expected = evaluate.Road(output="logit")(
        model.net, x[:, None], values, target=torch.tensor([1, 1])
    )
    near(found.values, expected.values)


def test_overlays() -> None:
    """Pictures of all layouts look alike; of several inputs those that are pictures are drawn."""
    for name in ("BHWC", "BHCW", "BTCHW", "BTHWC", "BHW"):
        x = inputs_of(name)
        expected = sf.explain(standard(name), x, target=1, method="grad_cam").overlay(x)
        found = sf.explain(laid(name), to(name, x), target=1, method="grad_cam")
        assert torch.equal(found.overlay(to(name, x)), expected)
    model = standard("BHWC")
    x, table = randn(2, 3, 9, 12), randn(2, 4)
    both = sf.explain(lambda a, b: model(a)[:, 1] + b.sum(1), (x, table), method="gradient")
    drawn = both.overlay((x, table))
    assert isinstance(drawn, tuple)
    assert drawn[1] is None
    assert torch.equal(drawn[0], both.overlay((x, table), input=0))
    assert drawn[0].shape == (2, 9, 12, 3)
    for wrong, words in (
        ({"input": 1}, r"only images, videos and volumes have a picture: got input 1 \[2, 4\]"),
        ({"input": 2}, "number of one of 2 inputs"),
    ):
        with pytest.raises(InputError, match=words):
            both.overlay((x, table), **wrong)
    with pytest.raises(InputError, match="got 1, expected 2"):
        both.overlay(x)


def test_a_subject_is_in_the_standard_layout() -> None:
    x = to("BHWC", inputs_of("BHWC"))
    subject = read_evaluation_input(laid("BHWC"), x, x)
    assert torch.equal(subject.inputs, x.movedim(3, 1))
    assert torch.equal(subject.running.cast(subject.inputs), x)
