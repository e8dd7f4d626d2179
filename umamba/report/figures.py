"""Figures of the report as inline SVG that follows the page's colours, light or dark."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from umamba.report.html import Markup

# Mid-tones that can be told apart on white, on black and on a grey image.
COLOURS = (
    "#2f80d0",
    "#e8833a",
    "#2ea58a",
    "#cf4f8c",
    "#8b6fe0",
    "#b59410",
    "#37b0cf",
    "#dd5555",
    "#6f9d3c",
    "#a4725f",
)
# Stand-ins that matplotlib can draw with; the page's own colours take their place.
_INK, _FAINT = "#010203", "#030201"
_STYLE: dict[Any, Any] = {
    # From matplotlib's own defaults: nnU-Net's logger enlarges all fonts of the process.
    **{key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith("backend")},
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK
    ),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _FAINT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "font.size": 9,
    "text.parse_math": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "umamba",
}
_styled = mpl.rc_context(_STYLE)
_numbers = itertools.count(1)


def colour_of(index: int) -> str:
    """Returns the colour of the label at this place; the eleventh is the first again."""
    return COLOURS[index % len(COLOURS)]


@_styled
def training_curves(progress: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Markup]:
    """Returns losses, nnU-Net's pseudo Dice and learning rate over the epochs.

    names: of the classes of the pseudo Dice; their mean is a broad line.
    """
    epochs = [row["epoch"] for row in progress]
    keys = ("train_loss", "val_loss", "mean_fg_dice", "lr")
    training, validation, mean, rate = ([row.get(key) for row in progress] for key in keys)

    loss, axes = _new_figure("Loss", "epoch")
    _line(axes, epochs, training, color=colour_of(0), label="training")
    _line(axes, epochs, validation, color=colour_of(1), label="validation patches")
    axes.legend(loc="upper right")

    dice, axes = _new_figure("Pseudo Dice on random patches", "epoch")
    classes = list(itertools.zip_longest(*(row.get("dice_per_class") or [] for row in progress)))
    for index, values in enumerate(classes):
        name = names[index] if index < len(names) else f"class {index + 1}"
        label = name if len(classes) <= 8 else None
        _line(axes, epochs, values, color=colour_of(index), label=label, lw=1.0, alpha=0.75)
    _line(axes, epochs, mean, color=_INK, label="mean", lw=2.0)
    axes.set_ylim(top=1.0)
    axes.legend(loc="lower right")

    learning_rate, axes = _new_figure("Learning rate", "epoch")
    _line(axes, epochs, rate, color=colour_of(2))
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    return [
        _svg(loss, "training and validation loss per epoch"),
        _svg(dice, "pseudo Dice per class and epoch"),
        _svg(learning_rate, "learning rate per epoch"),
    ]


@_styled
def metric_strips(title: str, values: Mapping[str, Sequence[float]], bounded: bool) -> Markup:
    """Returns a strip per class: a dot per case, a bar over the quartiles and the median.

    bounded: the values are shares, so that the axis ends at 1; else lengths from 0 up.
    """
    height = 0.85 + (0.42 if len(values) <= 8 else 0.24) * len(values)
    figure, axes = _new_figure(title, "", height)
    generator = np.random.default_rng(0)  # the same page from the same run
    for row, cases in enumerate(values.values()):
        if not cases:
            axes.text(0.02, row, "undefined", transform=axes.get_yaxis_transform(), va="center")
            continue
        q25, median, q75 = np.percentile(cases, [25, 50, 75])
        y, colour = row + generator.uniform(-0.22, 0.22, len(cases)), colour_of(row)
        axes.plot(cases, y, "o", ms=3.8, mec="none", color=colour, alpha=0.5, clip_on=False)
        axes.plot([q25, q75], [row, row], lw=3.2, color=_INK, alpha=0.55)
        axes.plot([median, median], [row - 0.3, row + 0.3], lw=2.2, color=_INK)
    shown = [name if len(name) <= 18 else f"{name[:17]}…" for name in values]
    axes.set_yticks(range(len(values)), shown)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    if bounded:
        lowest = min(min(cases) for cases in values.values() if cases)
        axes.set_xlim(max(0.0, lowest - 0.05 * (1.05 - lowest)), 1.01)
    else:
        axes.set_xlim(left=0)
    return _svg(figure, f"{title} per class, a dot per case")


def _new_figure(title: str, xlabel: str, height: float = 2.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.0, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    return figure, axes


def _line(axes: Axes, epochs: Sequence[int], values: Sequence[Any], **style: Any) -> None:
    """Draws the finite values over the epochs; a single one as a dot."""
    pairs = zip(epochs, values, strict=True)
    points = [(x, y) for x, y in pairs if y is not None and np.isfinite(y)]
    if points:
        marker = "o" if len(points) == 1 else ""
        axes.plot(*zip(*points, strict=True), marker=marker, **style)


def _svg(figure: Figure, description: str) -> Markup:
    """Returns the SVG element alone, with ids of its own and the page's colours and fonts."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{next(_numbers)}-", svg)
    svg = svg.replace(_INK, "currentColor").replace(_FAINT, "var(--line)")
    svg = re.sub(r"(font(?:-family)?:[^;\"]*?)'sans-serif'[^;\"]*", r"\1sans-serif", svg)
    opening = f'<svg role="img" aria-label="{description}"'
    size = r'<svg height="[^"]+" version="[^"]+" (viewBox="[^"]+") width="[^"]+"'
    return Markup(re.sub(size, rf"{opening} \1", svg, count=1))
