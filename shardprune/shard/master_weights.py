"""The float32 weights of a linear map in training and Adam's moments, on the device or, between steps, on the host."""

import torch
from torch import Tensor

from shardprune.shard.streams import host_memory
from shardprune.solvers.training import BETAS, RATE

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch calls them


class MasterWeights:
    """The weights of one linear map that are trained: those that are not zero.

    Where they are kept on the host, a step takes the weights and the moments to the device and brings them back: what
    is computed there, and its bits, are the same. A layer in float32 is its own master, and only the moments leave.

    Args:
        weight: in the layer [rows, cols], which every step changes.
        on_host: keep on the host, between steps, what a step alone needs.
    """

    def __init__(self, weight: Tensor, on_host: bool) -> None:
        self.weight = weight
        self.mask = weight != 0
        self._master = torch.nn.Parameter(weight.float())
        self.rate = RATE * float(torch.linalg.vector_norm(self._master.detach())) / max(int(self.mask.sum()), 1) ** 0.5
        # One projection at a time: temporaries of all at once would be as large as another copy of the layer.
        self._adam = torch.optim.Adam([self._master], betas=BETAS, foreach=False, fused=False)
        self._on_host = on_host
        self._places: dict[str, Tensor] = {}  # in host memory, by what lies there
        self._leave()

    def step(self, gradient: Tensor, rate: float) -> None:
        """Take a step of Adam, and round the layer's weights as they are computed with.

        Args:
            gradient: float32 [rows, cols].
            rate: of this step.
        """
        self._come()
        self._master.grad = gradient.mul_(self.mask)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._master.grad = None
        self.weight.copy_(self._master)
        self._leave()

    def rounded(self, dtype: torch.dtype) -> int:
        """Round the layer's weights as they are stored; return how many are zero."""
        self._come()
        self.weight.copy_(self._master.to(dtype))
        return int((self.weight == 0).sum())

    def _come(self) -> None:
        """Bring to the device what is on the host. All copies are queued with the computation, in one order."""
        if not self._on_host:
            return
        self._master.data = self._master.data.to(self.weight.device, non_blocking=True)
        for name, moment in self._moments().items():
            self._adam.state[self._master][name] = moment.to(self.weight.device, non_blocking=True)

    def _leave(self) -> None:
        """Bring to the host what is kept there."""
        if not self._on_host:
            return
        if self.weight.dtype != torch.float32:
            self._master.data = self._put("master", self._master.data)
        for name, moment in self._moments().items():
            self._adam.state[self._master][name] = self._put(name, moment)

    def _moments(self) -> dict[str, Tensor]:
        """Return the moments, once there are any."""
        state = self._adam.state.get(self._master, {})
        return {name: state[name] for name in MOMENTS if name in state}

    def _put(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._places:
            self._places[name] = host_memory(tensor, self.weight.device)
        return self._places[name].copy_(tensor, non_blocking=True)
