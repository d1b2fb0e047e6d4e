"""Workers as Ray actors under one placement group, one GPU or CPU slot each."""

import math
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from shardprune.recipes.imports import uncollected

# Tensors cross the object store without being pickled; every process must agree. A cluster that a run
# starts for itself listens on loopback only. Both are read when Ray is imported.
os.environ.setdefault("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# Errors of calls whose values nobody asks for reach the driver by those calls that wait for them.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
# A submitted job's own runtime environment may set what WORKER_ENV passes on, which Ray refuses otherwise.
os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
# Under `uv run` Ray would upload the working directory, models and all, and start uv for every worker.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

# A worker imports all of this before anything else.
with uncollected():
    import ray
    from ray.exceptions import (
        ActorUnavailableError,
        NodeDiedError,
        ObjectLostError,
        OutOfMemoryError,
        RayActorError,
        RayTaskError,
        WorkerCrashedError,
    )
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
    from ray.util.scheduling_strategies import (
        NodeAffinitySchedulingStrategy,
        PlacementGroupSchedulingStrategy,
    )

    from shardprune.cluster.group import Backend, Group, Ref, Slots, this_machine
    from shardprune.cluster.patience import Patience, sign_seconds
    from shardprune.cluster.ray_exchange import Exchange, Held, JoiningActor
    from shardprune.cluster.ray_leftovers import free_leftovers
    from shardprune.cluster.ray_metrics import metrics
    from shardprune.cluster.ray_signs import Board, kill
    from shardprune.errors import InputError, WorkerLost, first_line
    from shardprune.recovery.spec import TrainingSpec
    from shardprune.shard.device_errors import context_is_dead
    from shardprune.shard.expert_worker import ExpertWorker
    from shardprune.shard.forward_worker import ForwardWorker
    from shardprune.shard.generation_worker import GenerationWorker
    from shardprune.shard.ledger import Ledger
    from shardprune.shard.mop_worker import MopWorker
    from shardprune.shard.prune_worker import PruneWorker
    from shardprune.shard.signs import Calls
    from shardprune.shard.spec import ForwardSpec
    from shardprune.signals import handlers_kept

# Readers of a shared tensor must not write into it. Workers copy what they keep, so that the warnings of
# Ray and torch say nothing new.
warnings.filterwarnings("ignore", message="Zero-copy tensor serialization is enabled")
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

# The last one is the end of a process that Ray kills because its machine has no memory left.
LOST = (RayActorError, ActorUnavailableError, ObjectLostError, NodeDiedError, WorkerCrashedError, OutOfMemoryError)
CONNECT_SECONDS = 10.0
PLACEMENT_SECONDS = 120.0
PLACEMENT_POLL_SECONDS = 2.0  # between two looks at the nodes meanwhile
PROBE_SECONDS = 10.0  # for a node to answer after a worker was lost
TRAINING_STORE_BYTES = 128 * 2**20  # its processes exchange their tensors without Ray
DEATH_SECONDS = 180.0  # for Ray to declare a silent node dead
# glibc keeps freed memory below a limit that grows with use; a streaming worker must give layers back.
STREAMING_ENV = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
WORKER_ENV = ("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS",)

T = TypeVar("T")


class _StartedLater:
    """A worker in a process of its own, which imports this file and so has its settings.

    `start` is a call of its own: its errors reach the driver as they are, whereas an error in an actor's constructor
    would look like a lost worker.
    """

    ledger: Ledger

    def __init__(self, spec: ForwardSpec, board: Board, index: int) -> None:
        self.spec: Any = spec  # of the worker's own class
        self._calls = Calls()
        board.give_signs(index, self._calls)

    def start(self) -> None:
        with self._calls.during("start"):
            super().__init__(self.spec)  # type: ignore[call-arg]
            self.ledger.calls = self._calls
            self.ledger.watcher = metrics(self.spec.shard, self.spec.replica)


class PruneActor(_StartedLater, JoiningActor, PruneWorker):
    """A worker of `prune` and `rebuild`."""


class MopActor(_StartedLater, JoiningActor, MopWorker):
    """A worker of `mop`."""


class ExpertActor(_StartedLater, JoiningActor, ExpertWorker):
    """A worker of `experts`."""


class ForwardActor(_StartedLater, JoiningActor, ForwardWorker):
    """A worker of `evaluate`."""


class GenerationActor(_StartedLater, JoiningActor, GenerationWorker):
    """A worker that writes calibration text."""


ACTORS: dict[type[ForwardWorker], type] = {
    GenerationWorker: GenerationActor,
    PruneWorker: PruneActor,
    MopWorker: MopActor,
    ExpertWorker: ExpertActor,
    ForwardWorker: ForwardActor,
}


class RayBackend:
    """A Ray cluster: the one at `address` or RAY_ADDRESS, else one of this machine's own that ends with the run."""

    replaces = True
    concurrent = True

    def __init__(self, address: str | None, patience: float) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._patience = patience
        self._connected_here = False
        self._own_store = math.inf  # bytes of the object store of a cluster that is this run's own
        self._group: RayGroup | None = None  # the last one

    def slots(self) -> Slots:
        if not self._address and not ray.is_initialized():
            return this_machine()
        self._connect()
        return cluster_slots()

    def room(self, device: str) -> float:
        own = not self._address and not ray.is_initialized()
        # A cluster of our own gets as many CPU slots as there are workers.
        return math.inf if own and device == "cpu" else self.slots().workers(device)

    def start(self, specs: Sequence[ForwardSpec], store_bytes: int, worker: type[ForwardWorker] = PruneWorker) -> Group:
        self._connect(
            num_cpus=max(len(specs), this_machine().cpus),
            object_store_memory=store_bytes,
            include_dashboard=False,
            log_to_driver=False,
        )
        self._group = RayGroup(specs, ACTORS[worker], self._patience)
        return self._group

    def train(self, spec: TrainingSpec, workers: int) -> list[dict[str, Any]]:
        from shardprune.cluster.ray_training import train_on_ray

        threads = spec.recipe.threads
        self._connect(
            num_cpus=max(workers * threads, this_machine().cpus),
            object_store_memory=TRAINING_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
        )
        return train_on_ray(spec, workers, cpus_of(workers, threads, spec.recipe.device == "cuda"), self._patience)

    def settle(self) -> Slots:
        return settled_slots()

    def in_shares(self, calls: Sequence[Callable[[Backend], T]]) -> list[T]:
        from shardprune.cluster.ray_sharing import in_shares

        self._connect()
        return in_shares(calls, partial(RayBackend, None, self._patience))

    def close(self) -> None:
        if self._connected_here:
            ray.shutdown()
            self._own_store = math.inf

    def _connect(self, **own_cluster: Any) -> None:
        """Connect to the cluster, or start one of our own with the given settings: anew for a larger object store than
        it has, as behind a text that the model has written."""
        if ray.is_initialized():
            if own_cluster.get("object_store_memory", 0) <= self._own_store or (self._group and self._group.is_open):
                return
            ray.shutdown()
        if self._address:
            _check_reachable(self._address)
        try:
            with handlers_kept():
                if self._address:
                    environment = {"env_vars": {name: os.environ[name] for name in WORKER_ENV}}
                    ray.init(self._address, runtime_env=environment, logging_level="ERROR", log_to_driver=False)
                else:
                    # Its processes have this one's environment; with another, those that start with it would be idle.
                    ray.init("local", logging_level="ERROR", **own_cluster)
                    self._own_store = own_cluster.get("object_store_memory", math.inf)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if not self._address:
                raise
            raise InputError("address", f"no Ray cluster answers at {self._address!r}: {first_line(error)}") from error
        except OSError as error:  # Ray's own cluster has a token, in the home
            if not error.filename:
                raise
            why = f"Ray cannot write {error.filename!r} ({error.strerror}); set HOME to a directory that can be written"
            raise InputError("backend", why) from error
        self._connected_here = True


def _check_reachable(address: str) -> None:
    """Raise an error where nothing listens at a host:port: Ray itself would try for minutes.

    Raises:
        InputError: nothing listens at a host:port.
    """
    match = re.fullmatch(r"(?:ray://)?\[?([^\]]+)\]?:(\d+)", address)
    if not match:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError("address", f"no Ray cluster answers at {address!r}: {error}") from error


def cluster_slots() -> Slots:
    """Return the CPUs and GPUs of all living nodes of the connected cluster."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in alive]
    return Slots(sum(cpus), int(sum(node.get("GPU", 0) for node in alive)), max(cpus, default=0))


def cpus_of(workers: int, threads: int, gpu: bool) -> int:
    """Return the CPUs to request for each of so many workers of the connected cluster: their threads, if there are
    enough."""
    available = cluster_slots()
    return 1 if gpu else max(1, min(threads, available.cpus // workers, available.cpus_of_a_node))


class RayGroup:
    """Workers [shard][replica] as actors that are never restarted: the driver owns recovery.

    Args:
        patience: seconds after which a worker that hangs is lost.

    Raises:
        InputError: the cluster does not free what the workers need, or they cannot join in a process group.
        WorkerLost: a worker died while it started.
    """

    concurrent = True

    def __init__(self, specs: Sequence[ForwardSpec], actor: type, patience: float) -> None:
        settings = specs[0].settings
        gpu = settings.device == "cuda"
        cpus = cpus_of(len(specs), settings.threads, gpu)
        bundle: dict[str, float] = {"CPU": cpus, **({"GPU": 1} if gpu else {})}
        self._placement: PlacementGroup = placement_group([bundle] * len(specs), strategy="PACK")
        self._actors: dict[tuple[int, int], Any] = {}
        self._exchange: Exchange | None = None
        self._board = Board(sign_seconds(patience))
        try:
            self._wait(len(specs), bundle, settings.device)
            self._patience = Patience([spec.label for spec in specs], patience, self._board.read)
            actor_class = ray.remote(max_restarts=0, max_task_retries=0)(actor)
            environment = {"env_vars": STREAMING_ENV} if settings.streamed else None
            for index, spec in enumerate(specs):
                self._actors[spec.shard, spec.replica] = actor_class.options(
                    num_cpus=cpus,
                    num_gpus=1 if gpu else 0,
                    runtime_env=environment,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, index),
                ).remote(spec, self._board, index)
            for ref in [self.submit(shard, replica, _StartedLater.start) for shard, replica in self._actors]:
                self.get(ref)
            if settings.exchange == "group" and len(specs) > 1:
                self._join()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        """Make a process group of all workers."""
        try:
            self._exchange = Exchange(self._actors, self._await)
        except LOST as error:
            raise WorkerLost(first_line(error)) from error

    def _wait(self, workers: int, bundle: dict[str, float], device: str) -> None:
        """Wait until the cluster has freed what the workers need."""
        deadline = time.monotonic() + PLACEMENT_SECONDS
        while not self._placement.wait(PLACEMENT_POLL_SECONDS):
            free_leftovers()
            if cluster_slots().workers(device) < workers:
                raise WorkerLost("a node died before workers were placed")
            if time.monotonic() > deadline:
                wanted = f"{workers} x {bundle}"
                raise InputError("address", f"the cluster did not free {wanted} in {PLACEMENT_SECONDS:g} s")

    def submit(self, shard: int, replica: int, verb: Callable[..., T], *args: Any) -> Ref[T]:
        actor = self._actors.get((shard, replica))
        if actor is None:
            raise WorkerLost(f"worker {shard}.{replica} is gone")
        if self._exchange:
            return self._exchange.submit((shard, replica), verb, *args)
        # Ray builds an actor's methods from its class, by their names: the function itself cannot be called remotely.
        return getattr(actor, verb.__name__).remote(*args)

    def get(self, ref: Ref[T]) -> T:
        assert not isinstance(ref, Held), "a tensor that a worker holds is no value of the driver"
        try:
            self._await(ref)
            return ray.get(ref)
        except LOST as error:
            raise WorkerLost(first_line(error)) from error
        except RayTaskError as error:
            if isinstance(error.cause, LOST) or context_is_dead(error.cause):
                raise WorkerLost(first_line(error.cause)) from error
            raise error.cause or error from error

    def _await(self, ref: Any) -> None:
        """Wait until a call is over.

        Raises:
            WorkerLost: a worker hangs.
            ray.exceptions.RayError: an exchange that others wait for has failed.
        """
        while not ray.wait([ref], timeout=self._patience.between_looks)[0]:
            if self._exchange:
                self._exchange.check()
            try:
                self._patience.look()
            except WorkerLost:
                kill(self._patience.hanging)
                raise

    def ranks(self, shard: int, replicas: Sequence[int]) -> tuple[int, ...] | None:
        if self._exchange is None:
            return None
        return tuple(self._exchange.ranks[shard, replica] for replica in replicas)

    @property
    def is_open(self) -> bool:
        """Whether there are workers."""
        return bool(self._actors)

    def close(self) -> None:
        """End all workers and free their slots."""
        actors, self._actors = list(self._actors.values()), {}
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(self._placement)
        self._board.clear()


def settled_slots() -> Slots:
    """Wait, after a worker was lost, until every node either answers or is declared dead; return the slots left.

    Ray counts a node that has just died as alive for some seconds, and a placement made in that time would wait for it.
    """

    @ray.remote(num_cpus=0, max_retries=0)
    def answer() -> bool:
        return True

    deadline = time.monotonic() + DEATH_SECONDS
    probes: dict[str, Any] = {}  # by node: one that has not answered yet is not asked again
    answered: set[str] = set()
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node in alive - answered - probes.keys():
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            probes[node] = answer.options(scheduling_strategy=place).remote()
        if probes:
            ray.wait(list(probes.values()), num_returns=len(probes), timeout=PROBE_SECONDS)
        over, _ = ray.wait(list(probes.values()), num_returns=len(probes), timeout=0) if probes else ([], [])
        for node in [node for node, probe in probes.items() if probe in over]:
            if _answered(probes.pop(node)):
                answered.add(node)
        if alive <= answered:
            return cluster_slots()
        if time.monotonic() > deadline:
            raise WorkerLost(f"a node neither answers nor is declared dead after {DEATH_SECONDS:g} s")
        time.sleep(1)


def _answered(probe: Any) -> bool:
    try:
        return ray.get(probe)
    except ray.exceptions.RayError:
        return False
