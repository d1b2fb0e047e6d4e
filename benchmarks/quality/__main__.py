"""What every part does to perplexity, alone and together, by sparsity and calibration text.

    python -m benchmarks.quality --out DIR [--case MODEL EVAL NAME=SOURCE ...] [--only PATTERN ...]

A case is a model (`bundled` for the one that comes with the package), the text that perplexity is measured on, and
calibration texts by name; `--case` can be given several times. Every case, setting (`--settings`) and text has a table:
perplexity, the share of SparseGPT's gap to the dense model on the same text that is closed, seconds of the method in
those of SparseGPT in the same table, its passes, and the achieved sparsity. benchmarks/quality/rows.py has the rows.

A row is kept in DIR as soon as it is measured, and is not measured again while its recipe stays the same. `--only`
takes the rows whose MODEL/TEXT/SETTING/ROW matches one of the patterns (`*/self/0.7/*`), and what they are compared
with. Text that the model writes is written once for all rows.
"""

import argparse
import fnmatch
import sys
from pathlib import Path
from typing import Any

from benchmarks.quality.measuring import Case, Measurer
from benchmarks.quality.rows import BASELINE, ROWS
from benchmarks.quality.store import Measured, Store

DEFAULT = ["bundled", "stdlib", "same=stdlib", "self=self"]
SETTINGS = ["0.5", "0.6", "0.7", "0.8", "2:4", "4:8"]
HEADER = (
    "| | perplexity | of SparseGPT's gap closed | seconds, SparseGPT 1 | passes | sparsity |\n|---|---|---|---|---|---|"
)


def line(name: str, row: Measured, baseline: Measured, dense: float) -> str:
    gap = baseline.perplexity - dense
    closed = f"{(baseline.perplexity - row.perplexity) / gap:.0%}" if gap > 0 else ""
    seconds = f"{row.seconds / baseline.seconds:.2f}" if baseline.seconds else ""
    return f"| {name} | {row.perplexity:.3f} | {closed} | {seconds} | {row.passes:.1f} | {row.sparsity:.4f} |"


def table(measurer: Measurer, text: str, setting: str, patterns: list[str]) -> list[str]:
    """Measure one table, and return its lines; rows that cannot be made are named at the end."""
    case = measurer.case
    wanted = {
        name: fields
        for name, fields in ROWS.items()
        if any(fnmatch.fnmatchcase(f"{case.name}/{text}/{setting}/{name}", pattern) for pattern in patterns)
    }
    if not wanted:
        return []
    dense = measurer.dense()
    baseline = measurer.row((text, setting, BASELINE), measurer.recipe(text, setting, ROWS[BASELINE]))
    lines, left_out = [], []
    for name, fields in wanted.items():
        recipe = measurer.recipe(text, setting, fields)
        if reason := measurer.refusal(recipe):
            left_out.append(f"{name}: left out, {reason}")
        else:
            lines.append(line(name, measurer.row((text, setting, name), recipe), baseline, dense))
    return [f"{case.name}, {setting}, calibrated on {text}; dense {dense:.3f}", "", HEADER, *lines, "", *left_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the measured rows")
    parser.add_argument("--case", action="append", nargs="+", metavar="WORD", help="MODEL EVAL NAME=SOURCE ...")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="sparsities and patterns")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="MODEL/TEXT/SETTING/ROW, with * and ?"
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-windows", type=int, default=300)
    parser.add_argument("--backend", default="local", help="ray: all GPUs of the cluster")
    parser.add_argument("--weights", default="resident")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    try:
        cases = [Case.parse(words) for words in args.case or [DEFAULT]]
    except ValueError as error:
        parser.error(f"--case: {error}")

    workers: dict[str, Any] = {"backend": args.backend, "weights": args.weights, "threads": args.threads}
    text = {"samples": args.samples, "seqlen": args.seqlen, "seed": args.seed}
    measuring = {"windows": args.eval_windows, "seqlen": args.seqlen}
    store = Store(Path(args.out).absolute())
    found = False
    for case in cases:
        measurer = Measurer(case, store, {**workers, **text}, {**workers, **measuring})
        for setting in args.settings:
            for name in case.texts:
                if lines := table(measurer, name, setting, args.only):
                    found = True
                    print("\n".join(lines), flush=True)
    if not found:
        sys.exit(f"--only {' '.join(args.only)}: matches no row")


if __name__ == "__main__":
    main()
