"""What taking outlier ratios and rebuilding masks cost beside the pruning itself.

    python -m benchmarks.rebuilding [--model DIR --calibration SOURCE] [--samples 64 --seqlen 256]

Prunes the model plainly, with OWL, and with rebuilt masks of every granularity, in turn and `--repeats` times, in one
process; prints the least seconds of the observe and prune steps and their ratio to the plain prune step.
"""

import argparse
import tempfile

from shardprune import Recipe, prune
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter

BARBER = {"rebuild": "barber", "rebuild_threshold": 0.1}
RUNS = {
    "plain": {},
    "owl": {"allocation": "owl"},
    **{f"barber, {name}": {**BARBER, "rebuild_granularity": name} for name in ("row", "column", "projection", "block")},
    "barber, row, errors not measured": {**BARBER, "measure_error": False},
    "plain, errors not measured": {"measure_error": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()

    common = {name: value for name, value in vars(args).items() if name != "repeats"}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for _ in range(args.repeats):
        for name, fields in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                recipe = Recipe.checked({**common, **fields, "backend": "local", "out": f"{folder}/out"})
                seconds[name].append(prune(recipe, Reporter(quiet=True)).seconds)

    def least(name: str, phase: str) -> float:
        return min(run.get(phase, 0.0) for run in seconds[name])

    print(f"{args.method} {args.sparsity:.0%}, {args.samples} x {args.seqlen} tokens, {args.threads} threads")
    print("| run | observe | prune | ratio |\n|---|---|---|---|")
    for name in RUNS:
        observe, pruning = least(name, "observe"), least(name, "prune")
        print(f"| {name} | {observe:.2f} s | {pruning:.2f} s | {(observe + pruning) / least('plain', 'prune'):.2f} |")


if __name__ == "__main__":
    main()
