"""Outputs of every kind in the engines that are installed: sizes, logits beside those of transformers, CPU time.

    python -m benchmarks.clients [--python ctranslate2=ENV/bin/python] [--converter openvino=ENV/bin/optimum-cli]

Formats: transformers and vllm (the output itself), torchao (int8), ctranslate2, openvino, and gguf in llama.cpp
(xllamacpp), each in a process of the environment that `--python` names (default: this one) after `shardprune export`
with the program that `--converter` names. One whose engine is not installed is skipped with a line. The models are
random ones in float32; their tokenizer is the bundled model's, which llama.cpp does not know: gguf needs another
`--tokenizer`.

`log p` is the largest difference from transformers in a logarithm of a probability after the prompt, over the
vocabulary; `tokens` those of the ones written greedily that are transformers', CPU time that of one thread for each of
them, prompt included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.clients.engine import ENGINES, OF_CHECKPOINTS
from benchmarks.clients.models import KINDS, make_outputs
from shardprune import ExportRecipe, export
from shardprune.errors import RunError
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter

CLIENT = str(Path(__file__).with_name("engine.py"))
PROMPT = list(range(20, 36))
HEADINGS = ("output", "format", "weights (MB)", "log p", "tokens", "CPU ms per token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", nargs="+", default=[*KINDS], choices=KINDS)
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="interpreter of an engine")
    parser.add_argument("--converter", action="append", default=[], metavar="ENGINE=PATH", help="program of an engine")
    parser.add_argument("--tokenizer", default=bundled_model(), help="of the random models")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="to write")
    args = parser.parse_args()
    pythons, converters = (dict(entry.split("=", 1) for entry in given) for given in (args.python, args.converter))
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    present = [engine for engine in ENGINES if _installed(engine, pythons.get(engine, sys.executable))]
    with tempfile.TemporaryDirectory() as folder:
        outputs = make_outputs(Path(folder), args.outputs, args.tokenizer, args.hidden, args.layers)
        for kind, place in outputs.items():
            exact: dict[str, Any] = {}
            for engine in present:
                made = place if engine in OF_CHECKPOINTS else Path(folder, engine, place.name)
                try:
                    if made != place:
                        _export(place, made, engine, converters.get(engine))
                    found = _measured(engine, pythons.get(engine, sys.executable), made, args.tokens)
                except RunError as error:
                    print(f"| {kind} | {engine} | refused: {error} |", flush=True)
                    continue
                exact = exact or found
                print(_row(kind, engine, made, found, exact), flush=True)
    for engine in [name for name in ENGINES if name not in present]:
        print(f"{engine} is skipped: {ENGINES[engine][0]} is not installed")


def _installed(engine: str, python: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({ENGINES[engine][0]!r}) is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


def _export(place: Path, made: Path, engine: str, converter: str | None) -> None:
    recipe = {"model": str(place), "to": str(made), "format": engine, **({"converter": converter} if converter else {})}
    export(ExportRecipe.checked(recipe), Reporter(quiet=True))


def _measured(engine: str, python: str, made: Path, tokens: int) -> dict[str, Any]:
    words = [python, CLIENT, engine, str(made), json.dumps(PROMPT), str(tokens)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RunError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _row(kind: str, engine: str, made: Path, found: dict[str, Any], exact: dict[str, Any]) -> str:
    weights = [
        file
        for file in made.iterdir()
        if file.suffix in (".safetensors", ".bin", ".gguf") and "tokenizer" not in file.stem
    ]
    size = sum(file.stat().st_size for file in weights) / 1e6
    ours, theirs = (torch.tensor(of["logits"]).double().log_softmax(0) for of in (found, exact))
    distance = float((ours - theirs).abs().max())
    written = exact["written"]
    same = sum(one == other for one, other in zip(found["written"], written, strict=True))
    spent = 1e3 * found["cpu"] / len(written)
    return f"| {kind} | {engine} | {size:.1f} | {distance:.1e} | {same} of {len(written)} | {spent:.2f} |"


if __name__ == "__main__":
    main()
