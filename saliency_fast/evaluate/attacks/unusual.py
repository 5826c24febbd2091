"""Unusual inputs: how far the coherence of their maps is from that of clean references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import read_inputs
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.attacks.coherence import CoherenceReference
from saliency_fast.evaluate.attacks.linf import Attacked, Bounds, classes_of, decisions, fgsm, pgd
from saliency_fast.evaluate.attacks.roc import Roc, roc
from saliency_fast.evaluate.scores import Running
from saliency_fast.evaluate.subject import Explainer, Model, read_subject
from saliency_fast.evaluate.substrates import named
from saliency_fast.methods import read_method
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.targets import PREDICTED, Target

ATTACKS = ("fgsm", "pgd")
CAVEATS = (
    "a map can be unusual without an attack (another camera, a rare class), and an attacker who "
    "knows of this score can evade it: it is a reason to look, and no proof either way",
)
_UNAWARE = "the attacks know nothing of this score: those that do would fare better against it"


@dataclass(frozen=True, eq=False, repr=False)
class AdversarialScore:
    """How unusual the maps of inputs are.

    scores float64 [B]: see `CoherenceReference.score`. p_values float64 [B]: the chance of a score
    as high for an input like the references. deviations float64 [B, S]: of each statistic out of
    `names` from the references' mean, in their standard deviations. reference: may be handed to
    `adversarial_score` again, for more inputs. parameters: what all of it depends on.
    """

    scores: Tensor
    p_values: Tensor
    deviations: Tensor
    names: tuple[str, ...]
    reference: CoherenceReference
    parameters: Mapping[str, Any]
    caveats: tuple[str, ...] = CAVEATS

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON."""
        return {
            "scores": self.scores.tolist(),
            "p_values": self.p_values.tolist(),
            "deviations": self.deviations.tolist(),
            "names": list(self.names),
            "parameters": dict(self.parameters),
            "caveats": list(self.caveats),
        }

    def __repr__(self) -> str:
        rare = int((self.p_values <= 0.05).sum())
        return f"<AdversarialScore of {len(self.scores)} inputs; p <= .05 for {rare} of them>"


