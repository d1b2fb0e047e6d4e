"""A refactor must not change a bit: two checkouts of shardprune, the same recipes, and what they make of them.

    git worktree add ../before HEAD~1
    python -m benchmarks.same_bits ../before .
    python -m benchmarks.same_bits ../before . --backend local --only sparsegpt mop
    python -m benchmarks.same_bits ../before . --backend local --families gemma2 opt --only sparsegpt 2:4

Each scenario is one command on a tiny Llama, or on those of `--families`, run by each checkout in a process of its own.
Compared are the SHA-256 of every tensor and config.json of every checkpoint that it made, and result.json, without what
differs between two runs of the same code: seconds, rates, hosts, peak memory, and the fingerprint, which a new version
may define anew. Prints a table, one row a scenario and backend, and the names of what differs; the exit code is 1 where
anything does.

Outputs stay below WORK in a folder that is named by the hash of a checkout's source: code that has not changed since is
not run again.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

BACKENDS = ("local", "ray")
WORDS = ["<unk>", "<s>", "</s>", "one", "two", "three", "four", "five", "six", "seven"]
VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
WINDOW = {"sliding_window": 8}  # shorter than the sequences
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_NOT_OPTS = {"intermediate_size", "num_key_value_heads", "head_dim"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "gemma2": {**COMMON, **WINDOW, "query_pre_attn_scalar": 4},
    "llava": {
        "vision_config": {**VISION, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
        "text_config": {**COMMON, "model_type": "llama"},
        **{"image_token_index": VOCABULARY - 1, "image_seq_length": 4},
    },
    "mistral": {**COMMON, **WINDOW},
    "opt": {name: value for name, value in COMMON.items() if name not in _NOT_OPTS} | {"ffn_dim": 48},
    "phi3": {name: value for name, value in COMMON.items() if name != "head_dim"},
    "qwen2": {**COMMON, **WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": COMMON,
}
# What two runs of the same code differ in, at any depth of result.json.
VARYING = {"seconds", "fingerprint", "node", "peak_bytes", "busy_seconds", "tokens_per_second"}
CALIBRATED = ("--calibration", "{inputs}/tokens.npy", "--samples", "12", "--seqlen", "24", "--wave", "4")
MEASURED = ("--eval", "{inputs}/tokens.npy")
PRUNE = ("prune", "{inputs}/model", *CALIBRATED, *MEASURED)
HALF = ("--sparsity", "0.5")


@dataclass(frozen=True)
class Scenario:
    """A command, with `{inputs}` for the folder of models and data and `{outputs}` for that of the outputs so far.

    `local` and `ray` are further options on one backend; `after` is the scenario whose output is an input.
    """

    name: str
    command: tuple[str, ...]
    local: tuple[str, ...] = ()
    ray: tuple[str, ...] = ()
    after: str | None = None

    def options(self, backend: str) -> tuple[str, ...]:
        return (*self.command, *getattr(self, backend), "--backend", backend, "--threads", "1", "--no-report")


def _two_shards(name: str, *command: str, after: str | None = None) -> Scenario:
    return Scenario(name, command, ray=("--shards", "2", "--replicas", "1"), after=after)


SCENARIOS = (
    _two_shards("sparsegpt", *PRUNE, *HALF),
    _two_shards("2:4", *PRUNE, "--pattern", "2:4"),
    _two_shards("mixed:8", *PRUNE, "--pattern", "mixed:8", *HALF),
    _two_shards("wanda owl", *PRUNE, "--method", "wanda", "--allocation", "owl", *HALF),
    _two_shards("barber row", *PRUNE, *HALF, "--rebuild", "barber", "--rebuild-granularity", "row"),
    _two_shards("barber block", *PRUNE, *HALF, "--rebuild", "barber", "--rebuild-granularity", "block"),
    _two_shards("parallel", *PRUNE, *HALF, "--propagation", "parallel", "--segments", "4"),
    Scenario("replicas", (*PRUNE, *HALF, "--allocation", "mosaic", "--replicas", "2")),
    _two_shards("streamed", *PRUNE, *HALF, "--weights", "streamed"),
    _two_shards("structured", *PRUNE, "--structured", "0.2", "--sparsity", "0.2"),
    _two_shards("composite", *PRUNE, "--structured", "0.2", *HALF),
    _two_shards("mop", "mop", "{inputs}/model", *CALIBRATED, *MEASURED, "--remove", "0.3", "--keep", "1,2"),
    _two_shards(
        "rebuild", "rebuild", "{inputs}/model", "{outputs}/sparsegpt", *CALIBRATED, *MEASURED, after="sparsegpt"
    ),
    Scenario(
        "recover",
        (
            *("recover", "{outputs}/sparsegpt", "--data", "{inputs}/documents.jsonl", "--keep-sparsity", *MEASURED),
            *("--steps", "4", "--zero", "2", "--batch", "8", "--micro-batch", "2", "--length", "16", "--seqlen", "24"),
        ),
        ray=("--workers", "2"),
        after="sparsegpt",
    ),
    _two_shards(
        "evaluate",
        *("evaluate", "{inputs}/model", "--tasks", "pairs", "--tasks-dir", "{inputs}/tasks"),
        *("--perplexity", "{inputs}/tokens.npy", "--seqlen", "24"),
    ),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


# -- inputs -----------------------------------------------------------------------------------------------------------


def make_inputs(folder: Path, family: str = "llama") -> None:
    """Make a model of a family, tokens, documents and a task, the same ones every time."""
    if (folder / "made").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if family == "llava" else AutoModelForCausalLM
    model = auto.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)  # large enough for every layer to matter
    model.save_pretrained(folder / "model")
    _write_tokenizer(folder / "model", models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<unk>"))
    if not AutoTokenizer.from_pretrained(folder / "model")(WORDS[-1]).input_ids:
        # transformers has a tokenizer of bytes for this family, whatever the file says: it knows letters, and no words
        letters = [*WORDS[:3], "\u0120", *sorted(set("".join(WORDS[3:])))]
        _write_tokenizer(folder / "model", models.BPE({one: index for index, one in enumerate(letters)}, []))

    draw = np.random.default_rng(0)
    np.save(folder / "tokens.npy", draw.integers(0, VOCABULARY, (12, 24)))

    def text(most: int) -> str:
        return " ".join(draw.choice(WORDS[3:], draw.integers(2, most)))

    _write_lines(folder / "documents.jsonl", [{"text": text(15)} for _ in range(21)])
    (folder / "tasks").mkdir()
    _write_lines(folder / "tasks" / "pairs.jsonl", [{"good": text(8), "bad": text(8)} for _ in range(20)])
    task = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / "pairs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "tasks" / "pairs.yaml").write_text(yaml.safe_dump(task))
    (folder / "made").touch()


def _write_tokenizer(folder: Path, model: models.Model) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def _write_lines(file: Path, records: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


# -- one checkout -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What a scenario made: digests by the names of tensors and configs, and result.json without what varies."""

    digests: dict[str, str]
    result: dict[str, Any]


