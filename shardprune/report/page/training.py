"""The loss curve of a training run."""

import plotly.graph_objects as go

from shardprune.report.page.plot import COLORS, Plot, figure, series
from shardprune.report.result import Recovery


def loss_curve(recovery: Recovery) -> Plot:
    """Plot loss and learning rate by step, and the loss of the held-out rows."""
    steps = [loss.step for loss in recovery.losses]
    held_out = [(loss.step, loss.held_out) for loss in recovery.losses if loss.held_out is not None]
    traces = [
        go.Scatter(
            x=steps,
            y=[loss.loss for loss in recovery.losses],
            name="training loss",
            mode="lines",
            line=series(0)["line"],
            hovertemplate="%{y:.4f}",
        ),
        go.Scatter(
            x=steps,
            y=[loss.learning_rate for loss in recovery.losses],
            name="learning rate (right)",
            mode="lines",
            line={"color": COLORS[-1], "dash": "dot", "width": 1.5},
            yaxis="y2",
            hovertemplate="%{y:.2e}",
        ),
    ]
    if held_out:
        x, y = zip(*held_out, strict=True)
        traces.append(go.Scatter(x=x, y=y, name="held-out loss", mode="lines+markers", **series(3)))
    right = {"title": "learning rate", "overlaying": "y", "side": "right", "showgrid": False, "rangemode": "tozero"}
    drawn = figure(traces, hovermode="x unified", yaxis2=right | {"tickformat": ".1e", "nticks": 5})
    drawn.update_xaxes(title="step")
    drawn.update_layout(yaxis={"title": "loss (nats per token)"})
    return Plot(
        "Losses of the fine-tuning (nats per token) and learning rate, by step",
        drawn,
        "Mean loss of a step's tokens before the step; with a teacher, the mixture of both losses that was minimised.",
    )
