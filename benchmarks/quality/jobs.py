"""Rows that are measured at the same time, each in one of several processes."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from benchmarks.quality.measuring import Measurer


@dataclass(frozen=True)
class Job:
    """A row that is not there, and its name for people."""

    name: str
    measurer: Measurer
    text: str
    setting: str
    recipe: dict[str, Any]


def prepare(measurers: Sequence[Measurer]) -> None:
    """Make the texts of all cases, and measure their models as they are."""
    for measurer in measurers:
        measurer.texts.prepare()
        measurer.measure_dense()


def carry_out(jobs: Sequence[Job], processes: int, warm_up: Callable[[], None] | None) -> list[str]:
    """Measure all rows, as many at a time as there are processes, in this one if it is to be one.

    Args:
        warm_up: is called once in each process before its first row.

    Returns:
        What went wrong, a line for each row that could not be measured; the others go on.
    """
    if not jobs:
        return []
    if processes == 1:
        if warm_up:
            warm_up()
        return [line for job in jobs if (line := _measured(job))]
    with ProcessPoolExecutor(processes, get_context("spawn"), warm_up or _nothing) as pool:
        done = [pool.submit(_measured, job) for job in jobs]
        return [line for future in as_completed(done) if (line := future.result())]


def _measured(job: Job) -> str | None:
    try:
        measured = job.measurer.measure(job.text, job.setting, job.recipe)
    except Exception as error:  # of one row of hundreds; the run's exit code says so
        line = f"{job.name}: failed, {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(line, file=sys.stderr, flush=True)
        return line
    print(f"{job.name}: {measured.perplexity:.3f}", file=sys.stderr, flush=True)
    return None


def _nothing() -> None: ...
