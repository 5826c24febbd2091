"""Pictures of attributions with matplotlib, under Captum's names and arguments."""

from __future__ import annotations

import warnings
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from saliency_fast.captum.drawn_masks import draw_mask_border, draw_mask_legend
from saliency_fast.captum.drawn_text import (
    VisualizationDataRecord,
    format_classname,
    format_special_tokens,
    format_tooltip,
    format_word_importances,
    visualize_text,
)
from saliency_fast.errors import ChoiceError, ContractError, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

CHANNELS = (1, 3, 4)
"""How many channels a picture may have, by which the axis of a tensor's channels is known."""
Array = npt.NDArray[Any]
Choice = TypeVar("Choice", bound=Enum)


class ImageVisualizationMethod(Enum):
    """How `visualize_image_attr` draws."""

    heat_map = 1
    blended_heat_map = 2
    original_image = 3
    masked_image = 4
    alpha_scaling = 5


class TimeseriesVisualizationMethod(Enum):
    """How `visualize_timeseries_attr` draws."""

    overlay_individual = 1
    overlay_combined = 2
    colored_graph = 3


class VisualizeSign(Enum):
    """Which attributions are drawn."""

    positive = 1
    absolute_value = 2
    negative = 3
    all = 4


_RANGES: dict[VisualizeSign, tuple[str | None, int, int]] = {
    VisualizeSign.positive: ("Greens", 0, 1),
    VisualizeSign.absolute_value: ("Blues", 0, 1),
    VisualizeSign.negative: ("Reds", 0, 1),
    VisualizeSign.all: (None, -1, 1),
}
"""Each sign's colours (None: red over white to green) and limits."""


