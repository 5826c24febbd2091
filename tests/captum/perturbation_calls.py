"""Calls of perturbation methods that Captum and the facade must answer alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.captum import facade_models as own
from tests.captum.facade_calls import PAIR, SENTENCE, TARGETS, Call
from tests.models import SHAPES, Image, Multimodal, Scalar, Segmenter, Tabular, Video, randn


class PythonNumber(nn.Module):
    """A number of Python's for a whole batch."""

    def forward(self, x: Tensor) -> float:
        return float((x * torch.arange(4)).sin().sum())


class Numbers(nn.Module):
    """Two numbers for a whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.sin().sum(), (x * torch.arange(4)).cos().sum()])


class Shares(nn.Module):
    """Each row's share of the batch, in every class."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).softmax(0)


class Placed(nn.Module):
    """A constant for each row of batches of three."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.node = nn.Linear(7, 4), torch.arange(21).view(3, 7) / 7

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.node).tanh())


class Bags(nn.Module):
    """Sums of embeddings, of tokens from an offset on to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode="sum")

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.bag(ids, offsets).tanh()


class Column(nn.Sequential):
    """A number per row in a column of its own, as regressions have it."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


class Ids(nn.Module):
    """Classes of token ids [B, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids.long()).tanh().cumsum(1).sin().mean(1))


