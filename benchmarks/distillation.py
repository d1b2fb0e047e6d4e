"""A teacher's stored predictions beside a live teacher: losses, perplexity, CPU seconds and bytes.

    python -m benchmarks.distillation [--model DIR --calibration SOURCE --data SOURCE --eval SOURCE] [--tops 64 256]

Prunes the model with SparseGPT to `--sparsity` and trains low-rank updates with its zeros kept, the original model as
the only source of the loss: once live, and once from each number of stored predictions in `--tops`. Prints the loss of
held-out rows of the data (cross entropy, without the teacher) over the steps, and a row for each training: perplexity
before and after, CPU seconds of the process, bytes of the stored predictions, and the planned peak of its memory.
"""

import argparse
import tempfile
import time

from benchmarks.options import add_training, parser_of
from shardprune import EvaluateRecipe, Recipe, RecoverRecipe, evaluate, prune, recover
from shardprune.cluster.local_backend import LocalBackend
from shardprune.commands.prepare_recovery import prepare_recovery
from shardprune.report.progress import Reporter
from shardprune.report.result import Result

QUIET = Reporter(quiet=True)


class Training:
    """One training, and what it took."""

    def __init__(self, options: argparse.Namespace, sparse: str, folder: str, top: int | None) -> None:
        self.name = "live" if top is None else f"{top} stored"
        out = f"{folder}/{self.name}"
        values = {
            **{"model": sparse, "out": out, "data": options.data, "length": options.seqlen, "steps": options.steps},
            **{"batch": options.batch, "learning_rate": options.rate, "keep_sparsity": True, "backend": "local"},
            **{"teacher": options.model, "teacher_weight": 1.0, "temperature": 1.0, "teacher_top": top},
            **{"held_out": 0.05, "evaluate_every": options.every, "threads": options.threads, "report": False},
        }
        recipe = RecoverRecipe.checked(values)
        prepared = prepare_recovery(recipe, LocalBackend())
        assert prepared.need is not None
        self.planned = prepared.need.bytes
        self.stored = prepared.teacher_store.bytes if prepared.teacher_store else 0
        begun = time.process_time()
        self.result: Result = recover(recipe, QUIET)
        self.seconds = time.process_time() - begun
        self.perplexity = measured(options, out)


def measured(options: argparse.Namespace, model: str) -> float:
    """Return the perplexity of a model."""
    values = {"perplexity": options.eval, "seqlen": options.seqlen, "windows": options.eval_windows}
    with tempfile.TemporaryDirectory() as folder:
        recipe = EvaluateRecipe.checked({**values, "model": model, "out": f"{folder}/out", "backend": "local"})
        (found,) = evaluate(recipe, QUIET).evaluation.perplexity.values()
    return found.value


def main() -> None:
    parser = parser_of(__doc__)
    add_training(parser)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--every", type=int, default=16, help="steps between held-out losses")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--tops", type=int, nargs="*", default=[64, 256])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sparse = f"{folder}/sparse"
        pruning = {"model": options.model, "out": sparse, "sparsity": options.sparsity, "backend": "local"}
        sample = {"calibration": options.calibration, "samples": options.samples, "seqlen": options.seqlen}
        prune(Recipe.checked({**pruning, **sample, "measure_error": False}), QUIET)
        before = measured(options, sparse)
        trainings = [Training(options, sparse, folder, top) for top in (None, *options.tops)]
    names = " | ".join(training.name for training in trainings)
    print(f"| held-out loss after step | {names} |\n|---|{'---|' * len(trainings)}")
    curves = [{loss.step: loss.held_out for loss in one.result.recovery.losses if loss.held_out} for one in trainings]
    for step in curves[0]:
        print(f"| {step} | {' | '.join(f'{curve[step]:.4f}' for curve in curves)} |")
    print("\n| teacher | perplexity before | after | CPU seconds | stored MB | planned MB |\n|---|---|---|---|---|---|")
    for one in trainings:
        cells = f"{before:.3f} | {one.perplexity:.3f} | {one.seconds:.0f} | {one.stored / 1e6:.1f}"
        print(f"| {one.name} | {cells} | {one.planned / 1e6:.0f} |")


if __name__ == "__main__":
    main()
