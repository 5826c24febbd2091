"""Pictures of attributions, under Captum's names and arguments, with what Captum draws.

Captum 0.9 draws no time series with matplotlib 3.9 or later, and writes words unescaped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from saliency_fast.errors import ChoiceError, ContractError, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

CHANNELS = (1, 3, 4)
"""Numbers of channels a picture may have, by which a tensor's channel axis is found."""
NEARLY_ZERO = 1e-5
"""Attributions whose pictures are misleading."""
Array = npt.NDArray[Any]

ImageVisualizationMethod = Enum(
    "ImageVisualizationMethod",
    "heat_map blended_heat_map original_image masked_image alpha_scaling",
)
TimeseriesVisualizationMethod = Enum(
    "TimeseriesVisualizationMethod", "overlay_individual overlay_combined colored_graph"
)
VisualizeSign = Enum("VisualizeSign", "positive absolute_value negative all")

_COLOURS: dict[str, tuple[Any, int]] = {
    "positive": ("Greens", 0),
    "absolute_value": ("Blues", 0),
    "negative": ("Reds", 0),
    "all": (["red", "white", "green"], -1),
}
"""The colour map of each sign, or its colours, and the lower limit; the upper limit is 1."""


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
    """Draws attributions of an image.

    Args:
        attr: [H, W] or [H, W, C], or a tensor, also [C, H, W] or [1, C, H, W]. Channels are summed.
        original_image: the image, in one of these shapes, on [0, 1] or [0, 255].
        method: a name of `ImageVisualizationMethod`.
        sign: a name of `VisualizeSign`.
        plt_fig_axis: a figure and its axes to draw on instead of new ones.
        outlier_perc: the largest attributions, together this percentage of the sum, are cut off.
        cmap: a colour map; None chooses one by the sign.
        alpha_overlay: the opacity of a heat map over the image.
        show_colorbar: whether a colour bar is drawn below.
        title: of the axes.
        fig_size: of a new figure, in inches.
        use_pyplot: whether pyplot makes and shows the figure.

    Returns:
        The figure and its axes.

    Raises:
        ContractError: wrong arguments.

    Example:
        >>> figure, axes = visualize_image_attr(torch.rand(1, 3, 8, 8), use_pyplot=False)
        >>> axes.images[0].get_array().shape
        (8, 8)
    """
    attr = _picture(attr, "attr")
    _check_names(ImageVisualizationMethod, method, sign)
    if original_image is None and method != "heat_map":
        raise ContractError(
            "Original Image must be provided for any visualization other than heatmap: got None "
            f"for {method}; pass original_image"
        )
    if sign == "all" and method in ("masked_image", "alpha_scaling"):
        raise ContractError(
            f"Cannot display {method.replace('_', ' ')} with both positive and negative "
            "attributions, choose a different sign option: got sign='all'"
        )
    scaled = _normalized(attr.sum(axis=2) if attr.ndim == 3 else attr, sign, outlier_perc)
    figure, axes = plt_fig_axis or _new_figure(use_pyplot, fig_size)
    axes.set(xticks=[], yticks=[])
    colours, opacity = _mappable(sign, cmap), None
    if original_image is not None:
        image = np.atleast_3d(_picture(original_image, "original_image"))
        image = _as_bytes(image * 255) if image.max() <= 1 else image
        if method == "blended_heat_map":
            axes.imshow(image.mean(axis=2), cmap="gray")
            opacity = alpha_overlay
        elif method == "original_image":
            axes.imshow(image)
        elif method == "masked_image":
            axes.imshow(_as_bytes(image * scaled[..., None]))
        elif method == "alpha_scaling":
            rgb = np.broadcast_to(image[..., :3], (*scaled.shape, 3))
            axes.imshow(np.concatenate([rgb, _as_bytes(scaled[..., None] * 255)], axis=2))
    has_heat_map = method.endswith("heat_map")
    if has_heat_map:
        colours = axes.imshow(scaled, cmap=colours.cmap, norm=colours.norm, alpha=opacity)
    if show_colorbar:
        strip = _strip_below(axes, 0.1)
        if has_heat_map:
            figure.colorbar(colours, orientation="horizontal", cax=strip)
        else:
            strip.axis("off")
    if title:
        axes.set_title(title)
    _show(use_pyplot)
    return figure, axes


def _as_bytes(image: Array) -> Array:
    """Whole numbers from 0 to 255."""
    result: Array = np.clip(image.astype(int), 0, 255)
    return result


