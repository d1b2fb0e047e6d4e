"""Structures (attention groups, MLP neurons): score them, choose those that stay, correct the remaining columns.

A structure is `size` consecutive columns of its block's output projection W [rows, cols]: structure k owns the columns
[k * size, (k + 1) * size). Neurons have size 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.errors import SolverError
from shardprune.solvers.factor import Factor, factorise
from shardprune.solvers.outliers import BLOCK
from shardprune.solvers.products import add_product, product
from shardprune.solvers.statistics import InputStatistics

BATCHES = 64  # removals are divided into about so many batches; structures are scored again after each
OUTPUTS = 2**27  # float32 entries of heads' outputs at once on CUDA


def columns_of(structures: Tensor, size: int) -> Tensor:
    """Return the columns of `structures` (indices), int64, in their order."""
    return (structures.unsqueeze(1) * size + torch.arange(size, device=structures.device)).flatten()


def head_contributions(inputs: Tensor, weight: Tensor, size: int) -> Tensor:
    """Sum over the tokens t of ||W_k x_tk||_1 for each structure k, float32 [structures].

    The score of AMP (arXiv 2504.21174), as MoP (arXiv 2602.06127) uses it. Memory beyond the arguments is one [tokens,
    rows] in float32 for each structure that is processed at once: one on a CPU, on CUDA up to OUTPUTS entries of
    16-bit inputs, whose products leave the tensor cores as float32.

    Args:
        inputs, weight: X [..., cols] and W [rows, cols] of the output projection, any floating dtype.
    """
    tokens = inputs.reshape(-1, inputs.shape[-1])
    if tokens.is_cuda and tokens.dtype == weight.dtype and tokens.dtype in (torch.bfloat16, torch.float16):
        together = max(1, OUTPUTS // (len(tokens) * len(weight)))
        pairs = zip(
            tokens.unflatten(1, (-1, size)).transpose(0, 1).split(together),
            weight.unflatten(1, (-1, size)).permute(1, 2, 0).split(together),
            strict=True,
        )
        return torch.cat([torch.bmm(x, w, out_dtype=torch.float32).abs_().sum((1, 2)) for x, w in pairs])
    pairs = zip(tokens.split(size, dim=1), weight.split(size, dim=1), strict=True)
    return torch.stack([(x.float() @ w.float().t()).abs_().sum() for x, w in pairs])


def neuron_activity(inputs: Tensor) -> Tensor:
    """Return AMP's score of neurons: the sum over the tokens of |x|, float32 [cols], for inputs [..., cols]."""
    return inputs.reshape(-1, inputs.shape[-1]).abs().sum(0, dtype=torch.float32)


@dataclass(frozen=True)
class Owned:
    """A weight [rows, cols], its input's mean squares [cols], and the structure that owns each slice of it.

    `owners` is int64 [rows] where structures own rows (`dim` 0) and [cols] where they own columns
    (`dim` 1); -1 is a slice that belongs to none.
    """

    weight: Tensor
    squares: Tensor
    owners: Tensor
    dim: int


