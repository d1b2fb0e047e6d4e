"""The removal of structures from a layer: seconds, bytes and memory of choosing the columns of its output projections
that stay, of correcting them, and of the narrower layer.

docs/planning.md has the formulae.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from shardprune.model.structure.shape import heads_of
from shardprune.planning.hardware import Hardware
from shardprune.planning.shapes import Input
from shardprune.planning.workload import Model, Task
from shardprune.solvers.products import split_bytes
from shardprune.solvers.structures import BATCHES, OUTPUTS
from shardprune.solvers.triangles import PANELS, lower_entries


@dataclass(frozen=True)
class Cut:
    """An output projection W [rows, cols] that keeps `kept` columns; each structure of it owns `size` of them."""

    name: str
    rows: int
    cols: int
    kept: int
    size: int

    @property
    def gone(self) -> int:
        """Columns that go."""
        return self.cols - self.kept

    @property
    def rounds(self) -> int:
        """Rounds in which `obs` removes structures, after each of which it scores the others again."""
        structures = self.gone // self.size
        return -(-structures // max(1, structures // BATCHES))


def cuts_of(model: Model) -> Iterator[Cut]:
    """Yield the output projections of the layer that lose columns."""
    assert model.narrower is not None
    before, after = model.shape.by_first, model.narrower.shape.by_first
    heads = heads_of(model.skeleton.config)
    for name, unit in model.shape.kind.structures.columns.items():
        if (kept := after[name].cols) < (cols := before[name].cols):
            yield Cut(name, before[name].rows[name], cols, kept, heads.rows(unit))


def narrowing_seconds(task: Task, row: Hardware) -> float:
    """Return the seconds to choose what stays of the layer, to correct it, and to build the narrower layer."""
    return sum(
        _choosing(task, row, cut) + _correcting(task, row, cut) for cut in cuts_of(task.model)
    ) + building_seconds(task, row)


def building_seconds(task: Task, row: Hardware) -> float:
    """Return the seconds to build the narrower layer from the one that it comes from."""
    assert task.model.narrower is not None
    return 2 * task.model.narrower.layer * task.itemsize / row.memory


def counting_seconds(task: Task, row: Hardware) -> float:
    """Return the seconds to count the zeros of the projections of the layer, before and after."""
    model = task.model
    assert model.narrower is not None
    return (model.projections + model.narrower.projections) * task.itemsize / row.memory


def activity_seconds(task: Task, row: Hardware, one: Input, tokens: int) -> float:
    """Return the seconds of how active the structures of an input are in some tokens, where they are chosen by that: of
    heads by what they add through the output projection, product by product."""
    scoring, structures = task.scoring, task.model.shape.kind.structures.columns
    name = next(iter(one.rows))
    if scoring is None or scoring.score != "amp" or name not in structures:
        return 0.0
    if structures[name] == "neuron":
        return 2 * task.itemsize * tokens * one.cols / row.memory
    heads = one.cols // heads_of(task.model.skeleton.config).dim
    return 2 * tokens * one.weights / row.products + 12 * tokens * heads * one.rows[name] / row.memory


def activity_bytes(task: Task, one: Input) -> int:
    """Return the bytes of the activity of an input's structures, float32; 0 where none are chosen by that."""
    scoring, structures = task.scoring, task.model.shape.kind.structures.columns
    name = next(iter(one.rows))
    if scoring is None or scoring.score != "amp" or name not in structures:
        return 0
    size = 1 if structures[name] == "neuron" else heads_of(task.model.skeleton.config).dim
    return 4 * (one.cols // size)


def activity_workspace(task: Task, tokens: int, gpu: bool) -> int:
    """Return the memory of what heads add through their output projection for some tokens: of one head, with the
    magnitudes; on a GPU of several at once."""
    if task.scoring is None or task.scoring.score != "amp":
        return 0
    entries = tokens * task.model.hidden
    return 4 * max(2 * entries, OUTPUTS) if gpu and task.itemsize == 2 else 8 * entries


def choice_bytes(task: Task) -> int:
    """Return the bytes of what was chosen of the layer, as it travels to the other replicas: corrected weights, and the
    indices of the structures that stay."""
    assert task.scoring is not None
    cuts = list(cuts_of(task.model))
    corrected = sum(cut.rows * cut.kept for cut in cuts) * task.itemsize if task.scoring.correction else 0
    return corrected + sum(8 * cut.kept // cut.size for cut in cuts)


def workspaces(task: Task, gpu: bool) -> Iterator[tuple[str, int]]:
    """Yield the memory of each step of making the layer narrower, beside it and its sums: the choice and the correction
    for each output projection, by the step's name."""
    scoring = task.scoring
    assert scoring is not None
    for cut in cuts_of(task.model):
        label = cut.name.rpartition(".")[2].removesuffix("_proj")
        square, kept, weights = cut.cols**2, cut.kept**2, cut.rows * cut.cols
        dense = 4 * weights if task.itemsize != 4 else 0  # float32 layers are used as they are
        if scoring.score == "obs":
            # The factor while it is computed; then it, what it is multiplied from and the inverse, with the weight.
            split = split_bytes(2 * square) if gpu else 0
            yield f"choose {label}", dense + 12 * square + 4 * weights + split
        elif scoring.score == "outlier":
            yield f"choose {label}", 8 * task.model.largest
        corrected = 4 * cut.rows * cut.kept
        if scoring.correction:
            # The sums of the columns that stay, their factor, and those of the others with them; then the change.
            split = split_bytes(kept // 4 * (PANELS + 1) // PANELS) if gpu else 0
            factor = 4 * kept + 6 * kept + split
            change = 4 * kept + 4 * cut.gone * cut.kept + 4 * cut.rows * cut.gone + 3 * corrected
            yield f"correct {label}", dense + max(factor, change)
        if scoring.needs_gram(task.errors):
            split = split_bytes(weights + square // PANELS) if gpu else 0
            yield f"error {label}", dense + corrected + 8 * weights + 12 * weights // PANELS + split


def _choosing(task: Task, row: Hardware, cut: Cut) -> float:
    """Return the seconds to choose the columns of an output projection that stay."""
    assert task.scoring is not None
    if task.scoring.score == "outlier":
        return 24 * task.model.projections / row.memory
    if task.scoring.score == "amp":
        return 0.0
    operations = 2 * cut.cols**3 + 2 * cut.gone * cut.cols * (cut.rows + cut.cols)
    scored = cut.rows * cut.cols * cut.size  # operations of a round; neurons take none but squares
    touched = 4 * cut.rounds * (3 * cut.rows * cut.cols + 2 * cut.cols**2)
    return row.factor(cut.cols) + (operations + cut.rounds * scored) / row.large + touched / row.memory


def _correcting(task: Task, row: Hardware, cut: Cut) -> float:
    """Return the seconds to correct the columns of an output projection that stay, and to measure its error."""
    scoring = task.scoring
    assert scoring is not None
    seconds = 0.0
    if scoring.correction:
        products = 2 * cut.rows * cut.gone * cut.kept + 4 * cut.rows * cut.kept**2
        seconds += row.factor(cut.kept) + products / row.large
        seconds += 8 * cut.kept * (cut.kept + cut.gone) / row.memory
    if scoring.needs_gram(task.errors):
        seconds += 4 * cut.rows * lower_entries(cut.cols) / row.large
    return seconds
