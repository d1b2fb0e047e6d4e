"""Ways to choose MoP's path, each fine-tuned afterwards.

    python -m benchmarks.paths [--model DIR --calibration SOURCE --data SOURCE --eval SOURCE] [--remove 0.3]

Prunes the model to `--remove` fewer parameters along random paths (one for each of `--seeds`), the path by perplexity,
the path by the perplexity of candidates that are fine-tuned for `--tune` steps, and the two extremes, only layers and
only widths. Each model is then fine-tuned by low-rank updates for `--steps` steps. Prints a row for each: the path,
perplexity before and after the fine-tuning, and seconds of both. `--jobs` go at the same time, each in a process.
"""

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.options import add_data, parser_of, training_fields
from shardprune import MopRecipe, RecoverRecipe, mop, recover
from shardprune.model.checkpoint import Checkpoint
from shardprune.report.progress import Reporter

WAYS = ("random", "perplexity", "tuned", "only layers", "only widths")


def plans(options: argparse.Namespace) -> dict[str, dict]:
    """The recipes' own fields by the names of the rows."""
    layers = Checkpoint(options.model).config.num_hidden_layers
    tuning = {
        "tune_candidates": options.tune,
        "tune_data": options.data,
        "tune_length": options.seqlen,
        "tune_learning_rate": options.rate,
    }
    fields = {
        **{f"random, seed {seed}": {"criterion": "random", "scores": False, "seed": seed} for seed in options.seeds},
        "perplexity": {},
        "tuned": tuning,
        "only layers": {"path": "L" * layers, "scores": False},
        "only widths": {"path": "G" * layers, "scores": False},
    }
    return {name: values for name, values in fields.items() if name.partition(",")[0] in options.ways}


def row(name: str, values: dict, training: dict) -> str:
    quiet = Reporter(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        found = mop(MopRecipe.checked({**values, "out": f"{folder}/small"}), quiet)
        recipe = {**training, "model": f"{folder}/small", "out": f"{folder}/tuned"}
        result = recover(RecoverRecipe.checked(recipe), quiet)
    assert found.structure is not None
    assert found.structure.path is not None
    (measured,) = result.perplexity.values()
    seconds = (f"{found.seconds['search'] + found.seconds.get('tune', 0):.0f}", f"{result.seconds['train']:.0f}")
    path = "".join(entry.step for entry in found.structure.path)
    gone = 1 - found.model.parameters_after / found.model.parameters_before
    cells = (name, path, f"{gone:.1%}", f"{measured.before:.3f}", f"{measured.after:.3f}", *seconds)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = parser_of(__doc__)
    add_data(parser)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--remove", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of random paths")
    parser.add_argument("--tune", type=int, default=24, help="steps for each candidate of a tuned path")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    shared = {name: getattr(options, name) for name in ("model", "calibration", "samples", "seqlen", "threads")}
    shared |= {"backend": "local", "remove": options.remove, "report": False}
    training = training_fields(options) | {"learning_rate": options.rate, "backend": "local", "report": False}
    print("| way | path | removed | before | after | seconds of the search | of the training |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        rows = [pool.submit(row, name, {**shared, **fields}, training) for name, fields in plans(options).items()]
        for done in rows:
            print(done.result(), flush=True)


if __name__ == "__main__":
    main()
