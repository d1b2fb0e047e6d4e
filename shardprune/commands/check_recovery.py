"""Checks of what a fine-tuning needs beside its inputs: a compiler, a place for its state, DeepSpeed's consent."""

import os
import shutil
from pathlib import Path
from typing import Any

from shardprune.errors import InputError
from shardprune.recovery.spec import DecidedRecipe
from shardprune.recovery.teacher_store import TeacherStore
from shardprune.storage.folder import PARTIAL, Folder
from shardprune.storage.malformed import located
from shardprune.storage.quantities import gigabytes

CLAIM = "fingerprint"  # file of a state that says whose it is


def check_compiler(recipe: DecidedRecipe) -> None:
    """DeepSpeed builds its collectives between CPUs, and its optimizer for offloaded states, when they are used."""
    if (recipe.device == "cpu" or recipe.offload) and not (shutil.which("g++") or shutil.which("c++")):
        raise InputError(
            "device", f"{recipe.device!r} needs a C++ compiler, with which DeepSpeed builds what it needs; install g++"
        )


def check_state(recipe: DecidedRecipe, claim: str) -> None:
    """Check that the place for the training's state is free, or has this training's, and takes files.

    Raises:
        InputError: it holds something else, or the output, with which it must not go.
    """
    state, out = (os.path.realpath(path) for path in (recipe.state, recipe.out))
    if "://" not in recipe.out and os.path.commonpath((state, out)) == state:
        raise InputError("state", f"{recipe.state} holds the output, and it is removed at the end; choose another")
    folder, claimed = Folder(recipe.state, "state"), claim_of(recipe.state)
    names = [name for name in folder.names() if not PARTIAL.fullmatch(name)]
    if claimed != claim and names:
        held = "is not empty" if claimed is None else "holds another training"
        raise InputError("state", f"{recipe.state} {held}; choose an empty directory")
    folder.check_writable()


def claim_of(state: str) -> str | None:
    """Return the text that says whose a directory of training checkpoints is; None where nothing does."""
    folder = Folder(state, "state")
    with located("state", f"{state}/{CLAIM}"):
        return folder.read_text(CLAIM) if folder.is_file(CLAIM) else None


def check_room_for_teacher(store: TeacherStore, state: str) -> None:
    """Check that the state takes the teacher's predictions that are not stored yet.

    Raises:
        InputError: there is too little room.
    """
    there = next(path for path in (Path(state), *Path(state).parents) if path.exists())
    wanted, free = store.bytes_missing(), shutil.disk_usage(there).free
    if wanted > free:
        raise InputError(
            "teacher_top",
            f"{store.top} predictions of {store.predictions:,} tokens take {gigabytes(wanted)}, and {state} has "
            f"{gigabytes(free)}; use fewer, or another state",
        )


def check_settings(file: str, config: dict[str, Any]) -> None:
    """Let DeepSpeed read the user's settings as one process would.

    Args:
        file: of the settings.
        config: DeepSpeed's, of one process, with them.

    Raises:
        InputError: it does not take them.
    """
    from deepspeed.runtime.config import DeepSpeedConfig  # takes seconds

    try:
        DeepSpeedConfig(config)
    except Exception as error:  # it checks settings in many ways, each with an error of its own
        reason = " ".join(str(error).split())
        raise InputError("deepspeed", f"{file!r} does not work: {reason}") from error
