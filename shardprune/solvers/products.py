"""Matrix products of solvers, in float32's accuracy."""

from torch import Tensor


def add_product(target: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """target [rows, cols] += alpha * left [rows, inner] @ right [inner, cols], in place; float32 views of any strides.

    Returns the target.
    """
    return target.addmm_(left, right, alpha=alpha)
