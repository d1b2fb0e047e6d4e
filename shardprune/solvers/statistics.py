"""Statistics: sums over the calibration tokens, how replicas add theirs up, and those of a projection's input."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from shardprune.solvers.factor import Factor, factorise
from shardprune.solvers.products import add_product, product
from shardprune.solvers.triangles import add_square, lower_panels, mirror, panels, whole

Kind = Literal["gram", "squares"]
PRIOR_TOKENS = 128  # of all that enter a mixture, added to those of each expert
FEW_TOKENS_DAMPING = 0.1  # of the Gram matrix of an expert that saw fewer tokens than twice its inputs
Part = tuple[dict[str, Tensor], int]  # one replica's sums by name, on the CPU, and the number of sequences behind them


class Summed(ABC):
    """A statistic that is summed over calibration sequences, of which every replica of a shard has a share.

    A new one says what is summed (`tensors`) and how sequences add to it; it is handed out and merged as any other.
    """

    samples: int  # sequences behind the sums

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name: the statistic's own tensors, no copies."""

    def part(self) -> Part:
        """Return the sums as they travel to the replica that needs those of all."""
        return {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}, self.samples

    def merge(self, parts: Sequence[Part | None]) -> None:
        """Become the sums of all replicas, of which None stands for this one.

        They are added to zero in the order of the replicas: floating-point sums depend on their order, and a result
        must not depend on which replica it is that merges.
        """
        own = {name: tensor.clone() for name, tensor in self.tensors().items()}, self.samples
        self.samples = 0
        for tensor in self.tensors().values():
            tensor.zero_()
        for part in parts:
            sums, samples = part or own
            self.samples += samples
            for name, tensor in self.tensors().items():
                tensor += sums[name].to(tensor.device)


