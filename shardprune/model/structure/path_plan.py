"""What is known of a path before it starts: where it begins, when it ends, and the way it goes where that is given."""

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
    """A path that is to be walked.

    `request` is the number of parameters to remove, `parameters` those of the whole model. `letters` says which way it
    goes, where that is given; `seed` draws it; else a criterion decides at each iteration.
    """

    start: State
    parameters: int
    request: int | None
    letters: str | None
    seed: int | None
    keeping: KeptIterations

    @property
    def iterations(self) -> int | None:
        """The number of iterations where no share is asked for."""
        return len(self.letters) if self.letters and self.request is None else None

    def share(self, state: State) -> float:
        """The share of the model's parameters that is gone."""
        return state.removed / self.parameters

    def candidates(self, state: State) -> dict[Letter, State]:
        """What the next iteration may be, and where each leads; empty at the end.

        Only what the model can give is offered, and after which it can give all that is asked for.
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
        """Which of the candidates is taken; None where a criterion decides between them."""
        if len(candidates) == 1:
            return next(iter(candidates))
        if self.letters is not None:
            return "L" if self.letters[state.iteration] == "L" else "G"
        if self.seed is not None:
            draw = random.Random(self.seed)
            return [draw.choice(("L", "G")) for _ in range(state.iteration + 1)][-1]
        return None

    def kept(self, before: State, now: State) -> bool:
        """Whether an iteration is kept."""
        return self.keeping.wants(now.iteration, self._half_way(before), self._half_way(now))

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
                self._end(preferring("L", self.request))  # says why
        shortest = min(ends, key=lambda state: state.iteration)
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
        """The share half way to the next iteration, whichever way that goes; the first one is nobody's second."""
        if not state.iteration:
            return -math.inf
        if self._over(state):
            return math.inf
        step = state.layer if self.request is None else min(state.layer, self.request - state.removed)
        return self.share(state) + step / self.parameters / 2

    def _ends(self, state: State) -> list[State]:
        """Where a path ends that takes one letter as long as it can; empty where the model cannot give so much."""
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
        """The end of a path.

        Raises:
            InputError: the model cannot give so much.
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
