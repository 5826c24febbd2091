"""What is drawn is what Captum draws: arrays, colours, limits, labels and the HTML of texts."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from captum.attr import visualization as theirs
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba

from saliency_fast.captum import visualization as ours

SIGNS = ("positive", "absolute_value", "negative", "all")
METHODS = ("heat_map", "blended_heat_map", "original_image", "masked_image", "alpha_scaling")
SERIES = ("overlay_individual", "overlay_combined", "colored_graph")
RANDOM = np.random.default_rng(0)
ATTR = RANDOM.standard_normal((7, 9, 3))
IMAGE = RANDOM.random((7, 9, 3))


@pytest.fixture(autouse=True)
def agg(monkeypatch: pytest.MonkeyPatch) -> Any:
    plt.switch_backend("Agg")
    # Captum asks for a function that newer versions of matplotlib have elsewhere.
    monkeypatch.setattr(matplotlib.cm, "get_cmap", plt.get_cmap, raising=False)
    yield
    plt.close("all")


def drawn(axes: Any) -> list[Any]:
    """Everything on axes that carries numbers, in order."""
    found: list[Any] = [axes.get_title(), axes.get_ylabel(), axes.get_xlim(), axes.get_ylim()]
    for image in axes.images:
        norm = image.norm
        found += [np.asarray(image.get_array()), image.get_cmap()(np.linspace(0, 1, 9))]
        found += [norm.vmin, norm.vmax, image.get_alpha()]
    for line in axes.lines:
        found += [line.get_xydata(), to_rgba(line.get_color()), line.get_linewidth()]
    for patch in axes.patches:
        found += [patch.get_extents().get_points(), patch.get_facecolor(), patch.get_alpha()]
    for one in axes.collections:
        found += [one.get_alpha(), one.get_linewidth()]
        if one.get_array() is not None:
            found += [one.get_array(), one.to_rgba(one.get_array()).ravel()]
        if isinstance(one, LineCollection):
            found += one.get_segments()
    legend = axes.get_legend()
    found += [[text.get_text() for text in legend.get_texts()] if legend else None]
    return found


def same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, (str, list, type(None))):
            assert one == other
        else:
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-6, atol=1e-6)


def same_figures(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Figures of equal axes, colour bars too."""
    assert isinstance(found, tuple)
    assert type(found[1]) is type(expected[1])
    assert tuple(found[0].get_size_inches()) == tuple(expected[0].get_size_inches())
    pairs = zip(found[0].axes, expected[0].axes, strict=True)
    for one, other in pairs:
        assert one.axison == other.axison
        same(drawn(one), drawn(other))


@pytest.mark.parametrize("use_pyplot", [False, True])
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("method", METHODS)
def test_images(method: str, sign: str, use_pyplot: bool) -> None:
    given = {"method": method, "sign": sign, "use_pyplot": use_pyplot, "title": "a title"}
    given |= {"show_colorbar": True, "outlier_perc": 5, "fig_size": (4, 3)}
    if sign == "all" and method in ("masked_image", "alpha_scaling"):
        for module in (ours, theirs):
            with pytest.raises(AssertionError, match=r"^Cannot display (masked image|alpha scal)"):
                module.visualize_image_attr(ATTR, IMAGE, **given)
        return
    found = ours.visualize_image_attr(ATTR, IMAGE, **given)
    same_figures(found, theirs.visualize_image_attr(ATTR, IMAGE, **given))


@pytest.mark.parametrize(
    ("attr", "image"),
    [
        (ATTR[:, :, 0], None),
        (ATTR, (IMAGE * 255).astype(int)),
        (ATTR[:, :, :1], IMAGE[:, :, :1]),
        (ATTR.astype(np.float32), IMAGE.astype(np.float32)),
    ],
)
def test_images_of_every_form(attr: Any, image: Any) -> None:
    for method in METHODS if image is not None and image.shape[2] == 3 else METHODS[:1]:
        found = ours.visualize_image_attr(attr, image, method, use_pyplot=False)
        same_figures(found, theirs.visualize_image_attr(attr, image, method, use_pyplot=False))
    if image is not None:
        found = ours.visualize_image_attr(attr, image, "original_image", use_pyplot=False)
        expected = theirs.visualize_image_attr(attr, image, "original_image", use_pyplot=False)
        same_figures(found, expected)


