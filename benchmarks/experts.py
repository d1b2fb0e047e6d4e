"""Perplexity of a mixture of experts that keeps some of them, for every score.

    python -m benchmarks.experts --model DIR [--calibration SOURCE --eval SOURCE] [--shares 0.125 0.25 0.375 0.5]

One pass over the dense model serves all scores but AIMER, which looks at the weights; every cell of the table is a run
of its own that cuts from these statistics. The last column is the share of the routing weight that is lost at the
largest share, as the mean over the layers. Scores of `--propagated` have further rows, in which each layer sees the
activations behind those that are cut, scores of `--merged` rows in which experts are merged and the score says whose
router row stays, scores of `--trained` rows in which routers are trained after the cut, and scores of `--reconstructed`
rows in which all that stays is.
`random` keeps experts by chance, as the mean of `--draws` draws: the row that a score must beat.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

from shardprune import EvaluateRecipe, ExpertsRecipe, evaluate, experts
from shardprune.report.progress import Reporter
from shardprune.report.result import MeasuredPerplexity, Result
from shardprune.storage.json_file import dump_json
from shardprune.storage.output_names import EXPERTS
from shardprune.storage.sealed_json import sealed_fields, unsealed

QUIET = Reporter(quiet=True)
RANDOM = "random"


def drawn(known: Path, folder: Path, seed: int) -> str:
    """Write statistics whose numbers of tokens are drawn, so that the score `frequency` keeps experts by chance."""
    content = unsealed(json.loads((known / EXPERTS).read_text()))
    draw = random.Random(seed)
    for layer in content["routed"].values():
        layer["tokens"] = draw.sample(range(1, 1 + len(layer["tokens"])), len(layer["tokens"]))
    folder.mkdir(exist_ok=True)
    (folder / EXPERTS).write_text(dump_json(sealed_fields(content)))
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", nargs="+", default=["stdlib"])
    parser.add_argument("--eval", default="stdlib")
    parser.add_argument("--eval-windows", type=int)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.375, 0.5])
    parser.add_argument("--scores", nargs="*", default=ExpertsRecipe.choices("score"))
    parser.add_argument("--propagated", nargs="*", default=["reap", "ean"], help="scores with a pass behind cut layers")
    parser.add_argument("--merged", nargs="*", default=["reap", "ean"], help="scores with experts that are merged")
    parser.add_argument("--trained", nargs="*", default=["reap", "ean"], help="scores behind which routers are trained")
    parser.add_argument(
        "--reconstructed", nargs="*", default=["reap", "ean"], help="scores behind which all is trained"
    )
    parser.add_argument("--steps", type=int, default=50, help="of training each router, or each layer")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--multiple", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="local", help="ray: all GPUs of the cluster for each run")
    args = parser.parse_args()

    placed = {name: getattr(args, name) for name in ("seqlen", "threads", "backend")} | {"report": False}
    shared = {**placed, "model": args.model, "multiple": args.multiple}
    text = {"calibration": tuple(args.calibration), "samples": args.samples}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def run(name: str, **fields: object) -> Result:
            return experts(ExpertsRecipe.checked({**shared, **fields, "out": str(folder / name)}), QUIET)

        def perplexity(model: str) -> MeasuredPerplexity:
            asked = {
                "model": model,
                "perplexity": (args.eval,),
                "windows": args.eval_windows,
                "out": str(folder / "measured"),
            }
            result = evaluate(EvaluateRecipe.checked({**placed, **asked}), QUIET)
            shutil.rmtree(folder / "measured")
            (measured,) = result.evaluation.perplexity.values()
            return measured

        first = run("first", remove=args.shares[-1], merge=bool(args.merged), **text)
        print(f"| score | {' | '.join(f'{share:.1%} removed' for share in args.shares)} | routing weight lost |")
        print(f"|---|{'---|' * (len(args.shares) + 1)}", flush=True)
        dense = perplexity(args.model)
        ways = {score: {"score": score, "statistics": str(folder / "first")} for score in args.scores}
        ways |= {f"{score}, propagated": {"score": score, "propagate": "pruned", **text} for score in args.propagated}
        merged = {"merge": True, "statistics": str(folder / "first")}
        ways |= {f"{score}, merged": {"score": score, **merged} for score in args.merged}
        trained = {"statistics": str(folder / "first"), "router_kd": args.steps, **text}
        ways |= {f"{score}, routers trained": {"score": score, **trained} for score in args.trained}
        trained = {"statistics": str(folder / "first"), "reconstruct": args.steps, **text}
        ways |= {f"{score}, reconstructed": {"score": score, **trained} for score in args.reconstructed}
        ways |= {RANDOM: {"score": "frequency", "protect": False}} if args.draws else {}
        for way, fields in ways.items():
            cells = []
            for share in args.shares:
                found = []
                for seed in range(args.draws if way == RANDOM else 1):
                    name = f"run-{seed}"
                    source = {"statistics": drawn(folder / "first", folder / "drawn", seed)} if way == RANDOM else {}
                    result = run(name, remove=share, **fields, **source)
                    found.append(perplexity(str(folder / name)).value)
                    shutil.rmtree(folder / name)
                cells.append(sum(found) / len(found))
            assert result.experts is not None
            lost = [layer.lost for layer in result.experts.layers if layer.lost is not None]
            gone = f"{sum(lost) / len(lost):.1%}" if lost and way != RANDOM else ""
            print(f"| {way} | {' | '.join(f'{cell:.3f}' for cell in cells)} | {gone} |", flush=True)
    assert first.experts is not None
    counts = f"{first.experts.before}, of which a token gets {first.experts.per_token}"
    print(f"dense: {dense.value:.3f}, {dense.windows} windows of {dense.seqlen}; experts of a layer: {counts}")


if __name__ == "__main__":
    main()
