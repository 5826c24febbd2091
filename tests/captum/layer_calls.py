"""Calls of layer methods and of methods by rules that both libraries must answer alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.captum import facade_models as own
from tests.captum import layer_models as layered
from tests.captum.facade_calls import DELTA, PAIR, RULES, SENTENCE, TARGETS, Call
from tests.models import SHAPES, Audio, Image, Multimodal, Segmenter, Tabular, Video, randn

EACH = {"target": [0, 2, 1]}
IMAGE = randn(3, *SHAPES[Image])
LAYERS: list[tuple[Any, Any, Any, dict[str, Any]]] = [
    *((Image, layer, IMAGE, EACH) for layer in ("0", "1", "3", "4", "6", "9")),
    (Audio, "0", randn(3, *SHAPES[Audio]), EACH),
    (Video, "0", randn(3, *SHAPES[Video]), EACH),
    (Tabular, "0", randn(3, 7), EACH),
    (layered.Worded, "words", layered.IDS, EACH),
    (layered.Worded, "words", layered.IDS, {**EACH, "additional_forward_args": layered.MASK}),
    (layered.Worded, "attention", layered.IDS, EACH),
    (layered.Worded, "norm", (layered.IDS,), {"target": 1}),
    (layered.Paired, "pair", randn(3, 7), EACH),
    (layered.Residual, "second", randn(3, 2, 8, 8), EACH),
    (Multimodal, "table.0", PAIR, {"target": 1, "additional_forward_args": randn(3, seed=3)}),
    (own.Sentence, "head", randn(3, 5, 8), {"target": -1, "additional_forward_args": SENTENCE}),
    (Segmenter, "0", randn(2, 3, 6, 6), {"target": [(1, 2, 3), (0, 5, 1)]}),
    *((Tabular, "1", randn(3, 7), {"target": one}) for one in TARGETS.values()),
]
LISTS = [
    (Image, ("0", "4", "9"), IMAGE, EACH),
    (Image, ("4",), IMAGE, EACH),
    (layered.Worded, ("words", "places"), layered.IDS, EACH),
    (layered.Paired, ("first", "pair"), randn(3, 7), EACH),
]
STEPS = {"n_steps": 5}
ASIDE = {"attribute_to_layer_input": True}


def _layers() -> list[Call]:
    """Every method at every layer's output, and at its input where that is floating."""
    calls = []
    for kind, layer, inputs, of in LAYERS:
        ways = [{}, ASIDE] if layer != "words" else [{}]
        for way in ways:
            note = f"{layer}, {of}"[:60] + (" input" if way else "")
            both, plain = of | way, {k: v for k, v in of.items() if k != "target"} | way
            made = {"layer": layer}
            calls += [
                Call(note, kind, "LayerActivation", inputs, plain, **made),
                Call(note, kind, "LayerGradientXActivation", inputs, both, **made),
            ]
            # Captum cannot put points where a ReLU in place is to write over them.
            if (kind, layer, way) != (Image, "1", {}):
                steps = both | DELTA | STEPS
                calls.append(Call(note, kind, "LayerIntegratedGradients", inputs, steps, **made))
            # Gradients of what is normalised have a mean of nothing but rounding.
            if layer not in ("words", "attention", "norm") or (layer == "norm" and not way):
                calls.append(Call(note, kind, "LayerGradCam", inputs, both, **made))
            if isinstance(inputs, Tensor) and inputs.is_floating_point():
                calls.append(
                    Call(note, kind, "LayerConductance", inputs, both | DELTA | STEPS, **made)
                )
    return calls


def _again() -> list[Call]:
    """Of a layer that runs several times the last run counts."""
    x, calls = randn(3, 2, 6, 6), []
    for kind in (layered.Again, layered.AgainInPlace):
        for name in ("LayerGradCam", "LayerGradientXActivation", "LayerConductance"):
            of = EACH | (STEPS if name == "LayerConductance" else {})
            calls += [Call("again", kind, name, x, of | way, layer="act") for way in ({}, ASIDE)]
        calls.append(Call("again", kind, "GuidedGradCam", x, EACH, layer="act"))
        name = "LayerGradientXActivation"
        calls.append(Call("again, list", kind, name, x, EACH, layer=("first", "act")))
    return calls


def _lists() -> list[Call]:
    calls = []
    for kind, layers, inputs, of in LISTS:
        for name in ("LayerActivation", "LayerGradientXActivation"):
            given = {} if name == "LayerActivation" else of
            calls.append(Call(f"{layers}", kind, name, inputs, given, layer=layers))
    words = ("words", "places")
    lists = [(layered.Worded, words, layered.IDS), (Image, ("4",), IMAGE)]
    for kind, layers, inputs in lists:
        given = EACH | DELTA | STEPS
        name = "LayerIntegratedGradients"
        calls.append(Call(f"{layers}", kind, name, inputs, given, layer=layers))
    return calls


