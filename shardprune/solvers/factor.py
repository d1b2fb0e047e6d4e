"""The one factorisation that SparseGPT needs: U upper triangular with H^-1 = U^T U."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.errors import SolverError

DAMPING_GROWTH = 10.0
DAMPING_LIMIT = 1.0  # as a fraction of the mean diagonal
LEAF = 256  # columns


@dataclass(frozen=True)
class Factor:
    """U without its diagonal: `steps` [cols, cols] float32 is u_jk / u_jj, `diagonal` [cols] is u_jj.

    `dead` [cols] marks inputs that were always zero; `damping` is the final fraction of the mean diagonal that was
    added, after `retries` increases; `ridge` [] is the amount.
    """

    steps: Tensor
    diagonal: Tensor
    dead: Tensor
    damping: float
    retries: int
    ridge: Tensor


def factorise(hessian: Tensor, damping: float) -> Factor:
    """Factorise a damped Hessian [cols, cols]; its diagonal is overwritten.

    If H is not positive definite, the damping grows tenfold at a time up to `DAMPING_LIMIT`.

    Raises:
        SolverError: H has entries that are not finite, or no damping up to the limit helps.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):  # no other entry of X^T X is larger
        raise SolverError("the Hessian has entries that are not finite: the activations overflow")
    dead = diagonal == 0
    diagonal[dead] = 1
    undamped = diagonal.clone()

    fraction, retries = damping, 0
    while True:
        ridge = fraction * undamped.mean()
        diagonal.copy_(undamped + ridge)
        upper = torch.zeros_like(hessian)
        if _invert_into(hessian, upper):
            scale = upper.diagonal().clone()
            return Factor(upper.div_(scale.unsqueeze(1)), scale, dead, fraction, retries, ridge)
        if fraction >= DAMPING_LIMIT:
            raise SolverError(f"the Hessian is not positive definite with damping {fraction:g} after {retries} retries")
        fraction = min(max(fraction, 1e-4) * DAMPING_GROWTH, DAMPING_LIMIT)
        retries += 1


def _invert_into(hessian: Tensor, upper: Tensor) -> bool:
    """Fill `upper` with U; return False if H is not positive definite.

    H = R R^T with R upper triangular, and U = R^-1. Split in half, with H = [[A, B], [B^T, C]]:

        R_22 R_22^T = C,   R_12 = B U_22^T,   R_11 R_11^T = A - R_12 R_12^T,   U_12 = -U_11 R_12 U_22.

    The recursion ends at leaves that fit a cache; all other work is products of matrices, which run near the peak of
    any processor. LAPACK's own factorisation and triangular inverse of the whole take twice as long on a CPU, half of
    it in copying between row and column order.
    """
    size = len(hessian)
    if size <= LEAF:
        # With J reversing the order, J H J = L L^T gives R = J L J.
        lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        identity = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
        upper.copy_(torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True))
        return int(info) == 0
    half = size // 2
    if not _invert_into(hessian[half:, half:], upper[half:, half:]):
        return False
    right = hessian[:half, half:] @ upper[half:, half:].t()
    if not _invert_into(torch.addmm(hessian[:half, :half], right, right.t(), alpha=-1), upper[:half, :half]):
        return False
    upper[:half, half:] = (upper[:half, :half] @ (right @ upper[half:, half:])).neg_()
    return True
