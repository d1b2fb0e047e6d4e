"""The first line of a report: what a run gained, what it lost, and whether that is usual."""

import math

from shardprune.report.result import Latency, Perplexity, Result
from shardprune.report.usual_loss import DENSE, usual_loss, way_of

NO_DIFFERENCE = 1.03  # in perplexity: another draw of calibration windows makes as much


def verdict(result: Result) -> str:
    """Return the line for the result of a run.

    Of several texts it names the one whose perplexity rose most. The loss is compared with docs/quality.md where that
    has a row for the way of pruning: see `shardprune.report.usual_loss`.
    """
    gained, lost = _sizes(result)
    if result.evaluation and result.evaluation.latency:
        speeds, faster = _speeds(result.evaluation.latency)
        (gained if faster else lost).extend(speeds)
    measured = {source: entry for source, entry in result.perplexity.items() if entry.after is not None}
    worst = max(measured, key=lambda source: _change(measured[source]), default=None)
    if worst is None:
        return _line(gained, [*lost, "not measured (--eval)"])
    change = _change(measured[worst])
    (gained if change < 1 else lost).append(_perplexity(worst, measured[worst], change))
    line = _line(gained, lost)
    if not math.isfinite(measured[worst].after or math.nan):
        return f"{line} A model with such a perplexity is of no use: try {_remedies(result)}."
    return line + _judged(change, result)


def _line(gained: list[str], lost: list[str]) -> str:
    return f"Gained: {', '.join(gained) or 'nothing'}. Lost: {', '.join(lost) or 'nothing'}."


def _sizes(result: Result) -> tuple[list[str], list[str]]:
    """Return what a run gained and lost in parameters and zeros."""
    gained, lost = [], []
    size, sparsity = result.model, result.sparsity
    if size.removed > 0:
        gained.append(f"{size.removed:.1%} fewer parameters ({size.parameters_before:,} → {size.parameters_after:,})")
    if result.recovery:
        before, after = result.recovery.zeros_before, result.recovery.zeros_after
        if after < before:
            lost.append(f"zeros ({before:,} → {after:,})")
    elif sparsity and sparsity.projections and result.command != "rebuild":  # which moves zeros only
        now = f"{sparsity.achieved:.1%} of the projections' weights zero"
        if sparsity.left_zero is not None:
            now = f"{sparsity.left_zero:.1%} of the projections' remaining weights zero"
        had = sparsity.before or 0.0
        share = sparsity.achieved if sparsity.left_zero is None else sparsity.left_zero
        if had <= DENSE:
            gained.append(now)
        elif f"{had:.1%}" != f"{share:.1%}":  # of a model that was sparse
            (gained if share > had else lost).append(f"{had:.1%} → {now}")
    return gained, lost


def _speeds(latency: Latency) -> tuple[list[str], bool]:
    """Return the decoding speeds of the first batch that both models answered, if any, and whether they rose."""
    rates = {(speed.batch, speed.model): speed.decode.median for speed in latency.speeds}
    for (batch, model), dense in rates.items():
        pruned = rates.get((batch, "pruned"))
        if model == "dense" and pruned is not None:
            told = f"decoding {dense:,.1f} → {pruned:,.1f} tokens/s (batch {batch} on {latency.device})"
            return [told], pruned >= dense
    return [], False


def _change(measured: Perplexity) -> float:
    """Return perplexity after / perplexity before; infinite where the one after is not finite, 0 where the other is
    not."""
    before, after = measured.before, measured.after
    assert after is not None
    if not math.isfinite(after) or before <= 0:
        return math.inf
    return after / before if math.isfinite(before) else 0.0


def _perplexity(source: str, measured: Perplexity, change: float) -> str:
    times = f" ({change:.2f} times)" if 0 < change < math.inf else ""
    return f"perplexity on {source.rsplit('/', 1)[-1]} {measured.before:.3f} → {measured.after:.3f}{times}"


def _judged(change: float, result: Result) -> str:
    """Return a sentence, behind a space, that says whether a change of perplexity is usual, and what to try where it is
    more; nothing where docs/quality.md has no figures for the way of pruning."""
    way = way_of(result)
    row = usual_loss(way) if way else None
    if way is None or row is None or not 0 < change < math.inf:
        return ""
    usual, near = f"{row.least:.2f} to {row.most:.2f} times", row.is_near(way.share)
    if change > row.most * NO_DIFFERENCE:
        even = "" if near else "even "
        return f" That is more than is usual {even}for {row.name} on small models ({usual}): try {_remedies(result)}."
    if not near:
        return f" Nothing was measured at this share; usual for {row.name} on small models: {usual}."
    less = "less than " if change < row.least / NO_DIFFERENCE else ""
    return f" That is {less}usual for {row.name} on small models ({usual})."


def _remedies(result: Result) -> str:
    dial = ["--quality best"] if result.recipe.get("quality", "best") != "best" else []  # some commands have no dial
    less = "less sparsity" if result.sparsity and result.sparsity.projections else "removing less"
    return ", ".join([*dial, less, "or calibration text like the text that counts"])
