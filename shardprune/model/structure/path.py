"""MoP's path (arXiv 2602.06127): each iteration removes one layer or makes every layer narrower.

An iteration removes as many parameters as one current layer has. That number depends on the path alone, not on the
weights, so that a path is checked before anything is read.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from shardprune.model.structure.budget import Budget
from shardprune.model.structure.shape import FEWEST_LAYERS, Widths

AHEAD = 2  # iterations of credit for groups: one group of every layer can exceed a single iteration
# L: remove a layer; G: groups and neurons of every layer; g: a partial G that meets the rest of the request
Letter = Literal["L", "G", "g"]


@dataclass(frozen=True)
class State:
    """The model after some iterations: layers, widths, budget, and parameters removed.

    `nominal` is the sum of the iterations' targets; the next iteration makes up for rounding to whole neurons.
    """

    layers: int
    widths: Widths
    budget: Budget
    removed: int = 0
    nominal: int = 0
    iteration: int = 0

    @property
    def layer(self) -> int:
        """Parameters of a current layer."""
        return self.budget.costs.layer(self.widths)

    @property
    def slack(self) -> int:
        """The parameters by which widths can miss a request: one multiple of neurons of every layer."""
        return self.layers * self.budget.slack

    def shallower(self) -> "State":
        """Return the state after one layer is removed.

        Raises:
            ValueError: fewer than two would be left.
        """
        if self.layers <= FEWEST_LAYERS:
            raise ValueError(f"fewer than {FEWEST_LAYERS} layers would be left")
        return replace(
            self,
            layers=self.layers - 1,
            removed=self.removed + self.layer,
            nominal=self.nominal + self.layer,
            iteration=self.iteration + 1,
        )

    def narrower(self, nominal: int, ahead: float = 0.0) -> "State":
        """Return the state after every layer is narrowed so that `nominal` parameters are removed in all.

        Args:
            ahead: parameters beyond `nominal` that groups may take; later iterations remove as many fewer.

        Raises:
            ValueError: the layers have too few neurons.
        """
        amount = (nominal - self.removed) / self.layers
        narrowed = self.budget.narrowed(self.widths, amount, ahead / self.layers)
        gone = self.layer - narrowed.budget.costs.layer(narrowed.widths)
        return replace(
            self,
            widths=narrowed.widths,
            budget=narrowed.budget,
            removed=self.removed + self.layers * gone,
            nominal=nominal,
            iteration=self.iteration + 1,
        )

    def after(self, letter: Letter, request: int | None) -> "State":
        """Return the state after one iteration.

        Raises:
            ValueError: the model is too small for it.
        """
        if letter == "L":
            return self.shallower()
        if letter == "G":
            nominal = self.nominal + self.layer
            left = math.inf if request is None else max(0, request - nominal)
            return self.narrower(nominal, ahead=min(AHEAD * self.layer, left))
        assert request is not None
        return self.narrower(request)

    def offers(self, request: int | None) -> tuple[Letter, ...]:
        """Return the possible next letters: L and G if a whole iteration fits into the request, then g; empty at the
        end.
        """
        if request is None or max(self.removed, self.nominal) + self.layer <= request + self.slack / 2:
            return ("L", "G")
        return ("g",) if request - self.removed > self.slack / 2 else ()


def walk(
    start: State, choose: Callable[[State], Letter], request: int | None, iterations: int | None
) -> Iterator[State]:
    """Yield the states of a path until the request is met or the iterations are done.

    Raises:
        ValueError: the model is too small for the request.
    """
    state = start
    while state.iteration != iterations and (offers := state.offers(request)):
        state = state.after(choose(state) if len(offers) > 1 else offers[0], request)
        yield state


def preferring(letter: Letter, request: int | None) -> Callable[[State], Letter]:
    """Return a choice that takes one letter for as long as the model allows it, then the other."""
    other: Letter = "G" if letter == "L" else "L"

    def choose(state: State) -> Letter:
        try:
            state.after(letter, request)
        except ValueError:
            return other
        return letter

    return choose
