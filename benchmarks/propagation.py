"""Parallel propagation against exact: the seconds of the prune step and what it costs in perplexity.

    python -m benchmarks.propagation [--model DIR --calibration SOURCE --eval SOURCE] [--workers 4]

Prunes the model once with one shard and once with `--workers` shards at the same time, every worker with
`--threads` threads, in turn and `--repeats` times; prints the least seconds of each and their ratio.
"""

import argparse
import tempfile

from shardprune import Recipe, prune
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter
from shardprune.report.result import Result


def run(args: argparse.Namespace, out: str, **fields) -> Result:
    values = {
        "model": args.model,
        "out": out,
        "method": args.method,
        "sparsity": args.sparsity,
        "calibration": args.calibration,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "eval": (args.eval,),
        "threads": args.threads,
        "backend": args.backend,
        **fields,
    }
    return prune(Recipe.checked(values), Reporter(quiet=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--eval", default="stdlib")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--backend", default="ray", help="local: one process, in which shards take turns")
    args = parser.parse_args()

    exact, parallel = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeats):
            exact.append(run(args, f"{folder}/exact{turn}", shards=1))
            parallel.append(run(args, f"{folder}/parallel{turn}", shards=args.workers, propagation="parallel"))

    def least(results: list[Result], *phases: str) -> float:
        return min(sum(result.seconds.get(phase, 0.0) for phase in phases) for result in results)

    print(f"{args.method} {args.sparsity:.0%}, {args.samples} x {args.seqlen} tokens, {args.threads} threads a worker")
    for label, results in (("exact, 1 shard", exact), (f"parallel, {args.workers} shards", parallel)):
        measured = results[0].perplexity[args.eval]
        print(
            f"{label:20s} observe {least(results, 'observe'):6.2f} s   prune {least(results, 'prune'):6.2f} s   "
            f"perplexity {measured.before:.3f} -> {measured.after:.3f}"
        )
    prune_ratio = least(parallel, "prune") / least(exact, "prune")
    whole_ratio = least(parallel, "observe", "prune") / least(exact, "observe", "prune")
    print(f"prune step: {prune_ratio:.2f} of the time; with the observing pass: {whole_ratio:.2f}")


if __name__ == "__main__":
    main()
