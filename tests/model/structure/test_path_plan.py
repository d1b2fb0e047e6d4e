"""Courses: which way a path goes, what is kept of it, and what is found before it starts."""

import random
from itertools import pairwise

import pytest

from shardprune.errors import InputError
from shardprune.model.structure.budget import Budget
from shardprune.model.structure.kept_iterations import KeptIterations, parse_keep
from shardprune.model.structure.path import State
from shardprune.model.structure.path_plan import PathPlan
from shardprune.model.structure.shape import Costs, Widths

COSTS = Costs(group=60, neuron=6, rest=4)
START = State(layers=8, widths=Widths(4, 100), budget=Budget(COSTS, (2, 3, 4)))
TOTAL = 8 * COSTS.layer(START.widths) + 1000


def course(request=None, letters=None, seed=None, keep=None) -> PathPlan:
    asked = None if request is None else round(request * TOTAL)
    return PathPlan(START, TOTAL, asked, letters, seed, parse_keep(keep) if keep else KeptIterations())


def states(course: PathPlan, prefer: str = "L") -> list[State]:
    """All states of a walk; where the course leaves the choice open, one letter is preferred."""
    found = [course.start]
    while candidates := course.candidates(found[-1]):
        letter = course.choice(found[-1], candidates) or (prefer if prefer in candidates else "G")
        found.append(candidates[letter])
    return found


def test_a_given_path_ends_with_its_letters():
    walked = states(course(letters="LGGL"))
    assert [state.layers for state in walked] == [8, 7, 7, 7, 6]
    assert [state.widths.neurons for state in walked] == sorted((s.widths.neurons for s in walked), reverse=True)


@pytest.mark.parametrize("prefer", ["L", "G"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.33, 0.6])
def test_a_request_is_met_to_within_one_neuron_of_each_layer(prefer, share):
    end = states(course(request=share), prefer)[-1]
    assert abs(end.removed - share * TOTAL) <= end.slack


def test_a_criterion_decides_only_where_there_is_a_choice():
    open_course, given = course(request=0.3), course(request=0.3, letters="GLLLLL")
    first = open_course.candidates(START)
    assert first.keys() == {"L", "G"}
    assert open_course.choice(START, first) is None
    assert given.choice(START, first) == "G"
    rest = states(open_course)[-2]
    assert open_course.choice(rest, open_course.candidates(rest)) == "g"


def test_a_seed_draws_the_same_path_from_any_iteration():
    drawn = course(request=0.6, seed=5)
    walked = states(drawn)
    letters = [drawn.choice(state, drawn.candidates(state)) for state in walked[:-1]]
    assert letters == [drawn.choice(state, drawn.candidates(state)) for state in walked[:-1]]
    assert {"L", "G"} <= set(letters)
    assert any(
        [other.choice(state, other.candidates(state)) for state in states(other)[:-1]] != letters
        for other in (course(request=0.6, seed=seed) for seed in range(4))
    )


def test_the_iterations_nearest_to_shares_are_kept():
    asked = course(letters="LGLGLG", keep="0.2,0.45")
    walked = states(asked)
    kept = [now.iteration for before, now in pairwise(walked) if asked.kept(before, now)]
    shares = [asked.share(state) for state in walked]
    nearest = [min(range(1, 7), key=lambda index: abs(shares[index] - share)) for share in (0.2, 0.45)]
    assert kept == nearest


def test_iterations_are_kept_by_their_numbers():
    asked = course(letters="LGLG", keep="1,4")
    walked = states(asked)
    assert [now.iteration for before, now in pairwise(walked) if asked.kept(before, now)] == [1, 4]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (course(request=0.95), r"remove: 0\.9\d+ is more than the model can give: in iteration \d+ "),
        (course(letters="L" * 7), "path: LLLLLLL is more than the model can give: in iteration 7 fewer than 2 layers"),
        (course(letters="G" * 30), "path: G+ is more than the model can give: in iteration .* are more than its"),
        (course(request=0.5, letters="LG"), r"path: 'LG' is too short: 2 iterations remove 0\.2.* 0\.5 are asked for"),
        (course(letters="LG", keep="2,3"), "keep: 3 is beyond the last iteration, which is 2"),
        (course(letters="LG", keep="0.5"), r"keep: 0\.5 is beyond the last iteration, which removes 0\.2"),
    ],
)
def test_what_cannot_be_walked_is_found_before(asked, message):
    with pytest.raises(InputError, match=message):
        asked.check()


@pytest.mark.parametrize("share", [0.5, 0.7, 0.75, 0.8])
def test_no_choice_leads_to_a_dead_end(share):
    asked = course(request=share)
    asked.check()
    draw = random.Random(0)
    for _ in range(20):
        state = START
        while candidates := asked.candidates(state):
            state = candidates[draw.choice(sorted(candidates))]
        assert abs(state.removed - asked.request) <= state.slack


def test_a_group_that_costs_more_than_an_iteration_goes_ahead_of_what_follows():
    """As in a Llama of 80 layers, where a step of one layer's parameters is less than a group of each."""
    large = State(80, Widths(8, 1000), Budget(Costs(group=40, neuron=2, rest=0), (2, 3, 4, 5, 6, 7, 8)))
    assert large.layer / 80 < 40
    path = PathPlan(large, 80 * large.layer, None, "G" * 40, None, KeptIterations())
    walked = states(path)
    assert walked[-1].widths.groups == pytest.approx(8 * (1 - path.share(walked[-1])), abs=1)
    for before, now in pairwise(walked):
        assert before.removed <= now.removed <= now.nominal + 2 * before.layer + now.slack
    request = 40 * large.layer
    assert (
        states(PathPlan(large, 80 * large.layer, request, None, None, KeptIterations()), "G")[-1].removed
        <= request + 160
    )


def test_neurons_stay_a_multiple():
    budget = Budget(COSTS, (2, 3, 4), multiple=8)
    asked = PathPlan(State(8, Widths(4, 96), budget), TOTAL, round(0.3 * TOTAL), None, None, KeptIterations())
    walked = states(asked, "G")
    assert all(state.widths.neurons % 8 == 0 for state in walked)
    assert abs(walked[-1].removed - 0.3 * TOTAL) <= walked[-1].slack == 8 * 6 * 8


@pytest.mark.parametrize(
    ("text", "keeping"),
    [
        ("8,12", KeptIterations(iterations=(8, 12))),
        (" 3 ", KeptIterations(iterations=(3,))),
        ("0.2,.3", KeptIterations(shares=(0.2, 0.3))),
    ],
)
def test_what_to_keep_is_read(text, keeping):
    assert parse_keep(text) == keeping


@pytest.mark.parametrize("text", ["", "0", "1.5", "0.2,2", "a", "-1", "0.0", "nan"])
def test_what_cannot_be_kept(text):
    with pytest.raises(ValueError, match="use numbers of iterations such as 8,12, or shares"):
        parse_keep(text)
