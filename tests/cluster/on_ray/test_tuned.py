"""A search whose candidates are tuned by trainings in Ray Train's workers: the same as in one process."""

import pytest

from tests.support.tiny import differing
from tests.support.tuned import make_material, tuned_search


@pytest.mark.long
def test_a_search_with_tuned_candidates_is_the_local_one_to_the_bit(ray, tmp_path):
    folder = make_material(tmp_path)
    found = {name: tuned_search(folder, tmp_path / name, backend=name, shards=2) for name in ("local", "ray")}
    path = found["local"].structure.path
    assert len(path) > 1
    assert all(entry.scores != entry.untuned for entry in path)
    assert found["ray"].structure == found["local"].structure
    assert differing(tmp_path / "ray", tmp_path / "local") == []
    assert not list((tmp_path / "ray").glob("candidate-*"))