class Chosen(nn.Module):
    """The class itself, a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).argmax(1)


class Mixed(nn.Sequential):
    """Rows that depend on each other."""

    def __init__(self) -> None:
        norm = nn.BatchNorm1d(9, track_running_stats=False)
        super().__init__(nn.Linear(7, 9), norm, nn.Tanh(), nn.Linear(9, 4))


GRID = (torch.arange(12)[:, None] // 4 * 3 + torch.arange(12) // 4)[None, None]
IDS = torch.arange(15).view(3, 5)
# Masks with gaps, below zero, and with numbers that both inputs have.
SPAN = (GRID * 5 - 7, torch.arange(7)[None] * 5 - 7)
OWN = GRID + torch.arange(3)[:, None, None, None]
MASKS: dict[str, tuple[type[nn.Module], Any, Any]] = {
    "grid": (Image, PAIR[0], GRID),
    "own": (Image, PAIR[0], OWN),
    "all": (Image, PAIR[0], GRID.expand(1, 3, 12, 12)),
    "span": (Multimodal, PAIR, SPAN),
    "table": (Tabular, PAIR[1], torch.tensor([[4, 4, 0, 2, 2, 0, 9]])),
    "tuple of one": (Tabular, (PAIR[1],), (torch.arange(7)[None] // 2,)),
}
AGGREGATES: list[tuple[str, type[nn.Module], Any]] = [
    ("one number", own.OneNumber, randn(3, 4)),
    ("one number of one row", own.OneNumber, randn(1, 4)),
    ("a number of Python's", PythonNumber, randn(3, 4)),
    ("two numbers", Numbers, randn(3, 4)),
    ("no target", Tabular, randn(3, 7)),
]


def _ablations() -> list[Call]:
    name, calls = "FeatureAblation", []
    for note, target in TARGETS.items():
        calls.append(Call(note, Tabular, name, randn(3, 7), {"target": target}))
    for note, (kind, inputs, mask) in MASKS.items():
        for count in (1, 2, 100):
            of = {"target": [0, 2, 1], "feature_mask": mask, "perturbations_per_eval": count}
            calls.append(Call(f"{note} by {count}", kind, name, inputs, of))
    baselines = {"number": 0.5, "int": 1, "row": randn(1, 7), "rows": randn(3, 7, seed=2)}
    for note, one in baselines.items():
        calls.append(
            Call(f"from {note}", Tabular, name, randn(3, 7), {"target": 1, "baselines": one})
        )
    both = {"target": 1, "baselines": (0.2, randn(1, 7)), "feature_mask": SPAN}
    calls.append(Call("from both", Multimodal, name, PAIR, both))
    calls += [Call(note, kind, name, inputs) for note, kind, inputs in AGGREGATES]
    calls += [
        Call("ids", Ids, name, IDS, {"target": 1}),
        Call("ids from one", Ids, name, IDS, {"target": 1, "baselines": 7}),
        Call("a whole number", Chosen, name, randn(5, 4)),
        Call("scalar output", Scalar, name, randn(3, 4)),
        Call("inputs [B]", own.Two, name, (randn(3), randn(3, seed=1))),
        Call("places", Segmenter, name, randn(2, 3, 4, 4), {"target": [(1, 2, 3), (0, 3, 1)]}),
        Call(
            "arguments",
            own.Sentence,
            name,
            randn(3, 5, 8),
            {"target": -1, "additional_forward_args": SENTENCE},
        ),
    ]
    bags = {"target": 1, "additional_forward_args": torch.arange(3)}
    calls.append(Call("offsets", Bags, "FeatureAblation", torch.tensor([3, 8, 5]), bags))
    rows = torch.arange(21).view(3, 7) % 5
    for kind in (Shares, Placed):
        calls.append(Call("rows in a batch", kind, "FeatureAblation", randn(3, 7), {"target": 1}))
        of = {"target": [0, 1, 2], "sliding_window_shapes": (3,)}
        calls.append(Call("rows in a batch", kind, "Occlusion", randn(3, 7), of))
    for name in ("FeatureAblation", "ShapleyValueSampling", "FeaturePermutation"):
        for note, mask in {"none": None, "shared": rows[:1], "own": rows}.items():
            if (name, note) != ("FeaturePermutation", "own"):
                of = {"target": 1, "feature_mask": mask}
                calls.append(Call(f"mixed rows, {note}", Mixed, name, randn(3, 7), of))
    return calls


def _occlusions() -> list[Call]:
    name, calls = "Occlusion", []
    windows: list[tuple[type[nn.Module], Any, Any, Any]] = [
        (Tabular, randn(3, 7), (3,), None),
        (Tabular, randn(3, 7), (3,), 2),
        (Tabular, (randn(3, 7),), ((3,),), ((3,),)),
        (Image, PAIR[0], (3, 4, 4), (3, 2, 3)),
        (Image, PAIR[0], (2, 5, 12), (2, 3, 50)),
        (Video, randn(2, *SHAPES[Video]), (2, 2, 3, 3), (2, 2, 2, 3)),
        (Multimodal, PAIR, ((3, 4, 4), (2,)), ((3, 3, 3), 1)),
        (Ids, IDS, (2,), None),
    ]
    for kind, inputs, window, stride in windows:
        for count in (1, 5):
            of = {"target": 1, "sliding_window_shapes": window, "strides": stride}
            more = {"perturbations_per_eval": count, "baselines": None if kind is Ids else 0.3}
            if kind is Multimodal:
                more["baselines"] = (0.3, 0.1)
            calls.append(Call(f"{window} by {stride}, {count}", kind, name, inputs, of | more))
    for note, kind, inputs in AGGREGATES:
        calls.append(Call(note, kind, name, inputs, {"sliding_window_shapes": (2,)}))
    return calls


def _random() -> list[Call]:
    """The same draws under the same seed."""
    calls = []
    for note, (kind, inputs, mask) in MASKS.items():
        for count in (1, 3):
            of = {"target": [0, 2, 1], "feature_mask": mask, "perturbations_per_eval": count}
            if note != "own":
                calls.append(Call(f"{note} by {count}", kind, "FeaturePermutation", inputs, of))
            if note == "span":
                of = of | {"feature_mask": tuple(one + 7 for one in mask)}
            sampled = of | {"n_samples": 4}
            calls.append(Call(f"{note} by {count}", kind, "ShapleyValueSampling", inputs, sampled))
            if note not in ("span", "table"):
                more = of | {"n_samples": 90, "baselines": None}
                calls.append(Call(f"{note} by {count}", kind, "KernelShap", inputs, more))
                calls.append(Call(f"{note} by {count}", kind, "Lime", inputs, more))
    for note, kind, inputs in AGGREGATES:
        if len(inputs) > 1:
            calls.append(Call(note, kind, "FeaturePermutation", inputs))
        calls.append(Call(note, kind, "ShapleyValueSampling", inputs, {"n_samples": 3}))
    calls += [
        Call(note, kind, method, inputs, {"n_samples": 60})
        for method in ("Lime", "KernelShap")
        for note, kind, inputs in AGGREGATES[:3]
    ]
    calls += [
        Call(f"a column by {count}", Column, method, randn(3, 4), of)
        for count in (1, 4)
        for method, of in {
            "Lime": {"n_samples": 60, "perturbations_per_eval": count},
            "KernelShap": {"n_samples": 60, "perturbations_per_eval": count},
            "ShapleyValueSampling": {"n_samples": 3, "perturbations_per_eval": count},
            "FeaturePermutation": {"perturbations_per_eval": count},
            "FeatureAblation": {"perturbations_per_eval": count},
        }.items()
    ]
    few = {"target": 1, "n_samples": 5, "feature_mask": GRID, "return_input_shape": False}
    calls += [
        Call(f"few samples, {rows} rows", Image, "KernelShap", randn(rows, 3, 12, 12), few)
        for rows in (1, 2)
    ]
    calls.append(Call("defaults", Tabular, "KernelShap", randn(2, 7), {"target": 1}))
    calls.append(Call("defaults", Tabular, "ShapleyValueSampling", randn(2, 7), {"target": 1}))
    return calls


def _exact() -> list[Call]:
    groups = {"target": 1, "feature_mask": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}
    return [
        Call("groups", Tabular, "ShapleyValues", randn(3, 7), groups),
        Call(
            "from rows",
            Tabular,
            "ShapleyValues",
            randn(3, 7),
            groups | {"baselines": randn(3, 7, seed=3), "perturbations_per_eval": 4},
        ),
        Call("one number", own.OneNumber, "ShapleyValues", randn(3, 4)),
        Call("scalar output", Scalar, "ShapleyValues", randn(3, 4)),
    ]


EXACT = [*_ablations(), *_occlusions(), *_exact()]
RANDOM = _random()
