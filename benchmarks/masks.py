"""Perplexity of every method with every allocation, with and without rebuilt masks.

    python -m benchmarks.masks [--model DIR --calibration SOURCE --eval SOURCE] [--sparsity 0.7]

Prunes the model once for each of `--methods` (magnitude, wanda, sparsegpt) x `--allocations` (uniform, owl, mosaic) x
{none, barber at each of `--thresholds`}; for methods that correct weights also with the corrected ones kept. Prints a
row for each: perplexity, achieved sparsity, pairs of weights swapped, and the mean relative error of a block's output
before and after that. `--jobs` runs go at the same time, each in a process of its own with `--threads` threads;
`--weights streamed` keeps one layer of a large model in memory.
"""

import itertools
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.options import parser_of
from shardprune import Recipe, prune
from shardprune.report.progress import Reporter
from shardprune.report.result import Result

METHODS = ("magnitude", "wanda", "sparsegpt")
CORRECTING = ("sparsegpt",)
ERRORS = ("error_before", "error_after")
ALLOCATIONS = ("uniform", "owl", "mosaic")


def run(values: dict) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return prune(Recipe.checked({**values, "out": f"{folder}/out"}), Reporter(quiet=True))


def row(result: Result) -> str:
    recipe = result.recipe
    (measured,) = result.perplexity.values()
    rebuilt, swaps, errors = recipe["rebuild"], "", ""
    if blocks := result.sparsity.blocks:
        rebuilt += f" {recipe['rebuild_threshold']:g}" + (" corrected" if recipe["keep_corrected"] else "")
        swaps = f"{sum(block.swaps for block in blocks):,}"
        before, after = (sum(getattr(block, name) for block in blocks) / len(blocks) for name in ERRORS)
        errors = f"{before:.4f} -> {after:.4f}"
    achieved = f"{result.sparsity.achieved:.4f}"
    cells = (recipe["method"], recipe["allocation"], rebuilt, f"{measured.after:.3f}", achieved, swaps, errors)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--allocations", nargs="*", choices=ALLOCATIONS, default=ALLOCATIONS)
    parser.add_argument("--outlier-m", type=float, default=5.0)
    parser.add_argument("--outlier-lambda", type=float, default=0.08)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.01, 0.1, 0.5])
    parser.add_argument("--granularity", default="row")
    parser.add_argument("--weights", default="resident")
    parser.add_argument("--backend", default="local", help="ray: all GPUs of the cluster for each run; with --jobs 1")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    common = {
        name: getattr(args, name)
        for name in ("model", "calibration", "sparsity", "samples", "seqlen", "weights", "threads", "eval_windows")
    }
    common |= {"eval": (args.eval,), "backend": args.backend}
    outliers = {"outlier_m": args.outlier_m, "outlier_lambda": args.outlier_lambda}
    barber = {"rebuild": "barber", "rebuild_granularity": args.granularity}
    recipes = []
    for method, allocation in itertools.product(args.methods, args.allocations):
        fields = {**common, "method": method, "allocation": allocation, **(outliers if allocation != "uniform" else {})}
        recipes.append(fields)
        for corrected in (False, True) if method in CORRECTING else (False,):
            for threshold in args.thresholds:
                recipes.append({**fields, **barber, "rebuild_threshold": threshold, "keep_corrected": corrected})

    print("| method | allocation | rebuild | perplexity | sparsity | pairs swapped | error of a block |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        result = None
        for result in pool.map(run, recipes):
            print(row(result), flush=True)
            assert abs(result.sparsity.achieved - args.sparsity) < 5e-5, "not the sparsity that was asked for"
    assert result is not None
    (measured,) = result.perplexity.values()
    print(f"dense: {measured.before:.3f}, {measured.windows} windows of {measured.seqlen}")


if __name__ == "__main__":
    main()
