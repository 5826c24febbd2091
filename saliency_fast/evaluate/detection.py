"""Detection of unusual inputs by statistics of their maps, relative to those of references."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.bind import read_inputs
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.attacks import (
    Bounds,
    check_seed,
    classes_of,
    decisions,
    fgsm,
    pgd,
)
from saliency_fast.evaluate.inputs import (
    Explainer,
    Model,
    describe,
    is_method,
    position_sums,
    read_evaluation_input,
)
from saliency_fast.evaluate.maps import correlation, gini
from saliency_fast.evaluate.outcome import (
    Interval,
    check_confidence,
    percentile_ends,
    plain_fields,
    resampled,
)
from saliency_fast.evaluate.scores import RunOptions
from saliency_fast.methods import read_method
from saliency_fast.methods.parts import checks
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.targets import PREDICTED, Target

FEWEST = 20
"""References: half of them must be at least as many as there are statistics."""
TOP = 0.01
"""The share of positions whose magnitude counts as the top."""
HELD = 2**22
"""Positions of maps that are in memory at once."""
FLAT = 1e-9
"""A statistic with a smaller deviation, relative to its mean, is the same for all references."""
LEAST_SHRINKAGE = 1e-3
"""Keeps the correlations invertible where statistics are linearly dependent."""
RARE = 0.05
ATTACKS = ("fgsm", "pgd")
CAVEATS = (
    "a map can be unusual without an attack (another camera, a rare class), and an attacker who "
    "knows of this score can evade it: it is a reason to look, and no proof either way",
)
_UNAWARE = "the attacks know nothing of this score: those that do would fare better against it"


def coherence(maps: Tensor, *, neighbours: bool = True) -> dict[str, Tensor]:
    """Statistics of maps that depend on no label and no mask.

    Args:
        maps: [B, *spatial].
        neighbours: Whether positions have neighbours, unlike the columns of a table.

    Returns:
        By name, float64 [B]. How few positions hold the magnitude: "gini", "entropy" (1 is even)
        and "top_share" (of the largest 1 % of positions). "net": the sum over the sum of
        magnitudes. "scale": the logarithm of the mean magnitude. With neighbours also "roughness"
        (total variation over the sum of magnitudes), "smoothness" (the correlation of a map with
        its mean over windows of 3 positions), both of magnitudes too (windows of 5), and "spread"
        (the standard distance of the magnitude from its centre, as a share of the axes).

    Example:
        >>> coherence(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), neighbours=False)["gini"]
        tensor([0.7500], dtype=torch.float64)
    """
    size = max(1, HELD // max(1, maps[:1].numel()))
    if len(maps) > size:
        starts = range(0, len(maps), size)
        parts = [coherence(maps[at : at + size], neighbours=neighbours) for at in starts]
        return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}
    maps = maps.detach()
    rows = maps.flatten(1).double()
    amount, count = rows.abs(), rows.shape[1]
    total = amount.sum(1)
    tiny = torch.finfo(maps.dtype).tiny
    even = torch.full_like(amount, 1.0 / count)
    peak = total.clamp_min(tiny)
    share = torch.where(total[:, None] > 0, amount / peak[:, None], even)
    top = share.topk(max(1, round(TOP * count)), dim=1).values
    result = {
        "gini": gini(share),
        "entropy": torch.special.entr(share).sum(1) / (math.log(count) if count > 1 else 1.0),
        "top_share": top.sum(1),
        "net": rows.sum(1) / peak,
        "scale": amount.mean(1).clamp_min(tiny).log(),
    }
    if neighbours and count > 1:
        maps = maps.double()
        for name, values in (("roughness", maps), ("roughness_of_magnitude", maps.abs())):
            along = (values.diff(dim=axis).abs().flatten(1) for axis in range(1, maps.dim()))
            result[name] = torch.stack([one.sum(1) for one in along]).sum(0) / peak
        result["smoothness"] = _smoothness(maps, 3)
        result["smoothness_of_magnitude"] = _smoothness(maps.abs(), 5)
        result["spread"] = _spread(share.view_as(maps))
    return result


def _smoothness(maps: Tensor, window: int) -> Tensor:
    """The correlation of maps with their means over windows, 0 where one is constant."""
    from scipy.ndimage import uniform_filter

    size = (1, *(window,) * (maps.dim() - 1))
    mean = uniform_filter(maps.cpu().numpy(), size, mode="nearest")
    return correlation(maps, torch.from_numpy(mean).to(maps.device)).nan_to_num(0.0)


def _spread(share: Tensor) -> Tensor:
    total = share.new_zeros(len(share))
    for axis in range(1, share.dim()):
        size = share.shape[axis]
        along = share.movedim(axis, 1).reshape(len(share), size, -1).sum(2)
        position = torch.arange(size, dtype=torch.float64, device=share.device) / size
        centre = (along * position).sum(1, keepdim=True)
        total += (along * (position - centre) ** 2).sum(1)
    return total.sqrt()


@dataclass(frozen=True, eq=False, repr=False)
class CoherenceReference:
    """The mean and the shrunk covariance of the statistics of clean maps; see `fit`.

    Args:
        names: The S statistics that are used.
        left_out: Those that are the same for all references.
        centre: Means, float64 [S]; `deviation` holds standard deviations.
        precision: The inverse of the correlations, float64 [S, S].
        calibration: The sorted scores of references that were not fitted, float64 [n].
        shrinkage: How far correlations are shrunk towards zero.
        spatial: The shape of a map; `neighbours` as in `coherence`.
        count: The number of references; `seed` says which half of them is fitted.

    Example:
        >>> maps = torch.rand(40, 6, 6)
        >>> CoherenceReference.fit(maps).score(maps[:2]).shape
        torch.Size([2])
    """

    names: tuple[str, ...]
    left_out: tuple[str, ...]
    centre: Tensor
    deviation: Tensor
    precision: Tensor
    calibration: Tensor
    shrinkage: float
    spatial: tuple[int, ...]
    neighbours: bool
    count: int
    seed: int

    @classmethod
    def fit(cls, maps: Tensor, *, neighbours: bool = True, seed: int = 0) -> CoherenceReference:
        """Fits half of the maps [N, *spatial] of clean inputs and scores the other half.

        Raises:
            InputError: If the maps are fewer than 20 or all alike.
        """
        checks.boolean("neighbours", neighbours)
        check_seed("seed", seed)
        _check_maps(maps, "maps of references")
        if len(maps) < FEWEST:
            raise InputError(
                f"references are too few: got {len(maps)}, expected {FEWEST} or more clean inputs; "
                "with n of them no p-value is below 1 / (n / 2 + 1)"
            )
        statistics = coherence(maps, neighbours=neighbours)
        values = torch.stack(list(statistics.values()), 1)
        generator = torch.Generator().manual_seed(seed % 2**63)
        order = torch.randperm(len(maps), generator=generator, device="cpu").to(maps.device)
        fitted, kept_back = order.tensor_split([(len(maps) + 1) // 2])
        centre, deviation = values[fitted].mean(0), values[fitted].std(0)
        varied = deviation > FLAT * (1.0 + centre.abs())
        if not bool(varied.any()):
            raise InputError(
                "maps of references are all alike: they have no statistics; pass maps that "
                "follow the inputs"
            )
        used = dict(zip(statistics, varied.tolist(), strict=True))
        centre, deviation = centre[varied], deviation[varied]
        standard = (values[:, varied] - centre) / deviation
        correlations, shrinkage = shrunk_correlations(standard[fitted])
        precision = torch.linalg.inv(correlations)
        calibration = _distance(standard[kept_back], precision).sort().values
        return cls(
            tuple(name for name, one in used.items() if one),
            tuple(name for name, one in used.items() if not one),
            *(centre, deviation, precision, calibration, shrinkage),
            *(tuple(maps.shape[1:]), neighbours, len(maps), seed),
        )

    def score(self, maps: Tensor) -> Tensor:
        """The Mahalanobis distance of the maps' statistics from the references', over the square
        root of their number, float64 [B]: about 1 for usual maps, larger for unusual ones.
        """
        return _distance(self.standardised(maps), self.precision.to(maps.device))

    def standardised(self, maps: Tensor) -> Tensor:
        """How many deviations each statistic is away from the references' mean, float64 [B, S]."""
        _check_maps(maps, "maps")
        if tuple(maps.shape[1:]) != self.spatial:
            expected = f"expected {['B', *self.spatial]}, as the references"
            raise InputError(f"maps must have one shape: got {list(maps.shape)}, {expected}")
        statistics = coherence(maps, neighbours=self.neighbours)
        values = torch.stack([statistics[name] for name in self.names], 1)
        return (values - self.centre.to(maps.device)) / self.deviation.to(maps.device)

    def p_values(self, scores: Tensor) -> Tensor:
        """The conformal p-values (Vovk, 2005), float64 [B]: the share of the calibration scores and
        the score itself that are at least as high.
        """
        calibration = self.calibration.to(scores.device)
        below = torch.searchsorted(calibration, scores.double().contiguous())
        return (len(calibration) - below + 1).double() / (len(calibration) + 1)

    def __repr__(self) -> str:
        return f"<CoherenceReference of {self.count} maps; {', '.join(self.names)}>"


