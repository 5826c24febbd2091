"""From inputs and engines to records, pictures and the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast.api import Engine
from saliency_fast.attribution import Attribution, Provenance
from saliency_fast.cli.inputs import Read
from saliency_fast.cli.models import Loaded, reason
from saliency_fast.cli.words import animations, over, summaries, write_words
from saliency_fast.errors import InputError, ModelCallError, ModelError, SaliencyError
from saliency_fast.methods import METHODS
from saliency_fast.model.preserve import preserve_model_state
from saliency_fast.model.targets import tensor_of
from saliency_fast.render.files import encode, write_frames
from saliency_fast.render.frames import STYLES, grey, picture
from saliency_fast.render.page import Entry, Inside, MapView, Numbers, Page, Ranked, page_html
from saliency_fast.render.parts import Figure

Box = tuple[int, int, int, int]
TOP = 4
_CAPTIONS = {"signed": "Signed: red for, blue against", "heat": "Heat: magnitude"}


@dataclass(frozen=True)
class Truth:
    """What is known of an input: its label, and its box (top, left, bottom, right), half-open."""

    label: str
    box: Box


@dataclass(frozen=True)
class _Result:
    """An attribution with its record's name and its pictures by style, all examples at once."""

    found: Attribution
    record: str
    drawn: Mapping[str, Tensor | tuple[Tensor, ...]]
    words: Mapping[tuple[int, ...], str]


@dataclass
class Reporter:
    """Explains inputs one by one, writes what it finds into `out`, and keeps it for the page.

    Each input is a call of its own, so that time, memory and record are its own; the points of a
    call still share launches.
    """

    loaded: Loaded
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
    last: Provenance | None = None

    def add(self, read: Read, truth: Truth | None = None) -> list[Entry]:
        """Explains one input [B, *] by every engine; returns an entry for each example."""
        x = read.x.to(self.device)
        results = [self._explain(engine, read, x) for engine in self.engines]
        rankings = ranking(self.loaded, x)
        hashes = results[0].found.provenance.input_sha256
        entries = []
        for row in range(len(x)):
            name = read.name if len(x) == 1 else f"{read.name}.{row}"
            maps = [view for one in results for view in self._views(one, row, name, truth)]
            entries.append(
                Entry(
                    name=name,
                    source=read.source,
                    shape=" x ".join(str(size) for size in x.shape[1:]),
                    sha256=hashes[0] if hashes else None,
                    figure=_input_figure(results[0].found, x, row, name, truth),
                    ranking=rankings[row] if rankings else (),
                    truth=truth.label if truth else None,
                    maps=tuple(maps),
                )
            )
        self.entries += entries
        return entries

    def page(self, title: str, lead: str, command: str, file: str = "index.html") -> Path:
        """Writes the page of all entries so far and returns its path."""
        facts: list[tuple[str, str]] = [("model", self.loaded.spec)]
        if self.last:
            facts += _facts(self.last)
        page = Page(title, lead, tuple(self.entries), tuple(facts), command)
        path = self.out / file
        path.write_text(page_html(page), encoding="utf-8")
        self.written.append(path)
        return path

    def _explain(self, engine: Engine, read: Read, x: Tensor) -> _Result:
        with failures_named(read):
            rows = target_rows(self.target, x)
            features = self.features if engine.method.recipe().features else None
            found = engine(x, rows, self.baseline, features=features)
        self.last = replace(
            found.provenance, notes=found.provenance.notes | {**self.notes, "input": read.source}
        )
        found = replace(found, provenance=self.last)
        record = f"{read.name}.{self.last.method}.safetensors"
        self.written.append(found.save(self.out / record))
        with failures_named(read):
            words = summaries(self.loaded, found, x) if self.summary else {}
            if self.animation and fits(found, x):
                about = (engine, x, found, self.baseline, features, rows)
                self.written += animations(*about, self.styles[0], self.out, read.name)
        drawn: dict[str, Any] = {}
        if fits(found, x):
            axes = found.axes()
            assert axes is not None
            shown = axes.back(grey(axes.standard(x)))
            drawn = {style: found.overlay(shown, style) for style in self.styles}
        return _Result(found, record, drawn, words)

    def _views(self, result: _Result, row: int, name: str, truth: Truth | None) -> list[MapView]:
        """A view for each of the K maps of example `row`."""
        found, views = result.found, []
        past = found.provenance
        for place in [(row, k) for k in range(found.scores.shape[1])] if found.many else [(row,)]:
            stem = f"{name}.{past.method}" + (f".{_suffix(found, place)}" if found.many else "")
            label = explained(found, place, self.loaded.labels)
            words = result.words.get(place, "")
            if words:
                self.written.append(write_words(words, self.out / f"{stem}.txt"))
            views.append(
                MapView(
                    method=METHODS[past.method].__name__,
                    parameters=_parameters(past.parameters, past.baseline),
                    explains=f"explains {label}",
                    figures=self._figures(result, place, stem, label, truth),
                    numbers=numbers(found, place, truth),
                    record=result.record,
                    words=words,
                )
            )
        return views

    def _figures(
        self, result: _Result, place: tuple[int, ...], stem: str, label: str, truth: Truth | None
    ) -> tuple[Figure, ...]:
        """Writes the pictures of one map; the page also shows the strongest frame of several."""
        figures = []
        for style, drawn in result.drawn.items():
            assert isinstance(drawn, Tensor)
            frames = drawn[place]
            extension = self.extension or (".png" if frames.dim() == 3 else ".gif")
            self.written.append(write_frames(frames, self.out / f"{stem}.{style}{extension}"))
            alt = f"{style} map for {label}, {stem}"
            if frames.dim() == 4:
                best = strongest(result.found, place)
                caption = f"{_CAPTIONS[style]} · frame {best + 1} of {len(frames)}, the strongest"
                figures.append(figure(frames[best], alt, caption, truth))
            figures.append(figure(frames, alt, _CAPTIONS[style], truth))
        return tuple(figures)


