"""Tensors of the simulated GPU, and the one function through which every operation on them goes."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.simulated_cuda.counts import NARROW, Counts

DEVICE = torch.device("cuda", 0)
# The host waits for their results.
READING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"})
ALLOCATING = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh"}
)
INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"})
COPYING = frozenset({"copy_", "_to_copy", "_copy_from"})


class SimulatedGpu:
    """What a simulated GPU has been asked, and its memory in bytes."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.memory = self.allocated = self.peak = 0
        self._pinned: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def reset(self, memory: int) -> None:
        """Become a GPU with so much memory that has been asked nothing."""
        self.counts.clear()
        self.memory, self.peak = memory, self.allocated

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as allocated on the device, until it dies.

        Raises:
            OutOfMemoryError: the device has no room for it.
        """
        size = storage.nbytes()
        known = self._held.get(id(storage))
        if known is not None and known() is storage:
            return
        if self.allocated + size > self.memory:
            free = max(0, self.memory - self.allocated) / 2**30
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**30:.2f} GiB. GPU 0 has a total capacity of "
                f"{self.memory / 2**30:.2f} GiB of which {free:.2f} GiB is free."
            )
        self._held[id(storage)] = weakref.ref(storage)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._release, id(storage), size)

    def _release(self, key: int, size: int) -> None:
        self._held.pop(key, None)
        self.allocated -= size

    def pin(self, tensor: Tensor) -> Tensor:
        """Make a CPU tensor's memory pinned."""
        storage = tensor.untyped_storage()
        self._pinned[id(storage)] = weakref.ref(storage)
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        known = self._pinned.get(id(storage))
        return known is not None and known() is storage


GPU = SimulatedGpu()


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device; `values` are those of a CPU tensor with the same strides."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "SimulatedTensor":
        GPU.hold(values.untyped_storage())
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        made.values = values.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(function, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"simulated({self.values})"

    def __deepcopy__(self, memo: dict) -> "SimulatedTensor":
        return SimulatedTensor(self.values.clone())

    def tolist(self) -> Any:
        GPU.counts.sync()
        GPU.counts.copy(self.nbytes, to_device=False)
        return self.values.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, torch.cuda.Stream), f"{stream} is no stream"


def to_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor's values, uncounted, for a test."""
    return tensor.values if isinstance(tensor, SimulatedTensor) else tensor


class _Operations(TorchDispatchMode):
    """Operations that make tensors, and copies of those on the CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(function, args, kwargs or {})


class _Attention(TorchFunctionMode):
    """Attention as one launch: torch would look for a CUDA kernel of it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], SimulatedTensor):
            mixed = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not x.is_cuda]
            assert not mixed, "attention over tensors on two devices"
            GPU.counts.launch("scaled_dot_product_attention")
            own, named = tree_map(to_cpu, (args, kwargs))
            result = function(*own, **named)
            causal = 2 if named.get("is_causal") else 1
            scores = 4 * result.numel() * own[1].shape[-2] // causal
            GPU.counts.work(result.nbytes + sum(one.nbytes for one in own[:3]), _precision(result), scores)
            return SimulatedTensor(result)
        return function(*args, **kwargs)


@contextmanager
def on_simulated_gpu() -> Iterator[None]:
    """Make "cuda" the simulated device in this thread."""
    with _Operations(), _Attention():
        yield


