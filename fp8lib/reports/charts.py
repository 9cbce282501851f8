"""Pictures of a report, as SVG: drawn by matplotlib, from the report's document alone.

Every picture is of aggregates, so that its size does not grow with the number of tensors. Text takes the
page's own colour (`currentColor`), so that one picture is readable on light and dark. Names are drawn as they
are: no mathematics is made of a `$`, and matplotlib escapes them.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = {"GOOD": "#4d9e6f", "WARN": "#e0a100", "FAIL": "#c0362c"}
MARKS = {"WARN": "!", "FAIL": "×"}
"""In cells that are not GOOD, for those who see the colours alike."""
_ZONES = ("GOOD", "WARN", "FAIL")
_INK = "#010203"
"""Stands for `currentColor`, which matplotlib does not know."""
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MOST_LAYERS, _MOST_KINDS, _LONGEST = 200, 40, 48
"""Of a heat map, and of a label: a directory may hold any names."""
_LETTER = 0.08
"""Inches that a letter of a label takes."""
_BINS = 60
_LIMITS = (("good", "WARN"), ("hard", "FAIL"))
"""Limits of a band, and the zone that begins there."""
_METRICS = (
    ("cosine", "1 − cosine", lambda value: 1 - value),
    ("mean_abs", "mean abs err", lambda value: value),
    ("max_abs", "max abs err", lambda value: value),
    ("vs_best", "squared error vs best scale", lambda value: value),
    ("bulk_error", "bulk error", lambda value: value),
)
"""Name of a metric, the label of its distribution, and what is shown of it."""


def heat_maps(measurements: Sequence[Mapping]) -> list[tuple[str, str]]:
    """(title, SVG) of layers × kinds of module: the worst zone, and the worst `vs best` if measured."""
    cells: dict[tuple[str, str], list[Mapping]] = {}
    for m in measurements:
        cells.setdefault((m["kind"], m["layer"]), []).append(m)
    kinds = sorted({kind for kind, _ in cells})[:_MOST_KINDS]
    layers = sorted({layer for _, layer in cells}, key=_layer_order)[:_MOST_LAYERS]
    if not kinds:
        return []
    zones = _grid(cells, kinds, layers, lambda those: max(_ZONES.index(m["zone"]) for m in those))
    found = [("Worst zone", _heat_map("zones", zones, kinds, layers, by_zone=True))]
    if all("vs_best" in m for m in measurements):
        worst = _grid(cells, kinds, layers, lambda those: _worst(float(m["vs_best"]) for m in those))
        title = "Largest squared error as a multiple of the least that any block scale gives (vs best)"
        found.append((title, _heat_map("best", worst, kinds, layers, by_zone=False)))
    return found


def distributions(measurements: Sequence[Mapping], bands: Sequence[Mapping]) -> str | None:
    """Histograms of the metrics with their bands; None where nothing was measured."""
    metrics = [each for each in _METRICS if measurements and all(each[0] in m for m in measurements)]
    if not metrics:
        return None
    limits = {band["metric"]: band for band in bands}
    across = min(len(metrics), 3)
    down = math.ceil(len(metrics) / across)
    figure = Figure(figsize=(3.5 * across, 2.4 * down), layout="constrained")
    with mpl.rc_context(_STYLE):
        for place, (metric, label, shown) in enumerate(metrics, 1):
            axes = figure.add_subplot(down, across, place)
            values = np.array([shown(float(m[metric])) for m in measurements])
            band = limits.get(metric)
            lines = {zone: shown(float(band[key])) for key, zone in _LIMITS} if band else {}
            _histogram(axes, values[np.isfinite(values)], tuple(lines.values()))
            for zone, where in lines.items():
                axes.axvline(where, color=COLOURS[zone], linewidth=1.4, linestyle="--")
            axes.set_xlabel(label)
            axes.set_ylabel("tensors" if place % across == 1 else "")
        return _svg(figure, "distributions")


def divergences(comparison: Mapping) -> str:
    """Histogram of the KL divergence over positions, for each directory."""
    edges, candidates = comparison["histogram_edges_nats"], _finite(comparison)
    labels = [f"< {edges[0]:g}", *(f"{edge:.2g}" for edge in edges)]
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    with mpl.rc_context(_STYLE):
        axes = figure.add_subplot()
        width = 0.8 / max(len(candidates), 1)
        for number, candidate in enumerate(candidates):
            where = np.arange(len(labels)) + number * width
            colour, name = _line(number), _short(candidate["directory"])
            axes.bar(where, candidate["histogram"], width, align="edge", color=colour, label=name)
        axes.set_xticks(range(len(labels)), labels, rotation=60)
        axes.set_xlabel("KL divergence from, nats")
        axes.set_ylabel("positions")
        _legend(axes, candidates)
        return _svg(figure, "divergences")


def layer_curve(comparison: Mapping) -> str:
    """Relative error of the hidden state behind each layer."""
    candidates = _finite(comparison)
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    with mpl.rc_context(_STYLE):
        axes = figure.add_subplot()
        for number, candidate in enumerate(candidates):
            name, errors = _short(candidate["directory"]), [float(e) for e in candidate["layers"]]
            axes.plot(errors, color=_line(number), marker=".", linewidth=1.4, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error of\nthe hidden state")
        _legend(axes, candidates)
        return _svg(figure, "layers")


def _finite(comparison: Mapping) -> list[Mapping]:
    """Directories whose outputs are numbers; of the others there are no figures."""
    return [each for each in comparison["candidates"] if each["not_finite"] is None]


def _grid(cells: Mapping, kinds: Sequence[str], layers: Sequence[str], value) -> np.ndarray:
    """[kinds, layers], NaN where a layer has no such module."""
    grid = np.full((len(kinds), len(layers)), np.nan)
    for row, kind in enumerate(kinds):
        for column, layer in enumerate(layers):
            if those := cells.get((kind, layer)):
                grid[row, column] = value(those)
    return grid


def _heat_map(name: str, grid: np.ndarray, kinds: Sequence[str], layers: Sequence[str], by_zone: bool) -> str:
    height, width = grid.shape
    rows, columns = [_short(kind) for kind in kinds], [_short(layer) or "–" for layer in layers]
    room = (1.2 + _LETTER * max(map(len, rows)), 0.9 + _LETTER * max(map(len, columns)))
    size = (room[0] + max(0.19 * width, 2.5), room[1] + 0.24 * height)
    figure = Figure(figsize=size, layout="constrained")
    with mpl.rc_context(_STYLE):
        axes = figure.add_subplot()
        if by_zone:
            colours = ListedColormap([COLOURS[zone] for zone in _ZONES])
            mesh = _mesh(axes, grid, colours, BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3))
            for row, column in zip(*np.nonzero(grid > 0), strict=True):
                mark = MARKS[_ZONES[int(grid[row, column])]]
                axes.text(column, row, mark, ha="center", va="center", color="white", fontsize=8)
            handles = [Patch(color=COLOURS[zone], label=zone) for zone in _ZONES]
            figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
        else:
            finite = grid[np.isfinite(grid)]
            most = max(1.1, finite.max() if finite.size else 1.1)
            mesh = _mesh(
                axes, np.where(np.isinf(grid), most, grid), mpl.colormaps["cividis"], Normalize(1, most)
            )
            figure.colorbar(mesh, ax=axes, pad=0.01).outline.set_visible(False)
        axes.set_yticks(range(height), rows)
        step = math.ceil(width / 64)
        axes.set_xticks(range(0, width, step), columns[::step], rotation=90)
        axes.set_xlabel("layer")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure, name)


def _mesh(axes: Axes, grid: np.ndarray, colours, norm):
    axes.invert_yaxis()
    return axes.pcolormesh(
        np.ma.masked_invalid(grid), cmap=colours, norm=norm, edgecolors="none", linewidth=0, shading="nearest"
    )


def _histogram(axes: Axes, values: np.ndarray, limits: Sequence[float]) -> None:
    """Bars over equal ranges of what is shown, the limits included; values that hardly differ are one bar."""
    if not values.size:
        return
    least, most = min(float(values.min()), *limits, math.inf), max(float(values.max()), *limits, -math.inf)
    room = max((most - least) * 0.02, abs(most) * 1e-6) or 1.0
    counts, edges = np.histogram(values, _BINS, (least - room, most + room))
    axes.stairs(counts, edges, fill=True, color=_line(0))
    axes.locator_params(axis="x", nbins=4)
    axes.ticklabel_format(axis="x", scilimits=(-3, 4), useMathText=False)


def _legend(axes: Axes, candidates: Sequence) -> None:
    if len(candidates) > 1:
        axes.legend(frameon=False)


def _line(number: int) -> str:
    return ("#4682b4", "#d2691e")[number % 2]


def _layer_order(layer: str) -> tuple:
    """Layers by number, those of the draft head behind them, what is in no layer at the end."""
    number = layer.rpartition(".")[2]
    return (not layer, layer.startswith("mtp"), int(number) if number.isdecimal() else 0)


def _worst(values) -> float:
    values = list(values)
    return math.inf if any(map(math.isnan, values)) else max(values)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:12]}…{text[-_LONGEST + 13 :]}"


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element for a page; `name` keeps its ids apart from those of others."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    file = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-labelledby="{name}" ', 1)
