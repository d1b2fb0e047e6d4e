"""Perplexity of a mixture of experts that keeps some of them, for every score.

    python -m benchmarks.experts --model DIR [--calibration SOURCE --eval SOURCE] [--shares 0.125 0.25 0.375 0.5]
      [--jobs N]

One pass over the dense model serves all scores but AIMER, which looks at the weights; every cell of the table is a run
of its own that cuts from these statistics. The last column is the share of the routing weight that is lost at the
largest share, as the mean over the layers. Scores of `--propagated` have further rows, in which each layer sees the
activations behind those that are cut, scores of `--merged` rows in which experts are merged and the score says whose
router row stays, scores of `--trained` rows in which routers are trained after the cut, and scores of `--reconstructed`
rows in which all that stays is.
`random` keeps experts by chance, as the mean of `--draws` draws: the row that a score must beat. `--jobs` measures so
many cells at the same time, each process with `--threads` threads.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from shardprune import EvaluateRecipe, ExpertsRecipe, evaluate, experts
from shardprune.report.progress import Reporter
from shardprune.report.result import MeasuredPerplexity, Result
from shardprune.solvers.expert_scores import needs_pass
from shardprune.storage.json_file import dump_json
from shardprune.storage.output_names import EXPERTS
from shardprune.storage.sealed_json import sealed_fields, unsealed

QUIET = Reporter(quiet=True)
SCORES = ExpertsRecipe.choices("score")
OF_TOKENS = [score for score in SCORES if needs_pass(score)]  # as merging does
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


@dataclass(frozen=True)
class Measurer:
    """Runs of one model and what their perplexities are.

    Attributes:
        shared: fields of all runs.
        asked: fields of all evaluations.
        folder: of the outputs.
    """

    shared: dict[str, Any]
    asked: dict[str, Any]
    folder: Path

    def run(self, name: str, fields: dict[str, Any]) -> Result:
        recipe = ExpertsRecipe.checked({**self.shared, **fields, "out": str(self.folder / name)})
        return experts(recipe, QUIET)

    def perplexity(self, model: str, name: str) -> MeasuredPerplexity:
        out = self.folder / name
        result = evaluate(EvaluateRecipe.checked({**self.asked, "model": model, "out": str(out)}), QUIET)
        shutil.rmtree(out)
        (measured,) = result.evaluation.perplexity.values()
        return measured

    def cell(self, name: str, fields: dict[str, Any]) -> tuple[float, list[float]]:
        """Return the perplexity of a run, and the routing weight that its layers lose."""
        result = self.run(name, fields)
        found = self.perplexity(str(self.folder / name), f"{name}-measured").value
        shutil.rmtree(self.folder / name)
        assert result.experts is not None
        return found, [layer.lost for layer in result.experts.layers if layer.lost is not None]


@contextmanager
def measuring(measurer: Measurer, cells: list[dict[str, Any]], jobs: int) -> Iterator[Iterator[Any]]:
    """Give what `Measurer.cell` returns for cells, in their order, so many of them measured at a time."""
    names = [f"run-{place}" for place in range(len(cells))]
    if jobs == 1:
        yield map(measurer.cell, names, cells)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield pool.map(measurer.cell, names, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", nargs="+", default=["stdlib"])
    parser.add_argument("--eval", default="stdlib")
    parser.add_argument("--eval-windows", type=int)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.375, 0.5])
    parser.add_argument("--scores", nargs="*", default=SCORES)
    parser.add_argument("--propagated", nargs="*", default=["reap", "ean"], help="scores with a pass behind cut layers")
    parser.add_argument("--merged", nargs="*", default=OF_TOKENS, help="scores with experts that are merged")
    parser.add_argument("--trained", nargs="*", default=SCORES, help="scores behind which routers are trained")
    parser.add_argument(
        "--reconstructed", nargs="*", default=["reap", "ean"], help="scores behind which all is trained"
    )
    parser.add_argument("--steps", type=int, default=50, help="of training each router, or each layer")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--multiple", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="cells measured at the same time")
    parser.add_argument("--backend", default="local", help="ray: all GPUs of the cluster for each run")
    args = parser.parse_args()

    placed = {name: getattr(args, name) for name in ("seqlen", "threads", "backend")} | {"report": False}
    shared = {**placed, "model": args.model, "multiple": args.multiple}
    asked = {**placed, "perplexity": (args.eval,), "windows": args.eval_windows}
    text = {"calibration": tuple(args.calibration), "samples": args.samples}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        measurer = Measurer(shared, asked, folder)
        first = measurer.run("first", {"remove": args.shares[-1], "merge": bool(args.merged), **text})
        dense = measurer.perplexity(args.model, "dense")
        known = {"statistics": str(folder / "first")}
        ways: dict[str, list[dict[str, Any]]] = {score: [{"score": score, **known}] for score in args.scores}
        for kind, scores, fields in (
            ("propagated", args.propagated, {"propagate": "pruned", **text}),
            ("merged", args.merged, {"merge": True, **known}),
            ("routers trained", args.trained, {"router_kd": args.steps, **known, **text}),
            ("reconstructed", args.reconstructed, {"reconstruct": args.steps, **known, **text}),
        ):
            ways |= {f"{score}, {kind}": [{"score": score, **fields}] for score in scores}
        if args.draws:
            chance = {"score": "frequency", "protect": False}
            draws = [drawn(folder / "first", folder / f"drawn-{seed}", seed) for seed in range(args.draws)]
            ways[RANDOM] = [{**chance, "statistics": draw} for draw in draws]

        cells = [{**fields, "remove": share} for alike in ways.values() for share in args.shares for fields in alike]
        print(f"| score | {' | '.join(f'{share:.1%} removed' for share in args.shares)} | routing weight lost |")
        print(f"|---|{'---|' * (len(args.shares) + 1)}", flush=True)
        with measuring(measurer, cells, args.jobs) as found:
            for way, alike in ways.items():
                row = []
                for _ in args.shares:
                    values, losses = zip(*(next(found) for _ in alike), strict=True)
                    row.append(sum(values) / len(values))
                lost = losses[-1]  # at the largest share
                gone = f"{sum(lost) / len(lost):.1%}" if lost and way != RANDOM else ""
                print(f"| {way} | {' | '.join(f'{value:.3f}' for value in row)} | {gone} |", flush=True)
    assert first.experts is not None
    counts = f"{first.experts.before}, of which a token gets {first.experts.per_token}"
    print(f"dense: {dense.value:.3f}, {dense.windows} windows of {dense.seqlen}; experts of a layer: {counts}")


if __name__ == "__main__":
    main()
