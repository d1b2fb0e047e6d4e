"""A plot of a report: what it is called, what it shows, and what tells its series apart.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart, on white and on black alike.
None carries a meaning alone: lines have dashes and symbols, bars have patterns, cells have numbers.
"""

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# Below the plot, and as high as it takes: on a phone it would be scrolled else.
LEGEND = {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom", "maxheight": 1.0}
LINE_HEIGHT = 340  # pixels of a plot of lines


@dataclass(frozen=True)
class Plot:
    """`title` names the unit, `text` says how to read the plot, `height` is in pixels; `wide`: over the whole page."""

    title: str
    figure: go.Figure
    text: str
    height: int = LINE_HEIGHT
    wide: bool = False

    def as_json(self) -> str:
        """The figure for the page's script; plotly escapes what would end a `script` element."""
        return self.figure.to_json()


def figure(traces: list[Any], **layout: Any) -> go.Figure:
    """A figure without colours of its own for text, axes and background: those are the page's."""
    drawn = go.Figure(traces)
    drawn.update_layout(
        template="none",
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        legend=LEGEND,
        **layout,
    )
    drawn.update_xaxes(automargin=True)
    drawn.update_yaxes(automargin=True)
    return drawn


def series(place: int) -> dict[str, Any]:
    """How the series at a place is drawn as a line."""
    return {
        "line": {"color": COLORS[place % len(COLORS)], "dash": DASHES[place % len(DASHES)], "width": 1.5},
        "marker": {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7},
    }
