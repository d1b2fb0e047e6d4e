"""A plot of the report: title, figure, and the styles of its series.

The colours are Okabe and Ito's, distinguishable with any colour vision, on white and on black. No meaning is carried by
colour alone: lines have dashes and symbols, bars have patterns, cells have numbers.
"""

from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from shardprune.printable import printable

COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# Below the plot and as high as needed: beside it, a phone would have to scroll.
LEGEND = {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom", "maxheight": 1.0}
LINE_HEIGHT = 340  # pixels of a plot of lines


@dataclass(frozen=True)
class Plot:
    """A titled figure.

    Attributes:
        title: includes the unit.
        text: how to read the plot.
        height: in pixels.
        wide: span the whole page.
    """

    title: str
    figure: go.Figure
    text: str
    height: int = LINE_HEIGHT
    wide: bool = False

    def as_json(self) -> str:
        """Return the figure as JSON for the page's script; plotly escapes text that would end a `script` element.

        Plotly reads texts as markup. Here they are names, so that nothing of it is left but line breaks.
        """
        return pio.to_json(_named(self.figure.to_plotly_json()), validate=False)


TEMPLATES = ("hovertemplate", "texttemplate")  # written here alone, with plotly's own placeholders


def _named(value: Any) -> Any:
    """Return a part of a figure with its texts as names: printable, and without markup."""
    if isinstance(value, dict):
        return {name: item if name in TEMPLATES else _named(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    return escape(printable(value), quote=False).replace("&lt;br&gt;", "<br>") if isinstance(value, str) else value


def figure(traces: list[Any], **layout: Any) -> go.Figure:
    """Create a figure without colours for text, axes and background: the page's style sets them."""
    drawn = go.Figure(traces)
    drawn.update_layout(
        template="none",
        # To the right there is room for half of the last number below an axis, which may stand at its very end.
        margin={"l": 8, "r": 14, "t": 8, "b": 8},
        legend=LEGEND,
        **layout,
    )
    drawn.update_xaxes(automargin=True)
    drawn.update_yaxes(automargin=True)
    return drawn


def series(place: int) -> dict[str, Any]:
    """Return the line style of the series with a given index."""
    return {
        "line": {"color": COLORS[place % len(COLORS)], "dash": DASHES[place % len(DASHES)], "width": 1.5},
        "marker": {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7},
    }
