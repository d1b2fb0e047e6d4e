"""The part of a GPU's memory that tensors can have."""

# The rest: CUDA's context and cuBLAS, and a share for the allocator's fragmentation and for estimates that have not
# been measured.
CONTEXT_BYTES = 10**9
FRAGMENTED = 0.1


def device_room(memory: int) -> int:
    """Return the bytes for tensors on a GPU with so many bytes of memory."""
    return int((memory - CONTEXT_BYTES) * (1 - FRAGMENTED))


def memory_for(tensors: int) -> float:
    """Return the bytes of memory of a GPU on which tensors of so many bytes fit."""
    return tensors / (1 - FRAGMENTED) + CONTEXT_BYTES
