"""Records of layers: what is written into a file is what is read back."""

import pytest
import torch

from shardprune.errors import InputError
from shardprune.storage.digests import tensor_digest
from shardprune.storage.journal import Journal
from shardprune.storage.records import BlockReport, KeptStructures, LayerRecord, LayerSizes, ProjectionReport
from shardprune.storage.safetensors_file import write_tensors
from shardprune.storage.seals import sealed

PROJECTION = ProjectionReport(1, "mlp.down_proj", 0.5, zeros=6, zeros_before=1, weights=12, retries=2, error=0.1)
OTHER = ProjectionReport(1, "mlp.up_proj", 0.5, zeros=3, zeros_before=0, weights=6, pattern="2:4", error=0.2)
RECORDS = {
    "zeros": LayerRecord(1, (PROJECTION, OTHER), (BlockReport(1, "mlp", 3, 0.2, 0.1),), outliers=1.5),
    "structures": LayerRecord(
        1,
        kept=KeptStructures((0, 2), (1, 3, 4), {"mlp.down_proj": 0.25}, retries=1),
        sizes=LayerSizes(weights_before=20, zeros_before=2, weights=10, zeros=1),
    ),
    "nothing": LayerRecord(1),
}


SHAPES = {"w": (torch.float32, (2,))}


@pytest.fixture
def journal(tmp_path):
    return Journal(str(tmp_path), "mine", 3)


def write(journal, record):
    journal.write_layer(SHAPES, lambda _name: torch.zeros(2), record)


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_layer_file_gives_its_record_back(journal, record):
    write(journal, record)
    assert journal.finished() == {1: record}


def test_sums_over_the_projections():
    zeros, structures, nothing = RECORDS.values()
    assert (zeros.zeros, zeros.sparsity, zeros.error) == (9, 0.5, pytest.approx(0.15))
    assert (structures.zeros, structures.sparsity, structures.error) == (1, None, 0.25)
    assert (nothing.zeros, nothing.sparsity, nothing.error) == (0, None, None)
    assert PROJECTION.achieved == 0.5


OTHER_VERSIONS = {
    "no layer": {"projections": []},
    "a projection without weights": {
        **RECORDS["zeros"].plain(),
        "projections": [{**PROJECTION.__dict__, "weights": 0}],
    },
    "a field too many": {**LayerRecord(1).plain(), "seconds": 3},
    "a report with a field too many": {**RECORDS["zeros"].plain(), "projections": [{"layer": 1, "speed": 2}]},
    "no list": {**LayerRecord(1).plain(), "projections": None},
}


@pytest.mark.parametrize("fields", OTHER_VERSIONS.values(), ids=OTHER_VERSIONS)
def test_what_another_version_recorded_is_refused(journal, fields):
    tensors = {"w": torch.zeros(2)}
    metadata = sealed({"fingerprint": "mine", **fields}, {"w": tensor_digest(tensors["w"])}, SHAPES)
    write_tensors(journal.folder, journal.layer_file(1), tensors, metadata)
    with pytest.raises(InputError, match=r"out: model-00003-of-00004.safetensors was written by another version"):
        journal.finished()


def test_the_file_of_another_run_is_refused(tmp_path, journal):
    write(Journal(str(tmp_path), "another", 3), LayerRecord(1))
    with pytest.raises(InputError, match="out: model-00003-of-00004.safetensors belongs to another run"):
        journal.finished()