def _options() -> list[Call]:
    name, layer = "LayerIntegratedGradients", {"layer": "4"}
    given: dict[str, dict[str, Any]] = {
        "few steps": STEPS,
        "from rows": {"baselines": randn(3, 3, 12, 12, seed=4)},
        "from one row": {"baselines": randn(1, 3, 12, 12)},
        "by 7": STEPS | {"internal_batch_size": 7},
        "kwargs": STEPS | {"grad_kwargs": {"retain_graph": True}},
        "defaults": {},
    }
    calls = [Call(note, Image, name, IMAGE, EACH | of, **layer) for note, of in given.items()]
    local = {"multiply_by_inputs": False}
    calls.append(Call("local", Image, name, IMAGE, EACH | STEPS, local, **layer))
    calls += [
        Call(rule, Image, one, IMAGE, EACH | STEPS | {"method": rule}, **layer)
        for rule in RULES
        for one in (name, "LayerConductance")
    ]
    of = EACH | STEPS | DELTA
    for start in (torch.full((1, 5), 3), 2):
        words = of | {"baselines": start}
        note = f"from {start}"
        calls.append(Call(note, layered.Worded, name, layered.IDS, words, layer="words"))
    name, kwargs = "LayerGradientXActivation", {"grad_kwargs": {"materialize_grads": True}}
    calls += [
        Call("local", Image, name, IMAGE, EACH, local, **layer),
        Call("efficient", Image, name, IMAGE, EACH, {"memory_efficient": True}, **layer),
        Call("kwargs", Image, name, IMAGE, EACH | kwargs, **layer),
    ]
    for way in ({"relu_attributions": True}, {"attr_dim_summation": False}):
        calls.append(Call(f"{way}", Image, "LayerGradCam", IMAGE, EACH | way, **layer))
    more = {"internal_batch_size": 7} | EACH | STEPS
    calls.append(Call("by 7", Image, "LayerConductance", IMAGE, more, **layer))
    for one in ("LayerGradCam", "LayerGradientXActivation", "LayerIntegratedGradients"):
        how = {"nt_samples": 3, "stdevs": 0.0, "nt_type": "smoothgrad_sq"}
        of = EACH | ({} if one != "LayerIntegratedGradients" else STEPS)
        calls.append(Call("tunnel", Image, one, IMAGE, of, tunnel=how, **layer))
    return calls


def _rectified() -> list[Call]:
    """Guided backpropagation, deconvolution and guided Grad-CAM."""
    calls = []
    for kind, shape in layered.RANKS.items():
        x = randn(3, *shape)
        for name in ("GuidedBackprop", "Deconvolution"):
            calls += [Call("ranks", kind, name, one, EACH) for one in (x, (x,))]
        for layer in ("body.0", "body.3", "body.4"):
            for way in ({}, ASIDE):
                note = f"{layer} {way}"
                calls.append(Call(note, kind, "GuidedGradCam", x, EACH | way, layer=layer))
    calls.append(
        Call(
            "linear",
            layered.Plane,
            "GuidedGradCam",
            randn(3, 2, 8, 8),
            {"target": 1, "interpolate_mode": "bilinear"},
            layer="body.3",
        )
    )
    for name in ("GuidedBackprop", "Deconvolution"):
        calls.append(Call("in place", Image, name, IMAGE, {"target": 1}))
        of = {"target": 1, "additional_forward_args": randn(3, seed=3)}
        calls.append(Call("two inputs", Multimodal, name, PAIR, of))
        how = {"nt_samples": 3, "stdevs": 0.0}
        calls.append(Call("tunnel", layered.Plane, name, randn(3, 2, 8, 8), EACH, tunnel=how))
    return calls


def _deep_lift() -> list[Call]:
    calls = []
    kinds = {**layered.RANKS, Image: (3, 12, 12), layered.Smooth: (7,), Tabular: (7,)}
    for kind, shape in kinds.items():
        x, rows = randn(3, *shape), randn(3, *shape, seed=8)
        for note, start in {"zero": None, "number": 0.3, "row": rows[:1], "rows": rows}.items():
            of = EACH | DELTA | {"baselines": start}
            calls.append(Call(f"from {note}", kind, "DeepLift", x, of))
        calls.append(Call("set", kind, "DeepLiftShap", x, EACH | DELTA | {"baselines": rows[:2]}))
        local = {"multiply_by_inputs": False}
        calls.append(Call("local", kind, "DeepLift", x, {"target": 1}, local))
    custom = {
        "of one": lambda one: tuple(2.0 * m for m in one),
        "of two": lambda one, x: tuple(m * a for m, a in zip(one, x, strict=True)),
        "of three": lambda one, x, b: tuple(
            m * (a - 2.0 * c) for m, a, c in zip(one, x, b, strict=True)
        ),
    }
    for note, function in custom.items():
        of = EACH | {"baselines": 0.3, "custom_attribution_func": function}
        calls.append(Call(note, layered.Plane, "DeepLift", randn(3, 2, 8, 8), of))
    of = {"target": 1, "baselines": (0.2, randn(1, 7)), **DELTA}
    pair = (randn(3, 2, 8, 8), PAIR[1])
    calls.append(Call("two inputs", layered.Joined, "DeepLift", pair, of))
    for layer in ("body.0", "body.3", "flat"):
        of = EACH | DELTA | {"baselines": 0.3}
        calls.append(
            Call(layer, layered.Plane, "LayerDeepLift", randn(3, 2, 8, 8), of, layer=layer)
        )
    return calls


CALLS = [*_layers(), *_again(), *_lists(), *_options(), *_rectified(), *_deep_lift()]