def test_images_on_given_axes_and_colours() -> None:
    figures = [plt.subplots(1, 2) for _ in range(2)]
    for module, (figure, axes) in zip((ours, theirs), figures, strict=True):
        given = {"plt_fig_axis": (figure, axes[1]), "cmap": "viridis", "alpha_overlay": 0.25}
        found = module.visualize_image_attr(ATTR, IMAGE, "blended_heat_map", "positive", **given)
        assert found == (figure, axes[1])
    same_figures(*figures)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("use_pyplot", [False, True])
def test_several_images(count: int, use_pyplot: bool) -> None:
    methods = ["original_image", "heat_map", "masked_image"][:count]
    signs, titles = ["all", "negative", "positive"][:count], ["a", "b", "c"][:count]
    given = {"show_colorbar": True, "use_pyplot": use_pyplot, "titles": titles, "cmap": "magma"}
    args = (ATTR, IMAGE, methods, signs)
    found = ours.visualize_image_attr_multiple(*args, **given)
    same_figures(found, theirs.visualize_image_attr_multiple(*args, **given))


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("method", SERIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_time_series(method: str, sign: str, channels: int) -> None:
    attr, data = RANDOM.standard_normal((2, 11, channels))
    given = {"method": method, "sign": sign, "show_colorbar": True, "title": "a title"}
    given |= {"channel_labels": ["a", "b", "c"][:channels], "x_values": np.linspace(3, 5, 11)}
    found = ours.visualize_timeseries_attr(attr, data, **given, linewidth=3)
    same_figures(found, theirs.visualize_timeseries_attr(attr, data, **given, linewidth=3))


def test_time_series_of_every_form() -> None:
    attr, data = RANDOM.standard_normal((2, 3, 11))
    given = {"channels_last": False, "outlier_perc": 10, "cmap": "magma", "alpha_overlay": 0.3}
    found = ours.visualize_timeseries_attr(attr, data, **given)
    same_figures(found, theirs.visualize_timeseries_attr(attr, data, **given))
    with pytest.warns(UserWarning, match=r"Number of channels \(11\) greater than"):
        ours.visualize_timeseries_attr(attr[:2], data[:2])


def test_time_series_leave_other_figures_alone() -> None:
    other = plt.figure().subplots()
    other.set_xlim(-7, 7)
    ours.visualize_timeseries_attr(*RANDOM.standard_normal((2, 11, 3)), use_pyplot=False)
    assert other.get_xlim() == (-7, 7)
    assert plt.get_fignums() == [other.figure.number]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda v: v.visualize_image_attr(ATTR, None, "masked_image"), ValueError, "Original Imag"),
        (lambda v: v.visualize_image_attr(ATTR, None, "heat"), KeyError, None),
        (
            lambda v: v.visualize_image_attr(ATTR, IMAGE, "heat"),
            AssertionError,
            "Visualize Method type is not valid",
        ),
        (lambda v: v.visualize_timeseries_attr(*ATTR[:2], method="heat"), KeyError, None),
        (lambda v: v.visualize_image_attr(ATTR, IMAGE, sign="both"), KeyError, None),
        (lambda v: v.visualize_image_attr(ATTR * 0), AssertionError, "Cannot normalize by scale f"),
        (
            lambda v: v.visualize_image_attr(ATTR, outlier_perc=101),
            AssertionError,
            "Percentile for thresholding must be between",
        ),
        (
            lambda v: v.visualize_image_attr_multiple(ATTR, IMAGE, ["heat_map"], []),
            AssertionError,
            "Methods and signs array lengths must match",
        ),
        (
            lambda v: v.visualize_image_attr_multiple(ATTR, IMAGE, ["heat_map"], ["all"], ["", ""]),
            AssertionError,
            "If titles list is given, length must match",
        ),
        (
            lambda v: v.visualize_timeseries_attr(ATTR, ATTR[:, :, 0]),
            AssertionError,
            r"Expected attr of shape \(N, C\), got \(7, 9, 3\)",
        ),
        (
            lambda v: v.visualize_timeseries_attr(*ATTR[:2], x_values=np.arange(3)),
            AssertionError,
            "x_values must have same length as data",
        ),
        (
            lambda v: v.format_word_importances(["a"], torch.ones(1, 2)),
            AssertionError,
            "Expected 1D array, got",
        ),
        (lambda v: v.format_word_importances(["a", "b"], [1.0]), AssertionError, None),
        (lambda v: v.visualize_text([]), AssertionError, "IPython must be available to visualize"),
    ],
)
def test_errors(call: Any, error: type[Exception], words: str | None) -> None:
    for module in (theirs, ours):
        with pytest.raises(error, match=f"^{words}" if words else None):
            call(module)
    with pytest.raises(ValueError, match=r"got|expected"):
        call(ours)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("colour", ["red", np.array([0.1, 0.2, 0.3, 0.4])])
