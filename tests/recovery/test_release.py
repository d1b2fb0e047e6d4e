"""A training in this process leaves nothing of its model behind."""

import gc

import pytest
import torch

from tests.recovery.trainings import train
from tests.support.seeing import make_conversations, make_seeing


def tensor_bytes() -> int:
    """The bytes of all tensors that are alive."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and not one.is_meta:
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("zero", "way"),
    [
        (2, {}),
        (3, {}),
        pytest.param(3, {"full": True}, marks=pytest.mark.long),
        pytest.param(3, {"teacher": "{folder}/dense"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_training_leaves_no_tensors(folder, zero, way, tmp_path):
    way = {name: value.format(folder=folder) if isinstance(value, str) else value for name, value in way.items()}
    train(folder, tmp_path / "first", zero=zero, steps=1, **way)  # what libraries keep for all trainings
    before = tensor_bytes()
    train(folder, tmp_path / "second", zero=zero, steps=1, **way)
    assert tensor_bytes() - before < 10_000  # a layer has 60,000


def test_towers_that_see_images_go_too(folder, tmp_path):
    """Of a student and its teacher: DeepSpeed does not know them, but keeps what does."""
    model, data = make_seeing(tmp_path / "model"), make_conversations(tmp_path)
    way = {"model": model, "teacher": model, "data": data, "images": str(tmp_path / "images"), "length": 64}
    train(folder, tmp_path / "first", zero=3, steps=1, **way)
    before = tensor_bytes()
    train(folder, tmp_path / "second", zero=3, steps=1, **way)
    assert tensor_bytes() - before < 5_000  # a tower has 23,000
