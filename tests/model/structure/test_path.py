"""MoP's paths: the published ones remove what the paper says, and every iteration as much as one current layer."""

import itertools

import pytest
from transformers import LlamaConfig

from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.budget import Budget
from shardprune.model.structure.path import State, walk
from shardprune.model.structure.shape import Costs, Widths, costs_of, possible_groups, reshaped, widths_of

PUBLISHED = {  # on Llama-3-8B, with the shares of all parameters removed after 8 and 12 iterations
    "LGGLLLGGLLGLGLLGGL": (0.2069, 0.3006),
    "GGLLGGGLGGGLLLGGLL": (0.2014, 0.2889),
    "LGLGGLLGLLGLGLGLGG": (0.2060, 0.2998),
}
SMALL = Budget(Costs(group=768, neuron=96, rest=64), (2, 3, 4))


@pytest.fixture(scope="module")
def llama3() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def start_of(config: LlamaConfig) -> tuple[State, int]:
    """Where paths of a model start, and its parameters."""
    skeleton = Skeleton(config, "cpu")
    prefix = f"{skeleton.family.layers}.0."
    costs = costs_of(config, {name.removeprefix(prefix): shape for name, shape in skeleton.layer_tensors(0).items()})
    return State(skeleton.layers, widths_of(config), Budget(costs, possible_groups(config))), skeleton.parameters()


@pytest.fixture(scope="module")
def start(llama3) -> tuple[State, int]:
    return start_of(llama3)


def small(layers: int = 6) -> State:
    return State(layers, Widths(4, 48), SMALL)


def follow(start: State, path: str, request: int | None = None) -> list[State]:
    letters = iter(path)
    return list(walk(start, lambda _: next(letters), request, len(path) if request is None else None))


@pytest.mark.parametrize("path", PUBLISHED)
def test_published_paths_remove_the_published_shares(start, path):
    first, total = start
    states = follow(first, path)
    removed = [states[iterations - 1].removed / total for iterations in (8, 12)]
    assert removed == [pytest.approx(share, abs=5e-5) for share in PUBLISHED[path]]
    assert removed == [pytest.approx(0.2, abs=0.01), pytest.approx(0.3, abs=0.012)]


@pytest.mark.parametrize("path", PUBLISHED)
def test_what_is_removed_is_what_the_model_no_longer_has(start, llama3, path):
    first, total = start
    state = follow(first, path)[11]
    model = Skeleton(reshaped(llama3, state.widths, range(state.layers)), "cpu")
    assert model.parameters() == total - state.removed
    assert state.layers == 32 - path[:12].count("L")


@pytest.mark.parametrize("path", PUBLISHED)
def test_every_iteration_removes_one_current_layer(start, path):
    first, _ = start
    for before, after, letter in zip([first, *follow(first, path)], follow(first, path), path, strict=False):
        assert after.nominal - before.nominal == before.layer
        assert after.iteration == before.iteration + 1
        if letter == "L":
            assert (after.layers, after.widths) == (before.layers - 1, before.widths)
            assert after.removed - before.removed == before.layer
        else:
            assert after.layers == before.layers
            assert abs(after.removed - after.nominal) <= after.layers * after.budget.costs.neuron / 2
            assert after.removed - before.removed == after.layers * (before.layer - after.layer)


def test_rounding_is_made_up_for_by_the_next_iteration():
    first, second = follow(small(), "GG")
    assert first.removed != first.nominal
    assert second.nominal == first.nominal + first.layer
    assert abs(second.removed - second.nominal) <= 6 * 96 / 2


@pytest.mark.parametrize("share", [0.07, 0.2, 0.31, 0.45])
@pytest.mark.parametrize("path", ["L" * 20, "G" * 20, "LG" * 10])
def test_a_request_is_met_to_a_neuron_of_every_layer_and_rounding(path, share):
    start = small(layers=12)
    request = round(share * start.layers * start.layer)
    states = follow(start, path, request)
    assert abs(states[-1].removed - request) <= states[-1].slack
    for before, after in itertools.pairwise([start, *states]):
        whole = max(before.removed, before.nominal) + before.layer <= request + before.slack / 2
        assert before.offers(request) == (("L", "G") if whole else ("g",))
        assert after.removed > before.removed
    assert states[-1].offers(request) == ()


def test_without_a_request_every_iteration_is_a_whole_one():
    assert small().offers(None) == ("L", "G")
    assert len(follow(small(), "LGL")) == 3
    assert [state.layers for state in follow(small(), "LLLL")] == [5, 4, 3, 2]


def test_two_layers_and_a_neuron_stay():
    with pytest.raises(ValueError, match="fewer than 2 layers would be left"):
        follow(small(), "LLLLL")
    with pytest.raises(ValueError, match="parameters of a layer are more than its"):
        follow(small(), "G" * 20)
