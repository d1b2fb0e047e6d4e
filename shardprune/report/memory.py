"""What the workers took."""

import plotly.graph_objects as go

from shardprune.report.plot import COLORS, Plot, figure
from shardprune.result import WorkerResult

BAR_HEIGHT = 26  # pixels
FRAME_HEIGHT = 90


def memory_of_workers(workers: list[WorkerResult]) -> Plot:
    """Peak memory of every worker in GiB."""
    gib = [worker.peak_bytes / 2**30 for worker in workers]
    trace = go.Bar(
        x=gib,
        y=[worker_name(worker.shard, worker.replica) for worker in workers],
        orientation="h",
        texttemplate="%{x:.2f}",
        textposition="auto",
        marker={"color": COLORS[0]},
        customdata=[[worker.node] for worker in workers],
        hovertemplate="%{y} on %{customdata[0]}: %{x:.3f} GiB<extra></extra>",
    )
    drawn = figure([trace], xaxis={"title": "GiB", "rangemode": "tozero"})
    drawn.update_yaxes(autorange="reversed", type="category")
    return Plot(
        "Peak memory of each worker (GiB)",
        drawn,
        "Each bar is a worker, named shard.replica: resident memory of its process at its peak, on a GPU the memory "
        "allocated there.",
        FRAME_HEIGHT + BAR_HEIGHT * len(workers),
    )


def worker_name(shard: int, replica: int) -> str:
    return f"{shard}.{replica}"
