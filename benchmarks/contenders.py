"""The callables that the benchmarks compare: `make(name, workload, model)(x, setting)`.

Each explains a batch x [B, *] and returns values like x. All are used by
`python -m benchmarks.` `end_to_end`, `lean`, `plots` or `gpu`.
"""

from __future__ import annotations

import copy
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor, nn

import saliency_fast as sf
from benchmarks.cases import GRADIENT, Setting
from benchmarks.models import Workload
from saliency_fast.engine import config
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.plan import Plan
from saliency_fast.graph.passes.half import PRECISIONS

SEARCH_SECONDS = 5.0
"""Spent at most, before anything is timed, on looking for the best points per launch."""
OURS, CAPTUM, TUNED, LOOP = "saliency_fast", "captum", "captum tuned", "hand-written loop"
ONE_LAUNCH, LEAN_OFF = f"{OURS}, one launch", f"{OURS}, one launch, lean off"
NO_PREFIX = f"{OURS}, no prefix"


@dataclass(frozen=True)
class Preparation:
    """What a careful user does to a model beforehand; channels_last only for 2-D convolutions."""

    frozen: bool = False
    channels_last: bool = False
    autocast: torch.dtype | None = None
    compiled: bool = False

    def lays_out(self, model: nn.Module) -> bool:
        """Whether inputs are to be brought into the channels-last layout."""
        return self.channels_last and any(isinstance(m, nn.Conv2d) for m in model.modules())

    def apply(self, model: nn.Module) -> nn.Module:
        """A prepared copy, or the model itself where nothing is to be done."""
        if self == Preparation():
            return model
        model = copy.deepcopy(model)
        if self.frozen:
            model.requires_grad_(False)
        if self.lays_out(model):
            model = model.to(memory_format=torch.channels_last)
        if self.autocast is not None:
            model = _Autocast(model, self.autocast)
        if self.compiled:
            # Every batch size gets its own code: an expert knows his shapes and pays once.
            model = torch.compile(model, dynamic=False)
        return model


class _Autocast(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            out: Tensor = self.model(x)
        return out.float()


class Contender(Protocol):
    """How a library explains one model, kept over calls as a service would keep it."""

    def __call__(self, x: Tensor, setting: Setting) -> Tensor: ...

    def warm(self, x: Tensor, setting: Setting) -> None:
        """What is done once per shape and is not timed: planning, searching, a first gradient."""


class Ours:
    """One `Engine` per setting, without the hashes that records carry.

    one_launch: all points of an example at once. limits: further arguments of `Engine`.
    """

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        preparation: Preparation = Preparation(),
        precision: str = "float32",
        *,
        one_launch: bool = False,
        **limits: Any,
    ) -> None:
        self.target, self.one_launch = workload.target, one_launch
        # What later calls are, from the first on; traces begin with smaller launches.
        config = EngineConfig(
            direct_points=0, traced_from=2**62 if one_launch else 2**24
        )
        self.limits = {"precision": precision, "hashes": False, "config": config} | limits
        self.model = preparation.apply(model)
        self._engines: dict[Setting, sf.Engine] = {}

    def engine(self, setting: Setting) -> sf.Engine:
        if setting not in self._engines:
            points = setting.points if self.one_launch else None
            self._engines[setting] = sf.Engine(
                self.model, _method(setting), points_per_launch=points, **self.limits
            )
        return self._engines[setting]

    def plan(self, x: Tensor, setting: Setting) -> Plan:
        return self.engine(setting).plan(x, self.target)

    def warm(self, x: Tensor, setting: Setting) -> None:
        self.plan(x, setting)

    def __call__(self, x: Tensor, setting: Setting) -> Tensor:
        values: Tensor = self.engine(setting)(x, self.target).values
        return values


def _method(setting: Setting) -> Any:
    if setting.method == "gradient":
        return sf.Gradient()
    if setting.method == "integrated_gradients":
        # Captum's default rule, so that both compute the same numbers.
        return sf.IntegratedGradients(steps=setting.points, rule="gauss_legendre")
    return sf.SmoothGrad(samples=setting.points, sigma=setting.sigma, seed=setting.seed)


