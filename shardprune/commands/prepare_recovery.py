"""Preparation of a fine-tuning: inputs opened and checked, rows made, the fingerprint decided, the output looked at."""

import hashlib
import logging
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from shardprune.cluster.defaults import device_of, threads_of
from shardprune.cluster.group import Backend, Slots, check_room
from shardprune.commands.check_recovery import check_compiler, check_room_for_teacher, check_settings, check_state
from shardprune.commands.state import ZeroCount, run_file
from shardprune.errors import InputError, without_credentials
from shardprune.extras import PACKAGES, check_extra
from shardprune.model.checkpoint import Checkpoint, place_of
from shardprune.model.checks import check_full, check_rank, check_seqlen
from shardprune.model.head_logits import head_logits
from shardprune.model.opening import OpenedModel, open_model, open_texts
from shardprune.model.skeleton import Skeleton
from shardprune.model.vision import check_same_sight
from shardprune.planning.training.images import Images
from shardprune.planning.training.need import paths_of_projections, stages_of, training_need
from shardprune.planning.training.passes import Uncounted
from shardprune.recipes.recover import RecoverRecipe, check_stage
from shardprune.recovery.batches import Batches, Processes, micro_batch_of
from shardprune.recovery.deepspeed_config import check_keeps_zeros, deepspeed_config, read_overrides
from shardprune.recovery.examples import load_rows
from shardprune.recovery.mixing import RowMixture, joined
from shardprune.recovery.predictions import shows_images
from shardprune.recovery.rows import Rows, check_packing, needs_mask
from shardprune.recovery.sight import check_vision, eyes_of, most_shown
from shardprune.recovery.spec import DecidedRecipe, TrainingSpec
from shardprune.recovery.teacher_store import TeacherStore, check_top
from shardprune.report.tracking import check_tracker
from shardprune.shard.memory import check_memory
from shardprune.shard.spec import Need
from shardprune.storage.folder import Folder
from shardprune.storage.journal import Earlier, Journal, check_output, recorded_recipe
from shardprune.storage.json_file import dump_json
from shardprune.storage.locations import absolute, check_reachable
from shardprune.storage.retrying import preflight
from shardprune.storage.sources import is_tokens

_logger = logging.getLogger(__name__)

FORMAT = 2  # of what a fingerprint covers, and of the training's state
STATE = "training"  # folder of an output with the checkpoints of a training run under way
SPARSE = 0.001  # share of zeros from which on a model was made sparse: a dense one has a few by rounding


@dataclass(frozen=True)
class Inputs:
    """The inputs of a fine-tuning, opened and checked, and its recipe with every choice made."""

    recipe: DecidedRecipe
    checkpoint: Checkpoint
    skeleton: Skeleton
    teacher: Checkpoint | None
    rows: Rows
    held_out: Rows
    mixture: RowMixture | None
    evaluations: dict[str, Tensor]
    overrides: dict[str, Any]

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The checkpoints that are read, by the recipe's fields that name them."""
        return {"model": self.checkpoint} | ({"teacher": self.teacher} if self.teacher else {})

    @property
    def images(self) -> Images | None:
        """The images that rows show; None where the model sees none."""
        shown = [rows.images for rows in (self.rows, self.held_out) if rows.images is not None]
        if not shown:
            return None
        teacher = self.teacher.whole_config if self.teacher else None
        most = most_shown(self.checkpoint, self.rows, self.held_out)
        return Images(max(images.most for images in shown), self.checkpoint.whole_config, teacher, most)