def _distance(standard: Tensor, precision: Tensor) -> Tensor:
    """Mahalanobis distances of standardised rows [B, S] over the root of S, float64 [B]."""
    squared = ((standard @ precision) * standard).sum(1)
    return (squared / standard.shape[1]).clamp_min(0.0).sqrt()


def shrunk_correlations(standard: Tensor) -> tuple[Tensor, float]:
    """Correlations shrunk by the optimal share (Schäfer & Strimmer, 2005), and that share."""
    rows, count = standard.shape
    products = standard[:, :, None] * standard[:, None, :]
    mean = products.mean(0)
    noise = ((products - mean) ** 2).sum(0) * rows / (rows - 1) ** 3
    sample = mean * rows / (rows - 1)
    whole = torch.eye(count, dtype=torch.float64, device=standard.device)
    apart = whole == 0
    signal = (sample[apart] ** 2).sum()
    share = float((noise[apart].sum() / signal).clamp(0.0, 1.0)) if float(signal) > 0 else 1.0
    share = max(share, LEAST_SHRINKAGE)
    return torch.where(apart, (1.0 - share) * sample, whole), share


def _check_maps(maps: Tensor, name: str) -> None:
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        got = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise InputTypeError(f"{name} must be a floating tensor: got {got}")
    if maps.dim() < 2 or maps.numel() == 0:
        raise InputError(f"{name} must be [B, *spatial]: got {list(maps.shape)}")
    if not bool(maps.isfinite().all()):
        raise InputError(f"{name} must be finite: some hold NaN or infinity")


