"""The process of a job's command in a container, where it is a step of the job: a signal to srun would kill it at once.

    python -m shardprune.cluster.slurm.driver COMMAND [OPTIONS]

It ends the command by SIGTERM when standard input says so, or ends. Its exit code is the command's.
"""

import signal
import subprocess
import sys
import threading

from shardprune.cluster.slurm.processes import END


def main(words: list[str] | None = None) -> int:
    command = [sys.executable, "-m", "shardprune", *(sys.argv[1:] if words is None else words)]
    for number in (signal.SIGTERM, signal.SIGINT):  # Slurm sends them to the command, too, and then this one ends
        signal.signal(number, lambda *_: None)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_listen, args=(process,), daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _listen(process: "subprocess.Popen[bytes]") -> None:
    while (line := sys.stdin.readline()) and line.strip() != END:
        continue
    process.terminate()


if __name__ == "__main__":
    sys.exit(main())