@dataclass(frozen=True)
class PreparedRecovery:
    """A training run that can start. `zeros` are those of the model, and `need` is the memory of a process: a finished
    run does not count them again."""

    inputs: Inputs
    steps: int
    zeros: ZeroCount | None
    journal: Journal
    earlier: Earlier
    need: Need | None = None

    @property
    def claim(self) -> str:
        """The text in the directory of training checkpoints that says whose it is: its run and the run's output, which
        may be moved with what lies in it."""
        state, out = self.recipe.state, self.recipe.out
        place = os.path.relpath(out, state) if state.startswith(f"{out}/") else without_credentials(out)
        return f"{self.journal.fingerprint} {place}"

    @property
    def recipe(self) -> DecidedRecipe:
        """With every choice made."""
        return self.inputs.recipe

    @property
    def skeleton(self) -> Skeleton:
        return self.inputs.skeleton

    @property
    def processes(self) -> Processes:
        """The processes that share the training, as planned."""
        return Processes(self.recipe.workers, self.recipe.batch, self.recipe.micro_batch)

    @property
    def targets(self) -> tuple[str, ...]:
        """The paths of all projections."""
        return paths_of_projections(self.skeleton)

    @cached_property
    def teacher_store(self) -> TeacherStore | None:
        """The teacher's predictions in the training's state, where they are stored."""
        recipe, rows = self.recipe, self.inputs.rows
        if recipe.teacher_top is None:
            return None
        batches = Batches(rows, recipe.batch, recipe.micro_batch, recipe.seed, self.inputs.mixture)
        return TeacherStore(Folder(recipe.state, "state"), rows, batches.used(self.steps), recipe.teacher_top)

    @property
    def parameters_trained(self) -> int:
        """The number of parameters that have a gradient."""
        if self.recipe.full:
            return self.skeleton.parameters()
        shapes = [shape for index in range(self.skeleton.layers) for shape in self._shapes(index)]
        return sum(self.recipe.lora_rank * (rows + cols) for rows, cols in shapes)

    def spec(self, processes: Processes) -> TrainingSpec:
        """Return the start-up arguments of the training processes."""
        recipe = self.recipe
        config = deepspeed_config(
            zero=recipe.zero,
            offload=recipe.offload,
            bf16=recipe.precision == "bf16",
            batch=recipe.batch,
            micro=processes.micro,
            processes=processes.count,
            clip=recipe.clip,
            learning_rate=recipe.highest_rate,
            weight_decay=recipe.weight_decay,
            overrides=self.inputs.overrides,
        )
        states = {field: checkpoint.state() for field, checkpoint in self.inputs.checkpoints.items()}
        mixture, need = self.inputs.mixture, self.need
        return TrainingSpec(recipe, self.journal.fingerprint, config, self.targets, self.steps, states, mixture, need)

    def _shapes(self, index: int) -> list[tuple[int, int]]:
        return list(self.skeleton.projection_shapes(index).values())


@preflight()
def open_inputs(asked: RecoverRecipe, backend: Backend) -> Inputs:
    """Open and check everything that a recipe names, and decide what it leaves open.

    Raises:
        InputError: something cannot work.
    """
    check_extra("recover", "recover")
    tracker = (asked.track or "").partition(":")[0]
    if tracker in PACKAGES:  # TensorBoard's writer is one of those that a training needs
        check_extra(tracker, "track")
    overrides = read_overrides(asked.deepspeed) if asked.deepspeed else {}
    if asked.deepspeed and asked.full and asked.keep_sparsity:
        check_keeps_zeros(asked.deepspeed, overrides)
    recipe = _decide(asked, backend.slots())
    for field, url in (("model", recipe.model), ("teacher", recipe.teacher), ("out", recipe.out)):
        if url:
            check_reachable(field, url, recipe.backend)
    if recipe.track:
        check_tracker(recipe.track, recipe.out)
    check_output(recipe.out, recipe.resume)  # before models and texts are read, which may be downloads
    opened = open_model(recipe.model)
    checkpoint, skeleton = opened.checkpoint, opened.skeleton
    stages_of(recipe.zero, skeleton)
    check_seqlen(recipe.length, skeleton, "length")
    head_logits(checkpoint.config)  # which a training has to know
    if recipe.eval:
        check_seqlen(recipe.seqlen, skeleton)
    if recipe.full:
        check_full(skeleton)
    else:
        check_rank(recipe.lora_rank, skeleton)
    teacher = _open_teacher(recipe, recipe.teacher, checkpoint) if recipe.teacher else None
    # What was started goes on with the workers that there are.
    check_room(backend, 1 if recorded_recipe(recipe.out) else recipe.workers, recipe.device, "workers")
    check_compiler(recipe)
    if recipe.packing:
        check_packing(checkpoint.config.model_type)
    learned, held_out, mixture = _load_data(recipe, opened)
    if shows_images(learned):
        _check_vision(recipe, checkpoint, teacher, learned)
    evaluations = open_texts(recipe.eval, opened, recipe.seqlen, recipe.eval_windows)
    return Inputs(recipe, checkpoint, skeleton, teacher, learned, held_out, mixture, evaluations, overrides)