@dataclass(frozen=True, eq=False, repr=False)
class Roc:
    """The receiver operating characteristic of scores that should be higher for attacked inputs.

    Args:
        fpr: The share of clean inputs whose score reaches each threshold, float64 [n], from 0 to 1.
        tpr: The same share of attacked inputs.
        thresholds: Falling, from infinity, float64 [n].
        area: Under tpr over fpr, with its bootstrap interval: the probability that an attacked
            input scores higher than a clean one (ties count half).
        clean: The number of clean scores; `attacked` that of the others.
    """

    fpr: Tensor
    tpr: Tensor
    thresholds: Tensor
    area: Interval
    clean: int
    attacked: int

    def rate_at(self, fpr: float) -> float:
        """The highest true positive rate at a false positive rate no higher than `fpr`."""
        if not 0.0 <= fpr <= 1.0:
            raise InputError(f"fpr is a share, from 0 to 1: got {fpr}")
        return float(self.tpr[self.fpr <= fpr].max())

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; the first threshold, infinity, is None."""
        area = {"area": self.area.mean, "area_low": self.area.low, "area_high": self.area.high}
        own: dict[str, Any] = plain_fields(self)
        return {**own, **area, "confidence": self.area.confidence}

    def __repr__(self) -> str:
        return f"<Roc area {self.area}; {self.clean} clean, {self.attacked} attacked>"


def roc(clean: Tensor, attacked: Tensor, confidence: float = 0.95, *, seed: int = 0) -> Roc:
    """The receiver operating characteristic of scores.

    Args:
        clean: Scores [N].
        attacked: Scores [M], which should be higher.
        confidence: The level of the area's interval, from 2000 resamples of each group. Where one
            group holds attacked versions of the other, it is rather too wide.
        seed: Of the resampling.

    Raises:
        InputError: If a group is empty or holds NaN.

    Example:
        >>> roc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]))
        <Roc area 1 [1, 1]; 2 clean, 2 attacked>
    """
    check_confidence(confidence)
    low, high = _sorted_scores("clean", clean), _sorted_scores("attacked", attacked)
    below, upto = (torch.searchsorted(low, high, right=right) for right in (False, True))

    def areas(times_low: Tensor, times_high: Tensor) -> Tensor:
        """Areas [R] of groups whose members count so often, [R, N] and [R, M]."""
        until = functional.pad(times_low.cumsum(1), (1, 0))
        beaten = (until[:, below] + until[:, upto]) / 2.0
        return (beaten * times_high).sum(1) / (len(low) * len(high))

    cuts = functional.pad(torch.unique(torch.cat([low, high])).flip(0), (1, 0), value=math.inf)
    # The share that scores at least a cut: all but those below it.
    fpr, tpr = (
        (len(one) - torch.searchsorted(one, cuts)).double() / len(one) for one in (low, high)
    )
    area = float(areas(torch.ones_like(low)[None], torch.ones_like(high)[None]))
    sampled = torch.cat([areas(*times) for times in resampled((len(low), len(high)), seed)])
    lowest, highest = percentile_ends(sampled, confidence).tolist()
    interval = Interval(area, lowest, highest, confidence, len(low) + len(high))
    return Roc(fpr, tpr, cuts, interval, len(low), len(high))


def _sorted_scores(name: str, scores: Tensor) -> Tensor:
    """Scores sorted, float64 on the CPU."""
    if not isinstance(scores, Tensor):
        raise InputTypeError(f"{name} must be a tensor: got {type(scores).__name__}")
    if scores.dim() != 1 or len(scores) == 0:
        raise InputError(f"{name} must be scores [N], one at least: got {list(scores.shape)}")
    values = scores.detach().double().cpu()
    if bool(values.isnan().any()):
        raise InputError(f"{name} must be numbers: {int(values.isnan().sum())} scores are NaN")
    return values.sort().values


@dataclass(frozen=True, eq=False, repr=False)
class AdversarialScore:
    """How unusual the maps of inputs are.

    Args:
        scores: See `CoherenceReference.score`, float64 [B].
        p_values: The probability of a score as high for an input like the references, float64 [B].
        deviations: Of each statistic from the references' mean, in their deviations, [B, S].
        names: Of the S statistics.
        reference: Can be passed to `adversarial_score` for more inputs.
        parameters: All that the scores depend on.
        caveats: Sentences that a reader must know.
    """

    scores: Tensor
    p_values: Tensor
    deviations: Tensor
    names: tuple[str, ...]
    reference: CoherenceReference
    parameters: Mapping[str, Any]
    caveats: tuple[str, ...] = CAVEATS

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text for JSON; without the reference."""
        return plain_fields(self, "reference")

    def __repr__(self) -> str:
        rare = int((self.p_values <= RARE).sum())
        return f"<AdversarialScore of {len(self.scores)} inputs; p <= .05 for {rare} of them>"


