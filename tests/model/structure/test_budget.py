"""Parameters become whole groups, and neurons for the rest."""

import itertools
from fractions import Fraction

import pytest
from transformers import LlamaConfig

from shardprune.model.structure.alignment import narrowed_by
from shardprune.model.structure.budget import Budget
from shardprune.model.structure.shape import Costs, Widths

MODELS = {  # costs of a layer, its widths, the numbers of groups that can be
    "tiny": (Costs(768, 96, 64), Widths(4, 48), (2, 3, 4)),
    "in pairs": (Costs(768, 96, 64), Widths(8, 96), (2, 4, 8)),
    "no groups": (Costs(1048, 65, 192), Widths(4, 48), (4,)),
    "8b": (Costs(5_242_880, 12_288, 8_192), Widths(8, 14_336), tuple(range(2, 9))),
    "13b": (Costs(2_621_440, 15_360, 10_240), Widths(40, 13_824), tuple(range(2, 41))),
}


@pytest.mark.parametrize("share", [0.001, 0.05, 0.2, 0.31, 0.4])
@pytest.mark.parametrize("name", MODELS)
def test_what_goes_is_the_amount_to_half_a_neuron(name, share):
    costs, before, groups = MODELS[name]
    amount = share * costs.layer(before)
    narrowed = Budget(costs, groups).narrowed(before, amount)
    assert abs(costs.layer(before) - costs.layer(narrowed.widths) - amount) <= costs.neuron / 2
    assert narrowed.widths.groups in groups


@pytest.mark.parametrize(
    ("name", "parts", "steps"),
    [("tiny", 8, 5), ("in pairs", 3, 2), ("no groups", 10, 3), ("8b", 32, 20), ("13b", 40, 30)],
)
def test_attention_pays_its_share_of_every_amount_in_whole_groups(name, parts, steps):
    """What is owed, in exact fractions: it goes as soon as it leads to the next possible number of groups."""
    costs, widths, groups = MODELS[name]
    budget, owed, seen = Budget(costs, groups), Fraction(0), {widths.groups}
    amount = Fraction(costs.layer(widths), parts)
    for _ in range(steps):
        attention, neurons = widths.groups * costs.group, widths.neurons * costs.neuron
        owed += amount * Fraction(attention, attention + neurons) / costs.group
        paid = min(owed, amount / costs.group)  # no amount pays for more than it is
        expected = min(count for count in groups if widths.groups - count <= paid)
        owed -= widths.groups - expected
        narrowed = budget.narrowed(widths, float(amount))
        assert abs(costs.layer(widths) - costs.layer(narrowed.widths) - amount) <= Fraction(costs.neuron, 2)
        assert narrowed.widths.groups == expected
        assert narrowed.budget.owed == pytest.approx(float(owed), abs=1e-6)
        widths, budget = narrowed.widths, narrowed.budget
        seen.add(widths.groups)
    assert len(seen) > 1 or len(groups) == 1


def test_a_group_goes_when_the_account_covers_it_and_not_before():
    costs = Costs(group=100, neuron=10, rest=0)
    budget, widths = Budget(costs, (2, 3, 4)), Widths(4, 40)
    first = budget.narrowed(widths, 190)  # half of it is attention's: 0.95 groups
    assert first.widths == Widths(4, 21)
    assert first.budget.owed == pytest.approx(0.95)
    second = first.budget.narrowed(first.widths, 100)
    assert second.widths == Widths(3, 21)  # the whole amount is one group
    assert second.budget.owed == pytest.approx(0.95 + 400 / 610 - 1)
    later = Budget(costs, (2, 3, 4), owed=1.5).narrowed(widths, 90)
    assert later.widths == Widths(4, 31)  # an amount smaller than a group cannot pay for one
    assert later.budget.owed == pytest.approx(1.95)
    ahead = Budget(costs, (2, 3, 4), owed=1.5).narrowed(widths, 90, ahead=20)
    assert ahead.widths == Widths(3, 40)  # but may be ahead of what later ones give


def test_groups_that_only_go_in_pairs_wait_for_two():
    costs = Costs(group=100, neuron=10, rest=0)
    budget = Budget(costs, (2, 4))
    one = budget.narrowed(Widths(4, 40), 390)
    assert (one.widths, one.budget.owed) == (Widths(4, 1), pytest.approx(1.95))
    two = budget.narrowed(Widths(4, 40), 400)
    assert (two.widths, two.budget.owed) == (Widths(2, 20), pytest.approx(0))


def exhaust(budget: Budget, widths: Widths, amount: float, seen: list[Widths]) -> None:
    """Narrow by one amount after the other until that cannot be."""
    while True:
        narrowed = budget.narrowed(widths, amount)
        widths, budget = narrowed.widths, narrowed.budget
        seen.append(widths)


@pytest.mark.parametrize("parts", [2, 5, 40])
@pytest.mark.parametrize("name", MODELS)
def test_a_neuron_and_two_groups_stay(name, parts):
    costs, widths, groups = MODELS[name]
    seen = [widths]
    with pytest.raises(ValueError, match=r"parameters of a layer are more than its \d+ neurons and \d+ of its \d+ key"):
        exhaust(Budget(costs, groups), widths, costs.layer(widths) / parts, seen)
    assert {widths.groups for widths in seen} <= set(groups)
    assert all(after.neurons <= before.neurons for before, after in itertools.pairwise(seen))
    assert seen[-1].neurons >= 1


def test_too_much_at_once_is_an_error_that_says_what_there_is():
    costs, widths, groups = MODELS["tiny"]
    with pytest.raises(
        ValueError, match=r"6,900 parameters of a layer are more than its 48 neurons and 2 of its 4 key"
    ):
        Budget(costs, groups).narrowed(widths, 6900)


def test_a_share_is_one_of_the_projections_weights():
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    shapes = {f"self_attn.{name}": (rows, 32) for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))}
    shapes |= {"self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32)}
    shapes["mlp.down_proj"] = (32, 48)
    assert narrowed_by(config, shapes, 0.3) == Widths(3, 32)  # 2304 of 7680: 922 are attention's, a group is 768
    assert narrowed_by(config, shapes, 0.2) == Widths(4, 32)
    assert narrowed_by(config, shapes, 0.5) == Widths(2, 24)
