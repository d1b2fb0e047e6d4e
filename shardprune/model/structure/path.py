"""MoP's path (arXiv 2602.06127): iteration after iteration, a layer goes or every layer gets narrower.

Each iteration removes as many parameters as one current layer has. How many that are depends on the path alone,
not on the weights, so that a path is checked before anything is read.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from shardprune.model.structure.budget import Budget
from shardprune.model.structure.shape import FEWEST_LAYERS, Widths

AHEAD = 2  # iterations by which a group may go before its time: one of each layer can be more than one iteration gives
# L: a layer goes; G: groups and neurons of every layer; g: the same for what a request leaves after whole iterations
Letter = Literal["L", "G", "g"]


@dataclass(frozen=True)
class State:
    """Where a path has come to: layers left, their widths and budget, and the parameters removed so far.

    `nominal` is what the iterations were to remove; rounding to whole neurons is made up for by the next one.
    """

    layers: int
    widths: Widths
    budget: Budget
    removed: int = 0
    nominal: int = 0
    iteration: int = 0

    @property
    def layer(self) -> int:
        """The parameters of a current layer."""
        return self.budget.costs.layer(self.widths)

    @property
    def slack(self) -> int:
        """By how much widths can miss a request: one neuron of every layer, or as many as go together."""
        return self.layers * self.budget.slack

    def shallower(self) -> "State":
        """After a layer has gone.

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
        """After every layer has become narrower, so that `nominal` parameters have gone in all.

        Args:
            ahead: how many more may have gone, if groups take them: later iterations take as many less.

        Raises:
            ValueError: the layers have not so many neurons.
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
        """After one iteration.

        Raises:
            ValueError: the model cannot give so much.
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
        """What the next iteration may be: L and G where a whole one fits into the request, else g, else nothing."""
        if request is None or max(self.removed, self.nominal) + self.layer <= request + self.slack / 2:
            return ("L", "G")
        return ("g",) if request - self.removed > self.slack / 2 else ()


def walk(
    start: State, choose: Callable[[State], Letter], request: int | None, iterations: int | None
) -> Iterator[State]:
    """The states of a path one after the other, until the request is met or the iterations are done.

    Raises:
        ValueError: the model cannot give so much.
    """
    state = start
    while state.iteration != iterations and (offers := state.offers(request)):
        state = state.after(choose(state) if len(offers) > 1 else offers[0], request)
        yield state


def preferring(letter: Letter, request: int | None) -> Callable[[State], Letter]:
    """A choice that takes one letter as long as the model can give it, and then the other."""
    other: Letter = "G" if letter == "L" else "L"

    def choose(state: State) -> Letter:
        try:
            state.after(letter, request)
        except ValueError:
            return other
        return letter

    return choose
