"""Every mistake has its own error: type, what, got, expected and cure; and it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import saliency_fast as sf
from saliency_fast.errors import (
    BudgetError,
    InputError,
    InputTypeError,
    ModelError,
    SaliencyError,
)
from saliency_fast.methods import METHODS
from tests.traces import Net, one_thread, unchanged

BUILTIN = {
    InputError: ValueError,
    InputTypeError: TypeError,
    ModelError: RuntimeError,
    BudgetError: RuntimeError,
}
NAN, INF = float("nan"), float("inf")
X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


FEW = sf.IntegratedGradients(steps=4)
EXPECTED = sf.ExpectedGradients(samples=4)


@dataclass(frozen=True)
class Case:
    """A call on a model that raises `error` with all of `words`, split at "|", in its text.

    `after` is what the model makes of its scores [B, 5].
    """

    words: str
    error: type[SaliencyError]
    call: Callable[[Any], object]
    after: Callable[[Tensor], object] | None = None


def asked(
    words: str,
    error: type[SaliencyError],
    x: Any = X,
    after: Callable[[Tensor], object] | None = None,
    **options: Any,
) -> Case:
    """The case of a whole call."""

    def call(model: Any) -> object:
        return sf.explain(model, x, **{"target": 0, "method": FEW} | options)

    return Case(words, error, call, after)


def made(words: str, error: type[SaliencyError], method: Any, **fields: Any) -> Case:
    """The case of a method that cannot be made."""
    return Case(words, error, lambda _: method(**fields))


def with_value(index: int, value: float) -> Tensor:
    x = X.clone()
    x.view(-1)[index] = value
    return x


INPUTS = {
    "integers": asked(
        "float32, float64, float16 or bfloat16|got torch.int32|.float()", InputTypeError, X.int()
    ),
    "half": asked("got float16|weights are float32|.float()", InputTypeError, X.half()),
    "booleans": asked(
        "float32, float64, float16 or bfloat16|got torch.bool", InputTypeError, X > 0
    ),
    "no tensor": asked("must be a tensor|got float|torch.as_tensor", InputTypeError, 3.0),
    "nan": asked("NaN or infinity|expected finite|isfinite", InputError, with_value(7, NAN)),
    "infinity": asked("NaN or infinity|expected finite", InputError, with_value(-1, INF)),
    "both infinities": asked("NaN or infinity", InputError, X / 0),
    "second is nan": asked("input 1 holds NaN", InputError, (X, X * NAN)),
    "empty batch": asked("is empty|got [0, 3, 9, 9]|expected at least one", InputError, X[:0]),
    "one axis": asked("batch axis|got [9]|x[None]", InputError, X[0, 0, 0]),
    "no axis": asked("batch axis|got []|x[None]", InputError, X.sum()),
    "empty tuple": asked("empty tuple|at least one tensor", InputError, ()),
    "two batch sizes": asked("different batch sizes|1 has 2|0 4", InputError, (X, X[:2])),
    "two devices": asked(
        "different devices|input 1 on meta|input 0 on cpu|.to(", InputError, (X, X.to("meta"))
    ),
}

TARGETS = {
    "too large": asked("out of range|got 5|expected 0 to 4", InputError, target=5),
    "negative": asked("out of range|got -1|0 or more", InputError, target=-1),
    "one too large": asked("got 9|expected 0 to 4", InputError, target=[0, 9, 1, 2]),
    "wrong length": asked("wrong length|got 2|each of 4 examples", InputError, target=[0, 1]),
    "too many axes": asked("[B] or [B, K]|got [4, 1, 1]", InputError, target=[[[0]]] * 4),
    "ragged": asked("one int per example", InputError, target=[[0], [1], [2], [0, 1]]),
    "missing": asked("missing|[5] numbers|expected one|target=int", InputError, target=None),
    "for one number": asked(
        "one number per example|target=None", InputError, after=lambda y: y[:, 0]
    ),
    "predicted for one number": asked(
        "one number per example|target=None",
        InputError,
        target="predicted",
        after=lambda y: y[:, 0],
    ),
    "int for maps": asked(
        "[B, classes]|got [1, 5, 2]|(class,)",
        InputError,
        after=lambda y: torch.stack([y, y], 2),
    ),
    "float tensor": asked("integers|got torch.float32", InputTypeError, target=torch.ones(4)),
    "float list": asked("integers|got torch.float32", InputTypeError, target=[0.5] * 4),
    "float": asked("None, an int|got float", InputTypeError, target=1.0),
    "bool": asked("must be an int|got bool", InputTypeError, target=True),
    "bool list": asked("integers|got torch.bool", InputTypeError, target=[True] * 4),
    "unknown name": asked("'predicted'|got 'largest'", InputError, target="largest"),
    "tuple out of range": asked("target (9,)|[5] per example", InputError, target=(9,)),
    "tuple too long": asked("target (0, 0)|[5] per example", InputError, target=(0, 0)),
    "tuple of text": asked("ints, slices|got str", InputTypeError, target=("a",)),
    "places too long": asked("whole output [5]|got 2", InputError, target=[(0, 0)] * 4),
    "places out of range": asked("got 7|expected 0 to 4", InputError, target=[(0,), (7,)] * 2),
    "function keeps an axis": asked(
        "one score per row|got [1, 5]|expected [1]", InputError, target=lambda y: y
    ),
    "function sums the batch": asked("got []|expected [1]", InputError, target=lambda y: y.sum()),
    "function averages the batch": asked(
        "got []|expected [1]|4 examples|lambda output: output[:, 1]|over the rows",
        InputError,
        target=lambda y: y[:, 1].mean(),
    ),
    "function of no tensor": asked("got float", InputError, target=lambda y: y[0, 0].item()),
}
MASKS = {
    f"mask {list(shape)}": asked(
        f"mask must match|got {list(shape)}|expected [5]|leading batch axis of 4",
        InputError,
        target=(0, torch.ones(shape)),
        after=lambda y: torch.stack([y, y], 1),
    )
    for shape in ((4,), (3, 5), (5, 5), (1, 5), (4, 1, 5), (1, 1, 5), (4, 4, 5))
}

METHOD_FIELDS = {
    "no steps": made("steps|at least 1|got 0", InputError, sf.IntegratedGradients, steps=0),
    "minus steps": made("steps|got -3", InputError, sf.IntegratedGradients, steps=-3),
    "part steps": made(
        "steps|whole number|got 2.5", InputTypeError, sf.IntegratedGradients, steps=2.5
    ),
    "true steps": made("steps|got True", InputTypeError, sf.IntegratedGradients, steps=True),
    "one trapezoid": made(
        "at least 2|got 1", InputError, sf.IntegratedGradients, steps=1, rule="trapezoid"
    ),
    "unknown rule": made(
        "rule|midpoint, trapezoid, gauss_legendre|got 'simpson'",
        InputError,
        sf.IntegratedGradients,
        rule="simpson",
    ),
    "no nested rule": made(
        "midpoint, trapezoid|got 'left'",
        InputError,
        sf.IntegratedGradients,
        rule="left",
        tolerance=0.1,
    ),
    "max_steps": made(
        "max_steps|refine 50|got 60|expected at least",
        InputError,
        sf.IntegratedGradients,
        tolerance=0.1,
        max_steps=60,
    ),
    **{
        f"tolerance {value}": made(
            f"tolerance|got {value}", InputError, sf.IntegratedGradients, tolerance=value
        )
        for value in (0.0, -0.1, 1.0, 2, NAN, INF)
    },
    **{
        f"{kind.name} {field}={value}": made(f"{field}|got {value}", error, kind, **{field: value})
        for kind in (sf.SmoothGrad, sf.SmoothGradSquared, sf.VarGrad)
        for field, value, error in (
            ("samples", 0, InputError),
            ("samples", -2, InputError),
            ("samples", 2.0, InputTypeError),
            ("sigma", 0, InputError),
            ("sigma", -1.0, InputError),
            ("noise_level", 0, InputError),
            ("noise_level", -0.1, InputError),
            ("noise_level", INF, InputError),
            ("seed", 1.5, InputTypeError),
            ("seed", 2**63, InputTypeError),
            ("seed", [1, 2], InputTypeError),
        )
    },
    "one sample has no variance": made("at least 2|got 1", InputError, sf.VarGrad, samples=1),
    "no samples": made("samples|got 0", InputError, sf.ExpectedGradients, samples=0),
    "minus noise": made("got -1", InputError, sf.ExpectedGradients, noise_level=-1),
    "text seed": made("seed|got 'a'", InputTypeError, sf.ExpectedGradients, seed="a"),
    "seeds of another batch": asked(
        "seed has the wrong length|got 2|4 examples", InputError, method=sf.SmoothGrad(seed=(1, 2))
    ),
}

MODELS = {
    "text": asked("return a tensor|got str|target=function", ModelError, after=lambda y: "cat"),
    "nothing": asked("return a tensor|got NoneType", ModelError, after=lambda y: None),
    "list": asked("return a tensor|got list", ModelError, after=lambda y: [y]),
    "nan": asked("NaN or infinite scores|[0, 1, 2, 3]", ModelError, after=lambda y: y * NAN),
    "one nan": asked(
        "examples [3]|expected finite",
        ModelError,
        points_per_launch=16,
        after=lambda y: y * torch.where(torch.arange(len(y)) % 4 == 2, NAN, 1.0)[:, None],
    ),
    "nan gradient": asked(
        "NaN or infinite attributions", ModelError, after=lambda y: (y * 0).abs().sqrt()
    ),
    "detached": asked("not differentiable|detach()", ModelError, after=lambda y: y.detach()),
    "constant": asked("not differentiable", ModelError, after=lambda y: torch.ones(len(y), 5)),
    "integers": asked("not differentiable|integer", ModelError, after=lambda y: y.long()),
    "mean of the batch": asked("one row per|got []", ModelError, after=lambda y: y.mean()),
    "no batch axis": asked("got [5]|batch of 1", ModelError, after=lambda y: y.mean(0)),
}

OPTIONS = {
    "budget under one point": asked(
        "smaller than one point|got 10 B|at least|raise the budget", BudgetError, memory_budget=10
    ),
    **{
        f"budget {text}": asked(
            f"memory_budget|got {text!r}|'8GiB'", InputError, memory_budget=text
        )
        for text in ("lots", "", "8 giraffes", "1.2.3GiB", "-1GiB", "8IB", "9" * 400, -5, 0)
    },
    **{
        f"budget {kind}": asked(f"memory_budget|got {kind}", InputTypeError, memory_budget=value)
        for kind, value in (("float", 2.5), ("bool", True))
    },
    **{
        f"points_per_launch {value}": asked(
            f"points_per_launch|got {value}", error, points_per_launch=value
        )
        for value, error in ((0, InputError), (-1, InputError), (2.5, InputTypeError))
    },
    "points_per_launch text": asked(
        "points_per_launch|got '4'", InputTypeError, points_per_launch="4"
    ),
    "unknown method": asked("|".join((*METHODS, "got 'magic'")), InputError, method="magic"),
    "method class": asked(
        "IntegratedGradients()|got the class", InputTypeError, method=sf.IntegratedGradients
    ),
    "no method": asked("a name or a method|got None", InputTypeError, method=None),
    "unknown precision": asked("precision|float32|got 'float8'", InputError, precision="float8"),
}

BASELINES = {
    "nan": asked("baseline must be finite", InputError, baseline=X * NAN),
    "nan number": asked("baseline must be finite|got nan", InputError, baseline=NAN),
    "of smoothgrad": asked(
        "compares with nothing|IntegratedGradients", InputError, method="smoothgrad", baseline=0.0
    ),
    "of gradient": asked("compares with nothing", InputError, method="gradient", baseline=X),
    "long tuple": asked("got 2|expected 1|list", InputError, baseline=(0.0, 0.0)),
    "unknown name": asked("blur, mean, uniform|got 'noise'", InputError, baseline="noise"),
    "empty list": asked("empty list|None for zeros", InputError, baseline=[]),
    "bool": asked("None, a number|got bool", InputTypeError, baseline=True),
    "another device": asked("got meta|x is on cpu|.to(", InputError, baseline=X.to("meta")),
    "blur of a table": asked(
        "axes of time or space|got [4, 7]|'mean'",
        InputError,
        X.view(4, -1)[:, :7],
        baseline="blur",
    ),
    "set of another shape": asked(
        "set|got [7, 3, 8, 8]|'M', 3, 9, 9",
        InputError,
        method=EXPECTED,
        baseline=torch.zeros(7, 3, 8, 8),
    ),
    "empty set": asked(
        "set is empty|got [0, 3, 9, 9]", InputError, method=EXPECTED, baseline=X[:0]
    ),
    "sets of two sizes": asked(
        "same number of baselines|[4, 3]", InputError, (X, X), method=EXPECTED, baseline=(X, X[:3])
    ),
    "set that differs between examples": asked(
        "shared|[M, ...]", InputError, method=EXPECTED, baseline="mean"
    ),
}


def refused(case: Case, model: Any) -> str:
    """The text of the error, its type and words checked; nothing else may be left of the call."""
    with unchanged(model, X), pytest.raises(SaliencyError) as caught:
        case.call(model)
    assert type(caught.value) is case.error
    assert isinstance(caught.value, BUILTIN[case.error])
    text = str(caught.value)
    for word in case.words.split("|"):
        assert word in text, f"{word!r} is not in {text!r}"
    return text


def cases(**tables: dict[str, Case]) -> list[Any]:
    return [
        pytest.param(case, id=f"{table}-{name}"[:60].replace(" ", "_"))
        for table, found in tables.items()
        for name, case in found.items()
    ]


@pytest.mark.parametrize(
    "case",
    cases(
        inputs=INPUTS,
        targets=TARGETS | MASKS,
        methods=METHOD_FIELDS,
        models=MODELS,
        options=OPTIONS,
        baselines=BASELINES,
    ),
)
def test_a_mistake_has_its_own_error(case: Case) -> None:
    refused(case, Net(case.after))


def test_a_wrong_baseline_reads_as_promised() -> None:
    text = (
        "baseline must match x or broadcast to it: got [3, 8, 8], x is [4, 3, 9, 9]; "
        "pass baseline=None for zeros"
    )
    wrong = asked(text, InputError, baseline=torch.zeros(3, 8, 8))
    assert refused(wrong, Net()) == text


@pytest.mark.parametrize("way", [sf.Engine.__call__, sf.Engine.plan, sf.Engine.stream])
def test_every_way_in_refuses_alike(way: Callable[..., Any]) -> None:
    def call(model: Any) -> object:
        found = way(sf.Engine(model, FEW), X, 0, torch.zeros(3, 8, 8))
        return next(found) if way is sf.Engine.stream else found

    refused(Case("baseline must match x|got [3, 8, 8]", InputError, call), Net())


@pytest.mark.parametrize("model", [3, None, "resnet50"])
def test_a_model_must_be_callable(model: Any) -> None:
    refused(asked(f"model must be callable: got {type(model).__name__}", InputTypeError), model)


def test_a_baseline_outside_the_models_domain() -> None:
    def logarithm(x: Tensor) -> Tensor:
        return x.log().sum(1)

    x = torch.full((2, 3), 2.0)
    infinite = asked("infinite scores at the baseline|[0, 1]", ModelError, x, target=None)
    refused(infinite, logarithm)
    assert sf.explain(logarithm, x, method=FEW, baseline=1.0).delta.abs().max() < 0.1


def test_a_model_in_training_mode_is_explained_in_evaluation_mode() -> None:
    model, still = Net(), Net().eval()
    with unchanged(model, X), unchanged(still, X):
        found = sf.explain(model, X, target=1, method=FEW)
        expected = sf.explain(still, X, target=1, method=FEW)
    assert torch.equal(found.values, expected.values)
    assert found.provenance.trained_mode
    assert not expected.provenance.trained_mode


def test_evaluation_mode_reaches_the_model() -> None:
    seen = []
    model = Net(lambda y: (seen.append([one.training for one in model.modules()]), y)[1])
    sf.explain(model, X, target=1, method=FEW)
    assert seen
    assert not any(map(any, seen))
    assert model.training
