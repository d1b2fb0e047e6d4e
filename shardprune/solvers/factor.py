"""The one factorisation that SparseGPT needs: U upper triangular with H^-1 = U^T U."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.errors import SolverError
from shardprune.solvers.triangles import add_square, times_upper, times_upper_transposed, upper_times

DAMPING_GROWTH = 10.0
DAMPING_LIMIT = 1.0  # as a fraction of the mean diagonal
LEAF, CUDA_LEAF = 256, 1024  # columns: a leaf fits a cache; on a GPU it is worth its launches


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


def factorise(gram: Tensor, damping: float, scale: float = 1.0) -> Factor:
    """Factorise a damped Hessian, `scale` times the symmetric `gram` [cols, cols], whose lower triangle alone is read.

    If H is not positive definite, the damping grows tenfold at a time up to `DAMPING_LIMIT`. Memory beyond the argument
    and the result is half a matrix.

    Raises:
        SolverError: H has entries that are not finite, or no damping up to the limit helps.
    """
    diagonal = gram.diagonal()
    finite = torch.isfinite(diagonal).all()  # no other entry of X^T X is larger
    zero = diagonal == 0
    replaced = zero / scale  # 1 in the Hessian
    dead = zero & ~zero.all()  # where nothing is known, all inputs count alike
    mean = (diagonal + replaced).mean()

    # U of `gram`, which is that of H times the root of the scale: its steps are the same.
    fraction, retries = damping, 0
    while True:
        ridge = fraction * mean
        upper = torch.zeros_like(gram)
        faults: list[Tensor] = []
        _invert_into(gram, replaced + ridge, upper, faults)
        # The one look at the result that waits for the device: leaves after a failed one have computed garbage.
        usable, failed = torch.stack([finite, torch.stack(faults).any()]).tolist()
        if not usable:
            raise SolverError("the Hessian has entries that are not finite: the activations overflow")
        if not failed:
            own = upper.diagonal().clone()
            upper.div_(own.unsqueeze(1))
            return Factor(upper, own / math.sqrt(scale), dead, fraction, retries, ridge * scale)
        if fraction >= DAMPING_LIMIT:
            raise SolverError(f"the Hessian is not positive definite with damping {fraction:g} after {retries} retries")
        fraction = min(max(fraction, 1e-4) * DAMPING_GROWTH, DAMPING_LIMIT)
        retries += 1


def upper_of_inverse(symmetric: Tensor, added: float) -> tuple[Tensor, Tensor]:
    """Return U with (`symmetric` + `added` I)^-1 = U^T U, float32 [cols, cols], and whether that matrix is not positive
    definite, [] on the device; U is garbage then. The lower triangle of `symmetric` alone is read.
    """
    upper = torch.zeros_like(symmetric)
    faults: list[Tensor] = []
    _invert_into(symmetric, torch.full_like(symmetric[0], added), upper, faults)
    return upper, torch.stack(faults).any()


def _invert_into(symmetric: Tensor, added: Tensor, upper: Tensor, faults: list[Tensor]) -> None:
    """Fill `upper`, zeros, with U of H = `symmetric` [cols, cols] + diag(`added`); its lower triangle alone is read.

    `faults` receives an int32 [] of every leaf that is not 0 if H is not positive definite; U is garbage then.

    H = R R^T with R upper triangular, and U = R^-1. Split in half, with H = [[A, B], [B^T, C]]:

        R_22 R_22^T = C,   R_12 = B U_22^T,   R_11 R_11^T = A - R_12 R_12^T,   U_12 = -U_11 R_12 U_22.

    The recursion ends at leaves that fit a cache; all other work is products of matrices, which run near the peak of
    any processor. LAPACK's own factorisation and triangular inverse of the whole take twice as long on a CPU, half of
    it in copying between row and column order.
    """
    size = len(symmetric)
    if size <= (CUDA_LEAF if symmetric.is_cuda else LEAF):
        # With J reversing the order, J H J = L L^T gives R = J L J; reversed, the lower triangle is the upper one.
        damped = symmetric.clone()
        damped.diagonal().add_(added)
        transposed, fault = torch.linalg.cholesky_ex(damped.flip(0, 1), upper=True)
        identity = torch.eye(size, dtype=symmetric.dtype, device=symmetric.device)
        upper.copy_(torch.linalg.solve_triangular(transposed.t().flip(0, 1), identity, upper=True))
        faults.append(fault)
        return
    half = size // 2
    first, last, corner = upper[:half, :half], upper[half:, half:], upper[:half, half:]
    _invert_into(symmetric[half:, half:], added[half:], last, faults)
    right = times_upper_transposed(symmetric[half:, :half].t(), last)
    times_upper(right, last, into=corner)
    rest = symmetric[:half, :half].clone()
    add_square(rest, right, alpha=-1)
    del right
    _invert_into(rest, added[:half], first, faults)
    upper_times(first, corner, alpha=-1)