def operate(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Carry out an operation of torch that may have tensors of the device among its arguments, or makes one there.

    Raises:
        RuntimeError: the arguments are on several devices, in an operation that takes one.
    """
    schema = function._schema
    name = schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if name == "is_pinned":
        return not there and GPU.is_pinned(args[0])
    if name == "_pin_memory":
        assert not there, "only dense CPU tensors can be pinned"
        return GPU.pin(args[0].clone())
    pinned = bool(kwargs.pop("pin_memory", False)) if "pin_memory" in kwargs else False
    made_there = asked.type == "cuda" if asked else bool(there) and name not in ("copy_",)
    if not there and not made_there:
        result = function(*args, **kwargs)
        return GPU.pin(result) if pinned else result

    _check_devices(name, tensors, there)
    copied = _count(function, name, args, kwargs, tensors, asked)
    own, named = tree_map(to_cpu, (args, kwargs))
    if asked:
        named["device"] = torch.device("cpu") if asked.type == "cuda" else asked
    result = _with_wide_sums(function, name, own, named)
    if not _only_views(function, name):
        _count_work(name, own, named, result)
    # Where an argument is written into, the tensor that came in is the result.
    written = [place for place, argument in enumerate(schema.arguments) if _writes(argument)]
    if written and any(_writes(one) for one in schema.returns):
        given = [args[at] if at < len(args) else kwargs[schema.arguments[at].name] for at in written]
        return given[0] if len(given) == 1 else tuple(given)
    if not made_there:
        if name == "_to_copy" and copied and kwargs.get("non_blocking"):
            return GPU.pin(result)  # as torch allocates it
        return GPU.pin(result) if pinned else result
    return tree_map(lambda value: SimulatedTensor(value) if isinstance(value, Tensor) else value, result)


def _check_devices(name: str, tensors: list[Tensor], there: list[Any]) -> None:
    """Raise an error where an operation mixes devices."""
    here = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor)]
    if not there or not here or name in COPYING or all(tensor.dim() == 0 for tensor in here):
        return
    # Indices may be on the CPU: they are copied to the device.
    if name in INDEXING and isinstance(tensors[0], SimulatedTensor) and all(not t.is_floating_point() for t in here):
        return
    places = ", ".join(f"{tensor.device} {tuple(tensor.shape)}" for tensor in tensors)
    raise RuntimeError(f"Expected all tensors to be on the same device, but {name} has {places}")


def _count(
    function: Any, name: str, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], asked: torch.device | None
) -> bool:
    """Count an operation; return whether it is a copy to the host."""
    counts = GPU.counts
    if not _only_views(function, name):
        counts.launch(name)
    indices = [one for one in (args[1] or ()) if isinstance(one, Tensor)] if name in INDEXING else []
    if name in READING or any(one.dtype == torch.bool for one in indices):
        counts.sync()  # the size of the result, or the result
    for one in indices:
        if not isinstance(one, SimulatedTensor):
            counts.sync()
            counts.copy(one.nbytes, to_device=True)
    if name == "copy_":
        to, source, waits = args[0], args[1], not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        there, from_there = isinstance(to, SimulatedTensor), isinstance(source, SimulatedTensor)
        host = source if there else to
    elif name == "_to_copy":
        source, waits = args[0], not kwargs.get("non_blocking")
        from_there = isinstance(source, SimulatedTensor)
        there = asked.type == "cuda" if asked else from_there
        host = source if there else None  # torch pins the memory of a result that does not block
    else:
        return False
    assert not source.is_meta, "a copy of a tensor without values"
    if there == from_there:
        return False
    pinned = GPU.is_pinned(host) if host is not None else not waits
    counts.copy(source.nbytes, there, pinned)
    if waits or not pinned:
        counts.sync()
    return not there


def _only_views(function: Any, name: str) -> bool:
    """Return whether an operation gives a view, or memory without values: the device has nothing to do."""
    returns = function._schema.returns
    return name in ALLOCATING or any(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def _count_work(name: str, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
    """Count the arithmetic of a product, and the memory that an operation reads and writes."""
    tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
    blocks = {(one.data_ptr(), one.nbytes) for one in tensors if not one.is_meta}  # each once, read and written or not
    traffic = sum(size for _, size in blocks)
    if name.rstrip("_") not in PRODUCTS:
        GPU.counts.work(traffic)
        return
    factors = [one for one in args if isinstance(one, Tensor)][-2:]
    inner = factors[0].shape[-1]
    precision = _precision(factors[0]) + (" narrow" if inner <= NARROW else "")
    made = result if isinstance(result, Tensor) else args[0]
    GPU.counts.work(traffic, precision, 2 * made.numel() * inner)


def _precision(tensor: Tensor) -> str:
    """Return the precision of products of a tensor."""
    if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return str(tensor.dtype).removeprefix("torch.")


def _with_wide_sums(function: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Carry out an operation on CPU tensors; products of 16-bit numbers with wider sums are CUDA's alone."""
    if name not in ("mm", "addmm", "bmm", "baddbmm") or not function._overloadname.startswith("dtype"):
        return function(*args, **kwargs)
    dtype = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype))
    factors = [value for value in args if isinstance(value, Tensor)]
    if name in ("addmm", "baddbmm"):
        assert factors[0].dtype in (dtype, factors[1].dtype), "self dtype must match either out_dtype or mat1 dtype"
    scales = {key: value for key, value in kwargs.items() if key in ("alpha", "beta")}
    result = getattr(torch, name)(*(factor.to(dtype) for factor in factors), **scales)
    return kwargs["out"].copy_(result) if "out" in kwargs else result


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
