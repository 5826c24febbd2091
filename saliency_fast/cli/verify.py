"""saliency-fast verify: checks a record and computes it again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from saliency_fast import zoo
from saliency_fast.attribution import Attribution, load, maps_of
from saliency_fast.cli import arguments
from saliency_fast.cli.explain import failures_named
from saliency_fast.cli.parser import MAX_PIXELS
from saliency_fast.errors import InputError, RecordError
from saliency_fast.replay import replay

AGREES, DISAGREES = 0, 1
# A record may come from anyone: code that it names is imported only where --model asks for it.
_SAFE = ("hf", "torchvision", "timm")


def verify(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs `saliency-fast verify`: 0 where the record agrees, 1 where it disagrees or is broken."""
    if not Path(args.record).is_file():
        raise InputError(f"record {args.record} does not exist or is not a file")
    try:
        recorded = load(args.record)
    except RecordError as error:
        print(f"BROKEN: {error}")
        return DISAGREES
    _describe(recorded)
    print("record: whole, its hash and schema are right")
    if reason := _not_computed(args, recorded):
        print(f"not computed again: {reason}")
        return AGREES
    return _replay(args, recorded)


def _not_computed(args: argparse.Namespace, recorded: Attribution) -> str | None:
    """Why the record is not computed again, or None."""
    if args.hash_only:
        return "--hash-only"
    notes = recorded.provenance.notes
    spec = args.model or notes.get("model")
    if not spec or not (args.input or notes.get("input")):
        return "the record does not name its model and input; pass --model and --input"
    if not args.model and spec not in zoo.MODELS and spec.partition(":")[0] not in _SAFE:
        return f"the record's model runs code of this machine; to allow it pass --model {spec}"
    return None


def _replay(args: argparse.Namespace, recorded: Attribution) -> int:
    notes = recorded.provenance.notes
    weights = args.weights or (None if args.model else notes.get("weights"))
    form = arguments.read_form(notes.get("size"), notes.get("channels"))
    loaded = arguments.load_model(args.model or notes["model"], weights, form, args.device)
    source = args.input or notes["input"]
    about = bool(notes.get("batched")), int(notes.get("max_pixels", MAX_PIXELS))
    found = arguments.read_inputs([source], loaded.prepare, loaded.dtype, *about)
    if len(found) != 1:
        raise InputError(f"--input must name one input: {source} holds {len(found)}")
    with failures_named(found[0]):
        x = found[0].x.to(args.device)
        outcome = replay(recorded, loaded.model, x, memory_budget=args.memory_budget)
    print(outcome)
    return AGREES if outcome else DISAGREES


def _describe(recorded: Attribution) -> None:
    past = recorded.provenance
    parameters = ", ".join(f"{name}={value}" for name, value in past.parameters.items())
    pairs = [
        ("method", f"{past.method}({parameters})"),
        ("target", past.target["kind"]),
        ("baseline", str(past.baseline)),
        ("values", ", ".join(f"{list(one.shape)} {past.dtype}" for one in maps_of(recorded))),
        ("made on", f"{past.device}, {past.backend} kernels"),
        ("versions", ", ".join(f"{name} {one}" for name, one in past.versions.items())),
        ("weights", past.weights_sha256 or "not recorded"),
        ("input", ", ".join(past.input_sha256 or ["not recorded"])),
        ("layout", ", ".join(str(one) for one in past.layout or ["not known"])),
    ]
    notes = ((name, str(value)) for name, value in sorted(past.notes.items()))
    for name, value in (*pairs, *notes):
        print(f"{name:<12} {value}")
