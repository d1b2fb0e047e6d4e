"""A model on its shards, which answers for as long as there are workers: what is lost is asked again."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from shardprune.cluster.defaults import device_of, dtype_of, threads_of
from shardprune.cluster.group import Backend, Group, check_room
from shardprune.cluster.layout import Layout, plan_layout
from shardprune.cluster.likelihoods import Queries, Query, log_likelihoods
from shardprune.cluster.object_store import MIN_STORE_BYTES
from shardprune.cluster.passes import Waves, load, parts_of_pass, perplexity, usage
from shardprune.cluster.restarts import persevere
from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint, place_of
from shardprune.model.checks import check_tensors
from shardprune.model.skeleton import Skeleton
from shardprune.recipes.evaluate import ShardFields
from shardprune.recipes.groups import WAVE_TOKENS
from shardprune.report.progress import Reporter
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.likelihoods import LogLikelihood
from shardprune.shard.spec import ForwardSpec
from shardprune.storage.folder import in_process_only


class ShardedModel:
    """A checkpoint whose layers lie on workers, which start with the first question and stay until `close`.

    `settings` are as asked for, with every choice made that was left open.

    Raises:
        InputError: there is no such model, or the workers do not fit.
    """

    def __init__(self, model: str, settings: ShardFields, backend: Backend, reporter: Reporter) -> None:
        if in_process_only(model) and settings.backend != "local":
            raise InputError("model", f"{model!r} lives in this process's memory; use backend local")
        self.checkpoint = Checkpoint(place_of(model))
        self._model = place_of(model)
        slots = backend.slots()
        device = device_of(settings, slots)
        self.dtype = dtype_of(settings.model_copy(update={"device": device}), self.checkpoint)
        self.skeleton = Skeleton(self.checkpoint.config, "cpu", self.dtype)
        check_tensors(self.skeleton, self.checkpoint)
        shards = settings.shards or 1
        replicas = settings.replicas or (max(1, slots.gpus // shards) if device == "cuda" else 1)
        self.layout = plan_layout(self.skeleton.layers, replicas, "exact", shards, replicas, None)
        check_room(backend, self.layout.workers, device)
        threads = settings.threads or threads_of(slots, self.layout.workers)
        self.settings = settings.model_copy(
            update={"device": device, "shards": shards, "replicas": replicas, "threads": threads}
        )
        self.restarts = 0
        self._backend, self._reporter = backend, reporter
        self._group: Group | None = None

    # -- questions --------------------------------------------------------------------------------------------

    def perplexity(self, windows: Tensor) -> float:
        """exp of the mean token loss over all windows [windows, seqlen]."""
        size = self.settings.wave or max(1, WAVE_TOKENS // windows.shape[1])

        def ask(group: Group, layout: Layout) -> float:
            waves = Waves(windows, layout.replicas, size)
            parts = parts_of_pass(waves, self.skeleton.layers, self._streamed)
            with self._reporter.step("perplexity", parts) as step:
                return perplexity(group, layout, waves, "dense", self._streamed, step)

        return self._ask(ask, size * windows.shape[1])

    def log_likelihoods(self, queries: Sequence[Query], longest: int) -> list[list[LogLikelihood]]:
        """The log-likelihood of the continuations of every query, and whether greedy decoding would give them.

        Args:
            longest: the most tokens that the model takes.
        """
        found: dict[int, list[LogLikelihood]] = {}

        def ask(group: Group, layout: Layout) -> None:
            left = [place for place in range(len(queries)) if place not in found]
            waves = Queries(
                [queries[place] for place in left], layout.replicas, self.settings.wave, WAVE_TOKENS, longest
            )
            parts = parts_of_pass(waves, self.skeleton.layers, self._streamed)
            with self._reporter.step("log-likelihoods", parts) as step:
                for place, values in log_likelihoods(group, layout, waves, self._streamed, step):
                    found[left[place]] = values

        most = max((len(query.tokens) for query in queries), default=1)
        self._ask(ask, (self.settings.wave or 1) * most)
        return [found[place] for place in range(len(queries))]

    def usage(self) -> list[dict[str, Any]]:
        """Where the workers are and what they took; none where nothing was asked."""
        return usage(self._group, self.layout) if self._group else []

    def close(self) -> None:
        """End the workers."""
        group, self._group = self._group, None
        if group:
            group.close()

    # -- inside -----------------------------------------------------------------------------------------------

    @property
    def _streamed(self) -> bool:
        return self.settings.weights == "streamed"

    def _ask(self, ask: Callable[[Group, Layout], Any], wave_tokens: int) -> Any:
        """Ask until there is an answer, with new workers after some were lost.

        Raises:
            WorkerLost: that happened more than `max_restarts` times in all.
        """
        answer = []

        def attempt(layout: Layout) -> None:
            self.layout = layout
            try:
                if self._group is None:
                    self._group = self._start(wave_tokens)
                    if not self._streamed:
                        load(self._group, layout, "dense")
                answer.append(ask(self._group, layout))
            except BaseException:
                self.close()
                raise

        left = self.settings.model_copy(update={"max_restarts": self.settings.max_restarts - self.restarts})
        persevere(attempt, self.layout, left, self._backend, self._reporter, self._lost)
        return answer[0]

    def _lost(self) -> None:
        self.restarts += 1

    def _start(self, wave_tokens: int) -> Group:
        hidden = self.skeleton.config.hidden_size * self.dtype.itemsize
        under_way = 4 * (len(self.layout.shards) + 3 * self.layout.replicas) * max(wave_tokens, WAVE_TOKENS) * hidden
        return self._backend.start(self._specs(), max(MIN_STORE_BYTES, under_way), ForwardWorker)

    def _specs(self) -> list[ForwardSpec]:
        settings = self.settings
        assert settings.threads is not None
        return [
            ForwardSpec(
                model=self._model,
                shard=shard,
                replica=replica,
                layers=layers,
                weights=settings.weights,
                # What is asked next is not known when workers start: only host memory may hold all of it.
                activations="host" if settings.activations == "auto" else settings.activations,
                activation_bytes=0,
                device=settings.device,
                dtype=str(self.dtype).removeprefix("torch."),
                threads=settings.threads,
            )
            for shard, layers in enumerate(self.layout.shards)
            for replica in range(self.layout.replicas)
        ]