class Captum:
    """Captum as its documentation shows it: all points of a call in one batch."""

    def __init__(self, workload: Workload, model: nn.Module) -> None:
        self.forward, self.target = _scalar(workload, model)

    def warm(self, x: Tensor, setting: Setting) -> None:
        self(x, GRADIENT)

    def __call__(self, x: Tensor, setting: Setting) -> Tensor:
        return self.attribute(x, setting, None)

    def attribute(self, x: Tensor, setting: Setting, points: int | None) -> Tensor:
        """`points` of each example per launch, None for all."""
        if setting.method == "gradient":
            return Saliency(self.forward).attribute(x, target=self.target, abs=False)
        if setting.method == "integrated_gradients":
            rows = None if points is None else points * len(x)
            return IntegratedGradients(self.forward).attribute(
                x, target=self.target, n_steps=setting.points, internal_batch_size=rows
            )
        torch.manual_seed(setting.seed)
        return NoiseTunnel(Saliency(self.forward)).attribute(
            x,
            nt_type="smoothgrad",
            nt_samples=setting.points,
            nt_samples_batch_size=points,
            stdevs=setting.sigma,
            target=self.target,
            abs=False,
        )


def _scalar(workload: Workload, model: nn.Module) -> tuple[Callable[[Tensor], Tensor], int | None]:
    """What Captum takes: a model and a class, or a function that gives one score per example."""
    if isinstance(workload.target, int):
        return model, workload.target
    index = (slice(None), *workload.target)
    return lambda x: model(x)[index].flatten(1).sum(1), None


class CaptumTuned:
    """Captum as an expert runs it: prepared model, best points per launch found beforehand."""

    def __init__(self, workload: Workload, model: nn.Module, preparation: Preparation) -> None:
        self.lays_out = preparation.lays_out(model)
        # The search would compile for every size it tries.
        eager = preparation.apply(model) if not preparation.compiled else None
        self.searching = Captum(
            workload, eager or replace(preparation, compiled=False).apply(model)
        )
        self.captum = self.searching if eager else Captum(workload, preparation.apply(model))
        self.points: dict[tuple[Setting, int], int] = {}

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.lays_out else x

    def warm(self, x: Tensor, setting: Setting) -> None:
        x = self._laid_out(x)
        key = (setting, len(x))
        if key not in self.points:
            self.points[key] = search(
                lambda trial: self.searching.attribute(x, trial, None), setting
            )
        if self.captum is not self.searching:
            points = self.points[key]
            self.captum.attribute(x, replace(setting, points=points), points)

    def __call__(self, x: Tensor, setting: Setting) -> Tensor:
        points = self.points[setting, len(x)]
        return self.captum.attribute(self._laid_out(x), setting, points)


def search(run: Callable[[Setting], object], setting: Setting) -> int:
    """The points per launch, a divisor of all, that take the least time each."""
    best, least, begun = 1, float("inf"), time.perf_counter()
    run(replace(setting, points=1))
    for points in (n for n in range(1, setting.points + 1) if setting.points % n == 0):
        try:
            seconds = _timed(lambda: run(replace(setting, points=points))) / points  # noqa: B023
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            break
        if seconds < least:
            best, least = points, seconds
        elif seconds > 1.2 * least:
            break
        if time.perf_counter() - begun > SEARCH_SECONDS:
            break
    return best


def _timed(run: Callable[[], object]) -> float:
    """Seconds of one call; of the better of two where calls are short."""
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        if times[0] > 0.2:
            break
    return min(times)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocator's, on any device."""
    wanting = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return wanting or "can't allocate memory" in str(error)


