"""The shapes of a model, from its config alone, and the task of a run."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from shardprune.errors import InputError
from shardprune.model.carried import further_embedding
from shardprune.model.checks import check_seqlen
from shardprune.model.empty_model import attention_of
from shardprune.model.expert_removal import kept_experts, mixture_of, routers_of, with_experts
from shardprune.model.pruning_job import Zeroing
from shardprune.model.skeleton import Skeleton
from shardprune.model.verification import check_class
from shardprune.planning.described_model import read_description
from shardprune.planning.recipe import PlanRecipe, ScoreSource
from shardprune.planning.shapes import Input, LayerShape
from shardprune.solvers.error_curves import windows_of
from shardprune.solvers.improving import NOTHING, Improving
from shardprune.solvers.methods import Effort
from shardprune.solvers.pattern import Unstructured
from shardprune.solvers.scoring import Scoring
from shardprune.solvers.statistics import Kind

EVALUATED_TOKENS = 300_000  # assumed tokens of a source without a limit: about WikiText-2's test text


@dataclass(frozen=True)
class Model:
    """Numbers of elements (not bytes) of a model, and the shape of its layers, as seen `at` one of them.

    Attributes:
        shape: of the layer that is looked at; the largest one unless `at` is asked.
        shapes: of each layer.
        embedding, head: of the frame's large tensors, embeddings of layers' own inputs included; with `tied` embedding
            and head are the same tensor.
        queries, keys: widths of all query heads, and of all key heads.
        stored: dtype of the weights that are written, and in which they are read.
        in_files: mean bytes of a weight in the files of the checkpoint; fewer than `stored` has if these are FP8.
        fewer: the model with the experts that stay, where a run removes some and does nothing else.
        narrower: the model with the structures that stay, where a run removes some.
        zeroed: that model again, without the projections that are ignored when its weights become zero.
    """

    name: str
    layers: int
    hidden: int
    vocabulary: int
    queries: int
    keys: int
    heads: int
    eager: bool
    shape: LayerShape
    shapes: tuple[LayerShape, ...]
    embedding: int
    head: int
    tied: bool
    parameters: int
    stored: torch.dtype
    in_files: float
    skeleton: Skeleton
    fewer: "Model | None" = None
    narrower: "Model | None" = None
    zeroed: "Model | None" = None

    def at(self, index: int) -> "Model":
        """Return the model as seen at a layer."""
        shape, fewer, narrower = self.shapes[index], *(one and one.at(index) for one in (self.fewer, self.narrower))
        # Another layer may be the largest where experts are gone.
        if shape is self.shape and fewer is self.fewer and narrower is self.narrower:
            return self
        return replace(self, shape=shape, fewer=fewer, narrower=narrower)

    @property
    def left(self) -> "Model | None":
        """The model with what stays, where a run removes experts or structures."""
        return self.fewer or self.narrower

    def kinds(self, layers: Iterable[int]) -> list[tuple[int, int]]:
        """Return one layer of each kind among some, and how many of them are of its kind."""
        found: dict[int, list[int]] = {}
        for index in layers:
            found.setdefault(id(self.shapes[index]), []).append(index)
        return [(same[0], len(same)) for same in found.values()]

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs of the layer's projections."""
        return self.shape.inputs

    @property
    def layer(self) -> int:
        """Parameters of the layer."""
        return self.shape.elements

    @property
    def projections(self) -> int:
        """Weights of the layer's projections."""
        return sum(one.weights for one in self.inputs)

    @property
    def largest(self) -> int:
        """Elements of the layer's largest linear map."""
        return self.shape.largest

    def forward_bytes(self, sequences: int, seqlen: int, itemsize: int) -> int:
        """Return the peak memory of the layer's forward pass over a wave, without the wave itself.

        In the MLP: the outputs of its first projections, one of them through the activation function, their product,
        the residual stream and its norm. In attention: the norm, queries, keys and values with their rotated copies;
        eager attention holds its scores twice, and for 16-bit dtypes a float32 copy. Counted in the layers of
        transformers 5. Mixers other than attention are taken for it by what their maps give. Layers that do not
        run take none.
        """
        if not self.shape.kind.runs:
            return 0
        tokens = sequences * seqlen
        if len(self.shape.maps) < 2:
            return tokens * itemsize * (2 * self.hidden + sum(sum(one.rows.values()) for one in self.shape.maps))
        *_, entry, last = self.shape.maps
        up, neurons = sum(entry.rows.values()), last.cols
        gated, fused = up > neurons, len(entry.rows) == 1 and up > neurons
        mlp = up + (2 if fused else 1) * neurons + (2 if gated else 1) * self.hidden
        attention = self.hidden + int(3.5 * (self.queries + self.keys)) if self.shape.attends else 0
        scores = self.heads * seqlen * tokens * (8 if itemsize == 4 else 10) if self.eager and self.shape.attends else 0
        return max(tokens * itemsize * mlp, tokens * itemsize * attention + scores)

    def forward_operations(self, tokens: int, seqlen: int) -> int:
        """Return the operations of the layer over `tokens` tokens: two per weight and token, plus causal attention."""
        return 2 * self.shape.multiplied * tokens + 2 * tokens * seqlen * self.queries * self.shape.attends

    def share_before(self, place: int, seqlen: int) -> float:
        """Return the share of the layer's operations in a pass up to an input, with the output projection that reads
        it."""
        done = self.inputs[: place + self.inputs[place].output]
        operations = 2 * sum(one.share * one.weights for one in done) + (2 * seqlen * self.queries if place else 0)
        return operations / self.forward_operations(1, seqlen)


