"""Plots of the picture page, as SVG that stands inside of HTML and takes its colours from the page's text."""

import io
import re
from collections.abc import Sequence

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import NDArray
from PIL import Image

from trainer_module.alarms import Interval

# Told apart by readers who see colours differently, on white and on black; with the shapes below 16 classes.
_COLOURS = ("#3b82c4", "#d97706", "#17936b", "#c2559d", "#d1495b", "#8268c9", "#1b98a6", "#9a6b3f")
_SHAPES = ("o", "^")
_OTHER = "#8a8f98"
_NO_STYLE = (_OTHER, "s")
_INK = "#010203"  # stands for the colour of the page's text until the SVG is written
_NAME_LENGTH = 28

Styles = dict[str | None, tuple[str, str]]  # label to colour and shape

_STYLE = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def class_styles(labels: Sequence[str | None]) -> Styles:
    """Colour and shape of the classes with most images; the others, and images without label, are grey squares.

    Args:
        labels: of all points of the map.
    """
    named = [label for label in labels if label is not None]
    by_size = sorted(set(named), key=lambda label: (-named.count(label), label))
    styles = [(colour, shape) for shape in _SHAPES for colour in _COLOURS]
    return dict(zip(by_size, styles, strict=False))


def draw_map(
    points: NDArray[np.float64],
    labels: Sequence[str | None],
    pictures: Sequence[tuple[int, Image.Image]],
) -> str:
    """A scatter plot of a map.

    Args:
        points: float64 [N, 2] in 0 to 1.
        labels: of each point.
        pictures: rows of points that are shown as the image itself.

    Returns:
        SVG.
    """
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": "map"}]):
        figure = Figure(figsize=(9, 6.6), layout="constrained")
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(-0.04, 1.04)
        axes.set_ylim(-0.05, 1.05)
        styles = class_styles(labels)
        for label in [*styles, None]:
            rows = [row for row, name in enumerate(labels) if (name if name in styles else None) == label]
            colour, shape = styles.get(label, _NO_STYLE)
            if rows:
                x, y = points[rows].T
                name = _named(label, labels, styles)
                axes.scatter(x, y, s=22, c=colour, marker=shape, alpha=0.85, linewidths=1, label=name)
        for row, picture in pictures:
            edge, _ = styles.get(labels[row], _NO_STYLE)
            frame = {"edgecolor": edge, "boxstyle": "square,pad=0.08", "facecolor": "none", "linewidth": 1.5}
            image = OffsetImage(np.asarray(picture), zoom=1.0, resample=False)
            axes.add_artist(AnnotationBbox(image, (points[row, 0], points[row, 1]), pad=0, bboxprops=frame))
        if styles:
            figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9, markerscale=1.3)
        return _svg(figure, "map")


def _named(label: str | None, labels: Sequence[str | None], styles: Styles) -> str:
    """What the legend says of a class, or of all that have no style of their own."""
    if label is not None:
        return label if len(label) <= _NAME_LENGTH else label[: _NAME_LENGTH - 1] + "…"
    others = len({name for name in labels if name is not None}) - len(styles)
    parts = [f"{others} other classes"] if others else []
    return ", ".join([*parts, *(["no label"] if None in labels else [])])


def draw_curves(intervals: Sequence[Interval]) -> str:
    """Loss and accuracies over the epochs of a training.

    Args:
        intervals: of metrics.jsonl, in order; what is NaN there leaves a gap or, for kNN, no point.
    """
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": "curves"}]):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        _line(loss, intervals, "loss", _COLOURS[0], "-", "loss")
        _line(accuracy, intervals, "pretext_top1", _COLOURS[1], "-", "pretext top-1")
        _line(accuracy, intervals, "knn_top1", _COLOURS[2], "o--", "kNN top-1, while training")
        loss.set_title("loss")
        accuracy.set_title("accuracy")
        accuracy.set_ylim(0, 1)
        accuracy.legend(frameon=False, fontsize=9)
        for axes in (loss, accuracy):
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.25, color=_OTHER)
            axes.set_facecolor("none")
            axes.spines[["top", "right"]].set_visible(False)
        return _svg(figure, "curves")


def _line(axes: Axes, intervals: Sequence[Interval], name: str, colour: str, shape: str, label: str) -> None:
    values = [(interval.epoch, getattr(interval, name)) for interval in intervals]
    known = [(epoch, value) for epoch, value in values if np.isfinite(value)]
    if known:
        axes.plot(*zip(*known, strict=True), shape, color=colour, label=label, markersize=4)


def _svg(figure: Figure, name: str) -> str:
    """The figure without a background, as wide as its place, with ids that no other figure of the page has."""
    figure.patch.set_alpha(0.0)
    file = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|(<svg [^>]*?)height="[^"]*"', r"\1\2", text, count=1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    return text.replace(_INK, "currentColor")
