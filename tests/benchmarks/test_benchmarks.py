"""Every benchmark runs, at a size that says nothing."""

import importlib
import sys

import pytest

SMALL = {
    "layer_70b": (
        *("--device", "cpu", "--hidden", "64", "--intermediate", "96", "--heads", "4", "--kv-heads", "2"),
        *("--samples", "4", "--seqlen", "32"),
    ),
    "quality": (
        *("--samples", "2", "--seqlen", "64", "--eval-windows", "2", "--thresholds", "0.3", "--sparsity", "0.5"),
        *("--jobs", "1", "--threads", "2", "--methods", "sparsegpt", "--allocations", "mosaic"),
    ),
    "rebuilding": ("--samples", "2", "--seqlen", "64", "--repeats", "1"),
    "recovery": (
        *("--steps", "1", "--samples", "2", "--seqlen", "64", "--eval-windows", "2", "--zero", "1", "--workers", "1"),
        *("--backend", "local", "--remove", "0.1", "--data", "constraints.txt", "--eval", "constraints.txt"),
        *("--calibration", "constraints.txt", "--teacher-weights", "1", "--models", "MoP"),
    ),
    "searching": ("--samples", "4", "--seqlen", "64", "--repeats", "1", "--backend", "local", "--path", "G"),
    "structured": (
        *("--shares", "0.1", "--samples", "2", "--seqlen", "64", "--eval-windows", "2", "--tokens", "4"),
        *("--repeats", "1", "--jobs", "1", "--threads", "1", "--ways", "MoP, perplexity path"),
    ),
    "streamed_memory": ("--gigabytes", "0.2", "--samples", "2", "--seqlen", "32", "--backend", "local"),
}
PRINTED = {
    "layer_70b": "peak memory",
    "quality": "| sparsegpt | mosaic |",
    "rebuilding": "| owl |",
    "recovery": "| MoP | all weights | 1 | 1 |",
    "searching": "| obs, corrected |",
    "structured": "| 0.1 | MoP, perplexity path |",
    "streamed_memory": "peak",
}


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_and_prints_its_table(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name]])
    importlib.import_module(f"tests.benchmarks.{name}").main()
    assert PRINTED[name] in capsys.readouterr().out
