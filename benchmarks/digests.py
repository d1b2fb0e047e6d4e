"""CPU seconds that a run spends on digests of what it reads and writes, and on looking whether its model has changed.

    python -m benchmarks.digests [--methods sparsegpt wanda magnitude] [--layers 4] [--hidden 1024] [--repeats 3]

Prunes a Llama of random weights in one process, in turn with both and with neither, and prints the least seconds of
each. They are those of all threads, so that what else the machine does changes little.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from shardprune import Recipe, prune
from shardprune.report.progress import Reporter

VOCABULARY = 256


@contextmanager
def unwatched() -> Iterator[None]:
    """Leave out digests and stamps for the duration of the block."""
    with (
        mock.patch("shardprune.model.sources.tensor_digest", return_value=""),
        mock.patch("shardprune.storage.journal.tensor_digest", return_value=""),
        mock.patch("shardprune.storage.journal.stored_digest", return_value=""),
        mock.patch("shardprune.model.sources.stamps_of", return_value={}),
        mock.patch("shardprune.commands.state.RunState._written", return_value={}),
    ):
        yield


def prune_once(folder: Path, args: argparse.Namespace, method: str) -> float:
    """Prune the model; return the CPU seconds of the process."""
    values = {
        "model": str(folder / "model"),
        "out": tempfile.mkdtemp(dir=folder),
        "calibration": str(folder / "tokens.npy"),
        "samples": args.samples,
        "seqlen": args.seqlen,
        "method": method,
        "sparsity": 0.5,
        "weights": "streamed",
        "backend": "local",
        "threads": 1,
        "report": False,
    }
    recipe, started = Recipe.checked(values), time.process_time()
    prune(recipe, Reporter(quiet=True))
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda", "magnitude"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=args.layers,
        max_position_embeddings=args.seqlen,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / "model")
        size = sum(parameter.nbytes for parameter in model.parameters())
        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, VOCABULARY, (args.samples, args.seqlen)))
        print(f"{size / 1e6:.0f} MB, {args.samples * args.seqlen} tokens, least of {args.repeats}")
        print("| method | without | with | more |\n|---|---|---|---|")
        for method in args.methods:
            prune_once(folder, args, method)  # imports and caches
            found: dict[str, list[float]] = {"without": [], "with": []}
            for _ in range(args.repeats):
                with unwatched():
                    found["without"].append(prune_once(folder, args, method))
                found["with"].append(prune_once(folder, args, method))
            without, with_ = min(found["without"]), min(found["with"])
            print(f"| {method} | {without:.2f} s | {with_:.2f} s | {with_ / without - 1:.1%} |", flush=True)


if __name__ == "__main__":
    main()
