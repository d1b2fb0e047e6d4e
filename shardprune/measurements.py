"""Perplexities that a run has measured, kept from attempt to attempt."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from shardprune.calibration import tokens_hash
from shardprune.result import Perplexity

Record = dict[str, Any]  # seqlen, windows, tokens_sha256, and `before` and `after` as far as they are known


class Measurements:
    """Perplexities by source.

    Args:
        evaluations: windows [windows, seqlen] by source, which a run is to be measured on.
        records: what is known from earlier; of a source that has another text now it counts for nothing.
    """

    def __init__(self, evaluations: dict[str, Tensor], records: dict[str, Record]) -> None:
        self._evaluations = evaluations
        self.records = dict(records)

    def missing(self, when: str) -> Iterator[tuple[Tensor, Record]]:
        """Windows that have not been measured, `before` or `after`, and the record that takes the number."""
        for source, windows in self._evaluations.items():
            tokens = {"seqlen": windows.shape[1], "windows": len(windows), "tokens_sha256": tokens_hash(windows)}
            if not tokens.items() <= self.records.get(source, {}).items():
                self.records[source] = tokens
            record = self.records[source]
            if record.get(when) is None:
                yield windows, record

    def adopt(self, records: dict[str, Record]) -> None:
        """Take over what another run has measured, where it is not known here of the same text."""
        for source, record in records.items():
            own = self.records.get(source, {})
            same = own.get("tokens_sha256") == record["tokens_sha256"]
            self.records[source] = record | own if same else record

    def results(self) -> dict[str, Perplexity]:
        return {source: Perplexity(**record) for source, record in self.records.items()}
