"""Memory of the workers."""

import plotly.graph_objects as go

from shardprune.report.page.plot import COLORS, Plot, figure
from shardprune.report.page.workers import lines_of
from shardprune.report.result import WorkerResult

BAR_HEIGHT = 26  # pixels
FRAME_HEIGHT = 90


def memory_of_workers(workers: list[WorkerResult]) -> Plot:
    """Plot the peak memory of every worker in GiB; workers that share a line are shown by their largest."""
    by_key = {(worker.shard, worker.replica): worker for worker in workers}
    lines = lines_of(list(by_key))
    most = [max((by_key[key] for key in keys), key=lambda worker: worker.peak_bytes) for _, keys in lines]
    trace = go.Bar(
        x=[worker.peak_bytes / 2**30 for worker in most],
        y=[name for name, _ in lines],
        orientation="h",
        texttemplate="%{x:.2f}",
        textposition="auto",
        marker={"color": COLORS[0]},
        customdata=[[worker.node] for worker in most],
        hovertemplate="%{y} on %{customdata[0]}: %{x:.3f} GiB<extra></extra>",
    )
    drawn = figure([trace], xaxis={"title": "GiB", "rangemode": "tozero"})
    drawn.update_yaxes(autorange="reversed", type="category")
    shared = " Where several share a line, it is the one that took most." if len(lines) < len(workers) else ""
    return Plot(
        "Peak memory of each worker (GiB)",
        drawn,
        "Each bar is a worker, named shard.replica: resident memory of its process at its peak, on a GPU the memory "
        f"allocated there.{shared}",
        FRAME_HEIGHT + BAR_HEIGHT * len(lines),
    )
