"""What is known of a path before it starts: where it begins, when it ends, and the way it goes where that is given."""

import random
from dataclasses import dataclass

from shardprune.errors import InputError
from shardprune.structure.keeping import Keeping
from shardprune.structure.path import Letter, State, preferring, walk


@dataclass(frozen=True)
class Course:
    """A path that is to be walked.

    `request` is the number of parameters to remove, `parameters` those of the whole model. `letters` says which way it
    goes, where that is given; `seed` draws it; else a criterion decides at each iteration.
    """

    start: State
    parameters: int
    request: int | None
    letters: str | None
    seed: int | None
    keeping: Keeping

    @property
    def iterations(self) -> int | None:
        """The number of iterations where no share is asked for."""
        return len(self.letters) if self.letters and self.request is None else None

    def share(self, state: State) -> float:
        """The share of the model's parameters that is gone."""
        return state.removed / self.parameters

    def candidates(self, state: State) -> dict[Letter, State]:
        """What the next iteration may be, and where each leads; empty at the end.

        Raises:
            InputError: the model can give neither candidate.
        """
        if state.iteration == self.iterations:
            return {}
        found: dict[Letter, State] = {}
        reasons = []
        for letter in state.offers(self.request):
            try:
                found[letter] = state.after(letter, self.request)
            except ValueError as error:
                reasons.append(str(error))
        if reasons and not found:
            raise InputError(
                "remove", f"iteration {state.iteration + 1} is more than the model can give: {reasons[-1]}"
            )
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
        following = [self.share(state) for state in self.candidates(now).values()]
        return self.keeping.wants(
            now.iteration, self.share(before), self.share(now), min(following) if following else None
        )

    def check(self) -> None:
        """Check that the path can be walked to its end, whichever way it goes.

        Raises:
            InputError: names the field that asks for too much.
        """
        ends = [self._end(letter) for letter in (("L", "G") if self.letters is None else (None,))]
        shortest = min(ends, key=lambda state: state.iteration)
        if any(iteration > shortest.iteration for iteration in self.keeping.iterations):
            last = max(self.keeping.iterations)
            raise InputError("keep", f"{last} is beyond the last iteration, which is {shortest.iteration}")
        half = self.share(shortest) / max(shortest.iteration, 1) / 2
        if any(share > self.share(shortest) + half for share in self.keeping.shares):
            most = max(self.keeping.shares)
            raise InputError("keep", f"{most} is beyond the last iteration, which removes {self.share(shortest):.4f}")

    def _end(self, preferred: Letter | None) -> State:
        """The end of the path as given, or of the one that takes a letter as long as it can."""
        state = self.start

        def choose(now: State) -> Letter:
            if preferred is not None:
                return preferring(preferred, self.request)(now)
            assert self.letters is not None
            if now.iteration >= len(self.letters):
                raise InputError(
                    "path",
                    f"{self.letters!r} is too short: {now.iteration} iterations remove {self.share(now):.4f} of the "
                    f"parameters, {(self.request or 0) / self.parameters:g} are asked for",
                )
            return "L" if self.letters[now.iteration] == "L" else "G"

        try:
            for state in walk(self.start, choose, self.request, self.iterations):  # noqa: B007
                pass
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            field = "path" if self.request is None else "remove"
            asked = self.letters if self.request is None else f"{self.request / self.parameters:g}"
            raise InputError(
                field, f"{asked} is more than the model can give: in iteration {state.iteration + 1} {error}"
            ) from error
        return state
