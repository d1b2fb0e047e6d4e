"""Verbs: what their ledger gets to know, and what a group can call."""

import pytest
import torch

from shardprune.shard.expert_worker import ExpertWorker
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.generation_worker import GenerationWorker
from shardprune.shard.ledger import OF_ONE_WAVE, Ledger
from shardprune.shard.mop_worker import MopWorker
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.verbs import kind_of, verb, verbs_of


class Worker:
    def __init__(self):
        self.ledger = Ledger()

    @verb("solve", layer="index")
    def solve(self, group, index, *parts):
        assert not torch.is_grad_enabled()
        return group

    @verb("read")
    def load(self):
        raise ValueError("no layers")

    def usage(self):
        return {}


def test_a_call_enters_the_ledger_with_its_kind_its_layer_and_the_bytes_that_came():
    worker = Worker()
    watched = []
    worker.ledger.watcher = lambda *call: watched.append(call)
    assert worker.solve("a", 3, torch.zeros(4), None, [torch.zeros(2)]) == "a"
    worker.solve("b", 3)
    with pytest.raises(ValueError, match="no layers"):
        worker.load()
    first, second = worker.ledger.hand_out()
    assert (first.verb, first.kind, first.layer, first.calls, first.bytes) == ("solve", "solve", 3, 2, 24)
    assert (second.verb, second.kind, second.layer, second.calls) == ("load", "read", None, 1)
    assert [(name, kind, received) for name, kind, _, received in watched] == [
        ("solve", "solve", 24),
        ("solve", "solve", 0),
        ("load", "read", 0),
    ]
    assert worker.ledger.hand_out() == []


def test_a_verb_that_names_no_parameter_of_its_own_is_refused():
    with pytest.raises(ValueError, match="index"):

        @verb("solve", layer="index")
        def solve(self, group): ...


def test_methods_that_are_no_verbs_have_no_kind():
    assert verbs_of(Worker).keys() == {"solve", "load"}
    assert kind_of(Worker.usage) is None


WAVES = {
    GenerationWorker: {"embed", "forward", "propagate", "losses", "log_likelihoods", "accumulate", "extend", "draw"},
    ForwardWorker: {"embed", "forward", "propagate", "losses", "log_likelihoods", "accumulate"},
    PruneWorker: {
        *("embed", "forward", "propagate", "losses", "log_likelihoods", "accumulate", "compare"),
        *("confront", "hold_out", "aim", "miss"),
        *("draw_labels", "backward", "differentiate", "gather"),
    },
    ExpertWorker: {
        *("embed", "forward", "propagate", "losses", "log_likelihoods", "accumulate", "tally"),
        *("aim", "miss"),
    },
    MopWorker: {
        *("embed", "forward", "propagate", "losses", "log_likelihoods", "accumulate", "run", "judge"),
        *("carry", "aim", "miss"),
    },
}


@pytest.mark.parametrize("worker", WAVES)
def test_calls_that_carry_a_wave_are_those_that_take_hidden_states_or_tokens(worker):
    """What `shardprune_waves` counts."""
    found = {name for name, method in verbs_of(worker).items() if kind_of(method) in OF_ONE_WAVE}
    assert found == WAVES[worker]