def test_masks(width: int, colour: Any) -> None:
    mask = RANDOM.random((9, 11)) < 0.8
    for one in (mask, np.zeros_like(mask), np.ones_like(mask)):
        figures = [plt.subplots() for _ in range(2)]
        for module, (_, axes) in zip((ours, theirs), figures, strict=True):
            module.draw_mask_border(axes, one, border_width=width, border_color=colour)
            module.draw_mask_legend(axes, one, "a label", fontsize=8)
        same_figures(*figures)
        texts = [axes.texts for _, axes in figures]
        for found, expected in zip(*texts, strict=True):
            assert found.get_position() == expected.get_position()
            assert (found.get_text(), found.get_size()) == (
                expected.get_text(),
                expected.get_size(),
            )


class Page(HTMLParser):
    """The texts of a page, each with the colour behind it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[tuple[str, str]] = []
        self.colour = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        style = dict(attrs).get("style") or ""
        found = re.search(r"background-color:\s*(hsl\([^)]*\))", style)
        self.colour = found[1] if found else self.colour if tag == "font" else ""

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((" ".join(data.split()), self.colour))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """IPython's place, with what it is made to show."""
    shown: list[Any] = []

    class HTML:
        def __init__(self, data: str) -> None:
            self.data = data

    package, display = ModuleType("IPython"), ModuleType("IPython.display")
    display.HTML, display.display = HTML, shown.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(theirs, "HAS_IPYTHON", True)
    monkeypatch.setattr(theirs, "HTML", HTML, raising=False)
    monkeypatch.setattr(theirs, "display", shown.append, raising=False)
    return shown


@pytest.mark.parametrize("legend", [False, True])
def test_texts(notebook: list[Any], legend: bool) -> None:
    words = ["<s>", "a", "good", "film", "<pad>", "!"]
    values = torch.tensor([0.0, -0.3, 1.7, 0.51, -2.0, 0.004])
    pages = []
    for module in (ours, theirs):
        records = [
            module.VisualizationDataRecord(values, 0.987, 1, 0, "label", 1.25, words, 0.1),
            module.VisualizationDataRecord(values[:0], 0.5, 1, 1, 1, -0.004, words, 0.1),
        ]
        assert records[0].convergence_score == 0.1
        html = module.visualize_text(records, legend=legend)
        assert notebook.pop() is html
        pages.append(Page(html.data).texts)
    assert pages[0] == pages[1]
    assert ("good", "hsl(120, 75%, 50%)") in pages[0]
    assert ("#pad", "hsl(0, 75%, 60%)") in pages[0]


