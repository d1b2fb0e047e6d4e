"""Checkpoints of a training run, in DeepSpeed's own format, in a directory that all nodes see.

`latest` names the last complete one; it is written last, under a temporary name, and renamed. With another number of
processes a run resumes from a universal checkpoint, which DeepSpeed converts from an ordinary one.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal

from shardprune.storage.folder import Folder

LATEST = "latest"
CONVERSION = timedelta(hours=4)  # which the other processes wait at most for a large checkpoint's conversion
PARTITION = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class Checkpoints:
    """The checkpoints in a directory.

    Args:
        trained_only: leave out frozen parameters.
    """

    def __init__(self, directory: str, trained_only: bool) -> None:
        self._path = Path(directory)
        self._folder = Folder(directory, "state")
        self._trained_only = trained_only

    def latest(self) -> str | None:
        """Return the name of the last complete checkpoint."""
        return self._folder.read_text(LATEST).strip() if self._folder.is_file(LATEST) else None

    def save(self, engine: deepspeed.DeepSpeedEngine, step: int) -> None:
        """Save the state after a step and remove older checkpoints."""
        tag = f"step{step}"
        if dist.get_rank() == 0:
            shutil.rmtree(self._path / tag, ignore_errors=True)  # left by an attempt that was killed while writing
        dist.barrier()
        engine.save_checkpoint(
            str(self._path),
            tag=tag,
            client_state={"step": step},
            save_latest=False,
            exclude_frozen_parameters=self._trained_only,
        )
        dist.barrier()  # every process has written its part
        if dist.get_rank() == 0:
            self._folder.write_text(LATEST, tag)
            for path in self._path.glob("*step*"):
                if path.name != tag:
                    shutil.rmtree(path)

    def load(self, engine: deepspeed.DeepSpeedEngine) -> int:
        """Load the last complete checkpoint; return the steps done before it, 0 if there is none."""
        # Rank 0 alone looks: on shared storage other nodes may see new files later.
        tag, convert = broadcast_from_rank_zero(self._found if dist.get_rank() == 0 else None)
        if tag is None:
            return 0
        if convert:
            tag = self._universal(tag)
            engine._config.load_universal_checkpoint = True
        path, state = engine.load_checkpoint(str(self._path), tag=tag, load_module_strict=not self._trained_only)
        engine._config.load_universal_checkpoint = False
        assert path is not None, f"{tag} cannot be loaded"
        return state["step"]

    def _found(self) -> tuple[str | None, bool]:
        """Return the last complete checkpoint, and whether it was written by another number of processes."""
        tag = self.latest()
        written_by = self._processes(tag) if tag else 0
        return tag, bool(written_by) and written_by != dist.get_world_size()

    def _processes(self, tag: str) -> int:
        """Return the number of processes that a checkpoint is partitioned over; 0 if it is not partitioned."""
        return len([path for path in (self._path / tag).iterdir() if PARTITION.fullmatch(path.name)])

    def _universal(self, tag: str) -> str:
        """Convert an ordinary checkpoint into a universal one; return its name."""
        universal = f"universal-{tag}"
        # A group of its own, because collectives between GPUs fail much sooner. It notices a process that dies.
        waiting = dist.new_group(backend="gloo", timeout=CONVERSION)
        if dist.get_rank() == 0:
            shutil.rmtree(self._path / universal, ignore_errors=True)
            options = argparse.Namespace(
                input_folder=str(self._path / tag),
                output_folder=str(self._path / universal),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
            with redirect_stdout(sys.stderr):  # it prints its progress
                ds_to_universal.main(options)
        dist.barrier(waiting)
        dist.destroy_process_group(waiting)
        return universal


def broadcast_from_rank_zero(find: Callable[[], Any] | None) -> Any:
    """Return the result of rank 0's `find` in all processes; the others pass None."""
    found = [find() if find else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]
