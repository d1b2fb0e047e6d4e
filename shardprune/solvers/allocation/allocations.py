"""The table of allocations; a new one is a file in this folder and a line here."""

from shardprune.solvers.allocation import mosaic, owl, uniform
from shardprune.solvers.allocation.allocation import Allocation

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(uniform.allocate, observes=False),
    "owl": Allocation(owl.allocate, observes=True),
    "mosaic": Allocation(mosaic.allocate, observes=True),
    "mosaic-released": Allocation(mosaic.allocate_as_released, observes=True, exact=False),
    "fisher": Allocation(None, observes=False),
}
