"""Experts by layer: which stayed, what they scored, and what went with the others."""

import plotly.graph_objects as go

from shardprune.report.experts_result import Experts, ExpertsOfLayer
from shardprune.report.page.plot import Plot, figure, series

CELL = 14  # pixels of a layer's row
FRAME_HEIGHT = 120  # pixels for the axes' labels


def experts_map(experts: Experts) -> Plot:
    """Plot the score of every expert that stayed, over the largest of its layer; those that went are blank."""
    rows, shown = [], []
    for layer in experts.layers:
        low, high = min(layer.scores), max(layer.scores)
        span = high - low or 1.0
        rows.append(
            [(score - low) / span if expert in layer.kept else None for expert, score in enumerate(layer.scores)]
        )
        shown.append([_words(layer, expert) for expert in range(len(layer.scores))])
    trace = go.Heatmap(
        z=rows,
        x=list(range(experts.before)),
        y=[str(layer.layer) for layer in experts.layers],
        customdata=shown,
        colorscale="Cividis",
        zmin=0,
        zmax=1,
        xgap=1,
        ygap=1,
        hoverongaps=True,
        colorbar={"title": "score", "tickvals": [0, 1], "ticktext": ["least", "most"]},
        hovertemplate="layer %{y}, expert %{x}: %{customdata}<extra></extra>",
    )
    drawn = figure([trace], xaxis={"side": "top", "title": "expert"})
    drawn.update_yaxes(autorange="reversed", type="category", title="layer")
    others = "were merged into them and are blank" if experts.merged else "are blank"
    return Plot(
        f"Experts that stayed, by layer ({experts.score}, from the least to the most important of a layer)",
        drawn,
        f"Each cell is an expert of the dense model; {experts.after} of {experts.before} stayed in each layer, and the "
        f"others {others}. Touch one for its score and its calibration tokens.",
        FRAME_HEIGHT + CELL * len(experts.layers),
    )


def lost_weight(experts: Experts) -> Plot | None:
    """Plot the share of the routing weight that each layer lost; None without a pass."""
    points = [(layer.layer, layer.lost) for layer in experts.layers if layer.lost is not None]
    if not points:
        return None
    trace = go.Scatter(
        x=[layer for layer, _ in points],
        y=[100 * lost for _, lost in points],
        mode="lines+markers",
        hovertemplate="layer %{x}: %{y:.2f} %<extra></extra>",
        **series(0),
    )
    return Plot(
        "Routing weight lost by layer (%)",
        figure([trace], xaxis={"title": "layer"}, yaxis={"title": "%", "rangemode": "tozero"}),
        "The share of the weight that the dense model's router gave to experts which went, on the calibration data.",
    )


def _words(layer: ExpertsOfLayer, expert: int) -> str:
    """Say what is known of an expert."""
    state = "stayed" if expert in layer.kept else "went"
    for kept, members in zip(layer.kept, layer.members or (), strict=False):
        if expert in members and len(members) > 1:
            state = f"merged with {', '.join(str(one) for one in members if one != expert)} into {kept}"
    if expert in layer.protected:
        state += ", protected"
    tokens = f", {layer.tokens[expert]:,} tokens" if layer.tokens else ""
    return f"{state}, score {layer.scores[expert]:.4g}{tokens}"