@dataclass
class InputStatistics(Summed):
    """Sums over the tokens of one input X [tokens, cols], shared by the projections that read it.

    `sums` is the lower triangle of X^T X, float32 [cols, cols] whose other entries mean nothing (kind `gram`), or its
    diagonal alone, float32 [cols] (kind `squares`); `samples` is the number N of sequences behind it. `held_out` are
    the sums over sequences that judge solutions, where there are any; they go where the statistics go. `counted` is the
    number of tokens, int64 [] on the device, of an input that gets those alone that are routed to its expert.
    """

    kind: Kind
    sums: Tensor
    samples: int = 0
    held_out: "InputStatistics | None" = None
    counted: Tensor | None = None
    _settled: Tensor | None = field(default=None, repr=False)  # what `settle` has added to the diagonal, float32 []
    _factors: dict[float, Factor] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(
        cls, kind: Kind, cols: int, device: torch.device | str = "cpu", *, counting: bool = False
    ) -> "InputStatistics":
        """Return the sums over nothing.

        Args:
            counting: count the tokens, too.
        """
        shape = (cols, cols) if kind == "gram" else (cols,)
        counted = torch.zeros((), dtype=torch.int64, device=device) if counting else None
        return cls(kind, torch.zeros(shape, dtype=torch.float32, device=device), counted=counted)

    def add(self, inputs: Tensor, samples: int) -> None:
        """Add the inputs of one wave of `samples` sequences, [..., cols] in any floating dtype.

        The number of sequences cannot be read off the shape: some models flatten it into the tokens.
        """
        self.samples += samples
        tokens = inputs.reshape(-1, inputs.shape[-1])
        if self.counted is not None:
            self.counted += len(tokens)
        if self.kind == "squares":
            self.sums += tokens.float().square().sum(0)
        else:
            add_gram(self.sums, tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums, of a Gram matrix the panels of its lower triangle: views, not contiguous."""
        held_out = self.held_out.tensors() if self.held_out else {}
        others = {f"held out, {name}": tensor for name, tensor in held_out.items()}
        if self.counted is not None:
            others["counted"] = self.counted
        if self.kind == "squares":
            return {"sums": self.sums, **others}
        return {f"panel {place}": panel for place, panel in enumerate(lower_panels(self.sums))} | others

    @property
    def tokens(self) -> int | None:
        """The number of tokens behind the sums, where it was counted."""
        return None if self.counted is None else int(self.counted)

    @property
    def tokens_in_all(self) -> int | None:
        """The same with those of held-out sequences, of which the last solution is, too."""
        held_out = self.held_out.tokens if self.held_out else None
        return None if self.tokens is None else self.tokens + (held_out or 0)

    def add_prior(self, common: "InputStatistics", tokens: int) -> None:
        """Add as much of what enters a mixture as `PRIOR_TOKENS` tokens have on average: an expert that sees few tokens
        is pruned by those that it might have seen.

        Each replica adds its part.

        Args:
            common: sums over this replica's tokens.
            tokens: of all replicas.
        """
        self.sums.add_(common.sums, alpha=PRIOR_TOKENS / tokens)

    def settle(self) -> None:
        """Have all inputs count alike where none was ever other than zero: nothing is known of them then."""
        diagonal = self._diagonal
        self._settled = (diagonal == 0).all().to(diagonal.dtype) * max(1, self.samples)
        diagonal += self._settled

    def least_damping(self, damping: float) -> float:
        """Return the damping of an expert's input: more where it saw few tokens and has no prior."""
        seen = self.tokens_in_all
        few = seen is not None and seen < 2 * self.sums.shape[0]
        return max(damping, FEW_TOKENS_DAMPING) if few else damping

    @property
    def gram(self) -> Tensor:
        """X^T X, float32 [cols, cols]: the sums themselves, whose upper triangle is filled in."""
        assert self.kind == "gram"
        return mirror(self.sums)

    @property
    def mean_squares(self) -> Tensor:
        """s = 1/N sum over tokens of x^2, float32 [cols]."""
        return self._diagonal / max(1, self.samples)

    @property
    def finite(self) -> bool:
        """Whether all sums are; no entry of X^T X is larger than the largest of its diagonal."""
        return bool(torch.isfinite(self.mean_squares).all())

    @property
    def scale(self) -> float:
        """2/N, by which X^T X becomes the Hessian."""
        return 2 / max(1, self.samples)

    @property
    def hessian(self) -> Tensor:
        """H = 2/N X^T X, float32 [cols, cols]."""
        return self.gram * self.scale

    def factor(self, damping: float) -> Factor:
        """Return the upper factor of the inverse Hessian, computed once for all projections that read this input."""
        if damping not in self._factors:
            self._factors[damping] = factorise(self.sums, damping, self.scale)
        return self._factors[damping]

    def take_in_held_out(self) -> None:
        """Add the sums over held-out sequences to the others, once they have judged, and settle the whole anew.
        `samples`, of which no solution depends but by the scale of H, stays what it is."""
        assert self.held_out is not None
        if self._settled is not None:
            self._diagonal.sub_(self._settled)
        self.sums += self.held_out.sums if self.kind == "gram" else self.held_out.sums.diagonal()
        if self.counted is not None and self.held_out.counted is not None:
            self.counted += self.held_out.counted
        self.held_out = None
        self.settle()
        self.forget_factors()

    @property
    def _diagonal(self) -> Tensor:
        """The diagonal of X^T X, float32 [cols], as a view."""
        return self.sums.diagonal() if self.kind == "gram" else self.sums

    def forget_factors(self) -> None:
        """Give up the factors, each of which is as large as the sums."""
        self._factors.clear()


def add_gram(gram: Tensor, tokens: Tensor) -> None:
    """gram [cols, cols] += tokens^T tokens in float32, its lower triangle alone, for tokens [count, cols].

    A CPU widens 16-bit tokens once for all panels.
    """
    add_square(gram, (tokens if tokens.is_cuda else tokens.float()).t())


def gram_norm(weight: Tensor, gram: Tensor) -> Tensor:
    """Return ||X W^T||^2 = tr(W G W^T) for W float32 [rows, cols] and G = X^T X [cols, cols], float64 [] on the device.

    Only G's lower triangle is read, and what lies below the diagonal counts twice. Panel by panel, p its columns and b
    those below its square:

        tr(W G W^T) = sum over p of <W_p G_pp + 2 W_b G_bp, W_p>.
    """
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for panel in panels(len(gram), gram.device):
        own, below = weight[:, panel], slice(panel.stop, None)
        image = product(own, whole(gram[panel, panel]))
        if panel.stop < len(gram):
            add_product(image, weight[:, below], gram[below, panel], alpha=2)
        total += image.mul_(own).sum(dtype=torch.float64)
    return total


def output_error(dense: Tensor, pruned: Tensor, statistics: InputStatistics) -> float:
    """Return the relative output error ||XW - XW'||^2 / ||XW||^2 of a projection, from X^T X.

    Args:
        dense, pruned: weights [rows, cols], float32.
    """
    norm, lost = gram_norm(dense, statistics.sums), gram_norm(dense - pruned, statistics.sums)
    return float(lost / norm) if norm > 0 else 0.0