def read_model(name: str, ignore: Sequence[str] = ()) -> Model:
    """Read a model's shapes from a config.json, or from the config and the tensor headers of a checkpoint.

    Args:
        ignore: globs over the names of projections that are left alone.

    Raises:
        InputError: there is no such config, or models of its class cannot be pruned.
    """
    found = read_description(name)
    skeleton = Skeleton(found.config, "cpu", found.dtype, ignore)
    check_class(found.config)
    model = model_of(skeleton, name, found.dtype, found.in_files)
    return replace(model, in_files=_expected_in_files(model)) if found.expected_fp8 else model


def with_fewer_experts(model: Model, recipe: PlanRecipe) -> Model:
    """Return a model with the one that a recipe makes of it by removing experts; the model itself where it removes
    none.

    Raises:
        InputError: the model has no experts, or cannot give so many, or these are FP8 and their weights would change.
    """
    if (removal := recipe.removal) is None:
        return model
    for field in ("reconstruct", "merge_experts"):
        if model.in_files < model.stored.itemsize and (value := getattr(recipe, field)):
            reason = "changes the weights of experts, and these are FP8, which are only copied"
            raise InputError(field, f"{value!r} {reason}; leave it out, or give the model from which they were made")
    mixture = mixture_of(model.skeleton)
    kept = kept_experts(mixture, removal, "_experts")
    reduced = with_experts(model.skeleton, mixture, kept)
    fewer = model_of(reduced, model.name, model.stored, model.in_files)
    known: dict[int, LayerShape] = {}
    for index, shape in enumerate(fewer.shapes):
        if id(shape) not in known:
            routers = routers_of(model.skeleton, reduced, mixture, index) if index in mixture.layers else {}
            inputs = tuple(Input(cols, {name: rows}) for name, (rows, cols) in routers.items())
            known[id(shape)] = replace(shape, routers=inputs)
    shapes = tuple(known[id(shape)] for shape in fewer.shapes)
    return replace(model, fewer=replace(fewer, shape=known[id(fewer.shape)], shapes=shapes))


def model_of(skeleton: Skeleton, name: str, stored: torch.dtype, in_files: float | None = None) -> Model:
    """Return the shapes of a skeleton's model whose weights are read in a dtype.

    Args:
        in_files: mean bytes of a weight in the files; None: those of the dtype.
    """
    config = skeleton.config
    embedding, head = skeleton.model.get_input_embeddings().weight, skeleton.model.get_output_embeddings().weight
    further = further_embedding(skeleton.model)
    heads = getattr(config, "num_attention_heads", None) or 0
    width = _head_width(config)
    shapes = _shapes(skeleton)
    return Model(
        name=name,
        layers=skeleton.layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        heads=heads,
        eager=attention_of(config) == "eager",
        shape=max(shapes, key=lambda shape: (shape.kind.runs, shape.elements)),
        shapes=shapes,
        embedding=embedding.numel() + (0 if further is None else further.numel()),
        head=head.numel(),
        tied=embedding is head,
        parameters=skeleton.parameters(),
        stored=stored,
        in_files=in_files or stored.itemsize,
        skeleton=skeleton,
    )