def _load_data(recipe: DecidedRecipe, opened: OpenedModel) -> tuple[Rows, Rows, RowMixture | None]:
    """Return the rows to learn from, the held-out share of every source, and the mixture where there are several.

    Raises:
        InputError: a source has no rows for one of them.
    """
    eyes = eyes_of(opened.checkpoint, recipe.images)
    options = recipe.length, recipe.packing, recipe.prompt_loss, opened.skeleton.config.vocab_size, eyes
    loaded = [load_rows(part.source, opened.tokenizer, *options) for part in recipe.parts]
    if recipe.images is not None and not shows_images(*loaded):
        raise InputError("images", f"{recipe.images!r} has no effect without conversations about images")
    pairs = [rows.split(recipe.held_out, recipe.seed) for rows in loaded]
    if len(pairs) == 1:
        return *pairs[0], None
    mixture = RowMixture.of(recipe.parts, [len(learned) for learned, _ in pairs])
    return joined([learned for learned, _ in pairs]), joined([held_out for _, held_out in pairs]), mixture


def _check_vision(recipe: DecidedRecipe, checkpoint: Checkpoint, teacher: Checkpoint | None, rows: Rows) -> None:
    """Check that model and teacher see the images of rows in the same way, and have the same tokens for them.

    Raises:
        InputError: one does not.
    """
    assert rows.images is not None
    for folder in {file.folder for file in rows.images.files}:
        check_reachable("images", folder, recipe.backend)
    check_vision(checkpoint, rows)
    if teacher is None:
        return
    check_same_sight(teacher.whole_config, checkpoint.whole_config, str(recipe.teacher))
    check_vision(teacher, rows)


@preflight()
def prepare_recovery(recipe: RecoverRecipe, backend: Backend) -> PreparedRecovery:
    """Open and check everything that a recipe names, and decide what it leaves open.

    Raises:
        InputError: something cannot work; nothing has been written then.
    """
    inputs = open_inputs(recipe, backend)
    steps = recipe.steps or max(1, round(recipe.epochs * len(inputs.rows) / recipe.batch))
    fingerprint = _fingerprint(inputs, steps)
    journal = Journal(inputs.recipe.out, fingerprint, inputs.skeleton.layers, inputs.checkpoint.place)
    earlier = journal.check(recipe.resume)
    if earlier.result is not None:  # nothing is left to train
        return PreparedRecovery(inputs, steps, None, journal, earlier)
    need = _need(inputs)
    if need and inputs.recipe.backend == "local":  # other processes look at their own machines
        check_memory(need, inputs.recipe.device)
    zeros = run_file(journal, earlier).zeros or _count_zeros(inputs.checkpoint, inputs.skeleton)
    if recipe.keep_sparsity and not is_sparse(zeros):
        dense = f"{recipe.model} is dense: {zeros.count} of its {zeros.weights:,} weights are zero"
        raise InputError("keep_sparsity", dense)
    plan = PreparedRecovery(inputs, steps, zeros, journal, earlier, need)
    check_state(plan.recipe, plan.claim)
    if plan.teacher_store is not None:
        check_room_for_teacher(plan.teacher_store, plan.recipe.state)
    if recipe.deepspeed is not None:
        check_settings(recipe.deepspeed, plan.spec(Processes(1, recipe.batch, plan.processes.micro)).config)
    return plan


def _need(inputs: Inputs) -> Need | None:
    """Return the memory of a process; None, and a remark in the log, where it cannot be counted."""
    longest = max(inputs.rows.longest, inputs.held_out.longest)
    try:
        return training_need(inputs.recipe, inputs.skeleton, inputs.teacher, longest, inputs.images)
    except Uncounted as error:
        _logger.warning("the memory of this training is not known before it starts: %s", error)
        return None


def _decide(recipe: RecoverRecipe, slots: Slots) -> DecidedRecipe:
    """Make the choices that the recipe leaves open."""
    device = device_of(recipe.device, slots)
    micro = recipe.micro_batch or 1
    fitting = [count for count in range(1, max(1, slots.gpus) + 1) if recipe.batch % (count * micro) == 0]
    workers = recipe.workers or (fitting[-1] if device == "cuda" and recipe.backend == "ray" else 1)
    out = absolute(recipe.out)
    state = _state_of(recipe, out)
    if "://" in state:
        wanted = "a directory that all nodes see, because DeepSpeed writes no URLs"
        raise InputError("state", f"{recipe.state or out!r} is a URL; use {wanted}")
    precision = {"cuda": "bf16", "cpu": "fp32"}[device] if recipe.precision == "auto" else recipe.precision
    check_stage(recipe.zero, precision == "bf16")
    return DecidedRecipe.model_construct(  # all fields are checked already
        **{
            **dict(recipe),  # not as it is recorded, where a single source is a text
            "model": place_of(recipe.model),
            "teacher": place_of(recipe.teacher) if recipe.teacher else None,
            "out": out,
            "state": state,
            "device": device,
            "workers": workers,
            "micro_batch": recipe.micro_batch or micro_batch_of(recipe.batch, workers, recipe.length),
            "threads": recorded_threads(out) or recipe.threads or threads_of(slots, workers),
            "precision": precision,
            "evaluate_every": recipe.evaluate_every or recipe.checkpoint_every,
        }
    )


