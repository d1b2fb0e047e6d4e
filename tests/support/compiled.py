"""Triton's kernels compiled for a GPU that need not be there."""

import re
import subprocess
from pathlib import Path
from typing import Any


def resources(
    folder: Path, kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: int
) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes of its stack, to which registers spill, of a kernel for sm_90.

    Args:
        signature: the types of the arguments; pointers and strides are multiples of 16.
        options: Triton's, such as `num_warps`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("stride")
    }
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])
