"""saliency-fast explain and demo: maps of inputs, as records, pictures, sentences and a page."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast import zoo
from saliency_fast.api import Engine
from saliency_fast.attribution import Attribution, Provenance
from saliency_fast.cli import arguments
from saliency_fast.cli.parser import MAX_PIXELS
from saliency_fast.cli.tables import show_entries, show_paths
from saliency_fast.errors import InputError, ModelCallError, SaliencyError
from saliency_fast.evaluate.scores import probabilities
from saliency_fast.methods import METHODS
from saliency_fast.methods.paths import IntegratedGradients
from saliency_fast.methods.sampling import SmoothGrad
from saliency_fast.model.preserve import preserve_model_state
from saliency_fast.model.targets import tensor_of
from saliency_fast.render.frames import STYLES, encode, grey, make_folder, picture, write_frames
from saliency_fast.render.pages import (
    BoxEvidence,
    Entry,
    Figure,
    MapMeasurements,
    MapView,
    Page,
    page_html,
)
from saliency_fast.summary.animation import progress
from saliency_fast.summary.sentences import summarise

Box = tuple[int, ...]
"""(top, left, bottom, right), half-open."""
_RANKED = 4
"""Classes that the page lists for an input."""
_CAPTIONS = {"signed": "Signed: red for, blue against", "heat": "Heat: magnitude"}
_CHECK = (
    "how inputs are read is said by --channels (3 makes grey pictures coloured, 1 the other way "
    "round), --size and --batched; --debug shows where it fails"
)
_DEMO = (
    "The shipped digits model reads one whole digit hidden among scrambled pieces of digits. These "
    "are the first scenes of its held-out set, in order and not chosen. The dashed frame is where "
    "the digit truly is; the model does not see it. Evidence in the box is the share of a map's "
    "positive values that fall into it: a map without any idea would score the box's own area."
)


def explain(args: argparse.Namespace, argv: Sequence[str]) -> int:
    methods = arguments.read_methods(args.method or ["integrated_gradients"], args.method_arg)
    target = arguments.read_target(args.target)
    form = arguments.read_form(args.size, args.channels)
    loaded = arguments.load_model(args.model, args.weights, form, args.device)
    baseline = arguments.read_baseline(args.baseline, args.device)
    at, features = arguments.read_at(args.at), arguments.read_features(args.features, args.device)
    if features is not None and not any(one.recipe().features for one in methods):
        raise InputError(
            f"--features is for methods that take features away: got {args.features!r} with "
            f"{', '.join(one.name for one in methods)}; use feature_ablation, kernel_shap or their "
            "kin, or leave it out"
        )
    about = loaded.dtype, args.batched, args.max_pixels
    inputs = arguments.read_inputs(args.input, loaded.prepare, *about)
    names = "memory_budget", "points_per_launch", "precision", "tolerance", "progress", "layout"
    options = {name: getattr(args, name) for name in names}
    engines = [Engine(loaded.model, method, at=at, **options) for method in methods]
    if args.plan:
        for read in inputs:
            x = read.x.to(args.device)
            for engine in engines:
                own = features if engine.method.recipe().features else None
                with failures_named(read):
                    plan = engine.plan(x, target_rows(target, x), baseline, features=own)
                print(f"input      {read.source} {list(x.shape)}\n{plan}\n")
        return 0
    # What `verify` needs to make the same call again.
    noted = ("model", "weights", "size", "channels", "batched", "max_pixels")
    notes = {name: value for name in noted if (value := getattr(args, name))}
    if args.max_pixels == MAX_PIXELS:
        del notes["max_pixels"]
    reporter = Reporter(
        *(loaded, engines, target, baseline, make_folder(args.out, "--out")),
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
    samples = zoo.held_out()
    if not 1 <= args.examples <= len(samples):
        raise InputError(f"--examples must lie between 1 and {len(samples)}: got {args.examples}")
    loaded = arguments.load_model("digits")
    methods = (IntegratedGradients(tolerance=0.02), SmoothGrad(samples=256, noise_level=0.05))
    engines = [Engine(loaded.model, method, progress=args.progress) for method in methods]
    out = make_folder(args.out, "--out")
    reporter = Reporter(loaded, engines, "predicted", None, out, notes={"model": "digits"})
    for number in range(args.examples):
        # Through a file, so that the records can be verified from what is written.
        levels = (samples.images[number, 0] * 255.0).round().to(torch.uint8)
        path = write_frames(levels[..., None].expand(-1, -1, 3), out / f"digit-{number:02d}.png")
        reporter.written.append(path)
        (read,) = arguments.read_inputs([str(path)], loaded.prepare, loaded.dtype)
        label = class_name(int(samples.labels[number]), loaded.labels)
        reporter.add(read, Truth(label, tuple(samples.boxes[number].tolist())))
    return _finish(reporter, "What the digits model looked at", _DEMO, argv)


def _finish(reporter: Reporter, title: str, lead: str, argv: Sequence[str]) -> int:
    reporter.page(title, lead, shlex.join(["saliency-fast", *argv]))
    show_entries(reporter.entries)
    show_paths(reporter.written)
    return 0


# --- From maps to files and the page ----------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """The label of an input and the box of its object."""

    label: str
    box: Box


@dataclass(frozen=True)
class _Result:
    """An attribution with one map per example, its record's file, its pictures by style and its
    sentences. target: its number, where the call named several.
    """

    found: Attribution
    record: str
    target: int | None
    drawn: Mapping[str, Tensor]
    sentences: Sequence[str]


@dataclass
class Reporter:
    """Explains inputs, each by a call, writes files into `out`, and collects the page's entries."""

    loaded: arguments.Loaded
    engines: Sequence[Engine]
    target: Any
    baseline: Any
    out: Path
    styles: Sequence[str] = STYLES
    extension: str | None = None
    features: Any = None
    device: str = "cpu"
    notes: Mapping[str, Any] = field(default_factory=dict)
    summary: bool = False
    animation: bool = False
    entries: list[Entry] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)

    def add(self, read: arguments.Read, truth: Truth | None = None) -> None:
        """Explains one input [B, *] by every engine; each example becomes an entry."""
        x = read.x.to(self.device)
        results = [one for engine in self.engines for one in self._explain(engine, read, x)]
        rankings = _ranking(self.loaded, x)
        first = results[0].found
        hashes, axes = first.provenance.input_sha256, first.axes()
        for row in range(len(x)):
            name = read.name if len(x) == 1 else f"{read.name}.{row}"
            shown = None
            if x.dim() in (4, 5) and axes is not None and len(axes.letters) == x.dim():
                frames = picture(axes.standard(x[row : row + 1]))[0]
                shown = _figure(frames, f"the input {name}", "Input", truth)
            self.entries.append(
                Entry(
                    name=name,
                    source=read.source,
                    shape=" x ".join(str(size) for size in x.shape[1:]),
                    sha256=hashes[0] if hashes else None,
                    figure=shown,
                    ranking=rankings[row] if rankings else (),
                    truth=truth.label if truth else None,
                    maps=tuple(self._view(one, row, name, truth) for one in results),
                )
            )

    def page(self, title: str, lead: str, command: str) -> None:
        facts = (("model", self.loaded.spec), *self.facts)
        path = self.out / "index.html"
        page = page_html(Page(title, lead, tuple(self.entries), facts, command))
        path.write_text(page, encoding="utf-8")
        self.written.append(path)

    def _explain(self, engine: Engine, read: arguments.Read, x: Tensor) -> list[_Result]:
        features = self.features if engine.method.recipe().features else None
        target = target_rows(self.target, x)
        with failures_named(read):
            found = engine(x, target, self.baseline, features=features)
        past = found.provenance
        notes = past.notes | {**self.notes, "input": read.source}
        found = replace(found, provenance=replace(past, notes=notes))
        self.facts = _facts(past)
        record = f"{read.name}.{past.method}.safetensors"
        self.written.append(found.save(self.out / record))
        if not found.many:
            return [self._result(engine, read, x, found, record)]
        targets = range(found.scores.shape[1])
        parts = [_of_target(found, k) for k in targets]
        return [self._result(engine, read, x, parts[k], record, k) for k in targets]

    def _result(
        self,
        engine: Engine,
        read: arguments.Read,
        x: Tensor,
        found: Attribution,
        record: str,
        target: int | None = None,
    ) -> _Result:
        """The pictures and the sentences of one target."""
        fits, axes = _lies_over(found, x), found.axes()
        sentences: list[str] = []
        drawn: dict[str, Any] = {}
        with failures_named(read):
            if self.summary and not fits:
                raise InputError("--summary is about maps of the input: leave it out, or --at")
            if self.summary:
                model, labels = self.loaded.model, self.loaded.labels
                sentences = [str(one) for one in summarise(model, x, found, labels=labels)]
            if fits and x.dim() in (4, 5) and axes is not None:
                if self.animation:
                    self._animate(engine, found, read.name, x, target)
                shown = axes.back(grey(axes.standard(x)))
                drawn = {style: found.overlay(shown, style) for style in self.styles}
        return _Result(found, record, target, drawn, sentences)

    def _animate(
        self, engine: Engine, found: Attribution, name: str, x: Tensor, target: int | None
    ) -> None:
        """Writes a GIF of each map during its computation, where it takes several launches."""
        features = self.features if engine.method.recipe().features else None
        for row in range(len(x)):
            stem = name if len(x) == 1 else f"{name}.{row}"
            stem += f".{found.provenance.method}" + ("" if target is None else f".map{target}")
            moving = progress(
                engine,
                x[row : row + 1],
                self.target if found.classes is None else int(found.classes[row]),
                style=self.styles[0],
                baseline=_of_example(self.baseline, row, x),
                features=_of_example(features, row, x),
            )
            if len(moving.frames) > 1:
                self.written.append(moving.save(self.out / f"{stem}.progress.gif"))

    def _view(self, result: _Result, row: int, name: str, truth: Truth | None) -> MapView:
        """Writes the sentences and the pictures of one map, and returns its view for the page."""
        found, past = result.found, result.found.provenance
        stem = f"{name}.{past.method}"
        if result.target is not None:
            classes = found.classes
            stem += f".map{result.target}" if classes is None else f".class{int(classes[row])}"
        label = _explained(found, row, self.loaded.labels)
        sentences = result.sentences[row] if result.sentences else ""
        if sentences:
            path = self.out / f"{stem}.txt"
            path.write_text(sentences + "\n", encoding="utf-8")
            self.written.append(path)
        fields = [f"{key}={value}" for key, value in past.parameters.items() if value is not None]
        if past.baseline is not None:
            plain = past.baseline if isinstance(past.baseline, (str, int, float)) else "from a file"
            fields.append(f"baseline={plain}")
        return MapView(
            method=METHODS[past.method].__name__,
            parameters=", ".join(fields),
            explains=f"explains {label}",
            figures=self._figures(result, row, stem, label, truth),
            numbers=_numbers(found, row, truth),
            record=result.record,
            words=sentences,
        )

    def _figures(
        self, result: _Result, row: int, stem: str, label: str, truth: Truth | None
    ) -> tuple[Figure, ...]:
        """Writes the pictures of one map; of a clip the page also shows the strongest frame."""
        figures = []
        for style, drawn in result.drawn.items():
            frames, caption = drawn[row], _CAPTIONS[style]
            extension = self.extension or (".png" if frames.dim() == 3 else ".gif")
            self.written.append(write_frames(frames, self.out / f"{stem}.{style}{extension}"))
            alt = f"{style} map for {label}, {stem}"
            if frames.dim() == 4:
                sums = _map(result.found, "l2")[row].double().sum((1, 2))
                best = int(sums.argmax())
                strongest = f"{caption} · frame {best + 1} of {len(frames)}, the strongest"
                figures.append(_figure(frames[best], alt, strongest, truth))
            figures.append(_figure(frames, alt, caption, truth))
        return tuple(figures)