class Failed(Exception):
    """A command that ended with another exit code than 0."""


class Checkout:
    """A checkout of shardprune, and the outputs of its code."""

    def __init__(self, root: Path, work: Path, family: str) -> None:
        if not (root / "shardprune" / "__main__.py").exists():
            raise SystemExit(f"{root} is no checkout of shardprune")
        self.root = root.resolve()
        self.inputs = work / "inputs" / family
        source = hashlib.sha256()
        for file in sorted((self.root / "shardprune").rglob("*.py")):
            source.update(str(file.relative_to(self.root)).encode() + file.read_bytes())
        self.folder = work / source.hexdigest()[:12] / family

    def make(self, scenario: Scenario, backend: str) -> Made:
        """Carry out a scenario, unless this code has already done so.

        Raises:
            Failed: the command did not succeed.
        """
        outputs = self.folder / backend
        if scenario.after is not None:
            self.make(BY_NAME[scenario.after], backend)
        out = outputs / scenario.name
        options = [part.format(inputs=self.inputs, outputs=outputs) for part in scenario.options(backend)]
        done = outputs / f"{scenario.name}.done"
        if not done.exists() or done.read_text() != " ".join(options):
            shutil.rmtree(out, ignore_errors=True)
            self._run([*options, "--out", str(out)])
            done.write_text(" ".join(options))
        result = json.loads((out / "result.json").read_text().replace(str(self.folder), "WORK"))
        return Made(_digests(out), _lasting(result))

    def _run(self, options: list[str]) -> None:
        """Run a command of this checkout's shardprune."""
        own = {"PYTHONPATH": str(self.root), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "shardprune", *options],
            cwd=self.root,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise Failed(f"{self.root} ended with exit code {done.returncode}:\n{done.stdout}")


