"""What fine-tuning gives back to a pruned model, and what it leaves of its zeros.

    python -m benchmarks.recovery [--model DIR --calibration SOURCE --data SOURCE --eval SOURCE] [--workers 2]

Prunes the model twice: to `--sparsity` with SparseGPT, and to `--remove` fewer parameters with MoP (`--models`: one of
both). Each is then fine-tuned in every way (low-rank updates, all weights; of the sparse one with its zeros kept,
and once without) under every stage of ZeRO in `--zero`, with every weight of a teacher, the original model, in
`--teacher-weights`. Prints a row for each: perplexity before and after, seconds of the training, zeros of the
projections before and after, and how many of them stand where there was one.
"""

import argparse
import itertools
import tempfile

from benchmarks.options import add_training, parser_of, training_fields
from shardprune import MopRecipe, Recipe, RecoverRecipe, mop, prune, recover
from shardprune.report.progress import Reporter
from shardprune.report.result import Result

WAYS = {
    "sparse": {
        "low rank, zeros kept": {"keep_sparsity": True},
        "all weights, zeros kept": {"keep_sparsity": True, "full": True},
        "low rank": {},
    },
    "MoP": {"low rank": {}, "all weights": {"full": True}},
}
QUIET = Reporter(quiet=True)


def row(name: str, way: str, zero: int, result: Result) -> str:
    (measured,) = result.perplexity.values()
    done = result.recovery
    zeros = (f"{count:,}" for count in (done.zeros_before, done.zeros_after, done.zeros_kept))
    seconds = f"{result.seconds['train']:.0f}"
    teacher = f"{result.recipe['teacher_weight']:g}" if result.recipe["teacher"] else "0"
    cells = (name, way, teacher, str(zero), f"{measured.before:.3f}", f"{measured.after:.3f}", seconds, *zeros)
    return f"| {' | '.join(cells)} |"


def pruned(options: argparse.Namespace, folder: str) -> dict[str, str]:
    """The models that are fine-tuned, by name."""
    shared = {
        "model": options.model,
        "calibration": options.calibration,
        "samples": options.samples,
        "seqlen": options.seqlen,
        "backend": "local",
    }
    models = {name: f"{folder}/{name}" for name in options.models}
    if out := models.get("sparse"):
        prune(Recipe.checked({**shared, "out": out, "sparsity": options.sparsity, "measure_error": False}), QUIET)
    if out := models.get("MoP"):
        mop(MopRecipe.checked({**shared, "out": out, "remove": options.remove}), QUIET)
    return models


def main() -> None:
    parser = parser_of(__doc__)
    add_training(parser)
    parser.add_argument("--models", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--remove", type=float, default=0.3)
    parser.add_argument("--zero", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--rates", type=float, nargs=2, default=[2e-3, 5e-4], help="low-rank updates, all weights")
    parser.add_argument("--teacher-weights", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--backend", default="ray")
    options = parser.parse_args()
    shared = training_fields(options) | {"workers": options.workers, "backend": options.backend}
    print("| model | trained | teacher | ZeRO | before | after | seconds | zeros before | after | where one was |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = pruned(options, folder)
        ways = [(name, way, fields) for name in models for way, fields in WAYS[name].items()]
        for (name, way, fields), weight, zero in itertools.product(ways, options.teacher_weights, options.zero):
            teaching = {"teacher": options.model, "teacher_weight": weight, "temperature": 1.0} if weight else {}
            rate = options.rates["full" in fields]
            with tempfile.TemporaryDirectory() as out:
                values = {**shared, **fields, **teaching, "model": models[name], "out": f"{out}/out", "zero": zero}
                result = recover(RecoverRecipe.checked({**values, "learning_rate": rate}), QUIET)
            done = result.recovery
            assert not fields.get("keep_sparsity") or done.zeros_kept == done.zeros_before == done.zeros_after
            print(row(name, way, zero, result), flush=True)


if __name__ == "__main__":
    main()