@contextmanager
def failures_named(read: arguments.Read) -> Iterator[None]:
    """Names the input in errors raised inside."""
    try:
        yield
    except ModelCallError as error:
        raise ModelCallError(f"{read.source}: {error}; {_CHECK}") from error
    except SaliencyError as error:
        raise type(error)(f"{read.source}: {error}") from error


def target_rows(target: Any, x: Tensor) -> Any:
    """The target of a call: a list of K classes becomes [B, K] of them."""
    return torch.tensor([target] * len(x)) if isinstance(target, list) else target


def class_name(number: int, labels: Mapping[int, str]) -> str:
    return labels.get(number, f"class {number}")


def inside(found: Attribution, row: int, box: Box) -> BoxEvidence:
    """The share of the positive evidence that falls into a box, and the box's share of the map."""
    positive = _map(found, "sum")[row].double().clamp_min(0.0)
    top, left, bottom, right = box
    within, whole = positive[..., top:bottom, left:right], float(positive.sum())
    share = float(within.sum()) / whole if whole else 0.0
    return BoxEvidence(share, within.numel() / positive.numel())


def _map(found: Attribution, reduction: str) -> Tensor:
    values = found.map(reduction)
    assert isinstance(values, Tensor)
    return values


def _lies_over(found: Attribution, x: Tensor) -> bool:
    """Whether maps have the spatial size of the inputs, which those of layers need not have."""
    values, axes = found.values, found.axes()
    if not isinstance(values, Tensor) or values.dim() != x.dim():
        return False
    places = range(1, x.dim()) if axes is None else axes.places
    return all(values.shape[axis] == x.shape[axis] for axis in places)