def _digests(out: Path) -> dict[str, str]:
    """Hash every tensor and every config.json of all checkpoints at or below a folder."""
    digests = {}
    for file in sorted(out.rglob("config.json")):
        digests[str(file.relative_to(out))] = hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(out.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
                digests[str(file.parent.relative_to(out) / name)] = digest.hexdigest()
    return digests


def _lasting(value: Any) -> Any:
    """What is the same in every run of the same code."""
    if isinstance(value, dict):
        return {key: _lasting(part) for key, part in value.items() if key not in VARYING}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


# -- the comparison ---------------------------------------------------------------------------------------------------


def differing(before: Any, after: Any, name: str = "") -> list[str]:
    """Name the places where two JSON values differ, such as `sparsity.layers[2].achieved`."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        pairs = [(before.get(key), after.get(key), f"{name}.{key}".lstrip(".")) for key in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(*pair, f"{name}[{index}]") for index, pair in enumerate(zip(before, after, strict=True))]
    else:
        return [] if before == after else [f"{name}: {before} -> {after}"]
    return [difference for pair in pairs for difference in differing(*pair)]


def compare(family: str, scenario: Scenario, backend: str, checkouts: list[Checkout]) -> bool:
    """Carry out a scenario with both checkouts and print its row; return whether all is equal."""
    try:
        before, after = (checkout.make(scenario, backend) for checkout in checkouts)
    except Failed as error:
        print(f"| {family} | {scenario.name} | {backend} | | failed | failed |\n{error}", flush=True)
        return False
    names = before.digests.keys() | after.digests.keys()
    changed = sorted(name for name in names if before.digests.get(name) != after.digests.get(name))
    fields = differing(before.result, after.result)
    equal = ["no" if differs else "yes" for differs in (changed, fields)]
    tensors = sum(not name.endswith("config.json") for name in names)
    print(f"| {family} | {scenario.name} | {backend} | {tensors} | {equal[0]} | {equal[1]} |", flush=True)
    for difference in (*changed, *fields):
        print(f"    {difference}", flush=True)
    return not changed and not fields


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("before", type=Path, help="checkout")
    parser.add_argument("after", type=Path, help="checkout")
    parser.add_argument("--only", nargs="+", choices=BY_NAME, default=list(BY_NAME), metavar="NAME", help="scenarios")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["llama"], metavar="FAMILY", help="models")
    parser.add_argument("--backend", choices=(*BACKENDS, "both"), default="both")
    parser.add_argument("--work", type=Path, default=Path("runs/same_bits"), help="directory of inputs and outputs")
    options = parser.parse_args()
    work = options.work.resolve()
    print("| family | scenario | backend | tensors | equal | result.json equal |\n|---|---|---|---|---|---|")
    backends = BACKENDS if options.backend == "both" else (options.backend,)
    rows = []
    for family in options.families:
        make_inputs(work / "inputs" / family, family)
        checkouts = [Checkout(root, work, family) for root in (options.before, options.after)]
        rows += [compare(family, BY_NAME[name], backend, checkouts) for backend in backends for name in options.only]
    return 0 if all(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