def _strip_below(axes: Axes, pad: float) -> Axes:
    """Axes for a colour bar."""
    from mpl_toolkits.axes_grid1 import make_axes_locatable

    strip: Axes = make_axes_locatable(axes).append_axes("bottom", size="5%", pad=pad)
    return strip


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
    """Draws attributions of an image by several methods side by side.

    Args:
        methods: one for each picture.
        signs: one for each.
        titles: one for each, or None.
        **kwargs: of `visualize_image_attr`, as are the other arguments.

    Returns:
        The figure and its axes, or a list of several.

    Example:
        >>> names, signs = ["heat_map", "heat_map"], ["positive", "negative"]
        >>> attr = torch.randn(8, 8)
        >>> len(visualize_image_attr_multiple(attr, None, names, signs, use_pyplot=False)[1])
        2
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
    figure, axes = _new_figure(use_pyplot, fig_size, ncols=len(methods))
    every = [axes] if len(methods) == 1 else list(axes)
    captions = titles or [""] * len(methods)
    for method, sign, one, title in zip(methods, signs, every, captions, strict=True):
        of = {"plt_fig_axis": (figure, one), "use_pyplot": False, "title": title, **kwargs}
        visualize_image_attr(attr, original_image, method, sign, **of)
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
    """Draws attributions of a time series over it; see `visualize_image_attr` for other arguments.

    Args:
        attr: [N, C], or [C, N] without `channels_last`; a tensor, too.
        data: the series, of the same shape.
        x_values: [N]; None counts from 0.
        method: a name of `TimeseriesVisualizationMethod`.
        channel_labels: [C].
        channels_last: whether channels are the last axis.
        **pyplot_kwargs: of the lines.

    Returns:
        The figure and its axes, one for each channel or, with "overlay_combined", for all.

    Example:
        >>> attr, data = torch.rand(9, 2), torch.rand(9, 2)
        >>> len(visualize_timeseries_attr(attr, data, use_pyplot=False)[1])
        2
    """
    attr, data = (_series(one, name) for one, name in ((attr, "attr"), (data, "data")))
    if channels_last:
        attr, data = attr.T, data.T
    channels, length = attr.shape
    if channels > length:
        warnings.warn(
            f"Number of channels ({channels}) greater than time series length ({length}), please "
            "verify input format",
            stacklevel=2,
        )
    _check_names(TimeseriesVisualizationMethod, method, sign)
    x = np.arange(length) if x_values is None else x_values
    if len(x) != length:
        raise ContractError(
            f"x_values must have same length as data: got {len(x)}, expected {length}; pass one "
            "for each step"
        )
    combined = method == "overlay_combined"
    rows = 1 if combined else channels
    figure, axes = plt_fig_axis or _new_figure(use_pyplot, fig_size, nrows=rows, sharex=True)
    every: Any = list(axes) if isinstance(axes, (np.ndarray, list, tuple)) else [axes]
    scaled = _normalized(attr.sum(axis=0) if combined else attr, sign, outlier_perc)
    opacity = 1.0 if method == "colored_graph" else alpha_overlay
    colours = _mappable(sign, cmap)
    labels: Sequence[str | None] = channel_labels or [None] * len(data)
    rows_of = data, labels, np.broadcast_to(scaled, data.shape)
    _draw_series(every, method, x, rows_of, colours, opacity, pyplot_kwargs)
    if not combined:
        figure.subplots_adjust(hspace=0)
    if show_colorbar:
        strip = _strip_below(every[-1], 0.4)
        figure.colorbar(colours, orientation="horizontal", cax=strip, alpha=opacity)
    if title:
        every[0].set_title(title)
    _show(use_pyplot)
    return figure, axes


def _draw_series(
    axes: list[Any], method: str, x: Array, rows: Any, colours: Any, opacity: float, line: Any
) -> None:
    """Draws rows of (data, label, attributions) over x, all on the only axes or each on its own."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    combined = method == "overlay_combined"
    if combined:
        dark: Any = colormaps["Dark2"]
        axes[0].set_prop_cycle(color=dark.colors)
    for number, (values, label, scaled) in enumerate(zip(*rows, strict=True)):
        own = axes[0 if combined else number]
        if method == "colored_graph":
            # Each segment of the line in the colour of the step it starts from.
            points = np.stack([x, values], axis=1)
            segments = list(np.stack([points[:-1], points[1:]], axis=1))
            lines = LineCollection(segments, cmap=colours.cmap, norm=colours.norm, **line)
            lines.set_array(scaled)
            own.add_collection(lines)
            own.set_ylim(1.2 * values.min(), 1.2 * values.max())
        else:
            own.plot(x, values, **({"label": label} if combined else {}), **line)
        if method == "overlay_individual" or (combined and number == 0):
            half = (x[1] - x[0]) / 2.0
            for middle, colour in zip(x, colours.to_rgba(scaled), strict=True):
                own.axvspan(middle - half, middle + half, facecolor=colour, alpha=opacity)
        if label is not None and not combined:
            own.set_ylabel(label)
    if combined:
        axes[0].legend(loc="best")
    for one in axes:
        one.set_xlim(x[0], x[-1])


