"""`python -m tests.failures`: kill commands of every kind at random moments until each ends, and compare.

`make drill N=100 SEED=3` sends a hundred signals to drivers and workers, one run at a time, over one Ray cluster.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

from tests.failures.random_kills import Trial, trials
from tests.failures.scenarios import SCENARIOS, make_material
from tests.support.clusters import slots_for_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the drill; return 1 if any tensor differs or any line is wrong."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell ignores in what it starts in the background
    parser = argparse.ArgumentParser(prog="python -m tests.failures", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", nargs="*", metavar="SCENARIO", help=f"of: {'; '.join(s.name for s in SCENARIOS)}")
    asked = parser.parse_args(arguments)
    scenarios = [scenario for scenario in SCENARIOS if not asked.only or scenario.name in asked.only]
    print(f"seed {asked.seed}: {asked.kills} kills over {len(scenarios)} commands", flush=True)
    began, done = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        make_material(Path(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
        os.chdir(folder)
        with slots_for_commands(2 if any(scenario.slots for scenario in scenarios) else 0) as address:
            for trial in trials(scenarios, asked.seed, asked.kills, Path(folder), address):
                done.append(trial)
                _tell(trial)
    _print(done)
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if any(trial.problems for trial in done) else 0


def _tell(trial: Trial) -> None:
    kills = ", ".join(f"{kill.number.name} to {kill.victim} at {kill.moment!r} of {kill.phase}" for kill in trial.kills)
    print(f"{trial.scenario}: {kills or 'over before the moment'}; {trial.starts} starts", flush=True)
    for problem in trial.problems:
        print(f"  WRONG: {problem}", flush=True)


def _print(done: Sequence[Trial]) -> None:
    """The table of kills by kind of process and phase, and of commands."""
    kills = [kill for trial in done for kill in trial.kills]
    counts = Counter((f"{kill.victim}, {kill.number.name}", kill.phase) for kill in kills)
    rows = sorted({row for row, _ in counts})
    phases = list(dict.fromkeys(kill.phase for kill in kills))
    width = max(map(len, phases), default=0) + 2
    print(f"\n{'':18}" + "".join(f"{phase:>{width}}" for phase in phases))
    for row in rows:
        print(f"{row:18}" + "".join(f"{counts[row, phase]:>{width}}" for phase in phases))
    print(f"\n{'':32}{'commands':>10}{'kills':>10}{'wrong':>10}")
    for name in dict.fromkeys(trial.scenario for trial in done):
        of = [trial for trial in done if trial.scenario == name]
        wrong = sum(bool(trial.problems) for trial in of)
        print(f"{name:32}{len(of):>10}{sum(len(trial.kills) for trial in of):>10}{wrong:>10}")
    tensors = sum("tensors" in problem for trial in done for problem in trial.problems)
    print(f"{'all':32}{len(done):>10}{len(kills):>10}{sum(bool(trial.problems) for trial in done):>10}")
    print(f"commands with tensors that differ: {tensors}")


if __name__ == "__main__":
    sys.exit(main())
