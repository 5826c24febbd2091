"""saliency-fast explain and demo: maps of inputs, as records, pictures and a page."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

import torch

from saliency_fast import zoo
from saliency_fast.api import Engine
from saliency_fast.cli.inputs import MAX_PIXELS, Read, read_form, read_inputs
from saliency_fast.cli.models import load_model
from saliency_fast.cli.options import (
    read_at,
    read_baseline,
    read_features,
    read_methods,
    read_target,
)
from saliency_fast.cli.report import (
    Reporter,
    Truth,
    class_name,
    failures_named,
    out_folder,
    target_rows,
)
from saliency_fast.cli.tables import show_entries, show_paths
from saliency_fast.errors import InputError
from saliency_fast.methods.paths import IntegratedGradients
from saliency_fast.methods.sampling import SmoothGrad
from saliency_fast.render.files import write_frames
from saliency_fast.render.frames import STYLES

_DEMO = (
    "The shipped digits model reads one whole digit hidden among scrambled pieces of digits. These "
    "are the first scenes of its held-out set, in order and not chosen. The dashed frame is where "
    "the digit truly is; the model is never told. Evidence in the box is the share of a map's "
    "positive values that fall into it: a map without any idea would score the box's own area."
)


def explain(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs `saliency-fast explain`."""
    methods = read_methods(args.method or ["integrated_gradients"], args.method_arg)
    target = read_target(args.target)
    form = read_form(args.size, args.channels)
    loaded = load_model(args.model, args.weights, form, args.device)
    baseline = read_baseline(args.baseline, args.device)
    at, features = read_at(args.at), read_features(args.features, args.device)
    if features is not None and not any(one.recipe().features for one in methods):
        raise InputError(
            f"--features is for methods that take features away: got {args.features!r} with "
            f"{', '.join(one.name for one in methods)}; use feature_ablation, kernel_shap or their "
            "kin, or leave it out"
        )
    inputs = read_inputs(args.input, loaded.prepare, loaded.dtype, args.batched, args.max_pixels)
    engines = [
        Engine(
            loaded.model,
            method,
            memory_budget=args.memory_budget,
            points_per_launch=args.points_per_launch,
            precision=args.precision,
            at=at,
            tolerance=args.tolerance,
            progress=args.progress,
            layout=args.layout,
        )
        for method in methods
    ]
    if args.plan:
        return _show_plans(engines, inputs, target, baseline, features, args.device)
    # What `verify` needs to make the same call again.
    names = ("model", "weights", "size", "channels", "batched", "max_pixels")
    notes = {name: value for name in names if (value := getattr(args, name))}
    if args.max_pixels == MAX_PIXELS:
        del notes["max_pixels"]
    reporter = Reporter(
        loaded,
        engines,
        target,
        baseline,
        out_folder(args.out),
        styles=(args.style,) if args.style else STYLES,
        extension=f".{args.overlay_format}" if args.overlay_format else None,
        features=features,
        device=args.device,
        notes=notes,
        summary=args.summary,
        animation=args.animate,
    )
    for read in inputs:
        reporter.add(read)
    count = len(reporter.entries)
    lead = (
        f"{count} input{'' if count == 1 else 's'} to {args.model}, explained by "
        f"{' and '.join(type(method).__name__ for method in methods)}."
    )
    return _finish(reporter, "What the model looked at", lead, argv)


def demo(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs `saliency-fast demo`: held-out digits explained by the shipped model."""
    samples = zoo.held_out()
    if not 1 <= args.examples <= len(samples):
        raise InputError(f"--examples must lie between 1 and {len(samples)}: got {args.examples}")
    loaded = load_model("digits")
    engines = [
        Engine(loaded.model, method, progress=args.progress)
        for method in (IntegratedGradients(), SmoothGrad(samples=256, noise_level=0.05))
    ]
    out = out_folder(args.out)
    reporter = Reporter(loaded, engines, "predicted", None, out, notes={"model": "digits"})
    for number in range(args.examples):
        # Through a file, so that the records can be verified from what is written.
        levels = (samples.images[number, 0] * 255.0).round().to(torch.uint8)
        path = write_frames(levels[..., None].expand(-1, -1, 3), out / f"digit-{number:02d}.png")
        reporter.written.append(path)
        (read,) = read_inputs([str(path)], loaded.prepare, loaded.dtype)
        top, left, bottom, right = samples.boxes[number].tolist()
        label = class_name(int(samples.labels[number]), loaded.labels)
        reporter.add(read, Truth(label, (top, left, bottom, right)))
    return _finish(reporter, "What the digits model looked at", _DEMO, argv)


def _finish(reporter: Reporter, title: str, lead: str, argv: Sequence[str]) -> int:
    reporter.page(title, lead, shlex.join(["saliency-fast", *argv]))
    show_entries(reporter.entries)
    show_paths(reporter.written)
    return 0


def _show_plans(
    engines: Sequence[Engine],
    inputs: Sequence[Read],
    target: Any,
    baseline: Any,
    features: Any,
    device: str,
) -> int:
    for read in inputs:
        x = read.x.to(device)
        for engine in engines:
            own = features if engine.method.recipe().features else None
            with failures_named(read):
                plan = engine.plan(x, target_rows(target, x), baseline, features=own)
            print(f"input      {read.source} {list(x.shape)}\n{plan}\n")
    return 0
