"""Calls that Captum and the facade must answer alike: one table for both."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.captum import facade_models as own
from tests.models import SHAPES, Image, Multimodal, Scalar, Segmenter, Tabular, make, randn


@dataclass(frozen=True)
class Call:
    """kind of model, class, and arguments of the class and of `attribute`. layer: by name, or
    several.
    """

    note: str
    kind: type[nn.Module]
    method: str
    inputs: Any
    of: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    tunnel: dict[str, Any] | None = None
    layer: str | tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.method}-{self.kind.__name__}-{self.note}"

    def answer(self, library: ModuleType, dtype: torch.dtype = torch.float64) -> Any:
        model = make(self.kind).to(dtype)
        made = dict(self.made)
        if isinstance(self.layer, tuple):
            made["layer"] = [model.get_submodule(name) for name in self.layer]
        elif self.layer is not None:
            made["layer"] = model.get_submodule(self.layer)
        method = getattr(library, self.method)(model, **made)
        inputs, of = moved(self.inputs, dtype), moved(self.of, dtype)
        if self.tunnel is not None:
            return library.NoiseTunnel(method).attribute(inputs, **self.tunnel, **of)
        return method.attribute(inputs, **of)


def moved(value: Any, dtype: torch.dtype) -> Any:
    """A copy with floating tensors in a type."""
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, tuple):
        return tuple(moved(one, dtype) for one in value)
    if isinstance(value, dict):
        return {name: moved(one, dtype) for name, one in value.items()}
    return value


TARGETS: dict[str, Any] = {
    "int": 1,
    "negative": -2,
    "tuple": (1,),
    "list": [0, 2, 1],
    "tensor": torch.tensor([0, 2, 1]),
    "tensor of one": torch.tensor(2),
    "tensor [1]": torch.tensor([1]),
    "list of tuples": [(0,), (-1,), (2,)],
}
RULES = (
    "gausslegendre",
    "riemann_trapezoid",
    "riemann_left",
    "riemann_right",
    "riemann_middle",
)
MODELS = {**SHAPES, own.Recurrent: (5, 4)}
DELTA = {"return_convergence_delta": True}
PAIR = (randn(3, *SHAPES[Image]), randn(3, *SHAPES[Tabular]))
SENTENCE = (
    torch.arange(15).view(3, 5) % 9,
    torch.ones(3, 5).double().tril(2),
    True,
    {"scale": 1.5},
)
FORMS: list[tuple[str, type[nn.Module], Any, dict[str, Any]]] = [
    *((note, Tabular, randn(3, 7), {"target": target}) for note, target in TARGETS.items()),
    *(
        (kind.__name__, kind, randn(3, *shape), {"target": [0, 2, 1]})
        for kind, shape in MODELS.items()
    ),
    ("tuple of one", Tabular, (randn(3, 7),), {"target": 1}),
    ("two inputs", Multimodal, PAIR, {"target": 1}),
    (
        "an argument per example",
        Multimodal,
        PAIR,
        {"target": 1, "additional_forward_args": randn(3, seed=3)},
    ),
    (
        "all kinds of arguments",
        own.Sentence,
        randn(3, 5, 8),
        {"target": -1, "additional_forward_args": SENTENCE},
    ),
    ("scalar output", Scalar, randn(3, 4), {}),
    ("column output", Tabular, randn(3, 7), {"target": (slice(2, 3),)}),
    ("map output", Segmenter, randn(2, 3, 6, 6), {"target": (1, -2, 3)}),
    ("places", Segmenter, randn(2, 3, 6, 6), {"target": [(1, 2, 3), (0, 5, 1)]}),
    ("one example", Image, randn(1, *SHAPES[Image]), {"target": 0}),
    ("inputs [B]", own.Two, (randn(3), randn(3, seed=1)), {}),
    ("one number for the batch", own.OneNumber, randn(3, 4), {}),
]


def _gradients() -> list[Call]:
    """Saliency and InputXGradient on every form."""
    calls = []
    for note, kind, inputs, of in FORMS:
        calls += [Call(note, kind, name, inputs, of) for name in ("Saliency", "InputXGradient")]
        calls.append(Call(f"{note}, signed", kind, "Saliency", inputs, of | {"abs": False}))
    both = (randn(3, 4), randn(1, 4, seed=1))
    return [*calls, Call("rows that all share", own.Shared, "Saliency", both)]


def _paths() -> list[Call]:
    """IntegratedGradients on every form, by every rule, from every baseline."""
    name, x = "IntegratedGradients", randn(3, 7)
    calls = [
        Call(note, kind, name, inputs, of | DELTA | {"n_steps": 6})
        for note, kind, inputs, of in FORMS
    ]
    given = {"target": [0, 2, 1], "n_steps": 7, **DELTA}
    for rule in RULES:
        calls.append(Call(rule, Tabular, name, x, given | {"method": rule}))
        local = {"multiply_by_inputs": False}
        calls.append(Call(f"{rule}, local", Tabular, name, x, given | {"method": rule}, local))
    calls.append(Call("defaults", Tabular, name, x, {"target": 1}))
    calls.append(Call("one step", Tabular, name, x, {"target": 1, "n_steps": 1}))
    for size in (0, 3, 8, 1000):
        more = given | {"internal_batch_size": size}
        calls.append(Call(f"internal_batch_size={size}", Tabular, name, x, more))
    baselines = {"number": 0.5, "int": 1, "row": randn(1, 7), "rows": randn(3, 7, seed=2)}
    baselines["tuple"] = (randn(1, 7),)
    for note, baseline in baselines.items():
        calls.append(Call(f"from {note}", Tabular, name, x, given | {"baselines": baseline}))
    broadcast = {"target": 1, "n_steps": 5, "baselines": torch.full((1, 1, 1, 1), 0.3)}
    calls.append(Call("from [1, 1, 1, 1]", Image, name, PAIR[0], broadcast))
    several = {"target": 1, "n_steps": 5, "baselines": (0.2, randn(1, 7)), **DELTA}
    calls.append(Call("from a number and a row", Multimodal, name, PAIR, several))
    return calls


def _tunnels() -> list[Call]:
    """NoiseTunnel without noise, where it is deterministic: order, repeats and smoothing."""
    calls = []
    for kind in ("smoothgrad", "smoothgrad_sq", "vargrad"):
        for size in (None, 2, 9):
            how = {"nt_type": kind, "nt_samples": 5, "nt_samples_batch_size": size, "stdevs": 0.0}
            note = f"tunnel {kind} by {size}"
            plain = {"target": [0, 2, 1]}
            calls += [
                Call(note, Tabular, name, randn(3, 7), plain, tunnel=how)
                for name in ("Saliency", "InputXGradient")
            ]
            path = {"n_steps": 4, "baselines": randn(3, 7, seed=5), **DELTA}
            calls.append(
                Call(note, Tabular, "IntegratedGradients", randn(3, 7), plain | path, tunnel=how)
            )
            further = {"target": 1, "additional_forward_args": SENTENCE}
            calls.append(
                Call(note, own.Sentence, "InputXGradient", randn(3, 5, 8), further, tunnel=how)
            )
    how = {"stdevs": (0.0, 0.0)}
    return [*calls, Call("two inputs", Multimodal, "Saliency", PAIR, {"target": 1}, tunnel=how)]


CALLS = [*_gradients(), *_paths(), *_tunnels()]
