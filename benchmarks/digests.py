"""CPU seconds that a run spends on digests of what it reads and writes, and on looking whether its model has changed.

    python -m benchmarks.digests [--methods sparsegpt wanda magnitude] [--layers 4] [--hidden 1024] [--repeats 3]

Prunes a Llama of random weights in one process, and prints the CPU seconds of the run that took the least of several
and those of the functions that make digests and stamps. They are those of all threads, and what else the machine does
changes them little.
"""

import argparse
import functools
import pkgutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.writing_behind import make_model
from shardprune import Recipe, prune
from shardprune.report.progress import Reporter

WATCHING = (
    "shardprune.model.sources.tensor_digest",
    "shardprune.model.sources.stamps_of",
    "shardprune.storage.journal.tensor_digest",
    "shardprune.storage.journal.stored_digest",
    "shardprune.commands.state.RunState._written",
)


@contextmanager
def timed(spent: list[float]) -> Iterator[None]:
    """Add up the CPU seconds of all calls of WATCHING, whichever thread makes them, for the duration of the block."""

    def watch(name: str) -> Any:
        function = pkgutil.resolve_name(name)

        @functools.wraps(function)
        def called(*args: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                spent.append(time.thread_time() - started)

        return mock.patch(name, called)

    with ExitStack() as stack:
        for name in WATCHING:
            stack.enter_context(watch(name))
        yield


def prune_once(folder: Path, args: argparse.Namespace, method: str) -> float:
    """Prune the model; return the CPU seconds of the process."""
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
    recipe, started = Recipe.checked(values), time.process_time()
    prune(recipe, Reporter(quiet=True))
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda", "magnitude"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder, args)
        size = sum(parameter.nbytes for parameter in model.parameters())
        print(f"{size / 1e6:.0f} MB, {args.samples * args.seqlen} tokens, least of {args.repeats}")
        print("| method | CPU of the run | of it digests and stamps | share |\n|---|---|---|---|")
        for method in args.methods:
            found = []
            for _ in range(args.repeats + 1):
                spent: list[float] = []
                with timed(spent):
                    found.append((prune_once(folder, args, method), sum(spent)))
            run, watching = min(found[1:])  # the first one also imports
            print(f"| {method} | {run:.2f} s | {watching:.3f} s | {watching / run:.1%} |", flush=True)


if __name__ == "__main__":
    main()
