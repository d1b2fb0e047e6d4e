"""What every part does to perplexity, alone and together, by sparsity and calibration text.

    python -m benchmarks.quality --out DIR [--case MODEL EVAL NAME=SOURCE ...] [--only PATTERN ...] [--jobs N]

A case is a model (`bundled` for the one that comes with the package), the text that perplexity is measured on, and
calibration texts by name; `--case` can be given several times. Every case, setting (`--settings`) and text has a table:
perplexity, the share of SparseGPT's gap to the dense model on the same text that is closed, seconds of the method in
those of SparseGPT in the same table, its passes, and the achieved sparsity. benchmarks/quality/rows.py has the rows.

A row is kept in DIR as soon as it is measured, and is not measured again while its recipe stays the same, wherever
that was: DIR may come from another machine. `--only` takes the rows whose MODEL/TEXT/SETTING/ROW matches one of the
patterns (`*/self/0.7/*`), and what they are compared with; `--jobs` measures so many at the same time, in the order of
`--settings`, each process with `--threads` threads, all of them on the same GPU; `--there` prints what is there and
measures nothing. Texts are tokenised, and those that the model writes written, once for all rows.

`--pairs` measures every model's accuracy on pairs of sentences, too: the share of those whose good one is the likelier.

A row that fails is named under its table, and the exit code is 1 then.
"""

import argparse
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality.cases import Case
from benchmarks.quality.jobs import Job, carry_out, prepare
from benchmarks.quality.measuring import Measurer
from benchmarks.quality.rows import BASELINE, ROWS
from benchmarks.quality.store import Measured, Store, digest

DEFAULT = ["bundled", "stdlib", "same=stdlib", "self=self"]
SETTINGS = ["0.5", "0.6", "0.7", "0.8", "2:4", "4:8"]
HEADER = (
    "| | perplexity | of SparseGPT's gap closed | seconds, SparseGPT 1 | passes | sparsity |\n|---|---|---|---|---|---|"
)


class Table:
    """The rows of one case, setting and text."""

    def __init__(self, measurer: Measurer, text: str, setting: str, patterns: list[str]) -> None:
        self.measurer, self.text, self.setting = measurer, text, setting
        self.rows = {name: measurer.recipe(text, setting, fields) for name, fields in ROWS.items()}
        place = f"{measurer.case.name}/{text}/{setting}"
        self.wanted = [
            name for name in ROWS if any(fnmatch.fnmatchcase(f"{place}/{name}", pattern) for pattern in patterns)
        ]
        self.refused = {name: reason for name in self.wanted if (reason := measurer.refusal(self.rows[name]))}

    def missing(self) -> Iterator[Job]:
        """Yield the rows that are not there, SparseGPT's before all; rows that are the same recipe are one."""
        seen = set()
        for name in [BASELINE, *self.wanted] if self.wanted else []:
            if name in self.refused or self._found(name):
                continue
            decided = digest(self.measurer.decided(self.text, self.rows[name]))
            if decided not in seen:
                seen.add(decided)
                full = f"{self.measurer.case.name}/{self.text}/{self.setting}/{name}"
                yield Job(full, self.measurer, self.text, self.setting, self.rows[name])

    def lines(self) -> list[str]:
        """Return the table as it can be printed, with the rows that are there."""
        dense, baseline = self.measurer.found_dense(), self._found(BASELINE)
        if dense is None or baseline is None:
            return []
        rows = {name: row for name in self.wanted if name not in self.refused and (row := self._found(name))}
        lines = [_line(name, row, baseline, dense.perplexity) for name, row in rows.items()]
        left_out = [f"{name}: left out, {reason}" for name, reason in self.refused.items()]
        title = f"{self.measurer.case.name}, {self.setting}, calibrated on {self.text}; dense {dense.perplexity:.3f}"
        return [title, "", HEADER, *lines, "", *_accuracies({"dense": dense, **rows}), *left_out]

    def _found(self, name: str) -> Measured | None:
        return self.measurer.found(self.text, self.setting, self.rows[name])


def _line(name: str, row: Measured, baseline: Measured, dense: float) -> str:
    gap = baseline.perplexity - dense
    closed = f"{(baseline.perplexity - row.perplexity) / gap:.0%}" if gap > 0 else ""
    seconds = f"{row.seconds / baseline.seconds:.2f}" if baseline.seconds else ""
    return f"| {name} | {row.perplexity:.3f} | {closed} | {seconds} | {row.passes:.1f} | {row.sparsity:.4f} |"


def _accuracies(rows: dict[str, Measured]) -> list[str]:
    """Return a table of the accuracies on pairs of sentences, in percent; nothing where they were not measured."""
    tasks = list(next(iter(rows.values())).accuracies)
    if not tasks:
        return []
    lines = [f"| accuracy, % | mean | {' | '.join(task.replace('_', ' ') for task in tasks)} |"]
    lines.append("|---" * (len(tasks) + 2) + "|")
    for name, row in rows.items():
        values = [100 * row.accuracies[task] for task in tasks]
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in [sum(values) / len(values), *values])} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the measured rows")
    parser.add_argument("--case", action="append", nargs="+", metavar="WORD", help="MODEL EVAL NAME=SOURCE ...")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="sparsities and patterns")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="MODEL/TEXT/SETTING/ROW, with * and ?"
    )
    parser.add_argument("--there", action="store_true", help="print the rows that are there, and measure none")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-windows", type=int, default=300)
    parser.add_argument(
        "--pairs", metavar="DIR", help="files of pairs of sentences, such as BLiMP's, one for each task"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="compute dtype")
    parser.add_argument("--backend", default="local", help="ray: all GPUs of the cluster for each row, with --jobs 1")
    parser.add_argument("--weights", default="resident")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="rows measured at the same time")
    args = parser.parse_args()
    try:
        cases = [Case.parse(words) for words in args.case or [DEFAULT]]
    except ValueError as error:
        parser.error(f"--case: {error}")

    workers: dict[str, Any] = {name: getattr(args, name) for name in ("backend", "device", "dtype", "threads")}
    workers["weights"] = args.weights
    text = {name: getattr(args, name) for name in ("samples", "seqlen", "seed")}
    store = Store(Path(args.out).absolute())
    measurers = [Measurer(case, store, workers, text, args.eval_windows, args.pairs) for case in cases]
    tables = [
        Table(measurer, name, setting, args.only)
        for setting in args.settings
        for measurer in measurers
        for name in measurer.case.texts
    ]
    if not any(table.wanted for table in tables):
        sys.exit(f"--only {' '.join(args.only)}: matches no row")
    failed: list[str] = []
    if not args.there:
        jobs = [job for table in tables for job in table.missing()]
        prepare([measurer for measurer in measurers if any(job.measurer is measurer for job in jobs)])
        failed = carry_out(jobs, args.jobs, measurers[0].warm_up if args.device == "cuda" else None)
    for table in tables:
        if table.wanted and (lines := table.lines()):
            print("\n".join(lines), flush=True)
    if failed:
        print("\n".join(failed))
        sys.exit(1)


if __name__ == "__main__":
    main()
