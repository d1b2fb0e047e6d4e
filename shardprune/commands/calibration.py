"""The calibration text of a run: windows of sources, and what the model itself writes before anything else is done."""

from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shardprune.cluster.generation import layout_of_writing, parts_of_writing, write
from shardprune.cluster.group import Backend
from shardprune.cluster.layout import Layout
from shardprune.cluster.object_store import store_bytes
from shardprune.cluster.passes import digests
from shardprune.cluster.restarts import Attempts
from shardprune.commands.state import RunState
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.companions import has_tokenizer
from shardprune.model.draft import Draft, Kept, draft_of, kept_by
from shardprune.model.opening import OpenedModel
from shardprune.model.skeleton import Skeleton
from shardprune.model.verification import check_class_writes
from shardprune.recipes.groups import CalibrationFields, batch_of
from shardprune.report.clock import Clock
from shardprune.report.progress import Reporter
from shardprune.shard.generation_worker import GenerationWorker
from shardprune.shard.spec import GenerationSpec, WorkerSettings
from shardprune.storage import self_text
from shardprune.storage.folder import Folder, output_folder
from shardprune.storage.mixture import order_of, windows_of
from shardprune.storage.windows import calibration_windows, tokens_hash


@dataclass(frozen=True)
class Writing:
    """A text that a model is to write after a `draft`, as the part of a mixture at `place`; it is kept in the output
    `out`. `layout` is the run's, for the workers that there are."""

    draft: Draft
    place: int
    checkpoint: Checkpoint
    skeleton: Skeleton
    settings: WorkerSettings
    layout: Layout
    out: str

    @property
    def folder(self) -> Folder:
        """The output that keeps the text."""
        return output_folder(self.out)

    @cached_property
    def text(self) -> dict[str, Any]:
        """Everything that decides the text."""
        model, dtype = self.checkpoint.identity(), str(self.skeleton.dtype)
        return {"model": model, "dtype": dtype, "draft": self.draft.record()}

    def specs(self, layout: Layout) -> list[GenerationSpec]:
        """Return what each worker of a layout must know."""
        state = self.checkpoint.state()
        return [
            GenerationSpec(
                settings=self.settings,
                shard=shard,
                replica=replica,
                layers=layers,
                activation_bytes=0,
                model=state,
                draft=self.draft,
                workers=layout.workers,
            )
            for shard, layers in enumerate(layout.shards)
            for replica in range(layout.replicas)
        ]


class CalibrationText:
    """The windows of a run's calibration, those of all parts of its mixture.

    Args:
        counts: windows of each part.
        read: the windows [windows, seqlen] of each part that is there, by its place.
        draft: of the part that the model writes, with its place.
    """

    def __init__(self, counts: list[int], read: dict[int, Tensor], draft: tuple[int, Draft] | None) -> None:
        self.counts, self._read, self._draft = counts, read, draft
        self.writing: Writing | None = None  # where the model writes a part
        self._written: Tensor | None = None

    @cached_property
    def windows(self) -> Tensor:
        """All windows in their order, int64 [samples, seqlen]."""
        parts = dict(self._read)
        if self._draft:
            assert self._written is not None, "the model has not written its part"
            parts[self._draft[0]] = self._written
        if not self.counts:
            return torch.empty(0, 0, dtype=torch.int64)
        return torch.stack([parts[part][window] for part, window in order_of(self.counts)])

    def identity(self) -> dict[str, Any]:
        """Return what tells runs apart by their text, which need not be written for that."""
        if self._draft is None:
            return {"tokens": tokens_hash(self.windows)}
        read = {str(place): tokens_hash(windows) for place, windows in sorted(self._read.items())}
        return {"tokens": read, "windows": self.counts, "written": self._draft[1].record()}

    def written_by(
        self, checkpoint: Checkpoint, skeleton: Skeleton, settings: WorkerSettings, layout: Layout, out: str
    ) -> "CalibrationText":
        """Return this text with the model that writes its part, if it has one, and the output that keeps that."""
        if self._draft:
            place, draft = self._draft
            self.writing = Writing(draft, place, checkpoint, skeleton, settings, layout, out)
        return self

    def complete(self, state: RunState, restarts: int, backend: Backend, reporter: Reporter, clock: Clock) -> None:
        """Let the model write its part, or what an earlier attempt has left of it; nothing where it is there.

        Raises:
            InputError: a worker has too little memory, or the text is not the one that finished layers have seen.
            WorkerLost: workers died more than `restarts` times.
        """
        if self.writing is None or self._written is not None:
            return
        kept = self_text.found(self.writing.folder, self.writing.text)
        if kept is not None and len(kept) == self.writing.draft.sequences:
            reporter.say("the model has written its calibration text already")
            self._written = kept
        else:
            with clock.phase("generate"):
                self._written = _written(self.writing, kept, state, restarts, backend, reporter)
        state.keep_text(self._written)


def text_of(recipe: CalibrationFields, opened: OpenedModel) -> CalibrationText:
    """Read the windows of all sources that are read, and decide by what the rest is written; none of a run that makes
    no pass.

    Raises:
        InputError: a source cannot give its windows, or has tokens that the model has not.
    """
    if not getattr(recipe, "reads_text", True):
        return CalibrationText([], {}, None)
    seqlen, skeleton = recipe.seqlen, opened.skeleton
    vocabulary = skeleton.config.vocab_size
    counts = windows_of(recipe.parts, recipe.samples)
    read: dict[int, Tensor] = {}
    draft = None
    for place, (part, count) in enumerate(zip(recipe.parts, counts, strict=True)):
        if part.is_written:
            check_class_writes(skeleton.config)
            tokenizer = opened.tokenizer() if has_tokenizer(opened.checkpoint.folder) else None
            kept = sum(kept_by(skeleton, range(skeleton.layers)), Kept()).bytes_of(seqlen, skeleton.dtype)
            own = draft_of(
                skeleton,
                tokenizer,
                sequences=count,
                seqlen=seqlen,
                seed=recipe.seed,
                temperature=recipe.self_temperature,
                batch=batch_of(recipe.self_batch, kept // skeleton.dtype.itemsize),
                beginning=recipe.self_bos,
            )
            draft = place, own
        elif part.folder:
            read[place] = self_text.load(part.folder, count, seqlen, vocabulary)
        else:
            read[place] = calibration_windows(part.source, opened.tokenizer, count, seqlen, recipe.seed, vocabulary)
    return CalibrationText(counts, read, draft)


def _written(
    writing: Writing, kept: Tensor | None, state: RunState, restarts: int, backend: Backend, reporter: Reporter
) -> Tensor:
    """Return the sequences [sequences, seqlen] of a text, those that are written now kept as soon as they are there.

    Args:
        kept: the sequences that are there already.
    """
    draft, settings = writing.draft, writing.settings
    rounds = [] if kept is None else [kept]
    layout = layout_of_writing(writing.layout, settings.streamed, len(draft.batches))
    wave = draft.batch * writing.skeleton.wave_columns(1) * writing.skeleton.dtype.itemsize
    for attempt in Attempts(layout, settings.device, restarts, backend, reporter, state.lost):
        with attempt as placed:
            group = backend.start(writing.specs(placed), store_bytes(placed, wave), GenerationWorker)
            with closing(group):
                done = sum(map(len, rounds))
                with reporter.step("generate", parts_of_writing(draft, done)) as step:
                    for tokens in write(group, placed, draft, done, step):
                        rounds.append(tokens)
                        self_text.save(writing.folder, writing.text, torch.cat(rounds))
                if state.reads(writing.checkpoint):
                    state.learn(digests(group, placed))
    return torch.cat(rounds)
