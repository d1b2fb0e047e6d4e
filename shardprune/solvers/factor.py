"""The one factorisation that SparseGPT needs: U upper triangular with H^-1 = U^T U."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.errors import SolverError

DAMPING_GROWTH = 10.0
DAMPING_LIMIT = 1.0  # as a fraction of the mean diagonal


@dataclass(frozen=True)
class Factor:
    """`upper` [cols, cols] float32; `dead` [cols] marks inputs that were always zero; `damping` is the
    fraction of the mean diagonal that was added in the end, after `retries` raises."""

    upper: Tensor
    dead: Tensor
    damping: float
    retries: int


def factorise(hessian: Tensor, damping: float) -> Factor:
    """Factor a damped Hessian [cols, cols].

    With J the permutation that reverses the order, J H J = L L^T gives H = R R^T for the upper
    triangular R = J L J, and U = R^-1 is upper triangular with H^-1 = U^T U: one Cholesky
    factorisation and one triangular inverse instead of two factorisations and a full inverse.

    Where H is not positive definite, the damping grows tenfold at a time up to `DAMPING_LIMIT`.

    Raises:
        SolverError: H has entries that are not finite, or no damping up to the limit helps.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise SolverError("the Hessian has entries that are not finite: the activations overflow")
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    mean = diagonal.mean()

    added = 0.0
    fraction, retries = damping, 0
    while True:
        diagonal += (fraction - added) * mean
        added = fraction
        lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if int(info) == 0:
            break
        if fraction >= DAMPING_LIMIT:
            raise SolverError(f"the Hessian is not positive definite with damping {fraction:g} after {retries} retries")
        fraction = min(max(fraction, 1e-4) * DAMPING_GROWTH, DAMPING_LIMIT)
        retries += 1

    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return Factor(upper, dead, fraction, retries)
