"""CPU seconds that a run spends on digests of what it reads and writes, and on looking whether its model has changed.

    python -m benchmarks.digests [--methods sparsegpt wanda magnitude] [--layers 4] [--hidden 1024] [--repeats 5]

Prunes a Llama of random weights in one process, in turn as it is and without digests, and prints the medians: the CPU
seconds of the run and of its prune step, those of the functions that make digests and stamps, and those of the prune
step of the runs without. They are those of all threads, and what else the machine does changes them little.
"""

import argparse
import functools
import pkgutil
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from benchmarks.writing_behind import make_model
from shardprune import Recipe, prune
from shardprune.report.events import Events
from shardprune.report.progress import Reporter

Watch = Callable[[list[float]], AbstractContextManager[None]]

WATCHING = (
    "shardprune.model.sources.tensor_digest",
    "shardprune.model.sources.stamps_of",
    "shardprune.storage.journal.tensor_digest",
    "shardprune.storage.journal.stored_digest",
    "shardprune.storage.journal.pieces_digest",
    "shardprune.model.sources.SourceTensor.passed",
    "shardprune.commands.state.RunState._written",
)

SAME = "0" * 32  # the digest of all data in a run without


@contextmanager
def timed(spent: list[float]) -> Iterator[None]:
    """Add up the CPU seconds of all calls of WATCHING, whichever thread makes them, for the duration of the block."""
    within = threading.local()  # calls of one another count once

    def watch(name: str) -> Any:
        function = pkgutil.resolve_name(name)

        @functools.wraps(function)
        def called(*args: Any, **options: Any) -> Any:
            if getattr(within, "call", False):
                return function(*args, **options)
            within.call, started = True, time.thread_time()
            try:
                return function(*args, **options)
            finally:
                within.call = False
                spent.append(time.thread_time() - started)

        return mock.patch(name, called)

    with ExitStack() as stack:
        for name in WATCHING:
            stack.enter_context(watch(name))
        yield


@contextmanager
def without_digests(_spent: list[float]) -> Iterator[None]:
    """Give all data the same digest for the duration of the block, without a look at them."""
    with ExitStack() as stack:
        for name in WATCHING:
            if name.endswith("_digest"):
                stack.enter_context(mock.patch(name, return_value=SAME))
        streamed = "shardprune.storage.digests.StreamedDigest"
        stack.enter_context(mock.patch(f"{streamed}.update", return_value=None))
        stack.enter_context(mock.patch(f"{streamed}.hexdigest", return_value=SAME))
        yield


@dataclass(frozen=True)
class Spent:
    """CPU seconds of the process, and those of digests and stamps."""

    all: float
    watching: float


class PhaseCosts(Events):
    """Events that note what is spent between the beginning and the end of the prune step."""

    def __init__(self, spent: list[float]) -> None:
        super().__init__()
        self._spent = spent
        self.prune = Spent(0, 0)

    def emit(self, event: str, **fields: Any) -> None:
        if fields.get("phase") == "prune":
            sign = 1 if event == "end" else -1
            all_, watching = self.prune.all + sign * time.process_time(), self.prune.watching + sign * sum(self._spent)
            self.prune = Spent(all_, watching)
        super().emit(event, **fields)


def prune_once(folder: Path, args: argparse.Namespace, method: str, watch: Watch) -> tuple[Spent, Spent]:
    """Prune the model; return what the run takes, and its prune step."""
    values = {
        "model": str(folder / "model"),
        "out": tempfile.mkdtemp(dir=folder),
        "calibration": str(folder / "tokens.npy"),
        "samples": args.samples,
        "seqlen": args.seqlen,
        "method": method,
        "sparsity": 0.5,
        "weights": "streamed",
        "backend": "local",
        "threads": 1,
        "report": False,
    }
    spent: list[float] = []
    recipe, reporter, started = Recipe.checked(values), Reporter(quiet=True), time.process_time()
    reporter.events = costs = PhaseCosts(spent)
    with watch(spent):
        prune(recipe, reporter)
    shutil.rmtree(values["out"])
    return Spent(time.process_time() - started, sum(spent)), costs.prune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda", "magnitude"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder, args)
        size = sum(parameter.nbytes for parameter in model.parameters())
        print(f"{size / 1e6:.0f} MB, {args.samples * args.seqlen} tokens, medians of {args.repeats}")
        print(
            "| method | run | of it digests and stamps | prune step | of it digests and stamps | prune step without |"
        )
        print("|---|---|---|---|---|---|")
        for method in args.methods:
            prune_once(folder, args, method, timed)  # which also imports
            found, without = [], []
            for _ in range(args.repeats):
                found.append(prune_once(folder, args, method, timed))
                without.append(prune_once(folder, args, method, without_digests)[1].all)
            cells = [cell for spent in zip(*found, strict=True) for cell in _cells(spent)]
            print(f"| {method} | {' | '.join(cells)} | {median(without):.2f} s |", flush=True)


def _cells(found: Sequence[Spent]) -> tuple[str, str]:
    watching, share = median(one.watching for one in found), median(one.watching / one.all for one in found)
    return f"{median(one.all for one in found):.2f} s", f"{watching:.3f} s, {share:.1%}"


if __name__ == "__main__":
    main()
