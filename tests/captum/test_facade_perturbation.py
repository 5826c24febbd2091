"""Perturbation methods give Captum's numbers, also its random ones under the same seed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import captum.attr
import pytest
import torch
from captum._utils.models.linear_model import SkLearnRidge
from torch import Tensor

import saliency_fast.captum as facade
from tests.captum import facade_models as own
from tests.captum.facade_calls import PAIR, Call
from tests.captum.perturbation_calls import EXACT, GRID, IDS, RANDOM, Ids
from tests.captum.test_facade_gradients import TOLERANCE, agree
from tests.models import Image, Multimodal, Tabular, make, randn

NAMES = (
    "FeatureAblation",
    "FeaturePermutation",
    "KernelShap",
    "Lime",
    "LimeBase",
    "Occlusion",
    "ShapleyValueSampling",
    "ShapleyValues",
)
PROMISING = ("FeatureAblation", "FeaturePermutation", "ShapleyValueSampling", "ShapleyValues")
# Captum adds these up, or fits them, in float32; a lasso stops where its gap is 1e-4.
SINGLE = {"ShapleyValues": 1e-6, "ShapleyValueSampling": 1e-6, "KernelShap": 1e-5, "Lime": 1e-4}


def seeded(call: Call, library: Any, dtype: torch.dtype) -> tuple[Any, Tensor]:
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = call.answer(library, dtype)
    return found, torch.rand(3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("call", [*EXACT, *RANDOM], ids=str)
def test_same_numbers(call: Call, dtype: torch.dtype) -> None:
    expected, found = (seeded(call, one, dtype) for one in (captum.attr, facade))
    tolerance = max(TOLERANCE[dtype], SINGLE.get(call.method, 0.0))
    # Losses are differences of outputs, whose roundings they keep.
    agree(found[0], expected[0], tolerance, 1.0 if dtype == torch.float32 else 1e-30)
    # Both leave the generator in the same state.
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_same_signatures(name: str) -> None:
    ours, theirs = getattr(facade, name), getattr(captum.attr, name)
    for method in ("__init__", "attribute", *(["attribute_future"] * (name in PROMISING))):
        mine, other = (
            inspect.signature(getattr(one, method)).parameters.values() for one in (ours, theirs)
        )
        assert [(p.name, p.kind) for p in mine] == [(p.name, p.kind) for p in other]
        for one, its in zip(mine, other, strict=True):
            if not callable(its.default):
                assert one.default == its.default, (name, method, one)
    assert ours.get_name() == theirs.get_name()
    assert callable(ours.attribute.__wrapped__)


@pytest.mark.parametrize("name", NAMES)
def test_same_properties(name: str) -> None:
    more: tuple[Any, ...] = ()
    if name == "LimeBase":
        more = (SkLearnRidge(), len, len, False, None, len)
    ours, theirs = (getattr(one, name)(Tabular(), *more) for one in (facade, captum.attr))
    assert ours.multiplies_by_inputs == theirs.multiplies_by_inputs
    assert ours.has_convergence_delta() == theirs.has_convergence_delta()
    if name not in PROMISING:
        with pytest.raises(NotImplementedError):
            ours.attribute_future()


def test_families() -> None:
    for child, parent in (
        ("Occlusion", "FeatureAblation"),
        ("FeaturePermutation", "FeatureAblation"),
        ("KernelShap", "Lime"),
        ("Lime", "LimeBase"),
        ("ShapleyValues", "ShapleyValueSampling"),
        ("FeatureAblation", "PerturbationAttribution"),
    ):
        assert issubclass(getattr(facade, child), getattr(facade, parent))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_permutation_of_the_users_own(rows: int) -> None:
    def rolled(x: Tensor, mask: Tensor) -> Tensor:
        assert mask.dtype == torch.bool
        return torch.where(mask, x.roll(1, 0) + 0.1, x)

    model, x = make(Multimodal), tuple(one[:rows] for one in PAIR)
    found, expected = (
        one.FeaturePermutation(model, perm_func=rolled).attribute(
            x, target=1, feature_mask=(GRID, torch.arange(7)[None])
        )
        for one in (facade, captum.attr)
    )
    agree(found, expected, 1e-10)


def similarity(original: Tensor, perturbed: Tensor, sample: Tensor, **_: Any) -> Tensor:
    return (-(original - perturbed).abs().mean()).exp().reshape(1)


def uneven(original: Tensor, **more: Any) -> Tensor:
    return torch.bernoulli(torch.full((1, more["num_interp_features"]), 0.7)).long()


def several(original: Tensor, **more: Any) -> Iterator[Tensor]:
    while True:
        yield uneven(original, **more)


@pytest.mark.parametrize(
    "given",
    [
        {"interpretable_model": SkLearnRidge(alpha=0.1)},
        {"similarity_func": similarity},
        {"perturb_func": uneven, "similarity_func": similarity},
        {"perturb_func": several, "interpretable_model": SkLearnRidge(alpha=0.1)},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("at_once", [1, 7])
def test_lime_by_functions_of_the_users_own(given: Any, rows: int, at_once: int) -> None:
    model, x = make(Image), 20 * randn(rows, 3, 12, 12)
    of = {"target": 1, "feature_mask": GRID, "n_samples": 40, "perturbations_per_eval": at_once}
    found, expected = (seeded_lime(one, model, x, given, of) for one in (facade, captum.attr))
    assert float(expected.abs().max()) > 0.01
    # Our linear models stand in where none was given, and are fitted in float64.
    agree(found, expected, 1e-3)


def seeded_lime(library: Any, model: Any, x: Tensor, given: Any, of: Any) -> Tensor:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found: Tensor = library.Lime(model, **given).attribute(x, **of)
    return found


def test_kernels_of_similarity() -> None:
    a, b = randn(2, 5), randn(2, 5, seed=1)
    for mode in ("cosine", "euclidean"):
        ours, theirs = (
            one.get_exp_kernel_similarity_function(mode, 0.7)
            for one in (facade, captum.attr._core.lime)
        )
        assert ours(a, b, None) == pytest.approx(theirs(a, b, None), rel=1e-6)
        assert ours((a, b), (b, b), None) == pytest.approx(theirs((a, b), (b, b), None), rel=1e-6)


def test_whole_numbers_with_a_fractional_baseline_are_float32() -> None:
    model = make(Ids)
    found, expected = (
        one.FeatureAblation(model).attribute(IDS, 7.5, target=1) for one in (facade, captum.attr)
    )
    # The points are float32 in both, ours maps too before they take the output's type.
    agree(found, expected, 1e-6)


def test_a_batch_of_one_is_not_permuted(caplog: pytest.LogCaptureFixture) -> None:
    found = facade.FeaturePermutation(make(Tabular)).attribute(randn(1, 7), target=1)
    assert not bool(found.any())
    assert "Skipping feature group [0]" in caplog.text


WRONG: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    (
        "FeatureAblation",
        AssertionError,
        "Perturbations per evaluation must be",
        {"perturbations_per_eval": 0},
    ),
    (
        "ShapleyValueSampling",
        AssertionError,
        "Ablations per evaluation must be",
        {"perturbations_per_eval": 0},
    ),
    (
        "ShapleyValueSampling",
        AssertionError,
        "the shape of feature mask",
        {"feature_mask": torch.zeros(1, 5)},
    ),
    (
        "Occlusion",
        AssertionError,
        "Must provide sliding window dim",
        {"sliding_window_shapes": ((2,), (2,))},
    ),
    (
        "Occlusion",
        AssertionError,
        "Occlusion shape for input index 0",
        {"sliding_window_shapes": (2, 2)},
    ),
    ("Occlusion", AssertionError, "Sliding window dimensions", {"sliding_window_shapes": (9,)}),
    (
        "Occlusion",
        AssertionError,
        "Stride dimension",
        {"sliding_window_shapes": (2,), "strides": 3},
    ),
    (
        "Occlusion",
        AssertionError,
        "Stride for input index 0",
        {"sliding_window_shapes": (2,), "strides": (1, 1)},
    ),
    (
        "Occlusion",
        AssertionError,
        "Stride for input index 0",
        {"sliding_window_shapes": (2,), "strides": ((1,), (1,))},
    ),
    (
        "FeatureAblation",
        AssertionError,
        "Tensor target dimension",
        {"target": torch.tensor([[1, 2]])},
    ),
    ("FeatureAblation", AssertionError, "baseline input argument must be", {"baselines": "zero"}),
]


@pytest.mark.parametrize(("name", "error", "words", "of"), WRONG, ids=lambda one: str(one)[:40])
def test_what_captum_refuses(name: str, error: type[Exception], words: str, of: Any) -> None:
    given = {"target": 1} | of
    for library in (captum.attr, facade):
        method = getattr(library, name)(make(Tabular))
        with pytest.raises(error, match=words):
            method.attribute(randn(3, 7), **given)


def test_what_the_facade_refuses_before_captum_does() -> None:
    x = randn(3, 7)
    with pytest.raises(AssertionError, match="the shape of feature mask"):
        facade.FeatureAblation(make(Tabular)).attribute(x, target=1, feature_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="must be at least 1"):
        facade.Occlusion(make(Tabular)).attribute(x, (2,), 0, target=1)
    with pytest.raises(AssertionError, match="When perturbations_per_eval > 1"):
        facade.FeatureAblation(own.OneNumber()).attribute(x, perturbations_per_eval=2)
    with pytest.raises(AssertionError, match="Invalid number of outputs"):
        facade.Lime(make(Tabular)).attribute(x)


def test_the_forward_function_is_read_at_call_time_and_nothing_stays() -> None:
    model, x = make(Image).train(), randn(2, 3, 12, 12).requires_grad_()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    method = facade.FeatureAblation(lambda x: x.sum((1, 2, 3)))
    method.forward_func = lambda x: 2 * x.sum((1, 2, 3))
    found = method.attribute(x, feature_mask=GRID)
    own_sum = torch.zeros(2, 9, dtype=torch.float64)
    own_sum.index_add_(1, GRID.expand(1, 3, 12, 12).flatten(), x.detach().flatten(1))
    torch.testing.assert_close(found[:, 0], 2 * own_sum[:, GRID[0, 0]])
    before = {name: one.clone() for name, one in model.state_dict().items()}
    found, expected = (
        one.FeatureAblation(model).attribute(x, target=1, feature_mask=GRID)
        for one in (facade, captum.attr)
    )
    agree(found, expected.detach(), 1e-10)
    assert model.training
    assert x.grad is None
    unchanged = {"num_batches_tracked"}
    for name, one in model.state_dict().items():
        if name.split(".")[-1] in unchanged:
            continue
        # Captum has moved the running statistics since.
        assert one.shape == before[name].shape


class Sparse(torch.nn.Module):
    """Rows, and a list that all of them share; for a batch, or for each row."""

    def __init__(self, by_rows: bool = False) -> None:
        super().__init__()
        self.by_rows, self.head = by_rows, torch.nn.Linear(3, 1)

    def forward(self, x: Tensor, several: Tensor) -> Tensor:
        first = several[0] if several.numel() else 0.0
        rows = self.head(x)[:, 0]
        return (rows if self.by_rows else rows.sum()) + first


@pytest.mark.parametrize("count", [0, 7])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("name", ["FeatureAblation", "FeaturePermutation", "ShapleyValueSampling"])
def test_inputs_of_other_lengths(name: str, count: int, by_rows: bool) -> None:
    torch.manual_seed(0)
    model, x = Sparse(by_rows).double(), (randn(2, 3), randn(count))
    masks = (torch.tensor([[0, 1, 2]]), torch.tensor([3]))
    answers = []
    for library in (facade, captum.attr):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            answers.append(getattr(library, name)(model).attribute(x, feature_mask=masks))
    agree(answers[0], answers[1], SINGLE.get(name, 1e-10))
