"""What a command prints on standard output when it is done."""

import json
from typing import Any

from rich.console import Console


def print_result(result: Any, settings: Any = None) -> None:
    """What a run achieved and, with its settings, where its report is."""
    from shardprune.result import EvaluationResult
    from shardprune.summary import evaluation_summary, summary

    Console().print(evaluation_summary(result) if isinstance(result, EvaluationResult) else summary(result))
    if settings and settings.report:
        print_place_of_report(settings.out or result.recipe["out"])


def print_place_of_report(out: str | None) -> None:
    """Where the report of an output is; nothing where there is no output, or it has none."""
    from shardprune.report.report import report_of

    if out and (place := report_of(out)):
        print(f"report: {place}")


def print_plan(planned: Any, as_json: bool) -> int:
    """What a run will take; the exit code."""
    from shardprune.planning.report import show

    if as_json:
        print(json.dumps(planned.as_json(), indent=1))
    else:
        show(planned, Console())
    return 0 if planned.fits else 1
