"""A few kills at random moments, always the same; `make drill` sends many others, also to workers on Ray."""

import pytest

from tests.failures.random_kills import trials
from tests.failures.scenarios import SCENARIOS, make_material
from tests.support.forking import forks

QUICK = ("prune, composite", "mop", "evaluate")


@pytest.mark.long
def test_commands_that_are_killed_end_as_if_nothing_had_happened(tmp_path, monkeypatch):
    make_material(tmp_path)
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in QUICK]
    with forks():
        monkeypatch.chdir(tmp_path)
        done = [
            trial for scenario in scenarios for trial in trials([scenario], 0, 1, tmp_path / scenario.name, lambda: "")
        ]
    assert {trial.scenario for trial in done} == set(QUICK)
    assert [(trial.scenario, trial.problems) for trial in done if trial.problems] == []
