"""Models that take inputs in other layouts than [B, C, *places], and the same ones that do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tests.models import make


def _layers(conv: type[nn.Module], pool: type[nn.Module], pooled: int) -> list[nn.Module]:
    """A small network of convolutions, for one or two spatial axes."""
    first, second = conv(3, 6, 3, padding=1), conv(6, 6, 3)
    return [first, nn.Tanh(), second, nn.SiLU(), pool(3), nn.Flatten(), nn.Linear(pooled, 5)]


class Series(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*_layers(nn.Conv1d, nn.AdaptiveAvgPool1d, 18))


class Picture(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*_layers(nn.Conv2d, nn.AdaptiveAvgPool2d, 54))


class Grey(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), *Picture())


class Clip(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(3, 6, 3, padding=1),
            nn.Tanh(),
            nn.Conv3d(6, 6, 3),
            nn.SiLU(),
            nn.AdaptiveAvgPool3d(2),
            nn.Flatten(),
            nn.Linear(48, 5),
        )


class Laid(nn.Module):
    """A model of the standard layout, which takes inputs in another."""

    def __init__(self, model: nn.Module, enter: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.enter = model, enter

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.enter(x))


SIZES = {"BCT": (3, 12), "BCHW": (3, 9, 12), "BCTHW": (3, 6, 9, 8), "B1HW": (1, 9, 12)}
KINDS = {"BCT": Series, "BCHW": Picture, "BCTHW": Clip, "B1HW": Grey}
# (layout, the standard form of it, from the standard form to it as a permutation)
LAYOUTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "BTF": ("BCT", (0, 2, 1)),
    "BHWC": ("BCHW", (0, 2, 3, 1)),
    "BHCW": ("BCHW", (0, 2, 1, 3)),
    "BTCHW": ("BCTHW", (0, 2, 1, 3, 4)),
    "BTHWC": ("BCTHW", (0, 2, 3, 4, 1)),
    "BHW": ("B1HW", ()),
}


def standard(name: str) -> nn.Module:
    return make(KINDS[LAYOUTS[name][0]])


def to(name: str, x: Tensor, lead: int = 1) -> Tensor:
    """A tensor of the standard form in a layout, with `lead` axes for the batch."""
    order = LAYOUTS[name][1]
    if not order:
        return x.squeeze(lead)
    return x.permute(*range(lead), *(axis - 1 + lead for axis in order[1:])).contiguous()


def from_(name: str, x: Tensor, lead: int = 1) -> Tensor:
    """The reverse."""
    order: Sequence[int] = LAYOUTS[name][1]
    if not order:
        return x.unsqueeze(lead)
    back = [order.index(axis) - 1 + lead for axis in range(1, len(order))]
    return x.permute(*range(lead), *back)


def laid(name: str) -> nn.Module:
    return Laid(standard(name), lambda x: from_(name, x)).eval()
