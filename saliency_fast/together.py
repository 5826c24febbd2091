"""Calls whose rows are parts of one input (`rows="together"`), such as the nodes of a graph.

The whole input is one example. The model is called with all of its rows, once for each point, and
what is explained is the sum of the rows' scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.attribution import Attribution, maps_of
from saliency_fast.engine.baselines import Baseline, choices, read_baseline_set, read_baselines
from saliency_fast.engine.bind import Belonging, Call, Region, Shared, bind
from saliency_fast.engine.features import Features
from saliency_fast.errors import InputError, ModelError
from saliency_fast.graph.outputs import map_tensors, tensors_of
from saliency_fast.model.layout import LayoutLike, Layouts
from saliency_fast.model.targets import Reader, Target, Targets, tensor_of
from saliency_fast.record import describe_baseline, describe_target

_OF_WHOLE = ("delta", "error", "tie_share", "precision_error", "points", "converged")
"""Fields of an attribution that are the same for every row of an input."""


@dataclass(frozen=True)
class WholeInputModel:
    """A model of whole inputs: points [R, N, *] give [R, N, *], by a call for each of R."""

    model: Callable[..., Any]
    count: int

    def __call__(self, *given: Any, **kwargs: Any) -> Any:
        points, further = given[: self.count], given[self.count :]
        raw = [
            self.model(*(one[number] for one in points), *further, **kwargs)
            for number in range(len(points[0]))
        ]
        others = [iter(tensors_of(one)) for one in raw[1:]]
        return map_tensors(lambda one: torch.stack([one, *map(next, others)]), raw[0])


@dataclass(frozen=True)
class Summed(Reader):
    """A target that adds up what `rows` reads of the `batch` rows of an input."""

    rows: Targets

    @property
    def count(self) -> int:
        return 1

    def read(self, raw: Any, example: Tensor) -> Tensor:
        """Scores [R, 1] of outputs [R, N, *]."""
        inputs = [map_tensors(itemgetter(number), raw) for number in range(example.numel())]
        return torch.stack([self.of_rows(one).sum() for one in inputs])[:, None]

    def of_rows(self, raw: Any) -> Tensor:
        """The scores of the rows [N], or one for the whole input, from what the model returns."""
        function = self.rows.function
        if function is not None and not isinstance(function, Reader):
            found = function(raw)
            if not isinstance(found, Tensor) or found.numel() not in (1, self.rows.batch):
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise InputError(
                    "target: a function of the output must return one score, or one for each of "
                    f"the {self.rows.batch} rows, with rows='together': got {got}"
                )
            return found
        return _read(self.rows, raw)[0][:, 0]


def _read(rows: Targets, raw: Any) -> tuple[Tensor, Tensor | None]:
    """Scores [N, 1] of the rows of an input, and their classes, from what the model returns."""
    if rows.function is not None:
        # An object, which reads what the model returns as it likes.
        everyone = torch.arange(rows.batch, device=next(iter(tensors_of(raw))).device)
        return rows.read(raw, everyone)
    output = tensor_of(raw)
    if output.dim() == 0 or len(output) != rows.batch:
        number = ("output", "output[0]", "output[0, 1]")[min(output.dim(), 2)]
        raise ModelError(
            f"this target reads a score of each of the {rows.batch} rows, whose sum "
            f"rows='together' explains, and the model must return as many rows: got "
            f"{list(output.shape)}; where it returns something else of the whole input, pass a "
            f"function that reads one number of that, such as target=lambda output: {number}"
        )
    return rows.read(raw, torch.arange(rows.batch, device=output.device))


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call, as they were passed."""

    inputs: Tensor | Inputs
    target: Target = None
    baseline: Baseline = None
    forward_args: Any = ()
    forward_kwargs: Mapping[str, Any] | None = None
    region: Region = None
    features: Features = None
    layout: LayoutLike = None


@dataclass(frozen=True)
class WholeInputCall:
    """A call with rows together, as it was given and as `WholeInputModel` takes it."""

    rows: Call
    arguments: dict[str, Any]

    @property
    def target(self) -> Summed:
        target: Summed = self.arguments["target"]
        return target


