"""The timeline of a run: its phases, and the kind of work of every worker over time."""

from collections.abc import Iterator
from dataclasses import dataclass

import plotly.graph_objects as go

from shardprune.report.page.history import TRAINING, History, Stint
from shardprune.report.page.plot import Plot, figure
from shardprune.report.page.workers import Key, lines_of

COLUMNS = 240  # of the timeline; in each, a worker does what took most of its time
ROW_HEIGHT = 30  # pixels
FRAME_HEIGHT = 230
PHASES = "phases"

IDLE = "idle"
STYLES = {  # colour and pattern of each kind of work: those of `shard.ledger.Kind`, and training
    "read": ("#56B4E9", "."),
    "forward": ("#0072B2", "/"),
    "statistics": ("#CC79A7", "\\"),
    "solve": ("#D55E00", ""),
    "propagate": ("#009E73", "-"),
    "write": ("#E69F00", "x"),
    TRAINING: ("#D55E00", "+"),
    "exchange": ("#8C8C8C", "|"),
    IDLE: ("rgba(140,140,140,0.18)", ""),  # and outlined
}
PATTERN = {"fillmode": "overlay", "size": 5, "solidity": 0.2, "fgcolor": "white"}
PHASE_COLORS = ("#BFE3F7", "#F5D9A0")  # in turn: their names stand in them


@dataclass(frozen=True)
class Row:
    """One line of the timeline: the kind of work of its workers in every column (None: no worker), and their idle
    share."""

    label: str
    kinds: list[str | None]
    idle: float


def timeline(history: History) -> Plot:
    """Return the plot of phases and workers over the seconds of the run, with interruptions marked."""
    seconds = history.at(history.end) or 1.0
    scale, unit = _unit(seconds)
    rows = _rows(history, seconds / COLUMNS)
    labels = [PHASES, *(f"{row.label} · {row.idle:.0%} idle" for row in rows)]
    traces = [_phases(history, scale, unit)]
    for kind in STYLES:
        bars = [
            (label, first, last)
            for label, row in zip(labels[1:], rows, strict=True)
            for of, first, last in _runs(row.kinds)
            if of == kind
        ]
        if bars:
            traces.append(_bars(kind, bars, seconds / COLUMNS / scale, unit))
    drawn = figure(traces, barmode="overlay", bargap=0.2, uniformtext={"mode": "hide", "minsize": 9})
    drawn.update_xaxes(title=f"time ({unit})", range=[0, seconds / scale])
    drawn.update_yaxes(type="category", categoryorder="array", categoryarray=labels[::-1])
    for number, entry in enumerate(history.interruptions, 1):
        drawn.add_vline(
            x=history.at(entry.time) / scale,
            line={"dash": "dash", "color": "#D55E00", "width": 2},
            annotation={"text": f"↻{number}", "yanchor": "bottom"},
        )
    drawn.update_layout(margin_t=30)
    height = FRAME_HEIGHT + ROW_HEIGHT * len(labels)
    return Plot(f"Timeline of the workers ({unit})", drawn, _text(history), height, wide=True)


def _rows(history: History, column: float) -> list[Row]:
    """Return the lines of all workers, in the order of shards and replicas."""
    return [_row(name, keys, history, column) for name, keys in lines_of(list({stint.key for stint in history.stints}))]


def _row(name: str, keys: list[Key], history: History, column: float) -> Row:
    stints = [stint for stint in history.stints if stint.key in keys]
    busy: list[dict[str, float]] = [{} for _ in range(COLUMNS)]
    there = [0.0] * COLUMNS
    for stint in stints:
        for place, seconds in _columns(history.at(stint.start), history.at(stint.end), column):
            there[place] += seconds
        for work in stint.work:
            start, end = history.at(work.start), history.at(work.end)
            share = work.busy / (end - start) if end > start else 0.0
            for place, seconds in _columns(start, end, column):
                busy[place][work.kind] = busy[place].get(work.kind, 0.0) + min(1.0, share) * seconds
    kinds = [_kind(took, present, column) for took, present in zip(busy, there, strict=True)]
    return Row(name, kinds, _idle(stints))


def _columns(start: float, end: float, column: float) -> Iterator[tuple[int, float]]:
    """Yield the columns that a stretch of time covers, and its seconds in each."""
    for place in range(int(start / column), min(COLUMNS, int(end / column) + 1)):
        seconds = min(end, (place + 1) * column) - max(start, place * column)
        if seconds > 0:
            yield place, seconds


def _kind(took: dict[str, float], there: float, column: float) -> str | None:
    """Return the kind of work that took most of a column; idle if the workers were busy for less than half of the time
    in which they existed."""
    if there < column / 2 and not took:
        return None
    if sum(took.values()) < there / 2:
        return IDLE
    return max(took, key=lambda kind: took[kind])


def _idle(stints: list[Stint]) -> float:
    there = sum(stint.end - stint.start for stint in stints)
    busy = sum(work.busy for stint in stints for work in stint.work)
    return max(0.0, 1 - busy / there) if there else 0.0


def _runs(kinds: list[str | None]) -> list[tuple[str, int, int]]:
    """Return runs of neighbouring columns of one kind: the kind, the first column, the one after the last."""
    found: list[tuple[str, int, int]] = []
    for place, kind in enumerate(kinds):
        if kind is None:
            continue
        if found and found[-1][0] == kind and found[-1][2] == place:
            found[-1] = (kind, found[-1][1], place + 1)
        else:
            found.append((kind, place, place + 1))
    return found


def _bars(kind: str, bars: list[tuple[str, int, int]], column: float, unit: str) -> go.Bar:
    color, pattern = STYLES[kind]
    return go.Bar(
        name=kind,
        orientation="h",
        y=[label for label, _, _ in bars],
        base=[first * column for _, first, _ in bars],
        x=[(last - first) * column for _, first, last in bars],
        marker={
            "color": color,
            "line": {"color": "#8C8C8C", "width": int(kind == IDLE)},
            "pattern": PATTERN | {"shape": pattern},
        },
        hovertemplate=f"{kind}: %{{x:.3g}} {unit} from %{{base:.3g}}<extra></extra>",
    )


def _phases(history: History, scale: float, unit: str) -> go.Bar:
    phases = [(name, history.at(start) / scale, history.at(end) / scale) for name, start, end in history.phases]
    return go.Bar(
        name=PHASES,
        showlegend=False,
        orientation="h",
        y=[PHASES] * len(phases),
        base=[start for _, start, _ in phases],
        x=[end - start for _, start, end in phases],
        text=[name for name, _, _ in phases],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        marker={"color": [PHASE_COLORS[place % 2] for place in range(len(phases))], "line_width": 0},
        hovertemplate=f"%{{text}}: %{{x:.3g}} {unit} from %{{base:.3g}}<extra></extra>",
    )


def _unit(seconds: float) -> tuple[float, str]:
    if seconds < 180:
        return 1.0, "s"
    return (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")


def _text(history: History) -> str:
    told = (
        "Each line is a worker, named shard.replica: what took most of its time in each of "
        f"{COLUMNS} stretches, and idle where it was at work for less than half of it."
    )
    if any(work.kind == TRAINING for stint in history.stints for work in stint.work):
        told += " Processes of a training keep no account of their own and count as busy throughout."
    marks = []
    for number, entry in enumerate(history.interruptions, 1):
        silent = f" after {entry.silent:,.0f} s, which are left out" if entry.new_driver else ""
        marks.append(f" ↻{number}: {entry.what}{silent}.")
    return told + "".join(marks)