def draw_mask_border(
    ax: Axes,
    mask: npt.NDArray[np.bool_],
    border_width: int = 1,
    border_color: str | Array = "black",
) -> None:
    """Draws the border of a mask over an image, inside the mask.

    Args:
        ax: the axes.
        mask: bool [H, W].
        border_width: in pixels.
        border_color: a name, or RGBA on [0, 1].

    Example:
        >>> axes = _new_figure(False, (4, 4))[1]
        >>> draw_mask_border(axes, np.ones((3, 3), dtype=bool))
        >>> int(axes.images[0].get_array()[..., 3].sum())
        8
    """
    if not mask.any():
        return
    from matplotlib.colors import to_rgba
    from scipy.ndimage import binary_erosion

    border = mask & ~binary_erosion(mask, iterations=border_width)
    ax.imshow(border[..., None] * np.array(to_rgba(border_color)))


def draw_mask_legend(
    ax: Axes,
    mask: npt.NDArray[np.bool_],
    label: str,
    fontsize: int = 10,
    text_color: str = "white",
    bbox_facecolor: str = "black",
    bbox_alpha: float = 0.6,
) -> None:
    """Writes a label at the centre of a mask [H, W], in a box of `bbox_facecolor`."""
    if not mask.any():
        return
    y, x = (positions.mean() for positions in mask.nonzero())
    box = {"boxstyle": "round,pad=0.2", "facecolor": bbox_facecolor, "alpha": bbox_alpha}
    ax.text(x, y, label, color=text_color, fontsize=fontsize, ha="center", va="center", bbox=box)


def _series(value: Any, name: str) -> Array:
    result = _array(value)
    if result.ndim != 2:
        raise ContractError(
            f"Expected {name} of shape (N, C), got {tuple(result.shape)}; reshape it to two axes"
        )
    return result


def _array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _picture(value: Any, name: str) -> Array:
    """A picture as an array [H, W] or [H, W, C]; InputError where its axes cannot be told."""
    result = _array(value)
    shape, is_tensor = list(result.shape), isinstance(value, torch.Tensor)
    if is_tensor and result.ndim == 4 and len(result) == 1:
        result = result[0]
    if result.ndim == 2:
        return result
    if result.ndim == 3:
        first, last = (result.shape[axis] in CHANNELS for axis in (0, 2))
        if is_tensor and first and not last:
            return result.transpose(1, 2, 0)
        if len(shape) == 3 and (last or not first) and (not is_tensor or (last and not first)):
            return result
    raise InputError(
        f"{name} must be one picture, [H, W] or [H, W, C], or as a tensor also [C, H, W] or "
        f"[1, C, H, W], of {CHANNELS} channels: got {shape}; of a picture x [1, C, H, W] pass "
        "x[0].permute(1, 2, 0).detach().cpu().numpy()"
    )


def _normalized(attr: Array, sign: str, outlier_perc: int | float) -> Array:
    """Attributions of one sign, divided by the smallest of the outliers, on [-1, 1]."""
    bounds = {"positive": (0, None), "negative": (None, 0)}
    attr = np.clip(attr, *bounds[sign]) if sign in bounds else attr
    attr = np.abs(attr) if sign == "absolute_value" else attr
    if not 0 <= outlier_perc <= 100:
        raise ContractError(
            "Percentile for thresholding must be between 0 and 100 inclusive: got outlier_perc="
            f"{outlier_perc}; pass a percentage such as 2"
        )
    rising = np.sort(np.abs(attr), axis=None)
    sums = np.cumsum(rising)
    scale = float(rising[np.argmax(sums >= sums[-1] * 0.01 * (100.0 - outlier_perc))])
    if scale == 0:
        raise ContractError(
            f"Cannot normalize by scale factor = 0: got no attributions of the sign {sign!r}; "
            "look at another sign, or at another attribution"
        )
    if scale < NEARLY_ZERO:
        warnings.warn(
            "Attempting to normalize by value approximately 0, visualized results may be "
            "misleading: all attributions are close to 0",
            stacklevel=3,
        )
    # Negative attributions are drawn as positive amounts.
    return np.clip(attr / (-scale if sign == "negative" else scale), -1, 1)


