"""The memory of a worker at one moment, in bytes, and where the workers of a layout keep what they need."""

from dataclasses import dataclass

from shardprune.cluster.layout import Layout


@dataclass(frozen=True)
class Bytes:
    """The memory of a worker at one moment.

    Attributes:
        weights: layers, embedding and head.
        activations: kept waves, and the temporaries of the current one.
        statistics: sums over inputs.
        workspace: temporaries of a solve.
    """

    process: int = 0
    weights: int = 0
    activations: int = 0
    statistics: int = 0
    workspace: int = 0

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Moment:
    """One step of a phase on one worker."""

    phase: str
    step: str
    device: Bytes
    host: Bytes


@dataclass(frozen=True)
class Setup:
    """The placement of weights and waves by the workers of a layout, which may be joined in a process group; those of a
    GPU may keep float32 weights and moments of a training on the host (`trains_on_host`)."""

    layout: Layout
    streamed: bool
    waves_on_host: bool
    gpu: bool
    joined: bool = False
    chunks: int = 1  # of a layer's experts, whose sums are there one after the other
    trains_on_host: bool = False

    @property
    def copies_sums(self) -> bool:
        """Whether replicas send each other their sums as a whole: in a process group they go piece by piece."""
        return self.layout.replicas > 1 and not self.joined


def total_bytes(moment: Moment) -> int:
    """Return the memory of a worker at a moment, of device and host together."""
    return moment.device.peak + moment.host.peak
