"""Perplexity and latency of smaller models: depth only, width only, and MoP's mixture.

    python -m benchmarks.structured [--model DIR --calibration SOURCE --eval SOURCE] [--shares 0.1 0.2 0.3 0.4]

Removes each share of the model's parameters in several ways, once more with layers trained where `--reconstruct` says
by how many steps, and prints a row for each: perplexity, by how many neurons
per layer the removed parameters miss the request, and the median seconds to generate `--tokens` tokens (batch 1,
greedy) of the dense and the pruned model, which take turns in this process. `--jobs` prunings go at the same time,
each in a process of its own with `--threads` threads; generation comes after them, with `--generate-threads`.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from transformers import AutoModelForCausalLM

from shardprune import MopRecipe, Recipe, mop, prune
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.shape import costs_of
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter
from shardprune.report.result import Result

PROMPT = 16  # tokens
DEPTH = {f"depth, {rule}": {"path": "L", "depth_rule": rule} for rule in ("third-last", "cosine", "perplexity")}
WIDTH = {
    f"width, {score}{', corrected' if correction else ''}": {"score": score, "correction": correction}
    for score, correction in itertools.product(("amp", "outlier", "obs"), (False, True))
}
MOP = {
    "MoP, random path": {"criterion": "random"},
    "MoP, perplexity path": {"criterion": "perplexity"},
    "MoP, perplexity path, obs": {"criterion": "perplexity", "score": "obs"},
}
EXTREME = "MoP, only widths"  # of its paths; the other extreme, only layers, is depth by the third-last rule


def run(values: dict) -> Result:
    quiet = Reporter(quiet=True)
    values = {"neuron_multiple": 1, **values}  # shares to the neuron
    return prune(Recipe.checked(values), quiet) if "structured" in values else mop(MopRecipe.checked(values), quiet)


def plans(share: float, skeleton: Skeleton) -> dict[str, dict]:
    """The recipes' own fields by the names of the rows, for one share of all parameters."""
    weights = sum(rows * cols for rows, cols in skeleton.projection_shapes(0).values()) * skeleton.layers
    decoder = {"structured": share * skeleton.parameters() / weights}
    depth = {name: {**fields, "path": "L" * skeleton.layers, "remove": share} for name, fields in DEPTH.items()}
    width = {name: {**fields, **decoder} for name, fields in WIDTH.items()}
    searched = MOP | {EXTREME: {"path": "G" * skeleton.layers}}
    return depth | width | {name: {**fields, "remove": share} for name, fields in searched.items()}


def seconds_to_generate(model: torch.nn.Module, tokens: int) -> float:
    prompt = torch.arange(2, 2 + PROMPT)[None]
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    assert output.shape[1] == PROMPT + tokens
    return time.perf_counter() - started


def latencies(dense: torch.nn.Module, folder: str, tokens: int, repeats: int) -> tuple[float, float]:
    """Median seconds of the dense and the pruned model, which take turns."""
    pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for model, of in zip((dense, pruned), seconds, strict=True):
            spent = seconds_to_generate(model, tokens)
            if turn:  # the first turn warms up
                of.append(spent)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def shape(result: Result) -> str:
    assert result.structure is not None
    after = result.structure.after
    path = "".join(entry.step for entry in result.structure.path or ())
    return f"{after.layers} x ({after.heads}, {after.neurons})" + (f" {path}" if path else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--eval", default="stdlib")
    parser.add_argument("--eval-windows", type=int)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument(
        "--ways", nargs="*", default=[*DEPTH, *WIDTH, *MOP], help=f"names of rows (default: all but {EXTREME})"
    )
    parser.add_argument("--reconstruct", type=int, default=0, help="steps of rows with trained layers (default: none)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", default="local", help="ray: all GPUs of the cluster for each run; with --jobs 1")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--generate-threads", type=int, default=2)
    args = parser.parse_args()

    skeleton = Skeleton(Checkpoint(args.model).config, "cpu")
    prefix = f"{skeleton.family.layers}.0."
    tensors = {name.removeprefix(prefix): shape for name, shape in skeleton.layer_tensors(0).items()}
    neuron = costs_of(skeleton.config, tensors).neuron
    common = {name: getattr(args, name) for name in ("model", "calibration", "samples", "seqlen", "threads")}
    common |= {"eval": (args.eval,), "eval_windows": args.eval_windows, "backend": args.backend}
    untrained = [(share, name, plans(share, skeleton)[name]) for share in args.shares for name in args.ways]
    trainings = [("", {}), (", trained", {"reconstruct": args.reconstruct})][: 2 if args.reconstruct else 1]
    rows = [(share, name + also, fields | more) for share, name, fields in untrained for also, more in trainings]
    with tempfile.TemporaryDirectory() as folder:
        outs = [f"{folder}/{index}" for index in range(len(rows))]
        recipes = [{**common, **fields, "out": out} for (_, _, fields), out in zip(rows, outs, strict=True)]
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(run, recipes))
        torch.set_num_threads(args.generate_threads)
        dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        print("| removed | way | layers x (heads, neurons), path | perplexity | missed by | dense | pruned | ratio |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for (share, name, _), out, result in zip(rows, outs, results, strict=True):
            (measured,) = result.perplexity.values()
            gone = result.model.parameters_before - result.model.parameters_after
            missed = abs(gone - share * result.model.parameters_before) / skeleton.layers / neuron
            before, after = latencies(dense, out, args.tokens, args.repeats)
            times = f"{before:.3f} s | {after:.3f} s | {after / before:.2f}"
            print(
                f"| {share:g} | {name} | {shape(result)} | {measured.after:.3f} | {missed:.2f} | {times} |", flush=True
            )
            assert missed <= 1, "more than one neuron of each layer off the request"
    print(f"dense: {measured.before:.3f}, {measured.windows} windows of {measured.seqlen}")


if __name__ == "__main__":
    main()
