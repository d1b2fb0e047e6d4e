"""What parallel propagation costs in perplexity: the same pruning with more and more segments.

    python -m benchmarks.segments [--model DIR --calibration SOURCE --eval SOURCE] [--segments 2 4 8]

Prunes the model once by exact propagation and once with each number of segments, at each `--quality`, in this process,
and prints a row of perplexities for each quality. The tensors do not depend on how many shards hold the segments.
"""

import tempfile

from benchmarks.options import parser_of
from shardprune import Recipe, prune
from shardprune.report.progress import Reporter


def main() -> None:
    parser = parser_of(__doc__, samples=64)
    parser.add_argument("--quality", nargs="+", default=["fast", "best"])
    parser.add_argument("--segments", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    common = {
        name: getattr(args, name) for name in ("model", "calibration", "sparsity", "samples", "seqlen", "threads")
    }
    common |= {"eval": (args.eval,), "eval_windows": args.eval_windows, "backend": "local", "report": False}
    print("| quality | dense | exact |" + "".join(f" {segments} segments |" for segments in args.segments))
    print("|---" * (3 + len(args.segments)) + "|", flush=True)
    for quality in args.quality:
        cells = [quality]
        for segments in (1, *args.segments):
            parallel = {"propagation": "parallel", "segments": segments} if segments > 1 else {}
            with tempfile.TemporaryDirectory() as folder:
                recipe = Recipe.checked({**common, **parallel, "quality": quality, "shards": 1, "out": f"{folder}/out"})
                (measured,) = prune(recipe, Reporter(quiet=True)).perplexity.values()
            cells += [f"{measured.before:.3f}"] if segments == 1 else []
            cells.append(f"{measured.after:.3f}")
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"{args.sparsity:.0%}, {args.samples} x {args.seqlen} tokens, {measured.windows} windows")


if __name__ == "__main__":
    main()