@dataclass(frozen=True, eq=False, repr=False)
class AttackRoc:
    """How well the score tells clean inputs from attacked ones, by attack; see `attack_roc`.

    Args:
        rocs: By attack; None where it fooled no input.
        fooled: How many inputs each attack fooled.
        tried: How many inputs the model was right about.
        scores: Of the clean inputs ("clean") and, by attack, of those that fooled the model.
        parameters: All that the result depends on.
        caveats: Sentences that a reader must know.
    """

    rocs: Mapping[str, Roc | None]
    fooled: Mapping[str, int]
    tried: int
    scores: Mapping[str, Tensor]
    parameters: Mapping[str, Any]
    caveats: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text for JSON."""
        rocs = {name: one and one.as_dict() for name, one in self.rocs.items()}
        return plain_fields(self) | {"rocs": rocs}

    def __repr__(self) -> str:
        lines = [
            f"{name}: area {'none' if one is None else one.area}, "
            f"{self.fooled[name]} of {self.tried} fooled"
            for name, one in self.rocs.items()
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
    running: RunOptions | None = None,
    layout: LayoutLike = None,
) -> AdversarialScore:
    """Scores inputs by how unusual their maps are relative to those of clean references. How well
    the score finds attacks depends on the model and the method: `attack_roc` measures it.

    Args:
        model: The model.
        inputs: [B, *].
        references: Clean inputs [N, *], 20 at least, that are none of the inputs, or a reference
            fitted to maps of the same method.
        method: Makes the maps.
        target: Of the maps; with one class per input references have their predicted classes.
        baseline: The method's baseline.
        seed: Which half of the references is fitted.
        running, layout: How the model is run, and the inputs' axes, one letter each.

    Raises:
        InputError: If references do not fit the inputs or are too few.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Tanh())
        >>> x = torch.randn(42, 4)
        >>> adversarial_score(model, x[:2], x[2:], "gradient").p_values.shape
        torch.Size([2])
    """
    running = running or RunOptions()

    def explained(x: Tensor, target: Target) -> Tensor:
        """Maps [B, *spatial] of inputs."""
        if not isinstance(x, Tensor):
            raise InputTypeError(f"inputs must be one tensor: got {type(x).__name__}")
        options: dict[str, Any] = {"baseline": baseline, "running": running, "layout": layout}
        data = read_evaluation_input(
            model, x, torch.zeros_like(x), target=target, method=method, **options
        )
        return position_sums(data.explain(data.inputs))

    maps = explained(inputs, target)
    if isinstance(references, CoherenceReference):
        reference = references
    else:
        _check_references(references, inputs)
        # A target per input is not the references'.
        shared = target if target is None or isinstance(target, (int, str)) else PREDICTED
        clean, spatial = explained(references, shared), inputs.dim() > 2
        reference = CoherenceReference.fit(clean, neighbours=spatial, seed=seed)
    scores, about = reference.score(maps), _about(method, baseline)
    parameters = about | {
        "target": target if isinstance(target, (int, str)) else type(target).__name__,
        "references": reference.count,
        "statistics": list(reference.names),
        "left_out": list(reference.left_out),
        "shrinkage": reference.shrinkage,
        "seed": reference.seed,
    }
    found = scores, reference.p_values(scores), reference.standardised(maps)
    return AdversarialScore(*found, reference.names, reference, parameters)


def _check_references(references: object, inputs: Tensor) -> None:
    expected = f"expected {['N', *inputs.shape[1:]]} on {inputs.device}"
    if not isinstance(references, Tensor):
        raise InputError(f"references must be a tensor: got {type(references)}, {expected}")
    got = f"{list(references.shape)} on {references.device}"
    if references.shape[1:] != inputs.shape[1:] or references.device != inputs.device:
        raise InputError(f"references must be clean inputs like the others: got {got}, {expected}")
    if torch.equal(references, inputs):
        raise InputError("references must be other inputs than those that are scored")


def _about(method: Explainer, baseline: Baseline) -> dict[str, Any]:
    if is_method(method):
        method = read_method(method)
        fields = getattr(method, "__dataclass_fields__", ())
        values = {name: describe(getattr(method, name)) for name in fields}
        about = {"method": method.name, "method_parameters": values}
    else:
        about = {"method": getattr(method, "__name__", type(method).__name__)}
    simple = baseline is None or isinstance(baseline, (str, int, float, Tensor))
    return about | {"baseline": describe(baseline) if simple else type(baseline).__name__}


def _rightly_classified(
    model: Model, inputs: Tensor, labels: Target, running: RunOptions
) -> tuple[Tensor, Tensor]:
    """The inputs that the model is right about, and their classes."""
    if not isinstance(inputs, Tensor):
        raise InputTypeError(f"inputs must be one tensor: got {type(inputs).__name__}")
    (x,), (dtype,) = read_inputs(inputs)
    decided = decisions(model, x, running.taking(dtype), labels)
    classes = classes_of(labels, decided)
    right = decided == classes
    if not bool(right.any()):
        raise InputError(
            "labels: the model is right about none of the inputs, so that none can be attacked; "
            f"got {classes[:8].tolist()}, decided {decided[:8].tolist()}"
        )
    return x[right].to(dtype), classes[right]


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
    running: RunOptions | None = None,
    layout: LayoutLike = None,
) -> AttackRoc:
    """Measures whether `adversarial_score` tells attacked inputs from clean ones: the inputs that
    the model is right about, and their attacked versions that fool it, for predicted classes.

    Args:
        model: Returns [B, classes].
        inputs: [B, *].
        labels: The true classes, int64 [B].
        references: Clean inputs that are none of these.
        epsilon, steps, step_size, bounds: As in `fgsm` and `pgd`.
        attacks: Of "fgsm" and "pgd".
        method, baseline, seed, running, layout: As in `adversarial_score`.

    Raises:
        InputError: If the model is right about none of the inputs.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Tanh())
        >>> x = torch.randn(60, 4)
        >>> attack_roc(model, x[40:], model(x[40:]).argmax(1), x[:40], "gradient", 1.0).tried
        20
    """
    running = running or RunOptions()
    names = (attacks,) if isinstance(attacks, str) else tuple(attacks)
    for name in names:
        checks.choice("attacks", name, ATTACKS)
    clean, classes = _rightly_classified(model, inputs, labels, running)
    shared: dict[str, Any] = {"bounds": bounds, "running": running}
    common: dict[str, Any] = {"baseline": baseline, "seed": seed, "layout": layout}

    def scored(x: Tensor, usual: Tensor | CoherenceReference) -> AdversarialScore:
        return adversarial_score(model, x, usual, method, running=running, **common)

    # Attacks come first, since their errors cost less time than those of the maps.
    made = {
        name: fgsm(model, clean, classes, epsilon, **shared)
        if name == "fgsm"
        else pgd(model, clean, classes, epsilon, steps, step_size, seed, **shared)
        for name in names
    }
    first = scored(clean, references)
    fooling = {name: one.inputs[one.fooled] for name, one in made.items()}
    scores = {"clean": first.scores} | {
        name: scored(moved, first.reference).scores if len(moved) else first.scores[:0]
        for name, moved in fooling.items()
    }
    missed = tuple(f"{name} fooled no input" for name in names if not len(scores[name]))
    about = {name: dict(one.parameters) for name, one in made.items()}
    return AttackRoc(
        {name: roc(first.scores, scores[name]) if len(scores[name]) else None for name in names},
        {name: len(scores[name]) for name in names},
        len(first.scores),
        scores,
        {**first.parameters, "attacks": about},
        (*missed, _UNAWARE, *CAVEATS),
    )
