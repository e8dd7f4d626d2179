"""Figures of the report as inline SVG that follows the page's colours, light or dark."""

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_numbers = itertools.count(1)


def colour_of(index: int) -> str:
    """Returns the colour of the label at this place; the eleventh is the first again."""
    return COLOURS[index % len(COLOURS)]


def loss_curves(progress: Sequence[Mapping[str, Any]]) -> str:
    """Returns training and validation loss over the epochs."""
    with _figure("training and validation loss per epoch") as (axes, done):
        _line(axes, progress, "train_loss", colour_of(0), "training")
        _line(axes, progress, "val_loss", colour_of(1), "validation patches")
        axes.set_xlabel("epoch")
        axes.set_title("Loss", loc="left", fontsize=10, fontweight="bold")
        axes.legend(loc="upper right")
    return done[0]


def pseudo_dice_curves(progress: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Returns nnU-Net's pseudo Dice per class over the epochs, the mean as a broad line."""
    n_classes = max((len(entry.get("dice_per_class") or []) for entry in progress), default=0)
    with _figure("pseudo Dice per class and epoch") as (axes, done):
        for index in range(n_classes):
            rows = [{**e, "d": _at(e.get("dice_per_class"), index)} for e in progress]
            name = names[index] if index < len(names) else f"class {index + 1}"
            shown = name if n_classes <= 8 else None
            _line(axes, rows, "d", colour_of(index), shown, width=1.0, alpha=0.75)
        _line(axes, progress, "mean_fg_dice", _INK, "mean", width=2.0)
        axes.set_ylim(top=1.0)
        axes.set_xlabel("epoch")
        axes.set_title("Pseudo Dice on random patches", loc="left", fontsize=10, fontweight="bold")
        axes.legend(loc="lower right")
    return done[0]


def learning_rate_curve(progress: Sequence[Mapping[str, Any]]) -> str:
    """Returns the learning rate at the end of each epoch."""
    with _figure("learning rate per epoch") as (axes, done):
        _line(axes, progress, "lr", colour_of(2), None)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        axes.set_title("Learning rate", loc="left", fontsize=10, fontweight="bold")
    return done[0]


def metric_strips(title: str, values: Mapping[str, Sequence[float]], bounded: bool = True) -> str:
    """Returns a strip per class: a dot per case, a bar over the quartiles and the median.

    bounded: the values are shares, so that the axis ends at 1; else lengths from 0 up.
    """
    height = 0.85 + (0.42 if len(values) <= 8 else 0.24) * max(len(values), 1)
    with _figure(f"{title} per class, a dot per case", height) as (axes, done):
        generator = np.random.default_rng(0)  # the same page from the same run
        for row, cases in enumerate(values.values()):
            data = np.asarray(cases, dtype=float)
            if data.size == 0:
                axes.text(0.02, row, "undefined", transform=axes.get_yaxis_transform(), va="center")
                continue
            q25, median, q75 = np.percentile(data, [25, 50, 75])
            spread = generator.uniform(-0.22, 0.22, data.size)
            colour = colour_of(row)
            axes.plot(
                data, row + spread, "o", ms=3.8, mec="none", color=colour, alpha=0.5, clip_on=False
            )
            axes.plot([q25, q75], [row, row], lw=3.2, color=_INK, alpha=0.55)
            axes.plot([median, median], [row - 0.3, row + 0.3], lw=2.2, color=_INK)
        axes.set_yticks(range(len(values)), [_short(name) for name in values])
        axes.set_ylim(max(len(values), 1) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        if bounded:
            lowest = min((float(np.min(v)) for v in values.values() if len(v)), default=0.0)
            axes.set_xlim(max(0.0, lowest - 0.05 * (1.05 - lowest)), 1.01)
        else:
            axes.set_xlim(left=0)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    return done[0]


@contextmanager
def _figure(description: str, height: float = 2.5) -> Iterator[tuple[Axes, list[str]]]:
    """Yields axes to draw on and a list that holds the SVG afterwards."""
    done: list[str] = []
    # From matplotlib's own defaults: nnU-Net's logger enlarges all fonts of the process.
    style = {**_without_backend(mpl.rcParamsDefault), **_STYLE, "svg.hashsalt": "umamba"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.0, height), layout="constrained")
        yield figure.subplots(), done
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    done.append(_embedded(stream.getvalue(), description))


def _embedded(svg: str, description: str) -> str:
    """Returns the SVG element alone, with ids of its own and the page's colours and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    number = next(_numbers)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="f{number}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#f{number}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#f{number}-\1"', svg)
    svg = svg.replace(_INK, "currentColor").replace(_FAINT, "var(--line)")
    svg = re.sub(r"(font(?:-family)?:[^;\"]*?)'sans-serif'[^;\"]*", r"\1sans-serif", svg)
    return re.sub(
        r'<svg height="[^"]+" version="[^"]+" (viewBox="[^"]+") width="[^"]+"',
        rf'<svg role="img" aria-label="{description}" \1',
        svg,
        count=1,
    )


def _line(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    key: str,
    colour: str,
    label: str | None,
    width: float = 1.6,
    alpha: float = 1.0,
) -> None:
    points = [(row["epoch"], row[key]) for row in rows if _is_number(row.get(key))]
    if points:
        x, y = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else ""
        axes.plot(x, y, marker=marker, lw=width, color=colour, label=label, alpha=alpha)


def _without_backend(parameters: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in parameters.items() if not key.startswith("backend")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _at(values: Sequence[float] | None, index: int) -> float | None:
    return values[index] if values is not None and index < len(values) else None


def _short(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
