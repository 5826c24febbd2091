"""Plots of curves with bands, as PNG for light and for dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from typing import Any

from saliency_fast.errors import InputError

CURE = "install the extra with pip install 'saliency-fast[plots]'"
SIZE, DOTS = (7.2, 3.6), 144
_INK = {"light": ("#1b1d21", "#5d636d", "#dcdee2"), "dark": ("#e9eaec", "#a0a6b0", "#3a3f48")}
_PAPER = {"light": "#ffffff", "dark": "#1c1f24"}
# Distinguishable with colour-blindness too (after Okabe and Ito, 2008).
_COLORS = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#b0578d", "#8a6d00", "#3b4cc0"),
    "dark": ("#56b4e9", "#ff8a4c", "#2fc29a", "#e39ac4", "#e6c229", "#93a4ff"),
}
_GREYS = {"light": ("#4d525a", "#767c86", "#9aa0a9"), "dark": ("#c3c8d0", "#99a0ab", "#737a86")}
_DASHES = ((0, (5, 2)), (0, (1, 1.6)), (0, (5, 1.6, 1, 1.6)))
_LINES = ("-", (0, (7, 1.5)), (0, (3, 1)))


@dataclass(frozen=True)
class Band:
    """A mean curve with the bounds of its interval; controls are grey and dashed."""

    name: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    control: bool = False


@dataclass(frozen=True)
class Plot:
    """Curves over a common axis."""

    title: str
    x_name: str
    y_name: str
    bands: tuple[Band, ...]


def have_plots() -> bool:
    return find_spec("matplotlib") is not None


def plot_png(plot: Plot, theme: str = "light") -> bytes:
    """A plot as PNG; raises InputError without matplotlib."""
    if not have_plots():
        raise InputError(f"curves need matplotlib, which is not installed: {CURE}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, soft, faint = _INK[theme]
    figure = Figure(figsize=SIZE, dpi=DOTS, facecolor=_PAPER[theme], layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot(facecolor=_PAPER[theme])
    for is_control in (False, True):
        for number, band in enumerate(one for one in plot.bands if one.control == is_control):
            _draw(axes, band, number, theme)
    axes.set_xlabel(plot.x_name, color=soft, fontsize=9)
    axes.set_ylabel(plot.y_name, color=soft, fontsize=9)
    axes.tick_params(colors=soft, labelsize=8, length=3)
    axes.grid(color=faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(faint)
    axes.margins(x=0.01)
    legend = figure.legend(
        loc="outside right upper", frameon=False, fontsize=8.5, labelcolor=ink, handlelength=2.6
    )
    legend.set_in_layout(True)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", facecolor=_PAPER[theme], metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Any, band: Band, number: int, theme: str) -> None:
    """One curve: methods in colours, controls in greys with dashes."""
    colors = (_GREYS if band.control else _COLORS)[theme]
    lines = _DASHES if band.control else _LINES
    color = colors[number % len(colors)]
    line = lines[(number if band.control else number // len(colors)) % len(lines)]
    few = len(band.x) <= 12
    axes.fill_between(band.x, band.low, band.high, color=color, alpha=0.16, linewidth=0)
    axes.plot(
        *(band.x, band.mean),
        color=color,
        linestyle=line,
        linewidth=1.3 if band.control else 1.9,
        marker="o" if few else None,
        markersize=3.2,
        label=band.name.replace("_", " "),
    )
