"""What fine-tuning gives back to a pruned model, and what it leaves of its zeros.

    python -m tests.benchmarks.recovery [--model DIR --calibration SOURCE --data SOURCE --eval SOURCE] [--workers 2]

Prunes the model twice: to `--sparsity` with SparseGPT, and to `--remove` fewer parameters with MoP. Each of the two is
then fine-tuned in every way (low-rank updates, all weights; of the sparse one with its zeros kept, and once without)
under every stage of ZeRO in `--zero`, with the original model as a teacher where `--teacher-weight` is not 0. Prints a
row for each: perplexity before and after, seconds of the training, zeros of the projections before and after, and how
many of them stand where there was one.
"""

import argparse
import tempfile

from shardprune import MopRecipe, Recipe, RecoverRecipe, mop, prune, recover
from shardprune.demo import bundled_model
from shardprune.progress import Output
from shardprune.result import Result

WAYS = {
    "sparse": {
        "low rank, zeros kept": {"keep_sparsity": True},
        "all weights, zeros kept": {"keep_sparsity": True, "full": True},
        "low rank": {},
    },
    "MoP": {"low rank": {}, "all weights": {"full": True}},
}
QUIET = Output(quiet=True)


def row(name: str, way: str, zero: int, result: Result) -> str:
    (measured,) = result.perplexity.values()
    done = result.recovery
    zeros = (f"{count:,}" for count in (done.zeros_before, done.zeros_after, done.zeros_kept))
    seconds = f"{result.seconds['train']:.0f}"
    cells = (name, way, str(zero), f"{measured.before:.3f}", f"{measured.after:.3f}", seconds, *zeros)
    return f"| {' | '.join(cells)} |"


def pruned(options: argparse.Namespace, folder: str) -> dict[str, str]:
    """The two models that are fine-tuned, by name."""
    shared = {
        "model": options.model,
        "calibration": options.calibration,
        "samples": options.samples,
        "seqlen": options.seqlen,
        "backend": "local",
    }
    sparse, smaller = f"{folder}/sparse", f"{folder}/smaller"
    prune(Recipe.checked({**shared, "out": sparse, "sparsity": options.sparsity, "measure_error": False}), QUIET)
    mop(MopRecipe.checked({**shared, "out": smaller, "remove": options.remove}), QUIET)
    return {"sparse": sparse, "MoP": smaller}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--eval", default="stdlib")
    parser.add_argument("--eval-windows", type=int)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--remove", type=float, default=0.3)
    parser.add_argument("--zero", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--teacher-weight", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="ray")
    options = parser.parse_args()
    shared = {
        "data": options.data,
        "eval": options.eval,
        "eval_windows": options.eval_windows,
        "seqlen": options.seqlen,
        "length": options.seqlen,
        "steps": options.steps,
        "learning_rate": options.rate,
        "workers": options.workers,
        "threads": options.threads,
        "backend": options.backend,
    }
    if options.teacher_weight:
        shared |= {"teacher": options.model, "teacher_weight": options.teacher_weight, "temperature": 1.0}
    print("| model | trained | ZeRO | before | after | seconds | zeros before | after | of them where one was |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, model in pruned(options, folder).items():
            for way, fields in WAYS[name].items():
                for zero in options.zero:
                    with tempfile.TemporaryDirectory() as out:
                        values = {**shared, **fields, "model": model, "out": f"{out}/out", "zero": zero}
                        result = recover(RecoverRecipe.checked(values), QUIET)
                    assert not fields.get("keep_sparsity") or result.recovery.zeros_kept == result.recovery.zeros_before
                    print(row(name, way, zero, result), flush=True)


if __name__ == "__main__":
    main()
