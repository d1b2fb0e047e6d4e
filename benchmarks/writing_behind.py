"""Seconds of the prune step with each layer's file written behind the next layer, against waiting for it at once.

    python -m benchmarks.writing_behind [--rate 20] [--layers 6] [--hidden 512] [--repeats 3]

Prunes a Llama of random weights with SparseGPT in one process, in turn with and without writing behind, and prints the
least seconds of each. `--rate` makes the storage as slow as so many MB/s, in addition to what the disk takes to keep
the files (0: the disk as it is).
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shardprune import Recipe, prune
from shardprune.report.progress import Reporter
from shardprune.shard.write_behind import WriteBehind
from shardprune.storage.folder import Folder

VOCABULARY = 256


class AtOnce(WriteBehind):
    """Writing that is waited for before the next layer begins."""

    def begin(self, layer: int, tensors: dict[str, Tensor], write: Callable) -> None:
        super().begin(layer, tensors, write)
        assert self._under_way
        self._under_way[1].result()


@contextmanager
def slow_storage(rate: float) -> Iterator[None]:
    """Let parts of files take their bytes over a rate in MB/s, where one is given."""
    write = Folder._write_and_rename

    def slow(folder: Folder, name: str, parts: Iterable[bytes | memoryview]) -> None:
        def held() -> Iterator[bytes | memoryview]:
            for part in parts:
                time.sleep(len(part) / rate / 1e6 if rate else 0.0)
                yield part

        write(folder, name, held())

    with mock.patch.object(Folder, "_write_and_rename", slow):
        yield


def prune_once(folder: Path, args: argparse.Namespace, writer: type[WriteBehind]) -> float:
    """Prune the model; return the seconds of the step."""
    out = tempfile.mkdtemp(dir=folder)
    values = {
        "model": str(folder / "model"),
        "out": out,
        "calibration": str(folder / "tokens.npy"),
        "samples": args.samples,
        "seqlen": args.seqlen,
        "sparsity": 0.5,
        "backend": "local",
        "threads": 1,
        "report": False,
    }
    with mock.patch("shardprune.shard.prune_worker.WriteBehind", writer), slow_storage(args.rate):
        result = prune(Recipe.checked(values), Reporter(quiet=True))
    return result.seconds["prune"]


def make_model(folder: Path, args: argparse.Namespace) -> LlamaForCausalLM:
    """Write a Llama of random weights and its calibration tokens into a folder, and return the model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=args.layers,
        max_position_embeddings=args.seqlen,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, VOCABULARY, (args.samples, args.seqlen)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rate", type=float, default=20.0, help="of the storage in MB/s; 0: as fast as it is")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder, args)
        layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
        found: dict[str, list[float]] = {"at once": [], "behind": []}
        for _ in range(args.repeats):
            found["at once"].append(prune_once(folder, args, AtOnce))
            found["behind"].append(prune_once(folder, args, WriteBehind))
    rate = f"{args.rate:g} MB/s" if args.rate else "the disk as it is"
    print(f"{args.layers} layers of {layer / 1e6:.1f} MB, {rate}, least of {args.repeats}")
    print("| files written | prune step | ratio |\n|---|---|---|")
    for label, seconds in found.items():
        print(f"| {label} | {min(seconds):.2f} s | {min(seconds) / min(found['at once']):.2f} |")


if __name__ == "__main__":
    main()
