"""Suspends a process as it imports the module of SHARDPRUNE_TEST_SUSPENDED_AT: Python runs this file first wherever its
folder is on the path."""

import os
import signal
import sys


class _Suspending:
    """A finder that finds nothing, and suspends the process where the module is looked for."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name == self.module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGSTOP)


if module := os.environ.pop("SHARDPRUNE_TEST_SUSPENDED_AT", None):
    sys.meta_path.insert(0, _Suspending(module))
