"""What the end-to-end benchmarks run: models at sizes that fit the time and the memory there is.

`python -m benchmarks.end_to_end`, `benchmarks.gpu` and `benchmarks.lean` read these lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from benchmarks import models
from benchmarks.models import WORKLOADS, Workload

SIGMA = 0.15
"""Of SmoothGrad, absolute; the workloads' inputs have a deviation of one or a range of one."""


@dataclass(frozen=True)
class Setting:
    """What is computed: "gradient", "integrated_gradients" or "smoothgrad" with so many points."""

    method: str
    points: int = 1
    sigma: float = SIGMA
    seed: int = 0

    @property
    def label(self) -> str:
        short = {"gradient": "gradient", "integrated_gradients": "IG", "smoothgrad": "SmoothGrad"}
        return short[self.method] + (f"-{self.points}" if self.method != "gradient" else "")


GRADIENT = Setting("gradient")
SETTINGS = (GRADIENT, Setting("integrated_gradients", 50), Setting("smoothgrad", 32))
QUICK_SETTINGS = (GRADIENT, Setting("integrated_gradients", 6), Setting("smoothgrad", 4))


@dataclass(frozen=True)
class Case:
    """A model, the side of its inputs and the batches; None keeps the workload's own side.

    samples: of the SmoothGrad reference. most_examples: of a batch that are held against it.
    """

    workload: str
    batches: tuple[int, ...]
    side: int | None = None
    samples: int = 128
    most_examples: int = 1

    def found(self) -> Workload:
        return sized(self.workload, self.side)

    def examples(self, batch: int) -> int:
        return min(batch, self.most_examples)

    @property
    def label(self) -> str:
        """The name and the size of an input: "resnet50 3x224x224"."""
        return f"{self.workload} {'x'.join(map(str, self.found().shape))}"


def sized(name: str, side: int | None = None) -> Workload:
    """A workload by name with inputs of `side` on every spatial axis."""
    known = WORKLOADS | VOLUMES | SMALL | QUICK
    workload = known.get(name)
    if workload is None:
        raise ValueError(f"workload must be one of {', '.join(known)}: got {name!r}")
    if side is None:
        return workload
    shape = (workload.shape[0], *(side for _ in workload.shape[1:]))
    build: Callable[[], nn.Module] = workload.build
    if name == "vit_b16":
        # Positions are learned for one size.
        build = partial(models.vit_b16, image=side)
    return replace(workload, shape=shape, build=build)


VOLUMES = {
    "unet3d-instance": Workload(
        "unet3d-instance", partial(models.unet3d, norm="instance"), (1, 64, 64, 64), (1,)
    ),
    "volume": Workload("volume", models.volume_net, (1, 48, 48, 48), 1),
}
SMALL = {
    "small-cnn": Workload("small-cnn", models.small_cnn, (3, 64, 64), 3),
    "small-mlp": Workload("small-mlp", models.small_mlp, (30,), 3),
}
QUICK = {
    "tiny-unet3d": Workload("tiny-unet3d", partial(models.unet3d, width=4), (1, 8, 8, 8), (1,)),
    "tiny-vit": Workload("tiny-vit", partial(models.vit_b16, 10, 32, depth=1), (3, 32, 32), 3),
}
CPU_CASES = (
    Case("resnet50", (1,), samples=128),
    Case("vit_b16", (1,), side=112, samples=128),
    Case("unet3d", (1,), side=32, samples=128),
    Case("digits", (1, 16), samples=512, most_examples=2),
    Case("mlp", (1, 64), samples=4096, most_examples=4),
)
GPU_CASES = (
    Case("resnet50", (8, 1, 64)),
    Case("vit_b16", (8, 1, 64)),
    Case("unet3d", (8, 1, 64)),
)
QUICK_CASES = (
    Case("mlp", (1, 3), samples=16, most_examples=2),
    Case("tiny-unet3d", (1,), samples=16),
    Case("tiny-vit", (1,), samples=16),
)