class Loop:
    """The loop people write: one point for the whole batch at a time, scores summed.

    It computes the gradient of the points alone, as a careful author does; `backward()` on a model
    whose parameters require gradients would compute those too.
    """

    def __init__(self, workload: Workload, model: nn.Module) -> None:
        target = workload.target if isinstance(workload.target, tuple) else (workload.target,)
        self.model, self.index = model, (slice(None), *target)

    def gradient(self, point: Tensor) -> Tensor:
        point = point.detach().requires_grad_()
        return torch.autograd.grad(self.model(point)[self.index].sum(), point)[0]

    def warm(self, x: Tensor, setting: Setting) -> None:
        self.gradient(x)

    def __call__(self, x: Tensor, setting: Setting) -> Tensor:
        if setting.method == "gradient":
            return self.gradient(x)
        total = torch.zeros_like(x)
        if setting.method == "integrated_gradients":
            nodes, weights = np.polynomial.legendre.leggauss(setting.points)
            for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
                total += weight / 2 * self.gradient((node + 1) / 2 * x)
            return total * x
        torch.manual_seed(setting.seed)
        for _ in range(setting.points):
            total += self.gradient(x + setting.sigma * torch.randn_like(x))
        return total / setting.points


EXPERT = Preparation(frozen=True, channels_last=True)
Maker = Callable[[Workload, nn.Module], Contender]


def _in(precision: str) -> Maker:
    return lambda workload, model: Ours(workload, model, precision=precision)


def _tuned(**more: Any) -> Maker:
    return lambda workload, model: CaptumTuned(workload, model, replace(EXPERT, **more))


def _no_prefix(workload: Workload, model: nn.Module) -> Contender:
    return Ours(workload, model, config=replace(config.DEFAULT, prefix_from=sys.maxsize))


def budgeted(mebibytes: int) -> str:
    """The name of ours under a memory budget."""
    return f"{OURS}, {mebibytes} MiB"


MAKERS: dict[str, Maker] = {
    OURS: Ours,
    CAPTUM: Captum,
    TUNED: _tuned(),
    LOOP: Loop,
    f"{OURS}, channels-last": lambda workload, model: Ours(workload, model, EXPERT),
    f"{OURS}, no graphs": lambda workload, model: Ours(workload, model, graphs=False),
    **{f"{OURS}, {precision}": _in(precision) for precision in list(PRECISIONS)[1:]},
    f"{OURS}, compiled": lambda workload, model: Ours(workload, model, compile=True),
    f"{TUNED}, float16 autocast": _tuned(autocast=torch.float16),
    f"{TUNED}, bfloat16 autocast": _tuned(autocast=torch.bfloat16),
    f"{TUNED}, compiled": _tuned(compiled=True),
    f"{TUNED}, bfloat16 autocast, compiled": _tuned(autocast=torch.bfloat16, compiled=True),
}
APART: dict[str, Maker] = {
    ONE_LAUNCH: lambda workload, model: Ours(workload, model, one_launch=True),
    LEAN_OFF: lambda workload, model: Ours(workload, model, one_launch=True, lean=False),
    NO_PREFIX: _no_prefix,
}
"""Ours with one thing changed, for `python -m benchmarks.lean`; see also `budgeted`."""
HALF = f"{OURS}, bfloat16"
"""Ours with products in bfloat16, of the model as it is handed over."""
ON_CPU = (OURS, HALF, CAPTUM, TUNED, LOOP)
COMPILED = tuple(name for name in MAKERS if name.endswith("compiled"))
ON_GPU = tuple(name for name in MAKERS if name not in COMPILED)


CALLED = ("saliency_fast.captum", "captum.attr")
"""Code written for Captum with either library, for `python -m benchmarks.methods`."""


def make(name: str, workload: Workload, model: nn.Module) -> Contender:
    """A contender by name, with `model` on its device."""
    if budget := re.fullmatch(rf"{OURS}, (\d+ MiB)", name):
        return Ours(workload, model, memory_budget=budget[1])
    if name in CALLED:
        # It knows the settings of this module.
        from benchmarks.calls import Called

        return Called(name, workload, model)
    known = MAKERS | APART
    if name not in known:
        raise ValueError(f"contender must be one of {', '.join(known)}: got {name!r}")
    return known[name](workload, model)
