"""`python -m tests.fuzz`: give commands malformed inputs of all kinds, and say which of them end wrongly.

`make fuzz SEED=3` tries 1,700 inputs. Failing inputs are kept, each with a line that tries it again.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from queue import Empty

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.fuzz.commands import COMMANDS
from tests.fuzz.kinds import HEAVY, KINDS, WELL_FORMED
from tests.fuzz.material import make_material
from tests.fuzz.running import Name, Tried, prepare_process, tried

ENDS = ("refused", "stopped", "finished")


def main(arguments: Sequence[str] | None = None) -> int:
    """Try inputs; return 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--count", type=int, default=1700, help="inputs of all kinds together")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", nargs="*", choices=sorted(KINDS), metavar="KIND", help="default: all")
    parser.add_argument("--without", nargs="*", choices=sorted(KINDS), metavar="KIND", help="all kinds but these")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="try one input")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for inputs that fail")
    asked = parser.parse_args(arguments)
    kinds = asked.kinds or [kind for kind in KINDS if kind not in (asked.without or ())]
    heavy = not HEAVY.isdisjoint(kinds)
    controls = [
        Name(asked.seed, WELL_FORMED, number)
        for number, command in enumerate(COMMANDS.values())
        if heavy or "--tasks" not in command.words
    ]
    names = controls + names_of(asked.seed, asked.count, kinds)
    if asked.only:
        kind, _, number = asked.only.rpartition(":")
        names = [Name(asked.seed, kind, int(number))]
    print(f"seed {asked.seed}: {len(names)} inputs of {len({name.kind for name in names})} kinds", flush=True)
    began = time.monotonic()
    prepare_process(heavy)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        work = Path(folder)
        _in_fork(_make, work)
        results = _try_all(names, work, 1 if asked.only else asked.processes)
        failures = [result for result in results if result.problems]
        for failure in failures:
            _keep(failure, work, asked.keep / str(asked.seed))
    if asked.only:
        print(results[0].errors, end="")
    _print(results, failures, asked.keep / str(asked.seed))
    usage = os.times()
    spent = usage.user + usage.system + usage.children_user + usage.children_system
    print(f"{time.monotonic() - began:.0f} s, {spent:.0f} s of a core")
    return 1 if failures else 0


def names_of(seed: int, count: int, kinds: Sequence[str]) -> list[Name]:
    """The same number of inputs of every kind, in turn, so that a shorter run is the beginning of a longer one."""
    return [Name(seed, kinds[index % len(kinds)], index // len(kinds)) for index in range(count)]


def _make(work: Path) -> None:
    (work / "material").mkdir()
    os.chdir(work / "material")
    make_material()


def _in_fork(act, *arguments) -> None:
    """Do what computes in a fork: threads that computing starts would not be in later forks."""
    process = multiprocessing.get_context("fork").Process(target=act, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the material cannot be made")


def _try_all(names: Sequence[Name], work: Path, processes: int) -> list[Tried]:
    """Try inputs in several rows of forks at once."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def row(part: Sequence[Name], place: Path) -> None:
        place.mkdir()
        (place / "material").symlink_to(work / "material")
        for result in tried(part, place):
            queue.put(result)

    rows = [
        context.Process(target=row, args=(names[start::processes], work / f"row-{start}")) for start in range(processes)
    ]
    for process in rows:
        process.start()
    results: list[Tried] = []
    while len(results) < len(names):
        try:
            results.append(queue.get(timeout=1))
        except Empty:
            if not any(process.is_alive() for process in rows) and queue.empty():
                raise SystemExit("not all inputs were tried") from None
    for process in rows:
        process.join()
    return sorted(results, key=lambda result: names.index(result.name))


def _keep(failure: Tried, work: Path, folder: Path) -> None:
    """Keep an input that failed, with a line that tries it again."""
    place = folder.absolute() / failure.name.folder
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    made = failure.name.build(work / "material", place)
    about = {"words": made.words, "problems": failure.problems, "errors": failure.errors, "again": _again(failure.name)}
    (place / "failure.json").write_text(json.dumps(about, indent=1))


def _again(name: Name) -> str:
    return f"python -m tests.fuzz --seed {name.seed} --only '{name}'"


def _print(results: Sequence[Tried], failures: Sequence[Tried], folder: Path) -> None:
    """The table of inputs by kind, and the failures by their cause."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        counts[result.name.kind].update(["inputs", result.ended] + (["failures"] if result.problems else []))
    columns = ("inputs", *ENDS, "failures")
    print(f"\n{'':22}" + "".join(f"{column:>10}" for column in columns))
    for kind in (WELL_FORMED, *KINDS):
        if kind in counts:
            print(f"{kind:22}" + "".join(f"{counts[kind][column]:>10}" for column in columns))
    total = sum(counts.values(), Counter())
    print(f"{'all':22}" + "".join(f"{total[column]:>10}" for column in columns))
    causes: dict[str, list[Tried]] = defaultdict(list)
    for failure in failures:
        for problem in failure.problems:
            causes[_cause(problem)].append(failure)
    for cause, found in sorted(causes.items(), key=lambda item: -len(item[1])):
        kinds = ", ".join(sorted({failure.name.kind for failure in found}))
        print(f"\n{len(found)} x {cause}\n  in {kinds}\n  {_again(found[0].name)}")
    if failures:
        print(f"\ninputs that failed are kept in {folder}")


def _cause(problem: str) -> str:
    """A problem without what differs from input to input."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"|\d+(\.\d+)?", "*", problem)
    return "".join(letter if letter.isprintable() else "?" for letter in plain)[:200]


if __name__ == "__main__":
    sys.exit(main())
