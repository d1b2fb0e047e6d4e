"""Commands in a real terminal: their keys, what they show, and the processes that they leave behind."""

import fcntl
import os
import re
import select
import signal
import struct
import sys
import termios
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "SHARDPRUNE_TEST_TERMINAL"
ROOT = Path(__file__).parents[2]


class Terminal:
    """A command in the foreground of a terminal of its own.

    Args:
        words: of the command line, after the interpreter.
        suspended_at: the import of a module at which the process suspends itself.
    """

    def __init__(self, *words: str, cwd: Path, suspended_at: str | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 400, 0, 0))  # rows, columns
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", MARK: self.mark}
        if suspended_at:
            environment["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).with_name('suspended')}"
            environment["SHARDPRUNE_TEST_SUSPENDED_AT"] = suspended_at
        self.process = psutil.Popen(
            [sys.executable, *words],
            cwd=cwd,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._shown = b""
        self._over = threading.Event()
        self._read_all = threading.Event()  # of what there was to read; processes of the command may stay a while
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: nobody has the terminal any more
            while not self._over.is_set():
                if select.select([self._master], [], [], 0.05)[0]:
                    self._shown += os.read(self._master, 65536)
                else:
                    self._read_all.set()
        self._over.set()
        self._read_all.set()
        os.close(self._master)

    def close(self) -> None:
        """Close the terminal, as its window is closed."""
        self._over.set()
        self._reader.join()

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def until(self, happened: Callable[[], bool], seconds: float = 300) -> None:
        """Wait until something has happened while the command runs; on a busy machine processes take minutes to
        start."""
        deadline = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.left_behind(0)
                raise AssertionError(self.lines())
            time.sleep(0.005)

    def until_suspended(self) -> None:
        """Wait until the command has suspended itself."""
        self.until(lambda: self.process.status() == psutil.STATUS_STOPPED)

    def ended(self, seconds: float = 240) -> int:
        """Wait for the end, and return the exit code as shells report it."""
        try:
            code = self.process.wait(seconds)
        except psutil.TimeoutExpired:
            self.left_behind(0)
            raise AssertionError(self.lines()) from None
        for _ in range(2):  # the first may have been said before the last words came
            self._read_all.clear()
            assert self._over.is_set() or self._read_all.wait(60)
        return code if code >= 0 else 128 - code

    def lines(self) -> list[str]:
        """What the terminal was sent, without the control sequences of progress bars."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._shown.decode(errors="replace"))
        return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]

    def left_behind(self, seconds: float = 120) -> list[str]:
        """The processes of the command that are there after some seconds, of which they may take a while to end."""
        deadline = time.monotonic() + seconds
        while (found := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in found:
            process.send_signal(signal.SIGKILL)
        return [str(process) for process in found]

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found
