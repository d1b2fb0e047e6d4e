"""A search whose candidates are tuned by trainings in Ray Train's workers: the same as in one process."""

import signal
import threading
import time

import pytest

from tests.support.clusters import kill, processes_of
from tests.support.tiny import differing
from tests.support.tuned import make_material, tuned_search


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def found(folder):
    return tuned_search(folder, "local", shards=2)


class Trainings(threading.Thread):
    """A thread that looks until two processes train at the same time, and calls `then` with them. Those of an earlier
    search end first."""

    def __init__(self, then) -> None:
        super().__init__(daemon=True)
        self._then, self._over = then, threading.Event()
        self.seen = False

    def run(self) -> None:
        while not self._over.wait(0.05):
            processes = processes_of("RayTrainWorker")
            if len(processes) == 2:
                self.seen = True
                self._then(processes)
                return

    def __enter__(self):
        deadline = time.monotonic() + 60
        while processes_of("RayTrainWorker"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self.join()


@pytest.mark.long
def test_candidates_are_tuned_at_the_same_time_with_the_bits_of_the_local_search(ray, folder, found, tmp_path):
    with Trainings(lambda processes: None) as trainings:
        result = tuned_search(folder, tmp_path / "ray", shards=2, backend="ray")
    assert trainings.seen
    path = found.structure.path
    assert len(path) > 1
    assert all(entry.scores != entry.untuned for entry in path)
    assert result.structure == found.structure
    assert differing(tmp_path / "ray", folder / "local") == []
    assert not list((tmp_path / "ray").glob("candidate-*"))


@pytest.mark.long
def test_a_training_that_dies_is_started_again_beside_the_other_one(ray, folder, found, tmp_path):
    with Trainings(lambda processes: kill(processes[0])) as trainings:
        result = tuned_search(folder, tmp_path / "ray", shards=2, backend="ray")
    assert trainings.seen
    assert result.structure == found.structure
    assert differing(tmp_path / "ray", folder / "local") == []


@pytest.mark.long
def test_trainings_end_with_the_search_that_is_stopped(ray, folder, found, tmp_path):
    main = threading.main_thread().ident
    assert main is not None

    def stop(_processes) -> None:
        signal.pthread_kill(main, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), Trainings(stop) as trainings:
        tuned_search(folder, tmp_path / "ray", shards=2, backend="ray")
    assert trainings.seen
    deadline = time.monotonic() + 30
    while processes_of("RayTrainWorker", "TrainController") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of("RayTrainWorker", "TrainController") == []
    result = tuned_search(folder, tmp_path / "ray", shards=2, backend="ray")
    assert result.structure == found.structure
    assert differing(tmp_path / "ray", folder / "local") == []
