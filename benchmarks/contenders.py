"""The callables that the benchmarks compare: `make(name, workload, model)(x, setting)`.

Each explains a batch x [B, *] and returns values like x. All are used by
`python -m benchmarks.` `end_to_end`, `lean`, `plots` or `gpu`. Captum is imported where it is used:
the others are measured without it, too.
"""

from __future__ import annotations

import copy
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
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
HAND_TUNED = "hand-tuned, float16"
ONE_LAUNCH, LEAN_OFF = f"{OURS}, one launch", f"{OURS}, one launch, lean off"
NO_PREFIX = f"{OURS}, no prefix"


LATER = EngineConfig(direct_points=0)
"""Makes of a first call what later ones are."""
TOO_LARGE = "launches are so large"
"""How a plan begins to say that graphs would gain nothing."""


def plan_failure(plan: Plan) -> str:
    """Why a plan on a GPU is not what is to be measured: strategies or graphs are off; or ""."""
    if not plan.lean.startswith("recorded"):
        whys = [f"{name}: {why}" for name, why in plan.strategies] + list(plan.notes)
        return f"memory-efficient strategies are off ({plan.lean}): {'; '.join(whys)}"
    if plan.graphs.startswith("off") and TOO_LARGE not in plan.graphs:
        return f"graphs are {plan.graphs}"
    return ""


@contextmanager
def switches(*, tf32: bool | None = None, benchmark: bool = False) -> Iterator[None]:
    """TF32 for products and cuDNN (None: PyTorch's own defaults), and cuDNN's choice by time."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32 = (False, True) if tf32 is None else (tf32, tf32)
    cudnn.benchmark = benchmark
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


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
        # Traces begin with smaller launches.
        config = replace(LATER, traced_from=2**62) if one_launch else LATER
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
    """Captum as its documentation shows it: all points of a call in one batch.

    tf32: on GPUs; None is PyTorch's default, which allows it to convolutions.
    """

    def __init__(self, workload: Workload, model: nn.Module, tf32: bool | None = None) -> None:
        from captum import attr

        self.library, self.tf32 = attr, tf32
        self.forward, self.target = _scalar(workload, model)

    def warm(self, x: Tensor, setting: Setting) -> None:
        self(x, GRADIENT)

    def __call__(self, x: Tensor, setting: Setting) -> Tensor:
        with switches(tf32=self.tf32):
            return self.attribute(x, setting, None)

    def attribute(self, x: Tensor, setting: Setting, points: int | None) -> Tensor:
        """`points` of each example per launch, None for all."""
        library = self.library
        saliency = library.Saliency(self.forward)
        if setting.method == "gradient":
            found: Tensor = saliency.attribute(x, target=self.target, abs=False)
            return found
        if setting.method == "integrated_gradients":
            rows = None if points is None else points * len(x)
            found = library.IntegratedGradients(self.forward).attribute(
                x, target=self.target, n_steps=setting.points, internal_batch_size=rows
            )
            return found
        torch.manual_seed(setting.seed)
        found = library.NoiseTunnel(saliency).attribute(
            x,
            nt_type="smoothgrad",
            nt_samples=setting.points,
            nt_samples_batch_size=points,
            stdevs=setting.sigma,
            target=self.target,
            abs=False,
        )
        return found


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


class HandTuned:
    """The loop of an expert on a GPU, of Integrated Gradients alone: weights in a half type,
    channels last, cuDNN's choice by time, the fastest number of points per launch, and a CUDA graph
    of a launch; the sum is float32.
    """

    def __init__(
        self, workload: Workload, model: nn.Module, dtype: torch.dtype = torch.float16
    ) -> None:
        self.preparation = Preparation(frozen=True, channels_last=True)
        self.model, self.dtype = self.preparation.apply(model).to(dtype), dtype
        target = workload.target if isinstance(workload.target, tuple) else (workload.target,)
        self.index = (slice(None), *target)
        self.launches: dict[tuple[Setting, int], _Launch] = {}

    def warm(self, x: Tensor, setting: Setting) -> None:
        key = (setting, len(x))
        if key not in self.launches:
            points = search(lambda trial: self._launch(x, trial.points)(), setting)
            launch = self._launch(x, points)
            self.launches[key] = launch.captured() if x.is_cuda else launch

    def __call__(self, x: Tensor, setting: Setting) -> Tensor:
        if setting.method != "integrated_gradients":
            raise ValueError(f"{HAND_TUNED} takes Integrated Gradients alone: got {setting.label}")
        launch = self.launches[setting, len(x)]
        nodes, weights = np.polynomial.legendre.leggauss(setting.points)
        table = torch.tensor(np.stack([(nodes + 1) / 2, weights / 2]), device=x.device).float()
        launch.x.copy_(x)
        launch.total.zero_()
        for nodes_weights in table.split(launch.points, 1):
            launch.table.copy_(nodes_weights)
            launch()
        return launch.total * x

    def _launch(self, x: Tensor, points: int) -> _Launch:
        return _Launch(self, x, points)


class _Launch:
    """So many points of each example through the model, in memory of its own."""

    def __init__(self, owner: HandTuned, x: Tensor, points: int) -> None:
        self.owner, self.points = owner, points
        self.x, self.total = x.clone(), torch.zeros_like(x)
        self.table = torch.ones(2, points, device=x.device)
        self.run: Callable[[], object] = self._eager

    def __call__(self) -> None:
        with switches(benchmark=True):
            self.run()

    def _eager(self) -> None:
        node, weight = self.table
        shape = (-1, *(1,) * self.x.dim())
        rows = (node.view(shape) * self.x).flatten(0, 1).to(self.owner.dtype)
        if self.owner.preparation.lays_out(self.owner.model):
            rows = rows.contiguous(memory_format=torch.channels_last)
        rows.requires_grad_()
        scores = self.owner.model(rows)[self.owner.index].float().sum()
        (grads,) = torch.autograd.grad(scores, rows)
        grads = grads.float().reshape(self.points, *self.x.shape)
        self.total += (weight.view(shape) * grads).sum(0)

    def captured(self) -> _Launch:
        """The same as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with switches(benchmark=True):
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._eager()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                self._eager()
        self.run = graph.replay
        return self


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


