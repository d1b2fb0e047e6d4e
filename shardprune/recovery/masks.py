"""Masked gradients, which keep zeros at zero while all weights are trained.

The gradient of a zero weight is set to zero before DeepSpeed sees it. Adam's moments and its update are then zero, and
so is decoupled weight decay. No mask is stored: a trained weight is not zero, and a zero one is not trained.
"""

from torch import Tensor, nn


def freeze_zeros(weight: nn.Parameter) -> None:
    """Mask the gradients of a weight's zeros, in this step and all later ones.

    Call it before DeepSpeed starts, and again whenever a run resumes.
    """

    def mask(gradient: Tensor) -> Tensor:
        assert weight.shape == gradient.shape, "the weight is not whole when its gradient arrives"
        return gradient * (weight.detach() != 0)

    weight.register_hook(mask)
