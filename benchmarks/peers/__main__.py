"""SparseGPT of llm-compressor and ours in turn: the same model, tokens, threads and dtype (float32), 50 % unstructured.

    python -m benchmarks.peers --peer-python /path/to/env/bin/python [--model DIR] [--repeats 3]

The peer's environment: `python -m venv env`, then `env/bin/pip install llmcompressor==0.14.0.1` (on a machine without a
GPU torch from PyTorch's CPU index first). Without `--peer-python` only ours runs, and a line says so. Each run is a
process of its own; medians of `--repeats`, in turn. Seconds are those of the call, imports before it: llm-compressor's
`oneshot` on a loaded model, without saving; our `prune`, with reading and writing. `floor` is what the operations
(benchmarks/peers/floor.py) take at the rate of a product of 2048^3 in the same process. CPU seconds matter on a machine
that does other work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.peers.cases import Case, random_llama, trained
from benchmarks.peers.floor import operations
from shardprune.planning.workload import read_model
from shardprune.recipes.demo import bundled_model

PEER = str(Path(__file__).with_name("oneshot.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter of an environment with llm-compressor 0.14")
    parser.add_argument("--model", default=bundled_model(), help="a small trained model (default: the bundled one)")
    parser.add_argument("--samples", type=int, default=32, help="sequences for the trained model")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024, help="of the random model, 0 for none")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--random-samples", type=int, default=64)
    parser.add_argument("--random-seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-batch", type=int, default=1, help="sequences of a batch of the peer (its default: 1)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    if not args.peer_python:
        print("llm-compressor is skipped: give the interpreter of its environment as --peer-python")
    with tempfile.TemporaryDirectory() as folder:
        cases = [trained(args.model, folder, args.samples, args.seqlen)]
        if args.hidden:
            cases.append(random_llama(folder, args.hidden, args.layers, args.random_samples, args.random_seqlen))
        print(f"\n{args.threads} threads, medians of {args.repeats}, seconds")
        print("| model | tool | wall | CPU | prune step | floor | wall / peer | CPU / peer | prune step / floor |")
        print("|---|---|---|---|---|---|---|---|---|")
        compared = [compare(case, folder, args) for case in cases]
        for text in filter(None, compared):
            print(text)
        taken = before_first_layer(cases[0], folder, args)
        print(f"\nbefore the first layer, {cases[0].name}: {taken['first layer']:.2f} s of CPU", end="")
        print(f", {taken['imports']:.2f} s of them Python and imports")


def compare(case: Case, folder: str, args: argparse.Namespace) -> str:
    """Run both tools in turn, and print the rows of a case; return what its masks have in common."""
    peers: list[dict[str, float]] = []
    ours: list[dict[str, float]] = []
    for turn in range(args.repeats):
        if args.peer_python:
            words = [PEER, case.model, case.tokens, f"{folder}/peer.safetensors"]
            peers.append(_process([args.peer_python, *words, str(args.threads), str(args.peer_batch)], args.threads))
        out = f"{folder}/{Path(case.tokens).stem}{turn}"
        words = ["-m", "benchmarks.peers.ours", case.model, case.tokens, out, str(args.threads)]
        ours.append(_process([sys.executable, *words], args.threads))

    def median(runs: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    floor = operations(read_model(case.model), *numpy.load(case.tokens).shape) / median(ours, "rate")
    wall, cpu, prune = (median(ours, key) for key in ("wall", "cpu", "prune"))
    if peers:
        peer_wall, peer_cpu = median(peers, "wall"), median(peers, "cpu")
        print(f"| {case.name} | llm-compressor | {peer_wall:.2f} | {peer_cpu:.2f} | | {floor:.2f} | | | |")
        ratios = f"{wall / peer_wall:.2f} | {cpu / peer_cpu:.2f}"
    else:
        ratios = "- | -"
    print(
        f"| {case.name} | shardprune | {wall:.2f} | {cpu:.2f} | {prune:.2f} | {floor:.2f} | {ratios} | "
        f"{prune / floor:.2f} |",
        flush=True,
    )
    return common(case, f"{folder}/peer.safetensors", out) if peers else ""


def common(case: Case, peer: str, out: str) -> str:
    """Return a line: how far the zeros of both agree, and how far each is from the dense weights."""
    theirs = load_file(peer)
    ours = _tensors(out)
    dense = _tensors(case.model)
    names = [name for name in theirs if theirs[name].dim() == 2]
    agree = sum(int(((theirs[name] == 0) == (ours[name] == 0)).sum()) for name in names)
    weights = sum(theirs[name].numel() for name in names)

    def described(tensors: dict[str, torch.Tensor]) -> str:
        zeros = sum(int((tensors[name] == 0).sum()) for name in names) / weights
        change = sum(float((tensors[name] - dense[name].float()).square().sum()) for name in names)
        norm = sum(float(dense[name].float().square().sum()) for name in names)
        return f"{zeros:.4%} zeros, {(change / norm) ** 0.5:.5f} from the dense weights"

    return (
        f"\n{case.name}: the zeros agree in {agree / weights:.3%} of the weights; "
        f"llm-compressor {described(theirs)}; shardprune {described(ours)}"
    )


def before_first_layer(case: Case, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the CPU seconds of a process of the command line until its imports are done, and until its first layer."""
    samples, seqlen = numpy.load(case.tokens).shape
    words = ["prune", case.model, "--out", f"{folder}/first", "--sparsity", "0.5", "--calibration", case.tokens]
    words += ["--samples", str(samples), "--seqlen", str(seqlen), "--backend", "local", "--threads", str(args.threads)]
    runs = []
    for _ in range(args.repeats):
        runs.append(_process([sys.executable, "-m", "benchmarks.peers.first_layer", *words], args.threads))
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _process(command: list[str], threads: int) -> dict[str, float]:
    """Run a process that prints one line of JSON at its end.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _tensors(folder: str) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


if __name__ == "__main__":
    main()
