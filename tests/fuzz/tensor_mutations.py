"""Changes to files of tensors, safetensors and .npy: see `tests.fuzz.mutations`."""

import random
import re
from collections.abc import Callable
from typing import Any

from tests.fuzz.mutations import Pairs, byte_file, change_tree, parsed, written


def safetensors_header(content: bytes, draw: random.Random) -> bytes:
    """Change a safetensors file's header: its offsets, shapes, names and types, or its bytes and length."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    if draw.random() < 0.12:
        wrong = draw.choice((0, 1, size - 1, size + 1, len(content), 10**8 + 1, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + header + data
    if draw.random() < 0.1:
        header = draw.choice((b"", b" ", b"\n")) + byte_file(header, draw)
    else:
        tree = parsed(header.decode())
        if draw.random() < 0.6:
            _displace(tree, draw)
        else:
            tree = change_tree(tree, draw)
        header = written(tree).encode()
    if draw.random() < 0.9:
        header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def _displace(tree: Pairs, draw: random.Random) -> None:
    """Change which bytes a tensor has, or what they are."""
    entries = [(at, dict(entry)) for at, (name, entry) in enumerate(tree) if name != "__metadata__"]
    at, entry = draw.choice(entries)
    other = draw.choice(entries)[1]
    start, end = entry["data_offsets"]
    changes: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"data_offsets": [start + 4, end + 4]},
        lambda: {"data_offsets": [start - 4, end - 4]},
        lambda: {"data_offsets": [start, end - 4]},
        lambda: {"data_offsets": [end, start]},
        lambda: {"data_offsets": [float(start), float(end)]},
        lambda: {"data_offsets": [start, end, end]},
        lambda: {"data_offsets": [-8, end - start - 8]},
        lambda: {"data_offsets": [start + 2**40, end + 2**40]},
        lambda: {"data_offsets": [start + 2**64, end + 2**64]},
        lambda: {"data_offsets": other["data_offsets"], "shape": other["shape"]},
        lambda: {"shape": entry["shape"][::-1]},
        lambda: {"shape": [*entry["shape"], 1]},
        lambda: {"shape": [-size for size in entry["shape"]]},
        lambda: {"shape": [2**32, 2**32]},
        lambda: {"shape": [True, *entry["shape"]]},
        lambda: {"dtype": draw.choice(("F16", "BF16", "I32", "F64", "BOOL", "F8_E4M3", "f32", "X", 5))},
        lambda: {"shape": [0], "data_offsets": [start, start]},
    )
    changed = {**entry, **draw.choice(changes)()}
    name = tree[at][0]
    kind = draw.random()
    if kind < 0.7:
        tree[at] = (name, Pairs(changed.items()))
    elif kind < 0.8:
        tree.append((name, Pairs(changed.items())))  # a second one of the same name
    elif kind < 0.9:
        tree.append((f"{name}.more", Pairs(entry.items())))  # another one on the same bytes
    else:
        tree[at] = (draw.choice((f"{name}x", "", "lm_head.weight", "\x1b[31m", "a" * 10_000)), tree[at][1])


def safetensors_data(content: bytes, draw: random.Random) -> bytes:
    """Change a safetensors file's data: values that are no numbers or too large, bytes that are missing or too many."""
    size = int.from_bytes(content[:8], "little")
    head, data = content[: 8 + size], bytearray(content[8 + size :])
    kind = draw.random()
    if kind < 0.15:
        return head + bytes(data[: draw.randrange(len(data))])
    if kind < 0.25:
        return head + bytes(data) + bytes(draw.choice((1, 4, 4096)))
    if kind < 0.3:
        return content[: draw.choice((0, 1, 7, 8, 8 + size // 2))]
    values = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\x00\x00\x00\x00")
    value = draw.choice(values)
    count = draw.choice((1, 1, 16, len(data) // 4))
    start = 4 * draw.randrange(len(data) // 4)
    for place in range(start, min(len(data), start + 4 * count), 4):
        data[place : place + 4] = value
    return head + bytes(data)


NPY_SHAPES = (
    "(4, 16, 1)",
    "(64,)",
    "()",
    "(0, 16)",
    "(4, 0)",
    "(-4, 16)",
    "(1000000000000, 16)",
    "(4.0, 16)",
    "(True, 64)",
    "4, 16",
    "x",
)
NPY_TYPES = ("'<f8'", "'|b1'", "'|O'", "'<i4'", "'>i8'", "'<u8'", "'<U2'", "[('a', '<i8')]", "'x'", "5", "'|S8'")


def npy_file(content: bytes, draw: random.Random) -> bytes:
    """Change a `.npy` file: its header, its ids, or its bytes."""
    kind = draw.random()
    if kind < 0.25:
        return byte_file(content, draw)
    size = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + size].decode(), bytearray(content[10 + size :])
    if kind < 0.45:
        header = re.sub(r"'shape': \([^)]*\)", f"'shape': {draw.choice(NPY_SHAPES)}", header)
    elif kind < 0.65:
        header = re.sub(r"'descr': '[^']*'", f"'descr': {draw.choice(NPY_TYPES)}", header)
    elif kind < 0.75:
        wild = (
            "{}",
            "[]",
            "__import__('os').system('touch owned')",
            "(" * 5000,
            "{'descr': '<i8'}",
            "9" * 9000,
            "\x00",
        )
        header = draw.choice(wild)
    elif kind < 0.85:
        value = draw.choice((-1, 32, 2**31, 2**62, -(2**63)))
        at = 8 * draw.randrange(len(data) // 8)
        data[at : at + 8] = value.to_bytes(8, "little", signed=True)
    else:
        starts = (b"PK\x03\x04", b"\x80\x04", b"\x93NUMPY\x09\x00", b"\x93NUMPY\x02\x00", b"GIF89a")
        start = draw.choice(starts)
        return start + content[len(start) :]
    text = header.encode()
    return content[:8] + min(len(text), 65535).to_bytes(2, "little") + text + bytes(data)
