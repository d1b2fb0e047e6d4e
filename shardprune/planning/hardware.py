"""Hardware presets: peak rates, and the fractions of them that this program's steps are expected to attain.

The rates of GPUs are the vendors' (dense, without sparsity). The attained fractions are those of one layer of
Llama-70B shape on an H200 (docs/benchmarks.md), but for those between devices and nodes, which have not been measured.
The row `cpu` is one thread of the machine of docs/benchmarks.md, measured.
"""

from dataclasses import dataclass, replace

GIGA = 10**9
TERA = 10**12

SPARE_HOST = 0.05  # of a node's memory, for other processes

CALL_SECONDS = 1e-3  # from a call to an idle actor until it starts
SUBMIT_SECONDS = 1e-4  # in the driver, per call
KERNEL_SECONDS = 1e-5  # to launch a small kernel from Python
IN_THREE = 0.83  # of a third of TF32's rate, which a product by 3xTF32 attains beside splitting and adding


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its share of a node.

    Rates are per second: `products` operations of 16-bit products (of a CPU, float32), `float32` operations, `memory`
    and `link` bytes (of the accelerator's memory, and between it and the host), `peer` bytes that it sends to another
    one of its node, `sorted` weights sorted, `store` bytes that one process puts into or takes from Ray's store.
    `network` and `storage` are a node's, in bytes. `bytes` is the accelerator's memory, `host` the node's for each of
    them. `step` is the seconds of one column's own operations in SparseGPT: of the recursion, or of the kernel (0.17 ms
    for a block of 128 columns on an H200); `leaf` those of a column of its factor that are no products.
    """

    name: str
    bytes: int
    products: float
    float32: float
    memory: float
    link: float
    peer: float
    host: int
    network: float
    storage: float
    sorted: float
    store: float
    step: float = 3 * KERNEL_SECONDS
    leaf: float = 0.0
    gpu: bool = True

    @property
    def large(self) -> float:
        """Operations per second of large float32 products: by three TF32 products where that is faster."""
        return max(self.float32, IN_THREE * self.products / 6)  # TF32 has half the rate of 16-bit products

    def factor(self, cols: int) -> float:
        """Return the seconds of a factor [cols, cols]: products, and what its leaves take column after column."""
        return cols**3 / self.large + cols * self.leaf

    def attained(self) -> "Hardware":
        """Return the rates that long steps are expected to attain."""
        if not self.gpu:
            return self
        return replace(
            self,
            products=0.7 * self.products,
            float32=0.7 * self.float32,
            memory=0.6 * self.memory,
            link=0.8 * self.link,
            peer=0.6 * self.peer,
            network=0.5 * self.network,
        )


def _gpu(
    name: str,
    gigabytes: int,
    products: float,
    float32: float,
    memory: float,
    link: float,
    peer: float,
    host: int,
    network: float,
) -> Hardware:
    """Build a row from teraflops, gigabytes (per second), and a network in gigabits per second.

    `peer` is NVLink in one direction, or PCIe where there is none.
    """
    return Hardware(
        name=name,
        bytes=gigabytes * GIGA,
        products=products * TERA,
        float32=float32 * TERA,
        memory=memory * GIGA,
        link=link * GIGA,
        peer=peer * GIGA,
        host=host * GIGA,
        network=network * GIGA / 8,
        storage=2 * GIGA,
        sorted=memory * GIGA / 400,  # eight passes over keys, values and indices
        store=10 * GIGA,
        step=1.3e-6,
        leaf=2.3e-6,
    )


HARDWARE: dict[str, Hardware] = {
    row.name: row
    for row in (
        _gpu("b200", 180, 2250, 75, 8000, 64, 900, 250, 400),
        _gpu("h200", 141, 989, 67, 4800, 64, 450, 250, 400),
        _gpu("h100", 80, 989, 67, 3350, 64, 450, 250, 400),
        _gpu("a100", 80, 312, 19.5, 2039, 32, 300, 125, 200),
        _gpu("a100-40gb", 40, 312, 19.5, 1555, 32, 300, 125, 200),
        _gpu("l40s", 48, 362, 91.6, 864, 32, 32, 96, 100),
        _gpu("a10g", 24, 70, 31.2, 600, 32, 32, 48, 25),
        _gpu("l4", 24, 121, 30.3, 300, 32, 32, 48, 25),
        _gpu("rtx4090", 24, 165, 82.6, 1008, 32, 32, 64, 10),
        Hardware(
            name="cpu",
            bytes=6 * GIGA,
            products=1.5e11,
            float32=1.2e11,
            memory=1.3e10,
            link=1.3e10,
            peer=2.5e9,
            host=6 * GIGA,
            network=10 * GIGA / 8,
            storage=GIGA,
            sorted=1.3e7,
            store=2 * GIGA,
            gpu=False,
        ),
    )
}
