"""Headers of safetensors files: what the library refuses is refused here, and what it reads has the same tensors."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from shardprune.errors import InputError
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import read_header, read_tensor

CASES = 600
DTYPES = ("F32", "F16", "BF16", "I64", "U8", "BOOL", "F64", "I32", "I16", "I8", "U16", "U32", "U64")
SIZES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
}
Header = dict[str, Any]
Damage = Callable[[random.Random, Header], str | None]


def whole(draw: random.Random) -> tuple[Header, int]:
    """A right header of a few small tensors, and the bytes of these."""
    header: Header = {"__metadata__": {"format": "pt"}} if draw.random() < 0.5 else {}
    end = 0
    for index in range(draw.randint(1, 4)):
        dtype, shape = draw.choice(DTYPES), [draw.randint(0, 3) for _ in range(draw.randint(0, 3))]
        size = SIZES[dtype]
        for length in shape:
            size *= length
        header[f"layers.{index}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, end


def tensor(draw: random.Random, header: Header) -> dict[str, Any]:
    return header[draw.choice([name for name in header if name != "__metadata__"])]


def _move(draw: random.Random, header: Header) -> None:
    entry, by = tensor(draw, header), draw.choice((-8, -4, -1, 1, 4, 8))
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


def _stretch(draw: random.Random, header: Header) -> None:
    tensor(draw, header)["data_offsets"][draw.randint(0, 1)] += draw.choice((-4, 4, 2**40, 2**63, 2**64))


def _swap_ends(draw: random.Random, header: Header) -> None:
    tensor(draw, header)["data_offsets"].reverse()


def _shape(draw: random.Random, header: Header) -> None:
    odd = (2**31, 2**63, 2**64, -1, 1.0, "2", True, None, [1])
    tensor(draw, header)["shape"] = [draw.choice((0, 1, 2, *odd)) for _ in range(draw.randint(1, 3))]


def _offsets(draw: random.Random, header: Header) -> None:
    entry = tensor(draw, header)
    start, end = entry["data_offsets"]
    odd = (
        [start + 0.0, end + 0.0],
        [str(start), end],
        [start],
        [start, end, end],
        [True, end],
        None,
        {},
        [-start, end],
    )
    entry["data_offsets"] = draw.choice(odd)


def _dtype(draw: random.Random, header: Header) -> None:
    tensor(draw, header)["dtype"] = draw.choice((*DTYPES, "f32", "F31", "", None, 3))


def _field(draw: random.Random, header: Header) -> None:
    entry = tensor(draw, header)
    entry.pop(draw.choice([*entry]))


def _more(draw: random.Random, header: Header) -> None:
    header["another"] = dict(tensor(draw, header))  # on the same bytes


def _metadata(draw: random.Random, header: Header) -> None:
    header["__metadata__"] = draw.choice((None, {}, {"a": "b"}, {"a": 1}, [], "x", {"a": None}, {"a": {}}))


def _order(draw: random.Random, header: Header) -> None:
    items = [*header.items()]
    draw.shuffle(items)
    header.clear()
    header.update(items)


def _text(draw: random.Random, header: Header) -> str:
    text = json.dumps(header)
    return draw.choice(
        (text + "   ", text[:-1], text + "x", "[" + text + "]", " " + text, "\ufeff" + text, "null", text + "\0")
    )


def _unchanged(draw: random.Random, header: Header) -> None:
    pass


DAMAGES: tuple[Damage, ...] = (
    _unchanged, _move, _stretch, _swap_ends, _shape, _offsets, _dtype, _field, _more, _metadata, _order, _text
)  # fmt: skip


def made(draw: random.Random, damage: Damage) -> bytes:
    """The content of a file whose header is damaged, or whose length says something else."""
    header, size = whole(draw)
    text = (damage(draw, header) or json.dumps(header)).encode()
    length = len(text) + (draw.choice((-1, 1, 2**40)) if draw.random() < 0.1 else 0)
    data = draw.randbytes(max(0, size + (draw.choice((-1, 4)) if draw.random() < 0.1 else 0)))
    data = bytes(byte & 1 for byte in data)  # so that they are truth values, too
    return max(length, 0).to_bytes(8, "little") + text + data


def of_library(path: str) -> dict[str, torch.Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OverflowError, RuntimeError, TypeError):  # torch has no such shape
        return None


def of_ours(folder: Folder, name: str) -> dict[str, torch.Tensor] | None:
    try:
        entries, metadata = read_header(folder, name)
    except InputError:
        return None
    assert all(isinstance(value, str) for value in metadata.values())
    return {name: read_tensor(folder, entry) for name, entry in entries.items()}


def test_the_verdict_is_the_librarys(tmp_path):
    folder, draw = Folder(str(tmp_path), "model"), random.Random(0)
    read = refused = 0
    for case in range(CASES):
        damage = DAMAGES[case % len(DAMAGES)]
        content = made(draw, damage)
        (tmp_path / "x.safetensors").write_bytes(content)
        theirs, ours = of_library(f"{tmp_path}/x.safetensors"), of_ours(folder, "x.safetensors")
        if theirs is None:
            assert ours is None, f"{damage.__name__}: {content!r} is refused by the library"
            refused += 1
        elif content[8:9] == b"{":  # the format's description says so, which the library does not look at
            assert ours is not None, f"{damage.__name__}: {content!r} is read by the library"
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name].view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8))
                       for name in ours)  # fmt: skip
            read += 1
    assert min(read, refused) > CASES // 5


def header_of(text: str, data: int = 16) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + bytes(data)


W = '{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header_of(f'{{"w":{W},"w":{W}}}'), "is not a safetensors file: its header has the name 'w' twice"),
        (header_of(f'{{"w":{W},"v":{W}}}'), "is damaged: the header places 'v' at bytes 0 to 16, where 16 are before"),
        (header_of(f'{{"w":{W.replace("[0,16]", "[4,20]")}}}', 20), "is damaged: the header places 'w' at bytes 4 to"),
        (header_of(f'{{"w":{W.replace("[0,16]", "[-4,12]")}}}'), "its header holds -4 as w.data_offsets.0; use .* 0"),
        (header_of(f'{{"w":{W.replace("[0,16]", "[0.0,16.0]")}}}'), "its header holds 0.0 as w.data_offsets.0; use a"),
        (header_of(f'{{"w":{W.replace("[4]", "[true]")}}}'), "its header holds True as w.shape.0; use a valid integer"),
        (header_of(f'{{"w":{W.replace("[4]", "[3]")}}}'), r"gives 'w' 16 bytes, which are not those of F32 \[3\]"),
        (
            header_of(f'{{"w":{W.replace("[4]", f"[{2**62},8,0]").replace("[0,16]", "[0,0]")}}}', 0),
            r"gives 'w' 0 bytes, which are not those of F32 \[4611686018427387904, 8, 0\]",
        ),
        (header_of(f'{{"w":{W.replace("F32", "F4")}}}'), "holds F4 tensors; use one of F64, F32"),
        (header_of(f'{{"w":{W}}}', 20), "is truncated or damaged: it has 83 bytes, its header says 79"),
        (header_of(f'{{"w":{W}}}', 12), "is truncated or damaged: it has 75 bytes, its header says 79"),
        (header_of("[" * 5000), "is not a safetensors file: its header does not begin with {"),
        (header_of('{"w":' + "[" * 5000), "is not a safetensors file: its header is not JSON: recursion limit"),
        (header_of(f'{{"__metadata__":{{"a":1}},"w":{W}}}'), "its header holds 1 as a; use a valid string"),
    ],
    ids=range(14),
)
def test_headers_that_are_refused(tmp_path, content, reason):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=f"^model: {tmp_path}/x.safetensors .*{reason}"):
        read_header(Folder(str(tmp_path), "model"), "x.safetensors")
