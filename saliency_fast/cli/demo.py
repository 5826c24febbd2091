"""saliency-fast demo: held-out digits explained by the shipped model, on one page."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

import torch

from saliency_fast import zoo
from saliency_fast.api import Engine
from saliency_fast.cli.inputs import read_inputs
from saliency_fast.cli.models import load_model
from saliency_fast.cli.report import Reporter, Truth, class_name, out_folder
from saliency_fast.cli.tables import show_entries, show_paths
from saliency_fast.errors import InputError
from saliency_fast.methods import IntegratedGradients, SmoothGrad
from saliency_fast.render.files import write_frames

LEAD = (
    "The shipped digits model reads one whole digit hidden among scrambled pieces of digits. These "
    "are the first scenes of its held-out set, in order and not chosen. The dashed frame is where "
    "the digit truly is; the model is never told. Evidence in the box is the share of a map's "
    "positive values that fall into it: a map without any idea would score the box's own area."
)


def demo(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs the command; see `saliency-fast demo --help`."""
    samples = zoo.held_out()
    if not 1 <= args.examples <= len(samples.labels):
        raise InputError(
            f"--examples must lie between 1 and {len(samples.labels)}: got {args.examples}"
        )
    loaded = load_model("digits")
    engines = [
        Engine(loaded.model, method, progress=args.progress)
        for method in (IntegratedGradients(), SmoothGrad(samples=256, noise_level=0.05))
    ]
    out = out_folder(args.out)
    reporter = Reporter(loaded, engines, "predicted", None, out, notes={"model": "digits"})
    for number in range(args.examples):
        # Through the file, so that the records can be verified from what lies beside them.
        levels = (samples.images[number, 0] * 255.0).round().to(torch.uint8)
        picture = levels[..., None].expand(-1, -1, 3)
        path = write_frames(picture, out / f"digit-{number:02d}.png")
        reporter.written.append(path)
        (read,) = read_inputs([str(path)], loaded.prepare, loaded.dtype)
        top, left, bottom, right = samples.boxes[number].tolist()
        label = class_name(int(samples.labels[number]), loaded.labels)
        reporter.add(read, Truth(label, (top, left, bottom, right)))
    command = shlex.join(["saliency-fast", *argv])
    reporter.page("What the digits model looked at", LEAD, command)
    show_entries(reporter.entries)
    show_paths(reporter.written)
    return 0
