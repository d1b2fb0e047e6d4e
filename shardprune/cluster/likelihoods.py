"""Log-likelihoods of continuations of texts of any length, from a model on its shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.cluster.group import Group
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, judged, through_all_layers
from shardprune.report.progress import Step
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.likelihoods import LogLikelihood, Targets
from shardprune.shard.waves import Wave

MULTIPLE = 8  # to which waves are padded, so that there are fewer shapes of them
PADDING = 0  # token; whatever follows a token has no influence on it


@dataclass(frozen=True)
class Query:
    """Tokens that the model reads, and continuations that each begin inside them and end one token after them."""

    tokens: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


class Queries(Waves):
    """Queries as waves over the replicas, the longest first.

    Waves are made of the queries alone, so that no result depends on the number of workers.

    Args:
        size: queries of a wave; None for as many as fit into `wave_tokens`, padding included.
        longest: the most tokens that a wave is padded to.
    """

    def __init__(
        self, queries: Sequence[Query], replicas: int, size: int | None, wave_tokens: int, longest: int
    ) -> None:
        self.order = sorted(range(len(queries)), key=lambda place: (-len(queries[place].tokens), queries[place].tokens))
        self._queries = [queries[place] for place in self.order]
        self._longest = longest
        self.all = []
        start = 0
        while start < len(queries):
            index = len(self.all)
            stop = min(len(queries), start + (size or max(1, wave_tokens // self._width(start))))
            self.all.append(Wave(index, index % replicas, start, stop))
            start = stop

    def windows(self, wave: Wave) -> Tensor:
        """Return the tokens [wave, width] of one wave, padded on the right."""
        tokens = torch.full((wave.stop - wave.start, self._width(wave.start)), PADDING, dtype=torch.int64)
        for row, query in zip(tokens, self._queries[wave.start : wave.stop], strict=True):
            row[: len(query.tokens)] = torch.tensor(query.tokens)
        return tokens

    def targets(self, wave: Wave) -> list[Targets]:
        """Return the continuations of each sequence of a wave."""
        return [Targets(len(query.tokens), query.continuations) for query in self._queries[wave.start : wave.stop]]

    def _width(self, start: int) -> int:
        """Return the length that a wave is padded to whose first and longest query is the one at `start`."""
        longest = len(self._queries[start].tokens)
        return max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, self._longest))


def log_likelihoods(
    group: Group, layout: Layout, queries: Queries, streamed: bool, step: Step
) -> Iterator[tuple[int, list[LogLikelihood]]]:
    """Yield each query's place among those given, with the log-likelihood of every continuation and whether greedy
    decoding would give it, as soon as they are known."""
    waves = {wave.index: wave for wave in queries.all}
    arrived = through_all_layers(group, layout, queries, "dense", streamed, step)
    for index, values in judged(group, layout, arrived, ForwardWorker.log_likelihoods, queries.targets, step):
        wave = waves[index]
        yield from zip(queries.order[wave.start : wave.stop], values, strict=True)
