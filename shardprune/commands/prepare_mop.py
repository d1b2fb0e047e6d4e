"""A run of `shardprune mop` that can start: what it needs, checked, and the plan of its path."""

from shardprune.cluster.group import Backend
from shardprune.commands.prepare import prepare
from shardprune.commands.prepared import Prepared
from shardprune.model.families import structures_of
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.alignment import aligned
from shardprune.model.structure.budget import Budget
from shardprune.model.structure.kept_iterations import KeptIterations, parse_keep
from shardprune.model.structure.path import State
from shardprune.model.structure.path_plan import PathPlan
from shardprune.model.structure.shape import costs_of, heads_of, possible_groups, widths_of
from shardprune.recipes.mop import MopRecipe


def prepare_mop(recipe: MopRecipe, backend: Backend) -> tuple[Prepared, PathPlan]:
    """Prepare a run and plan its path.

    Raises:
        InputError: something cannot work; nothing has been written then.
    """
    prepared = prepare(recipe, backend)
    path_plan = path_plan_of(recipe, prepared.skeleton)
    path_plan.check()
    return prepared, path_plan


def path_plan_of(recipe: MopRecipe, skeleton: Skeleton) -> PathPlan:
    """Return the path that a recipe asks for."""
    prefix = f"{skeleton.family.layers}.0."
    tensors = {name.removeprefix(prefix): shape for name, shape in skeleton.layer_tensors(0).items()}
    config, parameters = skeleton.config, skeleton.parameters()
    structures_of(config.model_type, "model")
    widths = widths_of(config)
    groups = (widths.groups,) if recipe.mlp_only else possible_groups(config)
    costs = costs_of(config, tensors)
    iteration = costs.layer(widths) / skeleton.layers  # of parameters that go from each layer
    queries, parallel = heads_of(config).queries, recipe.tensor_parallel
    budget = aligned(Budget(costs, groups), widths, queries, iteration, recipe.neuron_multiple, parallel)
    return PathPlan(
        start=State(skeleton.layers, widths, budget),
        parameters=parameters,
        request=None if recipe.remove is None else round(recipe.remove * parameters),
        letters=recipe.path,
        seed=recipe.seed if recipe.criterion == "random" else None,
        keeping=parse_keep(recipe.keep) if recipe.keep else KeptIterations(),
    )
