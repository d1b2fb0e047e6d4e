"""A training on two nodes that loses one of them."""

import threading
import time

import pytest

from tests.failures.nodes import nodes
from tests.recovery.trainings import QUIET, checked, furthest, losses, make_material, recover, same_zeros, train

FULL = {"full": True, "keep_sparsity": True, "steps": 40, "checkpoint_every": 8}


@pytest.mark.long
@pytest.mark.timeout(600)  # on a busy machine processes take minutes to start
def test_a_training_goes_on_with_the_node_that_is_left(tmp_path):
    """Under ZeRO-3, with the optimizer in the nodes' memory."""
    folder = make_material(tmp_path)
    alone = train(folder, tmp_path / "alone", zero=0, **FULL)
    reached = []
    with nodes(2) as cluster:

        def kill() -> None:
            checkpoint, deadline = tmp_path / "o" / "training" / "latest", time.monotonic() + 300
            while not checkpoint.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            reached.append(checkpoint.read_text())
            cluster.kill_node()

        killer = threading.Thread(target=kill)
        killer.start()
        fields = {"workers": 2, "zero": 3, "offload": True, "address": cluster.address, **FULL}
        result = recover(checked(folder, tmp_path / "o", **fields), QUIET)
        killer.join()
    assert reached
    assert reached[0] != f"step{FULL['steps']}"
    assert (result.restarts, len({worker.node for worker in result.workers})) == (1, 1)
    assert losses(result) == pytest.approx(losses(alone), abs=1e-4)
    assert furthest(tmp_path / "o", tmp_path / "alone") < 1e-4
    assert same_zeros(folder / "sparse", tmp_path / "o")
