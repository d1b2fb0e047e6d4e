"""Zeros that stay zeros while all weights are trained.

The gradient of a weight that is zero is made zero before DeepSpeed sees it. Then Adam's moments of it stay zero and
so does its update, and decoupled weight decay takes nothing from nothing. Nothing has to be stored: a weight that is
trained is not zero, and one that is not stays so.
"""

from torch import Tensor, nn


def freeze_zeros(weight: nn.Parameter) -> None:
    """Mask the gradients of a weight's zeros, now and in every step to come.

    To be called before DeepSpeed starts, and again whenever a training starts anew.
    """

    def mask(gradient: Tensor) -> Tensor:
        assert weight.shape == gradient.shape, "the weight is not whole when its gradient arrives"
        return gradient * (weight.detach() != 0)

    weight.register_hook(mask)