def _of_target(found: Attribution, k: int) -> Attribution:
    names = ["values", "scores", "baseline_scores", "delta", "error", "classes", "precision_error"]
    fields: dict[str, Any] = {
        name: value[:, k] for name in names if (value := getattr(found, name)) is not None
    }
    return replace(found, **fields, extras={name: one[:, k] for name, one in found.extras.items()})


def _of_example(value: Any, row: int, x: Tensor) -> Any:
    """The part of a batch's baselines or features that belongs to one example."""
    if isinstance(value, list):
        return [_of_example(one, row, x) for one in value]
    own = isinstance(value, Tensor) and value.dim() == x.dim() and len(value) == len(x)
    return value[row : row + 1] if own else value


def _ranking(loaded: arguments.Loaded, x: Tensor) -> list[tuple[tuple[str, float], ...]]:
    """The likeliest classes of each example; empty where the model does not classify."""
    with preserve_model_state(loaded.model, x.device), torch.no_grad():
        # One by one: a batch that fits the plan's launches need not fit at once.
        output = torch.cat([tensor_of(loaded.model(one[None].clone())) for one in x])
    if output.dim() != 2 or output.shape[1] < 2:
        return []
    output = output.double()
    best = probabilities(output, output).topk(min(_RANKED, output.shape[1]), dim=1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        tuple((class_name(n, loaded.labels), share) for n, share in zip(*row, strict=True))
        for row in rows
    ]


