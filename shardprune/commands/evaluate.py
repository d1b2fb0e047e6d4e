"""The story of `shardprune evaluate`."""

from contextlib import closing
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shardprune.cluster.backends import backend_of
from shardprune.cluster.group import Backend
from shardprune.commands.model_card import leave_card
from shardprune.errors import InputError
from shardprune.evaluation.answers import measure_answers, open_answers
from shardprune.evaluation.record import Record
from shardprune.evaluation.sharded import ShardedModel
from shardprune.extras import check_extra
from shardprune.model.checkpoint import ADAPTER, place_of
from shardprune.model.checks import check_seqlen
from shardprune.model.opening import open_texts
from shardprune.model.tokenizer import check_ends
from shardprune.recipes.evaluate import EvaluateRecipe
from shardprune.recovery.rows import Rows
from shardprune.report.clock import Clock
from shardprune.report.page.place import leave_report
from shardprune.report.progress import Reporter
from shardprune.report.result import EvaluationResult, MeasuredPerplexity, WorkerResult
from shardprune.storage.retrying import preflight
from shardprune.storage.windows import tokens_hash

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from shardprune.evaluation.latency import Candidates


def evaluate(recipe: EvaluateRecipe, reporter: Reporter | None = None) -> EvaluationResult:
    """Measure a model as a recipe says; what is measured joins what its result.json has already.

    Raises:
        InputError: something in the recipe cannot work; nothing has been measured then.
        WorkerLost: workers died more than `max_restarts` times.
    """
    reporter = reporter or Reporter()
    with closing(backend_of(recipe)) as backend:
        clock = Clock(reporter.events)
        with clock.phase("plan"), preflight():
            model = ShardedModel(recipe.model, recipe, backend, reporter)
            record = Record(model.checkpoint, recipe.out)
            earlier = record.made()
            windows = _windows(recipe, model)
            answers = open_answers(recipe, model.opened)
            opened = _open_tasks(recipe, model)
            candidates = _open_candidates(recipe, model)
        with closing(model):
            evaluation = _Evaluation(recipe, model, record, clock)
            evaluation.measure_perplexities(windows)
            evaluation.measure_answers(answers)
            if opened:
                evaluation.evaluate_tasks(opened)
            if candidates:
                evaluation.measure_latency(candidates)
            if not record.kept:
                reporter.say(
                    f"{record.folder.url} holds no result of shardprune: nothing is written (--out says where)"
                )
            result = evaluation.result()
    if earlier and (now := record.made()):
        leave_card(record.folder, now, earlier)
    if record.kept and recipe.report:
        leave_report(record.folder.url, reporter, new=True)
    return result


@preflight()
def check_evaluation(recipe: EvaluateRecipe, backend: Backend, reporter: Reporter) -> None:
    """Open everything that an evaluation of a model needs, and measure nothing.

    Raises:
        InputError: something in the recipe cannot work.
    """
    model = ShardedModel(recipe.model, recipe, backend, reporter)
    _windows(recipe, model)
    open_answers(recipe, model.opened)
    _open_tasks(recipe, model)
    _open_candidates(recipe, model)


class _Evaluation:
    """Measurements that are kept as soon as they are made."""

    def __init__(self, recipe: EvaluateRecipe, model: ShardedModel, record: Record, clock: Clock) -> None:
        self.recipe, self.model, self.record, self.clock = recipe, model, record, clock
        self._workers: list[dict[str, Any]] = []

    def measure_perplexities(self, windows: dict[str, Tensor]) -> None:
        for source, tokens in windows.items():
            with self.clock.phase("perplexity"):
                value = self.model.perplexity(tokens)
            measured = MeasuredPerplexity(
                value=value, seqlen=tokens.shape[1], windows=len(tokens), tokens_sha256=tokens_hash(tokens)
            )
            self._keep(perplexity={source: measured})

    def measure_answers(self, opened: dict[str, Rows]) -> None:
        for source, rows in opened.items():
            self.model.close()  # which leaves its memory to the model in this process
            with self.clock.phase("answers"):
                measured = measure_answers(self.recipe, self.model, rows)
            self._keep(answers={source: measured})

    def evaluate_tasks(self, opened: list[Any]) -> None:
        from shardprune.evaluation.tasks import evaluate_tasks

        with self.clock.phase("tasks"):
            results = evaluate_tasks(self._answering(opened), opened, self.recipe)
        self._keep(tasks=results, harness=version("lm-eval"), engine=self.recipe.engine)

    def measure_latency(self, candidates: "Candidates") -> None:
        from shardprune.evaluation.latency import measure

        self.model.close()  # which leaves its memory to the models in this process
        with self.clock.phase("latency"):
            latency = measure(self.recipe, candidates, self.model, self.model.reporter)
        self._keep(latency=latency)

    def result(self) -> EvaluationResult:
        """Return the measurements of this evaluation and of earlier ones."""
        places = {"model": place_of(self.recipe.model), "out": self.record.folder.url if self.record.kept else None}
        settings = self.model.settings.model_copy(update=places)
        return EvaluationResult(
            fingerprint=self.record.fingerprint,
            recipe=settings.record(),
            evaluation=self.record.known,
            seconds=self.clock.total(),
            workers=[WorkerResult(**worker) for worker in self._workers],
            restarts=self.model.restarts,
        )

    def _answering(self, opened: list[Any]) -> "LM":
        """Return the model that answers the tasks: the shards, or lm-eval's own."""
        if self.recipe.engine == "hf":
            from shardprune.evaluation.tasks import showing
            from shardprune.evaluation.whole import whole_model

            self.model.close()  # which leaves its memory to the model in this process
            return whole_model(self.model, seeing=bool(showing(opened)))
        from shardprune.evaluation.harness import ShardedLM

        return ShardedLM(self.model)

    def _keep(self, **measured: Any) -> None:
        self._workers = self.model.usage() or self._workers
        self.record.add(measured, self.result)


def _windows(recipe: EvaluateRecipe, model: ShardedModel) -> dict[str, Tensor]:
    """Windows [windows, seqlen] of every source."""
    if recipe.perplexity:
        check_seqlen(recipe.seqlen, model.skeleton)
    return open_texts(recipe.perplexity, model.opened, recipe.seqlen, recipe.windows, "perplexity")


def _open_candidates(recipe: EvaluateRecipe, model: ShardedModel) -> "Candidates | None":
    if not recipe.latency:
        return None
    from shardprune.evaluation.latency import open_candidates

    return open_candidates(recipe, model)


def _open_tasks(recipe: EvaluateRecipe, model: ShardedModel) -> list[Any]:
    """Return the tasks of a recipe; lm-eval is imported only where there are some.

    Raises:
        InputError: a task is not known, the model's tokenizer cannot serve it, or the engine loads something else.
    """
    if not recipe.tasks:
        return []
    check_extra("eval", "tasks")
    try:
        from shardprune.evaluation.tasks import load_tasks, showing, writes
    except ImportError as error:
        raise InputError("tasks", f"lm-eval cannot be imported: {error}") from error
    if recipe.engine == "hf" and model.checkpoint.folder.is_file(ADAPTER):
        where = model.checkpoint.folder.url
        raise InputError("engine", f"'hf' would apply the adapter in {where}, which shards do not; use shards")
    tasks = load_tasks(recipe)
    if (names := showing(tasks)) and not model.checkpoint.has_tower:
        raise InputError("tasks", f"{names[0]!r} shows images, and the model sees none")
    check_ends(model.opened.tokenizer(), "model", writes=writes(tasks))
    return tasks
