"""Heat maps of sparsity and outliers over layers and projections."""

from collections.abc import Callable

import plotly.graph_objects as go

from shardprune.report.page.plot import Plot, figure
from shardprune.report.page.tails import shortest_tails
from shardprune.report.result import LayerResult, ProjectionResult, Sparsity

ROW_HEIGHT = 22  # pixels; high enough for the number in a cell
FRAME_HEIGHT = 120  # pixels for the axes' labels
ZEROS = ".1f"  # the digits of a percentage of zeros
WHOLE = "layer"  # the column of all projections of a layer together

Value = Callable[[LayerResult | ProjectionResult], float | None]


def even_sparsity(sparsity: Sparsity) -> str | None:
    """Return the percentage of zeros that every layer and projection has, in a map's digits; None if they differ."""
    entries: list[LayerResult | ProjectionResult] = [*sparsity.layers, *sparsity.projections]
    shown = {f"{100 * entry.achieved:{ZEROS}}" for entry in entries}
    return shown.pop() if len(shown) == 1 else None


def sparsity_map(sparsity: Sparsity) -> Plot | None:
    """Plot the percentage of zeros of each projection, counted on the written tensors; None if all are alike."""
    if even_sparsity(sparsity):
        return None
    return _heat_map(
        sparsity,
        lambda entry: 100 * entry.achieved,
        f"Sparsity by layer and projection (% of {'weights' if sparsity.left_zero is None else 'the weights left'})",
        "Each cell is the percentage of zeros of one projection, counted on the weights that were written; the first "
        "column is that of the whole layer.",
        f"%{{z:{ZEROS}}}",
        span=5.0,
    )


def outlier_map(sparsity: Sparsity) -> Plot | None:
    """Plot the percentage of outliers of each projection of the dense model; None if the run did not measure them."""
    if all(layer.outliers is None for layer in sparsity.layers):
        return None
    return _heat_map(
        sparsity,
        lambda entry: entry.outliers,
        "Outlier ratios by layer and projection (% of weights)",
        "Each cell is the percentage of a projection's weights whose metric lies far above the mean, in the dense "
        "model; the first column takes the mean over the whole layer. Where there are more, less was pruned.",
        "%{z:.2f}",
        span=0.5,
    )


def _heat_map(sparsity: Sparsity, value: Value, title: str, text: str, template: str, span: float) -> Plot:
    """Plot a heat map; values that differ by less than `span` do not use the whole range of colours."""
    layers = [entry.layer for entry in sparsity.layers]
    names = list(dict.fromkeys(entry.name for entry in sparsity.projections))
    values = {(entry.layer, entry.name): value(entry) for entry in sparsity.projections}
    values |= {(entry.layer, WHOLE): value(entry) for entry in sparsity.layers}
    rows = [[values.get((layer, name)) for name in (WHOLE, *names)] for layer in layers]
    known = [number for row in rows for number in row if number is not None]
    tails = shortest_tails({name: name.split(".") for name in (WHOLE, *names)})  # the axis draws equal ones as one
    full = [".".join(tail) for tail in tails.values()]
    short = [label.removesuffix("_proj") for label in full]
    labels = short if len(set(short)) == len(short) else full
    trace = go.Heatmap(
        z=rows,
        x=labels,
        y=[str(layer) for layer in layers],
        texttemplate=template,
        colorscale="Cividis",
        zmin=min(known),
        zmax=max(*known, min(known) + span),
        showscale=False,  # the cells show numbers
        xgap=1,
        ygap=1,
        hovertemplate=f"layer %{{y}}, %{{x}}: {template} %<extra></extra>",
    )
    drawn = figure([trace], xaxis={"side": "top", "type": "category", "tickangle": -45})
    drawn.update_yaxes(autorange="reversed", type="category", title="layer")
    return Plot(title, drawn, text, FRAME_HEIGHT + ROW_HEIGHT * len(layers))
