"""Checkpoints of a training run, in DeepSpeed's own format, in a directory that all nodes see.

`latest` names the last complete one; it is written last, under a temporary name, and renamed. The one with the lowest
held-out loss stays beside it where its weights may be written. With another number of processes a run resumes from a
universal checkpoint, which DeepSpeed converts from an ordinary one.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal

from shardprune.errors import TrainingError
from shardprune.recovery.best import Best
from shardprune.storage.folder import Folder

LATEST = "latest"
CONVERSION = timedelta(hours=4)  # which the other processes wait at most for a large checkpoint's conversion
PARTITION = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class Checkpoints:
    """The checkpoints in a directory.

    Args:
        trained_only: leave out frozen parameters.
        keep_best: keep the checkpoint with the lowest held-out loss beside the last one.
    """

    def __init__(self, directory: str, trained_only: bool, keep_best: bool) -> None:
        self._path = Path(directory)
        self._folder = Folder(directory, "state")
        self._trained_only, self._keep_best = trained_only, keep_best

    def latest(self) -> str | None:
        """Return the name of the last complete checkpoint."""
        return self._folder.read_text(LATEST).strip() if self._folder.is_file(LATEST) else None

    def save(self, engine: deepspeed.DeepSpeedEngine, step: int, best: Best) -> None:
        """Save the state after a step, and remove the checkpoints that are not needed any more.

        Args:
            best: the lowest held-out loss up to this step.
        """
        tag = _tag(step)
        kept = {tag, _tag(best.step)} if self._keep_best else {tag}
        if dist.get_rank() == 0:
            shutil.rmtree(self._path / tag, ignore_errors=True)  # left by an attempt that was killed while writing
        dist.barrier()
        engine.save_checkpoint(
            str(self._path),
            tag=tag,
            client_state={"step": step, "best": asdict(best)},
            save_latest=False,
            exclude_frozen_parameters=self._trained_only,
        )
        dist.barrier()  # every process has written its part
        if dist.get_rank() == 0:
            self._folder.write_text(LATEST, tag)
            for path in self._path.glob("*step*"):
                if path.name not in kept:
                    shutil.rmtree(path)

    def load(self, engine: deepspeed.DeepSpeedEngine) -> tuple[int, Best]:
        """Load the last complete checkpoint; return the steps done before it and the lowest held-out loss of those.

        Where there is none, nothing is loaded, and no step is done.
        """
        # Rank 0 alone looks: on shared storage other nodes may see new files later.
        tag = broadcast_from_rank_zero(self.latest if dist.get_rank() == 0 else None)
        if tag is None:
            return 0, Best()
        state = self._load(engine, tag)
        return state["step"], Best(**state.get("best", {}))  # absent in those written before there was a choice

    def load_best(self, engine: deepspeed.DeepSpeedEngine, best: Best) -> None:
        """Load the checkpoint with the lowest held-out loss.

        Raises:
            TrainingError: no held-out loss was finite.
        """
        if best.step == 0:
            raise TrainingError("none of the held-out losses is finite; use a lower learning rate")
        self._load(engine, _tag(best.step))

    def _load(self, engine: deepspeed.DeepSpeedEngine, tag: str) -> dict[str, Any]:
        """Load a checkpoint, whatever number of processes it was written by; return the state saved beside it."""
        written_by = broadcast_from_rank_zero((lambda: self._processes(tag)) if dist.get_rank() == 0 else None)
        convert = written_by not in (0, dist.get_world_size())
        if convert:
            tag = self._universal(tag)
            engine._config.load_universal_checkpoint = True
        path, state = engine.load_checkpoint(str(self._path), tag=tag, load_module_strict=not self._trained_only)
        engine._config.load_universal_checkpoint = False
        assert path is not None, f"{tag} cannot be loaded"
        return state

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


def _tag(step: int) -> str:
    """Return the name of the checkpoint after a step."""
    return f"step{step}"


def broadcast_from_rank_zero(find: Callable[[], Any] | None) -> Any:
    """Return the result of rank 0's `find` in all processes; the others pass None."""
    found = [find() if find else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]
