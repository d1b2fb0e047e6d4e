"""From a number of parameters to groups and neurons that go."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from shardprune.model.structure.shape import Costs, Widths, costs_of, possible_groups, widths_of

ROUNDING = 1e-9  # of an account that arithmetic has left just below a whole number


@dataclass(frozen=True)
class Budget:
    """How widths shrink: what structures cost, the numbers of groups that can be (ascending; one where no group
    goes), of what the number of neurons is a multiple, and the groups that are owed.

    Attention gives up its share of every amount, but only whole groups can go. What is owed is a fractional
    account: when it covers a group, or as many as the next possible number takes, they go, and the neurons make
    up the rest of every amount.
    """

    costs: Costs
    groups: tuple[int, ...]
    multiple: int = 1
    owed: float = 0.0

    @property
    def slack(self) -> int:
        """By how many parameters a layer may miss an amount: one neuron, or as many as go together."""
        return self.costs.neuron * self.multiple

    def narrowed(self, widths: Widths, amount: float, ahead: float = 0.0) -> "Narrowed":
        """The widths of a layer that gives up `amount` parameters, to the nearest neuron.

        Args:
            ahead: by how much more groups alone may take, of what will be asked for later.

        Raises:
            ValueError: it has not so many neurons.
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


def narrowed_by(
    config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]], share: float, multiple: int = 1
) -> Widths:
    """The widths of a model whose layers each give up a share of their projections' weights.

    Args:
        shapes: [rows, cols] of a layer's projections by name.
        multiple: of what the number of neurons is one.

    Raises:
        ValueError: they have not so many neurons.
    """
    costs = costs_of(config, {f"{name}.weight": shape for name, shape in shapes.items()})
    widths = widths_of(config)
    return Budget(costs, possible_groups(config), multiple).narrowed(widths, share * costs.layer(widths)).widths


@dataclass(frozen=True)
class Narrowed:
    """New widths, and the budget with what is owed then."""

    widths: Widths
    budget: Budget
