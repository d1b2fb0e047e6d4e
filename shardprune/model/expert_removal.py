"""Models that keep some of the experts of each layer: their config, their tensors, and where these come from.

A tensor that changes with the number of experts is found by comparing the model with the one that its changed config
makes: no name of a router, a bias or a buffer is written down here.
"""

import copy
import re
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm, prod
from typing import Any

import torch
from torch import Tensor

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.config_file import (
    CONFIG,
    config_text,
    language_config,
    parse_config,
    raw_config,
    with_changes,
)
from shardprune.model.expert_averages import average, rows_of
from shardprune.model.experts import IDLE
from shardprune.model.fp8 import DTYPES, names_of_scales
from shardprune.model.pruning_job import ExpertRemoval, PruningJob
from shardprune.model.skeleton import Skeleton
from shardprune.solvers.expert_scores import kept_of
from shardprune.storage.records import KeptExperts
from shardprune.storage.stacks import Place

# The names that configs have for the number of experts; some have two, and every reader looks at its own.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
LEAST_OF_GROUP = 2  # a router scores a group by its best two experts


@dataclass(frozen=True)
class Mixture:
    """The experts of a model: how many a layer has, how many a token gets, and in which groups these lie.

    Attributes:
        layers: paths of the experts' module within each layer that has one, by layer.
        groups: runs of experts of the same length, of which a token gets `chosen_groups`.
    """

    layers: dict[int, str]
    experts: int
    per_token: int
    groups: int
    chosen_groups: int

    def check(self, kept: int, field: str, asked: str) -> None:
        """Check that so many experts of each layer, and no more, are a model.

        Args:
            asked: the value of the recipe's `field` that asks for them, for the error.

        Raises:
            InputError: they are not.
        """
        found = f"{asked} keeps {kept} of {self.experts} experts"
        if kept >= self.experts:
            smaller = {"remove": "--multiple", "remove_experts": "--expert-multiple"}  # of a run, and of a plan
            helps = f"; give a smaller {smaller[field]}" if field in smaller else ""
            raise InputError(field, f"{found}, so that nothing would go{helps}")
        if kept < self.fewest:
            reason = f"a token gets {self.per_token}"
            if self.groups > 1:
                reason += f" from {self.chosen_groups} of {self.groups} groups"
            raise InputError(field, f"{found}; at least {self.fewest} must stay, because {reason}")
        if kept % self.groups:
            raise InputError(field, f"{found}, of which {self.groups} groups cannot have equally many")

    @property
    def fewest(self) -> int:
        """The least number of experts that every layer must keep."""
        if self.groups == 1:
            return self.per_token
        of_group = max(LEAST_OF_GROUP, -(-self.per_token // self.chosen_groups))
        return of_group * self.groups

    def multiple(self, asked: int) -> int:
        """Return the least multiple of a number that groups can have equally."""
        return lcm(asked, self.groups)


def mixture_of(skeleton: Skeleton, field: str = "model") -> Mixture:
    """Return the experts of a model.

    Raises:
        InputError: it has none, its layers differ in their number, or a table chooses among them; tokens may be routed
            to experts without weights, too.
    """
    found: dict[int, str] = {}
    counts: dict[int, int] = {}
    for index, kind in enumerate(skeleton.family.kinds):
        if len(kind.mixtures) > 1:
            raise InputError(field, f"layer {index} has several mixtures of experts: {', '.join(kind.mixtures)}")
        for path in kind.mixtures:
            found[index] = path
            names = skeleton.layer_tensors(index)
            if table := next(filter(skeleton.is_table, names), None):
                raise InputError(field, f"{table} says which experts a token gets; none of them can be removed")
            counts[index] = len({place for name in names if (place := _expert(_inside(skeleton, index, name), path))})
    if not found:
        raise InputError(field, f"model_type {skeleton.config.model_type!r} has no experts in its layers")
    if len(set(counts.values())) > 1:
        stated = ", ".join(f"{count} in layer {layer}" for layer, count in sorted(counts.items())[:4])
        raise InputError(field, f"layers have different numbers of experts ({stated}), which are not cut yet")
    config = skeleton.config
    if idle := getattr(config, IDLE, None):
        reason = f"routers choose among {idle} experts without weights, too ({IDLE}), and cannot be cut yet"
        raise InputError(field, reason)
    per_token = next((value for name in PER_TOKEN if (value := _largest(getattr(config, name, None)))), None)
    if per_token is None:
        raise InputError(field, f"its config does not say how many experts a token gets ({', '.join(PER_TOKEN)})")
    groups = getattr(config, "n_group", None) or 1
    return Mixture(found, next(iter(counts.values())), per_token, groups, getattr(config, "topk_group", None) or groups)


def fewer_experts_of(job: PruningJob, checkpoint: Checkpoint, skeleton: Skeleton) -> "FewerExperts | None":
    """Return the model that a job which removes experts makes; None where it removes none.

    Raises:
        InputError: the model has no experts, or cannot give so many.
    """
    removal = job.removal
    if not isinstance(removal, ExpertRemoval):
        return None
    mixture = mixture_of(skeleton)
    return FewerExperts(checkpoint, skeleton, mixture, kept_experts(mixture, removal))


def kept_experts(mixture: Mixture, removal: ExpertRemoval, suffix: str = "") -> int:
    """Return how many experts of each layer a removal keeps.

    Args:
        suffix: of the recipe's fields `remove` and `keep`, for the error.

    Raises:
        InputError: the model cannot give so many.
    """
    if removal.keep is not None:
        kept, field, asked = removal.keep, "keep", f"{removal.keep}"
    else:
        assert removal.remove is not None
        multiple = mixture.multiple(removal.multiple)
        kept, field = kept_of(mixture.experts, removal.remove, multiple), "remove"
        asked = f"{removal.remove:g} (a multiple of {multiple})"
    mixture.check(kept, f"{field}{suffix}", asked)
    return kept


def with_experts(skeleton: Skeleton, mixture: Mixture, kept: int) -> Skeleton:
    """Return the skeleton of the model with `kept` experts in each of its layers, from the config in memory: no
    checkpoint is needed."""
    config = copy.deepcopy(skeleton.config)
    for name in COUNTS:
        if (value := getattr(config, name, None)) is not None:
            setattr(config, name, _replaced(value, mixture.experts, kept))
    return Skeleton(config, skeleton.device, skeleton.dtype)


def routers_of(skeleton: Skeleton, reduced: Skeleton, mixture: Mixture, index: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes [experts, hidden] of the linear maps that score a layer's experts, as they are where some
    experts stay, by their names within the layer: weights whose shape changes, and which are not inside the mixture.

    Args:
        reduced: the model with the experts that stay.
    """
    parameters = dict(skeleton.blank(index).named_parameters())
    before, after = skeleton.layer_tensors(index), reduced.layer_tensors(index)
    inside = f"{mixture.layers[index]}."
    found = {}
    for name, shape in before.items():
        own = _inside(skeleton, index, name)
        if own.endswith(".weight") and own in parameters and not own.startswith(inside) and after[name] != shape:
            found[own.removesuffix(".weight")] = after[name]
    return found


class FewerExperts:
    """A model beside the one that has `kept` experts in each of its layers.

    Attributes:
        stored: the checkpoint as it is stored, of which the new model's files are copies: FP8 weights stay what they
            are, and their scales go with them.

    Raises:
        InputError: transformers makes no such model from the config, or the tensors of an expert are not like those of
            others.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton, mixture: Mixture, kept: int) -> None:
        self.checkpoint, self.skeleton, self.mixture, self.kept = checkpoint, skeleton, mixture, kept
        self.stored = checkpoint.as_stored()
        self.changes = self._changes()
        content = with_changes(
            raw_config(checkpoint.folder),
            self.changes,
            tower=checkpoint.has_tower,
            untied=checkpoint.own_head,
        )
        place = f"{checkpoint.folder.url}/{CONFIG} with {kept} experts"
        config = language_config(parse_config(config_text(content).encode(), place))
        self.reduced = Skeleton(config, skeleton.device, skeleton.dtype)
        found = mixture_of(self.reduced)
        if found.experts != kept or found.layers != mixture.layers:
            raise InputError("model", f"{place} makes a model with {found.experts}: its count has a name not known")
        self._check_dtypes()

    def _check_dtypes(self) -> None:
        """Check that an expert can take the place of another one: both are stored in the same dtypes; and that no
        tensor with blocks of scales is cut."""
        for index, path in self.mixture.layers.items():
            dtypes: dict[str, torch.dtype] = {}
            for name in self.skeleton.layer_tensors(index):
                if (place := _expert(_inside(self.skeleton, index, name), path)) is None:
                    continue
                part, dtype = name.replace(f"{path}.{place}.", ""), self.stored.entries[name].dtype
                if dtypes.setdefault(part, dtype) != dtype:
                    raise InputError("model", f"tensor {name} is {dtype}, and that of another expert {dtypes[part]}")
            for own in self._sliced[index]:
                name = f"{self.skeleton.family.layers}.{index}.{own}"
                if (dtype := self.stored.entries[name].dtype) in DTYPES:
                    raise InputError("model", f"tensor {name}, which has a part for each expert, is {dtype}")

    def _changes(self) -> dict[str, Any]:
        """Return the new values of all fields of the file that say how many experts there are."""
        raw = raw_config(self.checkpoint.folder)
        language = raw["text_config"] if self.checkpoint.has_tower else raw
        own = self.skeleton.config.to_dict()  # where the file leaves the number to the class
        named = language if any(name in language for name in COUNTS) else own
        return {name: _replaced(named[name], self.mixture.experts, self.kept) for name in COUNTS if name in named}

    def place(self, name: str) -> Place:
        """Return the place in the files of a tensor of the new model."""
        place = self.stored.place(name)
        if place.slice is None:
            return place
        return replace(place, slice=replace(place.slice, shape=(self.kept, *place.slice.shape[1:])))

    def shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's tensors as they become, by their names within it."""
        return {_inside(self.reduced, index, name): s for name, s in self.reduced.layer_tensors(index).items()}

    def stored_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's tensors as they are written, scales among them, by their names within it."""
        prefix, shapes = f"{self.skeleton.family.layers}.{index}.", self.shapes(index)
        scales = {name: self.stored.entries.get(prefix + name) for own in shapes for name in names_of_scales(own)}
        return shapes | {name: entry.shape for name, entry in scales.items() if entry}

    def tensor(self, index: int, name: str, experts: KeptExperts | None, *, stored: bool = False) -> Tensor | None:
        """Return a tensor of a layer that keeps some experts, in the dtype in which it is read; None where it stays
        what it is.

        Args:
            name: within the layer, of the new model.
            experts: those that stay, ascending, the first of which becomes expert 0, or averages in their places; None
                for a layer that has none.
            stored: as it is stored.
        """
        checkpoint = self.stored if stored else self.checkpoint
        prefix = f"{self.skeleton.family.layers}.{index}."
        path = self.mixture.layers.get(index)
        if path is None:
            return None
        assert experts is not None
        if (place := _expert(name, path)) is not None:
            part = name.removeprefix(f"{path}.{place}.")
            return average(
                experts.sources(int(place)), lambda expert: checkpoint.read(f"{prefix}{path}.{expert}.{part}")
            )
        dimension = self._sliced[index].get(name)
        if dimension is None:
            return None
        return rows_of(checkpoint.read(prefix + name), dimension, experts, name.startswith(f"{path}."))

    @cached_property
    def _sliced(self) -> dict[int, dict[str, int]]:
        """The dimension of experts of every tensor that has one and is no expert's own, by layer and name."""
        found: dict[int, dict[str, int]] = {}
        for index, path in self.mixture.layers.items():
            after = self.shapes(index)
            found[index] = {}
            for name, before in self.skeleton.layer_tensors(index).items():
                own = _inside(self.skeleton, index, name)
                if _expert(own, path) is not None or after[own] == before:
                    continue
                differing = [
                    place for place, sizes in enumerate(zip(before, after[own], strict=True)) if len({*sizes}) > 1
                ]
                assert [(before[place], after[own][place]) for place in differing] == [
                    (self.mixture.experts, self.kept)
                ], f"{name} changes otherwise than by experts"
                found[index][own] = differing[0]
        return found

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the names of an expert's own tensors, within the expert."""
        first = f"{self.mixture.layers[index]}.0."
        names = (_inside(self.skeleton, index, name) for name in self.skeleton.layer_tensors(index))
        return tuple(name.removeprefix(first) for name in names if name.startswith(first))

    def routers(self, index: int) -> tuple[str, ...]:
        """Return the names within a layer of the linear maps that score its experts."""
        return tuple(routers_of(self.skeleton, self.reduced, self.mixture, index))

    def sliced(self, index: int) -> dict[str, int]:
        """Return the dimension of experts of each tensor of a layer that has one and is no expert's own, by its name
        within the layer."""
        return self._sliced[index]

    def active(self, skeleton: Skeleton) -> int:
        """Return the number of parameters of one of the two models that a token passes through."""
        experts = self.mixture.experts if skeleton is self.skeleton else self.kept
        inside = sum(
            prod(shape)
            for index, path in self.mixture.layers.items()
            for name, shape in skeleton.layer_tensors(index).items()
            if _inside(skeleton, index, name).startswith(f"{path}.")
        )
        return skeleton.parameters() - inside + inside // experts * self.mixture.per_token


def _inside(skeleton: Skeleton, index: int, name: str) -> str:
    """Return the name within its layer of a tensor."""
    return name.removeprefix(f"{skeleton.family.layers}.{index}.")


def _expert(name: str, mixture: str) -> str | None:
    """Return the number of the expert whose own a tensor is, by its name within the layer; None for others."""
    match = re.match(rf"{re.escape(mixture)}\.(\d+)\.", name)
    return match[1] if match else None


def _replaced(value: Any, experts: int, kept: int) -> Any:
    """Return a number of experts as it becomes, or a list of them, one for each layer."""
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, experts, kept) for item in value)
    return kept if value == experts else value


def _largest(value: Any) -> int | None:
    """Return a number, or the largest of a list of them."""
    return max(value, default=None) if isinstance(value, list | tuple) else value