def _captum(*, tf32: bool) -> Maker:
    return lambda workload, model: Captum(workload, model, tf32)


FLOAT32, TF32, FLOAT16 = (f"{OURS}, {name}" for name in ("float32", "tf32", "float16"))
AUTO = f"{OURS}, auto"
HALF = f"{OURS}, bfloat16"
"""Ours with products in bfloat16, of the model as it is handed over."""
CAPTUM_FLOAT32, CAPTUM_TF32 = f"{CAPTUM}, float32", f"{CAPTUM}, tf32"
MAKERS: dict[str, Maker] = {
    OURS: Ours,
    CAPTUM: Captum,
    TUNED: _tuned(),
    LOOP: Loop,
    **{f"{OURS}, {name}": _in(name) for name in (*PRECISIONS, "auto")},
    CAPTUM_FLOAT32: _captum(tf32=False),
    CAPTUM_TF32: _captum(tf32=True),
    HAND_TUNED: HandTuned,
    f"{HAND_TUNED} on a CPU": lambda workload, model: HandTuned(workload, model, torch.bfloat16),
    f"{OURS}, compiled": lambda workload, model: Ours(workload, model, compile=True),
    f"{TUNED}, compiled": _tuned(compiled=True),
    f"{TUNED}, bfloat16 autocast, compiled": _tuned(autocast=torch.bfloat16, compiled=True),
    ONE_LAUNCH: lambda workload, model: Ours(workload, model, one_launch=True),
    LEAN_OFF: lambda workload, model: Ours(workload, model, one_launch=True, lean=False),
    NO_PREFIX: _no_prefix,
}
"""The contenders by name; see also `budgeted` and `CALLED`."""
ON_CPU = (OURS, HALF, CAPTUM, TUNED, LOOP)
ON_GPU = (FLOAT16, TF32, FLOAT32, AUTO, CAPTUM, CAPTUM_TF32, CAPTUM_FLOAT32, HAND_TUNED)
COMPILED = tuple(name for name in MAKERS if name.endswith("compiled"))
EQUALS = {
    FLOAT16: HAND_TUNED,
    HALF: HAND_TUNED,
    TF32: CAPTUM_TF32,
    FLOAT32: CAPTUM_FLOAT32,
    f"{OURS}, compiled": f"{TUNED}, compiled",
}
"""Whom each of ours is held against at equal arithmetic, on a GPU."""


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
    if name not in MAKERS:
        raise ValueError(f"contender must be one of {', '.join(MAKERS)}: got {name!r}")
    return MAKERS[name](workload, model)
