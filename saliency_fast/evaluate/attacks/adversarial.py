"""Adversarial attacks in the maximum norm: inputs changed a little, so that a classifier decides
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saliency_fast.engine.bind import read_inputs
from saliency_fast.engines import Engine
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.inputs import Model
from saliency_fast.evaluate.scores import RunOptions, Scorer
from saliency_fast.methods.parts import checks
from saliency_fast.model.targets import PREDICTED, Reader, Target, read_targets, tensor_of
from saliency_fast.ops import philox, random_bits

Bounds = tuple[float | Tensor, float | Tensor] | None
"""The smallest and the largest valid input: numbers, or tensors that broadcast to the inputs."""
_ODD = 0x9E3779B97F4A7C15
STEP_SHARE = 2.5
"""The default step size times the number of steps, in radii: the ball can be crossed (Madry)."""


@dataclass(frozen=True, eq=False, repr=False)
class Attacked:
    """The result of an attack on inputs.

    Args:
        inputs: The attacked inputs [B, *], within the ball and the bounds.
        classes: int64 [B], those that the attack avoids or, where `targeted`, aims at.
        before: The decisions for the original inputs, int64 [B].
        after: The decisions for the attacked inputs, int64 [B].
        targeted: Whether the attack aims at `classes`.
        parameters: All that the result depends on.
    """

    inputs: Tensor
    classes: Tensor
    before: Tensor
    after: Tensor
    targeted: bool
    parameters: Mapping[str, Any]

    @property
    def fooled(self) -> Tensor:
        """Where the attack succeeded, bool [B]: the decision was the class and is another one or,
        where targeted, was another one and is the class.
        """
        was, now = self.before == self.classes, self.after == self.classes
        return now & ~was if self.targeted else was & ~now

    def __repr__(self) -> str:
        count = int(self.fooled.sum())
        return f"<Attacked {self.parameters['attack']}: {count} of {len(self.inputs)} fooled>"


def fgsm(
    model: Model,
    x: Tensor,
    target: Target,
    epsilon: float,
    *,
    targeted: bool = False,
    bounds: Bounds = None,
    running: RunOptions | None = None,
) -> Attacked:
    """One step of size `epsilon` along the sign of the cross-entropy's gradient (Goodfellow, 2015).

    Args:
        model: Returns [B, classes].
        x: Inputs [B, *].
        target: The true classes, "predicted" for the model's own decisions, or with `targeted` the
            classes to reach.
        epsilon: The step's size, in units of x.
        targeted: Whether to approach the target instead of leaving it.
        bounds: The smallest and largest valid input; by default those of the batch.
        running: How the model is run.

    Raises:
        InputError: If the target is no class, or the inputs leave the bounds.

    Example:
        >>> x = torch.zeros(2, 4)
        >>> fgsm(torch.nn.Linear(4, 3), x, 0, 0.1, bounds=(-1.0, 1.0)).inputs.abs().max()
        tensor(0.1000)
    """
    checks.positive("epsilon", epsilon)
    victim = _Victim.of(model, x, target, targeted, bounds, running)
    moved = victim.step(victim.x, epsilon, epsilon)
    return victim.attacked(moved, {"attack": "fgsm", "epsilon": epsilon})


def pgd(
    model: Model,
    x: Tensor,
    target: Target,
    epsilon: float,
    steps: int = 20,
    step_size: float | None = None,
    seed: int = 0,
    *,
    targeted: bool = False,
    bounds: Bounds = None,
    running: RunOptions | None = None,
) -> Attacked:
    """Projected gradient steps from a random point within `epsilon` of x, in the maximum norm
    (Madry, 2018).

    Args:
        model: Returns [B, classes].
        x: Inputs [B, *].
        target: As in `fgsm`.
        epsilon: The radius of the ball, in units of x.
        steps: Their number.
        step_size: In units of x; 2.5 epsilon / steps by default, so that the ball can be crossed.
        seed: Of the uniform start, which differs between examples.
        targeted: As in `fgsm`.
        bounds: As in `fgsm`.
        running: How the model is run.

    Raises:
        InputError: As `fgsm`.

    Example:
        >>> x = torch.rand(2, 4)
        >>> attacked = pgd(torch.nn.Linear(4, 3), x, "predicted", epsilon=0.1, steps=3)
        >>> bool((attacked.inputs - x).abs().max() <= 0.1 + 1e-6)
        True
    """
    checks.positive("epsilon", epsilon)
    checks.whole("steps", steps, 1)
    check_seed("seed", seed)
    if step_size is not None:
        checks.positive("step_size", step_size)
    size = STEP_SHARE * epsilon / steps if step_size is None else step_size
    victim = _Victim.of(model, x, target, targeted, bounds, running)
    moved = victim.within(victim.x + epsilon * uniform(victim.x, seed), epsilon)
    for _ in range(steps):
        moved = victim.step(moved, size, epsilon)
    about = {"attack": "pgd", "epsilon": epsilon, "steps": steps, "step_size": size, "seed": seed}
    return victim.attacked(moved, about)


def check_seed(name: str, seed: object) -> None:
    """Raises unless it is one 64-bit int."""
    if isinstance(seed, tuple):
        raise InputTypeError(f"{name} must be one 64-bit int for all examples: got {seed!r}")
    checks.seed(seed)


def uniform(x: Tensor, seed: int, sample: int = 0) -> Tensor:
    """Uniform numbers in [-1, 1) like x [B, *], which depend on the seed, the example index and the
    sample alone.
    """
    example = torch.arange(len(x), device=x.device)
    # Consecutive seeds must not share examples.
    key = (seed * _ODD + 2**63) % 2**64 - 2**63
    bits = random_bits(
        example + key, torch.full_like(example, sample), x[0].numel(), 0, philox.BASELINE
    )
    noise: Tensor = ((bits >> 8).double() * 2.0**-23 - 1.0).to(x.dtype).view_as(x)
    return noise


def project(x: Tensor, origin: Tensor, radius: Tensor | float, bounds: tuple[Any, Any]) -> Tensor:
    """The nearest point to x in the maximum-norm ball around its origin and in the bounds."""
    low = torch.maximum(origin - radius, torch.as_tensor(bounds[0]).to(origin))
    high = torch.minimum(origin + radius, torch.as_tensor(bounds[1]).to(origin))
    return torch.minimum(torch.maximum(x, low), high)


@dataclass(frozen=True)
class CrossEntropy(Reader):
    """A target: the cross-entropy of classes int64 [B]."""

    classes: Tensor
    count: int = 1

    def read(self, raw: Any, example: Tensor) -> Tensor:
        """Losses [R, 1]."""
        # In float32 the gradient would be zero where the model is certain.
        logarithm = tensor_of(raw).double().log_softmax(1)
        return -logarithm.gather(1, self.classes[example][:, None])


def loss_gradient(engine: Engine, x: Tensor, classes: Tensor, running: RunOptions) -> Tensor:
    """The gradient of the cross-entropy of classes int64 [B] at x [B, *]."""
    return running.standard(running.map(engine, x, CrossEntropy(classes))[:, 0])


@dataclass(frozen=True, eq=False)
class _Victim:
    """A model with inputs x, the classes of the loss and the decisions before the attack."""

    model: Model
    x: Tensor
    classes: Tensor
    before: Tensor
    targeted: bool
    bounds: tuple[Tensor, Tensor]
    running: RunOptions

    @classmethod
    def of(
        cls,
        model: Model,
        x: Tensor,
        target: Target,
        targeted: bool,
        bounds: Bounds,
        running: RunOptions | None,
    ) -> _Victim:
        checks.flag("targeted", targeted)
        if not callable(model):
            raise InputTypeError(f"model must be callable: got {type(model).__name__}")
        if not isinstance(x, Tensor):
            raise InputTypeError(f"x must be one tensor: got {type(x).__name__}")
        (x,), (dtype,) = read_inputs(x)
        running = (running or RunOptions()).taking(dtype)
        limits = _read_bounds(bounds, x)
        before = decisions(model, x, running, target)
        classes = classes_of(target, before)
        return cls(model, x, classes, before, targeted, limits, running)

    @cached_property
    def engine(self) -> Engine:
        return self.running.engine(self.model, "gradient")

    def step(self, x: Tensor, size: float, radius: float) -> Tensor:
        """A step along the sign of the loss gradient, or against it where targeted."""
        sign = loss_gradient(self.engine, x, self.classes, self.running).sign()
        return self.within(x - size * sign if self.targeted else x + size * sign, radius)

    def within(self, x: Tensor, radius: float) -> Tensor:
        return project(x, self.x, radius, self.bounds)

    def attacked(self, x: Tensor, about: Mapping[str, Any]) -> Attacked:
        low, high = (one.item() if one.numel() == 1 else list(one.shape) for one in self.bounds)
        parameters = {**about, "targeted": self.targeted, "bounds": [low, high]}
        after = decisions(self.model, x, self.running)
        x = self.running.cast(x)
        return Attacked(x, self.classes, self.before, after, self.targeted, parameters)


def decisions(model: Model, x: Tensor, running: RunOptions, target: Target = PREDICTED) -> Tensor:
    """The predicted classes int64 [B]; raises where the model or the target has no classes."""
    example = torch.arange(1, device=x.device)
    first, _ = Scorer(model, x, target, running).at(lambda i, _: x[i], example, example)
    if first.decisions is None:
        raise InputError(
            "an attack needs classes to tell apart: got one number per example from the model or "
            "the target; use a model that returns [B, classes], and classes as target"
        )
    return first.decisions


def classes_of(target: Target, before: Tensor) -> Tensor:
    """The classes int64 [B] of a target; raises where it is none."""
    if isinstance(target, str) and target == PREDICTED:
        return before
    targets = read_targets(target, len(before)).to(before.device)
    structured = targets.position is not None
    if targets.classes is None or targets.classes.shape[1] != 1 or structured:
        raise InputError(
            "an attack needs one class per example: pass target=int, one int per example, or "
            "'predicted'"
        )
    return targets.classes[:, 0]


def _read_bounds(bounds: Bounds, x: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds as tensors that broadcast to x; raises where x does not lie in them."""
    if bounds is None:
        return x.min(), x.max()
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise InputTypeError(f"bounds must be two, the lowest and the highest: got {bounds!r}")
    low, high = (torch.as_tensor(one).to(x) for one in bounds)
    try:
        low.expand_as(x), high.expand_as(x)
    except RuntimeError as error:
        raise InputError(
            f"bounds must broadcast to the inputs {list(x.shape)}: got {list(low.shape)} and "
            f"{list(high.shape)}"
        ) from error
    if bool(((x < low) | (x > high)).any()):
        raise InputError(
            f"bounds do not hold the inputs: these go from {float(x.min()):.4g} to "
            f"{float(x.max()):.4g}; pass the bounds of what is valid, in the same units"
        )
    return low, high
