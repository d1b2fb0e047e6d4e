"""The models of the benchmark with their texts, which are tokenised, or written by the model, once for all rows."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.store import digest
from shardprune import Recipe, prune
from shardprune.model.opening import open_model, open_texts
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter
from shardprune.storage.output_names import RESULT
from shardprune.storage.windows import calibration_windows

SELF = "self"


@dataclass(frozen=True)
class Case:
    """A model, the text that it is measured on, and sources of calibration text by their names in the table."""

    model: str
    eval: str
    texts: Mapping[str, str]

    @classmethod
    def parse(cls, words: list[str]) -> "Case":
        """Read a case from the words MODEL EVAL NAME=SOURCE ..., where the model may be `bundled`."""
        model, text, *named = words if len(words) > 1 else [*words, ""]
        if not named or not all(word.find("=") > 0 for word in named):
            raise ValueError(f"{' '.join(words)!r} is no case; use MODEL EVAL NAME=SOURCE ...")
        return cls(bundled_model() if model == "bundled" else model, text, dict(word.split("=", 1) for word in named))

    @property
    def name(self) -> str:
        return Path(self.model).name


class Texts:
    """The texts of a case as files below a folder.

    Args:
        shared: fields of every recipe, `samples`, `seqlen` and `seed` among them.
        windows: of the text that perplexity is measured on, the first so many.
    """

    def __init__(self, case: Case, folder: Path, shared: Mapping[str, Any], windows: int) -> None:
        self._case, self._folder, self._shared, self._windows = case, folder, shared, windows

    def source(self, text: str) -> str:
        """Return the source of a calibration text, from a file that `prepare` has made."""
        source = self._case.texts[text]
        return f"self:{self._written}" if source == SELF else str(self._tokens(source, "calibration"))

    @property
    def measured(self) -> str:
        """The source of the text that perplexity is measured on."""
        return str(self._tokens(self._case.eval, "perplexity"))

    def prepare(self) -> None:
        """Make the files that are not there."""
        opened = open_model(self._case.model)
        samples, seqlen, seed = (self._shared[name] for name in ("samples", "seqlen", "seed"))
        vocabulary = opened.skeleton.config.vocab_size
        for source in self._case.texts.values():
            if source == SELF:
                self._let_model_write()
            elif not (file := self._tokens(source, "calibration")).exists():
                _write(file, calibration_windows(source, opened.tokenizer, samples, seqlen, seed, vocabulary).numpy())
        file = self._tokens(self._case.eval, "perplexity")
        if not file.exists():
            (windows,) = open_texts([self._case.eval], opened, seqlen, self._windows).values()
            _write(file, windows.numpy())

    def decided(self, text: str) -> dict[str, Any]:
        """Return what decides the windows of a text, whatever the machine."""
        return {"source": Path(self._case.texts[text]).name} | {
            name: self._shared[name] for name in ("samples", "seqlen", "seed")
        }

    def measured_decided(self) -> dict[str, Any]:
        """Return what decides the windows that perplexity is measured on, whatever the machine."""
        return {"source": Path(self._case.eval).name, "windows": self._windows, "seqlen": self._shared["seqlen"]}

    @property
    def _written(self) -> Path:
        """The output of the run whose model writes."""
        return self._folder / "self-{seed}-{samples}x{seqlen}-{device}".format(**self._shared)

    def _tokens(self, source: str, role: str) -> Path:
        drawn = {name: self._shared[name] for name in ("samples", "seqlen", "seed")} | {"windows": self._windows}
        return self._folder / f"{role}-{digest({'source': Path(source).name} | drawn)}.npy"

    def _let_model_write(self) -> None:
        if (self._written / RESULT).exists():
            return
        cheapest = {"method": "magnitude", "sparsity": 0.0, "measure_error": False, "report": False}
        fields = {**self._shared, **cheapest, "model": self._case.model, "calibration": "self"}
        prune(Recipe.checked({**fields, "out": str(self._written)}), Reporter(quiet=True))


def _write(file: Path, tokens: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as opened:
        np.save(opened, tokens)
    partial.rename(file)
