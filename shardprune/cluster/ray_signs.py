"""Signs of life over Ray: workers leave them with the cluster's head, where the driver reads them.

A call of an actor would not do: Ray sends it behind those that still wait for their arguments.
"""

import os
import signal
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shardprune.shard.signs import Calls, Sign, Signs
from shardprune.storage.json_file import dump_json, parse_json

NAMESPACE = "shardprune-signs"
KILL_SECONDS = 30.0


@dataclass(frozen=True)
class Board:
    """The place of the signs of a run's workers, by their indices; `seconds` lie between two signs of one."""

    seconds: float
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def give_signs(self, index: int, calls: Calls) -> Signs:
        """Start to give the signs of this process, a worker's."""
        signs = Signs(calls, lambda sign: self._put(index, sign), self.seconds, ray.get_runtime_context().get_node_id())
        signs.start()
        return signs

    def _put(self, index: int, sign: Sign) -> None:
        _internal_kv_put(self._key(index), dump_json(asdict(sign)), overwrite=True, namespace=NAMESPACE)

    def read(self, index: int) -> Sign | None:
        """Return the last sign of a worker."""
        text = _internal_kv_get(self._key(index), namespace=NAMESPACE)
        return Sign(**parse_json(text)) if text else None

    def clear(self) -> None:
        """Remove the signs of all workers."""
        _internal_kv_del(f"{self.run}/", del_by_prefix=True, namespace=NAMESPACE)

    def _key(self, index: int) -> str:
        return f"{self.run}/{index:05d}"


def kill(signs: list[Sign]) -> None:
    """Kill the processes of some workers with SIGKILL, which stopped ones heed as well."""

    @ray.remote(num_cpus=0, max_retries=0)
    def kill_here(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    if not signs:
        return
    places = [NodeAffinitySchedulingStrategy(sign.node, soft=False) for sign in signs]
    killing = [
        kill_here.options(scheduling_strategy=place).remote(sign.pid) for place, sign in zip(places, signs, strict=True)
    ]
    ray.wait(killing, num_returns=len(killing), timeout=KILL_SECONDS)