def _explained(found: Attribution, row: int, labels: Mapping[int, str]) -> str:
    if found.classes is not None:
        return class_name(int(found.classes[row]), labels)
    output = found.provenance.target.get("index")
    return "the model's output" if output is None else f"the output at {json.dumps(output)}"


def _numbers(found: Attribution, row: int, truth: Truth | None) -> MapMeasurements:
    past, score = found.provenance, float(found.scores[row])
    start, delta, converged = found.baseline_scores, found.delta, found.converged
    return MapMeasurements(
        score=score,
        gain=None if start is None else score - float(start[row]),
        delta=None if delta is None else float(delta[row]),
        error=float(found.error[row]),
        converged=None if converged is None else bool(converged[row]),
        points=int(found.points[row]),
        seconds=past.seconds,
        peak_bytes=past.peak_bytes,
        peak_measured=past.peak_measured,
        batch=len(found.scores),
        inside=None if truth is None else inside(found, row, truth.box),
    )


def _figure(frames: Tensor, alt: str, caption: str, truth: Truth | None) -> Figure:
    """A figure for the page: PNG for one frame [H, W, 3], GIF for several."""
    kind = "png" if frames.dim() == 3 else "gif"
    if kind == "gif":
        caption += f" · all {len(frames)} frames"
    height, width = frames.shape[-3:-1]
    top, left, bottom, right = (0, 0, 0, 0) if truth is None else truth.box
    box = (left / width, top / height, (right - left) / width, (bottom - top) / height)
    return Figure(
        encode(frames, f".{kind}"), f"image/{kind}", width, alt, caption, box if truth else None
    )


def _facts(past: Provenance) -> list[tuple[str, str]]:
    return [
        ("weights SHA-256", past.weights_sha256 or "none: the model is a plain function"),
        ("arithmetic", f"{past.dtype} on {past.device}, {past.backend} kernels"),
        ("versions", ", ".join(f"{name} {version}" for name, version in past.versions.items())),
    ]