@dataclass(frozen=True, eq=False, repr=False)
class AttackRoc:
    """How well the score tells clean inputs from attacked ones, by attack.

    rocs: None where an attack fooled too few. fooled: how many inputs each did; tried: those that
    the model was right about. scores: float64, of the clean and of those that fooled the model.
    """

    rocs: Mapping[str, Roc | None]
    fooled: Mapping[str, int]
    tried: int
    scores: Mapping[str, Tensor]
    parameters: Mapping[str, Any]
    caveats: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON."""
        rocs = {name: one and one.as_dict() for name, one in self.rocs.items()}
        return {
            "rocs": rocs,
            "fooled": dict(self.fooled),
            "tried": self.tried,
            "scores": {name: one.tolist() for name, one in self.scores.items()},
            "parameters": dict(self.parameters),
            "caveats": list(self.caveats),
        }

    def __repr__(self) -> str:
        areas = {name: "none" if one is None else str(one.area) for name, one in self.rocs.items()}
        lines = [
            f"{name}: area {area}, {self.fooled[name]} of {self.tried} fooled"
            for name, area in areas.items()
        ]
        return "\n".join([*lines, *(f"  note: {one}" for one in self.caveats)])


def adversarial_score(
    model: Model,
    inputs: Tensor,
    references: Tensor | CoherenceReference,
    method: Explainer = "integrated_gradients",
    target: Target = PREDICTED,
    *,
    baseline: Baseline = None,
    seed: int = 0,
    running: Running | None = None,
    layout: LayoutLike = None,
) -> AdversarialScore:
    """Scores inputs [B, *] by how unusual their maps are against those of clean references.

    references: clean inputs [N, *], 20 at least, that are none of the inputs, or a reference fitted
    to maps of the same method. target: of the maps; one class per example is the inputs', and
    references are explained for what the model predicts. seed: which half of them is fitted.
    layout: of the inputs, one letter per axis, as in `explain`.
    How much the score tells depends on the model and the method: `attack_roc` measures it.
    """
    seen = _Explained(model, method, baseline, running or Running(), layout)
    maps = seen.maps(inputs, target)
    if isinstance(references, CoherenceReference):
        reference = references
    else:
        _need_others(references, inputs)
        # What was given for each example is not the references'.
        shared = target if target is None or isinstance(target, (int, str)) else PREDICTED
        usual, tables = seen.maps(references, shared), inputs.dim() == 2
        reference = CoherenceReference.fit(usual, neighbours=not tables, seed=seed)
    scores = reference.score(maps)
    parameters = seen.parameters() | {
        "target": target if isinstance(target, (int, str)) else type(target).__name__,
        "references": reference.count,
        "statistics": list(reference.names),
        "left_out": list(reference.left_out),
        "shrinkage": reference.shrinkage,
        "seed": reference.seed,
    }
    return AdversarialScore(
        scores,
        reference.p_values(scores),
        reference.standardised(maps),
        reference.names,
        reference,
        parameters,
    )


def _need_others(references: object, inputs: Tensor) -> None:
    """Raises where references are not like the inputs, or are the inputs."""
    wide = isinstance(references, Tensor) and references.shape[1:] == inputs.shape[1:]
    if not isinstance(references, Tensor) or not wide:
        got = list(references.shape) if isinstance(references, Tensor) else type(references)
        raise InputError(
            f"references must be clean inputs like the others: got {got}, expected "
            f"{['N', *inputs.shape[1:]]}"
        )
    if references.device != inputs.device:
        raise InputError(
            f"references are on another device: got {references.device}, inputs are on "
            f"{inputs.device}; move them with .to(inputs.device)"
        )
    if references.shape == inputs.shape and bool((references == inputs).all()):
        raise InputError(
            "references must be other inputs than those that are scored: got the same ones"
        )


def attack_roc(
    model: Model,
    inputs: Tensor,
    labels: Target,
    references: Tensor,
    method: Explainer = "integrated_gradients",
    epsilon: float = 0.1,
    *,
    attacks: Sequence[str] = ATTACKS,
    steps: int = 20,
    step_size: float | None = None,
    bounds: Bounds = None,
    baseline: Baseline = None,
    seed: int = 0,
    running: Running | None = None,
    layout: LayoutLike = None,
) -> AttackRoc:
    """Whether the score tells attacked inputs from clean ones: reported as it is.

    Clean are the inputs [B, *] that the model is right about, by labels int64 [B]; attacked are
    those of their versions that fool it. references: clean inputs that are none of these. epsilon,
    steps, step_size and bounds: as of `fgsm` and `pgd`. All maps are for the predicted class.
    layout: as in `adversarial_score`.
    """
    running = running or Running()
    names = (attacks,) if isinstance(attacks, str) else tuple(attacks)
    for name in names:
        if name not in ATTACKS:
            raise InputError(f"attacks must be out of {', '.join(ATTACKS)}: got {name!r}")
    clean, classes = _right(model, inputs, labels, running)
    shared: dict[str, Any] = {"bounds": bounds, "running": running}

    def attacked(name: str) -> Attacked:
        if name == "fgsm":
            return fgsm(model, clean, classes, epsilon, **shared)
        return pgd(model, clean, classes, epsilon, steps, step_size, seed, **shared)

    def scored(x: Tensor, usual: Tensor | CoherenceReference) -> AdversarialScore:
        return adversarial_score(
            *(model, x, usual, method), baseline=baseline, seed=seed, running=running, layout=layout
        )

    # First, for what is wrong with an attack is known sooner than what is wrong with its maps.
    made = {name: attacked(name) for name in names}
    first = scored(clean, references)
    moved = {name: one.inputs[one.fooled] for name, one in made.items()}
    none = first.scores[:0]
    found = {
        name: scored(x, first.reference).scores if len(x) else none for name, x in moved.items()
    }
    return _reported(first, made, found)


def _reported(
    first: AdversarialScore, made: Mapping[str, Attacked], found: Mapping[str, Tensor]
) -> AttackRoc:
    """What was measured: of clean inputs, of attacks, and of what these made that fooled."""
    missed = tuple(f"{name} fooled no input" for name, one in found.items() if len(one) == 0)
    about = {name: dict(one.parameters) for name, one in made.items()}
    return AttackRoc(
        {name: roc(first.scores, one) if len(one) else None for name, one in found.items()},
        {name: len(one) for name, one in found.items()},
        len(first.scores),
        {"clean": first.scores, **found},
        {**first.parameters, "attacks": about},
        (*missed, _UNAWARE, *CAVEATS),
    )


def _right(model: Model, inputs: Tensor, labels: Target, running: Running) -> tuple[Tensor, Tensor]:
    """The inputs that the model is right about, and their classes."""
    if not isinstance(inputs, Tensor):
        raise InputTypeError(f"inputs must be one tensor: got {type(inputs).__name__}")
    (x,), (dtype,) = read_inputs(inputs)
    before = decisions(model, x, running.taking(dtype), labels)
    classes = classes_of(labels, before)
    right = before == classes
    if not bool(right.any()):
        raise InputError(
            "labels: the model is right about none of the inputs, so that none can be attacked; "
            f"got {classes[:8].tolist()}, decided {before[:8].tolist()}"
        )
    return x[right].to(dtype), classes[right]


@dataclass(frozen=True, eq=False)
class _Explained:
    """How inputs are explained, all in the same way."""

    model: Model
    method: Explainer
    baseline: Baseline
    running: Running
    layout: LayoutLike = None

    def maps(self, inputs: Tensor, target: Target) -> Tensor:
        """Maps [B, *spatial] of inputs [B, C, *spatial]."""
        if not isinstance(inputs, Tensor):
            raise InputTypeError(f"inputs must be one tensor: got {type(inputs).__name__}")
        subject = read_subject(
            *(self.model, inputs, torch.zeros_like(inputs)),
            target=target,
            method=self.method,
            baseline=self.baseline,
            running=self.running,
            layout=self.layout,
        )
        values = subject.explain(subject.inputs)
        return values if values.dim() == 2 else values.sum(1)

    def parameters(self) -> dict[str, Any]:
        if isinstance(self.method, str) or hasattr(self.method, "recipe"):
            method = read_method(cast("Method | str", self.method))
            fields = getattr(method, "__dataclass_fields__", ())
            of = {name: named(getattr(method, name)) for name in fields}
            about = {"method": method.name, "method_parameters": of}
        else:
            about = {"method": getattr(self.method, "__name__", type(self.method).__name__)}
        plain = self.baseline is None or isinstance(self.baseline, (str, int, float, Tensor))
        start = named(self.baseline) if plain else type(self.baseline).__name__  # type: ignore[arg-type]
        return about | {"baseline": start}