def mean_metric(projections: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the mean of Wanda's metric |w| * sqrt(s) over all entries of (weight [rows, cols], s [cols]) pairs."""
    total, entries = 0.0, 0
    for weight, squares in projections:
        norms = torch.linalg.vector_norm(weight, 1, dim=0, dtype=torch.float64)
        total += float(norms @ squares.double().sqrt())
        entries += weight.numel()
    return total / entries


def outlier_shares(matrices: Iterable[Owned], structures: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Return each structure's share of metric entries above `threshold`, and the mean of its entries.

    Rows are processed in blocks, as in `outlier_ratios`. Slices are summed on the CPU: on a GPU the order of the sums,
    and with it their last bit, would differ from run to run.

    Returns:
        The shares (fractions) and the means, float64 [structures] on the CPU; nan for a structure without entries.
    """
    entries, above, total = torch.zeros(3, structures, dtype=torch.float64)
    for matrix in matrices:
        counts, sums = _by_slice(matrix, threshold)
        owners = matrix.owners.cpu()
        owned = owners >= 0
        each = torch.full_like(sums, matrix.weight.shape[1 - matrix.dim])
        for into, values in ((entries, each), (above, counts), (total, sums)):
            into += torch.bincount(owners[owned], values[owned], minlength=structures)
    return above / entries, total / entries


def _by_slice(matrix: Owned, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the number of entries of each slice above `threshold`, and the slice's sum: float64 [slices] on the
    CPU.
    """
    norms = matrix.squares.sqrt()
    counts, sums = [], []
    for rows in matrix.weight.split(max(1, BLOCK // matrix.weight.shape[1])):
        metric = rows.abs() * norms
        counts.append((metric > threshold).sum(1 - matrix.dim).double())
        sums.append(metric.sum(1 - matrix.dim, dtype=torch.float64))
    if matrix.dim == 0:
        return torch.cat(counts).cpu(), torch.cat(sums).cpu()
    return torch.stack(counts).sum(0).cpu(), torch.stack(sums).sum(0).cpu()


def keep_largest(scores: Tensor, count: int, ties: Tensor | None = None) -> Tensor:
    """Return the indices, int64 ascending [count], of the structures with the largest `scores` [structures].

    Among equal scores those with the larger `ties` stay, then those with the lower index.
    """
    order = torch.arange(len(scores), device=scores.device)
    for keys in (scores,) if ties is None else (ties, scores):  # stable sorts, the last key leads
        order = order[keys[order].argsort(descending=True, stable=True)]
    return order[:count].sort().values


def keep_by_error(weight: Tensor, factor: Factor, size: int, count: int) -> Tensor:
    """Return the indices, int64 ascending [count], of the structures that stay if those with the least error are
    removed.

    Greedy, with all remaining structures making up for removed ones, as ZipLM (arXiv 2302.04089): after every 1/64 of
    the removals (at least one) the rest is scored again, fewer than 128 times. Among equal costs the lower index stays.

    With g the removed columns: 2 cols^3 operations for H^-1, 2 g cols (rows + cols) for the eliminations, rows cols
    size for each scoring; memory beyond the arguments is two [cols, cols] and four [rows, cols] at most.

    Args:
        weight: W [rows, cols] float32, left unchanged.
        factor: of the damped Hessian of its input; inputs that are always zero cost nothing.

    Raises:
        SolverError: float32 does not suffice to keep H^-1 positive definite.
    """
    structures = weight.shape[1] // size
    weight = weight.masked_fill(factor.dead, 0)
    upper = factor.steps * factor.diagonal.unsqueeze(1)
    inverse = product(upper.t(), upper)
    del upper
    stays = torch.ones(structures, dtype=torch.bool, device=weight.device)
    left = structures - count  # to remove
    batch = max(1, left // BATCHES)
    while left > 0:
        errors = removal_errors(weight, inverse, size).masked_fill_(~stays, torch.inf)
        goes = errors.argsort(descending=True, stable=True)[-min(batch, left) :]
        stays[goes] = False
        left -= len(goes)
        if left > 0:
            _eliminate(weight, inverse, columns_of(goes, size))
    return stays.nonzero().squeeze(1)


def removal_errors(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Return the error of removing each structure S alone: tr(W_S ((H^-1)_SS)^-1 W_S^T), float32 [structures].

    That is the least tr(D H D^T) of all changes D of W [rows, cols] that remove S, with H^-1 = `inverse` [cols, cols]:
    optimal brain surgeon's equation 5 (Hassibi and Stork, 1993), twice, for blocks.

    Raises:
        SolverError: a block of H^-1 is not positive definite.
    """
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = len(inverse) // size
    blocks = inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    lower = _cholesky(blocks)
    return torch.linalg.solve_triangular(lower, weight.t().reshape(count, size, -1), upper=False).square().sum((1, 2))


def _eliminate(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Remove columns S in place: W -= W_S ((H^-1)_SS)^-1 (H^-1)_S:, and the same elimination in H^-1.

    H^-1 is left with the identity in their place: it stays positive definite, and W_S no longer matters.
    """
    lower = _cholesky(inverse[columns.unsqueeze(1), columns])
    steps = torch.linalg.solve_triangular(lower, inverse[columns], upper=False)
    lost = torch.linalg.solve_triangular(lower, weight[:, columns].t(), upper=False)
    add_product(weight, lost.t(), steps, alpha=-1)
    add_product(inverse, steps.t(), steps, alpha=-1)
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse[columns, columns] = 1


def _cholesky(matrices: Tensor) -> Tensor:
    lower, info = torch.linalg.cholesky_ex(matrices)
    if bool(info.any()):
        raise SolverError("a block of the inverse Hessian is not positive definite: raise the damping")
    return lower


@dataclass(frozen=True)
class Correction:
    """The corrected remaining columns: `weight` [rows, kept]; `damping` and `retries` as in a `Factor`."""

    weight: Tensor
    damping: float
    retries: int


def correct(weight: Tensor, statistics: InputStatistics, kept: Tensor, damping: float = 0.01) -> Correction:
    """Correct the `kept` columns K for the removal of the others, R, by least squares with a ridge on the change.

    W' = W_K + W_R H_RK (H_KK + r)^-1 minimises 2/N ||W X - W' X_K||^2 + r ||W' - W_K||^2, where r is the fraction
    `damping` of H_KK's mean diagonal. The weights of inputs that are always zero stay as they are.

    Args:
        weight: W [rows, cols] float32, left unchanged.
        statistics: of its input, kind `gram`.
        kept: column indices, int64 on the weight's device.

    Raises:
        SolverError: H_KK cannot be factorised.
    """
    goes = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    goes[kept] = False
    removed = goes.nonzero().squeeze(1)
    if len(removed) == 0:
        return Correction(weight[:, kept], damping, 0)
    scale, gram = statistics.scale, statistics.gram
    factor = factorise(gram[kept.unsqueeze(1), kept], damping, scale)
    shared = product(weight[:, removed], gram[removed.unsqueeze(1), kept]) * scale
    change = product(product(shared, factor.steps.t()) * factor.diagonal.square(), factor.steps)  # H^-1 = U^T U
    return Correction(weight[:, kept] + change.masked_fill_(factor.dead, 0), factor.damping, factor.retries)