def _state_of(recipe: RecoverRecipe, out: str) -> str:
    """Return the directory of training checkpoints: where the recipe names none, that in which an earlier attempt has
    left some."""
    recorded = recorded_recipe(out)
    known = recorded.get("state")
    left = isinstance(known, str) and known != f"{recorded.get('out')}/{STATE}" and os.path.isdir(known)
    if recipe.state is None:
        return str(known) if left else f"{out}/{STATE}"
    state = absolute(recipe.state)
    if left and os.path.realpath(str(known)) != os.path.realpath(state):
        _logger.warning("the checkpoints of an earlier attempt are in %s, and %s is used instead", known, state)
    return state


def recorded_threads(out: str) -> int | None:
    """Return the threads with which the training in an output began; another number adds in another order."""
    threads = recorded_recipe(out).get("threads")
    return threads if isinstance(threads, int) and threads > 0 else None


def _open_teacher(recipe: DecidedRecipe, name: str, student: Checkpoint) -> Checkpoint:
    """The teacher, whose predictions must be of the same tokens.

    Raises:
        InputError: they are not.
    """
    opened = open_model(name, "teacher")
    teacher = opened.checkpoint
    stages_of(recipe.zero, opened.skeleton)
    check_seqlen(recipe.length, opened.skeleton, "teacher")
    head_logits(teacher.config, "teacher")
    if recipe.packing and needs_mask(teacher.config.model_type) != needs_mask(student.config.model_type):
        raise InputError("teacher", f"{name} tells packed examples apart in another way than the model")
    sizes = teacher.config.vocab_size, student.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError("teacher", f"{name} predicts {sizes[0]} tokens, the model {sizes[1]}")
    if recipe.teacher_top is not None:
        check_top(recipe.teacher_top, sizes[0])
    if (
        not all(is_tokens(part.source) for part in recipe.parts)
        and teacher.tokenizer().get_vocab() != student.tokenizer().get_vocab()
    ):
        raise InputError("teacher", f"{name} has another tokenizer than the model")
    return teacher


def is_sparse(zeros: ZeroCount) -> bool:
    """Return whether zeros are there on purpose."""
    return zeros.count > SPARSE * zeros.weights


def _count_zeros(checkpoint: Checkpoint, skeleton: Skeleton) -> ZeroCount:
    """Count the zeros of all projections, which are read one after the other."""
    names = [
        skeleton.projection_tensor(index, name)
        for index in range(skeleton.layers)
        for name in skeleton.family.kinds[index].projections
    ]
    counts = [(int((weight == 0).sum()), weight.numel()) for weight in map(checkpoint.read, names)]
    return ZeroCount(count=sum(count for count, _ in counts), weights=sum(weights for _, weights in counts))


def _fingerprint(inputs: Inputs, steps: int) -> str:
    """Return a hash of everything that shapes the weights, but for rounding: other workers resume it."""
    recipe, teacher = inputs.recipe, inputs.teacher
    # Only the steps that are measured can be chosen. Where none is, the hash is that of times without a choice.
    choosing = {"best", "early_stopping"}
    chosen: dict[str, Any] = {}
    if recipe.best or recipe.early_stopping:
        # Under the name of the times when losses were measured at checkpoints: trainings begun then go on.
        chosen = recipe.model_dump(include=choosing) | {"checkpoint_every": recipe.evaluate_every}
    # Covered by other entries.
    apart = choosing | {"model", "data", "epochs", "evaluate_every", "teacher_top"}
    content = {
        "format": FORMAT,
        "command": recipe.command,
        "model": inputs.checkpoint.identity(),
        "rows": inputs.rows.digest(),
        "held_out_rows": inputs.held_out.digest(),
        **recipe.model_dump(include=recipe.identifying_fields() - apart),
        **chosen,
        "teacher": teacher.identity() if teacher else None,
        "steps": steps,
        "deepspeed": inputs.overrides,
    }
    if recipe.teacher_top is not None:
        content["teacher_top"] = recipe.teacher_top
    if inputs.mixture is not None:
        content["mixture"] = asdict(inputs.mixture)
    return hashlib.sha256(dump_json(content, sort_keys=True).encode()).hexdigest()