def test_parts_of_texts() -> None:
    for name, args in (
        ("format_classname", ("a class",)),
        ("format_classname", (3,)),
        ("format_special_tokens", ("<unk>",)),
        ("format_special_tokens", ("word",)),
        ("format_tooltip", ("an item", "its text")),
        ("format_word_importances", (["a", "b"], np.array([0.5, -0.5, 0.1]))),
        ("format_word_importances", (["a"], None)),
    ):
        found, expected = (getattr(one, name)(*args) for one in (ours, theirs))
        assert Page(found).texts == Page(expected).texts
        tags = [re.findall(r"<(\w+)", one) for one in (found, expected)]
        assert tags[0] == tags[1]


def test_words_are_no_markup() -> None:
    assert "<b>" not in ours.format_word_importances(["<b>bold"], [0.5])
    assert "<b>" not in ours.format_tooltip("<b>bold", "<b>bold")


def test_names_and_enumerations() -> None:
    for name in ("ImageVisualizationMethod", "TimeseriesVisualizationMethod", "VisualizeSign"):
        found, expected = (
            {one.name: one.value for one in getattr(module, name)} for module in (ours, theirs)
        )
        assert found == expected


def test_matplotlib_is_imported_when_drawing() -> None:
    code = """
import sys
from saliency_fast.captum import visualization
print([name for name in ("matplotlib", "mpl_toolkits", "IPython", "captum") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


PICTURE = torch.rand(3, 8, 6)
LAYOUTS: dict[str, Any] = {
    "[1, C, H, W]": PICTURE[None],
    "[C, H, W]": PICTURE,
    "in a graph": PICTURE[None].clone().requires_grad_() * 1.0,
    "[1, 1, H, W]": PICTURE[None, :1],
    "[H, W]": PICTURE[0],
    "[H, W, C]": PICTURE.permute(1, 2, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["heat_map", "blended_heat_map", "masked_image"])
def test_tensors_in_pytorchs_layout(layout: str, method: str) -> None:
    tensor = LAYOUTS[layout]
    image = PICTURE.permute(1, 2, 0).numpy()
    array = image
    if layout != "[H, W, C]":
        array = tensor.detach().reshape(-1, 8, 6).permute(1, 2, 0).numpy()
    of = {"method": method, "sign": "positive", "use_pyplot": False}
    drawn = [
        ours.visualize_image_attr(attr, original, **of)[1].images
        for attr, original in ((tensor, PICTURE[None]), (array, image))
    ]
    assert len(drawn[0]) == len(drawn[1]) > 0
    for one, other in zip(*drawn, strict=True):
        np.testing.assert_array_equal(one.get_array(), other.get_array())


@pytest.mark.parametrize(
    "attr",
    [
        torch.rand(3, 6, 3),
        torch.rand(8, 6, 5),
        torch.rand(2, 3, 8, 6),
        np.random.rand(1, 3, 8, 6),
        np.random.rand(3, 8, 6),
        torch.rand(8),
    ],
    ids=lambda one: f"{type(one).__name__}{list(one.shape)}",
)
def test_layouts_that_are_not_known_are_refused_with_the_cure(attr: Any) -> None:
    with pytest.raises(ValueError, match=r"permute\(1, 2, 0\)"):
        ours.visualize_image_attr(attr, use_pyplot=False)


def test_series_as_tensors() -> None:
    attr, data = torch.rand(9, 2), torch.rand(9, 2)
    of = {"method": "overlay_individual", "use_pyplot": False}
    found = ours.visualize_timeseries_attr(attr, data, **of)[1][0]
    expected = ours.visualize_timeseries_attr(attr.numpy(), data.numpy(), **of)[1][0]
    for one, other in zip(found.lines, expected.lines, strict=True):
        np.testing.assert_array_equal(one.get_ydata(), other.get_ydata())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_images_need_no_captum(method: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.partition(".")[0] == "captum"]:
        monkeypatch.setitem(sys.modules, name, None)
    image = IMAGE[:, :, :channels]
    _, axes = ours.visualize_image_attr(ATTR, image, method, "positive", use_pyplot=False)
    assert axes.images[-1].get_array().shape[:2] == ATTR.shape[:2]
