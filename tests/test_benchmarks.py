"""Every benchmark runs, at a size that says nothing."""

import importlib
import pkgutil
import re
import sys

import pytest

import benchmarks
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.tiny import GROUPED, make_model
from tests.support.words import words_tokenizer

TEXT = ("--calibration", "constraints.txt")  # a short one, which is soon tokenised
SMALL = {
    "clients": ("--hidden", "64", "--layers", "1", "--tokens", "2", "--outputs", "experts"),
    "digests": (
        *("--methods", "magnitude", "--hidden", "32", "--layers", "2", "--samples", "2", "--seqlen", "16"),
        *("--repeats", "1"),
    ),
    "layer_70b": (
        *("--device", "cpu", "--hidden", "64", "--intermediate", "96", "--heads", "4", "--kv-heads", "2"),
        *("--samples", "4", "--seqlen", "32", "--warmup", "--repeat", "2"),
    ),
    "distillation": (
        *("--steps", "2", "--every", "1", "--batch", "2", "--samples", "2", "--seqlen", "64", "--eval-windows", "2"),
        *("--tops", "4", "--data", "constraints.txt", "--eval", "constraints.txt", *TEXT),
    ),
    "expert_memory": ("--gigabytes", "0.01", "--samples", "2", "--seqlen", "16"),
    "experts": (
        *("--samples", "2", "--seqlen", "16", "--eval-windows", "2", "--shares", "0.34", "--scores", "reap", "aimer"),
        *("--propagated", "ean", "--merged", "reap", "--trained", "--reconstructed"),
        *("--draws", "1", "--eval", "constraints.txt", *TEXT),
    ),
    "launches": ("--hidden", "64"),
    "peers": (
        *("--samples", "2", "--seqlen", "64", "--random-samples", "2", "--random-seqlen", "32"),
        *("--hidden", "128", "--layers", "1", "--threads", "1", "--repeats", "1"),
    ),
    "paths": (
        *("--steps", "1", "--tune", "1", "--samples", "8", "--seqlen", "64", "--eval-windows", "2", "--jobs", "1"),
        *("--remove", "0.1", "--ways", "random", "tuned", "--seeds", "0", "--data", "constraints.txt"),
        *("--eval", "constraints.txt", *TEXT),
    ),
    "propagation": (
        *("--samples", "2", "--seqlen", "64", "--workers", "2", "--repeats", "1"),
        *("--backend", "local", "--eval", "constraints.txt", *TEXT),
    ),
    "masks": (
        *("--samples", "2", "--seqlen", "64", "--eval-windows", "2", "--thresholds", "0.3", "--sparsity", "0.5"),
        *("--jobs", "1", "--threads", "2", "--methods", "sparsegpt", "--allocations", "mosaic"),
        *("--eval", "constraints.txt", *TEXT),
    ),
    "quality": (
        *("--samples", "2", "--seqlen", "16", "--eval-windows", "2", "--settings", "0.5", "2:4"),
        *("--only", "*/OWL", "*/0.5/Wanda", "--case", "bundled", "constraints.txt", "own=self"),
    ),
    "packed_attention": ("--length", "64", "--examples", "16", "--hidden", "128", "--layers", "1", "--rounds", "1"),
    "real_widths": ("qwen3-235b", "--scale", "16", "--experts", "4", "--samples", "2", "--seqlen", "16"),
    "rebuilding": ("--samples", "2", "--seqlen", "64", "--repeats", "1", *TEXT),
    "reconstruction": (
        *("--ways", "norms, too", "attention and MLP apart", "two layers together", "masks that move, 20 %"),
        *("--samples", "2", "--seqlen", "32", "--eval-windows", "2", "--eval", "constraints.txt", *TEXT),
    ),
    "recovery": (
        *("--steps", "1", "--samples", "2", "--seqlen", "64", "--eval-windows", "2", "--zero", "1", "--workers", "1"),
        *("--backend", "local", "--remove", "0.1", "--data", "constraints.txt", "--eval", "constraints.txt"),
        *("--teacher-weights", "1", "--models", "MoP", *TEXT),
    ),
    "searching": ("--samples", "4", "--seqlen", "64", "--repeats", "1", "--backend", "local", "--path", "G", *TEXT),
    "segments": (
        *("--samples", "8", "--seqlen", "32", "--eval-windows", "2", "--quality", "fast", "--segments", "2"),
        *("--eval", "constraints.txt", *TEXT),
    ),
    "structured": (
        *("--shares", "0.1", "--samples", "8", "--seqlen", "64", "--eval-windows", "2", "--tokens", "4"),
        *("--repeats", "1", "--jobs", "1", "--threads", "1", "--ways", "MoP, only widths", "MoP, perplexity path"),
        *("--reconstruct", "1", "--eval", "constraints.txt", *TEXT),
    ),
    "solver": ("--rows", "64", "--cols", "256", "--repeats", "1"),
    "training_memory": ("--hidden", "64", "--layers", "1", "low-rank, ZeRO 2, images"),
    "writing_behind": ("--hidden", "32", "--layers", "2", "--samples", "2", "--seqlen", "16", "--repeats", "1"),
    "streamed_memory": ("--gigabytes", "0.1", "--samples", "2", "--seqlen", "32", "--backend", "local"),
}
KEPT = {"quality"}  # which keep what they have measured
PRINTED = {
    "clients": "| experts | transformers |",
    "digests": "| magnitude |",
    "layer_70b": "peak memory",
    "distillation": "| 4 stored |",
    "expert_memory": "a worker's peak: planned",
    "experts": "| reap, merged |",
    "launches": "planned for an H200",
    "peers": "before the first layer",
    "packed_attention": "| 16 |",
    "paths": "| tuned |",
    "propagation": "prune step",
    "masks": "| sparsegpt | mosaic |",
    "quality": "| OWL |",
    "real_widths": "measured peak",
    "rebuilding": "| owl |",
    "reconstruction": "| masks that move, 20 % |",
    "recovery": "| MoP | all weights | 1 | 1 |",
    "searching": "| obs, corrected |",
    "segments": "| fast |",
    "structured": "| 0.1 | MoP, perplexity path, trained |",
    "solver": "masks agree",
    "streamed_memory": "peak",
    "training_memory": "| low-rank, ZeRO 2, images |",
    "writing_behind": "| behind |",
}


