"""Kills at random moments: the same command until it ends, and its output compared with an undisturbed run's.

A trial is one command. Its driver or one of its workers gets SIGKILL, SIGTERM or (the driver) SIGINT at a random moment
of a random phase; sometimes the command that goes on from there gets another one.
"""

import json
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.failures.driving import PAUSE, Driver, is_phase
from tests.failures.scenarios import Scenario
from tests.support.tiny import load_tensors

LONGEST = 300.0  # seconds of one start of a command
AGAIN = 0.3  # chance that the command that goes on is killed, too
VICTIMS = {
    "driver": (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT),
    "worker": (signal.SIGKILL, signal.SIGTERM),
}
ENDS = {signal.SIGKILL: (None, 0), signal.SIGTERM: (143, 0), signal.SIGINT: (130, 0)}  # 0: it was over already
TRACES = re.compile(r"Traceback|Error\b.*:|^\s+File |core dumped|Fatal", re.MULTILINE)


@dataclass(frozen=True)
class Kill:
    """A signal that a process got, and the phase in which it got it."""

    victim: str
    number: signal.Signals
    phase: str
    moment: str


@dataclass
class Trial:
    """A command that was killed until it ended."""

    scenario: str
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    problems: list[str] = field(default_factory=list)


def trials(scenarios: list[Scenario], seed: int, kills: int, work: Path, address: Callable[[], str]) -> Iterator[Trial]:
    """Try commands in turn until so many signals were sent."""
    draw, sent, number = random.Random(seed), 0, 0
    undisturbed: dict[str, tuple[Path, list[tuple[str, float]]]] = {}
    while sent < kills:
        scenario = scenarios[number % len(scenarios)]
        if scenario.name not in undisturbed:
            undisturbed[scenario.name] = _undisturbed(scenario, work, address)
        expected, phases = undisturbed[scenario.name]
        trial = _try(scenario, expected, phases, draw, work / f"trial-{number}", address)
        sent, number = sent + len(trial.kills), number + 1
        yield trial


def _undisturbed(scenario: Scenario, work: Path, address: Callable[[], str]) -> tuple[Path, list[tuple[str, float]]]:
    """The output of a command that nothing happens to, and its phases with their seconds."""
    place = work / f"undisturbed-{scenario.name.replace(' ', '-').replace(',', '')}"
    driver = Driver(scenario.command(place / "out", address()), place)
    assert driver.wait(LONGEST), f"{scenario.name} hangs"
    assert driver.code == 0, (scenario.name, driver.code, driver.lines())
    return place / "out", driver.phases()


def _try(
    scenario: Scenario,
    expected: Path,
    phases: list[tuple[str, float]],
    draw: random.Random,
    place: Path,
    address: Callable[[], str],
) -> Trial:
    trial = Trial(scenario.name)
    command = scenario.command(place / "out", address())
    disturbed = True
    while not trial.problems:
        driver = Driver(command, place / f"start-{trial.starts}")
        trial.starts += 1
        if disturbed:
            _disturb(driver, scenario, phases, draw, trial)
        if not driver.wait(LONGEST):
            trial.problems.append(f"hang: {driver.told()[-1:]}")
            driver.send(signal.SIGKILL)
            break
        kill = trial.kills[-1] if disturbed and trial.kills else None
        trial.problems += _wrong_lines(driver, kill)
        if driver.code == 0:
            if kill and kill.victim == "driver":  # which had ended already
                trial.kills.pop()
            break
        disturbed = draw.random() < AGAIN
        if trial.starts > 12:
            trial.problems.append("the command does not come to an end")
    if not trial.problems:
        trial.problems += _differing(expected, place / "out")
    return trial


def _disturb(
    driver: Driver, scenario: Scenario, phases: list[tuple[str, float]], draw: random.Random, trial: Trial
) -> None:
    """Send a signal at a random moment of a random phase, if the command comes so far."""
    victim = draw.choice(("driver", "worker")) if scenario.slots else "driver"
    number, wanted = draw.choice(VICTIMS[victim]), draw.choice(sorted({phase for phase, _ in phases}))
    places = [(at, seconds) for at, (phase, seconds) in enumerate(phases) if phase == wanted]
    at, seconds = draw.choices(places, [seconds + 1e-3 for _, seconds in places])[0]
    while len([told for told in driver.told() if is_phase(told)]) <= at:
        if driver.over():
            return
        time.sleep(PAUSE)
    time.sleep(draw.random() * seconds)
    told = [line for line in driver.told() if not line.startswith("code ")]
    phase = next((line for line in reversed(told) if is_phase(line)), "start")
    with suppress(psutil.NoSuchProcess):
        if victim == "driver":
            driver.send(number)
        elif workers := _workers():
            draw.choice(workers).send_signal(number)
        else:  # none has started yet, or all have ended
            return
        trial.kills.append(Kill(victim, number, phase, told[-1] if told else "start"))


def _workers() -> list[psutil.Process]:
    """The processes of Ray that carry out an actor or a task, of all commands: there is one at a time. Those of the
    node itself are left alone, with which it ends."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and not any(other in title for other in ("ray::IDLE", "Agent")):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def _wrong_lines(driver: Driver, kill: Kill | None) -> list[str]:
    """What is wrong with how a command ended and with what it said."""
    lines, problems = driver.lines(), []
    allowed = ENDS[kill.number] if kill and kill.victim == "driver" else (0,)
    said = " ".join(lines[-3:])[:400]
    if driver.code not in allowed:
        problems.append(f"exit code {driver.code}, not {allowed[0]}: {said}")
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != (1 if driver.code else 0):
        problems.append(f"{len(errors)} errors for exit code {driver.code}: {said}")
    if traces := [
        line for line in lines if TRACES.search(line) and not line.startswith(("error: ", "a worker was lost"))
    ]:
        problems.append(f"a line of a library: {traces[0][:300]}")
    return problems


def _differing(expected: Path, out: Path) -> list[str]:
    """What of an output is not what an undisturbed run's is."""
    problems = []
    for folder in sorted(path.parent for path in expected.rglob("result.json")):
        place = out / folder.relative_to(expected)
        ours, theirs = _measured(place), _measured(folder)
        problems += [f"{name} of result.json differs" for name in theirs if ours.get(name) != theirs[name]]
        first, second = load_tensors(folder), load_tensors(place)
        if first.keys() != second.keys():
            problems.append(f"other tensors: {sorted(first.keys() ^ second.keys())[:3]}")
            continue
        different = [
            name for name in first if first[name].dtype != second[name].dtype or not first[name].equal(second[name])
        ]
        problems += [f"{len(different)} tensors differ: {different[:3]}"] if different else []
    left = [
        str(path.relative_to(out)) for path in out.rglob("*") if path.name.endswith(".tmp") or path.name == "run.json"
    ]
    return problems + ([f"left behind: {left[:3]}"] if left else [])


def _measured(folder: Path) -> dict[str, Any]:
    """What a result says of the model, and nothing of where and how long."""
    result = json.loads((folder / "result.json").read_text())
    names = ("model", "sparsity", "perplexity", "structure", "rebuilding", "recovery", "evaluation", "calibration")
    return {name: result[name] for name in names if name in result}
