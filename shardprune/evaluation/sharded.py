"""A model on its shards, which answers for as long as there are workers: what is lost is asked again."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardprune.cluster.defaults import device_of, threads_of
from shardprune.cluster.group import Backend, Group, check_room
from shardprune.cluster.layout import Layout, plan_layout
from shardprune.cluster.likelihoods import Queries, Query, log_likelihoods
from shardprune.cluster.object_store import store_bytes
from shardprune.cluster.passes import Waves, load, parts_of_pass, perplexity, usage
from shardprune.cluster.placement import worker_settings
from shardprune.cluster.restarts import Attempts
from shardprune.model.checkpoint import place_of
from shardprune.model.opening import open_model
from shardprune.recipes.evaluate import ShardFields
from shardprune.recipes.groups import WAVE_TOKENS, wave_of
from shardprune.report.progress import Reporter
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.likelihoods import LogLikelihood
from shardprune.shard.spec import ForwardSpec
from shardprune.storage.locations import check_reachable


class ShardedModel:
    """A checkpoint whose layers lie on workers, which start with the first question and stay until `close`.

    `settings` are as asked for, with every choice made that was left open.

    Raises:
        InputError: there is no such model, or the workers do not fit.
    """

    def __init__(self, model: str, settings: ShardFields, backend: Backend, reporter: Reporter) -> None:
        check_reachable("model", model, settings.backend)
        slots = backend.slots()
        device = device_of(settings.device, slots)
        fp8_as = torch.float32 if settings.dtype == "float32" else None
        self.opened = open_model(model, float32=fp8_as is not None or device == "cpu", fp8_as=fp8_as)
        self.checkpoint, self.skeleton = self.opened.checkpoint, self.opened.skeleton
        self._model = place_of(model)
        shards = settings.shards or 1
        replicas = settings.replicas or (max(1, slots.gpus // shards) if device == "cuda" else 1)
        self.layout = plan_layout(self.skeleton.layers, replicas, "exact", shards, replicas, None)
        check_room(backend, self.layout.workers, device)
        self._device, self._threads = device, settings.threads or threads_of(slots, self.layout.workers)
        self.settings = settings.model_copy(
            update={"device": device, "shards": shards, "replicas": replicas, "threads": self._threads}
        )
        self.restarts = 0
        self._backend, self.reporter = backend, reporter
        self._group: Group | None = None

    # -- questions --------------------------------------------------------------------------------------------

    def perplexity(self, windows: Tensor) -> float:
        """Return exp of the mean token loss over all windows [windows, seqlen].

        Raises:
            WorkerLost: workers died more than `max_restarts` times in all.
        """
        seqlen = windows.shape[1]
        size = wave_of(self.settings.wave, seqlen)
        value = math.nan
        for attempt in self._attempts():
            with attempt as layout, self._workers(layout, size * seqlen) as group:
                waves = Waves(windows, layout.replicas, size)
                parts = parts_of_pass(waves, self.skeleton.layers, self._streamed)
                with self.reporter.step("perplexity", parts) as step:
                    value = perplexity(group, layout, waves, "dense", self._streamed, step)
        self.checkpoint.check_unchanged()
        return value

    def log_likelihoods(self, queries: Sequence[Query], longest: int) -> list[list[LogLikelihood]]:
        """Return the log-likelihood of the continuations of every query, and whether greedy decoding would give them.

        Args:
            longest: the most tokens that the model takes.

        Raises:
            WorkerLost: workers died more than `max_restarts` times in all.
        """
        found: dict[int, list[LogLikelihood]] = {}
        most = max((len(query.tokens) for query in queries), default=1)
        for attempt in self._attempts():
            with attempt as layout, self._workers(layout, (self.settings.wave or 1) * most) as group:
                left = [place for place in range(len(queries)) if place not in found]
                wanted = [queries[place] for place in left]
                waves = Queries(wanted, layout.replicas, self.settings.wave, WAVE_TOKENS, longest)
                parts = parts_of_pass(waves, self.skeleton.layers, self._streamed)
                with self.reporter.step("log-likelihoods", parts) as step:
                    for place, values in log_likelihoods(group, layout, waves, self._streamed, step):
                        found[left[place]] = values  # is not asked again after a loss
        self.checkpoint.check_unchanged()
        return [found[place] for place in range(len(queries))]

    def usage(self) -> list[dict[str, Any]]:
        """Return where the workers are and what they took; nothing where nothing was asked."""
        return usage(self._group, self.layout) if self._group else []

    def close(self) -> None:
        """End the workers."""
        group, self._group = self._group, None
        if group:
            group.close()

    # -- inside -----------------------------------------------------------------------------------------------

    @property
    def _streamed(self) -> bool:
        return self.settings.asked.streamed

    def _attempts(self) -> Attempts[Layout]:
        """Return attempts at a question until one ends without losing workers; `max_restarts` counts all questions."""
        left = self.settings.max_restarts - self.restarts
        return Attempts(self.layout, self._device, left, self._backend, self.reporter, self._lost)

    @contextmanager
    def _workers(self, layout: Layout, wave_tokens: int) -> Iterator[Group]:
        """Give the workers, which are started where there are none, and stay unless the block fails."""
        self.layout = layout
        try:
            if self._group is None:
                self._group = self._start(wave_tokens)
                if not self._streamed:
                    load(self._group, layout, "dense")
            yield self._group
        except BaseException:
            self.close()
            raise

    def _lost(self) -> None:
        self.restarts += 1

    def _start(self, wave_tokens: int) -> Group:
        tokens = max(wave_tokens, WAVE_TOKENS)
        wave = tokens * self.skeleton.wave_columns(tokens) * self.skeleton.dtype.itemsize
        # No sums are exchanged between replicas here, and no weights are sent.
        return self._backend.start(self._specs(), store_bytes(self.layout, wave), ForwardWorker)

    def _specs(self) -> list[ForwardSpec]:
        workers = worker_settings(self.settings, self._model, self._device, self.skeleton.dtype, self._threads)
        if workers.activations == "auto":
            # What is asked next is not known when workers start: only host memory may hold all of it.
            workers = replace(workers, activations="host")
        state = self.checkpoint.state()
        return [
            ForwardSpec(workers, shard, replica, layers, activation_bytes=0, model=state)
            for shard, layers in enumerate(self.layout.shards)
            for replica in range(self.layout.replicas)
        ]