def visualize_image_attr(
    attr: Array,
    original_image: Array | None = None,
    method: str = "heat_map",
    sign: str = "absolute_value",
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    outlier_perc: int | float = 2,
    cmap: str | Colormap | None = None,
    alpha_overlay: float = 0.5,
    show_colorbar: bool = False,
    title: str | None = None,
    fig_size: tuple[int, int] = (6, 6),
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draws attributions [H, W] or [H, W, C] of an image [H, W, C]; returns figure and axes.

    Both may be tensors, these also in PyTorch's layout, [C, H, W] or [1, C, H, W]. method: a name
    of `ImageVisualizationMethod`; sign: of `VisualizeSign`. Channels are added up, and the largest
    attributions, together `outlier_perc` percent of the whole, are cut off.
    plt_fig_axis: drawn here instead of on a new figure. use_pyplot: whether pyplot makes and shows
    the figure.
    """
    attr = _picture(attr, "attr")
    if original_image is not None:
        original_image = _picture(original_image, "original_image")
    figure, axes = _figure(plt_fig_axis, use_pyplot, fig_size)
    if isinstance(axes, (list, tuple)):
        axes = axes[0]
    kind = _chosen(ImageVisualizationMethod, method, "Method")
    if original_image is not None:
        if np.max(original_image) <= 1.0:
            original_image = _bytes(original_image * 255)
    elif kind is not ImageVisualizationMethod.heat_map:
        raise InputError(
            "Original Image must be provided for any visualization other than heatmap: got None "
            f"for method={method!r}; pass original_image [H, W, C]"
        )
    _bare(axes)
    signed = _chosen(VisualizeSign, sign, "Sign")
    scaled = normalized(attr.sum(axis=2) if attr.ndim == 3 else attr, signed, outlier_perc)
    drawn = _draw(axes, kind, original_image, scaled, signed, cmap, alpha_overlay)
    if show_colorbar:
        own = _strip_below(axes, 0.1)
        if drawn is None:
            # Kept, so that several pictures side by side stay in line.
            own.axis("off")
        else:
            figure.colorbar(drawn, orientation="horizontal", cax=own)
    if title:
        axes.set_title(title)
    _show(use_pyplot)
    return figure, axes


def visualize_image_attr_multiple(
    attr: Array,
    original_image: Array | None,
    methods: list[str],
    signs: list[str],
    titles: list[str] | None = None,
    fig_size: tuple[int, int] = (8, 6),
    use_pyplot: bool = True,
    **kwargs: Any,
) -> tuple[Figure, Axes | list[Axes]]:
    """Draws attributions in several ways side by side; `kwargs` go to `visualize_image_attr`.

    Returns the figure and its axes: one, or a list of several.
    """
    if len(methods) != len(signs):
        raise ContractError(
            f"Methods and signs array lengths must match: got {len(methods)} and {len(signs)}; "
            "pass one sign for each method"
        )
    if titles is not None and len(titles) != len(methods):
        raise ContractError(
            "If titles list is given, length must match that of methods list: got "
            f"{len(titles)} titles for {len(methods)} methods; pass one for each, or None"
        )
    figure, axes = _figure(None, use_pyplot, fig_size, ncols=len(methods))
    every = [axes] if len(methods) == 1 else list(axes)
    for number, (method, sign) in enumerate(zip(methods, signs, strict=True)):
        visualize_image_attr(
            attr,
            original_image=original_image,
            method=method,
            sign=sign,
            plt_fig_axis=(figure, every[number]),
            use_pyplot=False,
            title=titles[number] if titles else None,
            **kwargs,
        )
    figure.tight_layout()
    _show(use_pyplot)
    return figure, axes if len(methods) == 1 else every


def visualize_timeseries_attr(
    attr: Array,
    data: Array,
    x_values: Array | None = None,
    method: str = "overlay_individual",
    sign: str = "absolute_value",
    channel_labels: list[str] | None = None,
    channels_last: bool = True,
    plt_fig_axis: tuple[Figure, Axes | list[Axes]] | None = None,
    outlier_perc: int | float = 2,
    cmap: str | Colormap | None = None,
    alpha_overlay: float = 0.7,
    show_colorbar: bool = False,
    title: str | None = None,
    fig_size: tuple[int, int] = (6, 6),
    use_pyplot: bool = True,
    **pyplot_kwargs: Any,
) -> tuple[Figure, Axes | list[Axes]]:
    """Draws attributions of a time series over it, both [N, C] ([C, N] without `channels_last`).

    method: a name of `TimeseriesVisualizationMethod`. x_values: [N], or 0 to N - 1.
    pyplot_kwargs: of the lines. Other arguments: see `visualize_image_attr`.
    """
    from saliency_fast.captum.drawn_series import Series

    attr, data = _array(attr), _array(data)
    for name, one in (("attr", attr), ("data", data)):
        if one.ndim != 2:
            raise ContractError(
                f"Expected {name} of shape (N, C), got {tuple(one.shape)}; reshape it to two axes"
            )
    if channels_last:
        attr, data = attr.T, data.T
    channels, length = attr.shape
    if channels > length:
        warnings.warn(
            f"Number of channels ({channels}) greater than time series length ({length}), please "
            "verify input format",
            stacklevel=2,
        )
    kind = _chosen(TimeseriesVisualizationMethod, method, "Method")
    combined = kind is TimeseriesVisualizationMethod.overlay_combined
    if x_values is None:
        x_values = np.arange(length)
    elif len(x_values) != length:
        raise ContractError(
            f"x_values must have same length as data: got {len(x_values)}, expected {length}; pass "
            "one for each step"
        )
    rows = 1 if combined else channels
    figure, axes = _figure(plt_fig_axis, use_pyplot, fig_size, nrows=rows, sharex=True)
    every = list(axes) if isinstance(axes, (np.ndarray, list, tuple)) else [axes]
    signed = _chosen(VisualizeSign, sign, "Sign")
    scaled = normalized(attr.sum(axis=0) if combined else attr, signed, outlier_perc)
    colours, limits = _colours(signed, cmap)
    series = Series(x_values, data, scaled, channel_labels, colours, limits)
    series.draw(figure, every, kind.name, alpha_overlay, pyplot_kwargs)
    if show_colorbar:
        alpha = 1.0 if kind is TimeseriesVisualizationMethod.colored_graph else alpha_overlay
        series.colorbar(figure, _strip_below(every[-1], 0.4), alpha)
    if title:
        every[0].set_title(title)
    _show(use_pyplot)
    return figure, axes


def _array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _picture(value: Any, name: str) -> Array:
    """An array [H, W] or [H, W, C] as it is; a tensor of these axes, [C, H, W] or [1, C, H, W] as
    such an array. Raises InputError where the axes are others, or sizes do not tell which.
    """
    found = _array(value)
    shape, is_tensor = list(found.shape), isinstance(value, Tensor)
    if is_tensor and found.ndim == 4 and len(found) == 1:
        found = found[0]
    if found.ndim == 2:
        return found
    if found.ndim == 3:
        first, last = (found.shape[axis] in CHANNELS for axis in (0, 2))
        if is_tensor and first and not last:
            return found.transpose(1, 2, 0)
        if len(shape) == 3 and (last or not first) and (not is_tensor or (last and not first)):
            return found
    raise InputError(
        f"{name} must be one picture, [H, W] or [H, W, C], or as a tensor also [C, H, W] or "
        f"[1, C, H, W], of {CHANNELS} channels: got {shape}; of a picture x [1, C, H, W] pass "
        "x[0].permute(1, 2, 0).detach().cpu().numpy()"
    )


def normalized(attr: Array, sign: VisualizeSign, outlier_perc: int | float) -> Array:
    """Attributions of one sign, divided by the smallest of the outliers, on [-1, 1]."""
    if sign is VisualizeSign.positive:
        attr = np.maximum(attr, 0)
    elif sign is VisualizeSign.negative:
        attr = np.minimum(attr, 0)
    elif sign is VisualizeSign.absolute_value:
        attr = np.abs(attr)
    scale = _share(np.abs(attr), 100.0 - outlier_perc)
    if scale == 0:
        raise ContractError(
            f"Cannot normalize by scale factor = 0: got no attributions of the sign {sign.name!r}; "
            "look at another sign, or at another attribution"
        )
    if scale < 1e-5:
        warnings.warn(
            "Attempting to normalize by value approximately 0, visualized results may be "
            "misleading: all attributions are close to 0",
            stacklevel=3,
        )
    # Negative attributions are drawn as positive amounts.
    return np.clip(attr / (-scale if sign is VisualizeSign.negative else scale), -1, 1)


def _share(amounts: Array, percent: float) -> float:
    """The amount at which amounts in rising order reach so many percent of their sum."""
    if not 0 <= percent <= 100:
        raise ContractError(
            "Percentile for thresholding must be between 0 and 100 inclusive: got outlier_perc="
            f"{100 - percent}; pass a percentage such as 2"
        )
    rising = np.sort(amounts, axis=None)
    sums = np.cumsum(rising)
    return float(rising[np.argmax(sums >= sums[-1] * 0.01 * percent)])


def _draw(
    axes: Axes,
    kind: ImageVisualizationMethod,
    image: Any,
    scaled: Array,
    sign: VisualizeSign,
    cmap: str | Colormap | None,
    alpha: float,
) -> AxesImage | None:
    """One picture; a heat map's image, for its colour bar."""
    if kind is ImageVisualizationMethod.original_image:
        axes.imshow(image[:, :, 0] if image.ndim > 2 and image.shape[2] == 1 else image)
        return None
    if kind in (ImageVisualizationMethod.masked_image, ImageVisualizationMethod.alpha_scaling):
        if sign is VisualizeSign.all:
            shown = kind.name.replace("_", " ")
            raise ContractError(
                f"Cannot display {shown} with both positive and negative attributions, choose a "
                f"different sign option: got 'all', expected one of {_names(VisualizeSign)}"
            )
        weight = scaled[:, :, None]
        if kind is ImageVisualizationMethod.masked_image:
            axes.imshow(_bytes(image * weight))
        else:
            axes.imshow(np.concatenate([image, _bytes(weight * 255)], axis=2))
        return None
    opacity = None
    if kind is ImageVisualizationMethod.blended_heat_map:
        axes.imshow(image.mean(axis=2), cmap="gray")
        opacity = alpha
    colours, (low, high) = _colours(sign, cmap)
    return axes.imshow(scaled, cmap=colours, vmin=low, vmax=high, alpha=opacity)


def _colours(
    sign: VisualizeSign, cmap: str | Colormap | None
) -> tuple[str | Colormap, tuple[int, int]]:
    """A sign's colours, where none are given, and limits."""
    from matplotlib.colors import LinearSegmentedColormap

    own, low, high = _RANGES[sign]
    if cmap is None and own is None:
        own_map = LinearSegmentedColormap.from_list("RdWhGn", ["red", "white", "green"])
        return own_map, (low, high)
    return cmap if cmap is not None else str(own), (low, high)


def _chosen(kind: type[Choice], name: str, argument: str) -> Choice:
    if name not in kind.__members__:
        raise ChoiceError(
            f"Visualize {argument} type is not valid: got {name!r}, expected one of {_names(kind)}"
        )
    return kind[name]


def _names(kind: type[Enum]) -> str:
    return ", ".join(kind.__members__)


def _bytes(image: Array) -> Array:
    clipped: Array = np.clip(image.astype(int), 0, 255)
    return clipped


def _figure(
    given: Any, use_pyplot: bool, size: tuple[int, int], **panels: Any
) -> tuple[Figure, Any]:
    """The given figure and axes, or new ones."""
    if given is not None:
        figure, axes = given
        return figure, axes
    if use_pyplot:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=size)
    else:
        from matplotlib.figure import Figure

        figure = Figure(figsize=size)
    return figure, figure.subplots(**panels)


def _bare(axes: Axes) -> None:
    """No ticks, no labels, no grid."""
    axes.xaxis.set_ticks_position("none")
    axes.yaxis.set_ticks_position("none")
    axes.set_xticklabels([])
    axes.set_yticklabels([])
    axes.grid(visible=False)


def _strip_below(axes: Axes, pad: float) -> Axes:
    """Room for a colour bar."""
    from mpl_toolkits.axes_grid1 import make_axes_locatable

    strip: Axes = make_axes_locatable(axes).append_axes("bottom", size="5%", pad=pad)
    return strip


def _show(use_pyplot: bool) -> None:
    if use_pyplot:
        from matplotlib import pyplot

        pyplot.show()


__all__ = [
    "ImageVisualizationMethod",
    "TimeseriesVisualizationMethod",
    "VisualizationDataRecord",
    "VisualizeSign",
    "draw_mask_border",
    "draw_mask_legend",
    "format_classname",
    "format_special_tokens",
    "format_tooltip",
    "format_word_importances",
    "visualize_image_attr",
    "visualize_image_attr_multiple",
    "visualize_text",
    "visualize_timeseries_attr",
]
