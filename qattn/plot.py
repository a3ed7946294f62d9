"""Figures of what `qattn.introspect` finds.  They need the extra ``plot``: ``pip install "qattn[plot]"``.

Each function returns a Matplotlib figure: ``figure.savefig("map.png")``.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qattn.errors import MissingExtraError

if TYPE_CHECKING:
    from qattn.introspect import LayerCost

Array = np.ndarray[Any, Any]
_NAMED = 80  # tokens whose names fit along an axis; more are numbered
_COLOURS = "Blues"
_HIDDEN = "0.94"  # light grey
_LEAST = 1e-12  # what is less is drawn as this, on scales that have no zero
_WEIGHT = "weight, coloured by its square root"


def attention_map(weights: Array, tokens: Sequence[str], title: str = "") -> Any:
    """The weights of one head.

    Parameters
    ----------
    weights : (tokens, keys) floats
        Zeros are drawn as what the token does not see.
    tokens : sequence of str
        The text of each key; the last of them are the tokens that attend.
    """
    count, keys = weights.shape
    side = min(4 + 0.16 * keys, 16)
    figure = _figure((side + 1, side))
    axes = figure.subplots()
    image = _draw(axes, weights)
    axes.set(title=title, xlabel="attended to", ylabel="token")
    if keys <= _NAMED:
        plain = {"parse_math": False, "fontsize": 8}  # a token may be $
        axes.set_xticks(range(keys), tokens, rotation=90, **plain)
        axes.set_yticks(range(count), tokens[keys - count :], **plain)
    figure.colorbar(image, ax=axes, label=_WEIGHT, shrink=0.8)
    return figure


def attention_maps(weights: Array, title: str = "") -> Any:
    """The weights of all heads of a layer, side by side: weights (heads, tokens, keys)."""
    heads = len(weights)
    columns = int(np.ceil(heads**0.5))
    rows = -(-heads // columns)
    figure = _figure((2.2 * columns + 1, 2.3 * rows + 0.5))
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for head, axes in enumerate(panels):
        if head >= heads:
            axes.set_axis_off()
            continue
        image = _draw(axes, weights[head])
        axes.set_title(f"head {head}", fontsize=9)
        axes.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=list(panels), label=_WEIGHT, shrink=0.8)
    return figure


def _draw(axes: Any, weights: Array) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    colours = colormaps[_COLOURS].with_extremes(bad=_HIDDEN)
    # By the square root: next to a first token that takes nearly all, the rest would be blank.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    return axes.imshow(np.ma.masked_equal(weights, 0), cmap=colours, norm=norm, interpolation="nearest")


def costs(found: Sequence[LayerCost], title: str = "") -> Any:
    """What a quantization costs, layer by layer: the error of the output, and the divergence of each head's weights."""
    layers, heads = [cost.layer for cost in found], max(len(cost.kl) for cost in found)
    kl = np.array([np.pad(cost.kl, (0, heads - len(cost.kl)), constant_values=np.nan) for cost in found])
    figure = _figure((10, max(3.5, 1.5 + 0.17 * len(layers))))
    from matplotlib.colors import LogNorm

    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.2])
    left.plot([max(cost.nmse, _LEAST) for cost in found], layers, "o-", color="tab:blue", markersize=4, linewidth=1)
    left.set(title="NMSE of the output", ylabel="layer", xscale="log")
    left.grid(alpha=0.3)
    shown = np.maximum(kl, _LEAST)
    least = np.nanmin(shown)
    norm = LogNorm(least, max(np.nanmax(shown), 10 * least))
    place = (-0.5, heads - 0.5, max(layers) + 0.5, min(layers) - 0.5)
    image = right.imshow(shown, cmap=_COLOURS, norm=norm, extent=place, aspect="auto", interpolation="nearest")
    right.set(title="KL of the weights", xlabel="head")
    for axis in (left.yaxis, right.xaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=right, label="nats, a mean over the tokens")
    return figure


def rendered(figure: Any, kind: str) -> bytes:
    """A figure as a file of that kind: "png", "svg" or "pdf"."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a token that the font lacks is drawn as a box
        figure.savefig(file, format=kind, dpi=150)
    return file.getvalue()


def _figure(size: tuple[float, float]) -> Any:
    """An empty figure; no window and no back end come with it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plot", "matplotlib") from error
    return Figure(size, layout="constrained")
