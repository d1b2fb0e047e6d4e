"""The tensors that are alive while a training runs in this process."""

from pathlib import Path

import torch

from shardprune.planning.training.passes import LiveBytes
from shardprune.recovery.spec import ROWS
from shardprune.storage.folder import Folder


class Measured(LiveBytes):
    """The most bytes of real tensors alive at a time."""

    def _count(self, storage):
        if storage.device.type != "meta":
            super()._count(storage)


def measured(prepared) -> int:
    """The most bytes of tensors that are made while a training runs in this process, the model included."""
    import deepspeed  # noqa: F401

    from shardprune.recovery.training import Training
    from shardprune.recovery.worker import _prepare, alone

    spec = prepared.spec(prepared.processes)
    # Buckets as large as what they hold: of larger ones only the used pages take memory.
    spec.config["zero_optimization"]["reduce_bucket_size"] = prepared.parameters_trained + 1000
    Path(spec.recipe.state).mkdir(parents=True, exist_ok=True)
    prepared.inputs.rows.save(Folder(spec.recipe.state, "state"), ROWS)
    with alone("cpu"), Measured() as live:
        _prepare(spec, torch.device("cpu"))
        Training(spec, torch.device("cpu")).run()
    return max(live.highest.values())
