"""The steps of benchmarks/gpu one after another, each in a process of its own under its own time limit.

    python -m benchmarks.gpu --out DIR [--only STEP ...] [--device cpu]

Results are written as they come: DIR/gpu.json, DIR/gpu.md (one table), and DIR/gpu.log with all output of the steps.
A step that fails or takes too long is a row that says so, and the next one starts; the exit code is 1 if any failed.
On a CPU (`--device cpu`) all sizes are small and limits five times as long: a trial of the steps themselves.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from benchmarks.gpu.results import Row, Rows, read_rows, write_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="directory of the results")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps to carry out (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, help="small sizes (default: on a CPU)")
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # of one step: this process carries it out
    args = parser.parse_args()
    small = args.device == "cpu" if args.small is None else args.small

    from benchmarks.gpu.steps import STEPS

    if unknown := set(args.only or ()) - STEPS.keys():
        parser.error(f"--only {' '.join(sorted(unknown))}: use some of {', '.join(STEPS)}")
    steps = [step for step in STEPS.values() if not args.only or step.name in args.only]
    if args.rows:
        from benchmarks.gpu.setting import Setting

        with open(args.rows, "a") as file:
            for step in steps:
                step.run(Setting(args.device, small), Rows(step.name, file))
        return

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with (out / "gpu.log").open("w") as log:
        for step in steps:
            words = ["--device", args.device, "--small" if small else "--no-small"]
            rows += carry_out(step.name, step.limit * (5 if small else 1), words, log)
            write_results(out, rows)
            print(f"{step.name}: {rows[-1].value}{'' if rows[-1].ok else ' FAILED'}", flush=True)
    print((out / "gpu.md").read_text(), end="")
    sys.exit(1 if any(row.ok is False for row in rows) else 0)


def carry_out(name: str, limit: float, words: list[str], log: IO[str]) -> list[Row]:
    """Carry out one step in a process of its own; return its rows, the last of which says how it ended."""
    print(f"== {name}", file=log, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows")
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", folder, "--only", name, "--rows", str(file), *words]
        started = time.monotonic()
        start = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            end = f"{time.monotonic() - started:.0f} s" if code == 0 else f"exit code {code}: {_last_line(log, start)}"
        except subprocess.TimeoutExpired:
            code, end = 1, f"killed after {limit:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
        rows = read_rows(file)
        faults = sum(row.ok is False for row in rows)
        if code == 0 and faults:
            end += f", {faults} faults"
        return [*rows, Row(name, "the step", end, ok=code == 0 and not faults)]


def _last_line(log: IO[str], start: int) -> str:
    """Return the last line that a step has printed: of a traceback, the error."""
    log.flush()
    lines = Path(log.name).read_bytes()[start:].decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")


if __name__ == "__main__":
    main()
