"""saliency-fast explain: maps of inputs, as records, pictures and a page."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from saliency_fast.api import Engine
from saliency_fast.cli.inputs import MAX_PIXELS, Read, read_inputs
from saliency_fast.cli.models import load_model
from saliency_fast.cli.options import (
    read_at,
    read_baseline,
    read_features,
    read_methods,
    read_target,
)
from saliency_fast.cli.pictures import read_form
from saliency_fast.cli.report import Reporter, failures_named, out_folder, target_rows
from saliency_fast.cli.tables import show_entries, show_paths, show_words
from saliency_fast.errors import InputError
from saliency_fast.render.frames import STYLES


def explain(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs the command; see `saliency-fast explain --help`."""
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
        notes=_notes(args),
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
    reporter.page("What the model looked at", lead, shlex.join(["saliency-fast", *argv]))
    show_entries(reporter.entries)
    show_words(reporter.entries)
    show_paths(reporter.written)
    return 0


def _notes(args: argparse.Namespace) -> dict[str, object]:
    """What `verify` needs to make the same call again."""
    names = ("model", "weights", "size", "channels", "batched")
    notes = {name: value for name in names if (value := getattr(args, name))}
    larger = {} if args.max_pixels == MAX_PIXELS else {"max_pixels": args.max_pixels}
    return notes | larger


def _show_plans(
    engines: Sequence[Engine],
    inputs: Sequence[Read],
    target: object,
    baseline: object,
    features: object,
    device: str,
) -> int:
    for read in inputs:
        x = read.x.to(device)
        for engine in engines:
            with failures_named(read):
                plan = engine.plan(
                    *(x, target_rows(target, x), baseline),  # type: ignore[arg-type]
                    features=features if engine.method.recipe().features else None,  # type: ignore[arg-type]
                )
            print(f"input      {read.source} {list(x.shape)}\n{plan}\n")
    return 0