def _mappable(sign: str, cmap: str | Colormap | None) -> Any:
    """The colours of a sign, by its own colour map where none is given."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    own, low = _COLOURS[sign]
    if isinstance(own, list):
        own = LinearSegmentedColormap.from_list("RdWhGn", own)
    return ScalarMappable(Normalize(low, 1), own if cmap is None else cmap)


def _check_names(methods: type[Enum], method: str, sign: str) -> None:
    for what, kind, name in (("Method", methods, method), ("Sign", VisualizeSign, sign)):
        if name not in kind.__members__:
            raise ChoiceError(
                f"Visualize {what} type is not valid: got {name!r}, expected one of "
                f"{', '.join(kind.__members__)}"
            )


def _new_figure(use_pyplot: bool, size: tuple[int, int], **panels: Any) -> tuple[Figure, Any]:
    if use_pyplot:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=size)
    else:
        from matplotlib.figure import Figure

        figure = Figure(figsize=size)
    return figure, figure.subplots(**panels)


def _show(use_pyplot: bool) -> None:
    if use_pyplot:
        from matplotlib import pyplot

        pyplot.show()


@dataclass(slots=True, eq=False, repr=False)
class VisualizationDataRecord:
    """One row of `visualize_text`: a text's words, their attributions [T], and the classes."""

    word_attributions: torch.Tensor
    pred_prob: float
    pred_class: int
    true_class: int
    attr_class: int
    attr_score: float
    raw_input_ids: list[str]
    convergence_score: float


def format_classname(classname: object) -> str:
    """A class as a cell of the table.

    Example:
        >>> format_classname("cat")
        '<td><text style="padding-right:2em"><b>cat</b></text></td>'
    """
    name = escape(str(classname), quote=False)
    return f'<td><text style="padding-right:2em"><b>{name}</b></text></td>'


def format_special_tokens(token: str) -> str:
    """A special token without its brackets.

    Example:
        >>> format_special_tokens("<pad>")
        '#pad'
    """
    return "#" + token.strip("<>") if token.startswith("<") and token.endswith(">") else token


def format_tooltip(item: str, text: str) -> str:
    """An item whose text a page's style sheet shows while the pointer is over it."""
    item, text = escape(item), escape(text)
    return f'<div class="tooltip">{item}<span class="tooltiptext">{text}</span></div>'


def format_word_importances(
    words: Sequence[str], importances: Sequence[float] | torch.Tensor | npt.NDArray[Any] | None
) -> str:
    """Words as a cell of the table, on green for positive and red for negative importances [T]."""
    if importances is None or len(importances) == 0:
        return "<td></td>"
    if len(shape := getattr(importances, "shape", (0,))) != 1:
        raise ContractError(
            f"Expected 1D array, got {shape}; add the attributions of a word up first"
        )
    if len(words) > len(importances):
        raise ContractError(
            f"words are more than their importances: got {len(words)} words and "
            f"{len(importances)} importances; pass one for each word"
        )
    marks = [
        f'<mark style="background-color: {_word_colour(float(importance))}; opacity:1.0; '
        'line-height:1.75"><font color="black"> '
        f"{escape(format_special_tokens(word), quote=False)} </font></mark>"
        for word, importance in zip(words, importances[: len(words)], strict=True)
    ]
    return f"<td>{''.join(marks)}</td>"


def _word_colour(importance: float) -> str:
    """White at 0, green up to 1, red down to -1."""
    hue, fade = (120, 50) if importance > 0 else (0, 40)
    return f"hsl({hue}, 75%, {100 - int(fade * min(1.0, abs(importance)))}%)"


def visualize_text(datarecords: Iterable[VisualizationDataRecord], legend: bool = True) -> Any:
    """Shows a table of texts in a notebook, and returns it as IPython's HTML.

    Args:
        datarecords: the rows.
        legend: whether the colours are explained above the table.
    """
    try:
        from IPython.display import HTML, display
    except ImportError as error:
        raise ContractError(
            "IPython must be available to visualize text: got no module of that name; run "
            "'pip install ipython'"
        ) from error
    titles = ("True Label", "Predicted Label", "Attribution Label", "Attribution Score")
    table = "".join(f"<th>{title}</th>" for title in (*titles, "Word Importance"))
    for one in datarecords:
        predicted = f"{one.pred_class} ({one.pred_prob:.2f})"
        cells = (one.true_class, predicted, one.attr_class, f"{one.attr_score:.2f}")
        words = format_word_importances(one.raw_input_ids, one.word_attributions)
        table += f"<tr>{''.join(map(format_classname, cells))}{words}</tr>"
    html = HTML(f'{_LEGEND if legend else ""}<table style="width: 100%">{table}</table>')
    display(html)
    return html


_LEGEND = "".join(
    f'<span style="border: 1px solid; background-color: {_word_colour(value)}">&emsp;</span> '
    f"{label}  "
    for value, label in ((-1, "Negative"), (0, "Neutral"), (1, "Positive"))
).join(("<div><b>Legend: </b>", "</div>"))