def _head_width(config: PretrainedConfig) -> int:
    """Return the width of a head; the largest one where layers differ."""
    of_layers = getattr(config, "per_layer_config", None) or [config]
    widths = [getattr(one, "head_dim", None) for one in of_layers]
    return max(width or config.hidden_size // (getattr(config, "num_attention_heads", None) or 1) for width in widths)


def _shapes(skeleton: Skeleton) -> tuple[LayerShape, ...]:
    """Return the shape of each layer of a model: one object for each kind."""
    known: dict[int, LayerShape] = {}
    for index, kind in enumerate(skeleton.family.kinds):
        if id(kind) not in known:
            sizes = skeleton.layer_tensors(index).values()
            known[id(kind)] = LayerShape(
                inputs=_inputs(skeleton, index, kind.inputs),
                maps=_inputs(skeleton, index, kind.maps),
                elements=sum(math.prod(size) for size in sizes),
                matrices=sum(math.prod(size) for size in sizes if len(size) > 1),
                attends=skeleton.attentions if kind.attention else 0,
                kind=kind,
            )
    return tuple(known[id(kind)] for kind in skeleton.family.kinds)


def _inputs(skeleton: Skeleton, index: int, groups: Sequence[Sequence[str]]) -> tuple[Input, ...]:
    """Return the inputs of groups of linear maps of a layer, each of which reads one."""
    outputs = skeleton.family.kinds[index].outputs
    found = []
    for names in groups:
        shapes = {name: skeleton.map_shape(index, name) for name in names}
        rows = {name: rows for name, (rows, _) in shapes.items()}
        share = skeleton.family.kinds[index].share_of_tokens(names[0])
        found.append(Input(shapes[names[0]][1], rows, names[0] in outputs, share))
    return tuple(found)


@dataclass(frozen=True)
class Task:
    """The work on a model, independent of the layout: the inputs of the memory and time formulae.

    Attributes:
        effort: of the method.
        kind: of the accumulated statistics; None: none.
        itemsize: of the compute dtype.
        sources: texts on which perplexity is measured before and after, over `windows` each.
        judges_given, judges_result: perplexity is measured before, and after; of two runs each does one.
        improving: further steps on every layer.
        curves: error curves are measured before.
        all_tokens: add to the sums of every expert.
        scores: of experts, where some go: those of a pass, given ones, or those of weights.
        merged: experts become averages.
        behind: layers see the activations behind those whose experts are gone.
        router_steps: those of the steps of training a layer that train its routers alone.
        everywhere: every expert computes its output for all tokens, too.
        scoring: of structures, where some go.
    """

    model: Model
    effort: Effort
    kind: Kind | None
    grouped: bool
    outliers: bool
    errors: bool
    samples: int
    seqlen: int
    wave: int
    sources: int
    windows: int
    itemsize: int
    improving: Improving = NOTHING
    curves: bool = False
    all_tokens: bool = False
    scores: ScoreSource = "pass"
    merged: bool = False
    behind: bool = False
    router_steps: int = 0
    everywhere: bool = False
    scoring: Scoring | None = None
    judges_given: bool = True
    judges_result: bool = True

    def at(self, index: int) -> "Task":
        """Return the task as seen at a layer."""
        model = self.model.at(index)
        return self if model is self.model else replace(self, model=model)

    def kind_of(self, one: Input) -> Kind | None:
        """Return the kind of the statistics of an input; None: none."""
        if self.scoring is None or self.kind is None or one.output:
            return self.kind
        return "squares"  # structures are judged by what output projections read

    @property
    def passes(self) -> tuple[int, int]:
        """The passes for perplexity before, and after."""
        return self.sources * self.judges_given, self.sources * self.judges_result

    @property
    def passes_on_dense(self) -> bool:
        """Whether layers that lose structures pass on what the dense ones give, in the pass that adds to the sums."""
        return self.scoring is not None and not self.scoring.correction and not self.improving

    @property
    def in_turn(self) -> bool:
        """Whether experts go layer after layer, each behind those before as they are cut."""
        return self.behind or bool(self.improving)

    @property
    def trainings(self) -> dict[str, int]:
        """The steps of every training of a layer that loses experts: of its `router`, then of all its projections."""
        steps = {"router": self.router_steps, "reconstruction": self.improving.reconstruction - self.router_steps}
        return {name: count for name, count in steps.items() if count}

    def trained(self, training: str) -> tuple[Input, ...]:
        """Return the inputs of the maps that a training changes in the layer, which has lost its experts."""
        assert self.model.fewer is not None
        shape = self.model.fewer.shape
        return shape.routers if training == "router" else shape.inputs

    @property
    def stored(self) -> int:
        """Bytes of a stored weight."""
        return self.model.stored.itemsize

    @property
    def held_out(self) -> int:
        """Calibration windows that are held out."""
        return self.improving.held_out(self.samples)

    @property
    def curve_windows(self) -> int:
        """Calibration windows on which error curves are measured."""
        return windows_of(self.samples - self.held_out, self.seqlen) if self.curves else 0

    @property
    def quantised(self) -> float:
        """Mean bytes of a weight that lies beside the product with its scales while it is read; 0 without scales."""
        return self.model.in_files if self.model.in_files < self.stored else 0

    def kept_bytes(self, sequences: int) -> int:
        """Return the bytes of `sequences` kept sequences."""
        columns = self.model.skeleton.family.carried.columns(self.seqlen, self.itemsize)
        return sequences * self.seqlen * columns * self.itemsize


def planned_task(recipe: PlanRecipe, model: Model) -> Task:
    """Return the task of a recipe on the recipe's hardware.

    Raises:
        InputError: the model does not take sequences of that length.
    """
    if recipe.reads_text or recipe.eval:
        check_seqlen(recipe.seqlen, model.skeleton)
    narrow = recipe.dtype == "auto" and recipe.row.gpu
    task = task_of(
        model,
        recipe.zeroing,
        errors=recipe.measure_error,
        samples=recipe.samples,
        seqlen=recipe.seqlen,
        wave=recipe.sequences_per_wave,
        sources=len(recipe.eval),
        windows=recipe.eval_windows or max(1, EVALUATED_TOKENS // recipe.seqlen),
        itemsize=model.stored.itemsize if narrow else 4,
        improving=recipe.measured,
    )
    if model.fewer is None:
        return task
    behind = recipe.propagate_experts == "pruned"
    task = replace(task, scores=recipe.expert_scores, merged=recipe.merge_experts, behind=behind)
    improving = Improving(reconstruction=recipe.router_kd + recipe.reconstruct)
    return replace(task, kind=None, errors=False, improving=improving, router_steps=recipe.router_kd)


def task_of(
    model: Model,
    zeroing: Zeroing,
    *,
    errors: bool,
    samples: int,
    seqlen: int,
    wave: int,
    sources: int,
    windows: int,
    itemsize: int,
    improving: Improving = NOTHING,
) -> Task:
    """Return what zeroing does to a model; the sizes are those of `Task`."""
    return Task(
        model=model,
        effort=zeroing.effort(improving.measured),
        kind="gram" if errors or improving.stream_targets else zeroing.needs,
        grouped=not isinstance(zeroing.pattern, Unstructured),
        outliers=zeroing.observes,
        errors=errors,
        samples=samples,
        seqlen=seqlen,
        wave=wave,
        sources=sources,
        windows=windows,
        itemsize=itemsize,
        improving=improving,
        curves=zeroing.measures,
        all_tokens=zeroing.all_tokens,
    )


def _expected_in_files(model: Model) -> float:
    """Return the mean bytes of a weight in the files of an FP8 checkpoint that is not there: one for those of the
    layers' matrices."""
    matrices = sum(shape.matrices for shape in model.shapes)
    return (matrices + (model.parameters - matrices) * model.stored.itemsize) / model.parameters