_CHECK = (
    "how inputs are read is said by --channels (3 makes grey pictures coloured, 1 the other way "
    "round), --size and --batched; --debug shows where it fails"
)


@contextmanager
def failures_named(read: Read) -> Iterator[None]:
    """Errors inside tell the input; those of the model itself become a ModelError."""
    try:
        yield
    except ModelCallError as error:
        raise ModelCallError(f"{read.source}: {error}; {_CHECK}") from error
    except SaliencyError as error:
        raise type(error)(f"{read.source}: {error}") from error
    except Exception as error:
        raise ModelError(
            f"{read.source}: the model failed on an input {list(read.x.shape)} ({reason(error)}); "
            f"{_CHECK}"
        ) from error


def target_rows(target: Any, x: Tensor) -> Any:
    """The target of a call: a list of K classes becomes a row of them for every example."""
    return torch.tensor([target] * len(x)) if isinstance(target, list) else target


def ranking(loaded: Loaded, x: Tensor) -> list[tuple[Ranked, ...]]:
    """The likeliest classes of each example; empty where the model does not classify."""
    with preserve_model_state(loaded.model, x.device), torch.no_grad():
        # One by one: a batch that fits the plan's launches need not fit at once.
        output = torch.cat([tensor_of(loaded.model(one[None].clone())) for one in x])
    if output.dim() != 2 or output.shape[1] < 2:
        return []
    output = output.double()
    sums = output.sum(1)
    is_share = bool((output >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
    shares = output if is_share else output.softmax(1)
    best = shares.topk(min(TOP, shares.shape[1]), dim=1)
    return [
        tuple(
            Ranked(class_name(number, loaded.labels), share)
            for number, share in zip(numbers, row, strict=True)
        )
        for numbers, row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def class_name(number: int, labels: Mapping[int, str]) -> str:
    return labels.get(number, f"class {number}")


def explained(found: Attribution, place: tuple[int, ...], labels: Mapping[int, str]) -> str:
    """What a map explains, in words."""
    if found.classes is not None:
        return class_name(int(found.classes[place]), labels)
    target = found.provenance.target
    if target["kind"] == "index":
        return f"the output at {json.dumps(target['index'])}"
    return "the model's output"


def numbers(found: Attribution, place: tuple[int, ...], truth: Truth | None) -> Numbers:
    """What is known of the map at `place`, (example,) or (example, target)."""
    past, score = found.provenance, float(found.scores[place])
    start = found.baseline_scores
    return Numbers(
        score=score,
        gain=None if start is None else score - float(start[place]),
        delta=None if found.delta is None else float(found.delta[place]),
        error=float(found.error[place]),
        converged=None if found.converged is None else bool(found.converged[place[0]]),
        points=int(found.points[place[0]]),
        seconds=past.seconds,
        peak_bytes=past.peak_bytes,
        peak_measured=past.peak_measured,
        batch=len(found.scores),
        inside=None if truth is None else inside(found, place, truth.box),
    )


def inside(found: Attribution, place: tuple[int, ...], box: Box) -> Inside:
    """The share of the positive evidence that falls into a box, and the box's share of the map."""
    values = found.map("sum")
    assert isinstance(values, Tensor)
    positive = values[place].double().clamp_min(0.0)
    top, left, bottom, right = box
    within, whole = positive[..., top:bottom, left:right], float(positive.sum())
    share = float(within.sum()) / whole if whole else 0.0
    return Inside(share, within.numel() / positive.numel())


def strongest(found: Attribution, place: tuple[int, ...]) -> int:
    """The frame of a video or slice of a volume that holds most of the map."""
    values = found.map("l2")
    assert isinstance(values, Tensor)
    return int(values[place].double().sum((1, 2)).argmax())


def has_picture(x: Tensor) -> bool:
    """Whether an input [B, C, *] is images, videos or volumes."""
    return x.dim() in (4, 5)


def fits(found: Attribution, x: Tensor) -> bool:
    """Whether a map lies over a picture: those of layers may have places of their own."""
    return has_picture(x) and found.axes() is not None and over(found, x)


def figure(frames: Tensor, alt: str, caption: str, truth: Truth | None) -> Figure:
    """A figure for the page: PNG for one frame [H, W, 3], GIF for several."""
    kind = "png" if frames.dim() == 3 else "gif"
    if kind == "gif":
        caption += f" · all {len(frames)} frames"
    height, width = frames.shape[-3:-1]
    box = None
    if truth is not None:
        top, left, bottom, right = truth.box
        box = (left / width, top / height, (right - left) / width, (bottom - top) / height)
    return Figure(encode(frames, f".{kind}"), f"image/{kind}", width, alt, caption, box)


def _input_figure(
    found: Attribution, x: Tensor, row: int, name: str, truth: Truth | None
) -> Figure | None:
    axes = found.axes()
    if not has_picture(x) or axes is None or len(axes.letters) != x.dim():
        return None
    return figure(picture(axes.standard(x[row : row + 1]))[0], f"the input {name}", "Input", truth)


def _suffix(found: Attribution, place: tuple[int, ...]) -> str:
    return f"class{int(found.classes[place])}" if found.classes is not None else f"map{place[1]}"


def _parameters(parameters: Mapping[str, Any], baseline: Any) -> str:
    shown = [f"{name}={value}" for name, value in parameters.items() if value is not None]
    if baseline is not None:
        plain = baseline if isinstance(baseline, (str, int, float)) else "from a file"
        shown.append(f"baseline={plain}")
    return ", ".join(shown)


def _facts(past: Provenance) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in past.versions.items())
    return [
        ("weights SHA-256", past.weights_sha256 or "none: the model is a plain function"),
        ("arithmetic", f"{past.dtype} on {past.device}, {past.backend} kernels"),
        ("versions", versions),
    ]


def out_folder(path: str) -> Path:
    """The folder to write to, made where it is missing."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path} cannot be made: {error.strerror}") from error
    return folder
