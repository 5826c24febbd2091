"""saliency-fast evaluate: metrics of a model's maps, as tables, a page and numbers."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast import zoo
from saliency_fast.cli import arguments
from saliency_fast.cli.explain import failures_named
from saliency_fast.cli.tables import show_paths
from saliency_fast.errors import InputError
from saliency_fast.evaluate.controls import CONTROLS
from saliency_fast.evaluate.metric import ENTRIES, Suite
from saliency_fast.evaluate.reports.report import report
from saliency_fast.evaluate.reports.result import save
from saliency_fast.render.frames import make_folder

METHODS = ("gradient", "smoothgrad", "integrated_gradients")
FAILED = 1
_PASSED_ON = "confidence", "seed", "memory_budget", "points_per_launch", "progress", "layout"
"""Options that are arguments of `report` of the same name."""


@dataclass(frozen=True)
class _Examples:
    """What is evaluated, all of one shape, and the title of the report."""

    x: Tensor
    target: Any
    boxes: Tensor | None
    source: str
    title: str


def evaluate(args: argparse.Namespace, argv: Sequence[str]) -> int:
    methods = arguments.read_methods(args.method or METHODS, args.method_arg)
    metrics = [one.replace("-", "_").replace(" ", "_") for one in args.metric] or None
    suite = Suite(
        names=metrics,
        quick=args.quick,
        substrate=None if args.substrate is None else _substrate(args.substrate, args.device),
        steps=args.steps,
        seed=args.seed,
        fields=arguments.read_fields("--metric-arg", metrics or list(ENTRIES), args.metric_arg),
    )
    form = arguments.read_form(args.size, args.channels)
    loaded = arguments.load_model(args.model, args.weights, form, args.device)
    baseline = arguments.read_baseline(args.baseline, args.device)
    given = _files(args, loaded) if args.input else _scenes(args)
    out = make_folder(args.out, "--out")
    x = given.x.to(args.device)
    with failures_named(arguments.Read("inputs", given.source, x)):
        found = report(
            *(loaded.model, x),
            methods={method.name: method for method in methods},
            metrics=suite,
            target=given.target,
            baseline=baseline,
            boxes=given.boxes,
            controls=() if args.no_controls else tuple(CONTROLS),
            title=given.title,
            labels=loaded.labels,
            **{name: getattr(args, name) for name in _PASSED_ON},
        )
    written = save(found, out, shlex.join(["saliency-fast", *argv]))
    if args.json:
        print(found.json())
    else:
        found.show()
        show_paths(written)
    if args.check and found.passed is None:
        raise InputError(
            "--check needs a metric that gives a verdict, and none did: leave out --metric, or see "
            "what could not be measured above"
        )
    if args.check and not found.passed:
        print("saliency-fast: a check failed", file=sys.stderr)
        return FAILED
    return 0


def _substrate(text: str, device: str) -> Any:
    found = arguments.read_baseline(text, device)
    if found is None or isinstance(found, list):
        raise InputError(
            f"--substrate must be zero, mean, blur, uniform, a number or a file: got {text!r}"
        )
    return found


def _files(args: argparse.Namespace, loaded: arguments.Loaded) -> _Examples:
    if args.examples is not None:
        raise InputError(
            "--examples is for the built-in scenes: leave it out, or give fewer inputs"
        )
    about = loaded.dtype, args.batched, args.max_pixels
    reads = arguments.read_inputs(args.input, loaded.prepare, *about)
    first = reads[0]
    for read in reads:
        if read.x.shape[1:] != first.x.shape[1:]:
            raise InputError(
                f"inputs must have one shape to form a batch: got {list(first.x.shape[1:])} "
                f"of {first.source} and {list(read.x.shape[1:])} of {read.source}; use --size and "
                "--channels, or one call for each shape"
            )
    x = torch.cat([read.x for read in reads])
    names = [read.name for read in reads for _ in range(len(read.x))]
    target = arguments.read_one_target(args.target or "predicted", len(x))
    boxes = None if args.boxes is None else arguments.read_boxes(args.boxes, names)
    source = first.source if len(reads) == 1 else f"{first.source} and {len(reads) - 1} more"
    return _Examples(x, target, boxes, source, f"Are the maps of {args.model} any good?")


def _scenes(args: argparse.Namespace) -> _Examples:
    if args.model not in zoo.MODELS:
        raise InputError(
            "inputs are missing: only for the built-in models "
            f"({', '.join(zoo.MODELS)}) there are scenes with labels and boxes; got {args.model!r}"
        )
    if args.boxes is not None:
        raise InputError("--boxes are for inputs: the built-in scenes have their own")
    samples = zoo.held_out()
    whole = len(samples.labels)
    count = (16 if args.quick else whole) if args.examples is None else args.examples
    if not 1 <= count <= whole:
        raise InputError(f"--examples must lie between 1 and {whole}: got {count}")
    target = samples.labels[:count]
    explained = "their true digits"
    if args.target is not None:
        target = arguments.read_one_target(args.target, count)
        explained = f"the target {args.target}"
    title = f"Maps of {args.model} on {count} built-in held-out scenes: {explained}, known boxes"
    return _Examples(samples.images[:count], target, samples.boxes[:count], "held_out", title)