TAKE_ANY_MODEL = (
    "distillation",
    "masks",
    "paths",
    "propagation",
    "rebuilding",
    "reconstruction",
    "recovery",
    "searching",
    "segments",
    "structured",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A model in the place of the bundled one, which takes seconds a run."""
    folder = tmp_path_factory.mktemp("benchmarks") / "model"
    name, values = GROUPED["llama"]
    make_model(folder, "llama", configs={"llama": (name, {**values, "max_position_embeddings": 4096})})
    words_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> str:
    """A model with experts."""
    folder = tmp_path_factory.mktemp("benchmarks") / "mixture"
    make_architecture(folder, "qwen3_moe", MIXTURES["qwen3_moe"])
    words_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.long
def test_a_benchmark_runs_and_prints_its_table(name, tiny, mixture, monkeypatch, capsys, tmp_path):
    model = ("--model", tiny) if name in TAKE_ANY_MODEL else ("--model", mixture) if name == "experts" else ()
    out = ["--out", str(tmp_path)] if name in KEPT else []
    words = [tiny if word == "bundled" else word for word in SMALL[name]]
    monkeypatch.setattr(sys, "argv", [name, *out, *words, *model])
    module = importlib.import_module(f"benchmarks.{name}")
    if hasattr(module, "__path__"):  # a package
        module = importlib.import_module(f"benchmarks.{name}.__main__")
    module.main()
    assert PRINTED[name] in capsys.readouterr().out


def test_every_benchmark_is_run_and_listed():
    modules = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)} - {"options"}  # of several
    tested_apart = {"same_bits", "gpu"}  # in test_same_bits.py and test_gpu_benchmark.py
    assert modules == SMALL.keys() | tested_apart == set(re.findall(r"^(\w+)  ", benchmarks.__doc__, re.MULTILINE))


def test_rows_that_are_measured_are_not_measured_again(tiny, monkeypatch, capsys, tmp_path):
    """What a benchmark that is cut off has left, and what another version takes of it."""
    from benchmarks.quality import __main__ as quality
    from benchmarks.quality import cases, measuring

    runs = []
    prune = measuring.prune
    for module in (cases, measuring):
        monkeypatch.setattr(module, "prune", lambda recipe, reporter: (runs.append(recipe), prune(recipe, reporter))[1])

    def table(*words):
        runs.clear()
        monkeypatch.setattr(sys, "argv", ["quality", "--out", str(tmp_path), *words])
        quality.main()
        return capsys.readouterr().out, len(runs)

    small = (
        *("--samples", "2", "--seqlen", "16", "--eval-windows", "2", "--settings", "0.5", "2:4"),
        "--case",
        tiny,
    )
    text = ("constraints.txt", "own=self")
    first, count = table(*small, *text, "--only", "*/0.5/Wanda")
    assert count == 3  # the text, SparseGPT, Wanda
    assert re.search(r"^\| Wanda \| \d+\.\d{3} \| (-?\d+%)? \| \d+\.\d\d \| 1\.8 \| 0\.5000 \|$", first, re.MULTILINE)
    again, count = table(*small, *text, "--only", "*/0.5/Wanda")
    assert (again, count) == (first, 0)
    both, count = table(*small, *text, "--only", "*/OWL")
    assert count == 2  # OWL at 0.5, and SparseGPT at 2:4, with which OWL does not go
    assert "OWL: left out, allocation: 'owl' needs a sparsity to share out" in both
    assert table(*small, *text, "--only", "*/0.5/SparseGPT", "--seed", "1")[1] == 2  # another text, and the row
    with pytest.raises(SystemExit, match="matches no row"):
        table(*small, *text, "--only", "*/nothing")
