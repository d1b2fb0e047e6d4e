"""Imports of torch and transformers without the collector's passes over what they make."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import modules while the garbage collector rests, and leave them out of all its later passes.

    Functions and classes of modules live as long as the process, a million objects with torch and transformers.
    Looking through them again and again is a quarter of the time that their imports take.

    For processes that are shardprune's own, and only where torch is not yet imported: objects of work that is already
    under way must be found when they become garbage.
    """
    if "torch" in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
