"""Runs that remove structures: the model that they leave, and the tasks of a recipe."""

from dataclasses import replace

from shardprune.model.structure.removal import widths_left
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.workload import Model, Task, model_of, planned_task, read_model
from shardprune.shard.narrowed_layers import skeleton_of_widths
from shardprune.solvers.improving import Improving
from shardprune.solvers.scoring import Scoring
from shardprune.solvers.statistics import Kind


def read_planned(recipe: PlanRecipe) -> Model:
    """Read the shapes of a recipe's model, with those of the model that is left where the recipe removes structures.

    Raises:
        InputError: the model cannot be read, cannot give so much, or its heads and neurons are not known.
    """
    removal = recipe.width_removal(recipe.outlier_m)
    if removal is None:
        return read_model(recipe.model, recipe.ignore)
    model = read_model(recipe.model)  # structures are whole: those of a projection that is to stay dense go as well
    widths = widths_left(removal, model.skeleton)
    narrower, zeroed = (
        model_of(skeleton_of_widths(model.skeleton, widths, ignore), model.name, model.stored)
        for ignore in ((), recipe.ignore)
    )
    return replace(model, narrower=narrower, zeroed=zeroed)


def planned_tasks(recipe: PlanRecipe, model: Model) -> tuple[Task, ...]:
    """Return the tasks of a recipe, each of a run with workers of its own: one, or two where weights become zero in a
    model that structures have been removed from.

    Raises:
        InputError: the model does not take sequences of that length.
    """
    removal, task = recipe.width_removal(recipe.outlier_m), planned_task(recipe, model)
    if removal is None:
        return (task,)
    assert model.zeroed is not None
    first = replace(
        narrowing_task(task, removal.scoring),
        improving=Improving(reconstruction=0 if recipe.zeroes else recipe.reconstruct),
        judges_result=not recipe.zeroes,
    )
    return (first, replace(planned_task(recipe, model.zeroed), judges_given=False)) if recipe.zeroes else (first,)


def narrowing_task(task: Task, scoring: Scoring) -> Task:
    """Return the task of removing structures in place of zeroing weights."""
    kind: Kind = "gram" if scoring.needs_gram(task.errors) else "squares"
    return replace(task, kind=kind, grouped=False, outliers=False, curves=False, scoring=scoring)
