"""Writing behind: a layer's file is written by a thread while the worker is at the next layer."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from shardprune.errors import first_line
from shardprune.shard.streams import Moment, SideStream, host_memory, used_here

GRACE_SECONDS = 10.0  # that a file under way has when its worker closes

_logger = logging.getLogger(__name__)


class _Abandoned(Exception):
    """The worker has closed; not an error of storage, so that nothing is tried again."""


class WriteBehind:
    """A thread that writes one layer's file at a time.

    Tensors of a GPU are copied to pinned memory on a side stream. Those of a CPU are written from where they are:
    nothing may change them until `wait` returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = SideStream(device)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._under_way: tuple[int, Future[int]] | None = None
        self._abandoned = threading.Event()

    def begin(
        self, layer: int, tensors: Mapping[str, Tensor], write: Callable[[Callable[[str], Tensor | None]], int]
    ) -> None:
        """Begin to write a layer.

        Args:
            tensors: those that are written from memory, by name.
            write: writes the file, and returns the bytes of its tensors. It is called in the thread, with a function
                that returns the tensor of a name on the CPU, or None where there is none.
        """
        assert self._under_way is None, "the layer before this one is not written"
        copied, whole = self._on_host(tensors)

        def tensor(name: str) -> Tensor | None:
            if self._abandoned.is_set():
                raise _Abandoned
            return copied.get(name)

        def written() -> int:
            whole.wait()
            return write(tensor)

        self._under_way = layer, self._writer.submit(written)

    def wait(self, layer: int) -> int:
        """Wait until the file of a layer is there; return the bytes of its tensors.

        Raises:
            StorageError: it cannot be written.
        """
        assert self._under_way is not None, "no layer is being written"
        index, future = self._under_way
        assert index == layer, "another layer is being written"
        self._under_way = None
        return future.result()

    def close(self) -> None:
        """Give the file under way some seconds to be finished, then give it up: nothing of it stays."""
        under_way, self._under_way = self._under_way, None
        try:
            if under_way:
                _last_words(*under_way)
        finally:
            self._abandoned.set()
            self._writer.shutdown()

    def _on_host(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Moment]:
        """Return the tensors on the CPU, and the moment from which on they are whole."""
        if self._device.type == "cpu":
            return dict(tensors), Moment.now(self._device)
        copied = {}
        with self._copies.after(Moment.now(self._device)):
            for name, tensor in tensors.items():
                copied[name] = host_memory(tensor, self._device)
                copied[name].copy_(tensor, non_blocking=True)
                used_here(tensor)
            return copied, Moment.now(self._device)


def _last_words(layer: int, file: Future[int]) -> None:
    """Wait for a file for some seconds; the run ends already, of another cause than what may happen to it."""
    try:
        file.result(GRACE_SECONDS)
    except Exception as error:
        _logger.warning("layer %d is not written: %s", layer, first_line(error))
