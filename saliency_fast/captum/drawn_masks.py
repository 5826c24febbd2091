"""Masks on an image, under Captum's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[Any]


def draw_mask_border(
    ax: Axes, mask: Array, border_width: int = 1, border_color: str | Array = "black"
) -> None:
    """Draws the inner border of a mask [H, W] of bools; a colour is a name or RGBA [4]."""
    if not mask.any():
        return
    from matplotlib.colors import to_rgba

    inner = mask.astype(bool)
    for _ in range(border_width):
        around = np.pad(inner, 1)
        inner = inner & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    colour = np.array(to_rgba(border_color)) if isinstance(border_color, str) else border_color
    ax.imshow((mask.astype(bool) & ~inner)[:, :, None] * np.asarray(colour).reshape(1, 1, -1))


def draw_mask_legend(
    ax: Axes,
    mask: Array,
    label: str,
    fontsize: int = 10,
    text_color: str = "white",
    bbox_facecolor: str = "black",
    bbox_alpha: float = 0.6,
) -> None:
    """Writes a label in the middle of a mask [H, W] of bools."""
    if not mask.any():
        return
    row, column = (one.mean() for one in np.where(mask))
    box = {"boxstyle": "round,pad=0.2", "facecolor": bbox_facecolor, "alpha": bbox_alpha}
    style: Any = {"color": text_color, "fontsize": fontsize, "bbox": box}
    ax.text(column, row, label, ha="center", va="center", **style)
