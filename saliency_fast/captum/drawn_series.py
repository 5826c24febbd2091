"""Time series with their attributions, drawn on matplotlib's axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Series:
    """Data [C, N] over x [N] and its attributions on [-1, 1]: [C, N], or [N] of all channels.

    colours: a colour map or its name; limits: what its ends stand for.
    """

    x: Array
    data: Array
    attributions: Array
    labels: list[str] | None
    colours: str | Colormap
    limits: tuple[int, int]

    def draw(
        self, figure: Figure, axes: list[Axes], method: str, alpha: float, line: dict[str, Any]
    ) -> None:
        """method: overlay_individual, overlay_combined or colored_graph; line: its style."""
        if method == "overlay_combined":
            self._together(axes[0], alpha, line)
        else:
            for channel, one in enumerate(axes[: len(self.data)]):
                if method == "overlay_individual":
                    one.plot(self.x, self.data[channel], **line)
                    self._bands(one, self.attributions[channel], alpha)
                else:
                    self._coloured(one, channel, line)
                if self.labels is not None:
                    one.set_ylabel(self.labels[channel])
            figure.subplots_adjust(hspace=0)
        for one in axes:
            one.set_xlim(self.x[0], self.x[-1])

    def colorbar(self, figure: Figure, strip: Axes, alpha: float) -> None:
        """What the colours stand for."""
        figure.colorbar(self._scale(), orientation="horizontal", cax=strip, alpha=alpha)

    def _together(self, axes: Axes, alpha: float, line: dict[str, Any]) -> None:
        from matplotlib import colormaps

        dark: Any = colormaps["Dark2"]
        axes.set_prop_cycle(color=dark.colors)
        for channel, values in enumerate(self.data):
            label = self.labels[channel] if self.labels else None
            axes.plot(self.x, values, label=label, **line)
        self._bands(axes, self.attributions, alpha)
        axes.legend(loc="best")

    def _bands(self, axes: Axes, attributions: Array, alpha: float) -> None:
        """One coloured band for each step."""
        half, colours = (self.x[1] - self.x[0]) / 2.0, self._scale().to_rgba(attributions)
        for middle, colour in zip(self.x, colours, strict=True):
            axes.axvspan(middle - half, middle + half, facecolor=colour, alpha=alpha)

    def _coloured(self, axes: Axes, channel: int, line: dict[str, Any]) -> None:
        """The line itself, each of its pieces in the colour of the step it starts from."""
        from matplotlib.collections import LineCollection

        values, scale = self.data[channel], self._scale()
        points = np.stack([self.x, values], axis=1)
        pieces = np.stack([points[:-1], points[1:]], axis=1)
        lines = LineCollection(list(pieces), cmap=scale.cmap, norm=scale.norm, **line)
        lines.set_array(self.attributions[channel])
        axes.add_collection(lines)
        axes.set_ylim(1.2 * values.min(), 1.2 * values.max())

    def _scale(self) -> Any:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        return ScalarMappable(Normalize(*self.limits), self.colours)