def whole_call(model: Callable[..., Any], given: Arguments, layout: LayoutLike) -> WholeInputCall:
    """The call with rows together; predicted classes are those of the inputs."""
    args, kwargs = given.forward_args, given.forward_kwargs
    rows = bind(given.inputs, given.target, args, kwargs)
    if rows.targets.many and rows.targets.count > 1:
        raise InputError(
            f"target: rows='together' explains one sum: got {rows.targets.count} targets for each "
            "row; make a call for each"
        )
    if rows.targets.predicted:
        with torch.no_grad():
            raw = model(*(x.clone() for x in rows.inputs), *rows.args, **rows.kwargs)
        classes = _read(rows.targets, raw)[1]
        rows = replace(rows, targets=replace(rows.targets, classes=classes))
    own = zip(rows.inputs, rows.dtypes, strict=True)
    arguments = {
        "inputs": tuple(x.to(dtype)[None] for x, dtype in own),
        "target": Summed(rows.targets),
        "baseline": _lead(given.baseline, rows.inputs),
        "forward_args": tuple(map(_shared, args if isinstance(args, tuple) else (args,))),
        "forward_kwargs": {name: _shared(one) for name, one in (kwargs or {}).items()},
        "features": _lead(given.features, rows.inputs),
        "layout": layout_together(layout if given.layout is None else given.layout),
    }
    return WholeInputCall(rows, arguments)


def _shared(value: Any) -> Any:
    """Arguments go whole, whatever their length."""
    value = value.tensor if isinstance(value, Belonging) else value
    return Shared(value) if isinstance(value, Tensor) else value


def _lead(value: Any, inputs: Inputs) -> Any:
    """Tensors like the inputs with an axis in front, as `WholeInputModel` takes them."""
    if isinstance(value, (tuple, list)):
        return type(value)(_lead(one, inputs) for one in value)
    ranks = {x.dim() for x in inputs}
    return value[None] if isinstance(value, Tensor) and value.dim() in ranks else value


def layout_together(layout: LayoutLike) -> LayoutLike:
    """The layout of a whole input from that of its rows: its rows are positions."""
    if isinstance(layout, str):
        free = next((one for one in "TDHW" if one not in layout.upper()), "T")
        return f"B{free}{layout[1:]}"
    return None if layout is None else tuple(layout_together(one) for one in layout)  # type: ignore[misc]


def as_rows(
    found: Attribution, call: WholeInputCall, model: Callable[..., Any], baseline: Any, kind: str
) -> Attribution:
    """The attribution of a whole input by its rows, of which each has its own score."""
    count, inputs = call.rows.batch, call.arguments["inputs"]

    def every(value: Tensor) -> Tensor:
        # Targets that are objects have an axis of their own.
        one = value.flatten(0, 1)[:1] if value.dim() > 1 else value
        return one.expand(count, *one.shape[1:]).clone()

    def scores(points: Inputs) -> Tensor:
        with torch.no_grad():
            raw = model(*(x.clone() for x in points), *call.rows.args, **call.rows.kwargs)
        return call.target.of_rows(raw).double().reshape(-1).expand(count).clone()

    def baseline_scores() -> Tensor:
        given, layouts = call.arguments["baseline"], found.layouts
        if kind == "set":
            points = zip(*read_baseline_set(given, inputs, layouts), strict=True)
        else:
            parts = [read_baselines(one, inputs, layouts=layouts) for one in choices(given)]
            points = (tuple(x[0] for x in one) for one in parts)  # type: ignore[assignment]
        cast = [tuple(b.to(x.dtype) for b, x in zip(one, inputs, strict=True)) for one in points]
        return torch.stack([scores(one) for one in cast]).mean(0)

    target, kept = describe_target(call.rows.targets)
    spec, kept_baseline = describe_baseline(baseline)
    others = {n: one for n, one in found.kept.items() if not n.startswith(("baseline.", "target."))}
    values = maps_of(found)
    classes = call.rows.targets.classes
    known = {name: getattr(found, name) for name in _OF_WHOLE}
    repeated: dict[str, Any] = {n: one if one is None else every(one) for n, one in known.items()}
    about = replace(found.provenance, rows="together", target=target, baseline=spec, layout=None)
    return replace(
        found,
        layouts=Layouts([tuple(x.shape) for x in call.rows.inputs]),
        values=tuple(one[0, 0] for one in values) if call.rows.is_tuple else values[0][0, 0],
        scores=scores(tuple(x[0] for x in inputs)),
        baseline_scores=None if found.baseline_scores is None else baseline_scores(),
        **repeated,
        classes=None if classes is None else classes[:, 0],
        extras={name: every(one) for name, one in found.extras.items()},
        kept=others | kept | kept_baseline,
        provenance=about,
    )
