"""Reading tensors from files onto a GPU, beside its work."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.shard.streams import Moment
from shardprune.storage.safetensors_file import StoredTensor

CHUNK = 64 * 2**20  # bytes of a buffer
READERS = 4  # threads, and buffers: one thread copies from the page cache at a fraction of what the bus takes

Key = tuple[str, int]  # name of a tensor, and number of one of the stored ones of which it is made


@dataclass
class _Buffer:
    """Pinned memory, free for other bytes from a moment on."""

    memory: Tensor
    free: Moment


@dataclass(frozen=True)
class _Part:
    """Bytes of a tensor that are being read, from `start` on: where they go on the device, and the tensor that is whole
    with them."""

    stored: StoredTensor
    start: int
    buffer: _Buffer
    size: int
    target: Tensor
    reading: Future[None]
    whole: tuple[Key, Tensor] | None


class DeviceReader:
    """Threads that read files into a ring of pinned buffers, from which the tensors go to the device.

    Args:
        device: a GPU.
        chunk: bytes of a buffer.
    """

    def __init__(self, device: torch.device, chunk: int = CHUNK) -> None:
        self._device, self._chunk = device, chunk
        self._ring: deque[_Buffer] = deque()
        self._readers = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="read")

    def read(self, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors on the device in their stored dtype and in their order. They are there for what the current
        stream does after that; the host waits for the files alone. One with scales is multiplied with them there."""
        parts = {(name, place): part for name, one in tensors.items() for place, part in enumerate(one.parts())}
        there: list[Tensor] = []
        for (name, _), tensor in self._read(parts):
            there.append(tensor)
            if len(there) == len(tensors[name].parts()):
                yield name, tensors[name].joined(there)
                there = []

    def _read(self, tensors: Mapping[Key, StoredTensor]) -> Iterator[tuple[Key, Tensor]]:
        """Yield tensors as they are stored."""
        while len(self._ring) < READERS:
            memory = torch.empty(self._chunk, dtype=torch.uint8, pin_memory=True)
            self._ring.append(_Buffer(memory, Moment.now(self._device)))
        under_way: deque[_Part] = deque()
        try:
            for name, stored in tensors.items():
                tensor = torch.empty(stored.entry.shape, dtype=stored.entry.dtype, device=self._device)
                target = tensor.reshape(-1).view(torch.uint8)
                for start in range(0, max(1, tensor.nbytes), self._chunk):
                    if len(under_way) == READERS:
                        yield from self._land(under_way.popleft())
                    part = target[start : start + self._chunk]
                    last = start + self._chunk >= tensor.nbytes
                    under_way.append(self._begin(stored, start, part, (name, tensor) if last else None))
            while under_way:
                yield from self._land(under_way.popleft())
        finally:
            for left in under_way:  # of a pass that fails: the buffers are free for the next one
                left.reading.exception()

    def _begin(self, stored: StoredTensor, start: int, target: Tensor, whole: tuple[Key, Tensor] | None) -> _Part:
        """Begin to read bytes of a tensor from `start` on, as many as there is room for."""
        buffer, size = self._ring[0], target.numel()
        self._ring.rotate(-1)

        def read() -> None:
            buffer.free.wait()
            stored.read_part(start, buffer.memory[:size])

        return _Part(stored, start, buffer, size, target, self._readers.submit(read), whole)

    def _land(self, part: _Part) -> Iterator[tuple[Key, Tensor]]:
        """Copy bytes that are read to the device; yield the tensor that is whole with them."""
        part.reading.result()
        part.target.copy_(part.buffer.memory[: part.size], non_blocking=True)
        part.stored.passed(part.start, part.buffer.memory[: part.size])  # while the copy is under way
        part.buffer.free = Moment.now(self._device)
        if part.whole:
            yield part.whole
