"""What a search and the removal of structures take, on one worker and on several.

    python -m benchmarks.searching [--model DIR --calibration SOURCE] [--samples 64 --seqlen 256]

Three iterations of MoP, both candidates scored, on each layout of Ray workers with one thread each: seconds of the
search, its ratio to one worker, and whether the tensors are the same to the bit. Then, in one process, the prune step
of `--structured 0.2` by each score beside that of SparseGPT at 50 %. The least of `--repeats` runs each.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from shardprune import MopRecipe, Recipe, mop, prune
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter

LAYOUTS = {
    "1 worker": {},
    "2 shards": {"shards": 2},
    "2 replicas": {"replicas": 2},
    "4 shards": {"shards": 4},
    "2 shards x 2 replicas": {"shards": 2, "replicas": 2},
    "4 replicas": {"replicas": 4},
}
STEPS = {
    "sparsegpt, 50 %": {"sparsity": 0.5},
    "amp": {"structured": 0.2, "score": "amp", "correction": False},
    "amp, corrected": {"structured": 0.2, "score": "amp"},
    "outlier, corrected": {"structured": 0.2, "score": "outlier"},
    "obs, corrected": {"structured": 0.2, "score": "obs"},
}


def tensors_of(folder: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def searched(values: dict) -> tuple[float, dict[str, torch.Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        result = mop(MopRecipe.checked({**values, "out": f"{folder}/out"}), Reporter(quiet=True))
        return result.seconds["search"], tensors_of(f"{folder}/out")


def pruned(values: dict) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return prune(Recipe.checked({**values, "out": f"{folder}/out"}), Reporter(quiet=True)).seconds["prune"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--path", default="GLG")
    parser.add_argument("--backend", default="ray")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()

    common = {name: getattr(args, name) for name in ("model", "calibration", "samples", "seqlen")} | {"threads": 1}
    print("| layout | search | ratio | same tensors |")
    print("|---|---|---|---|", flush=True)
    least, first = 0.0, {}
    for name, layout in LAYOUTS.items():
        values = {**common, **layout, "path": args.path, "backend": args.backend}
        runs = [searched(values) for _ in range(args.repeats)]
        seconds, tensors = min(run[0] for run in runs), runs[0][1]
        least, first = least or seconds, first or tensors
        same = all(torch.equal(tensor, first[key]) for key, tensor in tensors.items())
        print(f"| {name} | {seconds:.2f} s | {seconds / least:.2f} | {'yes' if same else 'no'} |", flush=True)
    print("| prune step | seconds |")
    print("|---|---|", flush=True)
    for name, fields in STEPS.items():
        seconds = min(pruned({**common, **fields, "backend": "local"}) for _ in range(args.repeats))
        print(f"| {name} | {seconds:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
