"""The path as requested: its start, its end, and its letters if they are given or drawn."""

import math
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from shardprune.errors import InputError
from shardprune.model.structure.kept_iterations import KeptIterations
from shardprune.model.structure.path import Letter, State, preferring, walk


@dataclass(frozen=True)
class PathPlan:
    """The plan of a path.

    Attributes:
        parameters: of the whole original model.
        request: the number of parameters to remove; None: as many as the letters remove.
        letters: the given path, such as LGGL; None: drawn or searched.
        seed: of a drawn path; None: a criterion decides at each iteration.
    """

    start: State
    parameters: int
    request: int | None
    letters: str | None
    seed: int | None
    keeping: KeptIterations

    @property
    def iterations(self) -> int | None:
        """The number of iterations of a given path without a request."""
        return len(self.letters) if self.letters and self.request is None else None

    def share(self, state: State) -> float:
        """Return the removed share of the model's parameters."""
        return state.removed / self.parameters

    def candidates(self, state: State) -> dict[Letter, State]:
        """Return the possible next letters with the states after them; empty at the end.

        A candidate is offered only if the model can still meet the whole request after it.
        """
        if self._over(state):
            return {}
        found: dict[Letter, State] = {}
        for letter in state.offers(self.request):
            with suppress(ValueError):
                after = state.after(letter, self.request)
                if self.letters is not None or self._reaches_the_end(after):
                    found[letter] = after
        assert found, "the check would have failed"
        return found

    def choice(self, state: State, candidates: dict[Letter, State]) -> Letter | None:
        """Return the letter to take; None if a criterion decides between the candidates."""
        if len(candidates) == 1:
            return next(iter(candidates))
        if self.letters is not None:
            return "L" if self.letters[state.iteration] == "L" else "G"
        if self.seed is not None:
            draw = random.Random(self.seed)
            return [draw.choice(("L", "G")) for _ in range(state.iteration + 1)][-1]
        return None

    def kept(self, before: State, now: State) -> bool:
        """Return whether an iteration is kept as a checkpoint."""
        return self.keeping.keeps(now.iteration, self._half_way(before), self._half_way(now))

    def check(self) -> None:
        """Check that the path can be walked to its end.

        Raises:
            InputError: names the field that asks for too much.
        """
        if self.letters is not None:
            ends = [self._end(self._lettered)]
        elif self.seed is not None and self._reaches_the_end(self.start):
            ends = [self._end(self._drawn)]
        else:
            ends = self._ends(self.start)
            if not ends:
                self._end(preferring("L", self.request))  # raises the reason
        shortest = min(ends, key=lambda state: state.iteration)
        if self.request is not None and not shortest.removed:
            step, asked = self.start.slack / self.parameters, self.request / self.parameters
            least = f"{self.start.budget.multiple} neurons of every layer, {step:.2g}"
            reason = f"{asked:.2g} removes nothing: the least that goes is {least}"
            raise InputError("remove", f"{reason}; use more, or a smaller neuron_multiple")
        if any(iteration > shortest.iteration for iteration in self.keeping.iterations):
            last = max(self.keeping.iterations)
            raise InputError("keep", f"{last} is beyond the last iteration, which is {shortest.iteration}")
        half = self.share(shortest) / max(shortest.iteration, 1) / 2
        if any(share > self.share(shortest) + half for share in self.keeping.shares):
            most = max(self.keeping.shares)
            raise InputError("keep", f"{most} is beyond the last iteration, which removes {self.share(shortest):.4f}")

    # -- inside -----------------------------------------------------------------------------------------------

    def _over(self, state: State) -> bool:
        return state.iteration == self.iterations or not state.offers(self.request)

    def _half_way(self, state: State) -> float:
        """Return the midpoint between this iteration's removed share and the next one's."""
        if not state.iteration:
            return -math.inf
        if self._over(state):
            return math.inf
        step = state.layer if self.request is None else min(state.layer, self.request - state.removed)
        return self.share(state) + step / self.parameters / 2

    def _ends(self, state: State) -> list[State]:
        """Return the end states of the two paths that prefer one letter; empty if the model is too small for the
        request.
        """
        found = []
        for letter in ("L", "G"):
            with suppress(ValueError):
                *_, end = (state, *walk(state, preferring(letter, self.request), self.request, self.iterations))
                found.append(end)
        return found

    def _reaches_the_end(self, state: State) -> bool:
        return bool(self._ends(state))

    def _lettered(self, now: State) -> Letter:
        assert self.letters is not None
        if now.iteration >= len(self.letters):
            raise InputError(
                "path",
                f"{self.letters!r} is too short: {now.iteration} iterations remove {self.share(now):.4f} of the "
                f"parameters, {(self.request or 0) / self.parameters:g} are asked for",
            )
        return "L" if self.letters[now.iteration] == "L" else "G"

    def _drawn(self, now: State) -> Letter:
        choice = self.choice(now, self.candidates(now))
        assert choice is not None
        return choice

    def _end(self, choose: Callable[[State], Letter]) -> State:
        """Return the end state of a path.

        Raises:
            InputError: the model is too small for it.
        """
        state = self.start
        try:
            for state in walk(self.start, choose, self.request, self.iterations):  # noqa: B007
                pass
        except InputError:
            raise
        except ValueError as error:
            field = "path" if self.request is None else "remove"
            asked = self.letters if self.request is None else f"{self.request / self.parameters:g}"
            raise InputError(
                field, f"{asked} is more than the model can give: in iteration {state.iteration + 1} {error}"
            ) from error
        return state
