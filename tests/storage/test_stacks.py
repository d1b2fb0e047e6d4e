"""Parts of a tensor in a file: read alone, in every layout, and put together again as they were."""

import pytest
import torch
from safetensors.torch import save_file

from shardprune.storage.digests import pieces_digest, stored_digest, tensor_digest
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import StoredTensor, read_elements, read_header
from shardprune.storage.stacks import Layout, Place, Slice, stack_matrices
from shardprune.storage.tensor_facts import TensorFacts

EXPERTS, ROWS, COLS, COUNT = 3, 4, 6, 2


def matrix_of(layout, parts):
    """An expert's matrix, row by row."""
    if layout.interleaved:
        rows = [part[row] for row in range(ROWS) for part in parts]
    else:
        rows = [row for part in parts for row in part]
    return torch.stack(rows, 1 if layout.transposed else 0)


@pytest.fixture(params=[(t, i) for t in (False, True) for i in (False, True)], ids=str)
def stored(request, tmp_path):
    """A file with a stack of a layout; the parts of each expert, and their places."""
    layout = Layout(*request.param)
    parts = [[torch.randn(ROWS, COLS).bfloat16() for _ in range(COUNT)] for _ in range(EXPERTS)]
    stack = torch.stack([matrix_of(layout, own) for own in parts])
    save_file({"before": torch.randn(5), "stack": stack}, tmp_path / "model.safetensors")
    places = {
        (expert, place): Place("stack", Slice(tuple(stack.shape), expert, place, COUNT, layout))
        for expert in range(EXPERTS)
        for place in range(COUNT)
    }
    return Folder(str(tmp_path), "model"), parts, places, stack


def test_a_part_is_read_alone(stored):
    folder, parts, places, _ = stored
    entries, _ = read_header(folder, "model.safetensors")
    for (expert, place), where in places.items():
        expected = parts[expert][place].clone()
        expected[0, 1] = 0
        entry = where.entry(entries)
        assert (entry.shape, entry.dtype, entry.size) == ((ROWS, COLS), torch.bfloat16, ROWS * COLS * 2)
        tensor = StoredTensor(folder, entry)
        found = tensor.read()
        assert torch.equal(found, parts[expert][place])
        assert found.is_contiguous()
        assert torch.equal(read_elements(folder, entry, 5, 14), found.flatten()[5:14])
        assert stored_digest(tensor) == tensor_digest(found)
        buffer = torch.empty(20, dtype=torch.uint8)
        tensor.read_part(12, buffer)
        assert torch.equal(buffer.view(torch.bfloat16), found.flatten()[6:16])
        assert TensorFacts.of(tensor).zeros == 0


def test_parts_make_the_stack_again(stored):
    _, parts, places, stack = stored
    slices = {f"{expert}.{place}": where.slice for (expert, place), where in places.items()}

    def part(name):
        expert, place = map(int, name.split("."))
        return parts[expert][place]

    matrices = list(stack_matrices(slices, torch.bfloat16, part))
    assert torch.equal(torch.stack(matrices), stack)
    assert pieces_digest(matrices) == tensor_digest(stack)
    layout = next(iter(places.values())).slice.layout
    assert torch.equal(torch.stack([layout.joined(own) for own in parts]), stack)


def test_a_stack_is_written_as_a_whole(stored):
    _, parts, places, _ = stored
    slices = {f"{e}": places[e, 0].slice for e in range(EXPERTS - 1)}
    with pytest.raises(AssertionError, match="as a whole"):
        list(stack_matrices(slices, torch.bfloat16, lambda name: parts[int(name)][0]))


def test_places_have_names_of_their_own(stored):
    places = stored[2]
    assert str(Place("stack")) == "stack"
    assert len({str(place) for place in places.values()}) == EXPERTS * COUNT
