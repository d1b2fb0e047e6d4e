"""The conversion of a number of parameters into groups and neurons to remove."""

import math
from dataclasses import dataclass, replace

from shardprune.model.structure.shape import Costs, Widths

ROUNDING = 1e-9  # tolerance for `owed` just below a whole number in floating point


@dataclass(frozen=True)
class Budget:
    """The costs and constraints of width pruning, with fractional groups carried over to later iterations.

    Attention owes its share of every amount, but only whole groups can be removed. The share accumulates in `owed`
    until it covers a group, or as many as the next possible number requires; neurons make up the rest of every amount.

    Attributes:
        groups: possible numbers of groups, ascending; a single one if no group can be removed.
        multiple: the number of neurons stays a multiple of it.
        owed: groups that attention has to give up later, as a fraction.
    """

    costs: Costs
    groups: tuple[int, ...]
    multiple: int = 1
    owed: float = 0.0

    @property
    def slack(self) -> int:
        """The parameters by which a layer may miss an amount: one multiple of neurons."""
        return self.costs.neuron * self.multiple

    def narrowed(self, widths: Widths, amount: float, ahead: float = 0.0) -> "Narrowed":
        """Return the widths of a layer after removing `amount` parameters, to the nearest neuron.

        Args:
            ahead: parameters beyond `amount` that groups may take in advance of later iterations.

        Raises:
            ValueError: the layer has too few neurons.
        """
        attention = widths.groups * self.costs.group
        share = attention / (attention + widths.neurons * self.costs.neuron)
        owed = self.owed + amount * share / self.costs.group
        most = min(math.floor(owed + ROUNDING), math.floor((amount + ahead) / self.costs.group + ROUNDING))
        groups = next((count for count in self.groups if count >= widths.groups - most), widths.groups)
        gone = widths.groups - groups
        wanted = widths.neurons - max(0.0, amount - gone * self.costs.group) / self.costs.neuron
        neurons = min(widths.neurons, self.multiple * round(wanted / self.multiple))
        if neurons < 1:
            raise ValueError(
                f"{round(amount):,} parameters of a layer are more than its {widths.neurons} neurons "
                f"and {gone} of its {widths.groups} key/value groups"
            )
        return Narrowed(Widths(groups, neurons), replace(self, owed=owed - gone))


@dataclass(frozen=True)
class Narrowed:
    """New widths, and the budget with the groups still owed."""

    widths: Widths
    budget: Budget
